"""How long a cut network takes, foreseen from its widths.

MACs say little about time: a ResNet-20 with a fifth of its MACs still takes half of the time, as
what a layer costs besides its products does not shrink, and kernels work on widths in eights or
sixteens. So some networks of all widths are timed once, and a sum of terms is fitted to their
times, none of them negative: for layers of a kind (positions, kernel, grouped or not) their MACs,
their MACs with widths rounded up to eights and to sixteens, and the maps they write and read; for
blocks that can be left out, that they are there, and the maps they return. Hence no width ever
costs less than a smaller one, and a policy's latency is known before anything is built, as its MACs
are.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evosearch.checks import check_shape

__all__ = [
    "BLOCK",
    "AxisWidth",
    "BlockShape",
    "LatencyModel",
    "LayerShape",
    "fit_latency",
    "minds_odd_widths",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Index = Annotated[int, Field(ge=0)]
_Block = Literal[1, 8, 16]

BLOCK = 8
"""Channels that vector units take at once, or half of that."""
_BLOCKS: tuple[_Block, ...] = (1, 8, 16)
# Times as long as a network that has one more channel in each group; where it is less, freedom of
# widths is worth more than the kernels' liking (docs/latency.md).
_SLOW = 1.5
_FOLDS = 5
# What hangs on a share must not hang on the last bits of sums, which differ between machines.
_DIGITS = 9


def minds_odd_widths(odd: float | None) -> bool:
    """Whether widths had better be multiples of `BLOCK`.

    Args:
        odd: See `LatencyModel`.
    """
    return odd is not None and odd > _SLOW


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AxisWidth(_Part):
    """The width of a dimension: channels that no policy cuts, and so many for each kept one."""

    fixed: Index
    per_kept: tuple[tuple[Index, Index], ...]
    """Group, and how many indices each of its channels takes."""


class LayerShape(_Part):
    """What the time of a layer may hang on.

    Args:
        in_axis, out_axis: Indices of dimensions; no input for grouped convolutions.
        macs: Multiply-accumulates per pair of channels.
        positions: Places of a map at which the kernel is applied.
        needs: A group of the block that it is part of: without channels of it, it does not run.
    """

    in_axis: Index | None
    out_axis: Index
    macs: Index
    positions: Index
    needs: Index | None = None


class BlockShape(_Part):
    """What the time of a block may hang on beside that of its layers.

    Args:
        needs: A group inside: without channels of it, the block is left out.
        out_axis: Index of the dimension that it returns.
        positions: Places of the map that it returns.
    """

    needs: Index
    out_axis: Index
    positions: Index


class Term(_Part):
    """`seconds * width of one * width of another`, in channels; a width of None is 1."""

    seconds: Annotated[float, Field(ge=0)]
    one: Index | None
    other: Index | None
    block: _Block = 1
    """Widths are rounded up to multiples of this."""
    needs: Index | None = None
    """A group: the term is nothing where none of its channels is kept."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Of the widths that it hangs on."""
        return tuple(axis for axis in (self.one, self.other) if axis is not None)

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, given: Any) -> Any:
        """Runs from before there were sixteens say whether widths were rounded up to eights."""
        if isinstance(given, dict) and "rounded" in given:
            kept = {key: value for key, value in given.items() if key != "rounded"}
            return kept | {"block": BLOCK if given["rounded"] else 1}
        return given


class _Widths:
    """Widths of axes as floats, which are exact here, and much faster to multiply than integers.

    Args:
        axes: All dimensions.
        n_groups: Of the network.
    """

    def __init__(self, axes: Sequence[AxisWidth], n_groups: int) -> None:
        self._slope = np.zeros((n_groups, len(axes)))
        for column, axis in enumerate(axes):
            for group, count in axis.per_kept:
                self._slope[group, column] = count
        self._fixed = np.array([axis.fixed for axis in axes], dtype=np.float64)
        self._cut = np.array([bool(axis.per_kept) for axis in axes])

    def of(self, keep: IntArray) -> dict[int, FloatArray]:
        """`(n, n_axes)` of `(n, n_groups)` kept channels, rounded up to each of the blocks.

        Widths that nothing cuts, such as an image's, stay as they are.
        """
        plain = keep.astype(np.float64) @ self._slope + self._fixed
        return {b: np.where(self._cut, np.ceil(plain / b) * b, plain) for b in _BLOCKS}


class LatencyModel(_Part):
    """Seconds of a forward pass by policy; made by `fit_latency`, and kept in a run's ledger."""

    axes: tuple[AxisWidth, ...]
    terms: tuple[Term, ...]
    constant: Annotated[float, Field(ge=0)]
    """Seconds that no width changes."""
    channels: tuple[Index, ...]
    """Of each group in the dense network."""
    dense_seconds: Annotated[float, Field(gt=0)]
    """Measured."""
    error: Annotated[float, Field(ge=0)]
    """Mean relative error on timed policies that a fit has not seen."""
    policies: Annotated[int, Field(ge=1)]
    """How many were timed."""
    odd: Annotated[float, Field(gt=0)] | None = None
    """How many times as long three quarters of all channels, in multiples of `BLOCK`, take with one
    channel less in each group; None where policies keep such multiples anyway."""

    def told(self, least: IntArray) -> str:
        """What was timed, for people.

        Args:
            least: `(n_groups,)` the fewest channels that each group can keep.
        """
        narrow = float(self.shares(least[None])[0])
        few = "as few channels as can be"
        return (
            f"the dense network takes {1e3 * self.dense_seconds:.3g} ms, and {narrow:.0%} of that "
            f"with {few if least.all() else f'{few} and no blocks'}; {self.policies} networks were "
            f"timed, and are foreseen within {self.error:.1%}"
        )

    def shares(self, keep: IntArray) -> FloatArray:
        """`seconds` as shares of the dense network's, at most 1.

        Dense networks have widths that suit the kernels, and may be faster than is foreseen: then
        shares are of what was measured, for a cut not to promise what it cannot hold.
        """
        return np.asarray(np.minimum(np.round(self.seconds(keep) / self._dense, _DIGITS), 1.0))

    @cached_property
    def _dense(self) -> float:
        return min(float(self.seconds(np.array([self.channels]))[0]), self.dense_seconds)

    @cached_property
    def _widths(self) -> _Widths:
        return _Widths(self.axes, len(self.channels))

    @cached_property
    def _columns(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Per term two columns of widths (by block, and a last one of ones), and seconds."""
        n, last = len(self.axes), len(_BLOCKS) * len(self.axes)

        def column(axis: int | None, block: int) -> int:
            return last if axis is None else axis + n * _BLOCKS.index(block)

        pairs = [(column(t.one, t.block), column(t.other, t.block)) for t in self.terms]
        ones, others = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return ones, others, np.array([term.seconds for term in self.terms])

    def seconds(self, keep: IntArray) -> FloatArray:
        """`(n,)` seconds of `(n, n_groups)` kept channels."""
        keep = np.asarray(keep, dtype=np.int64)
        check_shape(keep, "keep", ("n", len(self.channels)))
        every = np.concatenate([*self._widths.of(keep).values(), np.ones((len(keep), 1))], axis=1)
        ones, others, seconds = self._columns
        spent = every[:, ones] * every[:, others]
        if not keep.all():
            spent *= _running(keep, self.terms)
        return np.asarray(self.constant + spent @ seconds)


def _running(keep: IntArray, terms: Sequence[Term]) -> FloatArray:
    """`(n, n_terms)`: 0 for terms of blocks that are left out, 1 for all others."""
    found = np.ones((len(keep), len(terms)))
    for column, term in enumerate(terms):
        if term.needs is not None:
            found[:, column] = keep[:, term.needs] > 0
    return found


class _Columns:
    """What is fitted: one column of numbers per kind of layer, or of block, and kind of term.

    Args:
        axes: All dimensions.
        layers: All that cost something.
        blocks: Those that may be left out.
    """

    def __init__(
        self,
        axes: Sequence[AxisWidth],
        layers: Sequence[LayerShape],
        blocks: Sequence[BlockShape],
    ) -> None:
        self._axes = axes
        kinds: dict[tuple[bool, int, int], list[LayerShape]] = {}
        for layer in layers:
            kinds.setdefault((layer.in_axis is None, layer.positions, layer.macs), []).append(layer)
        self.terms = [list(terms) for same in kinds.values() for terms in _terms(same)]
        sizes: dict[int, list[BlockShape]] = {}
        for block in blocks:
            sizes.setdefault(block.positions, []).append(block)
        self.terms += [list(terms) for same in sizes.values() for terms in _block_terms(same)]

    def values(self, keep: IntArray) -> FloatArray:
        """`(n, 1 + n_columns)`, the first of ones."""
        widths = _Widths(self._axes, keep.shape[1]).of(keep)
        found = np.ones((len(keep), 1 + len(self.terms)))
        for column, terms in enumerate(self.terms, 1):
            running = _running(keep, terms)
            found[:, column] = sum(
                term.seconds
                * np.prod([widths[term.block][:, axis] for axis in term.axes], axis=0)
                * running[:, place]
                for place, term in enumerate(terms)
            )
        return found


def _terms(layers: Sequence[LayerShape]) -> Iterator[Iterable[Term]]:
    """Columns for layers of one kind; their `seconds` are factors until they are fitted."""
    for block in _BLOCKS:
        yield (
            Term(seconds=r.macs, one=r.in_axis, other=r.out_axis, block=block, needs=r.needs)
            for r in layers
        )
    yield (Term(seconds=r.positions, one=None, other=r.out_axis, needs=r.needs) for r in layers)
    if layers[0].in_axis is not None:
        yield (Term(seconds=r.positions, one=r.in_axis, other=None, needs=r.needs) for r in layers)


def _block_terms(blocks: Sequence[BlockShape]) -> Iterator[Iterable[Term]]:
    """Columns for blocks that return maps of one size: sums and activations beside layers."""
    yield (Term(seconds=1, one=None, other=None, needs=b.needs) for b in blocks)
    yield (Term(seconds=b.positions, one=None, other=b.out_axis, needs=b.needs) for b in blocks)


def fit_latency(
    shapes: tuple[Sequence[AxisWidth], Sequence[LayerShape], Sequence[BlockShape]],
    channels: Sequence[int],
    keep: IntArray,
    seconds: FloatArray,
) -> LatencyModel:
    """Fits a model to timed policies, to their relative errors.

    Args:
        shapes: All dimensions of weights, all layers that cost something, and the blocks that can
            be left out.
        channels: Of each group in the dense network.
        keep: `(n, n_groups)` kept channels, the dense network's first.
        seconds: `(n,)` measured.
    """
    axes, layers, blocks = shapes
    # Where all of them are there, they are part of what no width changes.
    columns = _Columns(axes, layers, () if keep.all() else blocks)
    values = columns.values(keep)
    factors = _nonnegative(values, seconds)
    terms = [
        Term(
            seconds=float(factor) * term.seconds,
            one=term.one,
            other=term.other,
            block=term.block,
            needs=term.needs,
        )
        for factor, same in zip(factors[1:], columns.terms, strict=True)
        for term in (same if factor > 0 else ())
    ]
    return LatencyModel(
        axes=tuple(axes),
        terms=tuple(terms),
        constant=float(factors[0]),
        channels=tuple(int(c) for c in channels),
        dense_seconds=float(seconds[0]),
        error=_error_out_of_fold(values, seconds),
        policies=len(keep),
    )


def _nonnegative(values: FloatArray, seconds: FloatArray) -> FloatArray:
    """Factors of the columns, least squares of relative errors."""
    from scipy.optimize import nnls

    scale = values.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(values / scale / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(found / scale)


def _error_out_of_fold(values: FloatArray, seconds: FloatArray) -> float:
    rows = np.arange(len(seconds))
    errors = np.empty(len(seconds))
    for fold in range(_FOLDS):
        out = rows % _FOLDS == fold
        if out.any() and not out.all():
            foreseen = values[out] @ _nonnegative(values[~out], seconds[~out])
            errors[out] = np.abs(foreseen / seconds[out] - 1)
    return float(errors.mean())
