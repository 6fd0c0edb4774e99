"""One gene per prunable group: the share of its channels that is removed."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from evosearch.checks import check_unit_interval
from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.policy import Policy
from evosearch.pruning.table import Group, GroupTable
from evosearch.recipe import Table, explain
from evosearch.space import unique_rows

__all__ = ["LayerSparsity", "LayerSparsityOptions", "ProjectOnto"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Share = Annotated[float, Field(ge=0, le=1)]

# A block whose gene is above this is left out: few are in random genomes. Its levels, out and in,
# are as far from it.
_OUT = 0.75
_BLOCK_LEVELS = (1.0, 0.5)
# Rows times genes that are projected together: larger arrays are not faster.
_PROJECTED_AT_ONCE = 4096


class ProjectOnto(Table):
    """A budget that every policy spends."""

    macs: Share | None = None
    """Share of the dense network's MACs."""
    params: Share | None = None
    """Share of the dense network's parameters."""
    latency: Share | None = None
    """Share of the time that the dense network takes."""

    @model_validator(mode="before")
    @classmethod
    def _table(cls, given: Any) -> Any:
        if not isinstance(given, Mapping | cls):
            # What pydantic makes a sentence of, and says what it got.
            raise ValueError("write what is to be spent, such as { macs = 0.5 }")  # noqa: TRY004
        return given

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.named) != 1:
            raise ValueError("name exactly one of macs, params and latency")
        return self

    @property
    def named(self) -> dict[str, float]:
        """The one budget by name."""
        return {name: share for name, share in self if share is not None}


class LayerSparsityOptions(Table):
    """The `[space]` table of a recipe."""

    sparsity: Annotated[tuple[Share, Share], Field(strict=False)] = (0.0, 0.9)
    """Smallest and largest share of a group's channels that may be removed."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Kept channels are multiples of this (or all channels of the group).

    If it is left out and a latency is searched, launch sets 8 where other widths are slow. Of
    grouped convolutions whole groups go, so that they are multiples of their channels, too.
    """
    grouping: Literal["layer", "stage"] = "layer"
    """A gene per group, or one for all groups of a stage (same resolution)."""
    blocks: bool = False
    """Whether whole residual blocks may be left out: a gene for each, more than 0.75 if it is."""
    project_onto: ProjectOnto | None = None
    """Scale every policy so that it spends this budget: one of macs, params, latency."""

    @field_validator("sparsity", mode="before")
    @classmethod
    def _pair(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple) or len(given) != 2:
            shown = f", got {given}" if isinstance(given, list | tuple) else ""
            raise ValueError(f"must be two shares, smallest and largest{shown}")
        return given

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.sparsity
        if low > high:
            raise ValueError(f"sparsity: the lower bound {low} exceeds the upper bound {high}")
        return self


class LayerSparsity:
    """The space `layer-sparsity`.

    Gene x of a group with C channels means a sparsity s = low + x (high - low) of its channels
    (not of its weights), so C (1 - s) are kept, rounded to the nearest admissible width:
    multiples of `round_to` within the bounds, and C itself if the lower bound is 0; never none.
    Where the group has a granularity, they are multiples of that, too; of that alone where both
    would leave less than two widths.

    With `blocks`, a gene for each block that can be left out comes after those; above 0.75 it is,
    and its groups keep nothing, whatever their genes say.

    With `project_onto`, all widths are scaled by a common factor until the budget is met, and
    what is left is spent step by step where rounding took most: no gene can then grow by one
    rounding step without exceeding the budget. Where the blocks that are left cannot spend it at
    any width, those come back whose genes are lowest; where they cannot help exceeding it, more go,
    those first whose genes are highest.

    Args:
        table: Groups and costs.
        options: See `LayerSparsityOptions`.

    Raises:
        ConfigError: An option is wrong.
        BudgetUnreachable: No policy within the bounds spends the budget.
    """

    options_model: ClassVar[type[BaseModel]] = LayerSparsityOptions

    def __init__(self, table: GroupTable, options: Mapping[str, Any]) -> None:
        try:
            self.options = LayerSparsityOptions.model_validate(dict(options))
        except ValidationError as exc:
            raise ConfigError(explain(exc, LayerSparsityOptions, "space")) from exc
        self._table = table
        self._low, self._high = self.options.sparsity
        self._members = (
            tuple((index,) for index in range(len(table.groups)))
            if self.options.grouping == "layer"
            else table.stages
        )
        self._gene_of = np.empty(len(table.groups), dtype=np.int64)
        for gene, members in enumerate(self._members):
            self._gene_of[list(members)] = gene
        self._groups = np.arange(len(table.groups))
        self._levels = [self._admissible(group) for group in table.groups]
        if self.options.blocks and not table.blocks:
            raise ConfigError(
                "space.blocks: no block of this network can be left out: none returns its input "
                "when all of its parameters are zero; leave it out"
            )
        self._blocks = table.in_block if self.options.blocks else table.in_block[:0]
        self._check_budget()

    def _admissible(self, group: Group) -> IntArray:
        """Ascending widths that a group may have."""
        channels, round_to = group.channels, self.options.round_to
        both = math.lcm(round_to, group.granularity)
        step = both if 2 * both <= channels or both == round_to else group.granularity
        fewest, most = channels * (1 - self._high), channels * (1 - self._low)
        multiples = np.arange(step, channels + 1, step)
        inside = multiples[(multiples >= fewest - 1e-9) & (multiples <= most + 1e-9)]
        if self._low == 0:
            inside = np.union1d(inside, [channels])
        if not len(inside):
            # None lies within the bounds: the nearest width that there is.
            possible = np.union1d(multiples, [channels])
            inside = possible[[np.argmin(np.abs(possible - (fewest + most) / 2))]]
        return inside.astype(np.int64)

    @property
    def n_genes(self) -> int:
        """Number of groups, or of stages; and of blocks that may be left out."""
        return len(self._members) + len(self._blocks)

    @property
    def gene_names(self) -> tuple[str, ...]:
        """Names of the groups; for stages, of the first and last group; `block:NAME`."""
        groups = self._table.groups
        widths = (
            groups[m[0]].name if len(m) == 1 else f"{groups[m[0]].name}..{groups[m[-1]].name}"
            for m in self._members
        )
        blocks = self._table.blocks[: len(self._blocks)]
        return (*widths, *(f"block:{block.name}" for block in blocks))

    def decode(self, genomes: FloatArray) -> list[Policy]:
        """Policies of `(n, n_genes)` genomes in [0, 1].

        Raises:
            SpaceError: The genomes have another shape or leave [0, 1].
        """
        genomes = check_unit_interval(genomes, self.n_genes)
        sparsity = self._low + genomes[:, self._gene_of] * (self._high - self._low)
        wanted = self._table.channels * (1 - sparsity)
        wishes = genomes[:, len(self._members) :]
        keep = (
            self._project(wanted, wishes)
            if self.options.project_onto
            else self._round(wanted, wishes > _OUT)
        )
        return [Policy(tuple(row)) for row in keep.tolist()]

    def encode(self, policy: Policy) -> FloatArray:
        """A genome that decodes to the policy, or near it if genes are shared or budgets spent."""
        self._table.check(policy)
        keep = np.array(policy.keep)
        sparsity = 1 - keep / self._table.channels
        span = self._high - self._low
        genes = (
            np.clip((sparsity - self._low) / span, 0, 1) if span > 0 else np.zeros(len(sparsity))
        )
        out = self._table.left_out(keep[None])[0][: len(self._blocks)]
        return np.array(
            [
                *(
                    _mean(genes[list(members)], keep[list(members)] > 0)
                    for members in self._members
                ),
                *np.where(out, *_BLOCK_LEVELS),
            ]
        )

    def ladder(self, n: int) -> FloatArray:
        """Genomes of uniform ratios in van der Corput order: ends first, then ever finer halves.

        All blocks stay.
        """
        # Rounding leaves few distinct uniform policies; twice as many tries as channels find all.
        tries = 2 * int(self._table.channels.max()) + 2
        values = [0.0, 1.0, *(_van_der_corput(k) for k in range(1, tries))]
        found, start, count = np.empty((0, self.n_genes)), 0, max(2 * n, 8)
        while start < tries and len(found) < n:
            more = np.zeros((len(values[start : start + count]), self.n_genes))
            more[:, : len(self._members)] = np.array(values[start : start + count])[:, None]
            found = np.concatenate([found, more])
            found = found[unique_rows(self.decode(found))]
            # On a budget all may be one policy, which takes all tries to know.
            start, count = start + count, 2 * count
        return found[:n]

    def levels(self) -> tuple[FloatArray, ...]:
        """One gene value per admissible width, from the narrowest to the widest.

        If several groups share a gene, it has a level wherever any of them changes.
        """
        span = self._high - self._low
        found = []
        for members in self._members:
            changes = [np.zeros(1), np.ones(1)]
            for group in members if span > 0 else ():
                middles = (self._levels[group][1:] + self._levels[group][:-1]) / 2
                changes.append((1 - middles / self._table.channels[group] - self._low) / span)
            # Equal shares of different groups may differ by a rounding error.
            edges = np.unique(np.clip(np.concatenate(changes), 0, 1).round(9))
            found.append(((edges[1:] + edges[:-1]) / 2)[::-1])
        return (*found, *(np.array(_BLOCK_LEVELS) for _ in self._blocks))

    def cheapest(self) -> Policy:
        """The fewest channels that the bounds allow, and the fewest blocks."""
        return self._policy(0)

    def dearest(self) -> Policy:
        """The most channels that the bounds allow."""
        return self._policy(-1)

    def _policy(self, end: int) -> Policy:
        return Policy(tuple(self._ends[end].tolist()))

    @cached_property
    def _ends(self) -> IntArray:
        """`(2, n_groups)` fewest and most channels of each group, none in blocks that may go."""
        ends = np.array([[levels[0], levels[-1]] for levels in self._levels], dtype=np.int64).T
        ends[0, self._blocks.any(axis=0)] = 0
        return ends

    @cached_property
    def _nearest(self) -> IntArray:
        """`(n_groups, n)` nearest admissible width of each half channel; ties keep more."""
        halves = np.arange(2 * int(self._table.channels.max()) + 1) / 2
        # Levels are whole, so that what lies between two of them changes at whole halves.
        return np.stack(
            [
                levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, halves, side="right")]
                for levels in self._levels
            ]
        )

    @cached_property
    def _wider(self) -> IntArray:
        """`(n_groups, n)` next admissible width of each width; the widest stays."""
        widths = np.arange(int(self._table.channels.max()) + 1)
        return np.stack(
            [
                levels[np.searchsorted(levels, widths, side="right").clip(max=len(levels) - 1)]
                for levels in self._levels
            ]
        )

    def _round(self, wanted: FloatArray, out: BoolArray) -> IntArray:
        """Nearest admissible widths of `(n, n_groups)` wished-for ones; ties keep more.

        None in the `(n, n_blocks)` that are left out.
        """
        keep = np.asarray(self._nearest[self._groups, (2 * wanted).astype(np.int64)])
        return np.where(out @ self._blocks, 0, keep) if len(self._blocks) else keep

    @cached_property
    def _budget(self) -> tuple[str, float]:
        """Which cost is projected, and its limit as a share of the dense network's."""
        assert self.options.project_onto is not None  # noqa: S101  callers checked
        ((name, share),) = self.options.project_onto.named.items()
        # A share that names a policy's cost exactly must not lose it to rounding.
        return name, share * (1 + 1e-9)

    def _spent(self, keep: IntArray) -> FloatArray:
        """`(n,)` shares of the projected cost."""
        return self._table.share(self._budget[0], keep)

    def _check_budget(self) -> None:
        if self.options.project_onto is None:
            return
        name, limit = self._budget
        if name == "latency" and self._table.latency is None:
            raise ConfigError(
                "space.project_onto.latency: how long passes of this network take is not known"
            )
        lowest, highest = self._spent(self._ends)
        if not lowest <= limit <= highest * (1 + 2e-9):
            less = limit < lowest and "blocks" not in self.options.model_fields_set
            way_out = "; space.blocks = true may go lower" if less else ""
            raise BudgetUnreachable(
                f"space.project_onto.{name} = {limit:.4g} is out of reach: within the "
                f"sparsity bounds it can be {lowest:.4f} to {highest:.4f} of dense{way_out}"
            )

    def _project(self, wanted: FloatArray, wishes: FloatArray) -> IntArray:
        """Scales `(n, n_groups)` wished-for widths so that each row spends the budget.

        Args:
            wanted: The widths.
            wishes: `(n, n_blocks)` genes of the blocks.
        """
        out = self._affordable_blocks(wishes)
        count = -(-len(wanted) * self.n_genes // _PROJECTED_AT_ONCE) or 1
        parts = zip(np.array_split(wanted, count), np.array_split(out, count), strict=True)
        return np.concatenate([self._spend_rest(*self._scaled(*part)) for part in parts])

    def _affordable_blocks(self, wishes: FloatArray) -> BoolArray:
        """`(n, n_blocks)` that are left out, so many that widths can spend the budget."""
        out, limit = wishes > _OUT, self._budget[1]
        if not len(self._blocks):
            return out
        narrowest, widest = np.array([[levels[0], levels[-1]] for levels in self._levels]).T

        def turn(end: IntArray, order: FloatArray, *, back: bool) -> None:
            """One more block in rows whose widths, all at an end, are on the wrong side."""
            rows = np.arange(len(out))
            while len(rows):
                spent = self._spent(np.where(out[rows] @ self._blocks, 0, end))
                wrong = spent < limit / (1 + 2e-9) if back else spent > limit
                rows = rows[wrong & (out[rows] == back).any(axis=1)]
                held = np.where(out[rows] == back, order[rows], np.inf)
                out[rows, held.argmin(axis=1)] = not back

        turn(widest, wishes, back=True)
        turn(narrowest, -wishes, back=False)
        return out

    def _scaled(self, wanted: FloatArray, out: BoolArray) -> tuple[IntArray, FloatArray]:
        """Widths within the budget by one factor per row, and what they miss."""
        limit = self._budget[1]
        # Where a group asks for next to nothing, no factor would ever open it.
        wanted = np.maximum(wanted, 1e-3 * self._table.channels)

        def rounded(factor: FloatArray) -> IntArray:
            return self._round(np.minimum(wanted * factor[:, None], self._table.channels), out)

        # Factors are searched on a logarithmic scale, as wide as the floor above makes sense.
        low, high = np.full(len(wanted), np.log(1e-9)), np.full(len(wanted), np.log(1e3))
        for _ in range(40):
            middle = (low + high) / 2
            fits = self._spent(rounded(np.exp(middle))) <= limit
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        keep = rounded(np.exp(low))
        return keep, np.minimum(wanted * np.exp(high)[:, None], self._table.channels) - keep

    def _spend_rest(self, keep: IntArray, missing: FloatArray) -> IntArray:
        """Widens genes of `(n, n_groups)` widths, a level at a time, while the budget allows.

        Genes that miss most have their turn first, in turns until none can grow.
        """
        most = np.stack([missing[:, list(members)].sum(axis=1) for members in self._members], 1)
        order = np.argsort(-most, axis=1, kind="stable")
        n_widths = len(self._members)
        keep, turn = keep.copy(), np.zeros(len(keep), dtype=np.int64)
        # What does not fit will never: other genes only grow, and costs with them.
        open_genes = np.ones(order.shape, dtype=np.bool_)
        while open_genes.any():
            rows, genes = np.nonzero(open_genes)
            open_genes[rows, genes] = self._grown(keep[rows], genes)[1]
            ahead = (np.arange(n_widths) - turn[:, None]) % n_widths
            ahead[~np.take_along_axis(open_genes, order, axis=1)] = n_widths
            next_turn = ahead.argmin(axis=1)
            rows = np.flatnonzero(open_genes.any(axis=1))
            keep[rows], _ = self._grown(keep[rows], order[rows, next_turn[rows]])
            turn = next_turn + 1
        return keep

    def _grown(self, keep: IntArray, genes: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Widths with one gene of each row a level wider, and whether it grew within the budget."""
        turns = (self._gene_of[None] == genes[:, None]) & (keep > 0)
        wider = np.where(turns, self._wider[self._groups, keep], keep)
        grows = (wider > keep).any(axis=1) & (self._spent(wider) <= self._budget[1])
        return wider, grows


def _mean(genes: FloatArray, there: BoolArray) -> float:
    """Of the genes of groups that are there; the narrowest, if none is."""
    return float(genes[there].mean()) if there.any() else 1.0


def _van_der_corput(k: int) -> float:
    """The k-th point of the base-2 low-discrepancy sequence: 1/2, 1/4, 3/4, 1/8, ..."""
    value, scale = 0.0, 0.5
    while k:
        value += scale * (k & 1)
        k, scale = k >> 1, scale / 2
    return value
