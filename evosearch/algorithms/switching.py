"""Elitist evolution by level switches: (mu + lambda), for one objective or several.

Single-objective search at a budget keeps the budget by paired level switches [Sieberling2024]. For
a front, parents are drawn from the current non-dominated set by crowded tournament, and a share of
the offspring takes plain steps, which move along the front.

References:
    [Sieberling2024] O. Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via
        Evolutionary Search", arXiv:2410.14649.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import State, generator_in, generator_state
from evosearch.algorithms.baselines import Survivors
from evosearch.algorithms.foresight import Foresight
from evosearch.algorithms.levels import LevelMoves, MoveOptions
from evosearch.algorithms.options import check_range
from evosearch.policy import Policy
from evosearch.space import SearchSpace

__all__ = ["LevelSwitching", "SwitchingOptions"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Offspring that were asked before are bred again so often.
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class SwitchingOptions(MoveOptions):
    """Options of `level-switch`.

    Args:
        switch: Share of offspring that keep their parent's budget; the others take steps.
        crossover: Share of offspring whose genes come from two parents before they move.
        flips, reach: See `MoveOptions`.
    """

    switch: float = 0.6
    crossover: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("switch", self.switch, 0, 1)
        check_range("crossover", self.crossover, 0, 1)


class LevelSwitching(Survivors):
    """Level switches and steps from the best so far.

    Args:
        initial: `(n, n_genes)` asked first; also mu and lambda.
        space: What genomes mean; its genes must have levels.
        foresight: Knows the costs.
        n_objectives, n_constraints: What it will be told.
        seed: Of everything random.
        options: See `SwitchingOptions`.
    """

    def __init__(
        self,
        initial: FloatArray,
        space: SearchSpace,
        foresight: Foresight,
        n_objectives: int,
        n_constraints: int,
        seed: int,
        options: SwitchingOptions,
    ) -> None:
        super().__init__(len(initial), n_objectives, n_constraints)
        self._options = options
        self._space = space
        self._moves = LevelMoves(space, lambda policies: foresight(policies).cost, options)
        self._rng = np.random.default_rng(seed)
        self._initial: FloatArray | None = initial.copy()
        # With a genome of each, to write down.
        self._asked: dict[Policy, FloatArray] = {}

    def ask(self) -> FloatArray:
        """The next genomes."""
        self._guard.before_ask()
        if self._initial is not None:
            genomes, self._initial = self._initial, None
        else:
            genomes = self._moves.genomes(self._offspring())
        self._asked.update(zip(self._space.decode(genomes), genomes.copy(), strict=True))
        return self._guard.ask(genomes)

    def state(self) -> State:
        """What later asks depend on."""
        asked = np.array(list(self._asked.values()))
        return {**super().state(), "rng": generator_state(self._rng), "asked": asked}

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._initial = None
        self._rng = generator_in(state["rng"])
        self._asked = dict(zip(self._space.decode(state["asked"]), state["asked"], strict=True))
        return super().restore(state)

    def _offspring(self) -> IntArray:
        """`(n, n_genes)` level indices, new as policies as far as a few tries find any."""
        parents = self._moves.indices(self.population.genomes)
        children = self._bred(parents, self._size)
        for _ in range(_TRIES):
            seen = set(self._asked)
            stale = []
            for row, policy in enumerate(self._space.decode(self._moves.genomes(children))):
                if policy in seen:
                    stale.append(row)
                seen.add(policy)
            if not stale:
                break
            children[stale] = self._bred(parents, len(stale))
        return children

    def _bred(self, parents: IntArray, n: int) -> IntArray:
        rng, options = self._rng, self._options
        one, other = parents[self._tournament(n)], parents[self._tournament(n)]
        crosses = rng.random((n, 1)) < options.crossover
        bodies = np.where(crosses, self._moves.cross(one, other, rng), one)
        switches = rng.random((n, 1)) < options.switch
        switched, stepped = self._moves.switch(bodies, rng), self._moves.step(bodies, rng)
        return np.where(switches, switched, stepped)

    def _tournament(self, n: int) -> IntArray:
        """`(n,)` members: of two drawn, the one of lower rank, or the less crowded."""
        rank, crowding = self.population.ranks_and_crowding()
        place = np.empty(len(rank), dtype=np.int64)
        place[np.lexsort((-crowding, rank))] = np.arange(len(rank))
        drawn = self._rng.integers(len(rank), size=(2, n))
        return np.asarray(np.where(place[drawn[0]] < place[drawn[1]], *drawn), dtype=np.int64)
