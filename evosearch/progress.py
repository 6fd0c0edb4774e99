"""What a person sees of a run while it goes on."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help shows no run, and need not wait for numpy
    from evosearch.measurement import Measurement

__all__ = ["Progress", "Silence"]


class Progress:
    """Shows a run on stderr: a line per phase, a line every few seconds in between."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def phase(self, text: str) -> None:
        """A new phase has begun."""
        sys.stderr.write(f"[{time.monotonic() - self._start:6.1f} s] {text}\n")
        sys.stderr.flush()

    def landed(self, track: str, measurement: "Measurement", count: int, budget: int) -> None:
        """A measurement landed."""
        now = time.monotonic()
        if measurement.failed:
            self.phase(f"{measurement.policy.digest} {measurement.status}: {measurement.reason}")
        if now - self._last > 5 or count == budget:
            self._last = now
            self.phase(f"{track} {count} of {budget}")


class Silence:
    """Watches a run and says nothing."""

    def phase(self, text: str) -> None:
        """A new phase has begun."""

    def landed(self, track: str, measurement: "Measurement", count: int, budget: int) -> None:
        """A measurement landed."""
