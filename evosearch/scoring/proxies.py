"""Proxies: how a policy is scored without training it.

A proxy is a function over the steps of a bench: cut, compensate, fit or recalibrate. What it leaves
on the bench is then measured. To add one, write the function and put it in PROXIES.

References:
    [Hinton2015] G. Hinton et al., "Distilling the Knowledge in a Neural Network",
        arXiv:1503.02531.
    [Li2020] B. Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network
        Pruning", ECCV 2020 (batch norm recalibrated before measuring).
    [He2017] Y. He, X. Zhang, J. Sun, "Channel Pruning for Accelerating Very Deep Neural Networks",
        ICCV 2017.
    [Xie2021] Z. Xie et al., "Pruning with Compensation", arXiv:2108.13728.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import ConfigError
from evosearch.pruning.criteria import Coupling

__all__ = ["PROXIES", "Bench", "Proxy", "ProxySettings", "proxy_named"]

Keep = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """The options of a proxy.

    Args:
        name: A name from PROXIES.
        criterion: Which channels go first; a name from the criteria.
        coupling: How a criterion's scores of coupled layers become one.
        labels: What criteria with a loss train or differentiate towards: `given` ones, or `own`
            for classes drawn from the network's own outputs.
        recalibrate: Whether `compensated` re-estimates batch norm after folding.
        ridge: Load on the Gram matrix when folding, as a share of its mean diagonal.
        recalibration_images: The first so many calibration images recalibrate; None for all.
        reconstruction_images: The first so many calibration images fit the layers.
        reconstruction_layers: `all`, or `cut` for those alone that lost inputs.
        reconstruction_ridge: How strongly fitted weights are held where they were.
        distillation_steps: Of `distilled`, each on one batch.
        distillation_lr: Learning rate of the first of them; it falls to zero.
        precision: `float32`, or `bfloat16` for the forward passes.
        batch_size: Images per forward pass.
        calibration_batch: At least so many calibration images per pass; None for `batch_size`.
    """

    name: str
    criterion: str
    coupling: Coupling = "mean"
    labels: str = "given"
    recalibrate: bool = True
    ridge: float = 1e-4
    recalibration_images: int | None = None
    reconstruction_images: int = 256
    reconstruction_layers: str = "all"
    reconstruction_ridge: float = 0.1
    distillation_steps: int = 20
    distillation_lr: float = 0.01
    precision: str = "float32"
    batch_size: int = 128
    calibration_batch: int | None = None

    @property
    def together(self) -> int:
        """At least how many calibration images run at once."""
        return self.calibration_batch or self.batch_size


class Bench(Protocol):
    """A working copy of the network and the steps that can be applied to it."""

    settings: ProxySettings

    def cut(self, keep: Keep) -> None:
        """Narrows a fresh copy of the dense network."""

    def compensate(self, keep: Keep) -> None:
        """Folds removed channels into the consumers' weights."""

    def compensate_patches(self, keep: Keep) -> None:
        """Refits the consumers' weights and norms from moments of the patches they read."""

    def recalibrate(self) -> None:
        """Re-estimates batch-norm statistics on the calibration images."""

    def reconstruct(self, keep: Keep) -> None:
        """Fits layer after layer to what the dense network returned."""

    def refit(self) -> None:
        """Fits the classifier to the dense network's outputs."""

    def distil(self) -> None:
        """Takes a few steps of training towards the dense network's outputs."""


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A named proxy.

    Args:
        title: One line for people.
        prepare: Leaves the network to be measured on the bench.
        needs_grams: Whether Gram matrices must have been collected.
        needs_moments: Whether moments of patches must have been.
        needs_targets: Whether the dense layers' outputs must have been noted.
        needs_teacher: Whether the dense network's outputs for calibration images must have been.
    """

    title: str
    prepare: Callable[[Bench, Keep], None]
    needs_grams: bool = False
    needs_moments: bool = False
    needs_targets: bool = False
    needs_teacher: bool = False


def raw(bench: Bench, keep: Keep) -> None:
    """Cut, nothing else. Near chance for anything but mild cuts; kept as a control."""
    bench.cut(keep)


def recalibrated(bench: Bench, keep: Keep) -> None:
    """Cut, then recalibrate batch norm [Li2020]."""
    bench.cut(keep)
    bench.recalibrate()


def compensated(bench: Bench, keep: Keep) -> None:
    """Cut, fold the removed channels into the kept ones [Xie2021], recalibrate if asked to."""
    bench.cut(keep)
    bench.compensate(keep)
    if bench.settings.recalibrate:
        bench.recalibrate()


def patchwise(bench: Bench, keep: Keep) -> None:
    """Cut, refit consumers by patch with bias and variance [Xie2021]; no forward pass."""
    bench.cut(keep)
    bench.compensate(keep)  # for layers whose patches are not read
    bench.compensate_patches(keep)


def reconstructed(bench: Bench, keep: Keep) -> None:
    """Cut, fold, then fit the layers one by one on their cut inputs [He2017].

    Nothing is recalibrated: fitted layers return what the dense ones did, and batch norm is part of
    what is fitted.
    """
    bench.cut(keep)
    bench.compensate(keep)
    bench.reconstruct(keep)


def refitted(bench: Bench, keep: Keep) -> None:
    """Cut, fold, recalibrate, then fit the classifier by ridge regression on its features."""
    compensated(bench, keep)
    bench.refit()


def distilled(bench: Bench, keep: Keep) -> None:
    """Cut, fold, recalibrate, then a few steps of distillation [Hinton2015]."""
    compensated(bench, keep)
    bench.distil()


PROXIES: dict[str, Proxy] = {
    "raw": Proxy(title="cut (a control)", prepare=raw),
    "recalibrated": Proxy(title="cut, recalibrate batch norm", prepare=recalibrated),
    "compensated": Proxy(
        title="cut, fold removed channels into kept ones, recalibrate unless told not to",
        prepare=compensated,
        needs_grams=True,
    ),
    "patchwise": Proxy(
        title="cut, refit consumers by patch with bias and variance, in closed form",
        prepare=patchwise,
        needs_grams=True,
        needs_moments=True,
    ),
    "reconstructed": Proxy(
        title="cut, fold, then fit layer by layer to the dense network, in closed form",
        prepare=reconstructed,
        needs_grams=True,
        needs_targets=True,
    ),
    "refitted": Proxy(
        title="compensated, then the classifier is fitted to the dense outputs",
        prepare=refitted,
        needs_grams=True,
        needs_teacher=True,
    ),
    "distilled": Proxy(
        title="compensated, then a few steps of training towards the dense outputs",
        prepare=distilled,
        needs_grams=True,
        needs_teacher=True,
    ),
}


def proxy_named(name: str) -> Proxy:
    """Looks a proxy up.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PROXIES:
        raise ConfigError(f"no proxy {name!r}; there are {', '.join(PROXIES)}")
    return PROXIES[name]
