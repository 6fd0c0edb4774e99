"""Rank correlations with bootstrap intervals, and a learned predictor that is judged honestly.

Knows nothing of networks. A predictor and the truth are `(n,)` arrays over the same policies; for
both, lower is better.

References:
    [Kendall1945] M. Kendall, "The Treatment of Ties in Ranking Problems", Biometrika 33(3): tau-b.
    [Efron1979] B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Ann. Statist. 7(1).
    [Spearman1910] C. Spearman, "Correlation calculated from faulty data", Brit. J. Psychol. 3(3).
    [Brown1910] W. Brown, "Some experimental results in the correlation of mental abilities",
        ibid.: what the mean of repetitions is worth.
    [Greiner1909] R. Greiner, "Ueber das Fehlersystem der Kollektivmasslehre", Z. Math. Phys. 57:
        tau of a normal distribution is 2 / pi arcsin(r).
    [Allen1974] D. Allen, "The Relationship Between Variable Selection and Data Augmentation and a
        Method for Prediction", Technometrics 16(1): leave-one-out residuals in closed form.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Correlation",
    "Finding",
    "Learned",
    "RidgeModel",
    "ceiling",
    "correlate",
    "cross_validate",
    "fit_ridge",
]

FloatArray = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
# Ridge strengths as shares of the number of policies; inputs are standardised.
RIDGES = np.logspace(-3, 3, 13)


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How one predictor orders policies, compared with the truth.

    Args:
        n: Policies that both have a number for.
        tau: Kendall's tau-b; NaN if either is constant.
        tau_low, tau_high: Bootstrap percentile interval of 95%, resampling policies.
        rho: Spearman's rho.
        rho_low, rho_high: Likewise.
    """

    n: int
    tau: float
    tau_low: float
    tau_high: float
    rho: float
    rho_low: float
    rho_high: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How one predictor does on one set of policies.

    Args:
        policies: Name of the set.
        predictor: Name of the proxy variant, or of what was learned from several.
        metric: Which of its numbers.
        truth: Which number of the fine-tuned networks it is compared with.
        seconds: Median time that the predictor takes per policy.
        learned: Whether it was fitted to the truth of other policies.
        correlation: With the truth.
    """

    policies: str
    predictor: str
    metric: str
    truth: str
    seconds: float
    learned: bool
    correlation: Correlation


def _signs(values: FloatArray) -> FloatArray:
    """`(n, n)` signs of all differences."""
    return np.sign(values[:, None] - values[None, :])


@lru_cache(maxsize=8)
def _resampled(n: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """`(resamples, n)` indices; the same for all predictors of n policies."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


@lru_cache(maxsize=8)
def _counts(n: int, resamples: int, seed: int) -> FloatArray:
    """`(resamples, n)` how often each policy was drawn."""
    counts = np.zeros((resamples, n))
    rows = np.repeat(np.arange(resamples), n)
    np.add.at(counts, (rows, _resampled(n, resamples, seed).ravel()), 1)
    return counts


def _interval(values: FloatArray) -> tuple[float, float]:
    """Ends of the central interval; resamples without a value do not count."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Weights of pairs `(n, n)`: concordance, pairs the predictor orders, pairs the truth orders.

    tau-b of any resample is a ratio of quadratic forms in how often each policy was drawn: copies
    of one policy are ties in both, and ties add nothing [Kendall1945].
    """

    concordance: FloatArray
    by_predictor: FloatArray
    by_truth: FloatArray

    def tau(self, counts: FloatArray) -> FloatArray:
        """`(m,)` tau-b of `(m, n)` counts."""
        above, left, right = (
            np.einsum("mi,ij,mj->m", counts, pairs, counts, optimize=True)
            for pairs in (self.concordance, self.by_predictor, self.by_truth)
        )
        return _ratio(above, np.sqrt(left * right))


def _pairs(predicted: FloatArray, truth: FloatArray) -> _Pairs:
    one, other = _signs(predicted), _signs(truth)
    return _Pairs(one * other, np.abs(one), np.abs(other))


def _rows_rho(one: FloatArray, other: FloatArray) -> FloatArray:
    """`(m,)` Spearman's rho of each row of two `(m, n)` arrays; ties share their mean rank."""
    from scipy.stats import rankdata

    first, second = (
        ranks - ranks.mean(axis=1, keepdims=True)
        for ranks in (rankdata(one, axis=1), rankdata(other, axis=1))
    )
    return _ratio(
        (first * second).sum(axis=1), np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    )


def correlate(predicted: FloatArray, truth: FloatArray, seed: int = 0) -> Correlation:
    """Rank correlations of a predictor with the truth.

    Args:
        predicted: `(n,)` finite.
        truth: `(n,)` finite.
        seed: Of the resampling.
    """
    from scipy.stats import kendalltau, spearmanr

    n = len(truth)
    if n < 2 or np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return Correlation(n=n, **dict.fromkeys(_NUMBERS, np.nan))
    chosen = _resampled(n, RESAMPLES, seed)
    taus = _pairs(predicted, truth).tau(_counts(n, RESAMPLES, seed))
    rhos = _rows_rho(predicted[chosen], truth[chosen])
    (tau_low, tau_high), (rho_low, rho_high) = _interval(taus), _interval(rhos)
    return Correlation(
        n=n,
        tau=float(kendalltau(predicted, truth).statistic),
        tau_low=tau_low,
        tau_high=tau_high,
        rho=float(spearmanr(predicted, truth).statistic),
        rho_low=rho_low,
        rho_high=rho_high,
    )


def ceiling(tau: float) -> float:
    """Kendall's tau that a perfect predictor would have with the mean of two noisy truths.

    Their mean is nearer to what both measure than either is to the other: if they correlate with r,
    it has a reliability of 2 r / (1 + r) [Spearman1910, Brown1910], and a correlation of its root
    with what is measured; r and tau as for normal distributions [Greiner1909].

    Args:
        tau: Between the two truths.

    Returns:
        0 where they do not agree at all; NaN if nothing is known.
    """
    if np.isnan(tau):
        return tau
    r = max(0.0, float(np.sin(np.pi / 2 * tau)))
    return float(2 / np.pi * np.arcsin(np.sqrt(2 * r / (1 + r))))


_NUMBERS = ("tau", "tau_low", "tau_high", "rho", "rho_low", "rho_high")


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeModel:
    """A linear predictor of the truth's order.

    Args:
        centre, scale: `(p,)` of the features it was fitted on.
        weights: `(p,)` of standardised features.
        strength: The ridge, chosen by leave-one-out error.
    """

    centre: FloatArray
    scale: FloatArray
    weights: FloatArray
    strength: float

    def predict(self, features: FloatArray) -> FloatArray:
        """`(m,)` predictions of `(m, p)` features; their order is what matters."""
        return np.asarray((features - self.centre) / self.scale @ self.weights, dtype=np.float64)


def fit_ridge(features: FloatArray, truth: FloatArray) -> RidgeModel:
    """Fits the ranks of the truth; the strength minimises the leave-one-out error [Allen1974].

    Args:
        features: `(n, p)`; constant columns get no weight.
        truth: `(n,)`.
    """
    from scipy.stats import rankdata

    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12 * np.maximum(np.abs(centre), 1e-300), scale, np.inf)
    ranks = rankdata(truth)
    target = (ranks - ranks.mean()) / len(ranks)
    left, singular, right = np.linalg.svd((features - centre) / scale, full_matrices=False)
    projected = left.T @ target
    best = (np.inf, 0.0, np.zeros(features.shape[1]))
    for strength in RIDGES * len(target):
        shrink = singular**2 / (singular**2 + strength)
        residual = target - left @ (shrink * projected)
        # The mean is fitted, too: it takes 1/n of each policy's freedom.
        freedom = 1 - 1 / len(target) - (left**2) @ shrink
        error = float(np.mean((residual / np.maximum(freedom, 1e-9)) ** 2))
        if error < best[0]:
            weights = right.T @ (singular / (singular**2 + strength) * projected)
            best = (error, float(strength), weights)
    return RidgeModel(centre=centre, scale=scale, weights=best[2], strength=best[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """A fitted predictor with its out-of-fold correlation.

    Args:
        correlation: Of predictions for policies that the fit had not seen.
        model: Fitted on all of them, for use on others.
    """

    correlation: Correlation
    model: RidgeModel


def _folds(n: int, folds: int, repeats: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The held-out indices of each fold of each repetition."""
    rng = np.random.default_rng((seed, n))
    for _ in range(repeats):
        yield from np.array_split(rng.permutation(n), folds)


def cross_validate(
    features: FloatArray, truth: FloatArray, *, folds: int = 5, repeats: int = 20, seed: int = 0
) -> Learned:
    """Fits a ridge regression, and tells how it orders policies that it has not seen.

    Only pairs within a held-out fold are compared. Predictions of different folds come from
    different fits, whose mean leans away from the fold that was held out: comparing across folds
    would give pure noise a negative correlation. The strength of the ridge is chosen anew within
    the training part of every fold.

    Args:
        features: `(n, p)` finite.
        truth: `(n,)` finite; n >= 2 * folds.
        folds: Parts per repetition.
        repeats: Independent partitions.
        seed: Of the partitions and of the resampling.
    """
    from scipy.stats import spearmanr

    n = len(truth)
    sums = [np.zeros((n, n)) for _ in range(3)]
    rhos, sizes = [], []
    for held_out in _folds(n, folds, repeats, seed):
        known = np.setdiff1d(np.arange(n), held_out)
        predicted = fit_ridge(features[known], truth[known]).predict(features[held_out])
        pairs = _pairs(predicted, truth[held_out])
        for total, part in zip(
            sums, (pairs.concordance, pairs.by_predictor, pairs.by_truth), strict=True
        ):
            total[np.ix_(held_out, held_out)] += part
        if np.ptp(predicted) > 0 and np.ptp(truth[held_out]) > 0:
            rhos.append(float(spearmanr(predicted, truth[held_out]).statistic))
            sizes.append(len(held_out))
    pairs = _Pairs(*sums)
    low, high = _interval(pairs.tau(_counts(n, RESAMPLES, seed)))
    correlation = Correlation(
        n=n,
        tau=float(pairs.tau(np.ones((1, n)))[0]),
        tau_low=low,
        tau_high=high,
        rho=float(np.average(rhos, weights=sizes)) if rhos else np.nan,
        rho_low=np.nan,
        rho_high=np.nan,
    )
    return Learned(correlation=correlation, model=fit_ridge(features, truth))
