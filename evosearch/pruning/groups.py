"""Finds the groups of a network and proves them.

A proposal becomes a group only if a network in which half of its channels are cut computes what
the dense network computes when the consumers of those channels ignore them. Proposals that fail
are reported as fixed, with the reason.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evosearch.errors import NetworkError, first_line
from evosearch.networks import Network
from evosearch.pruning.blocks import find_blocks, inside
from evosearch.pruning.cutting import CuttingPlan, LayerCut
from evosearch.pruning.layers import Convolution, Proposal, dimensions, is_channelwise
from evosearch.pruning.proposals import Positions, output_positions, propose
from evosearch.pruning.table import Axis, Block, FixedGroup, Group, GroupTable, LayerCost

__all__ = ["trace"]


class _Builder:
    """Turns accepted candidates into axes, costs and a cutting plan."""

    def __init__(
        self,
        candidates: Sequence[Proposal],
        layers: dict[str, nn.Module],
        positions: Positions,
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

    def _group(self, candidate: Proposal) -> Group:
        return Group(
            name=candidate.name,
            channels=candidate.channels,
            resolution=self.positions[candidate.name][1],
            producers=tuple(n for n in candidate.outs if not is_channelwise(self.layers[n])),
            consumers=tuple(candidate.ins),
            granularity=candidate.granularity,
        )

    def _blocks(self, names: Iterable[str]) -> list[Block]:
        """Those of the named ones that have channels of their own."""
        found = []
        for name in names:
            groups = tuple(
                index
                for index, candidate in enumerate(self.candidates)
                if all(inside(layer, name) for layer in (*candidate.outs, *candidate.ins))
            )
            if groups:
                found.append(Block(name=name, groups=groups))
        return found

    def _layer(self, name: str, out_axis: int, in_axis: int) -> LayerCost:
        layer = self.layers[name]
        count = self.positions.get(name, (0, (1, 1)))[0]
        if is_channelwise(layer):
            own = sum(1 for _ in layer.parameters(recurse=False))
            return LayerCost(
                name=name, in_axis=None, out_axis=out_axis, macs=0, weights=0, per_output=own
            )
        assert isinstance(layer, nn.Linear | Convolution)  # noqa: S101  filtered by build
        kernel = int(layer.weight[0, 0].numel())
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        bias = 0 if layer.bias is None else 1
        # A class of its own may have more, such as a gain for each output.
        width = dimensions(layer)[0]
        bias += sum(
            tensor.numel() // width
            for key, tensor in layer.named_parameters(recurse=False)
            if key not in {"weight", "bias"} and tensor.shape[:1] == (width,)
        )
        if groups > 1:
            # Every output channel reads in_channels / groups inputs, whatever a policy keeps.
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

    def build(
        self, fixed: Iterable[FixedGroup] = (), block_names: Iterable[str] = ()
    ) -> CuttingPlan:
        """The table and the plan."""
        outs, ins = self._sides()
        blocks = self._blocks(block_names)
        block_of = {
            layer: index
            for index, block in enumerate(blocks)
            for layer in self.layers
            if inside(layer, block.name)
        }
        costs, cuts = [], []
        counted: set[int] = set()
        for name, layer in self.layers.items():
            if not isinstance(layer, nn.Linear | Convolution) and not is_channelwise(layer):
                continue
            out_size, in_size = dimensions(layer)
            out_axis = self._axis(outs.get(name, np.full(out_size, -1, dtype=np.int64)))
            in_axis = self._axis(ins.get(name, np.full(in_size, -1, dtype=np.int64)))
            cost = replace(self._layer(name, out_axis, in_axis), block=block_of.get(name))
            # Parameters of an earlier layer are counted there; MACs are a layer's own.
            if id(layer.weight) in counted:
                cost = replace(cost, weights=0)
            if id(getattr(layer, "bias", None)) in counted:
                cost = replace(cost, per_output=0)
            costs.append(cost)
            counted.update(id(parameter) for parameter in layer.parameters(recurse=False))
            if name in outs or name in ins:
                cuts.append(
                    LayerCut(
                        name=name,
                        out_axis=out_axis if name in outs else None,
                        in_axis=in_axis if name in ins else None,
                    )
                )
        # Parameters that no layer above has, such as a scale of the block itself.
        others = {
            id(p): (p.numel(), block_of.get(name))
            for name, layer in self.layers.items()
            for p in layer.parameters(recurse=False)
            if id(p) not in counted
        }
        table = GroupTable(
            groups=tuple(self._group(candidate) for candidate in self.candidates),
            fixed=tuple(fixed),
            axes=tuple(self._axes),
            layers=tuple(costs),
            other_params=sum(size for size, _ in others.values()),
            blocks=tuple(
                replace(
                    block, other_params=sum(n for n, owner in others.values() if owner == index)
                )
                for index, block in enumerate(blocks)
            ),
        )
        return CuttingPlan(table=table, cuts=tuple(cuts))


@torch.inference_mode()
def _disagreement(module: nn.Module, plan: CuttingPlan, example: Tensor) -> str | None:
    """Cuts about half of every group; says how the result is wrong, or None if it is right."""
    rng = np.random.default_rng(0)
    table = plan.table
    keep = np.ones(int(table.channels.sum()) + 1, dtype=np.bool_)
    for offset, group in zip(table.offsets, table.groups, strict=True):
        parts = group.channels // group.granularity
        if parts > 1:
            # About half, and an odd number stays: what needs even ones would fail for some policy.
            stay = parts // 2 if parts // 2 % 2 else parts // 2 + 1
            removed = rng.permutation(parts)[: max(1, parts - stay)]
            keep[offset : offset + group.channels].reshape(parts, -1)[removed] = False
    masked, cut = copy.deepcopy(module), copy.deepcopy(module)
    layers = dict(masked.named_modules())
    for entry in plan.cuts:
        if entry.in_axis is not None:
            gone = torch.from_numpy(~keep[table.axes[entry.in_axis].sources])
            layers[entry.name].weight[:, gone] = 0
    try:
        plan.cut(module, cut, keep)
        result = cut(example)
    except Exception as exc:  # noqa: BLE001  a user's forward may raise anything
        return f"after cutting, the forward pass fails: {first_line(exc)}"
    wanted = masked(example)
    scale = float(wanted.abs().max()) or 1.0
    tolerance = 1e-6 if example.dtype == torch.float64 else 1e-3
    if not torch.allclose(result, wanted, rtol=tolerance, atol=tolerance * scale):
        return "cutting it is not the same as ignoring it (channels are mixed on the way)"
    return None


def _in_double(module: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A network of scales that let everything be seen, and input, in float64.

    In float32 if the network insists on its precision.

    Raises:
        NetworkError: It cannot be copied.
    """
    try:
        precise = _scaled(module).double()
    except RuntimeError as exc:
        if "deepcopy" not in str(exc):
            raise
        raise NetworkError(
            "the network cannot be copied once it has run, as it keeps a tensor that its forward "
            "computed: make that a buffer, or compute it each time"
        ) from exc
    try:
        with torch.inference_mode():
            precise(example.double())
    except Exception:  # noqa: BLE001  a user's forward may raise anything
        return _scaled(module), example
    return precise, example.double()


@torch.no_grad()
def _scaled(module: nn.Module) -> nn.Module:
    """A copy whose scales are about one, and no weight zero.

    A branch that starts as nothing, by a norm's or another scale of zero or a millionth, as in
    ConvNeXt, would hide whatever is wrong in it.
    """
    scaled = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for layer in scaled.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            plain = isinstance(layer, nn.Linear | Convolution)
            if not parameter.is_floating_point() or (plain and (name == "bias" or parameter.any())):
                continue
            if plain or parameter.numel() == max(parameter.shape, default=1):
                drawn = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.copy_(drawn / (parameter[0].numel() if plain else 1))
    return scaled


def trace(network: Network, *, blocks: bool = False) -> CuttingPlan:
    """Finds, checks and tabulates the groups of a network.

    Groups are checked together by one forward pass in float64 (float32 where the network converts
    by itself); only if that fails, one by one.

    Args:
        network: The dense network.
        blocks: Whether to look for blocks that can be left out, too, which takes as long again.

    Returns:
        The plan by which any policy is cut; its `table` has groups and costs.

    Raises:
        NetworkError: The network cannot be run or traced, or nothing in it can be cut.
    """
    example = network.example(2)
    module = copy.deepcopy(network.module).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    positions = output_positions(module, example)
    layers = dict(module.named_modules())
    proposals = propose(module, example, positions)
    precise, doubled = _in_double(module, example)

    def failure(chosen: Sequence[Proposal]) -> str | None:
        plan = _Builder(chosen, layers, positions).build()
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
        raise NetworkError(f"nothing in {network.spec.name} can be pruned; {_summary(fixed)}")
    names = find_blocks(module, example) if blocks else []
    plan = _Builder(chosen, layers, positions).build(fixed, names)
    return replace(plan, table=_with_other_macs(plan.table, module, network.example(1)))


def _with_other_macs(table: GroupTable, module: nn.Module, example: Tensor) -> GroupTable:
    """The table with what no layer of it accounts for, in the network and in each block."""
    counted = _counted_macs(module, example)
    whole = max(0, counted.get("", 0) - table.dense_costs[0])
    keep = np.tile(table.channels, (len(table.blocks), 1))
    keep[table.in_block] = 0
    own = table.dense_costs[0] - table.costs(keep)[0]
    blocks = [
        replace(block, other_macs=min(whole, max(0, counted.get(block.name, 0) - int(layers))))
        for block, layers in zip(table.blocks, own, strict=True)
    ]
    return replace(table, other_macs=whole, blocks=tuple(blocks))


def _counted_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """By torch's own counter, which sees products outside layers, too: by module, "" for all.

    Nothing if it cannot.
    """
    try:
        # With gradients, and by products one after another: attention in one is not counted.
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
        ):
            module(example)
    except Exception:  # noqa: BLE001  a user's forward may not bear being watched
        return {}
    # It puts the class of the network in front of the names.
    found = {
        name.partition(".")[2]: int(sum(flops.values())) // 2
        for name, flops in counter.get_flop_counts().items()
        if name != "Global"
    }
    return {**found, "": int(counter.get_total_flops()) // 2}


def _summary(fixed: Sequence[FixedGroup]) -> str:
    reasons = defaultdict(list)
    for group in fixed:
        reasons[group.reason].append(group.name)
    return "; ".join(f"{', '.join(names[:3])}: {why}" for why, names in reasons.items())
