"""The truth that proxies are compared with: fine-tuning, and what the network then does.

Fine-tuning starts from the network that the recipe's own proxy prepares, or another that is
named, and sees images of the training part alone. The numbers on test images are a report about
proxies; nothing is chosen by them, and a search never opens them.
"""

import copy
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from evosearch.data import DataSource, ImagePool, Images, balanced_subset, whole
from evosearch.errors import BackendError, ConfigError, DataError, EvosearchError
from evosearch.fidelity.variants import RECIPE
from evosearch.materials import source_of
from evosearch.networks import Network, check_alive
from evosearch.policy import Policy
from evosearch.recipe import Recipe
from evosearch.scoring.devices import use_gpu_of
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload, settled_precision
from evosearch.training import TrainSettings
from evosearch.training.finetune import evaluate, finetune

__all__ = ["FineTuned", "Truth", "check_images", "fine_tune_all", "parts_of"]

_POLL_S = 0.5
_AUTO = "auto"
_PRECISIONS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How to fine-tune.

    Args:
        epochs: Passes over the training images.
        lr: Peak learning rate; one cosine down to zero.
        batch: Images per step.
        seeds: Independent repetitions; two or more tell how reliable the truth itself is.
        fraction: Share of the training images, classes balanced.
        precision: `bf16` (autocast), `fp32`, or `auto`: `bf16` where the hardware computes in it.
            Elsewhere it would take ten times as long as `fp32`.
        distillation: Share of the loss that follows the dense network's outputs.
        start: Name of the variant that prepares the networks; `recipe` is the recipe's own proxy.
    """

    epochs: int = 1
    lr: float = 0.01
    batch: int = 128
    seeds: int = 1
    fraction: float = 1.0
    precision: str = _AUTO
    distillation: float = 0.0
    start: str = RECIPE

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 1,
            "lr": 0 < self.lr < np.inf,
            "batch": self.batch >= 2,
            "seeds": self.seeds >= 1,
            "fraction": 0 < self.fraction <= 1,
            "precision": self.precision in (_AUTO, *_PRECISIONS),
            "distillation": 0 <= self.distillation <= 1,
        }
        wanted = {
            "epochs": "at least 1",
            "lr": "more than 0",
            "batch": "at least 2",
            "seeds": "at least 1",
            "fraction": "more than 0, at most 1",
            "precision": "bf16, fp32 or auto",
            "distillation": "at least 0, at most 1",
        }
        for key, good in checks.items():
            if not good:
                raise ConfigError(f"--truth: {key} is {wanted[key]}, got {getattr(self, key)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `finetune:epochs=1,lr=0.01`; every key may be left out.

        Raises:
            ConfigError: The text has another form, or a value is impossible.
        """
        kind, _, rest = text.partition(":")
        if kind.strip() != "finetune":
            raise ConfigError(f"--truth {text!r} must read like finetune:epochs=1,lr=0.01")
        types = {name: type(value) for name, value in asdict(cls()).items()}
        given: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in rest.split(","))):
            key, separator, value = (piece.strip() for piece in part.partition("="))
            if key not in types:
                raise ConfigError(f"--truth: unknown key {key!r}; there are {', '.join(types)}")
            if key in given:
                raise ConfigError(f"--truth: {key} is given twice")
            try:
                given[key] = types[key](value) if separator else None
            except ValueError:
                given[key] = None
            if given[key] is None:
                kind = {int: "a whole number", float: "a number", str: "a word"}[types[key]]
                raise ConfigError(f"--truth: {key} is {kind}, got {part!r}")
        return cls(**given)

    def settled(self, *, gpu: bool) -> Self:
        """The same with a precision that this machine, or its GPU, is good at."""
        if self.precision != _AUTO:
            return self
        good = settled_precision(_AUTO, gpu=gpu)
        # The first of two names: what journals have always had.
        return replace(self, precision=next(k for k, name in _PRECISIONS.items() if name == good))

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers of one repetition but its start, as plain data."""
        # Journals from before there were teachers do not name any.
        unnamed = ("seeds", "start", *(() if self.distillation else ("distillation",)))
        return {key: value for key, value in asdict(self).items() if key not in unnamed}

    def training(self, network: Network, seed: int) -> TrainSettings:
        """The same for the trainer; crops and flips are those the network was trained with."""
        return TrainSettings(
            epochs=self.epochs,
            batch_size=self.batch,
            lr=self.lr,
            warmup_epochs=0.0,
            crop_padding=network.input.crop_padding,
            flip=network.input.flip,
            precision=_PRECISIONS[self.precision],
            distillation=self.distillation,
            seed=seed,
            threads=1,
        )


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What came of fine-tuning one policy once.

    Args:
        policy: What was fine-tuned.
        seed: Of order and crops.
        numbers: `held-out.error`, `test.loss` and so on; empty if it failed.
        seconds: That it took, measuring included.
        reason: Why there are no numbers.
    """

    policy: Policy
    seed: int
    numbers: Mapping[str, float]
    seconds: float
    reason: str | None = None


def parts_of(recipe: Recipe, *, test: bool | None) -> tuple[str, ...]:
    """The parts of the source that the truth is measured on.

    Args:
        recipe: Says where images come from.
        test: Whether to use test images; None: if there are any.

    Raises:
        DataError: There are none, but they are asked for.
    """
    if test is False:
        return ("held-out",)
    try:
        _pool(source_of(recipe), "test")
    except DataError:
        if test:
            raise
        return ("held-out",)
    return ("test", "held-out")


def check_images(recipe: Recipe, truth: Truth) -> None:
    """Checks that there is enough to train on, before anything is scored.

    Raises:
        ConfigError: The share of the training images is less than one batch.
    """
    _size(len(source_of(recipe).training().labels), truth)


def _pool(source: DataSource, part: str) -> ImagePool:
    return source.test() if part == "test" else source.held_out()


class _FineTuner:
    """Holds the images and the scorer that prepares networks; fine-tunes one after another.

    Args:
        workload, recipe, truth, parts: As in `fine_tune_all`.
        worker: Number of the process, by which workers share the GPUs of this machine.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        truth: Truth,
        parts: Sequence[str],
        worker: int = 0,
    ) -> None:
        share = recipe.run.gpus_per_worker
        device = "cuda" if share else "cpu"
        if share:
            use_gpu_of(worker, share)
        self._scorer = Scorer(workload, device)
        self._workload = workload
        self._truth = truth.settled(gpu=share > 0)
        source = source_of(recipe)
        self._device = device
        self._teacher = workload.network().module.to(device)
        self._images = _training_images(source.training(), truth, recipe.data.seed)
        pools = {part: _pool(source, part) for part in parts}
        self._parts = {part: whole(pool) for part, pool in pools.items()}

    def run(self, policy: Policy, seed: int) -> FineTuned:
        """What a policy may do is part of the answer.

        Raises:
            BackendError: The GPU has failed.
        """
        start = time.perf_counter()
        numbers: dict[str, float] = {}
        reason = None
        try:
            # A copy: the scorer goes on to use its own.
            module = copy.deepcopy(self._scorer.network_of(policy))
            network = Network(spec=self._workload.spec, module=module, input=self._workload.input)
            settings = self._truth.training(network, seed)
            finetune(network, self._images, settings, self._teacher)
            for part, images in self._parts.items():
                found = evaluate(network, images)
                numbers |= {f"{part}.{name}": value for name, value in found.items()}
        except Exception as exc:  # noqa: BLE001  the border of a candidate
            check_alive(self._device)
            numbers, reason = {}, f"{type(exc).__name__}: {exc}"[:300]
        if not np.isfinite(list(numbers.values())).all():
            numbers, reason = {}, "the fine-tuned network's outputs are not finite"
        return FineTuned(
            policy=policy,
            seed=seed,
            numbers=numbers,
            seconds=time.perf_counter() - start,
            reason=reason,
        )


def _size(images: int, truth: Truth) -> int:
    """How many of the training images are used."""
    size = round(truth.fraction * images)
    if size < truth.batch:
        raise ConfigError(
            f"--truth: fraction={truth.fraction:g} leaves {size} training images, fewer than one "
            f"batch of {truth.batch}; enlarge fraction or lower batch"
        )
    return size


def _training_images(pool: ImagePool, truth: Truth, seed: int) -> Images:
    size = _size(len(pool.labels), truth)
    if size == len(pool.labels):
        return pool.take(np.arange(size))
    return pool.take(balanced_subset(pool.labels, size, seed))


def fine_tune_all(
    workload: Workload,
    recipe: Recipe,
    truth: Truth,
    parts: Sequence[str],
    tasks: Sequence[tuple[Policy, int]],
    record: Callable[[FineTuned], None],
    stop: Callable[[], bool],
) -> None:
    """Fine-tunes each policy, on `run.workers` processes of one thread each (0: in this one).

    Args:
        workload: Prepares the networks that fine-tuning starts from.
        recipe: Says where images come from, and how many workers there are.
        truth: How.
        parts: What is measured on; from `parts_of`.
        tasks: Policies with the seed of each repetition, in the order of dispatch.
        record: Called once per task as it lands.
        stop: Asked before each dispatch; once true, what is in flight is finished.

    Raises:
        ConfigError: The training part is too small.
        BackendError: A worker died.
    """
    if not tasks or stop():
        return
    if recipe.run.workers == 0:
        tuner = _FineTuner(workload, recipe, truth, parts)
        for policy, seed in tasks:
            if stop():
                return
            record(tuner.run(policy, seed))
        return
    workers = min(recipe.run.workers, len(tasks))
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(workload, recipe, truth, tuple(parts), context.Value("i", 0)),
    )
    try:
        _dispatch(executor, workers, tasks, record, stop)
    except BrokenProcessPool as exc:
        raise BackendError(
            "a worker that fine-tuned died (short of memory?); run the same command again to go "
            "on, perhaps with fewer --workers"
        ) from exc
    except BaseException:
        # Now: whoever interrupts twice does not want to wait for what is in flight.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _dispatch(
    executor: ProcessPoolExecutor,
    workers: int,
    tasks: Sequence[tuple[Policy, int]],
    record: Callable[[FineTuned], None],
    stop: Callable[[], bool],
) -> None:
    waiting = list(reversed(tasks))
    flying: set[Future[FineTuned]] = set()
    while flying or (waiting and not stop()):
        while waiting and len(flying) < workers and not stop():
            # A worker that starts now inherits the mask: Ctrl-C must not end it before it can
            # say that it does not listen.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                flying.add(executor.submit(_work, *waiting.pop()))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        landed, flying = wait(flying, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        # What is done is kept, though another worker's death may have landed with it.
        for future in sorted(landed, key=lambda future: future.exception() is not None):
            record(future.result())


_TUNER: list[_FineTuner | EvosearchError] = []  # one per worker process


def _start_worker(
    workload: Workload, recipe: Recipe, truth: Truth, parts: tuple[str, ...], started: Any
) -> None:
    """Prepares a worker process: Ctrl-C is the driver's business, and its end is ours.

    Args:
        workload: As in `fine_tune_all`.
        recipe: As in `fine_tune_all`.
        truth: As in `fine_tune_all`.
        parts: As in `fine_tune_all`.
        started: Counter of the workers, shared by them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    try:
        _TUNER.append(_FineTuner(workload, recipe, truth, parts, number))
    except EvosearchError as exc:
        _TUNER.append(exc)  # told by the first task: an initialiser cannot say why it failed


def _follow_parent() -> None:
    """Ends this process when its parent has ended, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(policy: Policy, seed: int) -> FineTuned:
    tuner = _TUNER[0]
    if isinstance(tuner, EvosearchError):
        raise tuner
    return tuner.run(policy, seed)
