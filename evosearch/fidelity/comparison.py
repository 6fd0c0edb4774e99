"""From a journal to findings: every predictor beside every truth, set by set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.fidelity.journal import Journal
from evosearch.fidelity.statistics import (
    Correlation,
    Finding,
    Learned,
    ceiling,
    correlate,
    cross_validate,
)
from evosearch.measurement import METRICS, Status
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable

__all__ = ["Comparison", "PolicyRow", "compare"]

FloatArray = NDArray[np.float64]
Key = tuple[int, ...]

_FOLDS = 5
# Fewer policies cannot be parted into folds that say anything.
_FEWEST_TO_LEARN = 10
_FEWEST_TO_COMPARE = 3


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """All that is known about one policy of a set.

    Args:
        policies: Name of the set.
        policy: Which.
        macs, params: Costs, absolute.
        share: MACs as a share of the dense network's.
        truth: Mean over repetitions, such as `test.error`; empty until fine-tuned, or if it failed.
        repetitions: The same for each repetition.
        truth_seconds: Of one repetition.
        scores: Metrics by variant; missing where scoring failed.
        seconds: Of scoring, by variant.
    """

    policies: str
    policy: Policy
    macs: int
    params: int
    share: float
    truth: Mapping[str, float]
    repetitions: tuple[Mapping[str, float], ...]
    truth_seconds: float | None
    scores: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a study found.

    Args:
        settings: Of the study, plain data.
        groups: Names of the groups, in the order of policies.
        rows: Every policy of every set.
        findings: Every predictor against every truth.
        reliability: By set and truth, the order of one half of the repetitions against the other;
            see `ceiling` for what that leaves a predictor of their mean.
        models: Fitted on all policies of the first set that has enough of them, by predictor and
            truth, for use elsewhere.
        failures: Sentences on what could not be scored or fine-tuned.
    """

    settings: Mapping[str, Any]
    groups: tuple[str, ...]
    rows: tuple[PolicyRow, ...]
    findings: tuple[Finding, ...]
    reliability: Mapping[tuple[str, str], Correlation]
    models: Mapping[tuple[str, str], Mapping[str, Any]]
    failures: tuple[str, ...]

    @property
    def truths(self) -> tuple[str, ...]:
        """What predictors were compared with, the main one first."""
        return tuple(dict.fromkeys(finding.truth for finding in self.findings))

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets."""
        return tuple(dict.fromkeys(row.policies for row in self.rows))

    def of(self, policies: str, truth: str | None = None) -> list[Finding]:
        """The findings of one set and one truth, the main one if None."""
        truth = truth or next(iter(self.truths), None)
        return [f for f in self.findings if f.policies == policies and f.truth == truth]

    def title(self, policies: str) -> str:
        """One line on a set: how many policies, at which costs, how different their truths."""
        rows = [row for row in self.rows if row.policies == policies]
        shares = [row.share for row in rows]
        main = self.truths[0]
        truths = [row.truth[main] for row in rows if main in row.truth]
        return (
            f"{policies}: {len(truths)} policies at {min(shares):.1%} to {max(shares):.1%} of "
            f"MACs; fine-tuned {main} {min(truths):.4f} to {max(truths):.4f}"
        )

    def remarks(self, policies: str) -> list[str]:
        """What else there is to know before a table is believed."""
        rows = [row for row in self.rows if row.policies == policies]
        lines = []
        missing = sum(not row.truth for row in rows)
        if missing:
            lines.append(f"not yet fine-tuned {missing} of {len(rows)} policies")
        found = self.reliability.get((policies, self.truths[0]))
        if found is not None:
            lines.append(
                f"ceiling            tau {ceiling(found.tau):.3f} ({ceiling(found.tau_low):.2f} to "
                f"{ceiling(found.tau_high):.2f}) for a perfect predictor: repetitions of the truth "
                f"agree to {found.tau:.3f}"
            )
        return lines


def compare(
    journal: Journal,
    sets: Mapping[str, Sequence[Policy]],
    table: GroupTable,
    *,
    variants: Sequence[str],
    seeds: int,
    parts: Sequence[str],
    seed: int,
) -> Comparison:
    """Reads a journal and compares what is complete.

    Args:
        journal: What was found.
        sets: Policies by name of the set.
        table: Knows the costs.
        variants: Which to compare.
        seeds: Repetitions of the truth to use.
        parts: Of the source that the truth was measured on.
        seed: Of resampling and partitions.
    """
    rows = _rows(journal, sets, table, variants, seeds)
    findings: list[Finding] = []
    reliability: dict[tuple[str, str], Correlation] = {}
    models: dict[tuple[str, str], Mapping[str, Any]] = {}
    for truth in [f"{part}.{number}" for part in parts for number in ("error", "loss")]:
        fits: list[_Fit] = []
        for name in sets:
            chosen = [row for row in rows if row.policies == name and truth in row.truth]
            if len(chosen) < _FEWEST_TO_COMPARE:
                continue
            group = _Group(name, truth, tuple(chosen), tuple(variants), table, seed)
            findings += group.plain()
            findings += group.transferred(fits)
            learned = group.learned()
            findings += [finding for finding, _ in learned]
            if not fits:
                fits = [fit for _, fit in learned]
                models |= {(fit.combination.label, truth): group.model(fit) for fit in fits}
            if seeds > 1:
                reliability[name, truth] = group.reliability()
    return Comparison(
        settings={"variants": {r["name"]: r["changes"] for r in journal.of_kind("variant")}},
        groups=tuple(group.name for group in table.groups),
        rows=rows,
        findings=tuple(findings),
        reliability=reliability,
        models=models,
        failures=_failures(journal),
    )


def _rows(
    journal: Journal,
    sets: Mapping[str, Sequence[Policy]],
    table: GroupTable,
    variants: Sequence[str],
    seeds: int,
) -> tuple[PolicyRow, ...]:
    scores: dict[Key, dict[str, dict[str, float]]] = {}
    seconds: dict[Key, dict[str, float]] = {}
    for record in journal.of_kind("score"):
        key, name = tuple(record["keep"]), record["variant"]
        if record["status"] == Status.OK and name in variants:
            scores.setdefault(key, {})[name] = record["metrics"]
            seconds.setdefault(key, {})[name] = record["seconds"]
    truths: dict[Key, list[dict[str, Any]]] = {}
    for record in journal.of_kind("truth"):
        if record["numbers"] and record["seed"] < seeds:
            truths.setdefault(tuple(record["keep"]), []).append(record)
    rows = []
    for name, policies in sets.items():
        macs, params = table.costs_of(policies)
        for index, policy in enumerate(policies):
            found = sorted(truths.get(policy.keep, []), key=lambda record: record["seed"])
            numbers = [record["numbers"] for record in found]
            # Repetitions are averaged once all are there: a mean of fewer would be another truth.
            whole = numbers if len(numbers) == seeds else []
            rows.append(
                PolicyRow(
                    policies=name,
                    policy=policy,
                    macs=int(macs[index]),
                    params=int(params[index]),
                    share=int(macs[index]) / table.dense_costs[0],
                    truth={k: float(np.mean([n[k] for n in whole])) for k in whole[0]}
                    if whole
                    else {},
                    repetitions=tuple(numbers),
                    truth_seconds=float(np.mean([r["seconds"] for r in found])) if found else None,
                    scores=scores.get(policy.keep, {}),
                    seconds=seconds.get(policy.keep, {}),
                )
            )
    return tuple(rows)


def _failures(journal: Journal) -> tuple[str, ...]:
    told = [
        f"{Policy(tuple(record['keep'])).digest} {record['variant']}: {record['reason']}"
        for record in journal.of_kind("score")
        if record["status"] != Status.OK
    ]
    told += [
        f"{Policy(tuple(record['keep'])).digest} fine-tuning: {record['reason']}"
        for record in journal.of_kind("truth")
        if not record["numbers"]
    ]
    return tuple(told)


@dataclass(frozen=True)
class _Combination:
    """What is learned from: metrics of variants, and perhaps the policy's widths."""

    label: str
    variants: tuple[str, ...]
    widths: bool


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """What was learned on a set, fit for use on another only where that has the same numbers."""

    policies: str
    combination: _Combination
    learned: Learned


@dataclass(frozen=True, eq=False)
class _Group:
    """One set of policies beside one truth."""

    name: str
    key: str
    rows: tuple[PolicyRow, ...]
    variants: tuple[str, ...]
    table: GroupTable
    seed: int

    @property
    def truth(self) -> FloatArray:
        """`(n,)`, lower is better."""
        return np.array([row.truth[self.key] for row in self.rows])

    def _finding(
        self, predictor: str, metric: str, seconds: float, found: Correlation, learned: bool = False
    ) -> Finding:
        return Finding(
            policies=self.name,
            predictor=predictor,
            metric=metric,
            truth=self.key,
            seconds=seconds,
            learned=learned,
            correlation=found,
        )

    def _seconds(self, variants: Sequence[str]) -> float:
        """Median per policy, summed over variants."""
        return sum(
            float(np.median([row.seconds[name] for row in self.rows if name in row.seconds]))
            for name in variants
        )

    def plain(self) -> list[Finding]:
        """Every metric of every variant, and the truth on other images."""
        found = []
        for name in self.variants:
            rows = [row for row in self.rows if name in row.scores]
            if len(rows) < _FEWEST_TO_COMPARE:
                continue
            truth = np.array([row.truth[self.key] for row in rows])
            for metric in rows[0].scores[name]:
                values = np.array([row.scores[name][metric] for row in rows])
                correlation = correlate(values, truth, self.seed)
                found.append(self._finding(name, metric, self._seconds([name]), correlation))
        part = self.key.partition(".")[0]
        seconds = float(np.median([row.truth_seconds or 0.0 for row in self.rows]))
        for other in self.rows[0].truth:
            # The same network on the same images would agree for no good reason.
            if other.partition(".")[0] != part:
                values = np.array([row.truth[other] for row in self.rows])
                correlation = correlate(values, self.truth, self.seed)
                found.append(self._finding("fine-tuned", other, seconds, correlation))
        return found

    def reliability(self) -> Correlation:
        """One half of the repetitions against the other."""
        halves = [
            np.array(
                [np.mean([n[self.key] for n in row.repetitions[half::2]]) for row in self.rows]
            )
            for half in (0, 1)
        ]
        return correlate(halves[0], halves[1], self.seed)

    def _complete(self) -> tuple[str, ...]:
        """Variants that scored every policy of the set."""
        return tuple(name for name in self.variants if all(name in row.scores for row in self.rows))

    def _combinations(self) -> list[_Combination]:
        """What can be learned from here."""
        complete = self._complete()
        singles = [(f"learned: {name}", (name,)) for name in complete]
        together = [("learned: all", complete)] if len(complete) > 1 else []
        found = [
            _Combination(f"{label} + widths" if widths else label, variants, widths)
            for label, variants in (*singles, *together)
            for widths in (False, True)
        ]
        return [*found, _Combination("learned: widths", (), True)]

    def _features(self, combination: _Combination) -> FloatArray:
        """`(n, p)`: metrics, on a logarithmic scale where they are positive, and log-widths."""
        columns = []
        for name in combination.variants:
            for metric in self.rows[0].scores[name]:
                values = np.array([row.scores[name][metric] for row in self.rows])
                columns.append(_stretched(values, metric))
        if combination.widths:
            # None of a block that is left out count as half of one.
            keep = np.maximum([row.policy.keep for row in self.rows], 0.5) / self.table.channels
            columns += list(np.log(keep).T)
        return np.array(columns).T

    def _found_by(self, combination: _Combination, how: str, found: Correlation) -> Finding:
        seconds = self._seconds(combination.variants)
        return self._finding(combination.label, how, seconds, found, learned=True)

    def learned(self) -> list[tuple[Finding, _Fit]]:
        """Ridge regressions, judged out of fold; nothing where there are too few policies."""
        if len(self.rows) < _FEWEST_TO_LEARN:
            return []
        found = []
        for combination in self._combinations():
            result = cross_validate(
                self._features(combination), self.truth, folds=_FOLDS, seed=self.seed
            )
            fit = _Fit(policies=self.name, combination=combination, learned=result)
            found.append((self._found_by(combination, "k-fold", result.correlation), fit))
        return found

    def transferred(self, fits: Sequence[_Fit]) -> list[Finding]:
        """How fits on another set order the policies of this one, where it has their numbers."""
        here = set(self._combinations())
        found = []
        for fit in fits:
            if fit.combination not in here:
                continue
            predicted = fit.learned.model.predict(self._features(fit.combination))
            correlation = correlate(predicted, self.truth, self.seed)
            found.append(self._found_by(fit.combination, f"fitted on {fit.policies}", correlation))
        return found

    def model(self, fit: _Fit) -> dict[str, Any]:
        """A fitted predictor as plain data: names of its features and what it does with them."""
        names = [
            f"{name}.{metric}"
            for name in fit.combination.variants
            for metric in self.rows[0].scores[name]
        ]
        if fit.combination.widths:
            names += [f"width.{group.name}" for group in self.table.groups]
        model = fit.learned.model
        return {
            "features": names,
            "centre": model.centre.tolist(),
            "scale": [float(s) if np.isfinite(s) else None for s in model.scale],
            "weights": model.weights.tolist(),
            "strength": model.strength,
        }


def _stretched(values: FloatArray, metric: str) -> FloatArray:
    """Metrics are never negative: their ratios say more than their differences."""
    return np.log(np.maximum(values, 1e-6)) if metric in METRICS else values
