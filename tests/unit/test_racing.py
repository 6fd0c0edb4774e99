"""Races: how often a candidate is dropped wrongly, how soon rightly, and against whom it runs."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy
from evosearch.scoring.objectives import Constraint, Goals
from evosearch.scoring.racing import Bar, Race, Rival, block_means, rungs

FloatArray = NDArray[np.float64]

N, BATCH = 1000, 125
LOOKS = rungs(N, N // BATCH)
DIVERGENCE = list(METRICS).index("divergence")


def rival_of(values: FloatArray, name: str = "rival") -> Rival:
    return Rival(
        name=name,
        metrics=dict(zip(METRICS, values.mean(axis=0).tolist(), strict=True)),
        blocks=block_means(values, len(values)).tobytes(),
    )


def race_against(*rivals: Rival, measured: tuple[str, ...] = ("divergence",), rate: float = 0.05):
    return Race(measured=measured, rivals=rivals, error_rate=rate)


def dropped_after(race: Race, values: FloatArray) -> int | None:
    """Images that a candidate has seen when it is dropped; None if it never is."""
    for look in LOOKS:
        seen = look * BATCH
        estimate = race.verdict(values[:seen], len(values), len(LOOKS))
        if estimate:
            assert estimate.images == seen
            return seen
    return None


def heavy_tailed(rng: np.random.Generator, spread: float = 1.0) -> FloatArray:
    """Per-image values as divergences are: most near zero, some large."""
    return pair(rng, spread, 2.0)[0]


def pair(rng: np.random.Generator, spread: float, tail: float) -> tuple[FloatArray, FloatArray]:
    """Of two networks, to which the same images are hard."""
    difficulty = rng.exponential(size=(N, 1)) ** tail
    one, other = rng.lognormal(sigma=spread, size=(2, N, len(METRICS)))
    return difficulty * one, difficulty * other


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(("tail", "factor"), [(1.0, 1.0), (2.0, 2.0)])
def test_candidates_as_good_as_their_rival_are_dropped_no_more_often_than_stated(
    rate: float, tail: float, factor: float
) -> None:
    # With very heavy tails the rate may be exceeded, by less than its double.
    rng = np.random.default_rng(0)
    trials, wrong = 1500, 0
    for _ in range(trials):
        theirs, mine = pair(rng, 0.5 * tail, tail)
        # The hardest case: exactly as good on all images, so dropping it is always an error.
        mine *= theirs.mean(axis=0) / mine.mean(axis=0)
        wrong += dropped_after(race_against(rival_of(theirs), rate=rate), mine) is not None
    # Three standard errors above the promise would be no chance.
    assert wrong / trials <= factor * rate + 3 * np.sqrt(rate * (1 - rate) / trials)


def classifiers(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Errors of two networks that differ on 4% of the images; the candidate is better by 0.2%."""
    easy = (rng.random(N) < 0.1).astype(float)
    drawn = rng.random(N)
    theirs, mine = np.maximum(easy, drawn < 0.021), np.maximum(easy, (drawn > 0.979 + 0.002))
    return np.tile(theirs[:, None], len(METRICS)), np.tile(mine[:, None], len(METRICS))


def rare_gains(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """A candidate that is a little worse on most images and much better on few: better in all."""
    theirs = np.tile(rng.exponential(size=(N, 1)), len(METRICS)) + 1
    gain = np.where(rng.random((N, 1)) < 0.02, -0.6, 0.01)
    return theirs, theirs + gain


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05])
@pytest.mark.parametrize(("draw", "metric"), [(classifiers, "error"), (rare_gains, "divergence")])
def test_counts_and_skewed_differences_do_not_fool_the_test(
    draw: Callable[[np.random.Generator], tuple[FloatArray, FloatArray]], metric: str, rate: float
) -> None:
    rng = np.random.default_rng(0)
    trials, wrong = 0, 0
    while trials < 800:
        theirs, mine = draw(rng)
        if mine.mean() > theirs.mean():
            continue
        trials += 1
        race = race_against(rival_of(theirs), measured=(metric,), rate=rate)
        wrong += dropped_after(race, mine) is not None
    assert wrong / trials <= rate + 3 * np.sqrt(rate * (1 - rate) / trials)


def test_clearly_worse_candidates_are_dropped_early() -> None:
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(200):
        theirs = heavy_tailed(rng)
        seen.append(dropped_after(race_against(rival_of(theirs)), 3 * theirs))
    assert None not in seen
    assert np.mean(seen) <= 0.6 * N  # type: ignore[arg-type]


def test_better_candidates_go_on() -> None:
    rng = np.random.default_rng(2)
    theirs = heavy_tailed(rng)
    assert dropped_after(race_against(rival_of(theirs)), 0.5 * theirs) is None


def test_candidate_that_returns_what_its_rival_does_goes_on() -> None:
    theirs = heavy_tailed(np.random.default_rng(3))
    assert dropped_after(race_against(rival_of(theirs)), theirs) is None


def test_nobody_is_dropped_without_a_rival() -> None:
    assert dropped_after(race_against(), heavy_tailed(np.random.default_rng(4))) is None


def test_who_is_better_in_one_measured_objective_goes_on() -> None:
    theirs = heavy_tailed(np.random.default_rng(5))
    mine = 3 * theirs
    mine[:, list(METRICS).index("error")] /= 9
    both = race_against(rival_of(theirs), measured=("error", "divergence"))
    assert dropped_after(both, mine) is None
    assert dropped_after(race_against(rival_of(theirs)), mine) is not None


def test_one_of_several_rivals_is_enough() -> None:
    theirs = heavy_tailed(np.random.default_rng(6))
    rivals = (rival_of(9 * theirs, "weak"), rival_of(theirs, "strong"))
    estimate = race_against(*rivals).verdict(3 * theirs[: N // 2], N, len(LOOKS))
    assert estimate is not None
    assert estimate.rival == "strong"


def test_more_rivals_make_dropping_harder() -> None:
    rng = np.random.default_rng(7)
    theirs, noise = heavy_tailed(rng), rng.normal(size=(N, len(METRICS)))
    one, many = race_against(rival_of(theirs)), race_against(*[rival_of(theirs)] * 1000)
    shifts = np.linspace(0, 0.5, 60)
    drops = [
        [bool(race.verdict((theirs + noise + shift)[:500], N, len(LOOKS))) for shift in shifts]
        for race in (one, many)
    ]
    assert sum(drops[0]) > sum(drops[1]) > 0
    assert all(a or not b for a, b in zip(*drops, strict=True))


def test_estimates_are_the_rivals_values_and_the_difference_so_far() -> None:
    theirs = heavy_tailed(np.random.default_rng(8), spread=0.3)
    rival = rival_of(theirs)
    estimate = race_against(rival).verdict(2 * theirs[:512], N, len(LOOKS))
    assert estimate is not None
    seen = block_means(theirs[:512], N).astype(float).mean(axis=0)
    for i, name in enumerate(METRICS):
        assert estimate.metrics[name] == pytest.approx(rival.metrics[name] + seen[i], rel=1e-5)


def test_estimates_are_nearer_the_truth_than_what_was_seen() -> None:
    rng = np.random.default_rng(9)
    plain, told = [], []
    for _ in range(100):
        theirs = heavy_tailed(rng, spread=0.2)
        mine = 2 * theirs * rng.lognormal(sigma=0.2, size=theirs.shape)
        estimate = race_against(rival_of(theirs)).verdict(mine[:500], N, len(LOOKS))
        if estimate is None:
            continue
        truth = mine[:, DIVERGENCE].mean()
        plain.append(mine[:500, DIVERGENCE].mean() - truth)
        told.append(estimate.metrics["divergence"] - truth)
    assert len(told) > 50
    assert np.std(told) < 0.8 * np.std(plain)


def test_estimates_are_never_negative() -> None:
    theirs = heavy_tailed(np.random.default_rng(10))
    mine = 3 * theirs
    mine[:, list(METRICS).index("error")] = 0
    rival = rival_of(theirs)
    assert rival.metrics["error"] > 0
    far = Rival(name="r", metrics={**rival.metrics, "error": 0.0}, blocks=rival.blocks)
    estimate = race_against(far).verdict(mine[:500], N, len(LOOKS))
    assert estimate is not None
    assert estimate.metrics["error"] == 0.0


@given(n=st.integers(1, 400), seen=st.integers(0, 400))
@example(n=240, seen=171)
def test_blocks_are_means_of_neighbours_that_were_all_seen(n: int, seen: int) -> None:
    seen = min(n, seen)
    values = np.random.default_rng(n).random((n, 2))
    every, some = block_means(values, n), block_means(values[:seen], n)
    assert len(every) == max(1, n // 32)
    np.testing.assert_array_equal(every[: len(some)], some)
    edges = np.linspace(0, n, len(every) + 1).round().astype(int)
    assert len(some) == sum(edge <= seen for edge in edges[1:])
    for block, (low, high) in enumerate(itertools.pairwise(edges)):
        np.testing.assert_allclose(every[block], values[low:high].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "batches", "wanted"),
    [
        (2000, 1, ()),
        (2000, 2, (1,)),
        (2000, 4, (1, 2)),
        (2000, 16, (4, 8)),
        (1000, 8, (4,)),
        (5000, 40, (4, 8, 16, 32)),
        (250, 16, ()),
    ],
)
def test_rungs_double_from_where_there_is_enough_to_judge_and_leave_out_the_end(
    images: int, batches: int, wanted: tuple[int, ...]
) -> None:
    assert rungs(images, batches) == wanted


# --- against whom


def landed(keep: int, level: float, status: Status = Status.OK) -> Measurement:
    blocks = np.full((4, len(METRICS)), level, dtype=np.float32).tobytes()
    if status is Status.FAILED:
        return Measurement(policy=Policy((keep,)), status=status, reason="it burnt")
    return Measurement(
        policy=Policy((keep,)),
        status=status,
        metrics=dict.fromkeys(METRICS, level),
        reason="worse" if status is Status.DROPPED else None,
        blocks=b"" if status is Status.DROPPED else blocks,
    )


def bar_of(
    *points: tuple[float, float] | tuple[float, float, Status],
    goals: Goals | None = None,
    violations: Mapping[int, float] | None = None,
) -> Bar:
    """A bar that was told points of (MACs, divergence), all at once."""
    goals = goals or Goals(objectives=("divergence", "macs"))
    bar = Bar(goals, 0.05)
    found = [landed(i + 1, p[1], *p[2:]) for i, p in enumerate(points)]
    rows = [
        goals.vector({**dict.fromkeys(METRICS, p[1]), "macs": p[0], "params": p[0]}) for p in points
    ]
    violated = np.zeros((len(points), 1))
    for row, value in (violations or {}).items():
        violated[row] = value
    bar.raise_by(found, np.array(rows), violated)
    return bar


def rivals_at(bar: Bar, macs: float) -> list[str]:
    return [rival.name for rival in bar.race({"macs": macs, "params": macs}).rivals]


def digest(row: int) -> str:
    return Policy((row + 1,)).digest


def test_rival_is_the_best_of_those_that_cost_no_more() -> None:
    bar = bar_of((0.2, 0.9), (0.4, 0.5), (0.6, 0.3), (0.8, 0.1))
    assert rivals_at(bar, 0.1) == []
    assert rivals_at(bar, 0.4) == [digest(1)]
    assert rivals_at(bar, 0.79) == [digest(2)]
    assert rivals_at(bar, 1.0) == [digest(3)]


def test_only_the_feasible_front_measured_in_full_sets_the_bar() -> None:
    bar = bar_of(
        (0.5, 0.4),
        (0.5, 0.5),  # dominated
        (0.5, 0.1, Status.DROPPED),
        (0.5, 0.0, Status.FAILED),
        (0.5, 0.2),  # infeasible
        violations={4: 0.1},
    )
    assert rivals_at(bar, 1.0) == [digest(0)]


def test_bar_rises_with_each_generation() -> None:
    bar = bar_of((0.5, 0.4))
    better = landed(99, 0.3)
    bar.raise_by([better], np.array([[0.3, 0.5]]), np.zeros((1, 1)))
    assert rivals_at(bar, 0.6) == [better.policy.digest]


def test_policy_that_is_asked_for_again_is_one_rival() -> None:
    goals = Goals(objectives=("error", "divergence", "macs"))
    bar = Bar(goals, 0.05)
    for _ in range(6):
        found = [landed(1, 0.5), landed(1, 0.5), landed(2, 0.4)]
        bar.raise_by(found, np.array([[0.5, 0.5, 0.5]] * 2 + [[0.4, 0.6, 0.5]]), np.zeros((3, 1)))
    race = bar.race({"macs": 0.6, "params": 0.6})
    assert sorted(rival.name for rival in race.rivals) == sorted([digest(0), digest(1)])


def test_without_costs_among_the_objectives_everyone_may_be_a_rival() -> None:
    bar = bar_of((0.5, 0.4), (0.9, 0.3), goals=Goals(objectives=("divergence",)))
    assert rivals_at(bar, 0.1) == [digest(1)]


def test_costs_alone_need_no_race() -> None:
    goals = Goals(objectives=("macs",), constraints=(Constraint.parse("error <= 0.2"),))
    assert rivals_at(bar_of((0.5, 0.4), goals=goals), 0.9) == []


def test_several_measured_objectives_have_several_rivals() -> None:
    goals = Goals(objectives=("error", "divergence", "macs"))
    bar = Bar(goals, 0.05)
    points = np.array([[0.1 * i, 1 - 0.1 * i, 0.5] for i in range(8)])
    found = [landed(i + 1, 0.5) for i in range(8)]
    bar.raise_by(found, points, np.zeros((8, 1)))
    race = bar.race({"macs": 0.6, "params": 0.6})
    assert race.measured == ("error", "divergence")
    assert len(race.rivals) == 4
