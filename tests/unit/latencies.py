"""Tables that know how long passes take, of seconds that follow from widths."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evosearch.latency import fit_latency
from evosearch.pruning.table import GroupTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def random_widths(table: GroupTable, n: int = 60) -> IntArray:
    """`(n, n_groups)` kept channels, the dense network's first."""
    shares = np.random.default_rng(0).random((n, len(table.groups)))
    keep = np.ceil(table.channels * shares).astype(np.int64).clip(1)
    keep[0] = table.channels
    return keep


def seconds_of(table: GroupTable, keep: IntArray) -> FloatArray:
    """A millisecond, a nanosecond for each MAC, and a microsecond for each channel."""
    return 1e-3 + 1e-9 * table.costs(keep)[0] + 1e-6 * keep.sum(axis=1)


def timed(table: GroupTable) -> GroupTable:
    """The table with a model of such seconds."""
    keep = random_widths(table)
    channels = table.channels.tolist()
    model = fit_latency(table.shapes(), channels, keep, seconds_of(table, keep))
    return replace(table, latency=model)
