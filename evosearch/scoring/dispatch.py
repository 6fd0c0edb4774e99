"""Hands policies to workers and takes measurements back. Knows neither Ray nor torch.

Workers are numbers. What stands behind a number, a Ray actor or a simulated machine, is the
transport's business; who gets what next, deadlines and deaths are decided here.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evosearch.errors import BackendError, WorkerLost
from evosearch.measurement import Measurement, Status
from evosearch.policy import Policy
from evosearch.scoring.racing import NO_RACES, Race, Races

__all__ = ["Dispatcher", "Record", "Stop", "Transport"]

Record = Callable[[Measurement], None]
Stop = Callable[[], bool]

_START_TIMEOUT_S = 300.0
_START_TRIES = 3
_CANDIDATE_TRIES = 2
_POLL_S = 0.5


class Transport(Protocol):
    """Carries policies to workers. A handle stands for what is under way."""

    @property
    def workers(self) -> int:
        """How many there are; they are numbered from 0."""

    def submit(self, worker: int, policy: Policy, race: Race | None = None) -> Hashable:
        """Sends a policy, and its race if it has one, to an idle worker, without waiting."""

    def wait(self, handles: Sequence[Hashable], timeout_s: float) -> Sequence[Hashable]:
        """Those that are done: at least one unless time ran out, not necessarily all."""

    def result(self, handle: Hashable) -> Measurement | None:
        """What a handle that is done came to; None if it stood for a start.

        Raises:
            WorkerLost: The worker died.
        """

    def replace(self, worker: int) -> Hashable:
        """Ends a worker, whatever it does, and starts another; done once that one is ready."""


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A policy on its way."""

    policy: Policy
    worker: int
    attempt: int
    deadline: float


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A worker that is being replaced."""

    worker: int
    attempt: int
    deadline: float


class Dispatcher:
    """Keeps every worker busy; see `Pool.score` for the promise.

    A worker that dies or hangs is replaced, and gets nothing until its replacement is ready: time
    to start is not the next candidate's. A candidate is tried once more when its worker died, and
    recorded as failed the second time. After an exception there are candidates under way of which
    nobody knows: then only closing is left.

    Args:
        transport: The workers, all of them ready.
        timeout_s: Longest that one candidate may take.
        clock: Seconds that never go back.
    """

    def __init__(
        self, transport: Transport, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._clock = clock
        self._idle = deque(range(transport.workers))
        self._starting: dict[Hashable, _Start] = {}
        self._waiting: deque[tuple[Policy, int]] = deque()
        self._races: Races = {}
        self._open: set[Policy] = set()
        # Of policies that wait for another try, which may be in a later call.
        self._attempts: dict[Policy, int] = {}
        # In the order of dispatch, which is the order of deadlines, too.
        self._flying: dict[Hashable, _Flight] = {}

    def score(
        self,
        policies: Sequence[Policy],
        record: Record,
        stop: Stop,
        races: Races = NO_RACES,
        ahead: Sequence[Policy] = (),
    ) -> None:
        """Scores all policies; see `Pool.score`. What was sent ahead earlier is not sent again.

        Raises:
            BackendError: No worker is left, and none can be started.
        """
        flying = {flight.policy for flight in self._flying.values()}
        self._waiting = deque(
            (policy, self._attempts.get(policy, 1))
            for policy in (*policies, *ahead)
            if policy not in flying
        )
        self._open = set(policies)
        self._races = races
        self._dispatch(stop)
        while self._unfinished(stop):
            self._take(self._wait(), record, stop)
            # Whoever looks late must not take what is done for late: first all that is there.
            while self._late() and (done := self._transport.wait(self._under_way(), 0.0)):
                self._take(done, record, stop)
            for measurement in self._overdue():
                self._record(measurement, record)
            self._dispatch(stop)

    def _take(self, done: Sequence[Hashable], record: Record, stop: Stop) -> None:
        for handle in done:
            measurement = self._land(handle)
            # The worker first: it need not wait for the disk.
            self._dispatch(stop)
            if measurement:
                self._record(measurement, record)

    def _under_way(self) -> list[Hashable]:
        return [*self._flying, *self._starting]

    def _unfinished(self, stop: Stop) -> bool:
        """Once stopped, what is under way is finished; else what was asked for, not what is ahead.

        A search that comes to its end has nothing ahead: then nothing is left flying.
        """
        return bool(self._flying) if stop() else bool(self._open)

    def _record(self, measurement: Measurement, record: Record) -> None:
        self._open.discard(measurement.policy)
        self._attempts.pop(measurement.policy, None)
        record(measurement)

    def _dispatch(self, stop: Stop) -> None:
        while self._idle and self._waiting and not stop():
            policy, attempt = self._waiting.popleft()
            worker = self._idle.popleft()
            deadline = self._clock() + self._timeout_s
            handle = self._transport.submit(worker, policy, self._races.get(policy))
            self._flying[handle] = _Flight(
                policy=policy, worker=worker, attempt=attempt, deadline=deadline
            )

    def _wait(self) -> Sequence[Hashable]:
        under_way = self._under_way()
        if not under_way:
            raise BackendError(
                "no scorer is left: each died, and so did its replacements; try --workers 0, "
                "which shows why"
            )
        patience = _POLL_S
        if self._flying:
            first = next(iter(self._flying.values()))
            patience = min(patience, max(0.0, first.deadline - self._clock()))
        done = self._transport.wait(under_way, patience)
        if not done and not self._flying and not self._idle:
            self._check_starts()
        return done

    def _check_starts(self) -> None:
        """Nothing can be done but wait for starts: not for ever."""
        if all(start.deadline < self._clock() for start in self._starting.values()):
            raise BackendError(
                f"no scorer is left, and none could be started within {_START_TIMEOUT_S:.0f} s; "
                "see to the cluster and resume"
            )

    def _land(self, handle: Hashable) -> Measurement | None:
        if handle in self._starting:
            self._started(handle, self._starting.pop(handle))
            return None
        flight = self._flying.pop(handle)
        try:
            measurement = self._transport.result(handle)
        except WorkerLost as exc:
            self._replace(flight.worker)
            if flight.attempt < _CANDIDATE_TRIES:
                self._attempts[flight.policy] = flight.attempt + 1
                self._waiting.appendleft((flight.policy, flight.attempt + 1))
                return None
            return Measurement(
                policy=flight.policy,
                status=Status.WORKER_LOST,
                reason=f"the scorer died twice: {exc}",
            )
        self._idle.append(flight.worker)
        return measurement

    def _started(self, handle: Hashable, start: _Start) -> None:
        try:
            self._transport.result(handle)
        except WorkerLost:
            # Given up after a few tries; the others go on.
            if start.attempt < _START_TRIES:
                self._replace(start.worker, start.attempt + 1)
        else:
            self._idle.append(start.worker)

    def _replace(self, worker: int, attempt: int = 1) -> None:
        deadline = self._clock() + _START_TIMEOUT_S
        handle = self._transport.replace(worker)
        self._starting[handle] = _Start(worker=worker, attempt=attempt, deadline=deadline)

    def _late(self) -> list[Hashable]:
        now, late = self._clock(), []
        for handle, flight in self._flying.items():
            if flight.deadline > now:
                break
            late.append(handle)
        return late

    def _overdue(self) -> list[Measurement]:
        return [self._time_out(self._flying.pop(handle)) for handle in self._late()]

    def _time_out(self, flight: _Flight) -> Measurement:
        self._replace(flight.worker)
        return Measurement(
            policy=flight.policy,
            status=Status.TIMEOUT,
            seconds=self._timeout_s,
            reason=f"took longer than run.timeout_s = {self._timeout_s:g}",
        )
