"""What Torch-Pruning's dependency graph proposes. The only module that imports it."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evosearch.errors import NetworkError
from evosearch.pruning.layers import (
    Channelwise,
    Convolution,
    Proposal,
    dimensions,
    is_channelwise,
    is_depthwise,
)

__all__ = ["dependencies"]

# No map is flattened into more than a layer reads: beyond, each channel is followed to each token.
_MOST_TIMES = 4


@contextlib.contextmanager
def _bounded(module: nn.Module) -> Iterator[None]:
    """Has the graph give up where it would follow channels until memory is full."""
    from torch_pruning.dependency import index_mapping

    # A private class: where a later version has none, there is no bound.
    mapping: Any = getattr(index_mapping, "_FlattenIndexMapping", None)
    if mapping is None:
        yield
        return
    plain = mapping.__call__
    widths = (dimensions(m) for m in module.modules() if isinstance(m, nn.Linear | Convolution))
    most = _MOST_TIMES * max((max(pair) for pair in widths), default=1)

    def bounded(self: object, indices: Any) -> Any:
        found = plain(self, indices)
        if len(found) > most:
            raise OverflowError("a channel is followed to more places than any map has")
        return found

    mapping.__call__ = bounded
    try:
        yield
    finally:
        mapping.__call__ = plain


@contextlib.contextmanager
def _hooks_kept(module: nn.Module) -> Iterator[None]:
    """Removes the hooks that are left where tracing fails half way."""
    before = [(layer, dict(layer._forward_hooks)) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, hooks in before:
            for key in layer._forward_hooks.keys() - hooks.keys():
                del layer._forward_hooks[key]


def dependencies(module: nn.Module, example: Tensor) -> list[Proposal]:
    """Channels that depend on each other, by the graph of one run.

    Args:
        module: In evaluation mode, all parameters requiring gradients.
        example: An input.

    Raises:
        NetworkError: Torch-Pruning cannot follow the network.
    """
    import torch_pruning as tp

    graph = tp.DependencyGraph()
    names = {part: name for name, part in module.named_modules()}
    with warnings.catch_warnings(), torch.enable_grad(), _bounded(module), _hooks_kept(module):
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(module, (example,), verbose=False)
            return [_candidate(graph, group, names) for group in graph.get_all_groups()]
        except Exception as exc:  # a user's network may do anything while it is traced
            raise NetworkError(f"Torch-Pruning cannot follow this network: {exc!r}") from exc


def _candidate(graph: object, group: object, names: dict[nn.Module, str]) -> Proposal:
    items = list(group)  # type: ignore[call-overload]
    root = items[0].dep.target.module
    found = Proposal(name=names[root], channels=len(items[0].idxs))
    for item in items:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            found.reason = f"a bare parameter of shape {tuple(target.shape)} depends on it"
        if not isinstance(target, nn.Module) or target not in names:
            continue
        name = names[target]
        if why := _unsupported(target):
            found.reason = found.reason or f"{name}: {why}"
            continue
        if not isinstance(target, nn.Linear | Convolution) and not is_channelwise(target):
            continue
        is_in = graph.is_in_channel_pruning_fn(item.dep.handler)  # type: ignore[attr-defined]
        passes_through = is_channelwise(target) or is_depthwise(target)
        side = found.ins if is_in and not passes_through else found.outs
        width = dimensions(target)[1 if side is found.ins else 0]
        sources = side.setdefault(name, np.full(width, -1, dtype=np.int64))
        sources[np.array(item.idxs, dtype=np.int64)] = item.root_idxs
    return found


def _unsupported(module: nn.Module) -> str | None:
    """Why a layer cannot be narrowed, or None if it can."""
    if isinstance(module, nn.Linear | Convolution | Channelwise):
        return None
    return f"{type(module).__name__} cannot be narrowed"
