import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from evosearch.errors import SpaceError
from evosearch.pareto import (
    crowding_distance,
    front_mask,
    hypervolume,
    ranks,
    total_violation,
)

FloatArray = NDArray[np.float64]
INF, NAN = np.inf, np.nan

# Few levels, so that ties and duplicates are the rule.
levels = st.sampled_from([0.0, 1.0, 2.0, 3.0])
objective_arrays = st.integers(1, 4).flatmap(
    lambda m: arrays(np.float64, st.tuples(st.integers(0, 9), st.just(m)), elements=levels)
)
thorough = settings(max_examples=150, deadline=None)


def dominates(a: FloatArray, b: FloatArray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def slow_front(objectives: FloatArray) -> list[bool]:
    usable = [row for row in objectives if not np.isnan(row).any()]
    return [
        not np.isnan(row).any() and not any(dominates(other, row) for other in usable)
        for row in objectives
    ]


def slow_ranks(objectives: FloatArray, violations: FloatArray) -> list[int]:
    """Peels fronts off, comparing by Deb's three rules."""
    excess = [sum(max(0.0, v) for v in row) for row in violations]

    def beats(i: int, j: int) -> bool:
        if excess[i] == 0 and excess[j] == 0:
            return dominates(objectives[i], objectives[j])
        return bool(excess[i] < excess[j])

    found = [-1] * len(objectives)
    for level in itertools.count():
        left = [i for i, rank in enumerate(found) if rank < 0]
        if not left:
            return found
        for j in [j for j in left if not any(beats(i, j) for i in left)]:
            found[j] = level
    raise AssertionError


def swept_area(points: FloatArray) -> float:
    """Exact area that two-dimensional points dominate below (1, 1)."""
    area, ceiling = 0.0, 1.0
    for x, y in sorted(map(tuple, points)):
        if x < 1 and y < ceiling:
            area += (1 - x) * (ceiling - y)
            ceiling = y
    return area


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ([[1, 1]], [True]),
        ([[1, 2], [2, 1]], [True, True]),
        ([[1, 2], [2, 3]], [True, False]),
        ([[1, 1], [1, 1]], [True, True]),
        ([[1, 1], [1, 1], [0, 0]], [False, False, True]),
        ([[1, 2], [1, 3]], [True, False]),
        ([[1, 2], [1, 2], [2, 1], [3, 3]], [True, True, True, False]),
        ([[NAN, 0], [1, 1]], [False, True]),
        ([[NAN, NAN], [NAN, NAN]], [False, False]),
        ([[INF, INF], [1, 1]], [False, True]),
        ([[INF, INF]], [True]),
        ([[INF, 0], [1, 1]], [True, True]),
        ([[-INF, 5], [0, 0]], [True, True]),
        ([[-0.0, 1], [0.0, 1]], [True, True]),
        ([[3], [1], [1], [2]], [False, True, True, False]),
        ([[1, 2, 3], [1, 2, 4], [3, 2, 1]], [True, False, True]),
    ],
)
def test_front_of_a_hand_made_table(objectives: list[list[float]], expected: list[bool]) -> None:
    assert front_mask(np.array(objectives, dtype=float)).tolist() == expected


@thorough
@given(objective_arrays)
def test_front_is_what_pairwise_comparison_says(objectives: FloatArray) -> None:
    assert front_mask(objectives).tolist() == slow_front(objectives)


@thorough
@given(arrays(np.float64, (7, 2), elements=st.sampled_from([0.0, 1.0, 2.0, NAN, INF, -INF])))
def test_front_of_two_objectives_copes_with_nan_and_infinity(objectives: FloatArray) -> None:
    assert front_mask(objectives).tolist() == slow_front(objectives)


def test_front_of_three_objectives_copes_with_infinity() -> None:
    objectives = np.array([[0.0, 3.0, 0.0], [INF, 1.0, 2.0]])
    assert front_mask(objectives).tolist() == [True, True]


def test_front_of_a_thousand_points_is_what_pairwise_comparison_says() -> None:
    rng = np.random.default_rng(0)
    objectives = rng.integers(0, 40, (1000, 3)).astype(float)
    better = (objectives[:, None] <= objectives[None]).all(2)
    strictly = (objectives[:, None] < objectives[None]).any(2)
    assert np.array_equal(front_mask(objectives), ~(better & strictly).any(axis=0))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_front_of_no_points_is_empty(m: int) -> None:
    assert front_mask(np.empty((0, m))).tolist() == []
    assert front_mask(np.empty((0, m)), np.empty((0, 2))).tolist() == []


@pytest.mark.parametrize(
    ("violations", "expected"),
    [
        ([[0, 0], [0, 0], [0, 0]], [True, False, True]),
        ([[-1, 0], [0, -5], [0, 0]], [True, False, True]),
        ([[0.1, -9], [0, 0], [0, 0]], [False, True, True]),
        ([[1, 0], [1, 0], [1, 0]], [False, False, False]),
        ([[NAN, 0], [0, 0], [0, 0]], [False, True, True]),
    ],
)
def test_front_has_feasible_points_only(
    violations: list[list[float]], expected: list[bool]
) -> None:
    objectives = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
    assert front_mask(objectives, np.array(violations, dtype=float)).tolist() == expected


def test_front_without_constraint_columns_is_unconstrained() -> None:
    objectives = np.array([[1.0, 1.0], [2.0, 2.0]])
    assert front_mask(objectives, np.empty((2, 0))).tolist() == [True, False]


def test_front_refuses_a_single_row_that_is_not_in_a_batch() -> None:
    with pytest.raises(SpaceError, match=r"objectives must have shape \(n, n_objectives\), got"):
        front_mask(np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    ("objectives", "violations", "expected"),
    [
        ([[1, 1]], [[0]], [0]),
        ([[1, 1], [1, 1]], [[0], [0]], [0, 0]),
        ([[1, 3], [3, 1], [2, 4], [4, 4]], [[0]] * 4, [0, 0, 1, 2]),
        ([[9, 9], [0, 0]], [[0], [0.5]], [0, 1]),  # feasible before better
        ([[0, 0], [9, 9]], [[2], [1]], [1, 0]),  # less excess before better
        ([[0, 0], [9, 9]], [[1], [1]], [0, 0]),  # equal excess: neither beats the other
        ([[1, 1], [2, 2]], [[-5], [-1]], [0, 1]),  # slack counts nothing
        ([[1, 1], [2, 2], [3, 3]], [[1, -9], [0.5, 0.4], [0, 0]], [2, 1, 0]),
        ([[INF, 0], [0, INF], [INF, INF]], [[0]] * 3, [0, 0, 1]),
        ([[-INF, 0], [0, 0]], [[0]] * 2, [0, 1]),
    ],
)
def test_ranks_of_a_hand_made_table(
    objectives: list[list[float]], violations: list[list[float]], expected: list[int]
) -> None:
    found = ranks(np.array(objectives, dtype=float), np.array(violations, dtype=float))
    assert found.tolist() == expected


@thorough
@given(objective_arrays, st.data())
def test_ranks_are_what_peeling_says(objectives: FloatArray, data: st.DataObject) -> None:
    few = st.sampled_from([-1.0, 0.0, 0.5, 1.0])
    violations = data.draw(arrays(np.float64, (len(objectives), 2), elements=few))
    assert ranks(objectives, violations).tolist() == slow_ranks(objectives, violations)


@thorough
@given(objective_arrays)
def test_rank_zero_is_the_front(objectives: FloatArray) -> None:
    feasible = np.zeros((len(objectives), 1))
    assert np.array_equal(ranks(objectives, feasible) == 0, front_mask(objectives))


def test_total_violation_counts_excess_only() -> None:
    violations = np.array([[-1.0, -2.0], [0.0, 0.0], [0.5, -3.0], [0.25, 0.5]])
    assert total_violation(violations).tolist() == [0, 0, 0.5, 0.75]


def test_total_violation_without_constraints_is_zero() -> None:
    assert total_violation(np.empty((3, 0))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ([], []),
        ([[1, 1]], [INF]),
        ([[1, 2], [2, 1]], [INF, INF]),
        # Spans 10 and 100. Second point: (4 - 0) / 10 + (100 - 30) / 100; third: likewise.
        ([[0, 100], [1, 50], [4, 30], [10, 0]], [INF, 1.1, 1.4, INF]),
        # The same in another order.
        ([[4, 30], [10, 0], [1, 50], [0, 100]], [1.4, INF, 1.1, INF]),
        # One objective does not vary: it contributes nothing, its first and last are extremes.
        ([[0, 7], [1, 7], [3, 7], [4, 7]], [INF, 0.75, 0.75, INF]),
        # Three equal points between two extremes: the middle one has no room.
        ([[0, 4], [2, 2], [2, 2], [2, 2], [4, 0]], [INF, 1.0, 0.0, 1.0, INF]),
        ([[1, 1], [1, 1], [1, 1]], [INF, 0, INF]),
        # An infinite span would make every distance 0 or NaN: that objective is skipped.
        ([[0, 3], [1, 2], [2, 1], [INF, 0]], [INF, 2 / 3, 2 / 3, INF]),
        ([[5], [1], [2], [4]], [INF, INF, 0.75, 0.75]),
    ],
)
def test_crowding_of_a_hand_computed_table(
    objectives: list[list[float]], expected: list[float]
) -> None:
    table = np.array(objectives, dtype=float) if objectives else np.empty((0, 2))
    assert crowding_distance(table) == pytest.approx(expected, abs=1e-15)


@thorough
@given(objective_arrays)
def test_crowding_is_never_negative_nor_nan(objectives: FloatArray) -> None:
    distance = crowding_distance(objectives)
    assert distance.shape == (len(objectives),)
    assert (distance >= 0).all()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),
        ([[0.0, 0.0]], 1.0),
        ([[0.5, 0.5]], 0.25),
        ([[0.5, 0.5], [0.5, 0.5]], 0.25),
        ([[0.5, 0.5], [0.75, 0.75]], 0.25),
        ([[0.25, 0.75], [0.75, 0.25]], 0.75 * 0.25 + 0.25 * 0.5),
        ([[1.0, 0.0]], 0.0),  # on the reference is not below it
        ([[2.0, 0.0], [0.5, 0.5]], 0.25),
        ([[NAN, 0.0], [0.5, 0.5]], 0.25),
        ([[INF, 0.0], [0.5, 0.5]], 0.25),
    ],
)
def test_hypervolume_of_a_hand_made_table(points: list[list[float]], expected: float) -> None:
    array = np.array(points).reshape(len(points), 2)
    assert hypervolume(array, np.ones(2)) == pytest.approx(expected, abs=1e-15)


@thorough
@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.just(2)), elements=st.floats(0, 1.25)))
def test_hypervolume_is_the_swept_area(points: FloatArray) -> None:
    assert hypervolume(points, np.ones(2)) == pytest.approx(swept_area(points), abs=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_is_that_of_pymoo(m: int) -> None:
    from pymoo.indicators.hv import HV

    rng = np.random.default_rng(m)
    reference = rng.uniform(0.5, 3, m)
    for n in (1, 2, 20):
        points = rng.random((n, m)) * reference * 1.2
        inside = points[(points < reference).all(axis=1)]
        volume = float(HV(ref_point=reference)(inside)) if len(inside) else 0.0
        expected = volume / float(np.prod(reference))
        assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_grows_with_a_point_that_dominates_more() -> None:
    points = np.array([[0.4, 0.6], [0.6, 0.4]])
    more = np.concatenate([points, [[0.45, 0.45]]])
    assert hypervolume(more, np.ones(2)) > hypervolume(points, np.ones(2))


def test_hypervolume_of_scaled_objectives_is_the_same_share() -> None:
    points, scale = np.random.default_rng(0).random((9, 3)), np.array([1e-3, 1.0, 1e6])
    expected = hypervolume(points, np.ones(3))
    assert hypervolume(points * scale, scale) == pytest.approx(expected)


@pytest.mark.parametrize(("best", "share"), [(0.5, 0.75), (2.0, 0.0), (3.0, 0.0)])
def test_hypervolume_of_one_objective_is_the_way_below_the_reference(
    best: float, share: float
) -> None:
    assert hypervolume(np.array([[best], [4.0]]), np.array([2.0])) == share


def test_hypervolume_refuses_another_number_of_objectives() -> None:
    with pytest.raises(SpaceError, match=r"objectives must have shape \(n, 3\), got \(2, 2\)"):
        hypervolume(np.zeros((2, 2)), np.ones(3))


def test_arguments_are_left_as_they_were() -> None:
    rng = np.random.default_rng(0)
    objectives, violations = rng.random((9, 3)), rng.random((9, 2)) - 0.5
    reference = np.ones(3)
    before = [array.copy() for array in (objectives, violations, reference)]
    for array in (objectives, violations, reference):
        array.setflags(write=False)
    front_mask(objectives, violations)
    ranks(objectives, violations)
    crowding_distance(objectives)
    hypervolume(objectives, reference)
    assert all(map(np.array_equal, (objectives, violations, reference), before))


def test_a_hair_above_a_bound_is_above_it() -> None:
    objectives, violations = np.array([[0.0], [1.0]]), np.array([[1e-9], [0.0]])
    assert ranks(objectives, violations).tolist() == [1, 0]
    assert front_mask(objectives, violations).tolist() == [False, True]
