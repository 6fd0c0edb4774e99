"""What each gene does alone, and the ladder of policies that follows from it.

Each gene is raised to a few values, all others at zero, and what is measured rises. Layers have
much the same shape of rise: its logarithm over the log odds of the channels that go is nearly a
line, of slope 0.8 to 1 unless hardly any stay (ResNet-20 and -56, by distortion): few values do.

The ladder is all minima of the sum over genes of rise^1.5 + price * cost, for rising prices. With
the power 1 the cheapest genes are driven to their ends, where rises do not add up any more; large
powers make all rises equal, which is the one threshold for all layers of NVIDIA's FastNAS. Of 1,
1.5, 2 and 3 the power 1.5 was best or nearly so on both networks, at 70, 50 and 30% of their MACs.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.foresight import Foresight
from evosearch.space import SearchSpace, unique_rows

__all__ = ["Sweep"]

FloatArray = NDArray[np.float64]

_STEPS = 24
# Of log rise over log odds, beyond the values that were measured.
_SLOPE = 0.9
_POWER = 1.5
# The least rise, as a share of the largest: a sample that shows nothing is no proof of nothing.
_LEAST = 1e-3
# Decimals of losses and prices that count.
_DIGITS = 12
# All genes together save more than rounding to widths does.
_SAVING = 0.95


class Sweep:
    """Genomes to measure, and what to make of the answers.

    Args:
        space: What genomes mean.
        foresight: Knows the costs.
        values: At how many values each gene is measured alone.
    """

    def __init__(self, space: SearchSpace, foresight: Foresight, values: int) -> None:
        self._space = space
        self._foresight = foresight
        self._n_genes = space.n_genes
        inner = np.arange(1, values + 1) / (values + 1)
        self._grid = np.unique([*np.linspace(0, 1, _STEPS + 1), *inner])
        alone = self._alone(np.tile(self._grid, (self._n_genes, 1)))
        policies = space.decode(alone.reshape(-1, self._n_genes))
        cost = foresight(policies).cost.reshape(self._n_genes, -1)
        # `(n_genes, n_grid)` what a gene saves alone, and the odds of channels to go.
        self._saved = (cost[:, :1] - cost) / cost[:, :1]
        self._odds = self._odds_of(alone)
        # `(n_genes, n_values)` at which each is measured.
        self._values = np.tile(inner, (self._n_genes, 1))
        # What all inner values leave as it is, as a block that goes or stays, is seen at its end.
        seen = self._odds[:, np.searchsorted(self._grid, inner)].any(axis=1)
        self._values[~seen, -1] = 1.0

    @property
    def genomes(self) -> FloatArray:
        """`(1 + n_genes * n_values, n_genes)`: nothing raised, then one gene at a time."""
        alone = self._alone(self._values).reshape(-1, self._n_genes)
        return np.concatenate([np.zeros((1, self._n_genes)), alone])

    @property
    def saves(self) -> bool:
        """Whether genes save anything; hardly where every policy spends the same budget."""
        ends = np.array([np.zeros(self._n_genes), np.ones(self._n_genes)])
        dense, least = self._foresight(self._space.decode(ends)).cost
        return bool(least < _SAVING * dense)

    def path(self, told: FloatArray) -> FloatArray:
        """The ladder, from the dense network down.

        Args:
            told: `(1 + n_genes * n_values,)` what was measured of `genomes`.

        Returns:
            `(n_rungs, n_genes)`, each another policy than the one before.
        """
        losses = self._losses(told)
        edges = []
        for gene, (saved, loss) in enumerate(zip(self._saved, losses, strict=True)):
            corners = _hull(saved, loss)
            for start, end in itertools.pairwise(corners):
                price = (loss[end] - loss[start]) / (saved[end] - saved[start])
                # Between two minima of a gene it goes in small steps, for the ladder to be fine.
                edges += [
                    (round(float(price), _DIGITS), gene, step) for step in range(start + 1, end + 1)
                ]
        place = np.zeros(self._n_genes, dtype=np.int64)
        path = [self._grid[place]]
        for _, gene, step in sorted(edges):
            place[gene] = step
            path.append(self._grid[place])
        rungs = np.array(path)
        return rungs[unique_rows(self._space.decode(rungs))]

    def _losses(self, told: FloatArray) -> FloatArray:
        """`(n_genes, n_grid)` of each gene alone."""
        alone = told[1:].reshape(self._n_genes, -1) - told[0]
        # The last bits of powers differ between processors, and what is asked for must not.
        return np.round(self._curves(alone) ** _POWER, _DIGITS)

    def _alone(self, values: FloatArray) -> FloatArray:
        """`(n_genes, n_values, n_genes)`: each gene at each of its values, the others at zero."""
        return np.asarray(np.eye(self._n_genes)[:, None] * values[:, :, None])

    def _odds_of(self, alone: FloatArray) -> FloatArray:
        """`(n_genes, n_grid)` channels that go over those that stay, in groups that are cut."""
        policies = self._space.decode(alone.reshape(-1, self._n_genes))
        keep = np.array([policy.keep for policy in policies], dtype=np.float64)
        keep = keep.reshape(*alone.shape[:2], -1)
        cut = keep[:, -1:] < keep[:, :1]
        gone, stay = ((part * cut).sum(axis=2) for part in (keep[:, :1] - keep, keep))
        return np.asarray(np.maximum(gone, 0.0) / np.where(stay > 0, stay, 1.0))

    def _curves(self, alone: FloatArray) -> FloatArray:
        """`(n_genes, n_grid)` rises, from those that were measured."""
        # Removing more cannot help: what a sample says otherwise is its noise.
        rises = np.maximum.accumulate(np.maximum(alone, 0.0), axis=1)
        least = _LEAST * max(float(rises.max()), 1e-12)
        curves = np.zeros_like(self._odds)
        for curve, odds, rise, values in zip(curves, self._odds, rises, self._values, strict=True):
            at = odds[np.searchsorted(self._grid, values)]
            seen, some = at > 0, odds > 0
            if not seen.any():
                continue
            x, y = np.log(at[seen]), np.log(np.maximum(rise[seen], least))
            wanted = np.log(odds[some])
            beyond = np.minimum(wanted - x[0], 0.0) + np.maximum(wanted - x[-1], 0.0)
            curve[some] = np.exp(np.interp(wanted, x, y) + _SLOPE * beyond)
        return np.maximum.accumulate(curves, axis=1)


def _hull(saved: FloatArray, loss: FloatArray) -> list[int]:
    """Corners of the lower convex hull of losses over savings, from nothing saved to most."""
    corners = [0]
    for point in range(1, len(saved)):
        if saved[point] <= saved[corners[-1]]:
            continue
        while len(corners) > 1:
            before, last = corners[-2], corners[-1]
            rise = (loss[last] - loss[before]) * (saved[point] - saved[before])
            if rise < (loss[point] - loss[before]) * (saved[last] - saved[before]):
                break
            corners.pop()
        corners.append(point)
    return corners
