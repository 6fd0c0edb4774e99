"""Comparable scores, clusters of criteria, and the order that a blend means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evosearch.errors import PolicyError
from evosearch.pruning.blending import (
    COMPARISONS,
    Blends,
    cluster,
    cluster_groups,
    comparable,
    places_of,
    silhouette,
    spearman,
)
from evosearch.testing import chain_table

TABLE = chain_table((4, 6))
FloatArray = NDArray[np.float64]


def random_scores(n_criteria: int = 3, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(n_criteria, 10)) ** 3


coarse = hnp.arrays(np.float64, (3, 10), elements=st.integers(-3, 3).map(float))


# --- comparable scores


@pytest.mark.parametrize(
    ("comparison", "wanted"),
    [
        ("rank", [1 / 3, 0.0, 2 / 3, 1.0, 0.1, 0.1, 0.6, 0.6, 0.6, 1.0]),
        ("min-max", [0.25, 0.0, 0.5, 1.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0]),
    ],
)
def test_comparable_scores_are_those_on_paper(comparison: str, wanted: list[float]) -> None:
    scores = np.array([[2.0, 1, 3, 5, -1, -1, 1, 1, 1, 3]])
    np.testing.assert_allclose(comparable(scores, TABLE, comparison), [wanted])


@given(coarse)
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparing_changes_no_order(comparison: str, scores: FloatArray) -> None:
    found = comparable(scores, TABLE, comparison)
    assert ((found >= 0) & (found <= 1)).all()
    for row, wanted in zip(found, scores, strict=True):
        np.testing.assert_array_equal(places_of(row, TABLE), places_of(wanted, TABLE))


def test_ranks_do_not_depend_on_scale() -> None:
    scores = random_scores()
    stretched = comparable(np.exp(scores), TABLE)
    np.testing.assert_allclose(stretched, comparable(scores, TABLE))


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_constant_scores_are_halfway(comparison: str) -> None:
    assert (comparable(np.full((2, 10), 7.0), TABLE, comparison) == 0.5).all()


# --- Spearman


def test_correlations_are_those_of_scipy() -> None:
    scores = random_scores(5)
    scores[2, ::3] = scores[2, 0]
    np.testing.assert_allclose(spearman(scores), spearmanr(scores, axis=1).statistic, atol=1e-12)


def test_constant_criterion_is_correlated_with_nobody() -> None:
    scores = random_scores()
    scores[1] = 3.0
    found = spearman(scores)
    assert found[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "wanted"), [([[1, 2], [5, 9]], 1), ([[1, 2], [9, 5]], -1), ([[1, 2], [3, 3]], 0)]
)
def test_two_channels_agree_disagree_or_say_nothing(rows: list[list[float]], wanted: int) -> None:
    assert spearman(np.array(rows, dtype=np.float64))[0, 1] == pytest.approx(wanted)


# --- clusters

NAMES = ("d", "a", "f", "c", "b", "e")


def blocks() -> FloatArray:
    """Criteria d, a, f are near each other, and so are c, b; e is alone."""
    found = np.full((6, 6), 0.1)
    found[:3, :3], found[3:5, 3:5] = 0.9, 0.8
    np.fill_diagonal(found, 1)
    return found


def test_blocks_are_clusters() -> None:
    wanted = (("a", "d", "f"), ("b", "c"), ("e",))
    assert cluster(NAMES, blocks(), 3) == wanted
    assert cluster(NAMES, blocks()) == wanted


@pytest.mark.parametrize(("k", "sizes"), [(1, [6]), (4, [1, 1, 2, 2]), (6, [1] * 6), (9, [1] * 6)])
def test_number_of_clusters_is_a_bound(k: int, sizes: list[int]) -> None:
    scores = random_scores(6, seed=3)
    found = cluster(NAMES, spearman(scores), k)
    assert sorted(len(c) for c in found)[0] >= 1
    assert len(found) == min(k, 6)
    assert sorted(name for c in found for name in c) == sorted(NAMES)


@given(st.permutations(range(6)), st.sampled_from([None, 1, 2, 3, 4, 6]), st.integers(0, 20))
def test_clusters_do_not_depend_on_the_order_of_criteria(
    order: list[int], k: int | None, seed: int
) -> None:
    scores = np.round(random_scores(6, seed), 0)  # many ties
    names = tuple(NAMES[i] for i in order)
    assert cluster(names, spearman(scores[order]), k) == cluster(NAMES, spearman(scores), k)


@pytest.mark.parametrize("k", [None, 1, 2, 5])
def test_copies_are_never_parted(k: int | None) -> None:
    scores = np.repeat(random_scores(2), 3, axis=0)
    found = cluster(NAMES, spearman(scores), k)
    assert found in ((tuple(sorted(NAMES)),), (("a", "d", "f"), ("b", "c", "e")))
    assert len(found) == (1 if k == 1 else 2)


@pytest.mark.parametrize("k", [None, 1, 3])
def test_a_single_criterion_is_a_cluster(k: int | None) -> None:
    assert cluster(["l1"], np.ones((1, 1)), k) == (("l1",),)


def test_criteria_of_constant_scores_can_be_clustered() -> None:
    found = cluster(("a", "b", "c"), spearman(np.ones((3, 4))))
    assert sorted(name for c in found for name in c) == ["a", "b", "c"]


def test_silhouette_is_that_on_paper() -> None:
    distances = np.array([[0, 1, 4], [1, 0, 5], [4, 5, 0]], dtype=np.float64)
    found = silhouette(distances, np.array([1, 1, 2]))
    assert found == pytest.approx((3 / 4 + 4 / 5 + 0) / 3)
    assert silhouette(distances, np.array([1, 1, 1])) == 0


def test_groups_are_clustered_each_or_together() -> None:
    scores = random_scores(3)
    scores[1, :4] = scores[0, :4]
    scores[2, 4:] = scores[0, 4:]
    names = ("a", "b", "c")
    apart = cluster_groups(names, scores, TABLE, 2)
    assert apart == ((("a", "b"), ("c",)), (("a", "c"), ("b",)))
    one, other = cluster_groups(names, scores, TABLE, 2, [[0, 1]])
    assert one == other


# --- blends


def blends(comparison: str = "rank") -> Blends:
    return Blends(names=("a", "b", "c"), scores=comparable(random_scores(), TABLE, comparison))


DEFAULT = places_of(np.arange(10.0), TABLE)


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("place", range(3))
def test_pure_blend_is_the_order_of_its_criterion(comparison: str, place: int) -> None:
    found = blends(comparison).places((((("abc"[place]), 1),),) * 2, TABLE, DEFAULT)
    np.testing.assert_array_equal(found, places_of(random_scores()[place], TABLE))


def test_group_without_a_blend_keeps_its_default() -> None:
    found = blends().places(((), (("b", 1),)), TABLE, DEFAULT)
    np.testing.assert_array_equal(found[:4], DEFAULT[:4])
    np.testing.assert_array_equal(found[4:], places_of(random_scores()[1], TABLE)[4:])


@given(coarse, st.tuples(*[st.integers(1, 20)] * 3))
def test_blend_is_the_weighted_mean(scores: FloatArray, weights: tuple[int, int, int]) -> None:
    ranks = comparable(scores, TABLE)
    found = Blends(names=("a", "b", "c"), scores=ranks).places(
        (tuple(zip("abc", weights, strict=True)),) * 2, TABLE, DEFAULT
    )
    mixed = np.average(ranks, axis=0, weights=weights)
    for group in (slice(0, 4), slice(4, 10)):
        assert sorted(found[group]) == list(range(len(found[group])))
        # Whoever is placed before another is worth no less.
        ordered = mixed[group][np.argsort(found[group])]
        assert (np.diff(ordered) <= 1e-9).all()


def test_weights_count_relative_to_each_other() -> None:
    one, other = (
        blends().places(((("a", k), ("b", 3 * k)), (("c", k),)), TABLE, DEFAULT) for k in (1, 7)
    )
    np.testing.assert_array_equal(one, other)


def test_unknown_criterion_is_refused_with_the_group() -> None:
    with pytest.raises(PolicyError, match=r"group conv1: no criterion 'x' to blend; .* a, b, c"):
        blends().places(((), (("x", 1),)), TABLE, DEFAULT)
