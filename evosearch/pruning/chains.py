"""Layers that read one other layer and nothing else: what is cut where the graph gives up.

Torch-Pruning's dependency graph cannot follow every network: channel shuffles make it divide by
zero, and through windows of attention it follows each channel to each token until memory is full.
Much of such a network is plain all the same: a layer's outputs go through norms, activations and
depthwise convolutions to layers that read nothing else. That much autograd knows. As with the
graph's proposals, whether cutting them is right is not believed but checked (`groups`).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evosearch.pruning.layers import Convolution, Norm, Proposal, dimensions, is_depthwise

__all__ = ["chains"]

_OUTPUT = ""


def _watched(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Norm | Convolution):
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
        try:
            with torch.enable_grad():
                self.sources[_OUTPUT] = self._written_by(module(example))
        finally:
            for handle in handles:
                handle.remove()

    def _before(
        self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        if name in self.sources:
            self.repeated.add(name)
        read = self._written_by(next(iter((*inputs, *named.values()))))
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
    run, layers = _Run(module, example), dict(_watched(module))
    through = {n for n, layer in layers.items() if isinstance(layer, Norm) or is_depthwise(layer)}
    behind: dict[str, set[str]] = {}

    def producers_behind(name: str) -> set[str]:
        """Who wrote what a layer reads, norms and depthwise convolutions looked through."""
        if name not in behind:
            behind[name] = set()  # no layer is behind itself
            for source in run.sources.get(name, ()):
                behind[name] |= producers_behind(source) if source in through else {source}
        return behind[name]

    for name in run.sources:
        producers_behind(name)
    found = [
        _chain(name, layers, through, behind, run.repeated, why)
        for name in layers
        if name in run.sources and name not in through
    ]
    covered = {name for proposal in found for name in proposal.outs}
    for name in through - covered:
        if not isinstance(layers[name], Norm):
            width = dimensions(layers[name])[0]
            reason = f"what it reads is no single layer's, and {why}"
            found.append(Proposal(name, width, outs={name: np.arange(width)}, reason=reason))
    return found


def _chain(
    name: str,
    layers: Mapping[str, nn.Module],
    through: set[str],
    behind: Mapping[str, set[str]],
    repeated: set[str],
    why: str,
) -> Proposal:
    """The proposal of one producer."""
    width = dimensions(layers[name])[0]
    found = Proposal(name=name, channels=width, outs={name: np.arange(width)})
    for reader, producers in behind.items():
        if name not in producers:
            continue
        if reader == _OUTPUT:
            found.reason = "it is the network's output"
            break
        others = sorted(producers - {name})
        taken = dimensions(layers[reader])[0 if reader in through else 1]
        if others:
            found.reason = f"{reader} reads it along with {others[0]}, and {why}"
        elif repeated & {reader, name}:
            found.reason = f"{', '.join(sorted(repeated & {reader, name}))} runs twice, and {why}"
        elif taken % width:
            found.reason = f"{reader} reads {taken} channels where it has {width}, and {why}"
        side = found.outs if reader in through else found.ins
        side[reader] = np.repeat(np.arange(width), max(1, taken // width))[:taken]
    return found
