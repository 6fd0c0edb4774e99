"""Blends of criteria: scores made comparable, criteria clustered by how they rank, weighted means.

Knows nothing of torch.

References:
    [He2021] W. He et al., "Blending Pruning Criteria for Convolutional Neural Networks",
        arXiv:2107.05033: clusters of criteria by rank, calibration factors within a blend. The
        clustering method, the normalisation and the encoding are not published; ours are
        reconstructions.
    [Rousseeuw1987] P. Rousseeuw, "Silhouettes", J. Comput. Appl. Math. 20, 1987.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import PolicyError
from evosearch.policy import Blend
from evosearch.pruning.table import GroupTable

__all__ = [
    "COMPARISONS",
    "Blends",
    "cluster",
    "cluster_groups",
    "comparable",
    "places_of",
    "silhouette",
    "spearman",
]

COMPARISONS = ("rank", "min-max")

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Clusters = tuple[tuple[str, ...], ...]

# The silhouette is not asked about more clusters: each costs two genes per group.
_MOST_CLUSTERS = 6
# What is this near is the same: sums of ranks, correlations.
_DECIMALS = 12


def comparable(scores: FloatArray, table: GroupTable, comparison: str = "rank") -> FloatArray:
    """Brings the scores of different criteria to one scale, group by group.

    Args:
        scores: `(n_criteria, n_channels)` by flat channel number, larger = more important.
        table: The groups.
        comparison: `rank`: place from below, 0 to 1, ties share the mean of their places.
            `min-max`: distance from the smallest score as a share of the range.

    Returns:
        `(n_criteria, n_channels)` in [0, 1], in the order of the scores; 1/2 where a criterion
        gives a whole group one score.
    """
    from scipy.stats import rankdata

    found = np.empty(scores.shape)
    for first, n in zip(table.offsets, table.channels, strict=True):
        part = scores[:, first : first + n]
        values = rankdata(part, axis=1) if comparison == "rank" else part
        # Extremes of ranks are those of all channels, so that ties at an end count as ties.
        low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
        if comparison == "rank":
            low, high = np.where(high > low, 1.0, low), np.where(high > low, float(n), high)
        span = np.where(high > low, high - low, 1.0)
        found[:, first : first + n] = np.where(high > low, (values - low) / span, 0.5)
    return found


def places_of(scores: FloatArray, table: GroupTable) -> NDArray[np.int64]:
    """Ranks the channels of every group, most important first.

    Args:
        scores: `(n_channels,)` by flat channel number, larger = more important.
        table: The groups.

    Returns:
        `(n_channels,)` by flat channel number: the place of each channel within its group, 0 for
        the most important. A policy that keeps k channels keeps places 0 to k - 1. Ties go to the
        lower channel number.
    """
    # lexsort is stable, so channels of equal score stay in their order.
    order = np.lexsort((-scores, table.group_of))
    places = np.empty(len(scores), dtype=np.int64)
    places[order] = np.arange(len(scores)) - np.repeat(table.offsets, table.channels)
    return places


def spearman(scores: FloatArray) -> FloatArray:
    """Rank correlations of criteria over the channels of one group.

    Args:
        scores: `(n_criteria, n_channels)`.

    Returns:
        `(n_criteria, n_criteria)` in [-1, 1]; 0 beside a criterion that gives all channels one
        score, 1 on the diagonal.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(norms > 0, norms, 1.0)[:, None]
    found = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(found, 1.0)
    return np.asarray(found)


def silhouette(distances: FloatArray, labels: IntArray) -> float:
    """Mean silhouette of a clustering [Rousseeuw1987]; a cluster of one counts as 0.

    Args:
        distances: `(n, n)`, symmetric.
        labels: `(n,)` cluster of each.
    """
    clusters = np.unique(labels)
    if len(clusters) < 2:
        return 0.0
    own = labels[:, None] == clusters
    sizes = own.sum(axis=0)
    sums = distances @ own
    values = np.zeros(len(labels))
    for i in range(len(labels)):
        mine = int(np.flatnonzero(own[i])[0])
        if sizes[mine] > 1:
            near = sums[i, mine] / (sizes[mine] - 1)
            far = np.delete(sums[i] / sizes, mine).min()
            values[i] = (far - near) / max(near, far) if max(near, far) > 0 else 0.0
    return float(values.mean())


def cluster(names: Sequence[str], correlation: FloatArray, clusters: int | None = None) -> Clusters:
    """Clusters criteria that rank alike, by average linkage on 1 - correlation.

    Depends on the criteria alone, not on the order in which they come.

    Args:
        names: Of the criteria, distinct.
        correlation: `(n, n)`, from `spearman`.
        clusters: How many at most; by the largest silhouette if None. Copies of one criterion
            are never parted.

    Returns:
        The names by cluster, sorted, the cluster with the first name first.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(names) == 1:
        return (tuple(names),)
    order = sorted(range(len(names)), key=lambda i: names[i])
    distances = (1 - correlation[np.ix_(order, order)]).round(_DECIMALS)
    np.fill_diagonal(distances, 0)
    distances = (distances + distances.T) / 2
    tree = linkage(squareform(distances, checks=False), method="average")
    different = len(np.unique(fcluster(tree, 0, criterion="distance")))

    def parted(k: int) -> IntArray:
        return np.asarray(fcluster(tree, min(k, different), criterion="maxclust"), dtype=np.int64)

    if clusters is None:
        tries = range(2, min(_MOST_CLUSTERS, different, len(names) - 1) + 1)
        best = max(tries, key=lambda k: (silhouette(distances, parted(k)), -k), default=different)
    labels = parted(best if clusters is None else clusters)
    members: dict[int, list[str]] = {}
    for place, label in zip(order, labels, strict=True):
        members.setdefault(int(label), []).append(names[place])
    return tuple(tuple(cluster) for cluster in members.values())


def cluster_groups(
    names: Sequence[str],
    scores: FloatArray,
    table: GroupTable,
    clusters: int | None = None,
    units: Sequence[Sequence[int]] | None = None,
) -> tuple[Clusters, ...]:
    """Clusters criteria for every group.

    Args:
        names: Of the criteria.
        scores: `(n_criteria, n_channels)`, comparable or not.
        table: The groups.
        clusters: See `cluster`.
        units: Groups that are clustered together, by the mean of their correlations; each group
            alone if None.

    Returns:
        Clusters per group.
    """
    ends = [*table.offsets[1:], scores.shape[1]]
    parts = [scores[:, a:b] for a, b in zip(table.offsets, ends, strict=True)]
    found: dict[int, Clusters] = {}
    for unit in units or [[group] for group in range(len(parts))]:
        mean = np.mean([spearman(parts[group]) for group in unit], axis=0)
        found |= dict.fromkeys(unit, cluster(names, mean, clusters))
    return tuple(found[group] for group in range(len(parts)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Blends:
    """Criteria to blend.

    Args:
        names: Of the criteria.
        scores: `(n_criteria, n_channels)` comparable ones.
    """

    names: tuple[str, ...]
    scores: FloatArray

    def places(self, blend: Blend, table: GroupTable, default: IntArray) -> IntArray:
        """The order of channels that a blend means: a few vector operations.

        Args:
            blend: Per group the criteria and their weights; a group without any keeps its default.
            table: The groups.
            default: `(n_channels,)` places by the recipe's criterion.

        Returns:
            `(n_channels,)` place of each channel within its group, 0 for the most important.

        Raises:
            PolicyError: A criterion is not among these.
        """
        column = {name: i for i, name in enumerate(self.names)}
        weights = np.zeros((len(blend), len(self.names)))
        for group, pairs in enumerate(blend):
            for name, weight in pairs:
                if name not in column:
                    raise PolicyError(
                        f"group {table.groups[group].name}: no criterion {name!r} to blend; there "
                        f"are {', '.join(self.names)}"
                    )
                weights[group, column[name]] = weight
        total = weights.sum(axis=1, keepdims=True)
        shares = weights / np.where(total > 0, total, 1)
        mixed = np.einsum("nc,cn->n", shares[table.group_of], self.scores).round(_DECIMALS)
        return places_of(np.where(total[table.group_of, 0] > 0, mixed, -default), table)
