"""The sensitivity sweep that practitioners do by hand, as a baseline.

First each gene alone is raised to a few values, all others at zero: what does it do to the
measured objective? Then a ladder of policies: from the dense network on, always the gene goes up
next whose rise, interpolated from the sweep, is the smallest per cost that it saves. Nothing is
learnt from interactions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import State
from evosearch.algorithms.baselines import Survivors
from evosearch.algorithms.foresight import Foresight
from evosearch.algorithms.options import check_range
from evosearch.space import SearchSpace, unique_rows

__all__ = ["SensitivityOptions", "SensitivitySweep"]

FloatArray = NDArray[np.float64]

_STEPS = 24


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """Options of `sensitivity`.

    Args:
        values: Values at which each gene is measured alone.
    """

    values: int = 3

    def __post_init__(self) -> None:
        check_range("values", self.values, 1, 100)


class SensitivitySweep(Survivors):
    """One gene at a time, then the greedy ladder, then nothing.

    Args:
        at_once: How many genomes per ask.
        space: What genomes mean.
        foresight: Knows the costs.
        n_objectives, n_constraints: What it will be told.
        options: See `SensitivityOptions`.
    """

    def __init__(
        self,
        at_once: int,
        space: SearchSpace,
        foresight: Foresight,
        n_objectives: int,
        n_constraints: int,
        options: SensitivityOptions,
    ) -> None:
        super().__init__(at_once, n_objectives, n_constraints)
        self._space = space
        self._foresight = foresight
        n_values = int(options.values)
        self._values = np.linspace(0, 1, n_values + 1)
        alone = np.eye(space.n_genes)[:, None] * self._values[1:, None]
        sweep = np.concatenate([np.zeros((1, space.n_genes)), alone.reshape(-1, space.n_genes)])
        self._left = sweep
        self._rises: list[float] | None = []
        self._sweep_size = len(sweep)

    def ask(self) -> FloatArray | None:
        """The next genomes; None after the last rung, or while the sweep is not told yet."""
        self._guard.before_ask()
        if not len(self._left):
            return None
        part, self._left = self._left[: self._size], self._left[self._size :]
        return self._guard.ask(part)

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask."""
        genomes = self._take(objectives, violations)
        if self._rises is None:
            return
        known = self._foresight(self._space.decode(genomes)).objectives
        measured = np.flatnonzero(np.isnan(known).any(axis=0))
        self._rises += [float(v) for v in objectives[:, measured[0] if len(measured) else 0]]
        if len(self._rises) == self._sweep_size:
            self._left = self._ladder(np.array(self._rises))
            self._rises = None

    def state(self) -> State:
        """What later asks depend on."""
        rises = {} if self._rises is None else {"rises": np.array(self._rises)}
        return {**super().state(), "left": self._left.copy(), **rises}

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._left = state["left"].copy()
        self._rises = state["rises"].tolist() if "rises" in state else None
        return super().restore(state)

    def _ladder(self, told: FloatArray) -> FloatArray:
        """`(n_rungs, n_genes)` of the greedy descent, the ends first, then ever finer halves."""
        n_genes = self._space.n_genes
        alone = told[1:].reshape(n_genes, -1) - told[0]
        # Removing more cannot help: what a sample says otherwise is its noise.
        rises = np.maximum.accumulate(np.maximum(np.c_[np.zeros(n_genes), alone], 0.0), axis=1)
        grid = np.linspace(0, 1, _STEPS + 1)
        curves = np.array([np.interp(grid, self._values, rise) for rise in rises])
        place = np.zeros(n_genes, dtype=np.int64)
        path = [grid[place]]
        while (place < _STEPS).any():
            place = place + self._cheapest_step(place, curves, grid)
            path.append(grid[place])
        rungs = np.array(path)[_halves(len(path))]
        return rungs[unique_rows(self._space.decode(rungs))]

    def _cheapest_step(
        self, place: NDArray[np.int64], curves: FloatArray, grid: FloatArray
    ) -> NDArray[np.int64]:
        """`(n_genes,)` one-hot: the gene whose next step costs least per cost saved."""
        free = np.flatnonzero(place < _STEPS)
        steps = np.eye(len(place), dtype=np.int64)[free]
        tried = np.concatenate([place[None], place + steps])
        cost = self._foresight(self._space.decode(grid[tried])).cost
        saved = (cost[0] - cost[1:]) / cost[0]
        rise = curves[free, place[free] + 1] - curves[free, place[free]]
        # A step that changes no width is free; one that rises for nothing comes last.
        price = np.where(
            saved > 0, rise / np.where(saved > 0, saved, 1.0), np.where(rise > 0, np.inf, 0.0)
        )
        return np.asarray(steps[int(np.argmin(price))])


def _halves(n: int) -> list[int]:
    """0 to n - 1 in such an order that every beginning of it is spread about evenly."""
    order, parts = [0, n - 1], [(0, n - 1)]
    while parts:
        low, high = parts.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            parts += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))
