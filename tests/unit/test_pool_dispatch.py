"""The dispatcher over a simulated cluster, in simulated time."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evosearch.errors import BackendError
from evosearch.measurement import Measurement, Status
from evosearch.policy import Policy
from evosearch.scoring.dispatch import Dispatcher
from evosearch.scoring.simulation import Fate, SimulatedCluster, VirtualClock

TIMEOUT_S = 100.0
METRICS = {"error": 0.1, "loss": 0.2, "margin": 0.25, "divergence": 0.3, "distortion": 0.1}


def policies(n: int) -> list[Policy]:
    return [Policy((k,)) for k in range(1, n + 1)]


def measured(policy: Policy, seconds: float = 1.0) -> Measurement:
    return Measurement(policy=policy, status=Status.OK, metrics=METRICS, seconds=seconds)


def takes(seconds: float) -> Callable[[Policy], Fate]:
    return lambda policy: Fate(seconds=seconds, measurement=measured(policy, seconds))


class Bench:
    """A dispatcher, its cluster and what it recorded."""

    def __init__(self, workers: int, fate: Callable[[Policy], Fate], start_s: float = 0.0) -> None:
        self.clock = VirtualClock()
        self.sent: list[tuple[float, int]] = []
        self.landed: list[tuple[float, Measurement]] = []
        self.stop_after = math.inf
        self._fate = fate
        self.cluster = SimulatedCluster(workers, self._send, self.clock, start_s=start_s)
        self.dispatcher = Dispatcher(self.cluster, TIMEOUT_S, self.clock.now)

    def _send(self, policy: Policy) -> Fate:
        self.sent.append((self.clock.now(), policy.keep[0]))
        return self._fate(policy)

    def _record(self, measurement: Measurement) -> None:
        self.landed.append((self.clock.now(), measurement))

    def score(self, some: Sequence[Policy]) -> list[Measurement]:
        self.dispatcher.score(some, self._record, lambda: len(self.landed) >= self.stop_after)
        return [measurement for _, measurement in self.landed]


def test_policies_are_sent_in_their_order_as_workers_become_free() -> None:
    bench = Bench(2, lambda p: takes(10.0 if p.keep[0] == 1 else 3.0)(p))
    bench.score(policies(5))
    assert bench.sent == [(0, 1), (0, 2), (3, 3), (6, 4), (9, 5)]
    assert [(at, m.policy.keep[0]) for at, m in bench.landed] == [
        (3, 2),
        (6, 3),
        (9, 4),
        (10, 1),
        (12, 5),
    ]


def test_next_policy_is_on_its_way_before_the_last_one_is_recorded() -> None:
    bench = Bench(1, takes(1.0))
    sent: list[int] = []
    bench.dispatcher.score(policies(3), lambda _: sent.append(len(bench.sent)), lambda: False)
    assert sent == [2, 3, 3]


def test_no_policies_take_no_time() -> None:
    bench = Bench(3, takes(1.0))
    assert bench.score([]) == []
    assert bench.clock.now() == 0


def test_stop_finishes_what_is_in_flight_and_leaves_the_rest() -> None:
    bench = Bench(3, takes(2.0))
    bench.stop_after = 1
    landed = bench.score(policies(20))
    sent = [k for _, k in bench.sent]
    assert sorted(m.policy.keep[0] for m in landed) == sorted(sent)
    assert 3 <= len(sent) <= 6


def test_stop_before_the_beginning_sends_nothing() -> None:
    bench = Bench(3, takes(2.0))
    bench.stop_after = 0
    assert bench.score(policies(5)) == []
    assert bench.sent == []


def test_policy_whose_worker_died_is_tried_once_more() -> None:
    deaths = iter([True])
    bench = Bench(
        2,
        lambda p: Fate(
            seconds=1, measurement=None if p.keep[0] == 2 and next(deaths, False) else measured(p)
        ),
    )
    assert {m.policy.keep[0]: m.status for m in bench.score(policies(4))} == dict.fromkeys(
        (1, 2, 3, 4), Status.OK
    )
    assert Counter(k for _, k in bench.sent) == {1: 1, 2: 2, 3: 1, 4: 1}


def test_policy_whose_worker_died_twice_is_lost_with_a_reason() -> None:
    bench = Bench(2, lambda p: Fate(seconds=1, measurement=None if p.keep[0] == 2 else measured(p)))
    landed = {m.policy.keep[0]: m for m in bench.score(policies(6))}
    assert landed[2].status is Status.WORKER_LOST
    assert str(landed[2].reason).startswith("the scorer died twice: ")
    assert len(landed) == 6


def test_worker_that_hangs_is_replaced_and_its_policy_is_a_timeout() -> None:
    hangs = Fate(seconds=math.inf, measurement=None)
    bench = Bench(1, lambda p: hangs if p.keep[0] == 1 else takes(1.0)(p), start_s=5)
    first, second = bench.score(policies(2))
    assert (first.policy.keep[0], first.status, first.seconds) == (1, Status.TIMEOUT, TIMEOUT_S)
    assert str(first.reason) == "took longer than run.timeout_s = 100"
    assert second.ok
    assert bench.sent[1][0] == pytest.approx(TIMEOUT_S + 5)


def test_time_to_start_again_is_not_the_next_candidates_time() -> None:
    bench = Bench(1, takes(TIMEOUT_S - 1), start_s=50)
    bench.dispatcher.score([], lambda _: None, lambda: False)
    hangs = iter([True])
    bench._fate = lambda p: (
        Fate(seconds=math.inf, measurement=None) if next(hangs, False) else takes(TIMEOUT_S - 1)(p)
    )
    assert [m.status for m in bench.score(policies(2))] == [Status.TIMEOUT, Status.OK]


def test_replacement_that_starts_meanwhile_serves_the_next_call() -> None:
    hangs = Fate(seconds=math.inf, measurement=None)
    bench = Bench(1, lambda p: hangs if p.keep[0] == 1 else takes(1.0)(p), start_s=20)
    assert len(bench.score(policies(1))) == 1
    assert bench.clock.now() == pytest.approx(TIMEOUT_S)
    assert len(bench.score(policies(2)[1:])) == 2
    assert bench.clock.now() == pytest.approx(TIMEOUT_S + 21)


class Dying(SimulatedCluster):
    """A cluster of which replacements do not start."""

    def result(self, handle: object) -> Measurement | None:
        measurement = super().result(handle)  # type: ignore[arg-type]
        if measurement is None:
            from evosearch.errors import WorkerLost

            raise WorkerLost("no memory")
        return measurement


def test_workers_that_cannot_be_started_again_are_given_up() -> None:
    clock = VirtualClock()
    deaths = iter([True])
    cluster = Dying(
        2,
        lambda p: Fate(seconds=1, measurement=None if next(deaths, False) else measured(p)),
        clock,
    )
    landed: list[Measurement] = []
    Dispatcher(cluster, TIMEOUT_S, clock.now).score(policies(5), landed.append, lambda: False)
    assert len(landed) == 5


def test_no_worker_left_is_an_error_that_says_so() -> None:
    clock = VirtualClock()
    cluster = Dying(2, lambda p: Fate(seconds=1, measurement=None), clock)
    with pytest.raises(BackendError, match="no scorer is left"):
        Dispatcher(cluster, TIMEOUT_S, clock.now).score(policies(5), print, lambda: False)


def test_replacements_that_never_start_are_not_waited_for_for_ever() -> None:
    bench = Bench(1, lambda p: Fate(seconds=1, measurement=None), start_s=math.inf)
    with pytest.raises(BackendError, match="none could be started within 300 s"):
        bench.score(policies(2))
    assert 300 < bench.clock.now() < 310


fates = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "ok", "dies", "hangs", "dies once"]),
        st.floats(0.001, 1.5 * TIMEOUT_S),
    ),
    max_size=40,
)


@given(fates, st.integers(1, 9), st.floats(0, 30), st.integers(0, 60))
def test_no_policy_is_lost_or_doubled(
    drawn: list[tuple[str, float]], workers: int, start_s: float, stop_after: int
) -> None:
    died: set[Policy] = set()

    def fate(policy: Policy) -> Fate:
        kind, seconds = drawn[policy.keep[0] - 1]
        if kind == "hangs":
            return Fate(seconds=math.inf, measurement=None)
        dies = kind == "dies" or (kind == "dies once" and policy not in died)
        died.add(policy)
        return Fate(seconds=seconds, measurement=None if dies else measured(policy))

    some = policies(len(drawn))
    bench = Bench(workers, fate, start_s)
    bench.stop_after = stop_after
    landed = bench.score(some)
    recorded = [measurement.policy for measurement in landed]
    assert len(set(recorded)) == len(recorded), "doubled"
    if stop_after > len(some):
        assert set(recorded) == set(some), "lost"
    else:
        assert len(recorded) <= stop_after + 2 * workers
    for measurement in landed:
        kind, seconds = drawn[measurement.policy.keep[0] - 1]
        possible = {
            "ok": {Status.OK},
            "dies once": {Status.OK},
            "dies": {Status.WORKER_LOST},
            "hangs": {Status.TIMEOUT},
        }[kind]
        slow = seconds >= TIMEOUT_S - 1e-6
        assert measurement.status in possible | ({Status.TIMEOUT} if slow else set())
    # Whatever happened: all workers serve the next call.
    bench.stop_after = math.inf
    bench._fate = takes(1.0)
    rest = [policy for policy in some if policy not in recorded]
    assert len(bench.score(rest)) == len(some)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=60), st.integers(1, 8))
def test_no_worker_idles_while_something_waits(seconds: list[float], workers: int) -> None:
    seconds.sort(reverse=True)
    bench = Bench(workers, lambda p: takes(seconds[p.keep[0] - 1])(p))
    bench.score(policies(len(seconds)))
    # What any schedule without needless waiting keeps (Graham 1966): the last one to end began when
    # all workers were busy.
    bound = sum(seconds) / workers + max(seconds) * (1 - 1 / workers)
    assert bench.clock.now() <= bound + 1e-6
    assert bench.cluster.busy_s == pytest.approx(sum(seconds))


# --- what is ahead


def test_what_is_ahead_fills_workers_that_have_nothing_to_do() -> None:
    bench = Bench(2, lambda p: takes(10.0 if p.keep[0] == 2 else 1.0)(p))
    now, later = policies(6)[:2], policies(6)[2:]
    record, never = bench._record, lambda: False
    bench.dispatcher.score(now, record, never, ahead=later)
    assert bench.clock.now() == 10
    assert [m.policy.keep[0] for _, m in bench.landed] == [1, 3, 4, 5, 6, 2]
    bench.dispatcher.score([], record, never)
    assert bench.clock.now() == 10


def test_what_is_still_flying_is_not_sent_again() -> None:
    bench = Bench(2, lambda p: takes(float(p.keep[0]))(p))
    first, second, third = (policies(6)[i : i + 2] for i in (0, 2, 4))
    record, never = bench._record, lambda: False
    bench.dispatcher.score(first, record, never, ahead=second)
    assert bench.clock.now() == 2  # 3 and 4 have begun
    bench.dispatcher.score(second, record, never, ahead=third)
    bench.dispatcher.score(third, record, never)
    assert sorted(k for _, k in bench.sent) == [1, 2, 3, 4, 5, 6]
    assert sorted(m.policy.keep[0] for _, m in bench.landed) == [1, 2, 3, 4, 5, 6]


def test_stop_finishes_what_was_begun_ahead() -> None:
    bench = Bench(3, takes(2.0))
    bench.dispatcher.score(
        policies(1), bench._record, lambda: bool(bench.landed), ahead=policies(9)[1:]
    )
    assert sorted(m.policy.keep[0] for _, m in bench.landed) == sorted(k for _, k in bench.sent)
    assert len(bench.landed) >= 3


def test_policy_ahead_whose_worker_died_has_one_try_left_later() -> None:
    bench = Bench(1, lambda p: Fate(seconds=1, measurement=None if p.keep[0] == 2 else measured(p)))
    record, never = bench._record, lambda: False
    first, second = policies(2)
    bench.dispatcher.score([first], record, never, ahead=[second])
    bench.dispatcher.score([second], record, never)
    assert Counter(k for _, k in bench.sent) == {1: 1, 2: 2}
    assert bench.landed[-1][1].status is Status.WORKER_LOST


@given(
    workers=st.integers(1, 9),
    seconds=st.lists(st.floats(0.01, 20), min_size=1, max_size=60),
    size=st.integers(1, 12),
)
def test_overlapping_generations_measure_each_policy_once(
    workers: int, seconds: list[float], size: int
) -> None:
    everybody = policies(len(seconds))
    bench = Bench(workers, lambda p: takes(seconds[p.keep[0] - 1])(p))
    parts = [everybody[i : i + size] for i in range(0, len(everybody), size)]
    landed: list[int] = []
    for part, ahead in zip(parts, [*parts[1:], []], strict=True):
        missing = [policy for policy in part if policy.keep[0] not in landed]
        bench.dispatcher.score(
            missing,
            lambda m: landed.append(m.policy.keep[0]),
            lambda: False,
            ahead=[policy for policy in ahead if policy.keep[0] not in landed],
        )
        assert {policy.keep[0] for policy in part} <= set(landed)
    assert sorted(landed) == [policy.keep[0] for policy in everybody]
    assert len(bench.sent) == len(everybody)


def test_what_was_done_while_nobody_looked_is_not_late() -> None:
    bench = Bench(4, takes(1.0))
    record, never = bench._record, lambda: False
    bench.dispatcher.score([], record, never, ahead=policies(4))
    # The driver is busy with something else for longer than a candidate may take.
    bench.clock.sleep(2 * TIMEOUT_S)
    bench.dispatcher.score(policies(4), record, never)
    assert [m.status for _, m in bench.landed] == [Status.OK] * 4
    assert len(bench.sent) == 4


def test_what_hangs_while_nobody_looks_is_late_all_the_same() -> None:
    hangs = Fate(seconds=math.inf, measurement=None)
    bench = Bench(3, lambda p: hangs if p.keep[0] == 2 else takes(1.0)(p), start_s=1.0)
    record, never = bench._record, lambda: False
    bench.dispatcher.score([], record, never, ahead=policies(3))
    bench.clock.sleep(2 * TIMEOUT_S)
    bench.dispatcher.score(policies(3), record, never)
    found = {m.policy.keep[0]: m.status for _, m in bench.landed}
    assert found == {1: Status.OK, 2: Status.TIMEOUT, 3: Status.OK}
