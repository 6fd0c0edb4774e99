"""A search that goes on, replayed or from a snapshot, ends as if it had never been stopped."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evosearch.algorithms.evolution import Evolution
from evosearch.errors import ReplayMismatch
from evosearch.ledger import Ledger, Snapshot
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.search import SEARCH
from evosearch.testing import chain_table
from tests.unit.search_bench import BUDGET, TABLE, Bench, either_way, every_algorithm, formula


@either_way
@every_algorithm
@pytest.mark.parametrize("seed", range(3))
def test_stopped_search_ends_as_if_never_stopped(
    folder: Path, algorithm: str, seed: int, *, snapshots: bool
) -> None:
    whole, parts = (Bench(folder / n, algorithm, snapshots=snapshots) for n in ("whole", "parts"))
    stops = np.random.default_rng(seed).choice(np.arange(20), 4, replace=False)
    parts.interrupt_at = sorted(int(stop) for stop in stops)
    for bench in (whole, parts):
        bench.constraints = ["macs <= 0.6", "error <= 0.2"]
    assert whole.search().finished
    outcomes = [parts.search() for _ in range(5)]
    assert [outcome.finished for outcome in outcomes] == [False] * 4 + [True]
    assert parts.story() == whole.story()
    assert parts.scored == whole.scored


@either_way
@every_algorithm
@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "overlapping"])
def test_killed_search_ends_as_if_never_killed(
    folder: Path, algorithm: str, *, snapshots: bool, overlap: bool
) -> None:
    whole, killed = (
        Bench(folder / n, algorithm, snapshots=snapshots, overlap=overlap)
        for n in ("whole", "killed")
    )
    whole.search()
    for deaths_at in (0, 5, 17, 18, 39):

        def dying(policy: Policy, limit: int = deaths_at) -> Measurement:
            if len(killed.scored) > limit:
                killed.scored.pop()
                raise KeyboardInterrupt("killed")
            return formula(policy)

        killed.score = dying
        with pytest.raises(KeyboardInterrupt, match="killed"):
            killed.search()
    killed.score = formula
    killed.search()
    assert killed.story() == whole.story()


@either_way
@every_algorithm
def test_larger_budget_later_is_a_larger_budget_at_once(
    folder: Path, algorithm: str, *, snapshots: bool
) -> None:
    once, later = (Bench(folder / n, algorithm, snapshots=snapshots) for n in ("once", "later"))
    once.search(BUDGET)
    for budget in (3, 8, 21, BUDGET):
        assert later.search(budget).evaluations == budget
    assert later.story() == once.story()


@every_algorithm
def test_finished_search_run_again_scores_nothing(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm)
    first, before = bench.search(), bench.story()
    bench.scored.clear()
    assert bench.search() == first
    assert bench.scored == []
    assert bench.story() == before


def test_replay_does_not_ask_whether_to_stop(bench: Bench) -> None:
    bench.search()
    bench.scored.clear()
    bench.interrupt_at = [0]
    assert bench.search().finished


def test_failure_replays_as_the_failure_it_was(bench: Bench) -> None:
    bench.interrupt_at = [20]
    bench.search()
    failures = bench.failures()
    bench.scored.clear()
    bench.search()
    assert failures
    assert not set(bench.scored) & set(failures)
    assert {e.policy: e.measurement for e in bench.entries() if e.policy in failures} == failures


def test_other_asks_than_the_recorded_ones_are_a_mismatch(bench: Bench) -> None:
    with bench.ledger(write=True) as ledger:
        policy = TABLE.dense
        ledger.record_ask(SEARCH, 0, [policy], [TABLE.dense_costs])
    sentence = r"generation 0 asks for other policies .*--seed-from .*run"
    with pytest.raises(ReplayMismatch, match=sentence):
        bench.search()
    assert bench.scored == []


def test_another_algorithm_over_the_same_ledger_is_a_mismatch(bench: Bench) -> None:
    bench.search()
    bench.algorithm = "nsde"
    with pytest.raises(ReplayMismatch, match=r"generation \d asks for other policies"):
        bench.search()


def test_a_search_that_found_nothing_more_does_not_ask_again_than_it_did(folder: Path) -> None:
    bench = Bench(folder / "run", "nsga2", table=chain_table([2, 3]))
    bench.score = lambda policy: formula(policy, bench.table)
    bench.options = {"sparsity": [0.0, 1.0]}
    bench.search(1000)
    before = bench.asks()
    assert bench.search(2000).finished
    assert bench.asks() == before


def asks_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the algorithm is asked when a finished search is continued by one policy."""
    asks = 0
    ask = Evolution.ask

    def counting(algorithm: Evolution) -> Any:
        nonlocal asks
        asks += 1
        return ask(algorithm)

    monkeypatch.setattr(Evolution, "ask", counting)
    bench.search(BUDGET + 1)
    return asks


def test_a_snapshot_spares_breeding_what_was_asked_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.search()
    assert asks_of(bench, monkeypatch) <= 1 < len(bench.asks()) - 1


def test_a_snapshot_with_another_stamp_is_not_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.search()
    with closing(sqlite3.connect(bench.run / "ledger.sqlite")) as db:
        db.execute("UPDATE snapshots SET stamp = 'of other libraries'")
        db.commit()
    assert asks_of(bench, monkeypatch) == len(bench.asks())


def test_a_run_without_a_snapshot_is_replayed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.search()
    with closing(sqlite3.connect(bench.run / "ledger.sqlite")) as db:
        db.execute("DROP TABLE snapshots")  # as an earlier evosearch left it
    assert asks_of(bench, monkeypatch) == len(bench.asks())


def test_a_damaged_snapshot_is_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.search()
    with closing(sqlite3.connect(bench.run / "ledger.sqlite")) as db:
        db.execute("UPDATE snapshots SET state = substr(state, 1, 100)")
        db.commit()
    assert asks_of(bench, monkeypatch) == len(bench.asks())


@pytest.mark.parametrize("overlap", [False, True])
def test_each_generation_leaves_a_snapshot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, overlap: bool
) -> None:
    kept = []
    keep = Ledger.keep_snapshot

    def noting(ledger: Ledger, track: str, snapshot: Snapshot) -> None:
        kept.append(snapshot.generation)
        keep(ledger, track, snapshot)

    monkeypatch.setattr(Ledger, "keep_snapshot", noting)
    bench.overlap = overlap
    bench.search()
    assert kept == list(range(1, len(bench.populations()) + 1))
    assert len(kept) >= 4
