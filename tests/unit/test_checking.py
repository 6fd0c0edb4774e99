"""The front on images that its search has not seen, and by the clock."""

from pathlib import Path

import numpy as np
import pytest

from evosearch.assembly import Assembled, assemble
from evosearch.checking import check_front, time_front
from evosearch.errors import DataError
from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.materials import network_and_images
from evosearch.measurement import Measurement, Terms
from evosearch.recipe import Recipe, check_recipe
from evosearch.results.front import Results, read_results
from evosearch.results.report import hypervolume_lines
from evosearch.run import launch, resume
from evosearch.scoring import timing
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import with_validation

TINY = Path(__file__).parents[1] / "integration" / "tiny.py"


class Silent:
    """Watches, and says nothing but when it is asked."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        """See Observer."""
        self.phases.append(text)

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        """See Observer."""


def recipe_of(**data: int) -> Recipe:
    return check_recipe(
        {
            "network": {
                "name": f"{TINY}:Tiny",
                "input_shape": [3, 32, 32],
                "mean": [0.49, 0.48, 0.45],
                "std": [0.25, 0.24, 0.26],
            },
            "data": {"calibration": 64, "validation": 96, **data},
            "search": {
                "objectives": ["divergence", "macs"],
                "algorithm": "nsga2",
                "population": 6,
                "evaluations": 24,
                "baseline": 3,
            },
            "proxy": {"name": "compensated"},
            "run": {"workers": 0},
        },
        "test",
    )


def of_run(run: Path) -> tuple[Results, dict[str, Measurement]]:
    with Ledger.open(run) as ledger:
        return read_results(ledger), ledger.measurements(terms=Terms.CHECK)


@pytest.fixture(scope="module")
def assembled() -> Assembled:
    return assemble(recipe_of(check=80))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("checked") / "run"
    launch(recipe_of(check=80), run, Silent())
    return run


def test_check_images_are_held_out_and_not_those_for_validation() -> None:
    _, images = network_and_images(recipe_of(validation=1100, check=900))
    shown = {image.tobytes() for image in images.validation.pixels}
    others = {image.tobytes() for image in images.check.pixels}
    assert (len(shown), len(others)) == (1100, 900)
    assert not shown & others
    trained = {image.tobytes() for image in images.calibration.pixels}
    assert not trained & others


def test_as_many_as_for_validation_or_what_is_left() -> None:
    assert len(network_and_images(recipe_of(validation=96))[1].check) == 96
    assert len(network_and_images(recipe_of(validation=1500))[1].check) == 500
    assert len(network_and_images(recipe_of(validation=2000))[1].check) == 0
    assert len(network_and_images(recipe_of(check=0))[1].check) == 0


def test_choice_of_check_images_leaves_the_validation_images_alone() -> None:
    sets = [network_and_images(recipe_of(check=n))[1] for n in (0, 80, 500)]
    assert len({images.validation.digest() for images in sets}) == 1


def test_mirrored_images_follow_those_they_mirror() -> None:
    plain = network_and_images(recipe_of(check=80))[1]
    both = network_and_images(recipe_of(check=80, mirrored=True))[1]
    for one, two in ((plain.validation, both.validation), (plain.check, both.check)):
        np.testing.assert_array_equal(two.pixels[::2], one.pixels)
        np.testing.assert_array_equal(two.pixels[1::2], one.pixels[:, :, ::-1])
        np.testing.assert_array_equal(two.labels, np.repeat(one.labels, 2))


def test_run_on_mirrored_images_is_resumed_on_the_same(tmp_path: Path) -> None:
    launch(recipe_of(check=80, mirrored=True), tmp_path / "run", Silent())
    before = of_run(tmp_path / "run")
    resume(tmp_path / "run", Silent())
    after = of_run(tmp_path / "run")
    assert after[0].rows == before[0].rows
    assert after[1] == before[1]


def test_more_check_images_than_there_are_is_said_so() -> None:
    with pytest.raises(DataError, match=r"data\.check = 1905: .* besides the 96 for validation"):
        network_and_images(recipe_of(check=1905))


def test_front_and_nothing_else_is_measured_on_the_check_images(
    finished: Path, assembled: Assembled
) -> None:
    results, checked = of_run(finished)
    assert {row.policy.digest for row in results.front} == set(checked)
    assert len(checked) > 2
    scorer = Scorer(with_validation(assembled.workload, assembled.check))
    for row in results.rows:
        wanted = scorer.score(row.policy).metrics if row.on_front else {}
        assert row.checked == wanted
        assert row.values["divergence"] != wanted.get("divergence")


def test_optimism_is_the_gap_beyond_that_of_the_dense_network(
    finished: Path, assembled: Assembled
) -> None:
    results, _ = of_run(finished)
    there = with_validation(assembled.workload, assembled.check)
    dense = float((there.dense_logits.argmax(1) != there.validation.labels).mean())
    assert results.check == (80, dense)
    gaps = [row.checked["error"] - row.values["error"] for row in results.front]
    wanted = np.mean(gaps) - (dense - results.dense["error"])
    assert results.optimism() == pytest.approx(wanted)


def test_finished_run_is_not_measured_again(finished: Path) -> None:
    before = of_run(finished)[1]
    resume(finished, Silent())
    assert of_run(finished)[1] == before


def test_larger_budget_measures_what_is_new_on_the_front(tmp_path: Path) -> None:
    recipe, run = recipe_of(check=80), tmp_path / "run"
    launch(recipe, run, Silent())
    before = of_run(run)[1]
    resume(run, Silent(), evaluations=30)
    results, after = of_run(run)
    assert before.items() <= after.items()
    assert {row.policy.digest for row in results.front} <= set(after)


def test_stopped_measuring_is_continued(finished: Path, assembled: Assembled) -> None:
    wanted = of_run(finished)[1]
    with Ledger.open(finished, write=True) as ledger:
        database = ledger._db
        database.execute("DELETE FROM measurements WHERE terms = 'check'")
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > 3

        assert not check_front(assembled, ledger, stop)
        assert 0 < len(ledger.measurements(terms=Terms.CHECK)) < len(wanted)
        assert check_front(assembled, ledger)
    found = of_run(finished)[1]
    assert {d: m.metrics for d, m in found.items()} == {d: m.metrics for d, m in wanted.items()}


@pytest.mark.parametrize("sizes", [{"check": 0}, {"validation": 2000}])
def test_run_without_check_images_says_nothing_about_them(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    launch(recipe_of(**sizes), tmp_path / "run", Silent())
    results, checked = of_run(tmp_path / "run")
    assert checked == {}
    assert results.check is None
    assert results.optimism() is None
    assert results.checked_hypervolume() is None


def timed_recipe(clock: str = f"{TINY}:weigh", *constraints: str) -> Recipe:
    """Searches for speed by a stopwatch that weighs, with any widths."""
    recipe = recipe_of(check=0).model_dump(mode="json", exclude_none=True)
    recipe["space"]["round_to"] = 1
    recipe["latency"] = {"measure": clock, "images": 2}
    recipe["search"] |= {"objectives": ["divergence", "latency"], "constraints": list(constraints)}
    return check_recipe(recipe, "test")


def test_front_is_timed_where_latency_is_foreseen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(timed_recipe(f"{TINY}:weigh_and_trip", "latency <= 0.9"), run, Silent())
    results, _ = of_run(run)
    assert len(results.front) > 1
    kept = {row.policy: row for row in results.front}
    assert all((row.timed is None) == (row.policy not in kept) for row in results.rows)
    timed = np.array([row.timed for row in results.front])
    params = np.array([row.values["params"] for row in results.front])
    # The clock's answer, and not the model's.
    ratios = timed / params
    assert np.all(np.isclose(ratios, ratios.min()) | np.isclose(ratios, 1.5 * ratios.min()))
    foreseen = np.array([row.values["latency"] for row in results.front])
    assert not np.allclose(timed, foreseen, rtol=0.01)
    assert results.slowness() == pytest.approx(np.mean(timed / foreseen) - 1)
    told = "\n".join(hypervolume_lines(results))
    assert f"{len(results.front)} networks of the front took" in told
    # What was timed once stays.
    resume(run, Silent())
    assert of_run(run)[0].rows == results.rows


def test_bound_that_the_clock_breaks_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(timed_recipe(f"{TINY}:weigh", "latency <= 0.9"), run, Silent())
    with Ledger.open(run, write=True) as ledger:
        results = read_results(ledger)
        ledger.set_meta("timed", {row.policy.digest: 0.95 for row in results.front})
    results = of_run(run)[0]
    told = hypervolume_lines(results)[-1].strip()
    assert told.startswith(f"{len(results.front)} of them more than 0.9; if that matters, search")
    less = float(told.split()[-1])
    assert less <= 0.9 / (1 + max(results.slowness() or 0, 0.01)) < less + 0.001


def test_dense_network_that_cannot_be_run_leaves_the_front_untimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    launch(timed_recipe(), run, Silent())
    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("timed", {})
    monkeypatch.setattr(timing, "_in_turns", lambda *given: np.full(len(given[3]), np.inf))
    observer = Silent()
    resume(run, observer)
    assert any("the dense network cannot be run here" in said for said in observer.phases)
    assert all(row.timed is None for row in of_run(run)[0].rows)


def test_stopped_timing_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TOGETHER", 1)
    recipe, run = timed_recipe(), tmp_path / "run"
    launch(recipe, run, Silent())
    wanted = of_run(run)[0].rows
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("timed", {})
        assembled = assemble(recipe, (), read_facts(ledger).latency)
        assert not time_front(assembled, ledger, stop)
        assert len(read_facts(ledger).timed) == 2
        assert time_front(assembled, ledger)
    assert of_run(run)[0].rows == wanted


def test_clock_that_is_gone_does_not_withhold_the_front(tmp_path: Path) -> None:
    clock, run = tmp_path / "clock.py", tmp_path / "run"
    clock.write_bytes(TINY.read_bytes())
    launch(timed_recipe(f"{clock}:weigh"), run, Silent())
    with Ledger.open(run, write=True) as ledger:
        ledger.set_meta("timed", {})
    clock.unlink()
    observer = Silent()
    assert not resume(run, observer).interrupted
    assert any("the front was not timed: latency.measure" in said for said in observer.phases)
    assert all(row.timed is None for row in of_run(run)[0].rows)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_search_of_few_policies_that_is_behind_is_said_to_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    run = tmp_path / "run"
    launch(recipe_of(check=0), run, Silent())
    results = of_run(run)[0]
    monkeypatch.setattr(Results, "baseline_hypervolume", lambda _: 0.0 if ahead else 1.0)
    told = "\n".join(hypervolume_lines(results))
    assert ("24 policies are a beginning: resume with more --evaluations" in told) is not ahead
