"""The role of an algorithm: it asks for genomes and is told what they were worth."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evosearch.checks import check_finite, check_shape
from evosearch.pareto import crowding_distance, ranks

__all__ = ["Algorithm", "AskTellGuard", "Population"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Population:
    """What an algorithm carries from one generation to the next.

    Args:
        genomes: `(n, n_genes)` in [0, 1].
        objectives: `(n, n_objectives)`, lower is better.
        violations: `(n, n_constraints)`, <= 0 is feasible.
    """

    genomes: FloatArray
    objectives: FloatArray
    violations: FloatArray

    def ranks_and_crowding(self) -> tuple[NDArray[np.int64], FloatArray]:
        """Non-domination rank, and crowding distance within the rank, of each member."""
        rank = ranks(self.objectives, self.violations)
        crowding = np.empty(len(rank))
        for level in np.unique(rank):
            rows = np.flatnonzero(rank == level)
            crowding[rows] = crowding_distance(self.objectives[rows])
        return rank, crowding

    def joined(self, other: "Population") -> "Population":
        """Both, this one first."""
        return Population(
            np.concatenate([self.genomes, other.genomes]),
            np.concatenate([self.objectives, other.objectives]),
            np.concatenate([self.violations, other.violations]),
        )

    def best(self, n: int) -> "Population":
        """The n members of lowest rank, the least crowded first within a rank."""
        return self.taken(self.best_rows(n))

    def best_rows(self, n: int) -> NDArray[np.int64]:
        """Rows of the n members of lowest rank, the least crowded first within a rank."""
        rank, crowding = self.ranks_and_crowding()
        return np.lexsort((-crowding, rank))[:n]

    def taken(self, rows: NDArray[np.int64]) -> "Population":
        """The members of some rows, in their order."""
        return Population(self.genomes[rows], self.objectives[rows], self.violations[rows])


class Algorithm(Protocol):
    """Asks and is told, in turns.

    An implementation must guarantee:

    **Determinism.** Made alike and told the same, it asks the same, bit for bit. Resuming a
    search is replaying it, so this is what a resumed search rests on.
    **Order.** `tell` takes results in the order in which `ask` gave the genomes.
    **One ahead.** After the first tell it may be asked once more while an ask is open, so that
    scorers have something to do when the last candidates of a generation are still measured. Asks
    are then answered in their order.
    **Finiteness.** It need not cope with NaN or infinity: nobody tells it any.
    """

    def ask(self) -> FloatArray | None:
        """The next `(n, n_genes)` genomes in [0, 1].

        Returns:
            None when there is nothing left to ask; or nothing yet, if an ask is open.

        Raises:
            RuntimeError: Two asks are open, or the very first one is.
        """

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask.

        Raises:
            RuntimeError: Nothing was asked.
        """

    @property
    def population(self) -> Population:
        """The current members, after at least one tell."""


class AskTellGuard:
    """Keeps asks and tells in order, one ask ahead at most, and checks what is told.

    Args:
        n_objectives: Columns of objectives.
        n_constraints: Columns of violations.
    """

    def __init__(self, n_objectives: int, n_constraints: int) -> None:
        self._n_objectives = n_objectives
        self._n_constraints = n_constraints
        self._open: deque[FloatArray] = deque()
        self._told = False

    def ask(self, genomes: FloatArray) -> FloatArray:
        """Notes what is asked for, and returns a copy that the caller may keep."""
        self._open.append(genomes)
        return genomes.copy()

    def before_ask(self) -> None:
        """Refuses an ask while two are open, or the very first one is."""
        if len(self._open) > self._told:
            raise RuntimeError("ask() called without tell(); one ask ahead is possible, later")

    def tell(self, objectives: FloatArray, violations: FloatArray) -> FloatArray:
        """Checks the answer and returns the genomes it belongs to."""
        if not self._open:
            raise RuntimeError("tell() called without ask()")
        asked = self._open[0]
        check_shape(objectives, "objectives", (len(asked), self._n_objectives))
        check_shape(violations, "violations", (len(asked), self._n_constraints))
        check_finite(objectives, "objectives")
        check_finite(violations, "violations")
        self._told = True
        return self._open.popleft()
