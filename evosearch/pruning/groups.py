"""Finds what must be cut together. The only module that imports Torch-Pruning.

Torch-Pruning's dependency graph proposes coupled channels. Its proposals are checked before they
are believed: a cut network must compute what the dense network computes when the consumers of the
removed channels ignore them. Proposals that fail, or that touch layers we cannot narrow, are
reported as fixed with the reason.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import NetworkError
from evosearch.networks import Network
from evosearch.pruning.cutting import CuttingPlan, LayerCut
from evosearch.pruning.table import Axis, FixedGroup, Group, GroupTable, LayerCost

__all__ = ["Convolution", "is_depthwise", "trace"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass
class _Candidate:
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


def _dimensions(module: nn.Module) -> tuple[int, int]:
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


def _propose(module: nn.Module, example: Tensor) -> list[_Candidate]:
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
                f"the network could not be traced on an input of shape {tuple(example.shape)}: "
                f"{exc!r}; check network.input_shape"
            ) from exc
    names = {part: name for name, part in module.named_modules()}
    return [_candidate(graph, group, names) for group in groups]


def _candidate(graph: object, group: object, names: dict[nn.Module, str]) -> _Candidate:
    items = list(group)  # type: ignore[call-overload]
    root = items[0].dep.target.module
    found = _Candidate(name=names[root], channels=len(items[0].idxs))
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
        width = _dimensions(target)[1 if side is found.ins else 0]
        sources = side.setdefault(name, np.full(width, -1, dtype=np.int64))
        sources[np.array(item.idxs, dtype=np.int64)] = item.root_idxs
    return found


def _objection(candidate: _Candidate, layers: dict[str, nn.Module]) -> str | None:
    """Why the proposal cannot be cut, going by its own bookkeeping, or None."""
    if not candidate.ins:
        return "it is the network's output"
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


def _positions(module: nn.Module, example: Tensor) -> dict[str, tuple[int, tuple[int, int]]]:
    """Output positions of each convolution and linear layer for one image, over all calls."""
    found: dict[str, tuple[int, tuple[int, int]]] = {}
    handles = []

    def hook(name: str, layer: nn.Module) -> object:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            width = _dimensions(layer)[0]
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


class _Builder:
    """Turns accepted candidates into axes, costs and a cutting plan."""

    def __init__(
        self,
        candidates: Sequence[_Candidate],
        layers: dict[str, nn.Module],
        positions: dict[str, tuple[int, tuple[int, int]]],
    ) -> None:
        self.candidates = candidates
        self.layers = layers
        self.positions = positions
        self._axes: list[Axis] = []
        self._known: dict[bytes, int] = {}

    def _axis(self, sources: NDArray[np.int64]) -> int:
        key = sources.tobytes()
        if key not in self._known:
            self._known[key] = len(self._axes)
            self._axes.append(Axis(sources))
        return self._known[key]

    def _sides(self) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
        outs: dict[str, NDArray[np.int64]] = {}
        ins: dict[str, NDArray[np.int64]] = {}
        offset = 0
        for candidate in self.candidates:
            for all_sides, own in ((outs, candidate.outs), (ins, candidate.ins)):
                for name, sources in own.items():
                    merged = all_sides.setdefault(name, np.full(len(sources), -1, dtype=np.int64))
                    merged[sources >= 0] = sources[sources >= 0] + offset
            offset += candidate.channels
        return outs, ins

    def _group(self, candidate: _Candidate) -> Group:
        return Group(
            name=candidate.name,
            channels=candidate.channels,
            resolution=self.positions[candidate.name][1],
            producers=tuple(n for n in candidate.outs if not isinstance(self.layers[n], Norm)),
            consumers=tuple(candidate.ins),
        )

    def _layer(self, name: str, out_axis: int, in_axis: int) -> LayerCost:
        layer = self.layers[name]
        count = self.positions.get(name, (0, (1, 1)))[0]
        if isinstance(layer, Norm):
            affine = 2 if layer.affine else 0
            return LayerCost(
                name=name, in_axis=None, out_axis=out_axis, macs=0, weights=0, per_output=affine
            )
        assert isinstance(layer, nn.Linear | Convolution)  # noqa: S101  filtered by build
        kernel = int(layer.weight[0, 0].numel())
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        bias = 0 if layer.bias is None else 1
        if groups > 1:
            # Every output channel reads in_channels / groups inputs, whatever a policy keeps:
            # one when depthwise, and other grouped convolutions are fixed.
            kernel *= int(layer.weight.shape[1])
            return LayerCost(
                name=name,
                in_axis=None,
                out_axis=out_axis,
                macs=kernel * count,
                weights=kernel,
                per_output=bias,
            )
        return LayerCost(
            name=name,
            in_axis=in_axis,
            out_axis=out_axis,
            macs=kernel * count,
            weights=kernel,
            per_output=bias,
        )

    def build(self, fixed: Iterable[FixedGroup]) -> CuttingPlan:
        """The table and the plan."""
        outs, ins = self._sides()
        costs, cuts, counted = [], [], 0
        for name, layer in self.layers.items():
            if not isinstance(layer, nn.Linear | Norm | Convolution):
                continue
            out_size, in_size = _dimensions(layer)
            out_axis = self._axis(outs.get(name, np.full(out_size, -1, dtype=np.int64)))
            in_axis = self._axis(ins.get(name, np.full(in_size, -1, dtype=np.int64)))
            costs.append(self._layer(name, out_axis, in_axis))
            counted += sum(p.numel() for p in layer.parameters(recurse=False))
            if name in outs or name in ins:
                cuts.append(
                    LayerCut(
                        name=name,
                        out_axis=out_axis if name in outs else None,
                        in_axis=in_axis if name in ins else None,
                    )
                )
        total = sum(p.numel() for layer in self.layers.values() for p in layer.parameters(False))
        table = GroupTable(
            groups=tuple(self._group(candidate) for candidate in self.candidates),
            fixed=tuple(fixed),
            axes=tuple(self._axes),
            layers=tuple(costs),
            other_params=total - counted,
        )
        return CuttingPlan(table=table, cuts=tuple(cuts))


@torch.inference_mode()
def _disagreement(module: nn.Module, plan: CuttingPlan, example: Tensor) -> str | None:
    """Cuts about half of every group; says how the result is wrong, or None if it is right."""
    rng = np.random.default_rng(0)
    table = plan.table
    keep = np.ones(int(table.channels.sum()) + 1, dtype=np.bool_)
    for offset, channels in zip(table.offsets, table.channels, strict=True):
        if channels > 1:
            removed = rng.permutation(channels)[: max(1, channels // 2)]
            keep[offset + removed] = False
    masked, cut = copy.deepcopy(module), copy.deepcopy(module)
    layers = dict(masked.named_modules())
    for entry in plan.cuts:
        if entry.in_axis is not None:
            gone = torch.from_numpy(~keep[table.axes[entry.in_axis].sources])
            layers[entry.name].weight[:, gone] = 0
    try:
        plan.cut(module, cut, keep)
        result = cut(example)
    except (RuntimeError, ValueError, IndexError) as exc:
        return f"after cutting, the forward pass fails: {str(exc).splitlines()[0]}"
    wanted = masked(example)
    scale = float(wanted.abs().max()) or 1.0
    if not torch.allclose(result, wanted, rtol=1e-6, atol=1e-6 * scale):
        return "cutting it is not the same as ignoring it (channels are mixed on the way)"
    return None


def trace(network: Network) -> CuttingPlan:
    """Finds, checks and tabulates the groups of a network.

    Groups are checked together by one forward pass in float64; only if that fails, one by one.

    Returns:
        The plan by which any policy is cut; its `table` has groups and costs.

    Raises:
        NetworkError: The network cannot be run or traced, or nothing in it can be cut.
    """
    example = network.example(2)
    module = copy.deepcopy(network.module).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    positions = _positions(module, example)
    layers = dict(module.named_modules())
    in_forward_order = {name: order for order, name in enumerate(positions)}
    proposals = sorted(
        _propose(module, example), key=lambda proposal: in_forward_order[proposal.name]
    )
    for proposal in proposals:
        proposal.reason = proposal.reason or _objection(proposal, layers)
        if proposal.channels < 2:
            proposal.reason = proposal.reason or "it has a single channel"
    precise, doubled = module.double(), example.double()

    def failure(chosen: Sequence[_Candidate]) -> str | None:
        plan = _Builder(chosen, layers, positions).build(())
        return _disagreement(precise, plan, doubled)

    chosen = [p for p in proposals if p.reason is None]
    if failure(chosen):
        for proposal in chosen:
            proposal.reason = failure([proposal])
        chosen = [p for p in proposals if p.reason is None]
        if why := failure(chosen):
            raise NetworkError(
                f"groups that can be cut alone cannot be cut together ({why}); please report this "
                "network"
            )
    fixed = [
        FixedGroup(name=p.name, channels=p.channels, reason=p.reason) for p in proposals if p.reason
    ]
    if not chosen:
        reasons = defaultdict(list)
        for group in fixed:
            reasons[group.reason].append(group.name)
        listed = "; ".join(f"{', '.join(names[:3])}: {why}" for why, names in reasons.items())
        raise NetworkError(f"nothing in {network.spec.name} can be pruned; {listed}")
    return _Builder(chosen, layers, positions).build(fixed)
