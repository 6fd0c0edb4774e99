"""Compensation at the level of patches: closed form, from moments of the dense network alone.

A convolution reads patches x of C k^2 numbers, with mean mu and covariance S over calibration
images and positions. When some of its input channels go, the best linear prediction of what it
returned from the kept columns k is, by least squares,

    W' = W S_.k (S_kk)^-1,    and the output's mean moves by W mu - W' mu_k.

What is lost is variance: rows of W' S_kk W'^T have less of it than those of W S W^T. Both are made
good in the batch norm that follows, if one does: its mean moves along, and its variance shrinks by
the same ratio, which equals rescaling the row [Xie2021]. No forward pass is needed; in return, what
earlier layers do to the input is not seen. Where neither a norm nor a bias follows, the mean's move
stays uncorrected.

References:
    [Xie2021] Z. Xie et al., "Pruning with Compensation", arXiv:2108.13728, with its official code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.pruning.compensation import loaded_factor
from evosearch.pruning.cutting import CuttingPlan, on_device
from evosearch.pruning.folding import Layout
from evosearch.pruning.hooks import first_input
from evosearch.pruning.sampling import is_linear, output_size, pads_with_zeros
from evosearch.pruning.statistics import run_watched, shared_tensor

__all__ = ["Moments", "PatchCompensator", "patch_moments"]

FloatArray = NDArray[np.float64]

# Positions of each image that are read, at least: neighbours tell much the same.
_POSITIONS = 32
# Patches longer than this are left to the compensation by channel: the square of it is kept, and
# factorised for every candidate.
_LONGEST = 4608
# Below this share of what it was, a variance says nothing: the filter has lost its input.
_LEAST_VARIANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the patches that a layer reads in the dense network.

    Args:
        mean: `(in * k^2,)`, input channel by input channel.
        covariance: `(in * k^2, in * k^2)`.
    """

    mean: FloatArray
    covariance: FloatArray


def _readable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        short = layer.weight[0].numel() <= _LONGEST
        return layer.groups == 1 and short and pads_with_zeros(layer)
    return isinstance(layer, nn.Linear) and is_linear(layer) and layer.in_features <= _LONGEST


def _step(height: int, width: int) -> int:
    """Every so many positions, row by row: all columns are read alike, borders and middle."""
    step = max(1, height * width // _POSITIONS)
    while math.gcd(step, width) > 1:
        step -= 1
    return step


class _PatchHook:
    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.products = torch.zeros(())
        # What float32 has digits for is how patches differ, not how far they are from zero.
        self.centre = torch.zeros(())

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = first_input(inputs, named).detach()
        if isinstance(module, nn.Conv2d):
            names = ("dilation", "padding", "stride")
            how = {name: getattr(module, name) for name in names}
            step = _step(*output_size(module, x))
            # One image at a time: all patches of a batch may be many times as large as it.
            rows = torch.cat(
                [
                    F.unfold(image, module.kernel_size, **how)[0, :, ::step].T
                    for image in torch.split(x, 1)
                ]
            )
        else:
            rows = x.reshape(-1, x.shape[-1])
        if not self.count:
            self.centre = rows.mean(0)
        rows = rows - self.centre
        self.count += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.products = self.products + (rows.T @ rows).double()

    def moments(self) -> Moments:
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        return Moments((mean + self.centre).numpy(), covariance.numpy())


def patch_moments(
    module: nn.Module, plan: CuttingPlan, batches: list[Tensor]
) -> Mapping[str, Moments]:
    """Moments of what the consumers read, over images and some positions of each.

    Args:
        module: The dense network, in evaluation mode.
        plan: Says which layers have an input that a policy cuts.
        batches: Normalised images, each `(n, channels, height, width)`.

    Returns:
        By layer name; layers other than linear ones and plain two-dimensional convolutions are
        left out.
    """
    layers = dict(module.named_modules())
    hooks = {
        entry.name: _PatchHook()
        for entry in plan.cuts
        if entry.in_axis is not None and _readable(layers[entry.name])
    }
    run_watched(module, hooks, batches)
    return {name: hook.moments() for name, hook in hooks.items()}


@dataclass(frozen=True, eq=False)
class _Consumer:
    in_axis: int
    out_axis: int | None
    weight: Tensor
    layer: Any
    norm: Any
    mean: Tensor
    covariance: Tensor


class PatchCompensator:
    """Rewrites the consumers of a cut network from moments of the dense one.

    Args:
        plan: How the network was cut.
        layout: Which norm follows which layer.
        source: The dense network.
        target: The working copy that a cutter narrows.
        moments: From `patch_moments` of the dense network.
        ridge: Added to the diagonal of S_kk, as a share of its mean.
    """

    def __init__(
        self,
        plan: CuttingPlan,
        layout: Layout,
        source: nn.Module,
        target: nn.Module,
        moments: Mapping[str, Moments],
        ridge: float,
    ) -> None:
        dense, layers = dict(source.named_modules()), dict(target.named_modules())
        norms = dict(layout.pairs)
        self._axes = plan.table.axes
        self._ridge = ridge
        self._device = next(source.parameters()).device
        self._consumers = [
            _Consumer(
                in_axis=entry.in_axis,
                out_axis=entry.out_axis,
                weight=dense[entry.name].weight.detach().double(),
                layer=layers[entry.name],
                norm=layers[norms[entry.name]] if entry.name in norms else None,
                mean=shared_tensor(moments[entry.name].mean).to(self._device),
                covariance=shared_tensor(moments[entry.name].covariance).to(self._device),
            )
            for entry in plan.cuts
            if entry.name in moments and entry.in_axis is not None
        ]

    def compensate(self, keep: NDArray[np.bool_]) -> None:
        """Refits every consumer that lost inputs; the others stay as they are.

        Args:
            keep: `(n_channels + 1,)` boolean by flat channel number, as given to the cutter.
        """
        cut: list[_Consumer] = []
        indices: list[NDArray[np.int64]] = []
        for consumer in self._consumers:
            inputs, weight = self._axes[consumer.in_axis].kept(keep), consumer.weight
            # Layers of a block that is left out have nothing to fit: no inputs, or no outputs.
            if len(inputs) in {0, weight.shape[1]} or not len(consumer.layer.weight):
                continue
            cut.append(consumer)
            area = weight[0, 0].numel()
            indices.append((inputs[:, None] * area + np.arange(area)).ravel())
            if consumer.out_axis is not None:
                indices.append(self._axes[consumer.out_axis].kept(keep))
        there = iter(on_device(indices, self._device))
        with torch.no_grad():
            for consumer in cut:
                kept = next(there)
                self._refit(consumer, kept, None if consumer.out_axis is None else next(there))

    def _refit(self, consumer: _Consumer, kept: Tensor, outputs: Tensor | None) -> None:
        matrix = consumer.weight.flatten(1)
        if outputs is not None:
            matrix = matrix.index_select(0, outputs)
        covariance = consumer.covariance
        block = covariance.index_select(0, kept).index_select(1, kept)
        factor = loaded_factor(block.clone(), self._ridge)
        spread = matrix @ covariance
        fitted = torch.cholesky_solve(spread.index_select(1, kept).T, factor).T
        layer, norm = consumer.layer, consumer.norm
        layer.weight.copy_(fitted.reshape(layer.weight.shape))
        shift = matrix @ consumer.mean - fitted @ consumer.mean[kept]
        if norm is not None:
            before = (spread * matrix).sum(1)
            after = ((fitted @ block) * fitted).sum(1)
            ratio = (after / before.clamp_min(1e-30)).clamp(_LEAST_VARIANCE, 1.0)
            norm.running_mean.sub_(shift.to(norm.running_mean))
            norm.running_var.mul_(ratio.to(norm.running_var))
        elif layer.bias is not None:
            layer.bias.add_(shift.to(layer.bias))
