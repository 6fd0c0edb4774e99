"""How much hypervolume a point adds to a front."""

import numpy as np
from numpy.typing import NDArray

from evosearch.pareto import front_mask, hypervolume

__all__ = ["Improvement"]

FloatArray = NDArray[np.float64]

# The reference lies a little beyond the worst value, so that extremes count, too.
_MARGIN = 0.01


class Improvement:
    """A front that grows, and what points would add to its hypervolume.

    Objectives are scaled so that what was told spans [0, 1] in each.

    Args:
        objectives: `(n, n_objectives)` told so far.
        violations: `(n, n_constraints)` likewise.
    """

    def __init__(self, objectives: FloatArray, violations: FloatArray) -> None:
        feasible = (violations <= 0).all(axis=1)
        spanned = objectives[feasible] if feasible.any() else objectives
        self._low = spanned.min(axis=0)
        span = spanned.max(axis=0) - self._low
        self._span = np.where(span > 0, span, 1.0) * (1 + _MARGIN)
        self._front = self._scaled(objectives[front_mask(objectives, violations)])

    def _scaled(self, objectives: FloatArray) -> FloatArray:
        return np.asarray((objectives - self._low) / self._span)

    def add(self, point: FloatArray) -> None:
        """Takes a point `(n_objectives,)` into the front."""
        front = np.concatenate([self._front, self._scaled(point[None])])
        self._front = front[front_mask(front)]

    def of(self, points: FloatArray) -> FloatArray:
        """`(n,)` what each of `(n, n_objectives)` points would add; 0 for the dominated."""
        points = self._scaled(points)
        n_objectives = points.shape[1]
        if n_objectives == 1:
            best = self._front.min(initial=1.0)
            return np.asarray(np.maximum(best - points[:, 0], 0.0))
        if n_objectives == 2:
            return self._of_two(points)
        return self._of_many(points)

    def _of_two(self, points: FloatArray) -> FloatArray:
        """Between two neighbours on the front the free height is constant: widths times heights."""
        front = self._front[(self._front < 1).all(axis=1)]
        front = front[np.argsort(front[:, 0], kind="stable")]
        edges = np.concatenate([[-np.inf], front[:, 0], [1.0]])
        heights = np.concatenate([[1.0], front[:, 1]])
        x, y = points[:, :1], points[:, 1:]
        widths = np.maximum(edges[1:] - np.maximum(edges[:-1], x), 0.0)
        return np.asarray((widths * np.maximum(heights - y, 0.0)).sum(axis=1))

    def _of_many(self, points: FloatArray) -> FloatArray:
        ones = np.ones(points.shape[1])
        # Hypervolumes are measured from 0: what lies below the best value told counts as 0.
        before = hypervolume(np.maximum(self._front, 0.0), ones)
        gains = np.zeros(len(points))
        for row, point in enumerate(points):
            if (point < 1).all() and not (self._front <= point).all(axis=1).any():
                joined = np.maximum(np.concatenate([self._front, point[None]]), 0.0)
                gains[row] = hypervolume(joined, ones) - before
        return gains
