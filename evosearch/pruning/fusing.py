"""Convolutions that sum and activate while their result is still in registers.

On a CPU, sums and ReLUs of wide maps cost a sixth of a residual network's forward pass, all of it
traffic to memory. oneDNN has sums and common activations as post-operations of a convolution, in
torch's own builds; what follows which convolution is seen by running the network once, and checked
numerically.
"""

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evosearch.errors import NetworkError
from evosearch.pruning.hooks import hooked
from evosearch.pruning.sampling import output_size, pads_with_zeros
from evosearch.pruning.watching import IN_PLACE, RELU, Activation, Watch

__all__ = ["Fused", "Tail", "can_fuse", "convolve", "tails_of"]

_LIBRARY = torch.ops.mkldnn


@dataclass(frozen=True)
class Tail:
    """What is done to a convolution's output, and to nothing else, before anybody reads it.

    Args:
        added: Whether it is one side of a sum.
        activation: Of the output, or of the sum: there the library has ReLU alone.
    """

    added: bool = False
    activation: Activation | None = None


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


def convolve(
    layer: Any, x: Tensor, other: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """What a convolution returns, with what follows it, in one pass.

    Args:
        layer: A convolution as in `pads_with_zeros`.
        x: Its input; device and dtype as in `can_fuse`.
        other: To add, like the output.
        activation: In the end; ReLU or none where there is something to add.
    """
    where = (layer.padding, layer.stride, layer.dilation, layer.groups)
    weight, bias = layer.weight, layer.bias
    name = None if activation is None else activation.name
    if other is not None:
        summed: Tensor = _LIBRARY._convolution_pointwise.binary(
            x, other, weight, bias, *where, "add", 1.0, name, [], ""
        )
        return summed
    numbers, form = ([], "") if activation is None else (list(activation.numbers), activation.form)
    activated: Tensor = _LIBRARY._convolution_pointwise(
        x, weight, bias, *where, name or "none", numbers, form
    )
    return activated


def _has_one_layout(maps: Tensor) -> bool:
    """Whether strides tell how maps lie in memory: not with one channel, or one place.

    The library refuses to add some of those (torch 2.14 in bfloat16 alone, torch 2.11 many).
    """
    _, channels, *size = maps.shape
    return channels > 1 and any(extent > 1 for extent in size)


Prepare = Callable[[str, Tensor, Tensor | None], Tensor | None]
"""Called before a convolution runs, with its name, its input, and what its output is added to."""


@dataclass(frozen=True, eq=False)
class _Visited:
    """A layer that is run in another way than its own.

    Args:
        name: Of the layer.
        layer: A convolution, or a linear layer without a tail.
        plain: Its own way.
        tail: What it does on the way.
        waits: Whether it is run when the other side of its sum is known.
    """

    name: str
    layer: Any
    plain: Callable[[Tensor], Tensor]
    tail: Tail | None
    waits: bool

    def blank(self, x: Tensor) -> Tensor:
        """Stands for the output until the sum; nobody reads it."""
        if isinstance(self.layer, nn.Linear):
            return x.new_empty(()).expand(*x.shape[:-1], len(self.layer.weight))
        size = output_size(self.layer, x)
        return x.new_empty(()).expand(len(x), len(self.layer.weight), *size)


class Fused:
    """Makes a network run convolutions together with their tails, in place.

    Args:
        module: The network; the layers that are named and the whole get a `forward` of their own.
        tails: By name of the convolution.
        prepare: Sees each layer named in `tails` or in `prepared` right before it runs, and may
            give it other weights, or return its output: then it is not run, and its tail is left
            to the network.
        prepared: Names of more layers that it is to see.
        waiting: Names of the layers that run when the other side of their sum is known; those
            whose tail is a sum, if left out.
    """

    def __init__(
        self,
        module: nn.Module,
        tails: Mapping[str, Tail],
        *,
        prepare: Prepare | None = None,
        prepared: Iterable[str] = (),
        waiting: Container[str] | None = None,
    ) -> None:
        self._prepare = prepare
        self._pending: dict[int, tuple[_Visited, Tensor, Tensor]] = {}
        self._activated: dict[int, tuple[Activation, Tensor]] = {}
        for name in dict.fromkeys((*tails, *prepared)):
            layer: Any = module.get_submodule(name)
            tail = tails.get(name)
            waits = (tail is not None and tail.added) if waiting is None else name in waiting
            visited = _Visited(name, layer, layer.forward, tail, waits)
            layer.forward = functools.partial(self._visit, visited)
        self._inner = module.forward
        module.forward = self._whole

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the layers whose sum did not come."""
        return tuple(visited.name for visited, _, _ in self._pending.values())

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        self._pending.clear()
        self._activated.clear()
        with Watch(added=self._added, activated=self._activation):
            return self._inner(*args, **kwargs)

    def _visit(self, visited: _Visited, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        if visited.waits:
            blank = visited.blank(x)
            self._pending[id(blank)] = (visited, x, blank)
            return blank
        # Nothing in here is to be watched.
        with torch._C.DisableTorchFunction():
            output = self._prepare(visited.name, x, None) if self._prepare else None
            if output is not None:
                return output
            if visited.tail is None or visited.tail.added:
                return visited.plain(x)
            activation = visited.tail.activation
            return self._noted(convolve(visited.layer, x, None, activation), activation)

    def _noted(self, output: Tensor, activation: Activation | None) -> Tensor:
        if activation is not None:
            self._activated[id(output)] = activation, output
        return output

    def _added(self, func: Any, left: Tensor, right: Tensor) -> Tensor | None:
        if id(left) in self._pending:
            visited, x, blank = self._pending.pop(id(left))
            result, activation = self._sum(visited, x, right, lambda output: func(output, right))
            # What was added to in place goes by its name from then on.
            result = blank.set_(result) if func in IN_PLACE else result  # type: ignore[call-overload]
            return self._noted(result, activation)
        if id(right) in self._pending:
            visited, x, _ = self._pending.pop(id(right))
            if func in IN_PLACE:
                output = self._prepare(visited.name, x, left) if self._prepare else None
                added: Tensor = func(left, visited.plain(x) if output is None else output)
                return added
            return self._noted(*self._sum(visited, x, left, lambda output: func(left, output)))
        return None

    def _sum(
        self, visited: _Visited, x: Tensor, other: Tensor, add: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Activation | None]:
        """The sum, and the activation that it has been through."""
        output = self._prepare(visited.name, x, other) if self._prepare else None
        tail = visited.tail
        if output is None and tail is not None and tail.added and _has_one_layout(other):
            return convolve(visited.layer, x, other, tail.activation), tail.activation
        return add(visited.plain(x) if output is None else output), None

    def _activation(
        self, activation: Activation, _call: Callable[[], Tensor], tensor: Tensor
    ) -> Tensor | None:
        # Let go of at once: maps that are kept push others out of the cache.
        done, output = self._activated.pop(id(tensor), (activation, None))
        if done != activation:
            raise NetworkError(f"{activation} was {done} in the dense network")
        return output


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
        self._names: dict[Any, str] = {
            layer: name
            for name, layer in module.named_modules()
            if pads_with_zeros(layer) and name not in watched
        }
        # The library adds to grouped ones in float32 alone.
        self._summing = {name for layer, name in self._names.items() if layer.groups == 1}
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
        """Something else than a sum or an activation reads a tensor."""
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
        chains = [
            chain
            for x in (left, right)
            if (chain := self._open(x, (None,))) and chain.layer in self._summing
        ]
        if not chains or left is right:
            self.read(left)
            self.read(right)
            return None
        chain = chains[0]
        self.read(right if chain.current is left else left)
        result: Tensor = func(left, right)
        chain.follow(Tail(added=True), result)
        return result

    def activated(
        self, activation: Activation, call: Callable[[], Tensor], tensor: Tensor
    ) -> Tensor | None:
        """An activation ends a chain."""
        tails = (None, Tail(added=True)) if activation == RELU else (None,)
        chain = self._open(tensor, tails)
        if chain is None:
            self.read(tensor)
            return None
        result = call()
        chain.follow(Tail(chain.tail is not None, activation), result)
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
    watch = Watch(added=recorder.added, activated=recorder.activated, read=recorder.read)
    with hooked(handles), watch:
        module(example)
    return recorder.tails()
