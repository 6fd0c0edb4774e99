import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from evosearch.fidelity import statistics
from evosearch.fidelity.statistics import _folds, ceiling, correlate, cross_validate, fit_ridge

FloatArray = NDArray[np.float64]


@st.composite
def paired(draw: st.DrawFn) -> tuple[FloatArray, FloatArray]:
    """Two arrays of one length, with many ties."""
    n = draw(st.integers(3, 12))
    values = arrays(np.float64, n, elements=st.integers(0, 5).map(float))
    return draw(values), draw(values)


@settings(max_examples=60, deadline=None)
@given(paired())
def test_correlations_are_those_of_scipy(pair: tuple[FloatArray, FloatArray]) -> None:
    one, other = pair
    found = correlate(one, other)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert np.isnan(found.tau)
        assert np.isnan(found.rho)
        return
    assert found.tau == pytest.approx(kendalltau(one, other).statistic)
    assert found.rho == pytest.approx(spearmanr(one, other).statistic)


def test_intervals_are_quantiles_of_scipys_values_on_resamples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    one = rng.integers(0, 8, 15).astype(float)
    other = one + rng.integers(0, 6, 15)
    chosen = np.random.default_rng(3).integers(0, 15, (200, 15))
    taus = [kendalltau(one[rows], other[rows]).statistic for rows in chosen]
    rhos = [spearmanr(one[rows], other[rows]).statistic for rows in chosen]
    found = correlate(one, other, seed=3)
    assert (found.tau_low, found.tau_high) == pytest.approx(np.quantile(taus, [0.025, 0.975]))
    assert (found.rho_low, found.rho_high) == pytest.approx(np.quantile(rhos, [0.025, 0.975]))


def test_equal_and_opposite_orders_are_one_and_minus_one() -> None:
    values = np.arange(6.0)
    same, opposite = correlate(values, np.exp(values)), correlate(values, -values)
    assert (same.tau, same.tau_low, same.rho) == pytest.approx((1, 1, 1))
    assert (opposite.tau, opposite.tau_high, opposite.rho) == pytest.approx((-1, -1, -1))


def test_one_swap_among_four_is_two_thirds() -> None:
    # Six pairs, one of them discordant: (5 - 1) / 6.
    assert correlate(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])).tau == pytest.approx(2 / 3)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_ceiling_is_what_a_perfect_predictor_has_with_the_mean_of_two_truths(noise: float) -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=1500)
    one, other = (exact + noise * rng.normal(size=1500) for _ in range(2))
    perfect = kendalltau(exact, (one + other) / 2).statistic
    assert ceiling(kendalltau(one, other).statistic) == pytest.approx(perfect, abs=0.02)
    assert kendalltau(one, other).statistic < perfect - 0.05


def test_ceiling_of_truths_that_disagree_is_nothing() -> None:
    assert ceiling(1.0) == pytest.approx(1.0)
    assert ceiling(-0.3) == 0
    assert np.isnan(ceiling(np.nan))


def test_interval_narrows_with_more_policies() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (10, 40, 160):
        truth = rng.normal(size=n)
        found = correlate(truth + rng.normal(size=n), truth)
        widths.append(found.tau_high - found.tau_low)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_policies_have_no_correlation(n: int) -> None:
    assert np.isnan(correlate(np.ones(n), np.ones(n)).tau)


def test_same_seed_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    features, truth = rng.normal(size=(20, 3)), rng.normal(size=20)
    assert correlate(features[:, 0], truth) == correlate(features[:, 0], truth)
    first, second = (cross_validate(features, truth, repeats=3) for _ in range(2))
    assert first.correlation.tau == second.correlation.tau
    assert (first.model.weights == second.model.weights).all()


def noise(features: int, n: int = 30) -> list[float]:
    """Out-of-fold tau of features that have nothing to do with the truth, for many draws."""
    taus = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        result = cross_validate(rng.normal(size=(n, features)), rng.normal(size=n), repeats=4)
        taus.append(result.correlation.tau)
    return taus


@pytest.mark.parametrize("features", [1, 5, 40])
def test_noise_predicts_nothing_out_of_fold(features: int) -> None:
    taus = noise(features)
    # Neither up (a leak) nor down (comparing predictions of different folds).
    assert abs(np.mean(taus)) < 3 * np.std(taus) / np.sqrt(len(taus))
    assert abs(np.mean(taus)) < 0.12


def test_noise_fits_well_where_it_was_fitted() -> None:
    # What the test above would show if cross-validation leaked.
    rng = np.random.default_rng(0)
    features, truth = rng.normal(size=(30, 200)), rng.normal(size=30)
    model = fit_ridge(features, truth)
    assert kendalltau(model.predict(features), truth).statistic > 0.5


def test_a_sum_of_two_noisy_predictors_beats_either() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=60)
    features = truth[:, None] + rng.normal(size=(60, 2))
    both = cross_validate(features, truth).correlation
    assert both.tau > max(correlate(column, truth).tau for column in features.T)
    assert both.tau_low < both.tau < both.tau_high


def test_a_perfect_predictor_is_learned_whatever_its_scale_and_sign() -> None:
    truth = np.random.default_rng(0).normal(size=30)
    features = np.stack([-1e6 * truth + 5, np.full(30, 7.0)], axis=1)
    learned = cross_validate(features, truth)
    assert learned.correlation.tau == pytest.approx(1)
    assert learned.model.weights[1] == 0
    assert np.isfinite(learned.model.predict(features)).all()


def test_leave_one_out_errors_are_those_of_refits() -> None:
    rng = np.random.default_rng(2)
    features, truth = rng.normal(size=(12, 3)), rng.normal(size=12)
    model = fit_ridge(features, truth)
    target = np.argsort(np.argsort(truth)) / 12
    inputs = (features - model.centre) / model.scale
    errors = {}
    for strength in statistics.RIDGES * 12:
        # The plain way: leave one out, fit with a free mean, predict it. Inputs stay
        # standardised and centred over all, as in the closed form.
        total = 0.0
        for out in range(12):
            known = np.arange(12) != out
            design = np.column_stack([np.ones(11), inputs[known]])
            load = np.diag([0.0, *[strength] * 3])
            weights = np.linalg.solve(design.T @ design + load, design.T @ target[known])
            total += (target[out] - np.array([1.0, *inputs[out]]) @ weights) ** 2
        errors[float(strength)] = total
    assert model.strength == pytest.approx(min(errors, key=errors.__getitem__))


def test_every_repetition_has_other_folds_and_every_seed_has_others() -> None:
    rng = np.random.default_rng(0)
    features, truth = rng.normal(size=(20, 3)), rng.normal(size=20)
    found = [(1, 0), (4, 0), (1, 1)]
    taus = {
        cross_validate(features, truth, repeats=repeats, seed=seed).correlation.tau
        for repeats, seed in found
    }
    assert len(taus) == len(found)


def test_rho_is_the_mean_over_folds_by_their_sizes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=11)
    features = truth[:, None] + rng.normal(size=(11, 2))
    rhos, sizes = [], []
    for out in _folds(11, 2, 3, 0):
        known = np.setdiff1d(np.arange(11), out)
        predicted = fit_ridge(features[known], truth[known]).predict(features[out])
        rhos.append(spearmanr(predicted, truth[out]).statistic)
        sizes.append(len(out))
    assert set(sizes) == {5, 6}
    found = cross_validate(features, truth, folds=2, repeats=3).correlation.rho
    assert found == pytest.approx(np.dot(rhos, sizes) / np.sum(sizes))
