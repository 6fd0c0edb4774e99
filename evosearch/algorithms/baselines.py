"""Baselines that every search has to beat: random genomes, and uniform ratios."""

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import (
    AskTellGuard,
    Population,
    State,
    generator_in,
    generator_state,
)

__all__ = ["FixedSequence", "RandomSearch", "Survivors"]

FloatArray = NDArray[np.float64]


class Survivors:
    """Keeps the best of what it was told, by rank and crowding."""

    def __init__(self, size: int, n_objectives: int, n_constraints: int) -> None:
        self._guard = AskTellGuard(n_objectives, n_constraints)
        self._size = size
        self._kept: Population | None = None

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask."""
        self._take(objectives, violations)

    def _take(self, objectives: FloatArray, violations: FloatArray) -> FloatArray:
        """Keeps what is good enough, and returns the genomes that the results belong to."""
        genomes = self._guard.tell(objectives, violations)
        told = Population(genomes.copy(), objectives.copy(), violations.copy())
        self._kept = (self._kept.joined(told) if self._kept else told).best(self._size)
        return genomes

    @property
    def population(self) -> Population:
        """The best genomes so far, as many as are asked at a time."""
        if self._kept is None:
            raise RuntimeError("there is no population before the first tell()")
        return self._kept

    def state(self) -> State:
        """What later asks depend on."""
        return {**self._guard.state(), **self.population.state("kept")}

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._kept = Population.of_state(state, "kept")
        return self._guard.restore(state)


class RandomSearch(Survivors):
    """Uniformly random genomes, after the first population.

    Args:
        initial: `(n, n_genes)` asked first; also says how many are asked at a time.
        seed: Of the choice.
        n_objectives: Numbers it will be told per genome.
        n_constraints: Likewise.
    """

    def __init__(
        self, initial: FloatArray, seed: int, n_objectives: int, n_constraints: int
    ) -> None:
        super().__init__(len(initial), n_objectives, n_constraints)
        self._next = initial.copy()
        self._rng = np.random.default_rng(seed)

    def ask(self) -> FloatArray:
        """The next genomes."""
        self._guard.before_ask()
        genomes, self._next = self._next, self._rng.random(self._next.shape)
        return self._guard.ask(genomes)

    def state(self) -> State:
        """What later asks depend on."""
        return {**super().state(), "next": self._next.copy(), "rng": generator_state(self._rng)}

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._next, self._rng = state["next"].copy(), generator_in(state["rng"])
        return super().restore(state)


class FixedSequence(Survivors):
    """Given genomes in their order, a few at a time, then nothing: the ladder of uniform ratios.

    Args:
        genomes: `(n, n_genes)`.
        at_once: How many per ask.
        n_objectives: Numbers it will be told per genome.
        n_constraints: Likewise.
    """

    def __init__(
        self, genomes: FloatArray, at_once: int, n_objectives: int, n_constraints: int
    ) -> None:
        super().__init__(at_once, n_objectives, n_constraints)
        self._parts = [genomes[i : i + at_once] for i in range(0, len(genomes), at_once)]

    def ask(self) -> FloatArray | None:
        """The next genomes, None after the last."""
        self._guard.before_ask()
        return self._guard.ask(self._parts.pop(0)) if self._parts else None

    def state(self) -> State:
        """What later asks depend on."""
        return {**super().state(), "parts_left": np.array(len(self._parts))}

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._parts = self._parts[len(self._parts) - int(state["parts_left"]) :]
        return super().restore(state)
