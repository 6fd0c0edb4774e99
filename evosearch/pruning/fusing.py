"""Convolutions that do the sum and the ReLU behind them while their result is still in registers.

On a CPU, sums and ReLUs of wide maps cost a sixth of a residual network's forward pass, all of it
traffic to memory. oneDNN has both as post-operations of a convolution, in torch's own builds; what
follows which convolution is seen by running the network once, and checked numerically.
"""

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from evosearch.pruning.sampling import pads_with_zeros
from evosearch.pruning.watching import Watch

__all__ = ["Fused", "Tail", "can_fuse", "convolve", "tails_of"]

_LIBRARY = torch.ops.mkldnn


class Tail(StrEnum):
    """What is done to a convolution's output, and to nothing else, before anybody reads it."""

    RELU = "relu"
    ADD = "add"
    ADD_RELU = "add-relu"


@functools.cache
def _has_library(dtype: torch.dtype) -> bool:
    ops = ("_convolution_pointwise", "_is_mkldnn_bf16_supported")
    if not torch._C._has_mkldnn or not all(hasattr(_LIBRARY, op) for op in ops):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(_LIBRARY._is_mkldnn_bf16_supported())
    )


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a library for it."""
    return device.type == "cpu" and _has_library(dtype)


def convolve(layer: Any, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """What a convolution returns, with what follows it, in one pass.

    Args:
        layer: A convolution as in `pads_with_zeros`.
        x: Its input; device and dtype as in `can_fuse`.
        other: To add, like the output.
        relu: Whether to rectify in the end.
    """
    where = (layer.padding, layer.stride, layer.dilation, layer.groups)
    weight, bias = layer.weight, layer.bias
    if other is None:
        rectified: Tensor = _LIBRARY._convolution_pointwise(
            x, weight, bias, *where, "relu" if relu else "none", [], ""
        )
        return rectified
    summed: Tensor = _LIBRARY._convolution_pointwise.binary(
        x, other, weight, bias, *where, "add", 1.0, "relu" if relu else None, [], ""
    )
    return summed


class Fused:
    """Makes a network run convolutions together with their tails, in place.

    Args:
        module: The network; its convolutions and the whole get a `forward` of their own.
        tails: By name of the convolution.
    """

    def __init__(self, module: nn.Module, tails: Mapping[str, Tail]) -> None:
        self._pending: dict[int, tuple[nn.Module, Tail, Tensor, Tensor]] = {}
        self._rectified: dict[int, Tensor] = {}
        for name, tail in tails.items():
            layer = module.get_submodule(name)
            layer.forward = functools.partial(self._visit, layer, tail)
        self._inner = module.forward
        module.forward = self._whole

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        self._pending.clear()
        self._rectified.clear()
        with Watch(added=self._added, rectified=self._relu):
            return self._inner(*args, **kwargs)

    def _visit(self, layer: Any, tail: Tail, x: Tensor) -> Tensor:
        if tail == Tail.RELU:
            return self._noted(convolve(layer, x, relu=True))
        # Done when the other side of the sum is known; until then nobody reads it.
        blank = x.new_empty(()).expand(len(x), len(layer.weight), *_size(layer, x))
        self._pending[id(blank)] = (layer, tail, x, blank)
        return blank

    def _noted(self, output: Tensor) -> Tensor:
        self._rectified[id(output)] = output
        return output

    def _added(self, _func: Any, left: Tensor, right: Tensor) -> Tensor | None:
        for tensor, other in ((left, right), (right, left)):
            if id(tensor) in self._pending:
                layer, tail, x, _ = self._pending.pop(id(tensor))
                output = convolve(layer, x, other, relu=tail == Tail.ADD_RELU)
                return self._noted(output) if tail == Tail.ADD_RELU else output
        return None

    def _relu(self, _call: Callable[[], Tensor], tensor: Tensor) -> Tensor | None:
        # Let go of at once: maps that are kept push others out of the cache.
        return self._rectified.pop(id(tensor), None)


def _size(layer: Any, x: Tensor) -> tuple[int, ...]:
    """Height and width of a convolution's output."""
    return tuple(
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:],
            layer.padding,
            layer.dilation,
            layer.kernel_size,
            layer.stride,
            strict=True,
        )
    )


@dataclass(eq=False)
class _Chain:
    """An output and what has become of it."""

    layer: str
    current: Tensor
    past: list[Tensor] = field(default_factory=list)
    tail: Tail | None = None
    open: bool = True
    spoiled: bool = False

    def follow(self, tail: Tail, result: Tensor) -> None:
        if result is not self.current:
            self.past.append(self.current)
        self.current, self.tail = result, tail


class _Recorder:
    """Follows the outputs of convolutions until somebody reads them."""

    def __init__(self, module: nn.Module, watched: Container[str]) -> None:
        self._names = {
            layer: name
            for name, layer in module.named_modules()
            if pads_with_zeros(layer) and name not in watched
        }
        self._chains: list[_Chain] = []

    def after(self, layer: nn.Module, _inputs: object, output: object) -> None:
        """A module has run: a convolution, or one whose output is watched."""
        if not isinstance(output, Tensor):
            return
        if layer in self._names:
            self._chains.append(_Chain(self._names[layer], output))
        else:
            self.read(output)

    def read(self, tensor: Tensor) -> None:
        """Something else than a sum or a ReLU reads a tensor."""
        for chain in self._chains:
            if chain.current is tensor:
                chain.open = False
            elif any(past is tensor for past in chain.past):
                chain.spoiled = True

    def _open(self, tensor: Tensor, tails: tuple[Tail | None, ...]) -> _Chain | None:
        for chain in self._chains:
            if chain.current is tensor and chain.open and chain.tail in tails:
                return chain
        return None

    def added(self, func: Any, left: Tensor, right: Tensor) -> Tensor | None:
        """The sum belongs to the one that nobody has read yet."""
        chains = [chain for x in (left, right) if (chain := self._open(x, (None,)))]
        if not chains or left is right:
            self.read(left)
            self.read(right)
            return None
        chain = chains[0]
        self.read(right if chain.current is left else left)
        result: Tensor = func(left, right)
        chain.follow(Tail.ADD, result)
        return result

    def rectified(self, call: Callable[[], Tensor], tensor: Tensor) -> Tensor | None:
        """A ReLU ends a chain."""
        chain = self._open(tensor, (None, Tail.ADD))
        if chain is None:
            self.read(tensor)
            return None
        result = call()
        chain.follow(Tail.RELU if chain.tail is None else Tail.ADD_RELU, result)
        chain.open = False
        return result

    def tails(self) -> dict[str, Tail]:
        """Of the convolutions that ran once."""
        runs = [chain.layer for chain in self._chains]
        return {
            chain.layer: chain.tail
            for chain in self._chains
            if chain.tail is not None and not chain.spoiled and runs.count(chain.layer) == 1
        }


@torch.inference_mode()
def tails_of(module: nn.Module, example: Tensor, watched: Container[str] = ()) -> dict[str, Tail]:
    """What follows which convolution and can be done by it.

    Args:
        module: The network as it will run, batch norm folded.
        example: A batch that it takes.
        watched: Names of modules whose outputs somebody else reads, by a hook.
    """
    recorder = _Recorder(module, watched)
    handles = [
        layer.register_forward_hook(recorder.after)
        for name, layer in module.named_modules()
        if pads_with_zeros(layer) or name in watched
    ]
    try:
        with Watch(added=recorder.added, rectified=recorder.rectified, read=recorder.read):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.tails()
