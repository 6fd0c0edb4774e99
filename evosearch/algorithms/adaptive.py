"""Self-adaptive differential evolution: every member carries its own F and CR [Brest2006].

A trial inherits its target's parameters, each drawn anew with probability 0.1, and passes them on
if it survives: parameters that make survivors spread. Survival is that of GDE3 [Kukkonen2005], of
which plain differential evolution is the case of one objective.

References:
    [Brest2006] J. Brest et al., "Self-Adapting Control Parameters in Differential Evolution", IEEE
        TEVC 10(6), 2006, equations 5 and 6.
    [Kukkonen2005] S. Kukkonen, J. Lampinen, "GDE3", IEEE CEC 2005.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import (
    AskTellGuard,
    Population,
    State,
    generator_in,
    generator_state,
    numbered,
)
from evosearch.pareto import total_violation

__all__ = ["SelfAdaptive"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_RENEWAL = 0.1
_LEAST_F, _F_RANGE = 0.1, 0.9


class SelfAdaptive:
    """DE/rand/1/bin with F and CR that adapt themselves.

    Args:
        initial: `(n, n_genes)` first population, n >= 4.
        n_objectives, n_constraints: What it will be told.
        seed: Of everything random.
        f, cr: What all members start with.
    """

    def __init__(
        self,
        initial: FloatArray,
        n_objectives: int,
        n_constraints: int,
        seed: int,
        *,
        f: float,
        cr: float,
    ) -> None:
        self._guard = AskTellGuard(n_objectives, n_constraints)
        self._rng = np.random.default_rng(seed)
        self._next = initial.copy()
        self._members: Population | None = None
        self._own = np.tile([f, cr], (len(initial), 1))
        self._open: deque[FloatArray] = deque()

    def ask(self) -> FloatArray:
        """The next genomes: the first population, then a trial for each member."""
        self._guard.before_ask()
        own = self._own
        if self._members is not None:
            self._next, own = self._trials(self._members.genomes)
        self._open.append(own)
        return self._guard.ask(self._next)

    def _trials(self, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A trial for each target, and the F and CR that it inherits."""
        rng, (n, n_genes) = self._rng, targets.shape
        fresh = np.stack([_LEAST_F + _F_RANGE * rng.random(n), rng.random(n)], axis=1)
        own = np.where(rng.random((n, 2)) < _RENEWAL, fresh, self._own)
        f, cr = own.T[:, :, None]
        # Three others for each target: ranks of random numbers, the target's own being last.
        keys = rng.random((n, n))
        np.fill_diagonal(keys, 2.0)
        a, b, c = (targets[rows] for rows in np.argsort(keys, axis=1)[:, :3].T)
        donors = a + f * (b - c)
        # A donor that leaves the box ends halfway between its base vector and the border.
        donors = np.where(donors < 0, a / 2, np.where(donors > 1, (a + 1) / 2, donors))
        crossed = rng.random((n, n_genes)) < cr
        crossed[np.arange(n), rng.integers(n_genes, size=n)] = True
        return np.where(crossed, donors, targets), own

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask, in its order."""
        genomes = self._guard.tell(objectives, violations)
        trial_own = self._open.popleft()
        told = Population(genomes.copy(), objectives.copy(), violations.copy())
        if self._members is None:
            self._members = told
            return
        n = len(genomes)
        both = self._members.joined(told)
        trials_win, targets_win = _weakly_better(told, self._members)
        rows = np.concatenate([np.flatnonzero(~trials_win), n + np.flatnonzero(~targets_win)])
        kept = rows[both.taken(rows).best_rows(n)]
        # A trial that replaces its target takes its place.
        kept = kept[np.lexsort((kept, kept % n))]
        self._members = both.taken(kept)
        self._own = np.concatenate([self._own, trial_own])[kept]

    @property
    def population(self) -> Population:
        """The survivors."""
        if self._members is None:
            raise RuntimeError("there is no population before the first tell()")
        return self._members

    def state(self) -> State:
        """What later asks depend on."""
        return {
            **self._guard.state(),
            **self.population.state("members"),
            **{f"open_own.{i}": own.copy() for i, own in enumerate(self._open)},
            "own": self._own.copy(),
            "rng": generator_state(self._rng),
        }

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        self._members = Population.of_state(state, "members")
        self._open = deque(numbered(state, "open_own"))
        self._own = state["own"].copy()
        self._rng = generator_in(state["rng"])
        return self._guard.restore(state)


def _weakly_better(trials: Population, targets: Population) -> tuple[BoolArray, BoolArray]:
    """`(n,)` boolean: where the trial replaces its target, and where the target refuses it.

    A trial replaces a target that it equals or dominates, under constrained domination.
    """
    trial, target = total_violation(trials.violations), total_violation(targets.violations)
    feasible = (trial <= 0) & (target <= 0)
    no_worse = (trials.objectives <= targets.objectives).all(axis=1)
    dominated = (targets.objectives <= trials.objectives).all(axis=1) & ~no_worse
    wins = np.where(feasible, no_worse, trial <= target)
    loses = np.where(feasible, dominated, trial > target)
    return wins.astype(np.bool_), loses.astype(np.bool_)
