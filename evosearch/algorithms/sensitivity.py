"""The sensitivity sweep that practitioners do by hand, as a baseline.

First each gene alone is raised to a few values, then a ladder of policies follows from what that
does to the first objective that only measuring tells. Nothing is learnt from interactions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import State
from evosearch.algorithms.baselines import Survivors
from evosearch.algorithms.foresight import Foresight
from evosearch.algorithms.options import check_range
from evosearch.algorithms.seeding import halves
from evosearch.algorithms.sweep import Sweep
from evosearch.space import SearchSpace

__all__ = ["SensitivityOptions", "SensitivitySweep"]

FloatArray = NDArray[np.float64]


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
    """One gene at a time, then the ladder, then nothing.

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
        self._sweep = Sweep(space, foresight, int(options.values))
        self._left = self._sweep.genomes
        self._sweep_size = len(self._left)
        self._rises: list[float] | None = []

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
            path = self._sweep.path(np.array(self._rises))
            self._left = path[halves(len(path))]
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
