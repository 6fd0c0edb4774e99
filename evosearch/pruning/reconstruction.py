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

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from evosearch.errors import NetworkError
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.folding import FastCopy, Layout

__all__ = ["Reconstructor", "Target", "targets_of"]

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
}
# Looking at a tensor's form is not reading it.
_HARMLESS = {"__get__", "size", "dim", "numel"}
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What a layer, or the sum that it enters, returns in the dense network.

    Args:
        values: `(n_images * n_positions, n_outputs)` float32.
        positions: `(n_positions, 2)` row and column in the output; None for a linear layer.
        summed: Whether the values are those of the sum.
        shape: Of the output without batch and channels.
    """

    values: NDArray[np.float32]
    positions: NDArray[np.int64] | None
    summed: bool
    shape: tuple[int, ...]


def _fitted(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear)


def _sampled(output: Tensor, positions: NDArray[np.int64] | None) -> Tensor:
    """`(n * p, channels)` float32 values of `(n, channels, h, w)` or `(n, channels)`."""
    if positions is None:
        return output.float()
    at = torch.from_numpy(positions).to(output.device)
    return output[:, :, at[:, 0], at[:, 1]].transpose(1, 2).reshape(-1, output.shape[1]).float()


def _positions(name: str, output: Tensor, count: int) -> NDArray[np.int64]:
    height, width = output.shape[2:]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    flat = rng.choice(height * width, size=min(count, height * width), replace=False)
    return np.stack(np.divmod(np.sort(flat), width), axis=1)


class _Sums(TorchFunctionMode):
    """Calls back for every addition of two tensors of one shape; the callback may do it itself.

    Args:
        added: Gets function and operands; returns the sum, or None to leave it to torch.
        read: Gets every tensor that anything else is done to.
    """

    def __init__(
        self,
        added: Callable[[Any, Tensor, Tensor], Tensor | None],
        read: Callable[[Tensor], None] = lambda _tensor: None,
    ) -> None:
        super().__init__()
        self._added = added
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if (
            func in _ADDITIONS
            and not kwargs
            and len(tensors) == len(args) == 2
            and tensors[0].shape == tensors[1].shape
        ):
            done = self._added(func, *tensors)
            if done is not None:
                return done
        elif getattr(func, "__name__", "") not in _HARMLESS:
            for tensor in tensors:
                self._read(tensor)
        return func(*args, **(kwargs or {}))


class _Recorder:
    """Notes what the layers of a dense network return, and which outputs go into a sum alone."""

    def __init__(self, module: nn.Module, positions: int) -> None:
        self._names = {layer: name for name, layer in module.named_modules() if _fitted(layer)}
        self._count = positions
        self._runs = dict.fromkeys(self._names.values(), 0)
        # Tensors are kept alive, or another could take over an address.
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._reads = dict.fromkeys(self._names.values(), 0)
        self._places: dict[str, NDArray[np.int64] | None] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._values: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def after(self, layer: nn.Module, _inputs: object, output: Tensor) -> None:
        """A layer has run."""
        name = self._names[layer]
        self._runs[name] += 1
        self._places[name] = _positions(name, output, self._count) if output.ndim == 4 else None
        self._shapes[name] = tuple(output.shape[2:])
        # Now: later operations may work in place.
        self._values[name] = _sampled(output, self._places[name])
        self._outputs[id(output)] = (name, output)

    def read(self, tensor: Tensor) -> None:
        """Something else than a sum reads a tensor."""
        if id(tensor) in self._outputs:
            self._reads[self._outputs[id(tensor)][0]] += 1

    def added(self, func: Any, left: Tensor, right: Tensor) -> Tensor | None:
        """Two tensors are added: the sum belongs to the one that nobody has read yet."""
        names = [self._outputs[id(x)][0] for x in (left, right) if id(x) in self._outputs]
        unread = [name for name in names if not self._reads[name]]
        for name in names:
            self._reads[name] += 1
        if not unread:
            return None
        result: Tensor = func(left, right)
        self._sums[unread[0]] = _sampled(result, self._places[unread[0]])
        # After an addition in place, the tensor is the sum: reading it is not reading the output.
        self._outputs.pop(id(result), None)
        return result

    def targets(self) -> dict[str, Target]:
        """Of the layers that ran once."""
        found = {}
        for name, value in self._values.items():
            # An output that something else reads as well has to be right by itself.
            summed = name in self._sums and self._reads[name] == 1
            if self._runs[name] == 1 and (self._places[name] is not None or value.ndim == 2):
                found[name] = Target(
                    values=(self._sums[name] if summed else value).cpu().numpy(),
                    positions=self._places[name],
                    summed=summed,
                    shape=self._shapes[name],
                )
        return found


@torch.inference_mode()
def targets_of(fast: FastCopy, images: Tensor, positions: int) -> Mapping[str, Target]:
    """Runs the dense network and notes what its layers return.

    Args:
        fast: The dense network, up to date.
        images: `(n, channels, height, width)` normalised.
        positions: How many places of each output to note.

    Returns:
        By name, convolutions and linear layers that run once, in the order in which they ran.
    """
    recorder = _Recorder(fast.module, positions)
    handles = [
        layer.register_forward_hook(recorder.after)
        for layer in fast.module.modules()
        if _fitted(layer)
    ]
    try:
        with _Sums(recorder.added, recorder.read):
            fast.module(images)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.targets()


@dataclass(eq=False)
class _Fit:
    """A layer on its way to be fitted."""

    name: str
    layer: Any
    target: Target
    values: Tensor
    run: Callable[[Tensor], Tensor]
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
    """A scale and a shift per channel, `(out,)` each, behind a folded layer."""

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
        self._axes = plan.table.axes
        self._ridge = ridge
        self._norm_of = dict(layout.pairs)
        self._fast = FastCopy(dense, layout, dtype)
        cuts = {entry.name: entry for entry in plan.cuts}
        layers = dict(self._fast.module.named_modules())
        device = next(dense.parameters()).device
        self._keep = np.ones(0, dtype=np.bool_)
        self._pending: dict[int, tuple[_Fit, Tensor, Tensor]] = {}
        self._solved: list[_Fitted | _Scaled] = []
        for name, target in targets.items():
            layer: Any = layers[name]
            entry = cuts.get(name)
            reads_cut = entry is not None and entry.in_axis is not None
            fit = _Fit(
                name=name,
                layer=layer,
                target=target,
                values=torch.from_numpy(np.array(target.values)).to(device),
                run=layer.forward,
                fit=getattr(layer, "groups", 1) == 1
                and (every_layer or reads_cut or name == layout.head),
                out_axis=None if entry is None else entry.out_axis,
            )
            layer.forward = self._visitor(fit)

    def _visitor(self, fit: _Fit) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            if not fit.fit:
                return self._adjust(fit, x) if not fit.target.summed else fit.run(x)
            if not fit.target.summed:
                self._solve(fit, x, self._wanted(fit))
                return fit.run(x)
            # Fitted when the other side of the sum is known; until then nobody reads it.
            shape = (len(x), len(fit.layer.weight), *fit.target.shape)
            blank = torch.empty(shape, dtype=x.dtype, device=x.device)
            self._pending[id(blank)] = (fit, x, blank)
            return blank

        return visit

    def _wanted(self, fit: _Fit) -> Tensor:
        if fit.out_axis is None:
            return fit.values
        kept = torch.from_numpy(self._axes[fit.out_axis].kept(self._keep))
        return fit.values[:, kept.to(fit.values.device)]

    def _added(self, func: Any, left: Tensor, right: Tensor) -> Tensor | None:
        for tensor, other in ((left, right), (right, left)):
            if id(tensor) in self._pending:
                fit, x, _ = self._pending.pop(id(tensor))
                self._solve(fit, x, self._wanted(fit) - _sampled(other, fit.target.positions))
                result: Tensor = func(fit.run(x), other)
                return result
        return None

    def _solve(self, fit: _Fit, x: Tensor, wanted: Tensor) -> None:
        """Least squares for weight and bias, loaded towards the weight there is."""
        layer = fit.layer
        rows = _patches(x, layer, fit.target.positions)
        before = layer.weight.flatten(1).float()
        if layer.bias is None:
            centre = torch.zeros(rows.shape[1], device=rows.device)
            wish = torch.zeros(wanted.shape[1], device=rows.device)
        else:
            centre, wish = rows.mean(0), wanted.mean(0)
        rows = rows - centre
        residual = (wanted - wish) - rows @ before.T
        flat = before + self._step(rows, residual)
        bias = None if layer.bias is None else wish - flat @ centre
        weight = flat.reshape(layer.weight.shape)
        layer.weight.data = weight.to(
            layer.weight.dtype,
            memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format,
        )
        if bias is not None:
            layer.bias.data = bias.to(layer.bias.dtype)
        mean = flat @ centre
        variance = (rows @ flat.T).square().mean(0)
        self._solved.append(_Fitted(fit.name, weight, bias, mean, variance))

    def _step(self, rows: Tensor, residual: Tensor) -> Tensor:
        """`(n_outputs, fan_in)` float32 change of the weight."""
        # In the precision of the forward pass: the inputs had no more digits, the product takes
        # half of all time, and what is solved for is a correction that the load keeps small.
        low = rows.to(self._fast.dtype)
        gram = (low.T @ low).float()
        wish = (low.T @ residual.to(low.dtype)).float()
        load = self._ridge * gram.diagonal().mean() + _LEAST_VARIANCE
        loaded = gram + load * torch.eye(len(gram), device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(loaded)
        if failed:  # too light a load for so few digits
            exact = (rows.T @ rows).double()
            exact.diagonal().add_(float(load))
            solution = torch.cholesky_solve(
                (rows.T @ residual).double(), torch.linalg.cholesky(exact)
            )
            return solution.T.float()
        return torch.cholesky_solve(wish, factor).T

    def _adjust(self, fit: _Fit, x: Tensor) -> Tensor:
        """A scale and a shift per channel, by least squares."""
        output = fit.run(x)
        if fit.layer.bias is None:
            return output
        wanted, found = self._wanted(fit), _sampled(output, fit.target.positions)
        centre, wish = found.mean(0), wanted.mean(0)
        found = found - centre
        variance = found.square().mean(0)
        load = self._ridge * variance.mean() + _LEAST_VARIANCE
        scale = ((found * (wanted - wish)).mean(0) + load) / (variance + load)
        shift = wish - scale * centre
        self._solved.append(_Scaled(fit.name, scale, shift))
        shape = (-1, *[1] * (output.ndim - 2))
        return output.mul_(scale.view(shape).to(output.dtype)).add_(
            shift.view(shape).to(output.dtype)
        )

    @torch.inference_mode()
    def reconstruct(self, network: nn.Module, keep: NDArray[np.bool_], images: Tensor) -> None:
        """Fits a cut network in place.

        Args:
            network: The working copy, cut to `keep`.
            keep: `(n_channels + 1,)` boolean by flat channel number, as given to the cutter.
            images: `(n, channels, height, width)`, those of the targets, in the forward's dtype.
        """
        self._keep = keep
        self._pending.clear()
        self._solved.clear()
        self._fast.update(network)
        with _Sums(self._added):
            self._fast.module(images)
        if self._pending:
            names = ", ".join(fit.name for fit, _, _ in self._pending.values())
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


def _write_scaled(layer: Any, norm: Any, solved: _Scaled) -> None:
    """Puts scales and shifts of a folded layer into a plain one."""
    if norm is not None and norm.affine:
        norm.weight.mul_(solved.scale)
        norm.bias.mul_(solved.scale).add_(solved.shift)
    elif norm is None:
        layer.weight.mul_(solved.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.mul_(solved.scale).add_(solved.shift)


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


def _patches(x: Tensor, layer: Any, positions: NDArray[np.int64] | None) -> Tensor:
    """`(n * p, fan_in)` float32 inputs of a layer at sampled positions of its output."""
    if positions is None:
        return x.float()
    (top, left), (down, right) = layer.padding, layer.stride
    (height, width), (tall, wide) = layer.kernel_size, layer.dilation
    padded = F.pad(x, (left, left, top, top))
    parts = [
        padded[
            :,
            :,
            row * down : row * down + tall * (height - 1) + 1 : tall,
            column * right : column * right + wide * (width - 1) + 1 : wide,
        ]
        for row, column in positions
    ]
    # (n, p, channels, kernel): rows in the order of the targets.
    return torch.stack(parts, 1).flatten(0, 1).flatten(1).float()
