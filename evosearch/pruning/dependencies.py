"""What Torch-Pruning's dependency graph proposes. The only module that imports it."""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
# Nor has a group more members than this times the graph's nodes (InceptionNeXt: 15 times): beyond,
# sums of slices are followed in circles.
_MOST_MEMBERS = 20

_ROOTS = nn.Linear | nn.modules.conv._ConvNd


@contextlib.contextmanager
def _adapted(module: nn.Module, graph: Any) -> Iterator[None]:
    """Has the graph give up where it would follow channels for ever, and forget no channel.

    It does so by private classes: where a later version lacks one of them, it is as it comes.
    """
    try:
        from torch_pruning.dependency import group, index_mapping
    except ImportError:
        yield
        return
    widths = (dimensions(m) for m in module.modules() if isinstance(m, nn.Linear | Convolution))
    most = _MOST_TIMES * max((max(pair) for pair in widths), default=1)

    def flattened(plain: Any, self: Any, indices: Any) -> Any:
        found = plain(self, indices)
        if len(found) > most:
            raise OverflowError("a channel is followed to more places than any map has")
        return found

    def added(plain: Any, self: Any, dep: Any, idxs: Any) -> None:
        plain(self, dep, idxs)
        if len(self) > _MOST_MEMBERS * len(graph.module2node):
            raise OverflowError("a channel is followed in circles")

    def merged(_plain: Any, self: Any, dep: Any, idxs: Any) -> None:
        # As it comes, a second channel that leads to the same place is dropped.
        for place, (known, before) in enumerate(self.items):
            if known.target == dep.target and known.handler == dep.handler:
                both = list(dict.fromkeys([*before, *idxs]))
                self[place] = type(self[place])(known, both)
                return
        self.add_dep(dep, idxs)

    with (
        _replaced(getattr(index_mapping, "_FlattenIndexMapping", None), "__call__", flattened),
        _replaced(getattr(group, "Group", None), "add_dep", added),
        _replaced(getattr(group, "Group", None), "add_and_merge", merged),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Calls `ours` with a method and its arguments in place of the method, if there is one."""
    plain = getattr(owner, name, None)
    if plain is None:
        yield
        return
    setattr(owner, name, lambda *args, **named: ours(plain, *args, **named))
    try:
        yield
    finally:
        setattr(owner, name, plain)


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

    Returns:
        A proposal for each layer whose channels no other one has; with a reason if Torch-Pruning
        cannot follow them.

    Raises:
        NetworkError: Torch-Pruning cannot follow the network.
    """
    import torch_pruning as tp

    graph = tp.DependencyGraph()
    names = {part: name for name, part in module.named_modules()}
    found: list[Proposal] = []
    covered: set[str] = set()
    with (
        warnings.catch_warnings(),
        torch.enable_grad(),
        _adapted(module, graph),
        _hooks_kept(module),
    ):
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(module, (example,), verbose=False)
        except Exception as exc:  # a user's network may do anything while it is traced
            raise NetworkError(f"Torch-Pruning cannot follow this network: {exc!r}") from exc
        for root in graph.module2node:
            pruner = graph.get_pruner_of_module(root)
            if not isinstance(root, _ROOTS) or pruner is None or names[root] in covered:
                continue
            width = pruner.get_out_channels(root)
            try:
                group = graph.get_pruning_group(root, pruner.prune_out_channels, [*range(width)])
                found.append(_candidate(graph, group, names))
            except Exception as exc:  # noqa: BLE001  likewise
                reason = f"Torch-Pruning cannot follow its channels: {exc!r}"
                outs = {names[root]: np.arange(width)}
                found.append(Proposal(names[root], width, outs=outs, reason=reason, lost=True))
            covered |= found[-1].outs.keys()
    return found


def _candidate(graph: object, group: object, names: dict[nn.Module, str]) -> Proposal:
    items = list(group)  # type: ignore[call-overload]
    root = items[0].dep.target.module
    found = Proposal(name=names[root], channels=1 + max(items[0].idxs))
    # Places in a layer and the root's channels that stand there, by side and layer.
    places: dict[tuple[bool, str], list[NDArray[np.int64]]] = defaultdict(list)
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
        reads = is_in and not is_channelwise(target) and not is_depthwise(target)
        places[reads, name].append(np.array([item.idxs, item.root_idxs], dtype=np.int64))
    joined = {key: np.concatenate(parts, axis=1) for key, parts in places.items()}
    found.channels, numbers = _inseparable(list(joined.values()), found.channels)
    layers = {name: target for target, name in names.items()}
    for (reads, name), (indices, channels) in joined.items():
        side = found.ins if reads else found.outs
        side[name] = np.full(dimensions(layers[name])[reads], -1, dtype=np.int64)
        side[name][indices] = numbers[channels]
    return found


def _inseparable(places: Sequence[NDArray[np.int64]], width: int) -> tuple[int, NDArray[np.int64]]:
    """Gives channels that stand at one place of some layer one number.

    A ghost module returns its channels and, behind them, what a depthwise convolution makes of
    them: to what reads both these are two channels, of which none can go alone.

    Args:
        places: Arrays `(2, n)` of places in one layer and the channels that stand there.
        width: How many channels there are.

    Returns:
        How many can go alone, and the number of each channel among them, `(width,)`.
    """
    bonds = [np.zeros((2, 0), dtype=np.int64)]
    for indices, channels in places:
        order = np.argsort(indices, kind="stable")
        same = np.diff(indices[order]) == 0
        bonds.append(np.stack([channels[order][:-1][same], channels[order][1:][same]]))
    start, end = np.concatenate(bonds, axis=1)
    if not len(start):
        return width, np.arange(width)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(start)), (start, end)), shape=(width, width))
    count, numbers = connected_components(graph, directed=False)
    return int(count), numbers.astype(np.int64)


def _unsupported(module: nn.Module) -> str | None:
    """Why a layer cannot be narrowed, or None if it can."""
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
        return "it normalises all channels together"
    if isinstance(module, nn.Linear | Convolution | Channelwise):
        return None
    return f"{type(module).__name__} cannot be narrowed"
