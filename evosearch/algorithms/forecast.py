"""Predicts what a policy would be told: costs exactly, measurements by Gaussian processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import State
from evosearch.algorithms.foresight import Foresight, Known
from evosearch.algorithms.gaussian import GaussianProcess
from evosearch.policy import Policy, widths_of
from evosearch.space import SearchSpace

__all__ = ["Forecaster", "Told"]

FloatArray = NDArray[np.float64]

_DIGITS = 7
_FIRST_ITERATIONS, _NEXT_ITERATIONS = 40, 12
# A guessed loss below this is as good as none. Its coordinate is so many times as wide as others,
# which leaves a curve over it all but free: the prior of a cubic grows with the sixth power.
_LEAST_LOSS, _LOSS_SPAN = 1e-3, 3.0
# Channels that count for none: what leaving a block out is to the logarithm.
_NONE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """Policies that were measured.

    Args:
        policies: n of them.
        objectives: `(n, n_objectives)`.
        violations: `(n, n_constraints)`.
    """

    policies: Sequence[Policy]
    objectives: FloatArray
    violations: FloatArray


@dataclass(frozen=True, eq=False)
class _Column:
    """A model of one column of answers.

    Args:
        process: None if all answers are the same.
        constant: That answer.
        rooted: Whether the process is one of square roots of answers.
    """

    process: GaussianProcess | None
    constant: float = 0.0
    rooted: bool = False

    def mean(self, points: FloatArray) -> FloatArray:
        if self.process is None:
            return np.full(len(points), self.constant)
        return self._answers(self.process.mean(points))

    def samples(self, points: FloatArray, normal: FloatArray) -> FloatArray:
        """`(n_samples, n)` functions from the posterior; `normal` is `(n_samples, n)`."""
        if self.process is None:
            return np.full(normal.shape, self.constant)
        mean, covariance = self.process.mean_and_covariance(points)
        # The covariance of near points is singular up to rounding: load its diagonal.
        covariance[np.diag_indices_from(covariance)] += 1e-6 * np.diag(covariance).max() + 1e-12
        root = np.linalg.cholesky(covariance)
        return self._answers(np.round(mean + normal @ root.T, _DIGITS))

    def _answers(self, modelled: FloatArray) -> FloatArray:
        return np.maximum(modelled, 0.0) ** 2 if self.rooted else modelled


class Forecaster:
    """Models of all columns that only measuring tells, fitted anew when more is told.

    A point of the models has one coordinate per group: the logarithm of its kept channels, from 0
    at the narrowest to 1 at the widest; none count as half of one. Where a loss is guessed, its
    logarithm is one more: a measured loss is nearly a curve over it, so the models need not learn
    every group by itself.

    Args:
        space: Bounds the channels of each group.
        foresight: Knows the costs.
    """

    def __init__(self, space: SearchSpace, foresight: Foresight) -> None:
        ends = (space.cheapest(), space.dearest())
        low, high = (np.log(np.maximum(p.keep, _NONE)) for p in ends)
        self._n_groups, self._groups = len(low), np.flatnonzero(high > low)
        self._low, self._span = low[self._groups], (high - low)[self._groups]
        self._foresight = foresight
        self._columns: dict[tuple[str, int], _Column] = {}
        # Hyperparameters of the last fit, from which the next one starts.
        self._starts: dict[tuple[str, int], FloatArray] = {}

    def points(self, policies: Sequence[Policy], known: Known) -> FloatArray:
        """`(n, n_free_groups)` coordinates, or one more."""
        keep = widths_of(policies, self._n_groups)
        points = (np.log(np.maximum(keep[:, self._groups], _NONE)) - self._low) / self._span
        if known.loss is None:
            return np.asarray(points)
        below_all = np.log(np.maximum(known.loss, _LEAST_LOSS)) / -np.log(_LEAST_LOSS)
        return np.column_stack([points, 1 + _LOSS_SPAN * below_all])

    def fit(self, told: Told) -> None:
        """Fits to what was told; starts from the last fit's hyperparameters."""
        known = self._foresight(told.policies)
        points = self.points(told.policies, known)
        answers = {
            "objective": (told.objectives, known.objectives),
            "violation": (told.violations, known.violations),
        }
        columns = {}
        for kind, (values, exact) in answers.items():
            for j in np.flatnonzero(np.isnan(exact).any(axis=0)):
                key = (kind, int(j))
                # Over the logarithm of a guess, roots of losses bend less than losses.
                rooted = known.loss is not None and kind == "objective"
                columns[key] = self._column(points, values[:, j], self._starts.get(key), rooted)
        self._columns = columns
        self._starts = {
            key: column.process.parameters for key, column in columns.items() if column.process
        }

    def state(self) -> State:
        """What the next fit depends on besides what it is told."""
        return {f"{kind}.{j}": theta.copy() for (kind, j), theta in self._starts.items()}

    def restore(self, state: State) -> None:
        """Starts the next fit where a state says."""
        for name, theta in state.items():
            kind, j = name.split(".")
            self._starts[kind, int(j)] = theta.copy()

    def _column(
        self, points: FloatArray, values: FloatArray, start: FloatArray | None, rooted: bool
    ) -> _Column:
        if len(values) < 2 or np.ptp(values) == 0 or not len(self._groups):
            return _Column(None, float(values.mean()) if len(values) else 0.0)
        rooted = rooted and bool(values.min() >= 0)
        modelled = np.sqrt(values) if rooted else values
        iterations = _FIRST_ITERATIONS if start is None else _NEXT_ITERATIONS
        return _Column(GaussianProcess(points, modelled, start, iterations), rooted=rooted)

    def expected(self, policies: Sequence[Policy]) -> tuple[FloatArray, FloatArray]:
        """Expected objectives `(n, n_objectives)` and violations `(n, n_constraints)`.

        The median where roots are modelled.
        """
        return self._filled(policies, lambda column, points: column.mean(points))

    def imagined(
        self, policies: Sequence[Policy], n: int, rng: np.random.Generator
    ) -> list[FloatArray]:
        """Objectives `(n_policies, n_objectives)` under each of n functions of the posterior."""
        known = self._foresight(policies)
        points = self.points(policies, known)
        drawn = np.repeat(known.objectives[None], n, axis=0)
        for (kind, j), column in self._columns.items():
            if kind == "objective":
                drawn[:, :, j] = column.samples(points, rng.standard_normal((n, len(policies))))
        return list(drawn)

    def _filled(
        self, policies: Sequence[Policy], predict: Callable[[_Column, FloatArray], FloatArray]
    ) -> tuple[FloatArray, FloatArray]:
        known = self._foresight(policies)
        points = self.points(policies, known)
        objectives, violations = known.objectives.copy(), known.violations.copy()
        for (kind, j), column in self._columns.items():
            if kind == "objective":
                objectives[:, j] = predict(column, points)
            else:
                violations[:, j] = predict(column, points)
        return objectives, violations
