"""One threshold on the scores of all channels, and the genomes that it gives."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evosearch.algorithms.foresight import Foresight, Known
from evosearch.algorithms.seeding import halves, ranked_genomes
from evosearch.policy import Policy
from evosearch.pruning.ranking import SCALES, Scale, importance, losses, savings, thresholds
from evosearch.pruning.table import GroupTable
from evosearch.space import SearchSpace, make_space
from evosearch.testing import chain_table

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

WIDTHS = (16, 40, 24)


@cache
def table() -> GroupTable:
    return chain_table(WIDTHS)


def space(**options: object) -> SearchSpace:
    return make_space("layer-sparsity", table(), options)


def foresight(bound: float = 2.0, *, front: bool = True) -> Foresight:
    def foresee(policies: Sequence[Policy]) -> Known:
        unknown = np.full(len(policies), np.nan)
        cost = table().costs_of(policies)[0] / table().dense_costs[0]
        return Known(
            objectives=np.stack([unknown, cost] if front else [unknown], axis=1),
            violations=np.stack([cost / bound - 1, unknown], axis=1),
            cost=cost,
        )

    return foresee


def scores(seed: int) -> FloatArray:
    return np.random.default_rng(seed).random(sum(WIDTHS))


def path(seed: int, power: float = 0.0) -> IntArray:
    return thresholds(importance(scores(seed), table()), table(), savings(table()), power)


def macs(genomes: FloatArray, where: SearchSpace) -> FloatArray:
    return np.asarray(table().costs_of(where.decode(genomes))[0] / table().dense_costs[0])


@given(st.integers(0, 10**6), st.sampled_from(SCALES), st.floats(0, 2))
def test_a_threshold_takes_channels_in_the_order_of_their_scores(
    seed: int, scale: Scale, power: float
) -> None:
    ranked = importance(scores(seed), table(), scale)
    saved = savings(table())
    found = thresholds(ranked, table(), saved, power)
    assert found[0].tolist() == list(WIDTHS)
    assert found[-1].tolist() == [1, 1, 1]
    assert (np.diff(found, axis=0).sum(axis=1) == -1).all()  # one channel at a time
    worth = ranked / np.repeat(saved, WIDTHS) ** power
    groups = np.split(worth, np.cumsum(WIDTHS)[:-1])
    for keep in found[:: len(found) // 5]:
        parts = [
            np.split(np.sort(part), [len(part) - k]) for part, k in zip(groups, keep, strict=True)
        ]
        gone = np.concatenate([part for part, _ in parts])
        # The last channel of a group stays, whatever its score.
        stay = np.concatenate([part if len(part) > 1 else part[:0] for _, part in parts])
        assert gone.max(initial=-np.inf) <= stay.min(initial=np.inf)


def test_scales_make_groups_comparable() -> None:
    raw = np.concatenate(
        [np.full(n, factor) for n, factor in zip(WIDTHS, (1, 10, 0.1), strict=True)]
    )
    assert np.allclose(importance(raw, table(), "mean"), 1)
    assert np.allclose(importance(raw, table(), "max"), 1)
    assert np.array_equal(importance(raw, table(), "none"), raw)
    assert np.array_equal(importance(raw * 0, table(), "mean"), raw * 0)  # nothing to divide by
    assert importance(raw - 1, table(), "max").min() == 0


def test_what_saves_much_goes_first() -> None:
    saved = savings(table())
    narrow = importance(np.ones(sum(WIDTHS)), table())
    first = thresholds(narrow, table(), saved, 1.0)[1]
    assert first[int(saved.argmax())] == WIDTHS[int(saved.argmax())] - 1
    # A group that saves nothing keeps its channels as long as the one that saves least.
    none = saved * np.array([1, 0, 1])
    order = thresholds(narrow, table(), none, 1.0)
    assert (order[:, 1][order[:, int(saved.argmax())] > 1] == WIDTHS[1]).all()


@given(st.integers(0, 10**6), st.floats(0, 2))
def test_no_policy_that_saves_as_much_loses_less_than_that_of_a_threshold(
    seed: int, power: float
) -> None:
    worth, saved = importance(scores(seed), table()), savings(table())
    lost = losses(worth, table(), saved, power)
    rungs = thresholds(worth, table(), saved, power)

    def of(keep: IntArray) -> tuple[FloatArray, FloatArray]:
        total = np.sum([part[k] for part, k in zip(lost, keep.T, strict=True)], axis=0)
        return ((np.array(WIDTHS) - keep) * saved).sum(axis=1), total

    other = np.random.default_rng(seed).integers(1, np.array(WIDTHS) + 1, (200, 3))
    (gained, least), (gains, loses) = of(rungs), of(other)
    as_much = gains[:, None] >= gained[None] + 1e-12
    assert (loses[:, None] >= least[None] - 1e-12)[as_much].all()
    assert as_much.any()


def test_losses_run_from_all_to_nothing() -> None:
    saved = savings(table())
    lost = losses(importance(scores(0), table()), table(), saved)
    assert [len(part) for part in lost] == [n + 1 for n in WIDTHS]
    assert sum(part[1] for part in lost) == pytest.approx(1)
    assert all(part[-1] == 0 and (np.diff(part) <= 0).all() for part in lost)
    # By hand: of one group alone, scores are worth what they are.
    raw = scores(0)[: WIDTHS[0]] - 0.5
    alone = losses(raw, chain_table(WIDTHS[:1]), np.array([0.0]))
    positive = np.maximum(raw, 0)
    gone = np.sort(positive)[:-1]
    assert alone[0][4] == pytest.approx(gone[:-3].sum() / gone.sum())
    assert not losses(raw * 0, chain_table(WIDTHS[:1]), np.array([0.0]))[0].any()


def test_savings_are_what_half_of_a_group_saves() -> None:
    saved = savings(table(), "params")
    for group, n in enumerate(WIDTHS):
        keep = np.array([WIDTHS])
        keep[0, group] = (n + 1) // 2
        share = table().share("params", keep)[0]
        assert saved[group] == pytest.approx((1 - share) / (n - (n + 1) // 2))


def inside(rungs: IntArray) -> set[tuple[int, ...]]:
    """Rungs within the space's bounds."""
    least = np.array(space().cheapest().keep)
    return {tuple(row) for row in np.maximum(rungs, least).tolist()}


def test_a_front_begins_with_even_steps_along_the_first_path() -> None:
    found = ranked_genomes([path(0), path(1)], space(), foresight(), 8)
    assert found.shape == (8, 3)
    costs = np.sort(macs(found, space()))
    assert np.ptp(np.diff(costs)) < 0.06
    kept = [policy.keep for policy in space().decode(found)]
    assert set(kept) <= inside(path(0))
    first, last = macs(found[:2], space())
    assert first == costs.max()
    assert last == costs.min()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_front_may_begin_with_its_narrowest_network_too(n: int) -> None:
    steps = ranked_genomes([path(0)], space(), foresight(), n)
    found = ranked_genomes([path(0)], space(), foresight(), n, narrowest=True)
    assert len(found) == n
    narrowest = space().cheapest()
    assert narrowest not in space().decode(steps)
    assert (narrowest in space().decode(found)) == (n > 1)


def test_all_rungs_are_of_the_first_path_and_distinct() -> None:
    found = space().decode(ranked_genomes([path(0), path(1)], space(), foresight()))
    assert len(set(found)) == len(found) > 60
    assert {policy.keep for policy in found} <= inside(path(0))


@pytest.mark.parametrize("make", [lambda: space(project_onto={"macs": 0.5}), space])
def test_a_budget_begins_with_one_policy_of_each_path(make: Callable[[], SearchSpace]) -> None:
    where, paths = make(), [path(seed) for seed in range(4)]
    found = ranked_genomes(paths, where, foresight(0.5, front=False), 16)
    assert 3 <= len(found) <= 4  # two paths may meet in one policy
    rungs = np.concatenate(paths)
    for policy, spent in zip(where.decode(found), macs(found, where), strict=True):
        assert 0.45 < spent <= 0.5
        # It is what a threshold leaves there, or a channel or two beside it.
        assert np.abs(rungs - np.array(policy.keep)).sum(axis=1).min() <= 3
    assert len(ranked_genomes(paths, where, foresight(0.5, front=False), 2)) == 2
    for count in (1, 16, None):
        assert len(ranked_genomes(paths[:1], where, foresight(0.5, front=False), count)) == 1


def test_bounds_and_constraints_are_kept() -> None:
    where = space(sparsity=[0.25, 0.75], round_to=8)
    found = where.decode(ranked_genomes([path(3)], where, foresight(0.4), 32))
    assert len(found) > 2
    for policy in found:
        table().check(policy)
        assert foresight()([policy]).cost[0] <= 0.4
    assert not len(ranked_genomes([path(3)], where, foresight(0.001), 8))
    assert not len(ranked_genomes([], where, foresight(), 8))


@given(st.integers(0, 300))
def test_halves_are_all_places_once(n: int) -> None:
    assert sorted(halves(n)) == list(range(n))


@pytest.mark.parametrize("scale", SCALES)
def test_scores_are_the_same_afterwards(scale: Scale) -> None:
    given = scores(0) - 0.5
    before = given.copy()
    ranked = importance(given, table(), scale)
    assert np.array_equal(given, before)
    before = ranked.copy()
    thresholds(ranked, table(), savings(table()), 1.0)
    losses(ranked, table(), savings(table()))
    assert np.array_equal(ranked, before)


def test_a_threshold_keeps_whole_granules() -> None:
    grouped = chain_table((32, 24), granularities=(8, 1))
    found = thresholds(np.random.default_rng(0).random(32 + 24), grouped)
    assert set(found[:, 0]) == {8, 16, 24, 32}
    assert (np.diff(found, axis=0).sum(axis=1) < 0).all()
    for keep in found.tolist():
        grouped.check(Policy(tuple(keep)))


def test_what_saves_nothing_goes_with_what_saves_least() -> None:
    saved = savings(table()) * np.array([0, 1, 1])
    found = thresholds(np.ones(sum(WIDTHS)), table(), saved, 1.0)
    most = int(saved.argmax())
    assert (found[found[:, most] > 1, 0] == WIDTHS[0]).all()
