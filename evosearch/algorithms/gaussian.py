"""Gaussian-process regression for a few hundred points in a few dozen dimensions.

The kernel is a sum of smooth curves, one per dimension, plus a squared exponential with a length
scale per dimension [Rasmussen2006, 4.2, 5.1]: what pruning does to a network is about the sum of
what it does group by group, and bends where groups interact.

Hyperparameters maximise the marginal likelihood times priors that keep length scales long unless
the data object [Hvarfner2024]. They are then rounded to a grid, and so are predictions: sums
may differ in their last bits between machines or numbers of threads, and a search that is resumed
elsewhere must still ask for the same.

References:
    [Rasmussen2006] C. Rasmussen, C. Williams, "Gaussian Processes for Machine Learning", 2006.
    [Hvarfner2024] C. Hvarfner et al., "Vanilla Bayesian Optimization Performs Great in High
        Dimensions", ICML 2024.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["GaussianProcess", "Prior"]

FloatArray = NDArray[np.float64]

_GRID = 1 / 16
_DIGITS = 7
_LEAST_NOISE = 1e-5


@dataclass(frozen=True)
class Prior:
    """Normal prior of a logarithm, and the bounds within which it is fitted."""

    mean: float
    std: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Three standard deviations to both sides."""
        return self.mean - 3 * self.std, self.mean + 3 * self.std


def _priors(n_dims: int) -> list[Prior]:
    """Of log variances (trend, bend, noise; targets have variance 1), then of log lengths."""
    length = Prior(0.5 * np.log(n_dims), 1.0)
    variances = [Prior(0.0, 1.5), Prior(-1.0, 1.5), Prior(np.log(1e-2), 1.5)]
    return [*variances, *[length] * n_dims]


def _squares(a: FloatArray, b: FloatArray) -> FloatArray:
    """`(n, m)` squared distances of rows."""
    cross = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.asarray(np.maximum(cross, 0.0))


def _curves(points: FloatArray) -> FloatArray:
    """`(n, 3 n_dims)` Legendre polynomials of degree 1 to 3 of each coordinate.

    They are orthogonal over [-1/2, 1/2]; of a coordinate that is wider much more is expected.
    """
    t = 2 * points
    return np.concatenate([t, (3 * t**2 - 1) / 2, (5 * t**3 - 3 * t) / 4], axis=1) / 2


class GaussianProcess:
    """A posterior over functions of `(n, n_dims)` points, centred on [0, 1].

    Args:
        points: `(n, n_dims)` where the function was observed, n >= 2.
        values: `(n,)` what was observed there.
        start: Log hyperparameters to start from; None for the prior's means.
        iterations: Most steps of the fit.
    """

    def __init__(
        self,
        points: FloatArray,
        values: FloatArray,
        start: FloatArray | None = None,
        iterations: int = 20,
    ) -> None:
        self._points = points - 0.5
        self._shift, scale = values.mean(), values.std()
        self._scale = scale if scale > 0 else 1.0
        self._values = (values - self._shift) / self._scale
        self.parameters = self._fit(start, iterations)
        """Log hyperparameters, to start the next fit from."""
        import scipy.linalg

        kernel = self._kernel(self._points, self._points)
        kernel[np.diag_indices_from(kernel)] += self._noise
        self._factor = scipy.linalg.cho_factor(kernel, lower=True, check_finite=False)
        self._weights = scipy.linalg.cho_solve(self._factor, self._values, check_finite=False)

    @property
    def _noise(self) -> float:
        return float(np.exp(self.parameters[2])) + _LEAST_NOISE

    def _kernel(self, a: FloatArray, b: FloatArray) -> FloatArray:
        trend, bend = np.exp(self.parameters[:2])
        lengths = np.exp(self.parameters[3:])
        smooth = np.exp(-0.5 * _squares(a / lengths, b / lengths))
        return np.asarray(trend * (1 + _curves(a) @ _curves(b).T) + bend * smooth)

    def _fit(self, start: FloatArray | None, iterations: int) -> FloatArray:
        from scipy.optimize import minimize

        priors = _priors(self._points.shape[1])
        means = np.array([prior.mean for prior in priors])
        stds = np.array([prior.std for prior in priors])

        features = _curves(self._points)
        curves = 1 + features @ features.T

        def loss(theta: FloatArray) -> tuple[float, FloatArray]:
            value, gradient = self._negative_log_likelihood(theta, curves)
            z = (theta - means) / stds
            return value + 0.5 * float(z @ z), gradient + z / stds

        found = minimize(
            loss,
            means if start is None else start,
            jac=True,
            method="L-BFGS-B",
            bounds=[prior.bounds for prior in priors],
            options={"maxiter": iterations},
        )
        return np.asarray(np.rint(found.x / _GRID) * _GRID)

    def _negative_log_likelihood(
        self, theta: FloatArray, curves: FloatArray
    ) -> tuple[float, FloatArray]:
        """Value and gradient [Rasmussen2006, 5.8 and 5.9]; sums over pairs are matrix products."""
        import scipy.linalg

        x, y = self._points, self._values
        trend, bend, noise = np.exp(theta[:3])
        scaled = x / np.exp(theta[3:])
        additive = trend * curves
        smooth = bend * np.exp(-0.5 * _squares(scaled, scaled))
        kernel = additive + smooth
        kernel[np.diag_indices_from(kernel)] += noise + _LEAST_NOISE
        factor = scipy.linalg.cho_factor(kernel, lower=True, check_finite=False)
        inverse = scipy.linalg.cho_solve(factor, np.eye(len(x)), check_finite=False)
        weights = inverse @ y
        value = 0.5 * float(y @ weights) + float(np.log(np.diag(factor[0])).sum())
        pull = 0.5 * (inverse - np.outer(weights, weights))
        lengths = pull * smooth
        # sum_ij M_ij (x_i - x_j)^2 = 2 (r . x^2 - x . M x) for symmetric M with row sums r.
        by_length = 2 * (
            lengths.sum(axis=1) @ scaled**2 - (scaled * (lengths @ scaled)).sum(axis=0)
        )
        variances = [(pull * additive).sum(), lengths.sum(), noise * np.trace(pull)]
        return value, np.concatenate([variances, by_length])

    def mean(self, points: FloatArray) -> FloatArray:
        """`(n,)` expected values."""
        cross = self._kernel(points - 0.5, self._points)
        return np.asarray(self._shift + self._scale * np.round(cross @ self._weights, _DIGITS))

    def mean_and_covariance(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        """`(n,)` expected values and their `(n, n)` covariance, without the noise."""
        import scipy.linalg

        points = points - 0.5
        cross = self._kernel(points, self._points)
        solved = scipy.linalg.solve_triangular(
            self._factor[0], cross.T, lower=True, check_finite=False
        )
        covariance = self._kernel(points, points) - solved.T @ solved
        mean = self._shift + self._scale * np.round(cross @ self._weights, _DIGITS)
        return mean, self._scale**2 * covariance
