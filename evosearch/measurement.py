"""What came back for a policy: metrics, estimates of them, or the reason why there are none."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from evosearch.policy import Policy

__all__ = ["METRICS", "Measurement", "Status", "Terms"]

METRICS: dict[str, str] = {
    "error": "share of validation images whose top-1 class is wrong",
    "loss": "mean cross-entropy on the validation images, in nats",
    "margin": "mean of 1 minus the lead of the right class over the best wrong one, in probability",
    "divergence": "mean KL divergence from the dense network's outputs, in nats; needs no labels",
    "distortion": "mean squared error of the last feature maps (of the outputs, where these maps "
    "are cut, too), as a share of the dense network's energy; needs no labels and few images",
}


class Status(enum.StrEnum):
    """How scoring ended."""

    OK = "ok"
    DROPPED = "dropped"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out-of-memory"
    WORKER_LOST = "worker-lost"

    @property
    def failed(self) -> bool:
        """Whether nothing is known of the policy."""
        return self not in (Status.OK, Status.DROPPED)


class Terms(enum.StrEnum):
    """On what images a policy is measured; of each kind it has one measurement at most."""

    FULL = "full"
    """All validation images."""
    RACED = "raced"
    """Validation images, as long as nothing known is surely better."""
    CHECK = "check"
    """Other images, which the search has not seen."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of scoring one policy. Either all metrics are there and finite, or a reason is.

    One that was dropped has both: estimates, and why they are no more than that.

    Args:
        policy: What was scored.
        status: How it ended.
        metrics: Values of METRICS, lower is better; empty if it failed.
        seconds: Time that scoring took, for planning; never part of a result.
        reason: Why there are no metrics, or only estimates, for people.
        images: Validation images that it has seen; None if it failed.
        blocks: `(n_blocks, len(METRICS))` float32 means over blocks of images, as bytes, for those
            who race against it; empty where nobody does.

    Raises:
        ValueError: The fields contradict each other.
    """

    policy: Policy
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    images: int | None = None
    blocks: bytes = b""

    def __post_init__(self) -> None:
        if not self.status.failed:
            bad = [name for name in METRICS if not math.isfinite(self.metrics.get(name, math.nan))]
            if bad:
                raise ValueError(
                    f"a measurement that is {self.status} has finite {', '.join(METRICS)}; "
                    f"bad: {bad}"
                )
        elif self.metrics:
            raise ValueError(f"a {self.status} measurement has no metrics")
        if self.status is not Status.OK and not self.reason:
            raise ValueError(f"a {self.status} measurement has a reason")

    @property
    def ok(self) -> bool:
        """Whether there are metrics, of all validation images."""
        return self.status is Status.OK

    @property
    def failed(self) -> bool:
        """Whether there is nothing but a reason."""
        return self.status.failed
