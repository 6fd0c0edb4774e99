"""What a ledger says about its run: checked when read, compared before anything is added."""

import re
from pathlib import Path
from typing import Any

import pytest

from evosearch.errors import ConfigMismatch, LedgerCorrupt
from evosearch.facts import check_same, read_facts
from evosearch.ledger import Ledger
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy
from evosearch.recipe import check_recipe
from evosearch.results.front import read_results
from evosearch.search import BASELINE, SEARCH
from evosearch.status import read_status

RECIPE = {
    "network": {"name": "resnet20"},
    "data": {"calibration": 100, "validation": 1000},
    "search": {"constraints": ["macs <= 0.6"], "baseline": 2},
    "run": {"workers": 2},
}
FACTS: dict[str, Any] = {
    "recipe": check_recipe(RECIPE, "a test").model_dump(mode="json"),
    "groups": [["conv1", 16], ["conv2", 32]],
    "dense_macs": 1000,
    "dense_params": 500,
    "dense_error": 0.1,
    "worst": {"error": 0.9, "loss": 2.3, "margin": 1.0, "divergence": 2.0, "distortion": 1.0},
    "outputs": [[5.0, -3.0], [0.5, 0.0]],
    "images": {"calibration": "aa", "validation": "bb"},
    "weights": "cc",
    "channel_order": "dd",
    "versions": {"torch": "2.11.0", "numpy": "2.0.0"},
    "seeds": [],
    "evaluations": 3,
    "state": "running",
}
# What is known now is more than what must be recorded.
NOW = {**FACTS, "criteria": None}


@pytest.mark.parametrize("missing", list(FACTS))
def test_a_missing_fact_is_named(tmp_path: Path, missing: str) -> None:
    kept = {name: value for name, value in FACTS.items() if name != missing}
    with (
        Ledger.create(tmp_path, kept) as ledger,
        pytest.raises(LedgerCorrupt, match=rf"ledger.sqlite is damaged .*\({missing}: missing\)"),
    ):
        read_facts(ledger)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("recipe", None),
        ("recipe", {"network": {"nome": "resnet20"}}),
        ("groups", 3),
        ("groups", [["conv1", 0]]),
        ("groups", [["conv1"]]),
        ("dense_macs", "many"),
        ("dense_error", None),
        ("worst", {"error": 0.9}),
        ("images", []),
        ("versions", None),
        ("seeds", [["x"]]),
        ("evaluations", "all"),
        ("evaluations", 2.5),
        ("state", "asleep"),
    ],
)
def test_a_fact_of_the_wrong_kind_is_named(tmp_path: Path, fact: str, value: object) -> None:
    with (
        Ledger.create(tmp_path, {**FACTS, fact: value}) as ledger,
        pytest.raises(LedgerCorrupt, match=rf"is damaged .*{fact}.*restore it from a copy"),
    ):
        read_results(ledger)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weights": "ee"}, "the network's weights"),
        ({"images": {"calibration": "aa", "validation": "ee"}}, "the images"),
        ({"groups": [["conv1", 16]]}, "the network's groups"),
        ({"dense_macs": 1001}, "how the network's MACs are counted"),
        ({"dense_error": 0.11}, "the dense network's error"),
        ({"outputs": [[5.0, -3.0], [0.5, 0.001]]}, "what the dense network puts out"),
        ({"outputs": [[5.0], [0.5]]}, "what the dense network puts out"),
        ({"worst": {**FACTS["worst"], "divergence": 1.9}}, "how sure the dense network is"),
        ({"channel_order": "ee"}, "the order in which channels go"),
    ],
)
def test_another_network_is_told_apart(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with Ledger.create(tmp_path, FACTS) as ledger:
        recorded = read_facts(ledger)
    (key,) = change
    with pytest.raises(ConfigMismatch, match=rf"{what} changed since .*\({key}: .* then, .* now"):
        check_same(recorded, {**NOW, **change}, tmp_path)


def test_rounding_of_another_machine_is_the_same_network(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, FACTS) as ledger:
        recorded = read_facts(ledger)
    worst = {**FACTS["worst"], "divergence": 2.0 + 1e-6}
    now = {**NOW, "dense_error": 0.101, "worst": worst, "outputs": [[5.0, -3.0], [0.5, 1e-5]]}
    check_same(recorded, now, tmp_path)


def test_a_mismatch_names_the_libraries_that_changed(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, FACTS) as ledger:
        recorded = read_facts(ledger)
    now = {**NOW, "weights": "ee", "versions": {"torch": "2.12.0", "numpy": "2.0.0"}}
    with pytest.raises(ConfigMismatch, match=re.escape("libraries: torch 2.11.0 then, 2.12.0 now")):
        check_same(recorded, now, tmp_path)


def entry(ledger: Ledger, track: str, policies: list[tuple[int, int]], macs: list[int]) -> None:
    costs = [(cost, cost // 2) for cost in macs]
    ledger.record_ask(track, 0, [Policy(keep) for keep in policies], costs)


def measure(ledger: Ledger, keep: tuple[int, int], error: float, at: float) -> None:
    metrics = dict.fromkeys(METRICS, error)
    measurement = Measurement(policy=Policy(keep), status=Status.OK, metrics=metrics, seconds=3.0)
    ledger.record(measurement, at)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A search of three that asked for five, one of them over budget; the ladder did the rest."""
    asked = [(1, 1), (2, 2), (9, 9), (3, 3), (4, 4)]
    with Ledger.create(tmp_path, FACTS) as ledger:
        entry(ledger, SEARCH, asked, [100, 200, 900, 300, 400])
        for moment, keep in enumerate([(1, 1), (2, 2), (3, 3)]):
            measure(ledger, keep, 0.5, 10_000.0 * moment)
        entry(ledger, BASELINE, [(4, 4), (1, 1)], [400, 100])
        measure(ledger, (4, 4), 0.01, 90_000.0)
    return tmp_path


def test_a_search_is_credited_with_what_it_paid_for(run: Path) -> None:
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
    assert [row.policy.keep for row in results.rows] == [(1, 1), (2, 2), (3, 3)]
    assert [row.policy.keep for row in results.baseline] == [(4, 4), (1, 1)]
    assert results.hypervolume() < results.baseline_hypervolume()
    assert read_status(run)["evaluations"] == 3


def test_seconds_are_those_of_searching(run: Path) -> None:
    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("evaluations", 6)
    status = read_status(run)
    # Four of six are paid now, of three seconds each, by two workers.
    assert status["evaluations"] == 4
    assert status["elapsed_seconds"] == pytest.approx(6.0)
    assert status["seconds_left"] == pytest.approx(3.0)


def test_seconds_are_shared_among_those_who_score_now(run: Path) -> None:
    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("evaluations", 6)
        ledger.set_meta("resumed_with_workers", 1)
    status = read_status(run)
    assert status["elapsed_seconds"] == pytest.approx(12.0)
    assert status["seconds_left"] == pytest.approx(6.0)


def test_nothing_is_left_of_a_finished_run(run: Path) -> None:
    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("evaluations", 6)
        ledger.set_meta("state", "finished")
    assert read_status(run)["seconds_left"] == 0


def test_a_run_that_nobody_holds_was_killed(run: Path) -> None:
    assert read_status(run)["state"] == "killed"
