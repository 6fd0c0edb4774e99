"""Searches that drop candidates early."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evosearch.algorithms import Algorithm, make_algorithm
from evosearch.scoring.racing import Races
from evosearch.search import BASELINE
from tests.unit import search_bench
from tests.unit.search_bench import Bench, every_algorithm, formula


@every_algorithm
@pytest.mark.parametrize("seed", range(2))
def test_stopped_search_with_races_ends_as_if_never_stopped(
    folder: Path, algorithm: str, seed: int
) -> None:
    whole, parts = (Bench(folder / name, algorithm, racing=0.1) for name in ("whole", "parts"))
    stops = np.random.default_rng(seed).choice(np.arange(60), 4, replace=False)
    parts.interrupt_at = sorted(int(stop) for stop in stops)
    assert whole.search(80).finished
    for _ in range(5):
        parts.search(80)
    assert parts.story() == whole.story()
    assert parts.scored == whole.scored
    # A ladder of uniform ratios is asked for at once: nothing is known that could beat a rung.
    assert bool(whole.dropped()) == (len(whole.asks()) > 1)


def test_whoever_is_dropped_is_dominated_by_what_was_told_before(bench: Bench) -> None:
    bench.racing = 0.1
    bench.search(120)
    entries = [e for e in bench.entries() if e.measurement and not e.measurement.failed]
    names = {entry.policy.digest: entry for entry in entries}
    assert len(bench.dropped()) > 20
    for entry in bench.dropped():
        assert entry.measurement is not None
        assert entry.measurement.reason is not None
        rival = names[entry.measurement.reason.removeprefix("worse than ")]
        assert rival.measurement is not None
        assert rival.measurement.ok
        assert rival.macs <= entry.macs
        assert rival.measurement.metrics["error"] < entry.measurement.metrics["error"]


def test_first_generation_is_shown_everything(bench: Bench) -> None:
    bench.racing = 0.1
    bench.search(120)
    first = set(bench.asks()[0])
    assert not first & {entry.policy.digest for entry in bench.dropped()}


def test_ladder_beside_a_search_with_races_is_measured_in_full(bench: Bench) -> None:
    bench.racing = 0.1
    bench.search(120)
    lost = {entry.policy for entry in bench.dropped()}
    # Asks again for some that the search asked for, as a ladder may.
    bench.racing, bench.track = 0.0, BASELINE
    bench.search(120)
    again = [e.measurement for e in bench.entries() if e.policy in lost]
    assert again
    assert all(found is not None and not found.blocks and found.ok for found in again)


def test_who_is_dropped_is_told_as_worse_and_not_as_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def listening(*arguments: Any, **named: Any) -> Algorithm:
        algorithm = make_algorithm(*arguments, **named)
        tell = algorithm.tell

        def noting(objectives: Any, violations: Any) -> None:
            told.append(np.column_stack([objectives, violations]))
            tell(objectives, violations)

        algorithm.tell = noting  # type: ignore[method-assign]
        return algorithm

    monkeypatch.setattr(search_bench, "make_algorithm", listening)
    bench.racing = 0.1
    bench.search(120)
    landed = {e.policy.digest: e.measurement for e in bench.entries() if e.measurement}
    asked = [digest for generation in bench.asks() for digest in generation]
    rows = dict(zip(asked, np.concatenate(told), strict=False))
    dropped = [entry.policy.digest for entry in bench.dropped()]
    assert len(set(dropped) & set(rows)) > 20
    for digest, (error, _, failure) in rows.items():
        measurement = landed[digest]
        assert (failure > 0) == measurement.failed
        assert measurement.failed or error == measurement.metrics["error"]


def test_a_ladder_races_against_nobody_where_the_search_does(bench: Bench) -> None:
    seen: list[Races] = []

    def score(policies: Any, record: Any, _stop: Any, races: Races, _ahead: Any) -> None:
        seen.append(races)
        for policy in policies:
            record(formula(policy))

    bench._score = score  # type: ignore[method-assign]
    bench.algorithm, bench.track, bench.racing = "uniform", BASELINE, 0.1
    bench.search(12)
    assert seen
    assert not any(seen)
    # As measurements, which the run's tables and plots read.
    assert len(bench.measured()) == 12
