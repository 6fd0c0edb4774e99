"""Scores one policy after another on one working copy of the network."""

import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from evosearch.data import Images
from evosearch.errors import CandidateOutOfMemory, NetworkError, first_line, out_of_memory
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.networks import Network, check_alive, like_a_cpu
from evosearch.networks.threads import on_threads
from evosearch.policy import Policy
from evosearch.pruning.blending import Blends
from evosearch.pruning.compensation import Compensator
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.folding import FastCopy
from evosearch.pruning.layers import Norm
from evosearch.pruning.patches import PatchCompensator
from evosearch.pruning.reconstruction import Reconstructor
from evosearch.pruning.statistics import shared_tensor
from evosearch.scoring.features import Distortion
from evosearch.scoring.proxies import proxy_named
from evosearch.scoring.racing import Estimate, Race, block_means, rungs
from evosearch.scoring.repair import distil, refit_head
from evosearch.scoring.workload import DTYPES, Workload, batches, logits

__all__ = ["Scorer"]


Answers = tuple[Tensor, Tensor]
"""Logits `(n, n_classes)` of a batch, and its distortion `(n,)`."""

_MAX_REASON = 300
_STATISTICS = ("running_mean", "running_var")
# Normalised images beyond this size are made anew for every policy. Scorers may share a GPU.
_MAX_KEPT_BYTES = 1 << 28
_MAX_KEPT_SHARE = 1 / 64


@torch.inference_mode()
def _check_runs(network: Network, device: str) -> None:
    """Checks that a network computes there, which it need not: a forward may make CPU tensors.

    Raises:
        NetworkError: It does not.
    """
    try:
        network.module(network.example(2).to(device))
    except (RuntimeError, TypeError) as exc:
        if out_of_memory(exc):
            raise
        raise NetworkError(
            f"{network.spec.name} does not run on {device} ({first_line(exc)}); make tensors that "
            "its forward needs buffers, or on the device of its input, or leave out "
            "run.gpus_per_worker"
        ) from exc


def _most_kept(device: str) -> int:
    """So many bytes of images may stay on a device, of each part."""
    if device != "cuda" or not torch.cuda.is_available():
        return _MAX_KEPT_BYTES
    return max(_MAX_KEPT_BYTES, int(_MAX_KEPT_SHARE * torch.cuda.mem_get_info()[1]))


def _means(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(column.mean()) for name, column in values.items()}


def _columns(values: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """`(n, len(METRICS))`."""
    return torch.stack([values[name] for name in METRICS], dim=1).numpy()


def _dropped(estimate: Estimate) -> dict[str, Any]:
    return {
        "status": Status.DROPPED,
        "metrics": estimate.metrics,
        "images": estimate.images,
        "reason": f"worse than {estimate.rival} on its first {estimate.images} images",
    }


class Scorer:
    """Holds a network, its images and its statistics; measures policies.

    Equal policies give equal measurements, bit for bit, in any order and in any process on one
    machine: everything is recomputed from the workload, on one thread.

    Args:
        workload: What to score with.
        device: Where to run, `cpu` or `cuda`.

    Raises:
        NetworkError: The network does not run there.
    """

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        self.settings = workload.settings
        self._workload = workload
        self._table = workload.plan.table
        self._network = workload.network()
        dense = self._network.module.to(device)
        self._device = device
        if device != "cpu":
            _check_runs(self._network, device)
        self._cutter = Cutter(workload.plan, dense)
        self._compensator = None
        if workload.grams:
            self._compensator = Compensator(
                workload.plan, dense, self._cutter.network, workload.grams, self.settings.ridge
            )
        self._patch_compensator = None
        if workload.moments:
            self._patch_compensator = PatchCompensator(
                workload.plan,
                workload.layout,
                dense,
                self._cutter.network,
                workload.moments,
                self.settings.ridge,
            )
        dtype = DTYPES[self.settings.precision]
        # The working copy is exact, to be cut, folded and exported; forward passes run on copies
        # of it that are made for speed.
        self._measured = FastCopy(dense, workload.layout, dtype)
        self._distortion = Distortion(self._measured.module, workload.features, device)
        plain = replace(workload.layout, pairs=(), tails=())
        self._recalibrated = FastCopy(dense, plain, dtype)
        self._norms = [
            layer
            for layer in self._recalibrated.module.modules()
            if isinstance(layer, Norm) and layer.track_running_stats
        ]
        self._reconstructor = None
        if workload.targets:
            self._reconstructor = Reconstructor(
                workload.plan,
                workload.layout,
                dense,
                workload.targets,
                dtype,
                self.settings.reconstruction_ridge,
                every_layer=self.settings.reconstruction_layers == "all",
            )
        nothing = Blends(names=(), scores=np.empty((0, len(workload.places))))
        self._blends = workload.blends or nothing
        self._proxy = proxy_named(self.settings.name)
        self._log_dense = F.log_softmax(shared_tensor(workload.dense_logits).double(), dim=1)
        self._labels = shared_tensor(workload.validation.labels)
        self._teacher = shared_tensor(workload.teacher)
        self._batch_size = self.settings.batch_size
        self._together = self.settings.together
        self._fitting_images: Tensor | None = None
        self._most_kept = _most_kept(device)
        self._kept_inputs: dict[tuple[str, int], list[Tensor]] = {}

    def keep(self, policy: Policy) -> NDArray[np.bool_]:
        """Which channels a policy keeps: `(n_channels + 1,)` by flat number, the last one True."""
        self._table.check(policy)
        counts = np.array(policy.keep, dtype=np.int64)
        places = self._workload.places
        if policy.blend:
            places = self._blends.places(policy.blend, self._table, places)
        return self._table.mask(counts, places)

    def cut(self, keep: NDArray[np.bool_]) -> None:
        """Narrows the working copy, removing all traces of the previous policy."""
        self._cutter.cut(keep)

    def compensate(self, keep: NDArray[np.bool_]) -> None:
        """Folds removed channels into the kept ones."""
        assert self._compensator is not None  # noqa: S101  workloads of such proxies have grams
        self._compensator.compensate(keep)

    def compensate_patches(self, keep: NDArray[np.bool_]) -> None:
        """Refits the consumers' weights and norms from moments of the patches they read."""
        if self._patch_compensator is not None:  # else: no layer's patches are read
            self._patch_compensator.compensate(keep)

    def recalibrate(self) -> None:
        """Replaces batch-norm statistics by plain averages over the calibration images.

        Only batch norm is in training mode meanwhile, so dropout stays off.
        """
        if not self._norms:
            return
        images = self._workload.calibration
        if self.settings.recalibration_images is not None:
            images = images.take(np.arange(min(self.settings.recalibration_images, len(images))))
        fast = self._recalibrated
        fast.update(self._cutter.network)
        for norm in self._norms:
            norm.reset_running_stats()
            norm.train()
        parts = self._inputs("calibration", images, at_least=True)
        with torch.inference_mode():
            for number, batch in enumerate(parts, 1):
                for norm in self._norms:
                    # A plain average. `momentum=None` is one, too, but reads its count from the
                    # device, and a GPU would wait once for each layer.
                    norm.momentum = 1.0 / number
                fast.module(batch.to(self._device, fast.dtype))
        fast.give_statistics(self._cutter.network)

    def reconstruct(self, keep: NDArray[np.bool_]) -> None:
        """Fits layer after layer to what the dense network returned."""
        assert self._reconstructor is not None  # noqa: S101  workloads of such proxies have targets
        # One batch: a layer is fitted on all images before the next one runs.
        if self._fitting_images is None:
            pixels = self._workload.calibration.pixels[: self.settings.reconstruction_images]
            images = self._network.normalise(pixels)
            self._fitting_images = images.to(self._device, self._measured.dtype)
        self._reconstructor.reconstruct(self._cutter.network, keep, self._fitting_images)

    def refit(self) -> None:
        """Fits the classifier to the dense network's outputs."""
        name = self._workload.layout.head
        head = dict(self._cutter.network.named_modules()).get(name or "")
        if name is None or not isinstance(head, nn.Linear):
            raise NetworkError("the network does not end with a linear layer: nothing to refit")
        fast = self._measured
        fast.update(self._cutter.network)
        weight, bias = refit_head(
            fast.module,
            dict(fast.module.named_modules())[name],
            self._inputs("calibration", self._workload.calibration, at_least=True),
            self._teacher,
            self.settings.reconstruction_ridge,
        )
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)

    def distil(self) -> None:
        """Takes a few steps of training towards the dense network's outputs."""
        parts = batches(
            *(self._network, self._workload.calibration, self._together),
            at_least=True,
            device=self._device,
        )
        images = list(parts)
        distil(
            self._cutter.network,
            images,
            torch.split(self._teacher, [len(batch) for batch in images]),
            self.settings.distillation_steps,
            self.settings.distillation_lr,
            self._measured.dtype,
        )

    def _inputs(self, part: str, images: Images, *, at_least: bool = False) -> Iterable[Tensor]:
        """Normalised batches, kept for the next policy unless they are too large for that."""
        size = self._together if at_least else self._batch_size
        dtype, device = self._measured.dtype, self._device
        parts = batches(self._network, images, size, at_least=at_least, device=device)
        if images.pixels.nbytes * dtype.itemsize > self._most_kept:
            return parts
        key = (f"{part} {len(images)}", size)
        if key not in self._kept_inputs:
            self._kept_inputs[key] = [batch.to(dtype) for batch in parts]
        return self._kept_inputs[key]

    def measure(self) -> dict[str, float]:
        """Metrics of the working copy on the validation images."""
        return _means(self._per_image(list(self._answers())))

    def per_image(self) -> dict[str, NDArray[np.float64]]:
        """`(n_validation,)` values of every metric of the working copy; their means are metrics."""
        return {k: v.numpy() for k, v in self._per_image(list(self._answers())).items()}

    def _answers(self) -> Iterator[Answers]:
        """What the working copy makes of the validation images, batch by batch."""
        fast = self._measured
        fast.update(self._cutter.network)
        seen = 0
        for batch in self._inputs("validation", self._workload.validation):
            outputs = logits(fast.module, [batch], fast.dtype)
            yield outputs, self._distortion.of(outputs, seen)
            seen += len(outputs)

    def _per_image(self, answers: list[Answers]) -> dict[str, Tensor]:
        """`(n_seen,)` float64 values of every metric for the first validation images."""
        outputs, distortion = (torch.cat(part) for part in zip(*answers, strict=True))
        n = len(outputs)
        labels, dense = self._labels[:n, None], self._log_dense[:n]
        log_p = F.log_softmax(outputs.double(), dim=1)
        p = log_p.exp()
        right = p.gather(1, labels).squeeze(1)
        wrong = p.scatter(1, labels, -1.0).amax(1)
        return {
            "error": (outputs.argmax(1) != self._labels[:n]).double(),
            "loss": -log_p.gather(1, labels).squeeze(1),
            "margin": 1 - right + wrong,
            "divergence": (dense.exp() * (dense - log_p)).sum(1),
            "distortion": distortion,
        }

    def _measure_in_race(self, race: Race) -> dict[str, Any]:
        """Fields of the measurement of the working copy, which may be dropped early."""
        total = len(self._workload.validation)
        looks = rungs(total, -(-total // self._batch_size)) if race.rivals else ()
        seen: list[Answers] = []
        for part in self._answers():
            seen.append(part)
            if len(seen) in looks:
                values = _columns(self._per_image(seen))
                estimate = race.verdict(values, total, len(looks))
                if estimate:
                    return _dropped(estimate)
        everything = self._per_image(seen)
        blocks = block_means(_columns(everything), total).tobytes()
        return {"metrics": _means(everything), "images": total, "blocks": blocks}

    def network_of(self, policy: Policy) -> nn.Module:
        """The pruned network that the metrics of a policy belong to; valid until the next call."""
        with on_threads(1), like_a_cpu(self._device):
            self._proxy.prepare(self, self.keep(policy))
        return self.network

    @property
    def network(self) -> nn.Module:
        """The pruned network of the policy that was scored last; valid until the next call."""
        return self._cutter.network.eval()

    def score(self, policy: Policy, race: Race | None = None) -> Measurement:
        """Measures a policy. What goes wrong is part of the measurement.

        Args:
            policy: What to measure.
            race: Who may beat it before it has seen all images.

        Raises:
            BackendError: The GPU has failed, so that all candidates would.
        """
        start = time.perf_counter()
        try:
            found: dict[str, Any] | None = None
            with suppress(CandidateOutOfMemory):
                found = self._attempt(policy, race)
            # Not in a handler of the first attempt's exception, which holds on to its tensors.
            if found is None:
                found = self._attempt_smaller(policy, race)
            seconds = time.perf_counter() - start
            return Measurement(policy=policy, **{"status": Status.OK, "seconds": seconds, **found})
        except CandidateOutOfMemory as exc:
            status, reason = Status.OUT_OF_MEMORY, str(exc)
        except Exception as exc:  # noqa: BLE001  the border of a candidate
            check_alive(self._device)
            status = Status.FAILED
            text = " ".join("".join(traceback.format_exception_only(exc)).split())
            reason = text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."
        seconds = time.perf_counter() - start
        return Measurement(policy=policy, status=status, reason=reason, seconds=seconds)

    def _attempt(self, policy: Policy, race: Race | None) -> dict[str, Any]:
        found: dict[str, Any]
        try:
            with on_threads(1), like_a_cpu(self._device):
                self._proxy.prepare(self, self.keep(policy))
                self._refuse_what_is_not_finite()
                if race is None:
                    found = {"metrics": self.measure(), "images": len(self._labels)}
                else:
                    found = self._measure_in_race(race)
        except (MemoryError, RuntimeError) as exc:
            if not out_of_memory(exc):
                raise
            sizes = " and ".join(map(str, dict.fromkeys((self._batch_size, self._together))))
            raise CandidateOutOfMemory(f"out of memory with batches of {sizes}") from exc
        bad = [name for name, value in found["metrics"].items() if not np.isfinite(value)]
        if bad:
            raise FloatingPointError(f"the pruned network's {', '.join(bad)} is not finite")
        return found

    def _refuse_what_is_not_finite(self) -> None:
        """Raises if a ReLU might hide it: on a CPU, those that convolutions do turn NaN into 0."""
        if self._device != "cpu":
            return
        network = self._cutter.network
        named: dict[str, Tensor] = dict(network.named_parameters())
        # A mask may hold infinities on purpose.
        named |= {name: t for name, t in network.named_buffers() if name.endswith(_STATISTICS)}
        if get_total_norm(named.values()).isfinite():
            return
        bad = [name for name, tensor in named.items() if not tensor.isfinite().all()]
        if bad:  # else finite numbers have squares that are not
            raise FloatingPointError(f"{bad[0]} of the pruned network is not finite")

    def _attempt_smaller(self, policy: Policy, race: Race | None) -> dict[str, Any]:
        before = self._batch_size, self._together
        self._batch_size, self._together = (max(1, size // 2) for size in before)
        # Memory is what is short, from now on.
        self._kept_inputs.clear()
        self._most_kept = 0
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._attempt(policy, race)
        finally:
            self._batch_size, self._together = before
