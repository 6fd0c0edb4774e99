"""The groups of a network and what any policy costs, in closed form. Knows nothing of torch.

Channels of all groups are numbered through: channel c of group g has the flat number
`offset[g] + c`. An *axis* is the list of flat numbers that one dimension of a weight runs over,
with -1 for a channel that belongs to no group. Layers that share a dimension share the axis.
A cut keeps some flat numbers; everything else follows by indexing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evosearch.checks import check_shape
from evosearch.errors import PolicyError
from evosearch.latency import AxisWidth, BlockShape, LatencyModel, LayerShape
from evosearch.policy import Policy, widths_of

__all__ = ["Axis", "Block", "FixedGroup", "Group", "GroupTable", "LayerCost"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels of several layers that are cut together.

    Args:
        name: The first layer that produces them.
        channels: How many there are in the dense network.
        resolution: Height and width of the first producer's output; groups of one resolution form
            a stage.
        producers: Layers whose outputs they are.
        consumers: Layers that read them.
        granularity: Kept channels are multiples of this: so many next to each other go or stay
            together, being those of a group of a grouped convolution.
    """

    name: str
    channels: int
    resolution: tuple[int, int]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    granularity: int = 1


@dataclass(frozen=True, kw_only=True)
class FixedGroup:
    """Channels that cannot be cut, and why."""

    name: str
    channels: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """What can be left out, as it only adds to its input.

    Args:
        name: Of the module.
        groups: Indices of the groups whose channels are all inside, at least one. A policy leaves
            the block out by keeping none of any of them.
        other_params, other_macs: Of the table's, those that go with it.
    """

    name: str
    groups: tuple[int, ...]
    other_params: int = 0
    other_macs: int = 0


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a weight: for each index the flat channel number, or -1.

    Args:
        sources: `(size,)` int64.
    """

    sources: IntArray

    @property
    def size(self) -> int:
        """Length in the dense network."""
        return len(self.sources)

    @cached_property
    def multiplicity(self) -> int:
        """How many indices each channel of a group takes; 1 unless flattened into a linear."""
        used = self.sources[self.sources >= 0]
        return int(np.unique(used, return_counts=True)[1].max()) if len(used) else 1

    def kept(self, keep: NDArray[np.bool_]) -> IntArray:
        """Indices that survive: `keep` is `(n_channels + 1,)`, its last entry True (for -1)."""
        return np.flatnonzero(keep[self.sources])


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What a layer costs per input and output channel.

    MACs are `macs * in_width * out_width`, parameters
    `weights * in_width * out_width + per_output * out_width`. A layer without an input dimension
    (depthwise or grouped convolution, batch norm) has `in_axis` None and an input width of 1.

    Args:
        name: Name of the layer.
        in_axis, out_axis: Indices into the table's axes; None if the width is not counted.
        macs: Multiply-accumulates per pair of channels: kernel size times output positions.
        weights: Weights per pair of channels: kernel size, times the inputs of a group where there
            are several; 0 where they are an earlier layer's.
        per_output: Further parameters per output channel: bias, batch-norm scale and shift.
        block: Index of the block that it is part of, and costs nothing without; or None.
    """

    name: str
    in_axis: int | None
    out_axis: int
    macs: int
    weights: int
    per_output: int
    block: int | None = None


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """`keep @ square @ keep + linear @ keep + constant`: what layers cost.

    Args:
        square: `(n_groups, n_groups)`.
        linear: `(n_groups,)`.
        constant: Whatever is kept.
    """

    square: FloatArray
    linear: FloatArray
    constant: float

    def __call__(self, counts: FloatArray) -> FloatArray:
        """`(n,)` of `(n, n_groups)` kept channels, as floats."""
        spent = ((counts @ self.square + self.linear) * counts).sum(axis=1)
        return np.asarray(spent + self.constant)

    def among(self, groups: IntArray) -> "_Quadratic":
        """The same for kept channels of these groups, where others keep none."""
        return _Quadratic(self.square[np.ix_(groups, groups)], self.linear[groups], self.constant)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTable:
    """Prunable groups, fixed groups, axes and costs of one network.

    Args:
        groups: What can be cut, in the order in which policies list it.
        fixed: What cannot.
        axes: All distinct dimensions.
        layers: Costs of convolutions, linear layers and norms.
        other_params: Parameters that no policy changes.
        other_macs: Multiply-accumulates outside layers, as those of attention are; taken not to
            change either.
        blocks: What can be left out, if that was looked for.
        latency: What foretells the time of a forward pass; None if that was not measured.
    """

    groups: tuple[Group, ...]
    fixed: tuple[FixedGroup, ...]
    axes: tuple[Axis, ...]
    layers: tuple[LayerCost, ...]
    other_params: int = 0
    other_macs: int = 0
    blocks: tuple[Block, ...] = ()
    latency: LatencyModel | None = None

    @cached_property
    def channels(self) -> IntArray:
        """`(n_groups,)` channels of each group in the dense network."""
        return np.array([group.channels for group in self.groups], dtype=np.int64)

    @cached_property
    def granularities(self) -> IntArray:
        """`(n_groups,)` of what the kept channels of each group are multiples."""
        return np.array([group.granularity for group in self.groups], dtype=np.int64)

    def mask(self, keep: IntArray, places: IntArray | None = None) -> BoolArray:
        """Which channels are kept: `(n_channels + 1,)` by flat number, the last one True.

        Args:
            keep: `(n_groups,)` channels that each group keeps.
            places: `(n_channels,)` place of each in its group's order, 0 for the one that is kept
                longest; their numbers' order if left out.
        """
        if places is None:
            places = np.arange(len(self.group_of)) - self.offsets[self.group_of]
        return np.append(places < keep[self.group_of], True)

    @cached_property
    def in_block(self) -> BoolArray:
        """`(n_blocks, n_groups)`: which groups are inside which block."""
        found = np.zeros((len(self.blocks), len(self.groups)), dtype=np.bool_)
        for row, block in zip(found, self.blocks, strict=True):
            row[list(block.groups)] = True
        return found

    @cached_property
    def fewest(self) -> IntArray:
        """`(n_groups,)` channels that each group can keep at least; none in blocks."""
        return np.where(self.in_block.any(axis=0), 0, self.granularities)

    def left_out(self, keep: IntArray) -> BoolArray:
        """`(n, n_blocks)`: which blocks go where `(n, n_groups)` channels are kept."""
        return np.asarray(keep[:, [block.groups[0] for block in self.blocks]] == 0)

    def blocks_without(self, mask: BoolArray) -> list[str]:
        """Names of the blocks that go where channels are kept as `mask` says."""
        counts = np.bincount(self.group_of[mask[:-1]], minlength=len(self.groups))
        gone = self.left_out(counts[None].astype(np.int64))[0]
        return [block.name for block, out in zip(self.blocks, gone, strict=True) if out]

    def whole(self, keep: IntArray) -> IntArray:
        """Counts `(..., n_groups)` rounded up to what can be kept."""
        return np.asarray(-(-keep // self.granularities) * self.granularities)

    @cached_property
    def offsets(self) -> IntArray:
        """`(n_groups,)` flat number of each group's first channel."""
        return np.asarray(np.cumsum(self.channels) - self.channels, dtype=np.int64)

    @cached_property
    def group_of(self) -> IntArray:
        """`(n_channels,)` group of each flat channel."""
        return np.repeat(np.arange(len(self.groups)), self.channels)

    @cached_property
    def _widths(self) -> tuple[IntArray, IntArray]:
        """Widths of the axes are `keep @ slope + fixed`: `(n_groups, n_axes)` and `(n_axes,)`."""
        slope = np.zeros((len(self.groups), len(self.axes)), dtype=np.int64)
        fixed = np.zeros(len(self.axes), dtype=np.int64)
        for column, axis in enumerate(self.axes):
            used = axis.sources[axis.sources >= 0]
            counts = np.bincount(self.group_of[used], minlength=len(self.groups))
            slope[:, column] = counts // np.maximum(self.channels, 1)
            fixed[column] = axis.size - len(used)
        return slope, fixed

    def _cost_of(
        self, layers: Iterable[LayerCost], macs: int, params: int
    ) -> tuple[_Quadratic, ...]:
        """MACs and parameters of layers and of what else there is.

        A layer costs the product of two widths, each linear in what is kept.
        """
        slope, fixed = self._widths
        n = len(self.groups) + 1
        found = np.zeros((2, n, n), dtype=np.int64)
        one = np.eye(n, dtype=np.int64)[-1]
        width = np.concatenate([slope, fixed[None]]).T
        for layer in layers:
            ins = one if layer.in_axis is None else width[layer.in_axis]
            pair = np.outer(ins, width[layer.out_axis])
            found += np.array([layer.macs, layer.weights])[:, None, None] * pair
            found[1, -1] += layer.per_output * width[layer.out_axis]
        found[:, -1, -1] += [macs, params]
        return tuple(
            _Quadratic(
                q[:-1, :-1].astype(np.float64),
                (q[-1, :-1] + q[:-1, -1]).astype(np.float64),
                float(q[-1, -1]),
            )
            for q in found
        )

    @cached_property
    def _quadratic(self) -> tuple[_Quadratic, ...]:
        """MACs and parameters, all blocks counted."""
        return self._cost_of(self.layers, self.other_macs, self.other_params)

    @cached_property
    def _beside(self) -> tuple[tuple[tuple[int, IntArray, _Quadratic], ...], ...]:
        """MACs and parameters of blocks that do not vanish with their own channels.

        For each a list: the block, the groups outside of it that these hang on, and how. Norms
        behind the last layer have a scale for each channel of the sum, say.
        """
        found: tuple[list[tuple[int, IntArray, _Quadratic]], ...] = ([], [])
        for index, block in enumerate(self.blocks):
            mine = [layer for layer in self.layers if layer.block == index]
            costs = self._cost_of(mine, block.other_macs, block.other_params)
            for blocks, cost in zip(found, costs, strict=True):
                outside = np.flatnonzero(cost.square.any(axis=0) | (cost.linear != 0))
                outside = np.setdiff1d(outside, block.groups)
                rest = cost.among(outside)
                if rest.constant or rest.linear.any() or rest.square.any():
                    blocks.append((index, outside, rest))
        return tuple(map(tuple, found))

    @property
    def dense(self) -> Policy:
        """The policy that keeps everything."""
        return Policy(tuple(int(c) for c in self.channels))

    def check(self, policy: Policy) -> None:
        """Checks that a policy fits this network.

        Raises:
            PolicyError: Another number of groups, more channels than there are, none where that
                leaves no block out, or a count that would split what goes together.
        """
        if len(policy.keep) != len(self.groups):
            raise PolicyError(
                f"a policy for this network has {len(self.groups)} counts, got {len(policy.keep)}"
            )
        for group, count in zip(self.groups, policy.keep, strict=True):
            if count > group.channels:
                raise PolicyError(f"group {group.name} has {group.channels} channels, not {count}")
            if count % group.granularity:
                raise PolicyError(
                    f"group {group.name} keeps multiples of {group.granularity} channels, not "
                    f"{count}"
                )
        if min(policy.keep, default=1) == 0:
            self._check_blocks(np.array(policy.keep) == 0)

    def _check_blocks(self, empty: BoolArray) -> None:
        for block, mine in zip(self.blocks, self.in_block, strict=True):
            if empty[mine].any() and not empty[mine].all():
                raise PolicyError(
                    f"block {block.name} is left out as a whole: keep channels of all of its "
                    "groups or of none"
                )
        lost = np.flatnonzero(empty & ~self.in_block.any(axis=0))
        if len(lost):
            names = ", ".join(self.groups[group].name for group in lost)
            raise PolicyError(f"group {names} would lose every channel; keep at least 1")

    def costs(self, keep: IntArray) -> tuple[IntArray, IntArray]:
        """MACs and parameters of many policies at once.

        A MAC is one multiply-accumulate of a convolution or a matrix product, for one image. Norms,
        activations and additions are not counted. Parameters include biases and norms.

        Args:
            keep: `(n, n_groups)` kept channels.

        Returns:
            `(n,)` MACs and `(n,)` parameters, exact up to 2**53.
        """
        macs, params = (self._cost(keep, which) for which in range(2))
        return macs, params

    def _cost(self, keep: IntArray, which: int) -> IntArray:
        keep = np.asarray(keep, dtype=np.int64)
        check_shape(keep, "keep", ("n", len(self.groups)))
        # Whole numbers, none negative: floats are as exact, and much faster to multiply.
        counts = keep.astype(np.float64)
        spent = self._quadratic[which](counts)
        if self.blocks:
            gone = self.left_out(keep)
            for block, outside, rest in self._beside[which] if gone.any() else ():
                rows = np.flatnonzero(gone[:, block])
                spent[rows] -= rest(counts[rows][:, outside])
        return np.asarray(spent.astype(np.int64))

    def costs_of(self, policies: Sequence[Policy]) -> tuple[IntArray, IntArray]:
        """`costs` of a list of policies."""
        return self.costs(self._keep_of(policies))

    def shares(self, keep: IntArray) -> dict[str, FloatArray]:
        """All costs of many policies as shares of the dense network's, by name.

        Args:
            keep: `(n, n_groups)` kept channels.

        Returns:
            `(n,)` each for `macs`, `params` and, if it was measured, `latency`.
        """
        macs, params = self.costs(keep)
        found = {"macs": macs / self.dense_costs[0], "params": params / self.dense_costs[1]}
        return found if self.latency is None else {**found, "latency": self.latency.shares(keep)}

    def share(self, name: str, keep: IntArray) -> FloatArray:
        """`(n,)` of one of `shares`, in less time than all of them.

        Args:
            name: `macs`, `params` or, if it was measured, `latency`.
            keep: `(n, n_groups)` kept channels.
        """
        if name == "latency" and self.latency is not None:
            return self.latency.shares(keep)
        which = {"macs": 0, "params": 1}[name]
        return np.asarray(self._cost(keep, which) / self.dense_costs[which])

    def shares_of(self, policies: Sequence[Policy]) -> dict[str, FloatArray]:
        """`shares` of a list of policies."""
        return self.shares(self._keep_of(policies))

    def _keep_of(self, policies: Sequence[Policy]) -> IntArray:
        return widths_of(policies, len(self.groups))

    def shapes(
        self,
    ) -> tuple[tuple[AxisWidth, ...], tuple[LayerShape, ...], tuple[BlockShape, ...]]:
        """What the time of a forward pass hangs on.

        Returns:
            Widths of all axes, layers that multiply, and blocks that can be left out.
        """
        slope, fixed = self._widths
        axes = tuple(
            AxisWidth(
                fixed=int(fixed[column]),
                per_kept=tuple(
                    (int(g), int(slope[g, column])) for g in np.flatnonzero(slope[:, column])
                ),
            )
            for column in range(len(self.axes))
        )
        layers = tuple(
            LayerShape(
                in_axis=layer.in_axis,
                out_axis=layer.out_axis,
                macs=layer.macs,
                positions=layer.macs // max(layer.weights, 1),
                needs=None if layer.block is None else self.blocks[layer.block].groups[0],
            )
            for layer in self.layers
            if layer.macs
        )
        # What a block returns is as large as what its last layer does.
        last = {layer.needs: layer for layer in layers if layer.needs is not None}
        blocks = tuple(
            BlockShape(needs=group, out_axis=layer.out_axis, positions=layer.positions)
            for group, layer in last.items()
        )
        return axes, layers, blocks

    @cached_property
    def dense_costs(self) -> tuple[int, int]:
        """MACs and parameters of the dense network."""
        macs, params = self.costs_of([self.dense])
        return int(macs[0]), int(params[0])

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Indices of groups by resolution of their output, in order of first appearance."""
        found: dict[tuple[int, int], list[int]] = {}
        for index, group in enumerate(self.groups):
            found.setdefault(group.resolution, []).append(index)
        return tuple(tuple(members) for members in found.values())

    def units(self, sharing: str) -> tuple[tuple[int, ...], ...]:
        """Indices of groups that share something: each `layer` alone, a `stage`, the `network`."""
        if sharing == "stage":
            return self.stages
        every = tuple(range(len(self.groups)))
        return (every,) if sharing == "network" else tuple((group,) for group in every)
