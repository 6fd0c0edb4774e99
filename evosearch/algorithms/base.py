"""The role of an algorithm: it asks for genomes and is told what they were worth."""

import json
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evosearch.checks import check_finite, check_shape
from evosearch.pareto import crowding_distance, ranks

__all__ = [
    "Algorithm",
    "AskTellGuard",
    "Population",
    "Resumable",
    "State",
    "generator_in",
    "generator_state",
    "numbered",
]

FloatArray = NDArray[np.float64]
State = dict[str, NDArray[Any]]
"""What an algorithm remembers, as named arrays of numbers and strings."""


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

    def state(self, name: str) -> State:
        """Its arrays, their names beginning with this one."""
        parts = {part: getattr(self, part) for part in self.__dataclass_fields__}
        return {f"{name}.{part}": array.copy() for part, array in parts.items()}

    @classmethod
    def of_state(cls, state: State, name: str) -> Self:
        """The population that was written under a name."""
        return cls(*(state[f"{name}.{part}"].copy() for part in cls.__dataclass_fields__))


class Algorithm(Protocol):
    """Asks and is told, in turns.

    An implementation must guarantee:

    **Determinism.** Made alike and told the same, it asks the same, bit for bit. Resuming a
    search is replaying it, so this is what a resumed search rests on; see `Resumable` for sparing
    the replay.
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


@runtime_checkable
class Resumable(Protocol):
    """What an `Algorithm` may be besides: one that writes down what it remembers.

    It guarantees:

    **Sameness.** Made alike and put into the state of another one, it asks what that one asks, bit
    for bit, now and later.
    """

    def state(self) -> State:
        """What later asks depend on, open asks included; after at least one tell."""

    def restore(self, state: State) -> list[FloatArray]:
        """Puts an algorithm that was just made into a state.

        Returns:
            The genomes of the asks that were open, the oldest first.
        """


def generator_state(rng: np.random.Generator) -> NDArray[Any]:
    """The state of a generator as an array of one string."""
    return np.array(json.dumps(rng.bit_generator.state))


def generator_in(state: NDArray[Any]) -> np.random.Generator:
    """A generator of numpy's default kind in a state that was written."""
    rng = np.random.default_rng(0)
    rng.bit_generator.state = json.loads(str(state))
    return rng


def numbered(state: State, name: str) -> list[NDArray[Any]]:
    """The arrays `name.0`, `name.1` and so on."""
    found: list[NDArray[Any]] = []
    while f"{name}.{len(found)}" in state:
        found.append(state[f"{name}.{len(found)}"].copy())
    return found


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

    def state(self) -> State:
        """Its open asks; something was told."""
        if not self._told:
            raise RuntimeError("there is no state before the first tell()")
        return {f"open.{i}": genomes.copy() for i, genomes in enumerate(self._open)}

    def restore(self, state: State) -> list[FloatArray]:
        """Opens the asks of a state, and returns copies of them."""
        self._told = True
        self._open = deque(numbered(state, "open"))
        return [genomes.copy() for genomes in self._open]
