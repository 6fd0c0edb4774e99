"""The loop: ask, score what is not known yet, tell.

Resuming is the same loop over a ledger that already knows: algorithms are deterministic, so they
ask again for what they asked before, and those answers are there at once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import Algorithm
from evosearch.errors import ReplayMismatch
from evosearch.ledger import Ledger, Member
from evosearch.measurement import Measurement, Terms
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.scoring.objectives import Goals
from evosearch.scoring.racing import Bar, Race, Races
from evosearch.space import SearchSpace

__all__ = ["BASELINE", "SEARCH", "Outcome", "Scoring", "Search"]

SEARCH, BASELINE = "search", "baseline"

# A failed candidate loses to every other one, however far that is from feasible: what others
# violate is capped far below.
_FAILED_VIOLATION, _MAX_VIOLATION = 1e9, 1e6
# So many asks in a row without a new policy mean that the space has no more to give.
_STALLED_ASKS = 200

FloatArray = NDArray[np.float64]
Score = Callable[[Sequence[Policy], Callable[[Measurement], None], Callable[[], bool], Races], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a search ended.

    Args:
        evaluations: Distinct policies measured on the track.
        finished: The budget was spent, or the algorithm had nothing more to ask.
        reason: Why it ended, for people.
    """

    evaluations: int
    finished: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What turns policies into numbers.

    Args:
        table: Costs in closed form.
        goals: Objectives and constraints.
        worst: Per metric, what is told for a candidate that has none.
        score: Scores unknown policies; see `Pool.score`.
        stop: Whether to end early.
        clock: Time stamp of landings.
        racing: Chance that a candidate is dropped early which nothing known dominates; 0 shows all
            validation images to everyone. Concerns the search alone, not the ladder beside it.
    """

    table: GroupTable
    goals: Goals
    worst: dict[str, float]
    score: Score
    stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time
    racing: float = 0.0


class Search:
    """One algorithm over one ledger.

    Args:
        space: What genomes mean.
        algorithm: Who asks.
        scoring: How policies become numbers.
        ledger: What is known; open for writing.
        track: Under which name asks are recorded.
    """

    def __init__(
        self,
        space: SearchSpace,
        algorithm: Algorithm,
        scoring: Scoring,
        ledger: Ledger,
        track: str = SEARCH,
    ) -> None:
        self._space = space
        self._algorithm = algorithm
        self._scoring = scoring
        self._ledger = ledger
        self._track = track
        # Of the current generation only: what a search holds must not grow with what it has done.
        self._known: dict[str, Measurement] = {}
        self._paid: set[str] = set()
        racing = scoring.racing if track == SEARCH else 0.0
        self._bar = Bar(scoring.goals, racing) if racing else None
        self._terms = Terms.RACED if racing else Terms.FULL
        self._recorded_generations = ledger.generations() if track == SEARCH else 0

    def run(
        self, evaluations: int, on_landing: Callable[[Measurement, int], None] | None = None
    ) -> Outcome:
        """Searches until so many distinct policies have been measured on this track.

        Args:
            evaluations: The budget, including what the ledger knows already.
            on_landing: Called after each new measurement with it and the count so far.

        Raises:
            ReplayMismatch: The algorithm asks for something else than it did before.
        """
        generation, idle_asks = 0, 0
        while len(self._paid) < evaluations:
            genomes = self._algorithm.ask()
            if genomes is None:
                return self._outcome(True, "the algorithm has nothing more to ask")
            policies = self._space.decode(genomes)
            costs = self._costs(policies)
            self._remember_ask(generation, policies, costs)
            self._known = self._ledger.known(policies, terms=self._terms)
            before = len(self._paid)
            complete = self._measure(policies, costs, evaluations, on_landing)
            if not complete:
                stopped = len(self._paid) < evaluations
                return self._outcome(not stopped, "stopped" if stopped else "the budget is spent")
            objectives, violations = self._answers(policies, costs)
            self._algorithm.tell(objectives, violations)
            self._raise_bar(policies, objectives, violations)
            self._remember_population(generation)
            generation += 1
            idle_asks = idle_asks + 1 if len(self._paid) == before else 0
            if idle_asks >= _STALLED_ASKS:
                return self._outcome(True, f"no new policy in {_STALLED_ASKS} generations")
        return self._outcome(True, "the budget is spent")

    def _outcome(self, finished: bool, reason: str) -> Outcome:
        return Outcome(evaluations=len(self._paid), finished=finished, reason=reason)

    def _costs(self, policies: Sequence[Policy]) -> list[tuple[int, int]]:
        macs, params = self._scoring.table.costs_of(policies)
        return [(int(m), int(p)) for m, p in zip(macs, params, strict=True)]

    def _shares(self, cost: tuple[int, int]) -> dict[str, float]:
        dense_macs, dense_params = self._scoring.table.dense_costs
        return {"macs": cost[0] / dense_macs, "params": cost[1] / dense_params}

    def _remember_ask(
        self, generation: int, policies: Sequence[Policy], costs: Sequence[tuple[int, int]]
    ) -> None:
        recorded = self._ledger.asked(self._track, generation)
        asked = [policy.digest for policy in policies]
        if recorded and recorded != asked:
            raise ReplayMismatch(
                f"generation {generation} asks for other policies than the ledger recorded "
                "(another version of pymoo or numpy?); continue with "
                f"`evosearch launch RECIPE --seed-from {self._ledger.path.parent}`"
            )
        if not recorded:
            self._ledger.record_ask(self._track, generation, policies, costs)

    def _measure(
        self,
        policies: Sequence[Policy],
        costs: Sequence[tuple[int, int]],
        evaluations: int,
        on_landing: Callable[[Measurement, int], None] | None,
    ) -> bool:
        """Makes all affordable policies known within the budget; False if some are left out."""
        wanted: dict[Policy, int] = {}
        for policy, cost in zip(policies, costs, strict=True):
            if policy.digest not in self._paid and self._scoring.goals.affordable(
                self._shares(cost)
            ):
                wanted.setdefault(policy, cost[0])
        left = evaluations - len(self._paid)
        within = list(wanted)[:left]
        self._paid.update(p.digest for p in within if p.digest in self._known)
        unknown = [policy for policy in within if policy.digest not in self._known]

        def record(measurement: Measurement) -> None:
            self._ledger.record(measurement, self._scoring.clock(), terms=self._terms)
            self._known[measurement.policy.digest] = measurement
            self._paid.add(measurement.policy.digest)
            if on_landing:
                on_landing(measurement, len(self._paid))

        if unknown and not self._scoring.stop():
            # The most expensive first, so that no scorer starts a long one when others are done.
            unknown.sort(key=lambda policy: (-wanted[policy], policy.digest))
            self._scoring.score(
                unknown, record, self._scoring.stop, self._races(policies, costs, unknown)
            )
        return len(within) == len(wanted) and all(p.digest in self._known for p in within)

    def _races(
        self,
        policies: Sequence[Policy],
        costs: Sequence[tuple[int, int]],
        unknown: Sequence[Policy],
    ) -> dict[Policy, Race]:
        if self._bar is None:
            return {}
        shares = dict(zip(policies, map(self._shares, costs), strict=True))
        return {policy: self._bar.race(shares[policy]) for policy in unknown}

    def _raise_bar(
        self, policies: Sequence[Policy], objectives: FloatArray, violations: FloatArray
    ) -> None:
        if self._bar is None:
            return
        rows = [row for row, policy in enumerate(policies) if policy.digest in self._known]
        known = [self._known[policies[row].digest] for row in rows]
        self._bar.raise_by(known, objectives[rows], violations[rows])

    def _answers(
        self, policies: Sequence[Policy], costs: Sequence[tuple[int, int]]
    ) -> tuple[FloatArray, FloatArray]:
        """Objectives, and violations with a last column for failures."""
        goals, worst = self._scoring.goals, self._scoring.worst
        objectives, violations = [], []
        for policy, cost in zip(policies, costs, strict=True):
            shares = self._shares(cost)
            measurement = self._known.get(policy.digest)
            metrics = measurement.metrics if measurement else {}
            failed = _FAILED_VIOLATION if measurement and measurement.failed else 0.0
            objectives.append(goals.vector({**worst, **shares, **metrics}))
            excess = np.minimum(goals.violations({**shares, **metrics}), _MAX_VIOLATION)
            violations.append([*excess, failed])
        return np.array(objectives), np.array(violations)

    def _remember_population(self, generation: int) -> None:
        if self._track != SEARCH or generation < self._recorded_generations:
            return  # ranking and decoding it again would be half of a replay
        population = self._algorithm.population
        rank, crowding = population.ranks_and_crowding()
        policies = self._space.decode(population.genomes)
        self._ledger.record_population(
            generation,
            [
                Member(policy=policy, rank=int(r), crowding=float(c))
                for policy, r, c in zip(policies, rank, crowding, strict=True)
            ],
        )
