"""A search that measures what a model of the measurements expects most of.

Before each generation, Gaussian processes are fitted to what was told so far. Level moves then
breed far more offspring than can be measured, over several generations in which the models answer
instead of the scorers; those that promise the largest hypervolume beyond the front are asked for.
For a share of them the promise is that of a random function from the posterior [Bradford2018],
which explores where the model is unsure; for the others, that of its mean.

Before that it asks for policies that rankings of channels gave, which are good, and for a first
population, which is spread; on request for a sweep: each gene alone, and the ladder that follows.

What is kept between asks is what was told, the last fit, what is still to be asked of the beginning
and the state of one generator, so a replay asks for the same.

References:
    [Bradford2018] E. Bradford et al., "Efficient multiobjective optimization employing Gaussian
        processes, spectral sampling and a genetic algorithm", J. Global Optimization 71, 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import Population, State, generator_in, generator_state
from evosearch.algorithms.baselines import Survivors
from evosearch.algorithms.forecast import Forecaster, Told
from evosearch.algorithms.foresight import Foresight
from evosearch.algorithms.improvement import Improvement
from evosearch.algorithms.levels import LevelMoves, MoveOptions
from evosearch.algorithms.options import check_range
from evosearch.algorithms.seeding import evenly
from evosearch.algorithms.sweep import Sweep
from evosearch.pareto import total_violation
from evosearch.policy import Policy
from evosearch.space import SearchSpace, unique_rows

__all__ = ["SurrogateOptions", "SurrogateSearch"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Beyond any violation of something that was measured: such a candidate failed.
_FAILED = 1e7
# For each genome that is asked: parents on the model, and candidates that compete in the end.
_PARENTS, _FINALISTS = 4, 12


@dataclass(frozen=True, kw_only=True)
class SurrogateOptions(MoveOptions):
    """Options of `surrogate`.

    Args:
        explore: Share of a generation that is chosen by random functions from the posterior.
        generations: Generations bred on the model before each ask.
        offspring: Offspring per such generation, for each genome that is asked.
        points: Most measurements that the model is fitted to.
        sweep: Values at which each gene is measured alone before the models take over, and the
            ladder that follows; none where that is over budget or tells nothing.
        flips, reach: See `MoveOptions`.
    """

    sweep: int = 0
    explore: float = 0.25
    generations: int = 8
    offspring: int = 8
    points: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sweep", self.sweep, 0, 100)
        check_range("explore", self.explore, 0, 1)
        check_range("generations", self.generations, 1, 1000)
        check_range("offspring", self.offspring, 1, 1000)
        check_range("points", self.points, 10, 2000)


class SurrogateSearch(Survivors):
    """Level moves, pre-screened by Gaussian processes.

    Args:
        first: What is asked before the models are, `(n, n_genes)` each; the size of the last also
            says how many are asked at a time.
        space: What genomes mean; its genes must have levels.
        foresight: What is known of policies without measuring them.
        n_objectives, n_constraints: What it will be told.
        seed: Of everything random.
        options: See `SurrogateOptions`.
    """

    def __init__(
        self,
        first: Sequence[FloatArray],
        space: SearchSpace,
        foresight: Foresight,
        n_objectives: int,
        n_constraints: int,
        seed: int,
        options: SurrogateOptions,
    ) -> None:
        super().__init__(len(first[-1]), n_objectives, n_constraints)
        self._options = options
        self._space = space
        self._foresight = foresight
        self._moves = LevelMoves(space, lambda policies: foresight(policies).cost, options)
        self._forecaster = Forecaster(space, foresight)
        self._rng = np.random.default_rng(seed)
        # What is asked before the models are, and the sweep that more of it will follow from.
        self._queue: FloatArray = np.concatenate(first)
        self._sweep: Sweep | None = None
        if options.sweep:
            self._begin(Sweep(space, foresight, int(options.sweep)))
        # Genome, objectives and violations of each policy.
        self._told: dict[Policy, list[FloatArray]] = {}
        self._asked: set[Policy] = set()

    def ask(self) -> FloatArray | None:
        """The next genomes; None while a sweep is not told yet."""
        self._guard.before_ask()
        if self._sweep is not None and not len(self._queue) and not self._end_sweep():
            return None
        elif len(self._queue):
            genomes, self._queue = self._queue[: self._size], self._queue[self._size :]
        else:
            self._fit()
            genomes = self._choose(self._breed())
        self._asked.update(self._space.decode(genomes))
        return self._guard.ask(genomes)

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask."""
        genomes = self._take(objectives, violations)
        for policy, *row in zip(
            self._space.decode(genomes), genomes, objectives, violations, strict=True
        ):
            self._told.setdefault(policy, [np.array(part) for part in row])

    def state(self) -> State:
        """What later asks depend on."""
        fits = {f"fit.{name}": theta for name, theta in self._forecaster.state().items()}
        return {
            **super().state(),
            **self._archive().state("told"),
            **fits,
            "rng": generator_state(self._rng),
            "queue": self._queue.copy(),
            "sweeping": np.array(self._sweep is not None),
        }

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._rng = generator_in(state["rng"])
        self._queue = state["queue"].copy()
        if not state["sweeping"]:
            self._sweep = None
        told = Population.of_state(state, "told")
        rows = zip(told.genomes, told.objectives, told.violations, strict=True)
        policies = self._space.decode(told.genomes)
        self._told = {policy: list(row) for policy, row in zip(policies, rows, strict=True)}
        prefix = "fit."
        self._forecaster.restore(
            {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        )
        open_asks = super().restore(state)
        self._asked = {*policies, *(p for asked in open_asks for p in self._space.decode(asked))}
        return open_asks

    def _begin(self, sweep: Sweep) -> None:
        """Has a sweep measured, unless that is over budget or would tell nothing."""
        known = self._foresight(self._space.decode(sweep.genomes))
        if sweep.saves and known.affordable.all() and np.isnan(known.objectives).any():
            self._sweep, self._queue = sweep, np.concatenate([self._queue, sweep.genomes])

    def _end_sweep(self) -> bool:
        """Queues rungs of the sweep's ladder, one for each gene; not until all of it was told."""
        assert self._sweep is not None  # noqa: S101  asked only during a sweep
        policies = self._space.decode(self._sweep.genomes)
        if not all(policy in self._told for policy in policies):
            return False
        unknown = np.isnan(self._foresight(policies).objectives).any(axis=0)
        measured = int(np.flatnonzero(unknown)[0])
        path = self._sweep.path(np.array([self._told[p][1][measured] for p in policies]))
        rungs = self._space.decode(path)
        cost = self._foresight(rungs).cost
        nearest = evenly(cost, self._space.n_genes)
        fresh = [row for row in dict.fromkeys(nearest) if rungs[row] not in self._asked]
        self._sweep, self._queue = None, path[fresh]
        return True

    def _archive(self) -> Population:
        rows = self._told.values()
        return Population(*(np.array([row[part] for row in rows]) for part in range(3)))

    def _fit(self) -> None:
        """Fits the models to what was really measured."""
        policies = list(self._told)
        archive = self._archive()
        affordable = self._foresight(policies).affordable
        usable = np.flatnonzero(affordable & (archive.violations < _FAILED).all(axis=1))
        most = int(self._options.points)
        if len(usable) > most:
            rank, crowding = archive.ranks_and_crowding()
            usable = usable[np.lexsort((-crowding[usable], rank[usable]))[:most]]
        self._forecaster.fit(
            Told(
                policies=[policies[i] for i in usable],
                objectives=archive.objectives[usable],
                violations=archive.violations[usable],
            )
        )

    def _breed(self) -> Population:
        """New policies that promise most on the model."""
        options, moves = self._options, self._moves
        archive = self._archive()
        improvement = Improvement(archive.objectives, archive.violations)
        pool = archive.best(_PARENTS * self._size)
        new = pool.taken(np.empty(0, dtype=np.int64))
        seen = set(self._asked)
        for _ in range(int(options.generations)):
            parents = moves.indices(pool.genomes)
            children = moves.genomes(self._children(parents, int(options.offspring) * self._size))
            policies = self._space.decode(children)
            fresh = [row for row in unique_rows(policies) if policies[row] not in seen]
            if not fresh:
                continue
            seen.update(policies[row] for row in fresh)
            expected = self._forecaster.expected([policies[row] for row in fresh])
            born = Population(children[fresh], *expected)
            pool = pool.joined(born).best(_PARENTS * self._size)
            new = new.joined(born)
            gain = improvement.of(new.objectives)
            order = np.lexsort((-gain, total_violation(new.violations)))
            new = new.taken(order[: _FINALISTS * self._size])
        return new

    def _children(self, parents: IntArray, n: int) -> IntArray:
        """`(n, n_genes)` by crossing, switching and stepping, a third each."""
        rng = self._rng
        one, other = parents[rng.integers(len(parents), size=(2, n))]
        third = n // 3
        crossed = self._moves.cross(one[:third], other[:third], rng)
        switched = self._moves.switch(one[third : 2 * third], rng)
        return np.concatenate([crossed, switched, self._moves.step(one[2 * third :], rng)])

    def _choose(self, candidates: Population) -> FloatArray:
        """Genomes to ask, one after the other, each for what it adds to those before it."""
        rng, n = self._rng, self._size
        archive = self._archive()
        if len(candidates.genomes) < n:
            # A small space is nearly exhausted: fill up with whatever it has.
            levels = rng.integers(0, self._moves.top + 1, size=(n, len(self._moves.top)))
            return np.concatenate([candidates.genomes, self._moves.genomes(levels)])[:n]
        policies = self._space.decode(candidates.genomes)
        n_random = round(self._options.explore * n)
        views = [candidates.objectives] * (n - n_random)
        views += self._forecaster.imagined(policies, n_random, rng) if n_random else []
        violation = total_violation(candidates.violations)
        improvement = Improvement(archive.objectives, archive.violations)
        open_rows = np.ones(len(policies), dtype=np.bool_)
        chosen = []
        for view in views:
            gain = np.where(violation <= 0, improvement.of(view), 0.0)
            gain = np.where(open_rows, gain, -np.inf)
            # Without a gain anywhere the order of survival on the model decides.
            best = int(np.argmax(gain)) if gain.max() > 0 else int(np.argmax(open_rows))
            open_rows[best] = False
            chosen.append(best)
            if violation[best] <= 0:
                improvement.add(candidates.objectives[best])
        return candidates.genomes[chosen]
