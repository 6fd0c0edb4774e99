"""Fitting a cut network to its dense original, layer by layer, in closed form.

The cut network runs once over a few images. Each layer is fitted before the next one runs, so that
what it returns for the inputs it *now* gets comes as near as possible to what the dense layer
returned: least squares over kernel-sized patches at sampled positions, loaded towards the weights
it had [He2017]. Where the output is added to another stream, the sum is what is fitted, so that a
block makes up for the errors of all blocks before it. Grouped convolutions get a scale and a shift
per channel. No labels and no gradients are used.

References:
    [He2017] Y. He, X. Zhang, J. Sun, "Channel Pruning for Accelerating Very Deep Neural Networks",
        ICCV 2017 (reconstruction on pruned inputs, and of sums in multi-branch networks).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import NetworkError
from evosearch.pruning.cutting import CuttingPlan, kept_indices
from evosearch.pruning.folding import FastCopy, Layout
from evosearch.pruning.fusing import Fused, can_fuse
from evosearch.pruning.sampling import Sampler, flat_weight, shaped_weight
from evosearch.pruning.statistics import shared_tensor
from evosearch.pruning.targets import Target

__all__ = ["Reconstructor"]

# Nothing is added to a variance of one; older versions of torch refuse to be told 0.
_NOTHING = 1e-30
_LEAST_VARIANCE = 1e-12
# Loads below this share leave too few digits to float32.
_LIGHT = 1e-3


@dataclass(frozen=True, eq=False)
class _Fit:
    """A layer on its way to be fitted.

    Args:
        name: Of the layer.
        layer: Of the fast copy.
        plain: How it runs by itself.
        target: What it, or the sum that it enters, is to return.
        values: Those of the target, on the device.
        sampler: Reads inputs and outputs where the target was read.
        fit: Whether it gets other weights.
        out_axis: Which of the kept indices select its outputs, or None.
    """

    name: str
    layer: Any
    plain: Callable[[Tensor], Tensor]
    target: Target
    values: Tensor
    sampler: Sampler
    fit: bool
    out_axis: int | None


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What least squares found for a folded layer.

    Args:
        name: Of the layer.
        weight: `(out, in, ...)`.
        bias: `(out,)`.
        mean, variance: `(out,)` of what the weight alone makes of the images.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A scale and a shift per channel, `(out,)` each, behind a grouped convolution."""

    name: str
    scale: Tensor
    shift: Tensor


class Reconstructor:
    """Fits cut networks, one after another.

    Args:
        plan: How networks are cut.
        layout: Norms that are folded, and the head.
        dense: To copy the structure of.
        targets: From `targets_of`, for the same images.
        dtype: Of the forward pass.
        ridge: Load on the Gram matrix, as a share of its mean diagonal: what pulls weights back to
            where they were.
        every_layer: Fit all layers, not those alone that lost inputs.
    """

    def __init__(
        self,
        plan: CuttingPlan,
        layout: Layout,
        dense: nn.Module,
        targets: Mapping[str, Target],
        dtype: torch.dtype,
        ridge: float,
        *,
        every_layer: bool = True,
    ) -> None:
        self._table = plan.table
        self._ridge = ridge
        self._norm_of = dict(layout.pairs)
        # What convolutions do on the way they do here, as each is fitted before it runs.
        self._fast = FastCopy(dense, replace(layout, tails=()), dtype)
        cuts = {entry.name: entry for entry in plan.cuts}
        layers = dict(self._fast.module.named_modules())
        device = next(dense.parameters()).device
        self._kept: list[Tensor | None] = []
        self._solved: list[_Fitted | _Scaled] = []
        self._fits: dict[str, _Fit] = {}
        for name, target in targets.items():
            entry = cuts.get(name)
            reads_cut = entry is not None and entry.in_axis is not None
            self._fits[name] = _Fit(
                name=name,
                layer=layers[name],
                plain=layers[name].forward,
                target=target,
                values=shared_tensor(target.values).to(device),
                sampler=Sampler(target.positions),
                fit=getattr(layers[name], "groups", 1) == 1
                and (every_layer or reads_cut or name == layout.head),
                out_axis=None if entry is None else entry.out_axis,
            )
        tails = dict(layout.tails) if can_fuse(device, dtype) else {}
        self._fused = Fused(
            self._fast.module,
            {name: tail for name, tail in tails.items() if name in targets},
            prepare=self._prepare,
            prepared=targets,
            waiting={name for name, target in targets.items() if target.summed},
        )

    def _prepare(self, name: str, x: Tensor, other: Tensor | None) -> Tensor | None:
        """Fits a layer before it runs; returns the output where that was fitted in its place."""
        fit = self._fits[name]
        if other is not None:
            if fit.fit:
                self._solve(fit, x, self._wanted(fit) - fit.sampler.outputs(other))
        elif fit.fit:
            self._solve(fit, x, self._wanted(fit))
        elif getattr(fit.layer, "groups", 1) > 1 and fit.layer.bias is not None:
            return self._adjusted(fit, x)
        return None

    def _wanted(self, fit: _Fit) -> Tensor:
        kept = None if fit.out_axis is None else self._kept[fit.out_axis]
        return fit.values if kept is None else fit.values.index_select(1, kept)

    def _solve(self, fit: _Fit, x: Tensor, wanted: Tensor) -> None:
        """Least squares for weight and bias, loaded towards the weight there is."""
        layer = fit.layer
        rows = fit.sampler.patches(x, layer).float()
        before = flat_weight(layer.weight).float()
        if layer.bias is None:
            centre = torch.zeros(rows.shape[1], device=rows.device)
            wish = torch.zeros(wanted.shape[1], device=rows.device)
        else:
            centre, wish = rows.mean(0), wanted.mean(0)
        rows = rows - centre
        residual = (wanted - wish) - rows @ before.T
        flat = before + self._step(rows, residual)
        bias = None if layer.bias is None else wish - flat @ centre
        _put(layer, flat, bias)
        mean = flat @ centre
        variance = (rows @ flat.T).square().mean(0)
        weight = shaped_weight(flat, layer.weight)
        self._solved.append(_Fitted(fit.name, weight, bias, mean, variance))

    def _step(self, rows: Tensor, residual: Tensor) -> Tensor:
        """`(n_outputs, fan_in)` float32 change of the weight."""
        if self._ridge < _LIGHT:
            return self._exact_step(rows, residual)
        on_gpu = rows.device.type != "cpu"
        # In the precision of the forward pass: the inputs had no more digits, the product takes
        # half of all time, and what is solved for is a correction that the load keeps small. GPUs
        # take float32: there, digits are cheaper than asking whether they were enough.
        low = rows if on_gpu else rows.to(self._fast.dtype)
        gram = (low.T @ low).float()
        wish = (low.T @ residual.to(low.dtype)).float()
        gram.diagonal().add_(self._ridge * gram.diagonal().mean() + _LEAST_VARIANCE)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not on_gpu and failed:
            return self._exact_step(rows, residual)
        solution = torch.cholesky_solve(wish, factor).T
        # A measurement that is not finite is a failure with a reason.
        return solution.where(failed == 0, torch.nan) if on_gpu else solution

    def _exact_step(self, rows: Tensor, residual: Tensor) -> Tensor:
        """The same in float64."""
        rows, residual = rows.double(), residual.double()
        gram = rows.T @ rows
        gram.diagonal().add_(self._ridge * gram.diagonal().mean() + _LEAST_VARIANCE)
        factor, _ = torch.linalg.cholesky_ex(gram)
        return torch.cholesky_solve(rows.T @ residual, factor).T.float()

    def _adjusted(self, fit: _Fit, x: Tensor) -> Tensor:
        """The output of a grouped convolution, with a scale and a shift that fit its channels."""
        output = fit.plain(x)
        found, wanted = fit.sampler.outputs(output), self._wanted(fit)
        centre, wish = found.mean(0), wanted.mean(0)
        found = found - centre
        variance = found.square().mean(0)
        load = self._ridge * variance.mean() + _LEAST_VARIANCE
        scale = ((found * (wanted - wish)).mean(0) + load) / (variance + load)
        shift = wish - scale * centre
        self._solved.append(_Scaled(fit.name, scale, shift))
        still = torch.zeros_like(scale), torch.ones_like(scale)
        # One pass: a product and a sum with so few numbers to a row are slow in bfloat16.
        mean, variance, scale, shift = (t.to(output.dtype) for t in (*still, scale, shift))
        return F.batch_norm(output, mean, variance, scale, shift, training=False, eps=_NOTHING)

    @torch.inference_mode()
    def reconstruct(self, network: nn.Module, keep: NDArray[np.bool_], images: Tensor) -> None:
        """Fits a cut network in place.

        Args:
            network: The working copy, cut to `keep`.
            keep: `(n_channels + 1,)` boolean by flat channel number, as given to the cutter.
            images: `(n, channels, height, width)`, those of the targets, in the forward's dtype.
        """
        self._kept = kept_indices(self._table, keep, images.device)
        self._solved.clear()
        self._fast.update(network)
        self._fast.module(images)
        if self._fused.waiting:
            names = ", ".join(self._fused.waiting)
            raise NetworkError(f"{names}: the output was added in the dense network and is not now")
        layers = dict(network.named_modules())
        for solved in self._solved:
            norm_name = self._norm_of.get(solved.name)
            norm = None if norm_name is None else layers[norm_name]
            if isinstance(solved, _Scaled):
                _write_scaled(layers[solved.name], norm, solved)
            elif norm is None:
                layers[solved.name].weight.copy_(solved.weight)
                if solved.bias is not None:
                    layers[solved.name].bias.copy_(solved.bias)
            else:
                _write_fitted(layers[solved.name], norm, solved)


def _put(layer: Any, flat: Tensor, bias: Tensor | None) -> None:
    """Gives a layer another weight `(out, fan_in)` and bias, in its own precision."""
    weight = shaped_weight(flat.to(layer.weight.dtype), layer.weight)
    whole = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    layer.weight.data = weight.contiguous(memory_format=whole)
    if bias is not None:
        layer.bias.data = bias.to(layer.bias.dtype)


def _write_scaled(layer: Any, norm: Any, solved: _Scaled) -> None:
    """Puts scales and shifts of a folded layer into a plain one."""
    if norm is not None and norm.affine:
        norm.weight.mul_(solved.scale)
        norm.bias.mul_(solved.scale).add_(solved.shift)
        return
    layer.weight.mul_(solved.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(solved.scale)
    if norm is None:
        layer.bias.add_(solved.shift)
    else:  # one that only normalises: its mean takes the shift
        deviation = torch.sqrt(norm.running_var + norm.eps)
        norm.running_mean.mul_(solved.scale).sub_(solved.shift * deviation)


def _write_fitted(layer: Any, norm: Any, solved: _Fitted) -> None:
    """Undoes the folding: batch norm gets the statistics that the fitted layer's outputs have.

    The network then computes the same in training mode, with statistics of the batch, and can be
    fine-tuned as any other. Filters keep the lengths they had, as learning rates suit those.
    """
    assert solved.bias is not None  # noqa: S101  folded layers have one
    if layer.bias is not None:
        layer.bias.zero_()
    if not norm.affine:
        # Nothing else could undo a normalisation.
        layer.weight.copy_(solved.weight)
        norm.running_var.fill_(1 - norm.eps)
        norm.running_mean.copy_(solved.bias).neg_()
        return
    before, after = (w.flatten(1).norm(dim=1) for w in (layer.weight, solved.weight))
    length = torch.where((before > 0) & (after > 0), before / after, torch.ones_like(after))
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(solved.weight * length.view(shape))
    norm.running_mean.copy_(solved.mean * length)
    norm.running_var.copy_(solved.variance * length.square())
    norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps) / length)
    norm.bias.copy_(solved.bias + solved.mean)
