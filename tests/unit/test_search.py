"""The loop over a real ledger. Scoring is a formula here: scorers have tests of their own."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from evosearch.algorithms import ALGORITHMS, AlgorithmSettings, make_algorithm
from evosearch.algorithms.evolution import Evolution
from evosearch.errors import ReplayMismatch
from evosearch.ledger import Entry, Ledger, Member, Snapshot
from evosearch.measurement import METRICS, Measurement, Status, Terms
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.scoring.objectives import Constraint, Goals
from evosearch.scoring.racing import Race, Races, block_means
from evosearch.search import BASELINE, SEARCH, Outcome, Scoring, Search
from evosearch.testing import chain_table
from search_spaces.layer_sparsity import LayerSparsity

WORST = {"error": 0.9, "loss": 2.3, "margin": 1.0, "divergence": 2.0, "distortion": 1.0}
TABLE = chain_table((16, 24, 32))
BUDGET = 40


def formula(policy: Policy, table: GroupTable = TABLE) -> Measurement:
    """The first group matters most; every seventh policy cannot be scored."""
    if sum(policy.keep) % 7 == 0:
        return Measurement(policy=policy, status=Status.FAILED, reason="divisible by seven")
    removed = 1 - np.array(policy.keep) / table.channels
    error = float((removed**2 / np.arange(1, len(removed) + 1)).mean())
    metrics = dict.fromkeys(METRICS, error)
    return Measurement(policy=policy, status=Status.OK, metrics=metrics, seconds=0.25)


N_IMAGES = 640


def raced(policy: Policy, race: Race, table: GroupTable = TABLE) -> Measurement:
    """As `formula`, but of images that differ, and looked at after 64, 128 and 256 of them."""
    whole = formula(policy, table)
    if whole.failed:
        return whole
    rng = np.random.default_rng(sum(policy.keep))
    noise = rng.lognormal(sigma=0.3, size=(N_IMAGES, 4))
    noise = np.concatenate([noise, noise[:, : len(METRICS) - 4]], axis=1)
    difficulty = np.random.default_rng(0).lognormal(size=(N_IMAGES, 1))
    values = whole.metrics["error"] * noise * difficulty
    for seen in (64, 128, 256):
        estimate = race.verdict(values[:seen], N_IMAGES, 3)
        if estimate:
            return Measurement(
                policy=policy,
                status=Status.DROPPED,
                metrics=estimate.metrics,
                images=seen,
                reason=f"worse than {estimate.rival}",
            )
    return Measurement(
        policy=policy,
        status=Status.OK,
        metrics=dict(zip(METRICS, values.mean(axis=0).tolist(), strict=True)),
        images=N_IMAGES,
        blocks=block_means(values, N_IMAGES).tobytes(),
    )


@dataclass
class Bench:
    """A search that can be started again and again over one ledger.

    Args:
        run: Directory of the ledger.
        algorithm: Name.
        constraints: Texts.
        table: The network.
        scored: Every policy in the order in which it was scored.
        interrupt_at: Counts of measurements at which `stop` becomes true, once each.
        racing: Error rate of races; those are run on numbers like those of images.
        overlap: Whether generations overlap.
        snapshots: Whether each generation leaves one.
    """

    run: Path
    algorithm: str = "nsga2"
    constraints: Sequence[str] = ()
    table: GroupTable = field(default_factory=lambda: TABLE)
    track: str = SEARCH
    population: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    score: Callable[[Policy], Measurement] = formula
    scored: list[Policy] = field(default_factory=list)
    interrupt_at: list[int] = field(default_factory=list)
    racing: float = 0.0
    overlap: bool = False
    snapshots: bool = True
    _stopping: bool = False

    def _stop(self) -> bool:
        if self.interrupt_at and len(self.scored) >= self.interrupt_at[0]:
            self.interrupt_at.pop(0)
            self._stopping = True
        return self._stopping

    def _score(
        self,
        policies: Sequence[Policy],
        record: Callable[[Measurement], None],
        stop: Callable[[], bool],
        races: Races,
        ahead: Sequence[Policy],
    ) -> None:
        assert set(races) >= (set(policies) if self.racing else set())
        assert bool(races) == (self.racing > 0)
        # What is ahead lands among the others, as it may on a cluster.
        others = list(ahead)
        for number, policy in enumerate(policies):
            if stop():
                return
            chosen = [policy, others.pop(0)] if others and number % 3 == 1 else [policy]
            for each in chosen:
                self.scored.append(each)
                record(raced(each, races[each]) if races else self.score(each))

    def search(
        self,
        evaluations: int = BUDGET,
        on_landing: Callable[[Measurement, int], None] | None = None,
    ) -> Outcome:
        """A new Search over the same ledger, as a launch or a resume makes it."""
        self._stopping = False
        space = LayerSparsity(self.table, self.options)
        single = ALGORITHMS[self.algorithm].single_objective
        goals = Goals(
            objectives=("error",) if single else ("error", "macs"),
            constraints=tuple(map(Constraint.parse, self.constraints)),
        )
        algorithm = make_algorithm(
            AlgorithmSettings(name=self.algorithm, population=self.population, seed=3, options={}),
            space,
            len(goals.objectives),
            len(goals.constraints) + 1,
        )
        scoring = Scoring(
            table=self.table,
            goals=goals,
            worst=WORST,
            score=self._score,
            stop=self._stop,
            clock=lambda: 0.0,
            racing=self.racing,
            overlap=self.overlap,
            snapshots=f"of {self.algorithm}" if self.snapshots else "",
            snapshot_every_s=0.0,
        )
        with self.ledger(write=True) as ledger:
            search = Search(space, algorithm, scoring, ledger, self.track)
            return search.run(evaluations, on_landing)

    def ledger(self, *, write: bool = False) -> Ledger:
        """The ledger, made at first use."""
        self.run.mkdir(exist_ok=True)
        if write and not (self.run / "ledger.sqlite").exists():
            return Ledger.create(self.run, {})
        return Ledger.open(self.run, write=write)

    def entries(self, track: str | None = None) -> list[Entry]:
        with self.ledger() as ledger:
            track = track or self.track
            raced = self.racing > 0 and track == SEARCH
            return ledger.entries(track, terms=Terms.RACED if raced else Terms.FULL)

    def asks(self) -> list[list[str]]:
        with self.ledger() as ledger:
            return list(_until_empty(lambda generation: ledger.asked(self.track, generation)))

    def populations(self) -> list[list[Member]]:
        with self.ledger() as ledger:
            return list(_until_empty(ledger.population))

    def measured(self) -> list[Policy]:
        return [entry.policy for entry in self.entries() if entry.measurement]

    def story(self) -> tuple[list[Entry], list[list[str]], list[list[Member]]]:
        """All that a search leaves behind, except for the order of landing."""
        return self.entries(), self.asks(), self.populations()


def _until_empty(read: Callable[[int], list[Any]]) -> Iterator[list[Any]]:
    generation = 0
    while found := read(generation):
        yield found
        generation += 1


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system can: durability is what test_ledger tests."""
    shared = Path("/dev/shm")
    where = shared if os.access(shared, os.W_OK) else tmp_path
    with TemporaryDirectory(dir=where) as path:
        yield Path(path)


@pytest.fixture
def bench(folder: Path) -> Bench:
    return Bench(folder / "run")


every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@every_algorithm
def test_budget_counts_distinct_policies(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm)
    outcome = bench.search(30)
    assert outcome == Outcome(evaluations=30, finished=True, reason="the budget is spent")
    assert len(set(bench.measured())) == len(bench.measured()) == 30


@every_algorithm
def test_no_policy_is_scored_twice(folder: Path, algorithm: str) -> None:
    # Widths in steps of eight: most genomes are policies that are known already.
    bench = Bench(folder / "run", algorithm, options={"round_to": 8})
    bench.search(20)
    assert len(set(bench.scored)) == len(bench.scored) > 0
    asked = [digest for generation in bench.asks() for digest in generation]
    assert set(asked) >= {policy.digest for policy in bench.scored}


def test_policy_asked_twice_at_once_is_scored_once(bench: Bench) -> None:
    bench.options, bench.algorithm = {"sparsity": [0.5, 0.5]}, "nsde"
    bench.search()
    assert bench.scored == [Policy((8, 12, 16))]
    assert bench.asks()[0] == [bench.scored[0].digest] * bench.population


@every_algorithm
def test_unaffordable_policies_are_never_scored(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm, constraints=["macs <= 0.4", "params <= 0.6"])
    bench.search(15)
    macs, params = TABLE.costs_of(bench.scored)
    assert len(bench.scored) == 15
    assert (macs <= 0.4 * TABLE.dense_costs[0]).all()
    assert (params <= 0.6 * TABLE.dense_costs[1]).all()


def test_unaffordable_policies_are_asked_and_cost_nothing(bench: Bench) -> None:
    bench.constraints = ["macs <= 0.3"]
    bench.search(20)
    dear = [entry for entry in bench.entries() if entry.macs > 0.3 * TABLE.dense_costs[0]]
    assert dear
    assert all(entry.measurement is None for entry in dear)
    assert len(bench.measured()) == 20


def test_constraints_on_metrics_do_not_keep_a_policy_from_being_scored(bench: Bench) -> None:
    bench.constraints = ["error <= 0.0001"]
    assert bench.search(20).evaluations == len(bench.scored) == 20


def test_most_expensive_policy_of_a_generation_goes_first(bench: Bench) -> None:
    bench.search(8)
    macs, _ = TABLE.costs_of(bench.scored)
    assert len(bench.scored) == 8
    assert macs.tolist() == sorted(macs, reverse=True)


def test_landing_is_reported_with_the_count_so_far(bench: Bench) -> None:
    seen = []
    bench.search(11, lambda measurement, count: seen.append((measurement.policy, count)))
    assert seen == [(policy, count) for count, policy in enumerate(bench.scored, start=1)]


either_way = pytest.mark.parametrize("snapshots", [False, True], ids=["replayed", "restored"])


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


def test_a_search_that_found_nothing_more_does_not_ask_again_than_it_did(folder: Path) -> None:
    bench = Bench(folder / "run", "nsga2", table=chain_table([2, 3]))
    bench.score = lambda policy: formula(policy, bench.table)
    bench.options = {"sparsity": [0.0, 1.0]}
    bench.search(1000)
    before = bench.asks()
    assert bench.search(2000).finished
    assert bench.asks() == before


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


def test_stop_is_an_outcome_that_is_not_finished(bench: Bench) -> None:
    bench.interrupt_at = [11]
    assert bench.search() == Outcome(evaluations=11, finished=False, reason="stopped")
    assert len(bench.measured()) == 11


def test_search_that_is_stopped_before_it_begins_scores_nothing(bench: Bench) -> None:
    bench.interrupt_at = [0]
    assert bench.search() == Outcome(evaluations=0, finished=False, reason="stopped")
    assert bench.scored == []


def test_stop_after_the_last_measurement_is_a_finished_search(bench: Bench) -> None:
    bench.interrupt_at = [BUDGET]
    assert bench.search().finished


def test_replay_does_not_ask_whether_to_stop(bench: Bench) -> None:
    bench.search()
    bench.scored.clear()
    bench.interrupt_at = [0]
    assert bench.search().finished


def test_failure_replays_as_the_failure_it_was(bench: Bench) -> None:
    bench.interrupt_at = [20]
    bench.search()
    failures = {e.policy: e.measurement for e in bench.entries() if not _ok(e)}
    bench.scored.clear()
    bench.search()
    assert failures
    assert not set(bench.scored) & set(failures)
    assert {e.policy: e.measurement for e in bench.entries() if e.policy in failures} == failures


def _ok(entry: Entry) -> bool:
    return entry.measurement is None or entry.measurement.ok


@every_algorithm
def test_search_goes_on_when_every_candidate_fails(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm)
    bench.score = lambda policy: Measurement(
        policy=policy, status=Status.WORKER_LOST, reason="gone"
    )
    assert bench.search(30).evaluations == 30


@pytest.mark.parametrize("constraint", ["error <= 0.01", "error <= 0.00001"])
@pytest.mark.parametrize("algorithm", ["nsga2", "gde3", "nsde"])
def test_failures_are_ranked_behind_everything_else(
    folder: Path, algorithm: str, constraint: str
) -> None:
    bench = Bench(folder / "run", algorithm, constraints=[constraint])
    bench.search()
    failed = {entry.policy for entry in bench.entries() if not _ok(entry)}
    assert failed
    for members in bench.populations():
        worst = max(m.rank for m in members if m.policy not in failed)
        assert all(m.rank > worst for m in members if m.policy in failed)


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


@every_algorithm
def test_exhausted_space_ends_the_search(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm, table=chain_table([2, 3]))
    bench.population = ALGORITHMS[algorithm].min_population
    bench.score = lambda policy: formula(policy, bench.table)
    bench.options = {"sparsity": [0.0, 1.0]}
    outcome = bench.search(1000)
    ends = ("the algorithm has nothing more to ask", "no new policy in 200 generations")
    assert outcome.finished
    assert outcome.reason in ends
    assert outcome.evaluations == len(bench.scored) <= 6
    assert algorithm != "random" or outcome.evaluations == 6


def test_space_without_an_affordable_policy_ends_the_search(bench: Bench) -> None:
    bench.constraints = ["macs <= 0.0001"]
    outcome = bench.search()
    assert (outcome.evaluations, outcome.finished) == (0, True)
    assert outcome.reason == "no new policy in 200 generations"


def test_baseline_has_a_track_of_its_own(bench: Bench) -> None:
    bench.search()
    before = bench.story()
    baseline = Bench(bench.run, "uniform", track=BASELINE)
    assert baseline.search(12).evaluations == len(baseline.measured()) == 12
    assert bench.story() == before
    assert baseline.asks()[0] == [policy.digest for policy in _ladder(baseline.population)]


def _ladder(n: int) -> list[Policy]:
    space = LayerSparsity(TABLE, {})
    return space.decode(space.ladder(n))


def test_baseline_pays_nothing_for_what_the_search_knows(bench: Bench) -> None:
    bench.search()
    baseline = Bench(bench.run, "uniform", track=BASELINE)
    outcome = baseline.search(12)
    shared = set(bench.scored) & set(_ladder(12))
    assert shared
    assert outcome.evaluations == 12
    assert len(baseline.scored) == 12 - len(shared)


def test_search_pays_nothing_for_what_the_baseline_knows(folder: Path) -> None:
    alone, after = Bench(folder / "alone"), Bench(folder / "after")
    Bench(after.run, "uniform", track=BASELINE).search(12)
    alone.search()
    after.search()
    assert after.story() == alone.story()
    assert len(after.scored) < len(alone.scored)


def test_uniform_ladder_ends_when_it_is_out_of_rungs(folder: Path) -> None:
    bench = Bench(folder / "run", "uniform")
    outcome = bench.search(10_000)
    assert outcome.reason == "the algorithm has nothing more to ask"
    assert bench.measured() == _ladder(10_000)


# --- races


def dropped(bench: Bench) -> list[Entry]:
    return [
        entry
        for entry in bench.entries()
        if entry.measurement and entry.measurement.status is Status.DROPPED
    ]


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
    assert bool(dropped(whole)) == (len(whole.asks()) > 1)


def test_whoever_is_dropped_is_dominated_by_what_was_told_before(bench: Bench) -> None:
    bench.racing = 0.1
    bench.search(120)
    entries = [e for e in bench.entries() if e.measurement and not e.measurement.failed]
    names = {entry.policy.digest: entry for entry in entries}
    assert len(dropped(bench)) > 20
    for entry in dropped(bench):
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
    assert not first & {entry.policy.digest for entry in dropped(bench)}


def test_ladder_beside_a_search_with_races_is_measured_in_full(bench: Bench) -> None:
    bench.racing = 0.1
    bench.search(120)
    lost = {entry.policy for entry in dropped(bench)}
    # Asks again for some that the search asked for, as a ladder may.
    bench.racing, bench.track = 0.0, BASELINE
    bench.search(120)
    again = [e.measurement for e in bench.entries() if e.policy in lost]
    assert again
    assert all(found is not None and not found.blocks and found.ok for found in again)


# --- overlapping generations


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
    assert len(dropped(whole)) > 10
