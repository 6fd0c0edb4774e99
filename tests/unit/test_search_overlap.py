"""Searches that ask for a generation while the one before is scored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy
from evosearch.scoring.racing import Races
from evosearch.search import Search
from tests.unit.search_bench import BUDGET, Bench, either_way, every_algorithm, formula


@either_way
@every_algorithm
@pytest.mark.parametrize("seed", range(2))
def test_stopped_search_with_overlap_ends_as_if_never_stopped(
    folder: Path, algorithm: str, seed: int, *, snapshots: bool
) -> None:
    whole, parts = (
        Bench(folder / n, algorithm, overlap=True, snapshots=snapshots) for n in ("whole", "parts")
    )
    stops = np.random.default_rng(seed).choice(np.arange(40), 4, replace=False)
    parts.interrupt_at = sorted(int(stop) for stop in stops)
    for bench in (whole, parts):
        bench.constraints = ["macs <= 0.7"]
    assert whole.search(60).finished
    for _ in range(5):
        outcome = parts.search(60)
    assert outcome.finished
    assert parts.story() == whole.story()
    # What was ahead when a search was stopped may land earlier or later than it would have.
    assert sorted(p.digest for p in parts.scored) == sorted(p.digest for p in whole.scored)


@either_way
@every_algorithm
def test_larger_budget_later_is_the_same_with_overlap(
    folder: Path, algorithm: str, *, snapshots: bool
) -> None:
    once, later = (
        Bench(folder / n, algorithm, overlap=True, snapshots=snapshots) for n in ("once", "later")
    )
    once.search(BUDGET)
    for budget in (3, 8, 16, 21, BUDGET):
        assert later.search(budget).evaluations == budget
    assert later.story() == once.story()


@pytest.mark.parametrize("algorithm", ["nsga2", "gde3", "level-switch", "surrogate"])
def test_with_overlap_two_generations_are_asked_for_before_the_older_is_told(
    folder: Path, algorithm: str
) -> None:
    bench = Bench(folder / "run", algorithm, overlap=True)
    orders: list[tuple[list[Policy], list[Policy]]] = []
    score = bench._score

    def watching(policies: Sequence[Policy], *rest: Any) -> None:
        orders.append((list(policies), list(rest[-1])))
        score(policies, *rest)

    bench._score = watching  # type: ignore[method-assign]
    bench.search(60)
    generation: dict[str, int] = {}
    for number, digests in enumerate(bench.asks()):
        for digest in digests:
            generation.setdefault(digest, number)
    # Nothing can be bred before the first generation is told.
    assert not orders[0][1]
    assert sum(bool(ahead) for _, ahead in orders) >= len(orders) / 2
    for policies, ahead in orders[1:]:
        now = {generation[policy.digest] for policy in policies}
        assert {generation[policy.digest] for policy in ahead} <= {max(now) + 1}
    assert bench.search(60).evaluations == 60


@every_algorithm
def test_recorded_populations_do_not_depend_on_the_budget_with_overlap(
    folder: Path, algorithm: str
) -> None:
    def tied(policy: Policy) -> Measurement:
        error = round(sum(policy.keep) / 72, 1)
        metrics = dict.fromkeys(METRICS, error)
        return Measurement(policy=policy, status=Status.OK, metrics=metrics)

    once = Bench(folder / "once", algorithm, overlap=True, score=tied)
    once.search(BUDGET)
    wanted = once.populations()
    for budget in (8, 16, 24, 32):
        short = Bench(folder / f"short-{budget}", algorithm, overlap=True, score=tied)
        short.search(budget)
        found = short.populations()
        assert found == wanted[: len(found)]


def test_stop_between_two_generations_records_what_was_sent_ahead(folder: Path) -> None:
    sent: list[Policy] = []

    class Cluster:
        """Begins what is ahead at once, and lands it in a later call."""

        def __init__(self) -> None:
            self.flying: list[Policy] = []

        def score(
            self,
            policies: Sequence[Policy],
            record: Callable[[Measurement], None],
            stop: Callable[[], bool],
            _races: Races,
            ahead: Sequence[Policy],
        ) -> None:
            fresh = [] if stop() else [p for p in policies if p not in self.flying]
            landing = self.flying + fresh
            self.flying = []
            sent.extend(fresh)
            for policy in landing:
                record(formula(policy))
            if not stop():
                self.flying = [p for p in list(ahead)[:3] if p not in landing]
                sent.extend(self.flying)

    cluster = Cluster()
    bench = Bench(folder / "run", overlap=True)
    bench._score = cluster.score  # type: ignore[method-assign]
    told = Search._raise_bar
    generations = 0

    def stopping(*arguments: Any) -> None:
        nonlocal generations
        generations += 1
        bench._stopping = generations == 3
        told(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_raise_bar", stopping)
        assert bench.search(200).reason == "stopped"
    assert cluster.flying == []
    assert set(bench.measured()) == set(sent)


def test_with_overlap_and_races_a_search_is_resumed_the_same(folder: Path) -> None:
    whole, parts = (Bench(folder / n, overlap=True, racing=0.1) for n in ("whole", "parts"))
    parts.interrupt_at = [7, 20, 33, 61]
    whole.search(120)
    for _ in range(5):
        parts.search(120)
    assert parts.story() == whole.story()
    assert len(whole.dropped()) > 10
