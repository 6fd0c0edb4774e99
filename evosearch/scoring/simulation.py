"""A cluster that only pretends: what the dispatcher does with it is real, what workers do is sleep.

For tests, in time of its own, and for `benchmarks/scaling.py`, in real time: one process can then
be any number of workers, since one that sleeps needs no thread.
"""

import heapq
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evosearch.errors import WorkerLost
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.scoring.racing import Race

__all__ = ["Clock", "Fate", "RealClock", "SimulatedCluster", "VirtualClock"]


class Clock(Protocol):
    """Time, in seconds."""

    def now(self) -> float:
        """Never goes back."""

    def sleep(self, seconds: float) -> None:
        """Lets time pass."""

    def work(self, seconds: float) -> None:
        """Keeps this process busy for so long."""


class VirtualClock:
    """Time passes only when somebody waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """See Clock."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """See Clock. However little, some time passes: rounding must not stop it."""
        self._now = max(self._now + seconds, math.nextafter(self._now, math.inf))

    work = sleep


class RealClock:
    """The time on the wall."""

    def now(self) -> float:
        """See Clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        time.sleep(seconds)

    def work(self, seconds: float) -> None:
        """See Clock."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What happens when a worker gets a policy.

    Args:
        seconds: How long it takes; infinite for a worker that hangs.
        measurement: What comes back; None if the worker dies instead.
    """

    seconds: float
    measurement: Measurement | None


class SimulatedCluster:
    """Workers that sleep; see `Transport`.

    Args:
        workers: How many.
        fate: What a policy does to its worker, asked anew each time that it is sent.
        clock: Whose time.
        start_s: Time that a replacement takes to start.
        submit_s, result_s: Time that sending and fetching keep the driver busy.
    """

    def __init__(
        self,
        workers: int,
        fate: Callable[[Policy], Fate],
        clock: Clock,
        *,
        start_s: float = 0.0,
        submit_s: float = 0.0,
        result_s: float = 0.0,
    ) -> None:
        self._fate = fate
        self._clock = clock
        self._start_s = start_s
        self._submit_s, self._result_s = submit_s, result_s
        self._current: list[int | None] = [None] * workers
        self._results: dict[Hashable, Fate | None] = {}
        self._events: list[tuple[float, int]] = []
        self._handles = 0
        self.busy_s = 0.0
        """Time that workers spent on policies which they brought to an end."""
        self.slept_s = 0.0
        """Time that the driver had nothing to do."""

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._current)

    def _begin(self, worker: int, seconds: float, fate: Fate | None) -> int:
        self._handles += 1
        self._current[worker] = self._handles
        self._results[self._handles] = fate
        if math.isfinite(seconds):
            heapq.heappush(self._events, (self._clock.now() + seconds, self._handles))
        return self._handles

    def submit(self, worker: int, policy: Policy, race: Race | None = None) -> Hashable:  # noqa: ARG002
        """See Transport.

        Raises:
            RuntimeError: The worker has something to do already.
        """
        if self._current[worker] is not None:
            raise RuntimeError(f"worker {worker} is busy")
        if self._submit_s:
            self._clock.work(self._submit_s)
        fate = self._fate(policy)
        return self._begin(worker, fate.seconds, fate)

    def wait(
        self,
        handles: Sequence[Hashable],  # noqa: ARG002  whoever waits, waits for everything
        timeout_s: float,
    ) -> Sequence[Hashable]:
        """See Transport."""
        end = self._clock.now() + timeout_s
        done: list[Hashable] = []
        while not done:
            now = self._clock.now()
            while self._events and self._events[0][0] <= now:
                _, handle = heapq.heappop(self._events)
                if handle in self._results:  # else: its worker was replaced meanwhile
                    done.append(handle)
            if done or now >= end:
                break
            soonest = self._events[0][0] if self._events else end
            self._clock.sleep(max(min(soonest, end) - now, 0.0))
            self.slept_s += self._clock.now() - now
        return done

    def result(self, handle: Hashable) -> Measurement | None:
        """See Transport."""
        if self._result_s:
            self._clock.work(self._result_s)
        fate = self._results.pop(handle)
        self._current[self._current.index(handle)] = None  # type: ignore[arg-type]
        if fate is None:
            return None
        if fate.measurement is None:
            raise WorkerLost("it was fated to")
        self.busy_s += fate.seconds
        return fate.measurement

    def replace(self, worker: int) -> Hashable:
        """See Transport."""
        self._results.pop(self._current[worker], None)
        return self._begin(worker, self._start_s, None)
