"""Moves by levels: single steps, and switches that keep a budget.

A genome is an index into the levels of each gene, `(n_genes,)` int64, 0 for the narrowest. A switch
widens some genes and narrows others so that the cost stays about the same [Sieberling2024]. There,
all layers of a level cost the same and a switch keeps the budget exactly; here layers cost
differently, so the second half of a switch goes as far as the first half's cost asks for.

References:
    [Sieberling2024] O. Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via
        Evolutionary Search", arXiv:2410.14649, algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.options import check_range
from evosearch.errors import ConfigError
from evosearch.policy import Policy
from evosearch.space import LevelledSpace, SearchSpace

__all__ = ["LevelMoves", "MoveOptions"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# A switch's second half is as long as its cost asks for, up to an eighth of the longest.
_HALVINGS = 3


@dataclass(frozen=True, kw_only=True)
class MoveOptions:
    """Options of all that moves by levels.

    Args:
        flips: Most genes that go up, and most that go down, in a move.
        reach: Longest move of a gene, as a share of its levels.
    """

    flips: int = 3
    reach: float = 0.3

    def __post_init__(self) -> None:
        check_range("flips", self.flips, 1, 1000)
        check_range("reach", self.reach, 0, 1)


class LevelMoves:
    """Varies genomes by levels.

    Args:
        space: What genomes mean; its genes must have levels.
        cost: `(n,)` of policies: the budget that switches keep.
        options: How far a move goes.

    Raises:
        ConfigError: The space has no levels.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: Callable[[list[Policy]], FloatArray],
        options: MoveOptions,
    ) -> None:
        if not isinstance(space, LevelledSpace):
            raise ConfigError(
                f"search.algorithm: this one moves by levels, and the space {type(space).__name__} "
                "has none; give it levels() as in evosearch/space.py, or choose another algorithm"
            )
        self._space = space
        self._cost = cost
        self._flips = int(options.flips)
        levels = space.levels()
        self.top: IntArray = np.array([len(values) - 1 for values in levels], dtype=np.int64)
        """`(n_genes,)` highest index of each gene."""
        self._values = np.full((len(levels), int(self.top.max()) + 1), np.nan)
        for gene, values in enumerate(levels):
            self._values[gene, : len(values)] = values
        self._genes = np.arange(len(levels))
        self._reach = np.maximum(1.0, options.reach * self.top)

    def genomes(self, indices: IntArray) -> FloatArray:
        """`(n, n_genes)` genomes of as many level indices."""
        return np.asarray(self._values[self._genes, indices])

    def indices(self, genomes: FloatArray) -> IntArray:
        """Nearest levels of `(n, n_genes)` genomes."""
        distance = np.abs(self._values[None] - genomes[:, :, None])
        return np.asarray(np.nanargmin(distance, axis=2), dtype=np.int64)

    def costs(self, indices: IntArray) -> FloatArray:
        """`(n,)` costs of what the levels mean."""
        return self._cost(self._space.decode(self.genomes(indices)))

    def step(self, parents: IntArray, rng: np.random.Generator) -> IntArray:
        """Moves up to `flips` genes of each parent up, or as many down: a step along the front."""
        chosen, _ = self._choose(len(parents), rng)
        up = rng.choice([-1, 1], size=(len(parents), 1))
        return self._clipped(parents + np.where(chosen, up * self._lengths(len(parents), rng), 0))

    def switch(self, parents: IntArray, rng: np.random.Generator) -> IntArray:
        """Moves some genes of each parent up and others down, at about the same cost."""
        n = len(parents)
        first, second = self._choose(n, rng)
        up = rng.choice([-1, 1], size=(n, 1))
        moved = self._clipped(parents + np.where(first, up * self._lengths(n, rng), 0))
        furthest = np.where(second, np.where(up > 0, 0, self.top), moved)
        return self._at_cost(moved, furthest, self.costs(parents))

    def cross(self, parents: IntArray, others: IntArray, rng: np.random.Generator) -> IntArray:
        """Takes each gene of one parent or of the other, at even odds."""
        return np.where(rng.random(parents.shape) < 0.5, parents, others)

    def _clipped(self, indices: IntArray) -> IntArray:
        return np.clip(indices, 0, self.top)

    def _choose(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], ...]:
        """Two disjoint sets of genes, each of min(U{1, flips}, U{1, flips}): few mostly."""
        n_genes = len(self._genes)
        most = max(1, min(self._flips, n_genes // 2))
        places = rng.permuted(np.tile(self._genes, (n, 1)), axis=1)
        sizes = rng.integers(1, most + 1, size=(n, 2, 2)).min(axis=2)
        first = places < sizes[:, :1]
        second = ~first & (places >= n_genes - sizes[:, 1:])
        return first, second

    def _lengths(self, n: int, rng: np.random.Generator) -> IntArray:
        """`(n, n_genes)` steps from 1 level to the reach, as many short as long ones in ratio."""
        steps = np.exp(rng.random((n, len(self._genes))) * np.log(self._reach + 1))
        return np.asarray(steps.astype(np.int64).clip(1))

    def _at_cost(self, start: IntArray, end: IntArray, target: FloatArray) -> IntArray:
        """The point between start and end whose cost is nearest to the target, by bisection."""
        parts = 2**_HALVINGS
        # All points that may be tried are decoded together: calls cost more than rows.
        share = np.arange(parts)[:, None, None] / parts
        points = start + np.rint(share * (end - start)).astype(np.int64)
        all_costs = self.costs(points.reshape(-1, start.shape[1])).reshape(parts, -1)
        low, high = np.zeros(len(start), dtype=np.int64), np.full(len(start), parts)
        rows = np.arange(len(start))
        too_dear = all_costs[0] > target
        best, excess = low.copy(), np.abs(all_costs[0] - target)
        for _ in range(_HALVINGS):
            middle = (low + high) // 2
            costs = all_costs[middle, rows]
            nearer = np.abs(costs - target) < excess
            best = np.where(nearer, middle, best)
            excess = np.where(nearer, np.abs(costs - target), excess)
            further = (costs > target) == too_dear
            low, high = np.where(further, middle, low), np.where(further, high, middle)
        return np.asarray(points[best, rows])
