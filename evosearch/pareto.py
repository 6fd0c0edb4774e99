"""Pareto fronts under constraints: who dominates whom, crowding, hypervolume.

Everything is minimised. Violations are relative and feasible at <= 0, so their positive parts may
be summed.

References:
    [Deb2002] K. Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
        TEVC 6(2): non-domination (III-A), crowding (III-B), constrained domination (VI-A).
"""

import numpy as np
from numpy.typing import NDArray

from evosearch.checks import check_shape

__all__ = ["crowding_distance", "front_mask", "hypervolume", "ranks", "total_violation"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def total_violation(violations: FloatArray) -> FloatArray:
    """Sums what exceeds each bound: `(n, n_constraints)` to `(n,)`, 0 where feasible."""
    return np.asarray(np.maximum(violations, 0.0).sum(axis=1))


def _placed(objectives: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Distinct points `(m, n_objectives)` by places, and which of them each row is, `(n,)`.

    Places instead of values: domination is the same, and moocore never sees an infinity. Distinct
    points, so that duplicates cannot hide each other.
    """
    places = np.stack(
        [np.unique(column, return_inverse=True)[1].ravel() for column in objectives.T], axis=1
    )
    unique, inverse = np.unique(places, axis=0, return_inverse=True)
    return unique.astype(np.float64), inverse.ravel()


def front_mask(objectives: FloatArray, violations: FloatArray | None = None) -> BoolArray:
    """Marks the feasible points that no feasible point dominates.

    Args:
        objectives: `(n, n_objectives)`, lower is better. Rows with NaN are never on the front.
        violations: `(n, n_constraints)`, <= 0 is feasible; None means no constraints.

    Returns:
        `(n,)` boolean. Duplicates of a front point are all kept.
    """
    check_shape(objectives, "objectives", ("n", "n_objectives"))
    usable = ~np.isnan(objectives).any(axis=1)
    if violations is not None:
        usable &= total_violation(violations) <= 0
    mask = np.zeros(len(objectives), dtype=np.bool_)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return mask
    import moocore

    unique, inverse = _placed(objectives[rows])
    mask[rows] = np.asarray(moocore.is_nondominated(unique), dtype=np.bool_)[inverse]
    return mask


def ranks(objectives: FloatArray, violations: FloatArray) -> NDArray[np.int64]:
    """Non-domination rank of each point, 0 for the front, under constrained domination.

    Args:
        objectives: `(n, n_objectives)`, no NaN.
        violations: `(n, n_constraints)`.

    Returns:
        `(n,)` int64. A feasible point outranks every infeasible one; infeasible ones are ranked
        by their total violation.
    """
    violation = total_violation(violations)
    feasible = violation <= 0
    rank = np.zeros(len(objectives), dtype=np.int64)
    below = 0
    if feasible.any():
        import moocore

        unique, inverse = _placed(objectives[feasible])
        rank[feasible] = np.asarray(moocore.pareto_rank(unique))[inverse]
        below = int(rank[feasible].max()) + 1
    rank[~feasible] = below + np.unique(violation[~feasible], return_inverse=True)[1]
    return rank


def crowding_distance(objectives: FloatArray) -> FloatArray:
    """Crowding distance of the points of one rank: the perimeter of the box around each.

    Args:
        objectives: `(n, n_objectives)` of one rank.

    Returns:
        `(n,)`; infinite for the extremes of every objective, 0 between exact duplicates.
    """
    n, n_objectives = objectives.shape
    distance = np.zeros(n)
    if n <= 2:
        return np.full(n, np.inf)
    for m in range(n_objectives):
        order = np.argsort(objectives[:, m], kind="stable")
        values = objectives[order, m]
        distance[order[[0, -1]]] = np.inf
        span = values[-1] - values[0]
        if span > 0 and np.isfinite(span):
            distance[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distance


def hypervolume(objectives: FloatArray, reference: FloatArray) -> float:
    """Volume that the points dominate below a reference, as a share of the box from 0 to it.

    Args:
        objectives: `(n, n_objectives)`, each >= 0; points not below the reference count nothing.
        reference: `(n_objectives,)`, positive and fixed for all comparisons.

    Returns:
        A number in [0, 1]; 0 for no points.
    """
    check_shape(objectives, "objectives", ("n", len(reference)))
    inside = objectives[(objectives < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if objectives.shape[1] == 1:
        return float(1 - inside.min() / reference[0])
    import moocore

    return float(moocore.hypervolume(inside / reference, ref=np.ones(len(reference))))
