"""What the layers of a dense network return: what a cut one is fitted to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.folding import FastCopy, Layout
from evosearch.pruning.hooks import hooked
from evosearch.pruning.sampling import (
    Sampler,
    drawn_positions,
    is_linear,
    pads_with_zeros,
    places_of_output,
)
from evosearch.pruning.watching import Watch

__all__ = ["Target", "targets_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What a layer, or the sum that it enters, returns in the dense network.

    Args:
        values: `(n_images * n_positions, n_outputs)` float32.
        positions: Where values were read; see `Sampler`.
        summed: Whether the values are those of the sum.
        shape: See `places_of_output`.
    """

    values: NDArray[np.float32]
    positions: NDArray[np.int64] | None
    summed: bool
    shape: tuple[int, ...]


def _fitted(layer: nn.Module) -> bool:
    return is_linear(layer) or pads_with_zeros(layer)


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
        size = places_of_output(layer, output)
        self._places[name] = drawn_positions(name, size, self._count) if size else None
        self._shapes[name] = size
        # Now: later operations may work in place.
        self._values[name] = Sampler(self._places[name]).outputs(output)
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
        self._sums[unread[0]] = Sampler(self._places[unread[0]]).outputs(result)
        # After an addition in place, the tensor is the sum: reading it is not reading the output.
        self._outputs.pop(id(result), None)
        return result

    def targets(self) -> dict[str, Target]:
        """Of the layers that ran once."""
        found = {}
        for name, value in self._values.items():
            # An output that something else reads as well has to be right by itself.
            summed = name in self._sums and self._reads[name] == 1
            if self._runs[name] == 1:
                found[name] = Target(
                    values=(self._sums[name] if summed else value).cpu().numpy(),
                    positions=self._places[name],
                    summed=summed,
                    shape=self._shapes[name],
                )
        return found


@torch.inference_mode()
def targets_of(
    dense: nn.Module, layout: Layout, images: Tensor, positions: int
) -> Mapping[str, Target]:
    """Runs the dense network, norms folded, and notes what its layers return.

    Args:
        dense: The network, float32.
        layout: Which norms are folded.
        images: `(n, channels, height, width)` normalised.
        positions: How many places of each output to note.

    Returns:
        By name, convolutions and linear layers that run once, in the order in which they ran.
    """
    # Nothing fused: what a layer itself returns is wanted.
    fast = FastCopy(dense, replace(layout, tails=()), torch.float32)
    fast.update(dense)
    recorder = _Recorder(fast.module, positions)
    handles = [
        layer.register_forward_hook(recorder.after)
        for layer in fast.module.modules()
        if _fitted(layer)
    ]
    with hooked(handles), Watch(added=recorder.added, read=recorder.read):
        fast.module(images)
    return recorder.targets()
