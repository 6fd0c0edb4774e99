"""What came back for a policy: metrics, or the reason why there are none."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from evosearch.policy import Policy

__all__ = ["METRICS", "Measurement", "Status"]

METRICS: dict[str, str] = {
    "error": "share of validation images whose top-1 class is wrong",
    "loss": "mean cross-entropy on the validation images, in nats",
    "margin": "mean of 1 minus the lead of the right class over the best wrong one, in probability",
    "divergence": "mean KL divergence from the dense network's outputs, in nats; needs no labels",
}


class Status(enum.StrEnum):
    """How scoring ended."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out-of-memory"
    WORKER_LOST = "worker-lost"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of scoring one policy. Either all metrics are there and finite, or a reason is.

    Args:
        policy: What was scored.
        status: How it ended.
        metrics: Values of METRICS, lower is better; empty unless the status is OK.
        seconds: Time that scoring took, for planning; never part of a result.
        reason: Why there are no metrics, for people.

    Raises:
        ValueError: The fields contradict each other.
    """

    policy: Policy
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.status is Status.OK:
            bad = [name for name in METRICS if not math.isfinite(self.metrics.get(name, math.nan))]
            if bad:
                raise ValueError(f"an OK measurement has finite {', '.join(METRICS)}; bad: {bad}")
        elif self.metrics or not self.reason:
            raise ValueError(f"a {self.status} measurement has a reason and no metrics")

    @property
    def ok(self) -> bool:
        """Whether there are metrics."""
        return self.status is Status.OK
