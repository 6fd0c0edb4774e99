"""Policies of a ResNet-20, and what it means that two measurements agree."""

from collections.abc import Callable

from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.scoring.workload import (
    Workload,
)

BATCH = 16
DENSE = Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))
HALF = Policy((8, 8, 8, 16, 16, 16, 32, 32, 32))
ODD = Policy((3, 16, 5, 7, 32, 1, 64, 9, 33))
BARE = Policy((1,) * 9)

Prepare = Callable[..., Workload]


def same(left: Measurement, right: Measurement) -> bool:
    """Whether two measurements agree bit for bit in all but their seconds."""
    return (left.policy, left.status, left.metrics, left.reason) == (
        right.policy,
        right.status,
        right.metrics,
        right.reason,
    )
