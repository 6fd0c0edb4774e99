"""One threshold on the scores of all channels: how many each group keeps, without any search.

This is what pruning libraries call global pruning. Scores of different layers are brought to one
scale; then the channels of the whole network go in the order of their scores. That ignores what a
channel saves, which differs by factors between early and late layers, so scores may be divided by
it: the order in which a knapsack is filled greedily [Shen2022].

Knows nothing of torch.

References:
    [Shen2022] M. Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from evosearch.pruning.table import GroupTable

__all__ = ["SCALES", "Scale", "importance", "losses", "savings", "thresholds"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Scale = Literal["none", "mean", "max"]
SCALES: tuple[str, ...] = get_args(Scale)


def savings(table: GroupTable, cost: str = "macs") -> FloatArray:
    """What a channel of each group saves while the other groups are whole.

    Args:
        table: Groups and costs.
        cost: `macs`, `params` or, if it was measured, `latency`.

    Returns:
        `(n_groups,)` shares of the dense network's cost, averaged over half of the group, as time
        falls in steps; 0 where nothing is saved.
    """
    keep = np.tile(table.channels, (len(table.groups), 1))
    diagonal = np.diag_indices(len(table.groups))
    keep[diagonal] = table.whole((table.channels + 1) // 2)
    gone = table.channels - keep[diagonal]
    saved = 1.0 - table.share(cost, keep)
    return np.asarray(np.maximum(saved, 0.0) / np.maximum(gone, 1))


def importance(scores: FloatArray, table: GroupTable, scale: Scale = "max") -> FloatArray:
    """Scores of all groups on one scale.

    Args:
        scores: `(n_channels,)` by flat channel number, larger = more important.
        table: The groups.
        scale: What each group's scores are divided by: their `mean`, their `max`, nothing. Where
            some are negative, the least of the group counts as zero.

    Returns:
        `(n_channels,)`, none negative unless `scale` is `none`.
    """
    found = np.array(scores, dtype=np.float64)
    if scale == "none":
        return found
    for first, n in zip(table.offsets, table.channels, strict=True):
        part = found[first : first + n]
        part -= min(float(part.min()), 0.0)
        whole = float(part.mean() if scale == "mean" else part.max())
        part /= whole if whole > 0 else 1.0
    return found


def thresholds(
    importance: FloatArray, table: GroupTable, saved: FloatArray | None = None, power: float = 0.0
) -> IntArray:
    """What a rising threshold leaves, from the dense network down.

    Args:
        importance: `(n_channels,)` on one scale.
        table: The groups.
        saved: `(n_groups,)` from `savings`.
        power: Scores are divided by this power of what is saved; 0 ignores it.

    Returns:
        `(n_rungs, n_groups)` kept channels, at least one and whole granules in each group; each
        row keeps less than the one before.
    """
    order_by = importance.copy()
    if power and saved is not None:
        order_by /= np.repeat(_prices(saved) ** power, table.channels)
    order = np.argsort(order_by, kind="stable")
    gone = np.zeros((len(order) + 1, len(table.groups)), dtype=np.int64)
    gone[np.arange(1, len(order) + 1), table.group_of[order]] = 1
    keep = table.whole(np.maximum(table.channels - np.cumsum(gone, axis=0), 1))
    changed = np.append(True, (np.diff(keep, axis=0) != 0).any(axis=1))
    return np.asarray(keep[changed])


def losses(
    importance: FloatArray, table: GroupTable, saved: FloatArray, power: float = 0.0
) -> list[FloatArray]:
    """What the channels that go are worth to a threshold: how much a policy should lose, by guess.

    A knapsack is filled by worth over cost, so scores over `saved ** power` are the order for a
    worth of scores times `saved ** (1 - power)`; of all policies that save as much, those of
    `thresholds` lose least of that, up to the channel at the threshold.

    Args:
        importance: `(n_channels,)` on one scale; less than zero counts as zero.
        table: The groups.
        saved: `(n_groups,)` from `savings`.
        power: As for `thresholds`.

    Returns:
        For each group `(n_channels + 1,)` by the number of channels that it keeps: shares of what
        goes where every group keeps one channel.
    """
    worth = np.maximum(importance, 0.0)
    worth *= np.repeat(_prices(saved) ** (1.0 - power), table.channels)
    groups = np.split(worth, table.offsets[1:])
    # Keeping k, all but the k best are gone.
    gone = [np.append(np.cumsum(np.sort(part))[::-1], 0.0) for part in groups]
    most = sum(float(part[1]) for part in gone)
    return [part / (most if most > 0 else 1.0) for part in gone]


def _prices(saved: FloatArray) -> FloatArray:
    """What is saved, positive: what saves nothing goes with what saves least."""
    least = float(saved[saved > 0].min(initial=np.inf))
    return np.where(saved > 0, saved, least if np.isfinite(least) else 1.0)
