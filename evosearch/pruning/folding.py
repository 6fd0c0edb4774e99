"""A second copy of a network, made for speed: norms folded, activations fused, fewer digits.

Which norm follows which layer is seen by running the network once: a norm whose input is the very
tensor that a layer returned. That the tensor goes nowhere else is not seen but checked: a folded
network must compute what the plain one computes.
"""

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evosearch.networks import Network
from evosearch.pruning.fusing import Fused, Tail, can_fuse, tails_of
from evosearch.pruning.hooks import hooked
from evosearch.pruning.layers import Convolution, Norm

__all__ = ["FastCopy", "Layout", "layout_of"]

_WIDTHS = (
    *("in_channels", "out_channels", "groups"),
    *("in_features", "out_features", "num_features", "num_parameters"),
    *("num_channels", "num_groups"),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where layers and norms stand, and what comes behind them.

    Args:
        pairs: Names of (layer, norm) that can be folded without changing what is computed.
        head: Name of the layer that returns the network's output, or None.
        tails: Names of convolutions, once norms are folded, with what they can do on the way.
        blocks: Names of what may be left out.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    head: str | None = None
    tails: tuple[tuple[str, Tail], ...] = ()
    blocks: tuple[str, ...] = ()


def _seen(module: nn.Module, example: Tensor) -> Layout:
    """Runs the network and looks who reads what whom returned."""
    names = {layer: name for name, layer in module.named_modules()}
    # Tensors are kept alive, or another could take over an address.
    returned: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, str]] = []

    def after_layer(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        returned.append((names[layer], output))

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((name, names[norm]) for name, output in returned if output is inputs[0])

    handles = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear | Convolution):
            handles.append(layer.register_forward_hook(after_layer))
        elif isinstance(layer, Norm) and layer.track_running_stats:
            handles.append(layer.register_forward_pre_hook(before_norm))
    with hooked(handles), torch.inference_mode():
        output = module(example)
    head = next((name for name, tensor in returned if tensor is output), None)
    # Layers that run more than once are left alone.
    once = [
        pair
        for pair in dict.fromkeys(pairs)
        if sum(pair[0] == layer or pair[1] == norm for layer, norm in pairs) == 1
        and sum(pair[0] == name for name, _ in returned) == 1
    ]
    return Layout(pairs=tuple(once), head=head)


def layout_of(network: Network, watched: Container[str] = ()) -> Layout:
    """Finds what can be folded and fused; nothing, if the network does not bear the checks.

    Args:
        network: The dense network.
        watched: Names of modules whose outputs somebody reads by a hook: nothing is fused across.
    """
    module = copy.deepcopy(network.module).double().eval()
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, Norm) and norm.track_running_stats:
            # Statistics that leave nothing to chance: a fresh norm would fold into anything.
            norm.running_mean = torch.randn(norm.num_features, generator=generator).double()
            norm.running_var = torch.rand(norm.num_features, generator=generator).double() + 0.5
    example = network.example(2)
    try:
        layout = _foldable(module, example.double())
    except Exception:  # noqa: BLE001  a user's forward may refuse float64; folding is optional
        return Layout()
    try:
        return _fusible(module.float(), layout, example, watched)
    except Exception:  # noqa: BLE001  whatever a forward does that is not foreseen; likewise
        return layout


def _computes_alike(module: nn.Module, layout: Layout, example: Tensor, tolerance: float) -> bool:
    copied = FastCopy(module, layout, example.dtype)
    copied.update(module)
    with torch.inference_mode():
        wanted, got = module(example), copied.module(example)
    scale = float(wanted.abs().max())
    return bool(torch.allclose(wanted, got, rtol=tolerance, atol=tolerance * scale))


def _foldable(module: nn.Module, example: Tensor) -> Layout:
    """Norms that can be folded, by a check in float64."""

    def right(pairs: Sequence[tuple[str, str]]) -> bool:
        try:
            return _computes_alike(module, Layout(pairs=tuple(pairs)), example, 1e-6)
        except Exception:  # noqa: BLE001  a norm that is no linear map of channels, say
            return False

    seen = _seen(module, example)
    pairs = seen.pairs
    if not right(pairs):
        pairs = tuple(pair for pair in pairs if right([pair]))
    return Layout(pairs=pairs if right(pairs) else (), head=seen.head)


def _fusible(module: nn.Module, layout: Layout, example: Tensor, watched: Container[str]) -> Layout:
    """The same layout with tails, if they are right; in float32, as the library knows no more."""
    if not can_fuse(example.device, example.dtype):
        return layout
    folded = FastCopy(module, layout, example.dtype)
    folded.update(module)
    tails = tuple(tails_of(folded.module, example, watched).items())
    fused = replace(layout, tails=tails)
    return fused if _computes_alike(module, fused, example, 1e-3) else layout


def _in_float32(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _itself(x: Tensor) -> Tensor:
    return x


class FastCopy:
    """A working copy that is refreshed from another one and computes the same, faster.

    Args:
        dense: The network to copy the structure of.
        layout: Norms to fold, what convolutions do on the way where the library can, and the layer
            that stays in float32 so that outputs keep their digits. Norms that are not folded keep
            their statistics in float32, too.
        dtype: Of all other tensors.
    """

    def __init__(self, dense: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(dense).eval()
        self.dtype = dtype
        layers = dict(self.module.named_modules())
        self._folded = dict(layout.pairs)
        norms = {norm for _, norm in layout.pairs}
        for layer_name, norm_name in layout.pairs:
            layer = layers[layer_name]
            if layer.bias is None:
                width = layers[norm_name].num_features
                layer.bias = nn.Parameter(layer.weight.new_zeros(width))
            parent, _, leaf = norm_name.rpartition(".")
            setattr(layers[parent], leaf, nn.Identity())
        self._whole: set[nn.Module] = set()
        if dtype.itemsize < 4:
            self._whole = {layer for layer in self.module.modules() if isinstance(layer, Norm)}
            if layout.head is not None:
                head = layers[layout.head]
                head.register_forward_pre_hook(_in_float32)
                self._whole.add(head)
        self._layers = {
            name: layer
            for name, layer in self.module.named_modules()
            if name not in norms and (layer._parameters or layer._buffers)
        }
        # With the forward of its own that an instance may have been given.
        self._blocks = {
            name: (layers[name], layers[name].__dict__.get("forward")) for name in layout.blocks
        }
        if layout.tails and can_fuse(next(dense.parameters()).device, dtype):
            Fused(self.module, dict(layout.tails))

    def update(self, source: nn.Module) -> None:
        """Takes over the tensors of a network of the same layers, whatever their widths.

        Blocks that are left out there are passed by here. They stay in their places, as somebody
        may read by a hook what comes out of them.
        """
        theirs = dict(source.named_modules())
        for name, (block, own) in self._blocks.items():
            forward = _itself if isinstance(theirs[name], nn.Identity) else own
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
        with torch.no_grad():
            for name, layer in self._layers.items():
                origin = theirs.get(name)
                if origin is None:  # in a block that is left out
                    continue
                for width in _WIDTHS:  # a forward may look at them
                    if hasattr(origin, width):
                        setattr(layer, width, getattr(origin, width))
                if name in self._folded:
                    self._fold(layer, origin, theirs[self._folded[name]])
                else:
                    self._take(layer, origin)

    def give_statistics(self, target: nn.Module) -> None:
        """Copies the batch-norm statistics into a network of the same widths."""
        theirs = dict(target.named_modules())
        for name, layer in self._layers.items():
            if isinstance(layer, Norm) and layer.track_running_stats and name in theirs:
                for key in ("running_mean", "running_var"):
                    getattr(theirs[name], key).copy_(getattr(layer, key))

    def _take(self, layer: nn.Module, origin: nn.Module) -> None:
        tensors = (*origin.named_parameters("", False), *origin.named_buffers("", False))
        for key, tensor in tensors:
            getattr(layer, key).data = self._cast(tensor, layer)

    def _fold(self, layer: Any, origin: Any, norm: Any) -> None:
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            scale = scale * norm.weight
        mean = norm.running_mean if origin.bias is None else norm.running_mean - origin.bias
        bias = -mean * scale if not norm.affine else norm.bias - mean * scale
        weight = origin.weight * scale.view(-1, *[1] * (origin.weight.ndim - 1))
        layer.weight.data = self._cast(weight, layer)
        layer.bias.data = self._cast(bias, layer)

    def _cast(self, tensor: Tensor, layer: nn.Module) -> Tensor:
        tensor = tensor.detach()
        dtype = tensor.dtype
        if tensor.is_floating_point() and layer not in self._whole:
            dtype = self.dtype
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        # Never the source's own memory: recalibration writes into statistics.
        return tensor.to(dtype, copy=True, memory_format=layout)
