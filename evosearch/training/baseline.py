"""Trains a network, dense or cut: plain, seeded, resumable, with a log.

Every random choice of an epoch follows from (seed, epoch), so a run that was stopped and started
again sees the same batches. The weights of the last epoch are kept: no epoch is chosen by looking
at held-out or test images.
"""

import copy
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.data import Images, augment
from evosearch.errors import (
    BackendError,
    ConfigError,
    NetworkError,
    first_line,
    out_of_memory,
)
from evosearch.files import write_atomically
from evosearch.networks import Network, like_a_cpu, sent

__all__ = [
    "Checkpoint",
    "EpochLog",
    "TrainSettings",
    "channels_last",
    "check_trains",
    "make_optimiser",
    "top1",
    "train",
    "train_epoch",
    "trainable",
    "write_log",
]


# More than any training has: seeds of two trainings have no epoch in common.
_EPOCHS = 1_000_003


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Peak learning rate of SGD with Nesterov momentum 0.9; one cosine down to zero after a
            linear warm-up.
        warmup_epochs: Length of the warm-up.
        weight_decay: L2 penalty on every parameter, batch norm included.
        label_smoothing: Share of the target spread over all classes.
        distillation: Share of the loss that follows a teacher's outputs rather than the labels;
            with 1 labels are not looked at.
        temperature: Divides both outputs where they are compared (Hinton, Vinyals and Dean, 2015).
        crop_padding: Zero padding before the random crop; 0 turns cropping off.
        flip: Mirror half of the images. A digit or a letter must not be.
        precision: `float32`, or `bfloat16` (autocast; weights stay float32).
        seed: Of initial weights, order and augmentation.
        threads: CPU threads of torch; None leaves that to torch. Other numbers of threads round
            in another order.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    warmup_epochs: float = 2.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    crop_padding: int = 4
    flip: bool = True
    precision: str = "float32"
    seed: int = 0
    threads: int | None = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError("training needs epochs >= 1 and a batch size >= 2")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"--lr must be above 0 and finite, got {self.lr:g}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"--weight-decay must be at least 0, got {self.weight_decay:g}")
        if not 0 <= self.distillation <= 1:
            raise ConfigError(f"--distillation must lie in 0 to 1, got {self.distillation:g}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature must be above 0 and finite, got {self.temperature:g}")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision is float32 or bfloat16, got {self.precision!r}")


@dataclass(frozen=True, kw_only=True)
class EpochLog:
    """One line of the log. Accuracies are fractions; `train_top1` is of augmented images."""

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    held_out_top1: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}  loss {self.train_loss:.4f}  train {self.train_top1:.2%}  "
            f"held out {self.held_out_top1:.2%}  {self.seconds:.0f} s"
        )


def _batches(
    images: Images, settings: TrainSettings, epoch: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    rng = np.random.default_rng((settings.seed, epoch))
    order = rng.permutation(len(images))
    for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        pixels = augment(images.pixels[chosen], settings.crop_padding, settings.flip, rng)
        yield pixels, images.labels[chosen]


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """The learning rate after `progress` epochs: linear warm-up, then half a cosine to zero."""
    if progress < settings.warmup_epochs:
        return settings.lr * progress / settings.warmup_epochs
    span = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup_epochs) / span))


@torch.inference_mode()
def top1(network: Network, images: Images, batch_size: int = 500) -> float:
    """Share of images whose largest logit is their label, in float32."""
    network.module.eval()
    device = next(network.module.parameters()).device
    height, width = images.pixels.shape[1:3]
    batch_size = max(8, min(batch_size, batch_size * 32 * 32 // (height * width)))
    hits = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        with like_a_cpu(device):
            logits = network.module(network.normalise(images.pixels[part], device))
        labels = torch.from_numpy(images.labels[part]).to(device)
        hits += int((logits.argmax(1) == labels).sum())
    return hits / len(images) if len(images) else math.nan


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state between two epochs, in one file beside the result.

    Args:
        path: Written after every epoch.
        about: What is trained, beside the settings: a checkpoint of something else is refused.
    """

    path: Path
    about: Mapping[str, str] = field(default_factory=dict)

    def _identity(self, settings: TrainSettings) -> dict[str, Any]:
        return {**asdict(settings), **self.about}

    def load(
        self, settings: TrainSettings, module: nn.Module, optimiser: torch.optim.Optimizer
    ) -> list[EpochLog]:
        """Puts network and optimiser into the state of the file; returns its log.

        Raises:
            ConfigError: It is damaged, was made with other settings, or of something else.
        """
        if not self.path.exists():
            return []
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as exc:  # garbage makes the unpickler raise almost anything
            raise ConfigError(
                f"{self.path} is damaged and cannot be continued; remove the file to start over"
            ) from exc
        if not isinstance(state, dict) or not {"settings", "module", "log"} <= state.keys():
            raise ConfigError(f"{self.path} is no checkpoint of a training; remove the file")
        # What an earlier version did not know is what it did without.
        before = {**asdict(TrainSettings()), **state["settings"]}
        # The number of threads changes speed and rounding, not what is trained.
        for key, now in self._identity(settings).items():
            if key != "threads" and before.get(key) != now:
                raise ConfigError(
                    f"{self.path} was trained with {key} = {before.get(key)}, now it is {now}; "
                    "remove the file to start over"
                )
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        return [EpochLog(**line) for line in state["log"]]

    def save(
        self,
        settings: TrainSettings,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        log: list[EpochLog],
    ) -> None:
        """Writes the file.

        Raises:
            BackendError: It cannot be written.
        """
        state = {
            "settings": self._identity(settings),
            "module": module.state_dict(),
            "optimiser": optimiser.state_dict(),
            "log": [asdict(line) for line in log],
        }
        try:
            write_atomically(self.path, lambda scratch: torch.save(state, scratch))
        except RuntimeError as exc:  # what torch makes of a full disk
            raise BackendError(f"cannot write {self.path}: {first_line(exc)}") from exc


def trainable(module: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """The same network in float32, with parameters that can be trained.

    Args:
        module: Changed in place.
        like: A network whose parameters have the same names: what is frozen there, stays frozen.
    """
    module = module.float()
    flags = {name: p.requires_grad for name, p in like.named_parameters()} if like else {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(flags.get(name, True))
    return module


def channels_last(module: nn.Module) -> nn.Module:
    """The same network, filters of two dimensions in the order that convolutions are fastest in."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def check_trains(network: Network) -> None:
    """Checks that a network runs as it does while it is trained; its statistics stay as they are.

    Raises:
        NetworkError: It does not: heads that are used in training alone are not cut, say.
    """
    module = copy.deepcopy(network.module).train()
    device = next(module.parameters()).device
    how = "if it has auxiliary heads, leave them out: network.arguments = { aux_logits = false }"
    try:
        with torch.no_grad():
            outputs = module(network.example(2).to(device))
    except RuntimeError as exc:
        if out_of_memory(exc):
            raise
        raise NetworkError(
            f"{network.spec.name} does not run in training mode ({first_line(exc)}); {how}"
        ) from exc
    if not isinstance(outputs, Tensor):
        raise NetworkError(
            f"{network.spec.name} returns {type(outputs).__name__} in training mode, wanted one "
            f"tensor of logits; {how}"
        )


def make_optimiser(module: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9, over every parameter."""
    return torch.optim.SGD(
        module.parameters(),
        lr=settings.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )


def _loss(logits: Tensor, labels: Tensor, wanted: Tensor | None, settings: TrainSettings) -> Tensor:
    """Cross-entropy and, where a teacher's logits are given, its share of divergence from them.

    The divergence is taken times the squared temperature, so that its gradients are of one size
    whatever the temperature.
    """
    share = settings.distillation if wanted is not None else 0.0
    loss = logits.new_zeros(())
    if share < 1:
        told = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        loss = told if share == 0 else (1 - share) * told
    if wanted is not None:
        heat = settings.temperature
        found, aim = (F.log_softmax(x / heat, dim=1) for x in (logits, wanted))
        apart = F.kl_div(found, aim, reduction="batchmean", log_target=True)
        loss = loss + share * heat**2 * apart
    return loss


def train_epoch(
    network: Network,
    images: Images,
    optimiser: torch.optim.Optimizer,
    settings: TrainSettings,
    epoch: int,
    teacher: nn.Module | None = None,
) -> tuple[float, float]:
    """Trains for one pass over the images, in place.

    Args:
        network: Left in training mode.
        images: Their order and their crops follow from the settings' seed and the epoch.
        optimiser: From `make_optimiser`.
        settings: How.
        epoch: Passes before this one.
        teacher: Whose outputs the loss follows, as far as the settings say; in evaluation mode, on
            the same device.

    Returns:
        Mean loss and top-1 on the augmented images, while training.

    Raises:
        ConfigError: The loss became infinite.
    """
    device = next(network.module.parameters()).device
    # Of dropout, say: an epoch is the same whatever went before it.
    torch.manual_seed(settings.seed * _EPOCHS + epoch)
    network.module.train()
    guided = teacher is not None and settings.distillation > 0
    rounded = settings.precision == "bfloat16"
    # Sums stay on the device: reading one at each step would have a GPU wait.
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    steps = len(images) // settings.batch_size
    for step, (pixels, labels) in enumerate(_batches(images, settings, epoch)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, epoch + (step + 1) / steps)
        inputs = network.normalise(pixels, device)
        target = sent(torch.from_numpy(labels), device)
        optimiser.zero_grad()
        with like_a_cpu(device):
            with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
                logits: Tensor = network.module(inputs)
                with torch.no_grad():
                    wanted = teacher(inputs).float() if guided and teacher is not None else None
            logits = logits.float()
            loss = _loss(logits, target, wanted, settings)
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        loss_sum += loss.detach().double() * len(labels)
        hits += (logits.detach().argmax(1) == target).sum()
        seen += len(labels)
    if not math.isfinite(loss_sum):
        raise ConfigError(f"training diverged in epoch {epoch + 1}; lower lr ({settings.lr})")
    return float(loss_sum) / seen, int(hits) / seen


def train(
    network: Network,
    images: Images,
    held_out: Images,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[EpochLog], object] = id,
) -> list[EpochLog]:
    """Trains a network in place; continues from the checkpoint if its file exists.

    Args:
        network: Its module is trained where it is (CPU or GPU).
        images: To train on.
        held_out: Measured after every epoch, for the log alone.
        settings: How.
        teacher: As in `train_epoch`.
        checkpoint: Read first, written after every epoch.
        report: Called with each new line of the log.

    Returns:
        The log, one line per epoch, including epochs before a restart.

    Raises:
        ConfigError: The checkpoint was made with other settings, there is less than one batch, or
            the loss became infinite.
        BackendError: The checkpoint cannot be written.
    """
    if len(images) < settings.batch_size:
        raise ConfigError(
            f"there are {len(images)} training images, less than one batch of "
            f"{settings.batch_size}; lower --batch-size"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    module = channels_last(network.module)
    if teacher is not None:
        channels_last(teacher)
    check_trains(network)
    optimiser = make_optimiser(module, settings)
    log = checkpoint.load(settings, module, optimiser) if checkpoint else []
    for epoch in range(len(log), settings.epochs):
        start = time.perf_counter()
        loss, accuracy = train_epoch(network, images, optimiser, settings, epoch, teacher)
        line = EpochLog(
            epoch=epoch + 1,
            lr=learning_rate(settings, epoch + 1),
            train_loss=loss,
            train_top1=accuracy,
            held_out_top1=top1(network, held_out),
            seconds=time.perf_counter() - start,
        )
        log.append(line)
        if checkpoint:
            checkpoint.save(settings, module, optimiser, log)
        report(line)
    module.eval()
    return log


def write_log(path: Path, log: list[EpochLog]) -> None:
    """Writes the log as CSV, one row per epoch."""
    rows = [asdict(line) for line in log]

    def write(scratch: Path) -> None:
        with scratch.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 5) for k, v in row.items()})

    write_atomically(path, write)
