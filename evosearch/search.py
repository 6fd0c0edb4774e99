"""The loop: ask, score what is not known yet, tell.

Resuming is the same loop over a ledger that already knows: algorithms are deterministic, so they
ask again for what they asked before, and those answers are there at once. Where there is a snapshot
that fits, the loop starts there.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import Algorithm, Resumable
from evosearch.errors import ReplayMismatch
from evosearch.ledger import Ledger, Member
from evosearch.measurement import Measurement, Terms
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.reach import policies_by_levels
from evosearch.scoring.objectives import Goals
from evosearch.scoring.racing import Bar, Race, Races
from evosearch.snapshots import EVERY_S, Snapshots
from evosearch.space import SearchSpace

__all__ = ["BASELINE", "SEARCH", "Outcome", "Scoring", "Search"]

SEARCH, BASELINE = "search", "baseline"

# A failed candidate loses to every other one, however far that is from feasible: what others
# violate is capped far below.
_FAILED_VIOLATION, _MAX_VIOLATION = 1e9, 1e6
# So many asks in a row without a new policy mean that the space has no more to give; few do, where
# all that its levels give is known. Between levels a space with a budget may have others.
_STALLED_ASKS, _STALLED_WHEN_ALL = 200, 8
_SPENT, _STOPPED = "the budget is spent", "stopped"
_IDLE_ASKS = "search.idle_asks"

FloatArray = NDArray[np.float64]
Score = Callable[
    [
        Sequence[Policy],
        Callable[[Measurement], None],
        Callable[[], bool],
        Races,
        Sequence[Policy],
    ],
    None,
]


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
        overlap: Ask for the next generation before the last one is complete.
        snapshots: What must be the same as when a snapshot was made for it to be used: versions of
            libraries, say; empty for a search that always replays.
        snapshot_every_s: Least seconds between two of them; 0 for one after each generation.
    """

    table: GroupTable
    goals: Goals
    worst: dict[str, float]
    score: Score
    stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time
    racing: float = 0.0
    overlap: bool = False
    snapshots: str = ""
    snapshot_every_s: float = EVERY_S


@dataclass(kw_only=True)
class _Ask:
    """A generation that was asked for and not told yet.

    Args:
        policies, shares: In the algorithm's order; costs as shares of the dense network's.
        digests: Of the policies.
        paid: How many of them the budget pays for, being new.
        cut_short: The budget does not reach for all: it is never told.
        unknown: What is still to be measured, in the order of dispatch.
        known: Measurements by digest.
        races: Of those that were unknown when it was asked.
    """

    policies: Sequence[Policy]
    shares: Sequence[Mapping[str, float]]
    digests: frozenset[str]
    paid: int
    cut_short: bool
    unknown: dict[Policy, None]
    known: dict[str, Measurement]
    races: dict[Policy, Race]


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
        # Of the open asks only: what a search holds must not grow with what it has done.
        self._open: deque[_Ask] = deque()
        # Policies that the budget pays for, and how many of them are measured.
        self._paid: set[str] = set()
        self._evaluations = 0
        racing = scoring.racing if track == SEARCH else 0.0
        self._bar = Bar(scoring.goals, racing) if racing else None
        self._terms = Terms.RACED if racing else Terms.FULL
        self._asks = 0
        self._told = 0
        # Generations in a row without a new policy.
        self._idle_asks = 0
        self._asked_in_vain = False
        self._snapshots = Snapshots(
            ledger,
            track,
            algorithm,
            # What races compare with is not in a snapshot.
            "" if racing else scoring.snapshots,
            scoring.snapshot_every_s,
        )
        # Whether candidates may be under way that no call waited for.
        self._sent_ahead = False
        self._recorded_generations = ledger.generations() if track == SEARCH else 0

    def run(
        self, evaluations: int, on_landing: Callable[[Measurement, int], None] | None = None
    ) -> Outcome:
        """Searches until so many distinct policies have been measured on this track.

        Args:
            evaluations: The budget, including what the ledger knows already; never less than the
                search has had before.
            on_landing: Called after each new measurement with it and the count so far.

        Raises:
            ReplayMismatch: The algorithm asks for something else than it did before.
        """
        self._restore(evaluations)
        outcome = self._run(evaluations, on_landing)
        # An ask in vain may have moved the algorithm, and a replay would not ask twice.
        if not self._asked_in_vain and outcome.reason in (_SPENT, _STOPPED):
            self._keep_snapshot(now=True)
        return outcome

    def _restore(self, evaluations: int) -> None:
        """Goes on where the last snapshot was made, if there is one."""
        snapshot = self._snapshots.last()
        if snapshot is None or not isinstance(self._algorithm, Resumable):
            return
        state = dict(snapshot.state)
        self._idle_asks = int(state.pop(_IDLE_ASKS))
        self._told = self._asks = snapshot.generation
        asked = self._ledger.asked_before(self._track, self._told)
        shares = self._shares(list(asked.values()))
        self._paid = {
            digest
            for digest, share in zip(asked, shares, strict=True)
            if self._scoring.goals.affordable(share)
        }
        self._evaluations = len(self._paid)
        for genomes in self._algorithm.restore(state):
            # One that the budget did not reach for was never opened.
            if len(self._paid) < evaluations:
                self._open_ask(genomes, evaluations)

    def _keep_snapshot(self, *, now: bool = False) -> None:
        self._snapshots.keep(self._told, {_IDLE_ASKS: np.array(self._idle_asks)}, now=now)

    def _run(
        self, evaluations: int, on_landing: Callable[[Measurement, int], None] | None
    ) -> Outcome:
        while True:
            # Before anything was told, there is nothing to breed a second generation from.
            ahead = self._scoring.overlap and self._told > 0
            while (
                len(self._open) <= ahead
                and len(self._paid) < evaluations
                and self._ask(evaluations)
            ):
                pass
            if not self._open:
                spent = len(self._paid) >= evaluations
                return self._outcome(
                    True, _SPENT if spent else "the algorithm has nothing more to ask"
                )
            ask = self._open[0]
            self._measure(ask, on_landing)
            if ask.unknown:
                return self._outcome(False, _STOPPED)
            if ask.cut_short:
                return self._outcome(True, _SPENT)
            self._open.popleft()
            if ahead and not self._open and len(self._paid) >= evaluations:
                # The last tell. With a larger budget there would be an ask before it: what the
                # algorithm draws then, and the population that is recorded, must not hang on that.
                self._algorithm.ask()
            objectives, violations = self._answers(ask)
            self._algorithm.tell(objectives, violations)
            self._raise_bar(ask, objectives, violations)
            self._remember_population(self._told)
            self._told += 1
            self._idle_asks = 0 if ask.paid else self._idle_asks + 1
            exhausted = self._exhausted()
            if exhausted:
                return self._outcome(True, exhausted)
            self._keep_snapshot()

    def _exhausted(self) -> str | None:
        """Why nothing new is to be expected, if that is so."""
        if self._idle_asks >= _STALLED_ASKS:
            return f"no new policy in {_STALLED_ASKS} generations"
        if self._idle_asks >= _STALLED_WHEN_ALL and self._all_measured:
            return f"all {len(self._paid)} affordable policies are measured"
        return None

    @property
    def _all_measured(self) -> bool:
        """Whether that is known, and so."""
        return bool(self._affordable_by_levels) and self._affordable_by_levels <= self._paid

    @cached_property
    def _affordable_by_levels(self) -> set[str]:
        """Digests of all affordable policies that levels give; empty where they are too many."""
        policies = policies_by_levels(self._space) or []
        pairs = zip(policies, self._shares(policies), strict=True)
        return {p.digest for p, shares in pairs if self._scoring.goals.affordable(shares)}

    def _outcome(self, finished: bool, reason: str) -> Outcome:
        return Outcome(evaluations=self._evaluations, finished=finished, reason=reason)

    def _ask(self, evaluations: int) -> bool:
        """Opens another ask; False if there is none."""
        genomes = self._algorithm.ask()
        self._asked_in_vain = genomes is None
        if genomes is None:
            return False
        self._open_ask(genomes, evaluations)
        return True

    def _open_ask(self, genomes: FloatArray, evaluations: int) -> None:
        policies = self._space.decode(genomes)
        shares = self._shares(policies)
        self._remember_ask(self._asks, policies)
        self._asks += 1
        wanted: dict[Policy, float] = {}
        for policy, share in zip(policies, shares, strict=True):
            if policy.digest not in self._paid and self._scoring.goals.affordable(share):
                wanted.setdefault(policy, share["macs"])
        paid = list(wanted)[: evaluations - len(self._paid)]
        self._paid.update(policy.digest for policy in paid)
        known = self._ledger.known(policies, terms=self._terms)
        self._evaluations += sum(policy.digest in known for policy in paid)
        # The most expensive first, so that no scorer starts a long one when others are done.
        unknown = [policy for policy in paid if policy.digest not in known]
        unknown.sort(key=lambda policy: (-wanted[policy], policy.digest))
        self._open.append(
            _Ask(
                policies=policies,
                shares=shares,
                digests=frozenset(policy.digest for policy in policies),
                paid=len(paid),
                cut_short=len(paid) < len(wanted),
                unknown=dict.fromkeys(unknown),
                known=known,
                races=self._races(policies, shares, unknown),
            )
        )

    def _shares(self, policies: Sequence[Policy]) -> list[dict[str, float]]:
        shares = self._scoring.table.shares_of(policies)
        return [
            {name: float(values[row]) for name, values in shares.items()}
            for row in range(len(policies))
        ]

    def _remember_ask(self, generation: int, policies: Sequence[Policy]) -> None:
        recorded = self._ledger.asked(self._track, generation)
        asked = [policy.digest for policy in policies]
        if recorded and recorded != asked:
            raise ReplayMismatch(
                f"generation {generation} asks for other policies than the ledger recorded "
                "(another version of pymoo or numpy?); continue with "
                f"`evosearch launch RECIPE --seed-from {self._ledger.path.parent}`"
            )
        if not recorded:
            macs, params = self._scoring.table.costs_of(policies)
            costs = [(int(m), int(p)) for m, p in zip(macs, params, strict=True)]
            self._ledger.record_ask(self._track, generation, policies, costs)

    def _measure(self, ask: "_Ask", on_landing: Callable[[Measurement, int], None] | None) -> None:
        """Makes what an ask pays for known, unless the search is stopped."""

        def record(measurement: Measurement) -> None:
            self._ledger.record(measurement, self._scoring.clock(), terms=self._terms)
            self._evaluations += 1
            # The next ask may hold the same policy, which is paid for once.
            for other in self._open:
                if measurement.policy.digest in other.digests:
                    other.known[measurement.policy.digest] = measurement
                    other.unknown.pop(measurement.policy, None)
            if on_landing:
                on_landing(measurement, self._evaluations)

        # Once stopped, nothing new is begun, but what was sent ahead is still recorded.
        if ask.unknown and (self._sent_ahead or not self._scoring.stop()):
            ahead = [policy for other in self._open if other is not ask for policy in other.unknown]
            races = {policy: race for other in self._open for policy, race in other.races.items()}
            self._sent_ahead = bool(ahead)
            self._scoring.score(list(ask.unknown), record, self._scoring.stop, races, ahead)

    def _races(
        self,
        policies: Sequence[Policy],
        shares: Sequence[Mapping[str, float]],
        unknown: Sequence[Policy],
    ) -> dict[Policy, Race]:
        if self._bar is None:
            return {}
        known = dict(zip(policies, shares, strict=True))
        return {policy: self._bar.race(known[policy]) for policy in unknown}

    def _raise_bar(self, ask: "_Ask", objectives: FloatArray, violations: FloatArray) -> None:
        if self._bar is None:
            return
        rows = [row for row, policy in enumerate(ask.policies) if policy.digest in ask.known]
        known = [ask.known[ask.policies[row].digest] for row in rows]
        self._bar.raise_by(known, objectives[rows], violations[rows])

    def _answers(self, ask: "_Ask") -> tuple[FloatArray, FloatArray]:
        """Objectives, and violations with a last column for failures."""
        goals, worst = self._scoring.goals, self._scoring.worst
        objectives, violations = [], []
        for policy, shares in zip(ask.policies, ask.shares, strict=True):
            measurement = ask.known.get(policy.digest)
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
