"""Baselines that every search has to beat: random genomes, and uniform ratios."""

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import AskTellGuard, Population

__all__ = ["FixedSequence", "RandomSearch"]

FloatArray = NDArray[np.float64]


class _Archive:
    """Remembers everything it was told; that is the population."""

    def __init__(self) -> None:
        self._guard = AskTellGuard()
        self._told: list[tuple[FloatArray, FloatArray, FloatArray]] = []

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the last ask."""
        genomes = self._guard.tell(objectives, violations)
        self._told.append((genomes, objectives, violations))

    @property
    def population(self) -> Population:
        """All genomes so far."""
        genomes, objectives, violations = (
            np.concatenate(part) for part in zip(*self._told, strict=True)
        )
        return Population(genomes, objectives, violations)


class RandomSearch(_Archive):
    """Uniformly random genomes, after the first population.

    Args:
        initial: `(n, n_genes)` asked first; also says how many are asked at a time.
        seed: Of the choice.
    """

    def __init__(self, initial: FloatArray, seed: int) -> None:
        super().__init__()
        self._next = initial
        self._rng = np.random.default_rng(seed)

    def ask(self) -> FloatArray:
        """The next genomes."""
        self._guard.before_ask()
        genomes, self._next = self._next, self._rng.random(self._next.shape)
        return self._guard.ask(genomes)


class FixedSequence(_Archive):
    """Given genomes in their order, a few at a time, then nothing: the ladder of uniform ratios.

    Args:
        genomes: `(n, n_genes)`.
        at_once: How many per ask.
    """

    def __init__(self, genomes: FloatArray, at_once: int) -> None:
        super().__init__()
        self._parts = [genomes[i : i + at_once] for i in range(0, len(genomes), at_once)]

    def ask(self) -> FloatArray | None:
        """The next genomes, None after the last."""
        self._guard.before_ask()
        return self._guard.ask(self._parts.pop(0)) if self._parts else None
