"""The loop: what is asked for, scored and told, and when it ends."""

from pathlib import Path

import pytest

from evosearch.algorithms import ALGORITHMS
from evosearch.measurement import Measurement, Status
from evosearch.policy import Policy
from evosearch.search import BASELINE, Outcome
from evosearch.testing import chain_table
from search_spaces.layer_sparsity import LayerSparsity
from tests.unit.search_bench import BUDGET, TABLE, Bench, every_algorithm, formula


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


@every_algorithm
def test_search_goes_on_when_every_candidate_fails(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm)
    bench.score = lambda policy: Measurement(
        policy=policy, status=Status.WORKER_LOST, reason="gone"
    )
    assert bench.search(30).evaluations == 30


@pytest.mark.parametrize("bound", ["0.01", "0.00001", "0.0000000001"])
@pytest.mark.parametrize("algorithm", ["nsga2", "gde3", "nsde"])
def test_failures_are_ranked_behind_everything_else(
    folder: Path, algorithm: str, bound: str
) -> None:
    bench = Bench(folder / "run", algorithm, constraints=[f"error <= {bound}"])
    bench.search()
    failed = bench.failures()
    assert failed
    for members in bench.populations():
        worst = max(m.rank for m in members if m.policy not in failed)
        assert all(m.rank > worst for m in members if m.policy in failed)


@every_algorithm
def test_exhausted_space_ends_the_search(folder: Path, algorithm: str) -> None:
    bench = Bench(folder / "run", algorithm, table=chain_table([2, 3]))
    bench.population = ALGORITHMS[algorithm].min_population
    bench.score = lambda policy: formula(policy, bench.table)
    bench.options = {"sparsity": [0.0, 1.0]}
    outcome = bench.search(1000)
    ends = (
        "the algorithm has nothing more to ask",
        "no new policy in 200 generations",
        f"all {outcome.evaluations} affordable policies are measured",
    )
    assert outcome.finished
    assert outcome.reason in ends
    assert outcome.evaluations == len(bench.scored) <= 6
    assert algorithm != "random" or outcome.evaluations == 6


@pytest.mark.parametrize(
    ("constraints", "there_are"), [((), 6), (("macs <= 0.6",), 3)], ids=["all", "affordable"]
)
def test_space_of_which_all_is_measured_is_not_asked_for_long(
    folder: Path, constraints: tuple[str, ...], there_are: int
) -> None:
    bench = Bench(folder / "run", "surrogate", table=chain_table([2, 3]))
    bench.score = lambda policy: formula(policy, bench.table)
    bench.options = {"sparsity": [0.0, 1.0]}
    bench.constraints = list(constraints)
    outcome = bench.search(1000)
    assert outcome.finished
    assert outcome.evaluations == there_are
    assert outcome.reason == f"all {there_are} affordable policies are measured"
    assert len(bench.asks()) <= there_are + 9


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


def test_a_long_search_ends_when_its_budget_is_spent(folder: Path) -> None:
    """Two hundred generations in a row without a new policy end it, not two hundred of any."""
    bench = Bench(folder / "run", "random", population=2, snapshots=False)
    outcome = bench.search(450)
    assert len(bench.asks()) > 200
    assert (outcome.evaluations, outcome.reason) == (450, "the budget is spent")
