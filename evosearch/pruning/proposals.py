"""Which channels might have to be cut together. The only module that imports Torch-Pruning.

Torch-Pruning's dependency graph proposes; what its bookkeeping already rules out, and layers that
we cannot narrow, are objected to here. `groups` checks the rest.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import NetworkError

__all__ = [
    "Convolution",
    "Norm",
    "Positions",
    "Proposal",
    "dimensions",
    "output_positions",
    "propose",
]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


# Output positions per image, and height and width of the output.
Positions = dict[str, tuple[int, tuple[int, int]]]


@dataclass
class Proposal:
    """A proposal of the dependency graph: which indices of which layer follow which channel."""

    name: str
    channels: int
    outs: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    ins: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    reason: str | None = None


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel reads the one input channel of the same number."""
    return (
        isinstance(module, Convolution)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def dimensions(module: nn.Module) -> tuple[int, int]:
    """Output and input width of a layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Convolution):
        return module.out_channels, module.in_channels
    assert isinstance(module, Norm)  # noqa: S101  callers pass supported layers only
    return module.num_features, module.num_features


def _unsupported(module: nn.Module) -> str | None:
    """Why a layer cannot be narrowed, or None if it can."""
    if isinstance(module, Convolution):
        if module.groups > 1 and not is_depthwise(module):
            return f"grouped convolution ({module.groups} groups)"
        return None
    if isinstance(module, nn.Linear | Norm):
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return None
    return f"{type(module).__name__} cannot be narrowed"


def _proposals(module: nn.Module, example: Tensor) -> list[Proposal]:
    """Runs Torch-Pruning's dependency graph over a copy of the network."""
    import torch_pruning as tp

    graph = tp.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(module, (example,), verbose=False)
            groups = list(graph.get_all_groups())
        except Exception as exc:  # a user's network may do anything while it is traced
            raise NetworkError(
                f"Torch-Pruning cannot follow the network on an input of shape "
                f"{tuple(example.shape)}: {exc!r}"
            ) from exc
    names = {part: name for name, part in module.named_modules()}
    return [_candidate(graph, group, names) for group in groups]


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
        if not isinstance(target, nn.Linear | Norm | Convolution):
            continue
        is_in = graph.is_in_channel_pruning_fn(item.dep.handler)  # type: ignore[attr-defined]
        passes_through = isinstance(target, Norm) or is_depthwise(target)
        side = found.ins if is_in and not passes_through else found.outs
        width = dimensions(target)[1 if side is found.ins else 0]
        sources = side.setdefault(name, np.full(width, -1, dtype=np.int64))
        sources[np.array(item.idxs, dtype=np.int64)] = item.root_idxs
    return found


def _shared_weights(layers: dict[str, nn.Module]) -> dict[str, str]:
    """By layer the other layer that holds the same weight tensor."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(set(names)) > 1
        for name in names
    }


def _objection(
    candidate: Proposal, layers: dict[str, nn.Module], shared: dict[str, str]
) -> str | None:
    """Why the proposal cannot be cut, going by its own bookkeeping, or None."""
    if not candidate.ins:
        return "it is the network's output"
    for name in (*candidate.outs, *candidate.ins):
        if name in shared:
            return f"{name} shares its weights with {shared[name]}"
    for name, sources in candidate.outs.items():
        if not isinstance(layers[name], Norm) and (sources < 0).any():
            covered = int((sources >= 0).sum())
            return f"it covers {covered} of the {len(sources)} output channels of {name}"
    for side in (candidate.outs, candidate.ins):
        for name, sources in side.items():
            counts = np.bincount(sources[sources >= 0], minlength=candidate.channels)
            if counts.min() != counts.max():
                return f"its channels appear a different number of times in {name}"
            if counts.max() > 1 and (sources < 0).any():
                return f"it is flattened together with other channels into {name}"
    return None


def output_positions(module: nn.Module, example: Tensor) -> Positions:
    """Output positions of each convolution and linear layer for one image, over all calls."""
    found: Positions = {}
    handles = []

    def hook(name: str, layer: nn.Module) -> object:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            width = dimensions(layer)[0]
            count = output.numel() // (len(example) * width)
            size = list(output.shape[2:]) if isinstance(layer, Convolution) else [1]
            resolution = (size[0], size[-1])
            before = found[name][0] if name in found else 0
            found[name] = (before + count, resolution)

        return layer.register_forward_hook(record)

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Convolution):
            handles.append(hook(name, layer))
    try:
        with torch.inference_mode():
            output = module(example)
    except Exception as exc:  # a user's network may raise anything
        raise NetworkError(
            f"the network fails on an input of shape {tuple(example.shape)}: {exc!r}; "
            "check network.input_shape"
        ) from exc
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NetworkError(f"a network must return logits (images, classes), got {shape}")
    return found


def propose(module: nn.Module, example: Tensor, positions: Positions) -> list[Proposal]:
    """All coupled channels of a network in forward order, with objections where there are any.

    Args:
        module: In evaluation mode, all parameters requiring gradients.
        example: An input.
        positions: From `output_positions`; its order is the order of execution.

    Raises:
        NetworkError: Torch-Pruning cannot follow the network.
    """
    layers = dict(module.named_modules())
    order = {name: place for place, name in enumerate(positions)}
    shared = _shared_weights(layers)
    proposals = _proposals(module, example)
    for proposal in proposals:
        producers = [name for name in proposal.outs if name in order]
        if producers:
            proposal.name = min(producers, key=order.__getitem__)
        proposal.reason = proposal.reason or _objection(proposal, layers, shared)
        if proposal.channels < 2:
            proposal.reason = proposal.reason or "it has a single channel"
    return sorted(proposals, key=lambda proposal: order.get(proposal.name, len(order)))
