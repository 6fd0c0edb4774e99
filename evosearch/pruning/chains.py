"""Layers that read one other layer and nothing else: what is cut where the graph gives up.

Torch-Pruning's dependency graph cannot follow every network: channel shuffles make it divide by
zero, and through windows of attention it follows each channel to each token until memory is full.
Much of such a network is plain all the same: a layer's outputs go through norms, activations and
depthwise convolutions to layers that read nothing else. That much autograd knows. As with the
graph's proposals, whether cutting them is right is not believed but checked (`groups`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evosearch.pruning.hooks import first_input, hooked
from evosearch.pruning.layers import (
    Convolution,
    Proposal,
    dimensions,
    is_channelwise,
    is_depthwise,
)

__all__ = ["chains"]

_OUTPUT = ""


def _watched(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Convolution) or is_channelwise(layer):
            yield name, layer


class _Run:
    """One run of a network, and what autograd knows of it.

    Attributes:
        sources: By layer, in order of execution, or `_OUTPUT`: which layers it read directly.
        repeated: Layers that ran more than once.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.sources: dict[str, set[str]] = {}
        self.repeated: set[str] = set()
        # Nodes are kept alive, as only then the same node is the same object.
        self._returned: dict[Any, str] = {}
        handles = []
        for name, layer in _watched(module):
            before, after = partial(self._before, name), partial(self._after, name)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        with hooked(handles), torch.enable_grad():
            self.sources[_OUTPUT] = self._written_by(module(example))

    def _before(
        self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        if name in self.sources:
            self.repeated.add(name)
        read = self._written_by(first_input(inputs, named))
        self.sources[name] = self.sources.get(name, set()) | read

    def _after(self, name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> None:
        self._returned[output.grad_fn] = name

    def _written_by(self, tensor: Tensor) -> set[str]:
        """The nearest layers that autograd's graph leads back to."""
        found, known, waiting = set(), set(), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in known:
                continue
            known.add(node)
            if node in self._returned:
                found.add(self._returned[node])
            else:
                waiting.extend(before for before, _ in node.next_functions)
        return found


class _Flow:
    """Which layers write what each layer reads, norms and depthwise convolutions looked through.

    Args:
        module, example: To run.
        why: The dependency graph gave up.
    """

    def __init__(self, module: nn.Module, example: Tensor, why: str) -> None:
        run = _Run(module, example)
        self.layers = {n: layer for n, layer in _watched(module) if n in run.sources}
        self._why = why
        self._repeated = run.repeated
        self.through = {
            name
            for name, layer in self.layers.items()
            if is_channelwise(layer) or is_depthwise(layer)
        }
        # In order of execution, so that what wrote to a source is known; no layer is behind itself.
        self._behind: dict[str, set[str]] = {}
        for name, sources in run.sources.items():
            self._behind[name] = set()
            for source in sources:
                seen = self._behind.get(source, set()) if source in self.through else {source}
                self._behind[name] |= seen

    def chain(self, name: str) -> Proposal:
        """What one layer writes, with those who read it."""
        width = dimensions(self.layers[name])[0]
        found = Proposal(name=name, channels=width, outs={name: np.arange(width)})
        readers = [reader for reader, writers in self._behind.items() if name in writers]
        if _OUTPUT in readers:
            found.reason = "it is the network's output"
            return found
        objections = (self._objection(name, reader) for reader in readers)
        found.reason = next((told for told in objections if told), None)
        if found.reason is None:
            for reader in readers:
                side = found.outs if reader in self.through else found.ins
                side[reader] = np.repeat(np.arange(width), self._taken(reader) // width)
        return found

    def stray(self, name: str) -> Proposal:
        """A depthwise convolution that is in no chain."""
        width = dimensions(self.layers[name])[0]
        reason = f"what it reads is no single layer's, and {self._why}"
        return Proposal(name=name, channels=width, outs={name: np.arange(width)}, reason=reason)

    def _taken(self, reader: str) -> int:
        return dimensions(self.layers[reader])[0 if reader in self.through else 1]

    def _objection(self, name: str, reader: str) -> str | None:
        others = sorted(self._behind[reader] - {name})
        twice = sorted(self._repeated & {reader, name})
        width, taken = dimensions(self.layers[name])[0], self._taken(reader)
        if others:
            return f"{reader} reads it along with {others[0]}, and {self._why}"
        if twice:
            return f"{twice[0]} runs twice, and {self._why}"
        if taken % width:
            return f"{reader} reads {taken} channels where it has {width}, and {self._why}"
        return None


def chains(module: nn.Module, example: Tensor, why: str) -> list[Proposal]:
    """A proposal for each layer whose outputs are read by layers that read nothing else.

    Args:
        module: In evaluation mode, all parameters requiring gradients.
        example: An input.
        why: The dependency graph gave up; said of layers whose outputs are read otherwise.

    Returns:
        One for each convolution and linear layer that ran, with an objection where it has no
        such readers.
    """
    flow = _Flow(module, example, why)
    found = [flow.chain(name) for name in flow.layers if name not in flow.through]
    covered = {name for proposal in found for name in proposal.outs}
    deep = [n for n in flow.through - covered if is_depthwise(flow.layers[n])]
    return found + [flow.stray(name) for name in sorted(deep)]
