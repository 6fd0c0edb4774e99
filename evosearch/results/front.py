"""What a run found, read from its ledger: every measured policy, the front, hypervolumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.facts import RunFacts, read_facts
from evosearch.ledger import Entry, Ledger
from evosearch.measurement import Measurement, Status, Terms
from evosearch.pareto import front_mask, hypervolume, total_violation
from evosearch.policy import Policy
from evosearch.scoring.objectives import Goals, reference_point
from evosearch.search import BASELINE, SEARCH
from evosearch.strategy import goals_of

__all__ = ["Results", "Row", "read_results"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured policy.

    Args:
        policy: What was measured.
        status: How scoring ended.
        values: Metrics, and `macs`, `params` and, where the run knows it, `latency` as shares of
            dense; only the shares if it failed, and estimates of the metrics if it was dropped.
        macs, params: Absolute costs.
        violation: Sum of relative excesses over the constraints; 0 is feasible.
        on_front: Whether no other feasible policy of the search dominates it.
        seconds: Time of scoring.
        reason: Why it failed, or was dropped.
        images: Validation images that it has seen; None if it failed.
        checked: Metrics on the check images; empty where they were not measured.
        timed: Share of the dense network's time that it took, where `latency` is foreseen and the
            network was timed.
    """

    policy: Policy
    status: Status
    values: Mapping[str, float]
    macs: int
    params: int
    violation: float
    on_front: bool
    seconds: float
    reason: str | None
    images: int | None
    checked: Mapping[str, float]
    timed: float | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was measured in a run.

    Args:
        goals: Objectives and constraints.
        groups: Name and channels of each group.
        dense: Error and costs of the dense network; `latency` in seconds, where it is known.
        rows: Policies of the search, in the order in which they were first asked for.
        baseline: Policies of the uniform ladder, likewise.
        reference: `(n_objectives,)` of the hypervolume.
        check: Count of check images, and the dense network's error on them; None if nothing was
            measured there.
    """

    goals: Goals
    groups: tuple[tuple[str, int], ...]
    dense: Mapping[str, float]
    rows: tuple[Row, ...]
    baseline: tuple[Row, ...]
    reference: NDArray[np.float64]
    check: tuple[int, float] | None = None

    @property
    def front(self) -> list[Row]:
        """Rows on the front by first objective; the least violating ones if none is feasible."""
        chosen = [row for row in self.rows if row.on_front]
        if not chosen:
            measured = [row for row in self.rows if row.status is Status.OK]
            least = min((row.violation for row in measured), default=0.0)
            chosen = [row for row in measured if row.violation == least]
        return sorted(
            chosen,
            key=lambda row: (*(row.values[n] for n in self.goals.objectives), row.policy.keep),
        )

    @property
    def feasible(self) -> bool:
        """Whether any measured policy satisfies all constraints."""
        return any(row.on_front for row in self.rows)

    def hypervolume(self) -> float:
        """Of the search, as a share of the box between 0 and the reference."""
        return self._hypervolume(self.rows)

    def baseline_hypervolume(self) -> float | None:
        """Of the uniform ladder; None if it was not measured."""
        return self._hypervolume(self.baseline) if self.baseline else None

    @property
    def _fully_checked(self) -> bool:
        return self.feasible and all(row.checked for row in self.front)

    def checked_hypervolume(self) -> float | None:
        """Of the front on the check images; None if not all of it was measured there."""
        if not self._fully_checked:
            return None
        return self._hypervolume_of([{**row.values, **row.checked} for row in self.front])

    def slowness(self) -> float | None:
        """How much longer the front's networks took than was foreseen; None if none was timed.

        A mean over those that were timed: 0.05 is a twentieth longer.
        """
        found = [row.timed / row.values["latency"] for row in self.front if row.timed is not None]
        return float(np.mean(found)) - 1 if found else None

    def optimism(self) -> float | None:
        """How much more error the front has on the check images, beyond what the dense network has.

        A mean over the front, as a share of images; None if not all of it was measured there.
        """
        if self.check is None or not self._fully_checked:
            return None
        gap = np.mean([row.checked["error"] - row.values["error"] for row in self.front])
        return float(gap - (self.check[1] - self.dense["error"]))

    def _hypervolume(self, rows: Sequence[Row]) -> float:
        return self._hypervolume_of(
            [row.values for row in rows if row.status is Status.OK and row.violation <= 0]
        )

    def _hypervolume_of(self, values: Sequence[Mapping[str, float]]) -> float:
        points = [self.goals.vector(row) for row in values]
        return hypervolume(
            np.array(points).reshape(len(points), len(self.reference)), self.reference
        )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """An entry, and its costs as shares of the dense network's."""

    entry: Entry
    shares: Mapping[str, float]


def _asked(entries: Sequence[Entry], facts: RunFacts) -> list[_Asked]:
    shares = [
        {"macs": entry.macs / facts.dense_macs, "params": entry.params / facts.dense_params}
        for entry in entries
    ]
    if facts.latency is not None and entries:
        latency = facts.latency.shares(np.array([entry.policy.keep for entry in entries]))
        shares = [
            {**share, "latency": float(value)} for share, value in zip(shares, latency, strict=True)
        ]
    return [_Asked(entry=e, shares=s) for e, s in zip(entries, shares, strict=True)]


def _paid(asked: Sequence[_Asked], goals: Goals, budget: int) -> list[_Asked]:
    """What a track's budget pays for: its first affordable policies, in the order of asking.

    The last ask of a search may reach beyond the budget; what the other track measured of that
    is not to its credit.
    """
    return [one for one in asked if goals.affordable(one.shares)][:budget]


def _rows(
    asked: Sequence[_Asked],
    goals: Goals,
    checked: Mapping[str, Measurement],
    timed: Mapping[str, float],
) -> tuple[Row, ...]:
    found = [
        (one.entry, one.entry.measurement, {**one.entry.measurement.metrics, **one.shares})
        for one in asked
        if one.entry.measurement is not None
    ]
    ok = [measurement.ok for _, measurement, _ in found]
    objectives = np.array(
        [
            goals.vector(values) if good else np.full(len(goals.objectives), np.nan)
            for (_, _, values), good in zip(found, ok, strict=True)
        ]
    ).reshape(len(found), len(goals.objectives))
    violations = np.array([goals.violations(values) for _, _, values in found])
    violations = violations.reshape(len(found), len(goals.constraints))
    front = front_mask(objectives, violations)
    total = total_violation(violations)
    return tuple(
        Row(
            policy=entry.policy,
            status=measurement.status,
            values=values,
            macs=entry.macs,
            params=entry.params,
            violation=float(total[i]),
            on_front=bool(front[i]),
            seconds=measurement.seconds,
            reason=measurement.reason,
            images=measurement.images,
            checked=checked[d].metrics if (d := entry.policy.digest) in checked else {},
            timed=timed.get(entry.policy.digest),
        )
        for i, (entry, measurement, values) in enumerate(found)
    )


def read_results(ledger: Ledger) -> Results:
    """Reads a run; also while it is being written.

    Raises:
        LedgerCorrupt: The ledger does not say what a run is.
    """
    facts = read_facts(ledger)
    search = facts.recipe.search
    goals = goals_of(facts.recipe)
    checked = ledger.measurements(terms=Terms.CHECK)

    def rows(track: str, budget: int) -> tuple[Row, ...]:
        raced = track == SEARCH and search.racing > 0
        entries = ledger.entries(track, terms=Terms.RACED if raced else Terms.FULL)
        return _rows(_paid(_asked(entries, facts), goals, budget), goals, checked, facts.timed)

    return Results(
        goals=goals,
        groups=facts.groups,
        dense={
            "macs": facts.dense_macs,
            "params": facts.dense_params,
            "error": facts.dense_error,
            **({} if facts.latency is None else {"latency": facts.latency.dense_seconds}),
        },
        rows=rows(SEARCH, facts.evaluations),
        baseline=rows(BASELINE, search.baseline),
        reference=reference_point(goals.objectives, facts.worst),
        check=None
        if facts.check_dense_error is None
        else (facts.recipe.data.check or 0, facts.check_dense_error),
    )
