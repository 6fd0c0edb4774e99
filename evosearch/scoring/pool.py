"""Where policies are scored: in this process, or by actors on Ray. The only import of Ray.

Both give bit-identical measurements on one machine; where scoring runs is a detail.
"""

import contextlib
import logging
import os
import pickle
import re
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from evosearch.errors import BackendError, ConfigError, WorkerLost
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.recipe import RunRecipe
from evosearch.scoring.devices import gpus_here, keep_to_share
from evosearch.scoring.dispatch import Dispatcher, Record, Stop
from evosearch.scoring.racing import NO_RACES, Race, Races
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload

__all__ = ["InProcessPool", "Pool", "RayPool", "RayTransport", "make_pool"]

_START_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 5.0


class Pool(Protocol):
    """Scores policies and reports each measurement the moment it lands."""

    def score(
        self,
        policies: Sequence[Policy],
        record: Record,
        stop: Stop,
        races: Races = NO_RACES,
        ahead: Sequence[Policy] = (),
    ) -> None:
        """Scores all policies, the given order being the order of dispatch.

        Args:
            policies: Distinct ones.
            record: Called once per policy, in the order of landing.
            stop: Asked before each dispatch; once true, what is in flight is finished and
                recorded, and the rest is left.
            races: Who may beat which policy before it has seen all images.
            ahead: What will be asked for next; begun where a scorer has nothing else to do. It may
                land in this call, or in a later one that asks for it.
        """

    def close(self) -> None:
        """Frees the scorers."""


class InProcessPool:
    """Scores here, one after another: the reference for every other pool."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        self._scorer: Scorer | None = Scorer(workload, device)

    def score(
        self,
        policies: Sequence[Policy],
        record: Record,
        stop: Stop,
        races: Races = NO_RACES,
        ahead: Sequence[Policy] = (),  # noqa: ARG002  one scorer always has something to do
    ) -> None:
        """See Pool."""
        assert self._scorer is not None  # noqa: S101  nobody asks what they closed
        for policy in policies:
            if stop():
                return
            record(self._scorer.score(policy, races.get(policy)))

    def close(self) -> None:
        """Frees what the scorer held, of which there may be much on a GPU."""
        self._scorer = None


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Lets no exception of Ray leave this module."""
    import ray.exceptions

    try:
        yield
    except BackendError:
        raise
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as exc:
        raise BackendError(f"Ray failed: {_told(exc)}; try --workers 0") from exc


def _told(exc: Exception) -> str:
    """What Ray says first and, where that is the beginning of a traceback, what it says last."""
    lines = str(exc).strip().splitlines() or [repr(exc)]
    # Process, address and object of an actor mean nothing to anybody.
    first = re.sub(r",?\s*(\x1b\[\d+m)?ray::.*", "", lines[0])
    last = lines[-1].strip() if len(lines) > 1 else ""
    return f"{first} ({last})" if first and last else first or last or lines[0]


class RayTransport:
    """Actors with the methods `ready()` and `score(policy, race)`; see `Transport`.

    Args:
        start: Starts an actor.
        workers: How many.
    """

    def __init__(self, start: Callable[[], Any], workers: int) -> None:
        import ray

        self._ray = ray
        self._start = start
        self._actors = [start() for _ in range(workers)]

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._actors)

    def ready(self) -> list[Any]:
        """References that are there once all actors are."""
        return [actor.ready.remote() for actor in self._actors]

    def submit(self, worker: int, policy: Policy, race: Race | None = None) -> Hashable:
        """See Transport."""
        with _translated():
            reference: Hashable = self._actors[worker].score.remote(policy, race)
            return reference

    def wait(self, handles: Sequence[Hashable], timeout_s: float) -> Sequence[Hashable]:
        """See Transport. One at a time: asking for all that are done costs more than it saves."""
        with _translated():
            done: list[Hashable] = self._ray.wait(list(handles), timeout=timeout_s)[0]
            return done

    def result(self, handle: Hashable) -> Measurement | None:
        """See Transport."""
        try:
            measurement: Measurement | None = self._ray.get(handle)  # type: ignore[call-overload]
        except self._ray.exceptions.RayError as exc:
            raise WorkerLost(_told(exc)) from exc
        return measurement

    def replace(self, worker: int) -> Hashable:
        """See Transport."""
        with _translated():
            self._ray.kill(self._actors[worker])
            self._actors[worker] = self._start()
            reference: Hashable = self._actors[worker].ready.remote()
            return reference

    def kill_all(self) -> None:
        """Ends all actors."""
        for actor in self._actors:
            self._ray.kill(actor)


class RayPool:
    """Long-lived Ray actors that hold network, images and statistics.

    A policy goes out, a measurement comes back; see `Dispatcher` for scorers that die or hang.

    Args:
        workload: What to score with; put into the object store once.
        settings: How many scorers, and where.

    Raises:
        BackendError: No cluster, or a scorer that cannot be started.
    """

    def __init__(self, workload: Workload, settings: RunRecipe) -> None:
        if settings.ray_address is not None:
            _prepare_joining(settings.ray_address)
        import ray

        self._ray = ray
        self._owns_cluster = not ray.is_initialized()
        try:
            with _translated():
                if self._owns_cluster:
                    _start_cluster(ray, workload, settings)
                reference = ray.put(workload)
                remote = _remote_scorer(ray, settings)
                self._transport = RayTransport(lambda: remote.remote(reference), settings.workers)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self._dispatcher = Dispatcher(self._transport, settings.timeout_s)

    def _wait_until_ready(self) -> None:
        with _translated():
            try:
                self._ray.get(self._transport.ready(), timeout=_START_TIMEOUT_S)
            except self._ray.exceptions.GetTimeoutError as exc:
                raise BackendError(
                    f"the cluster gave no {self._transport.workers} scorers within "
                    f"{_START_TIMEOUT_S:.0f} s; ask for fewer --workers"
                ) from exc

    def score(
        self,
        policies: Sequence[Policy],
        record: Record,
        stop: Stop,
        races: Races = NO_RACES,
        ahead: Sequence[Policy] = (),
    ) -> None:
        """See Pool."""
        self._dispatcher.score(policies, record, stop, races, ahead)

    def close(self) -> None:
        """Stops the scorers, and the cluster if it was started here."""
        with contextlib.suppress(Exception):
            self._transport.kill_all()
        if self._owns_cluster:
            self._ray.shutdown()


def _prepare_joining(address: str) -> None:
    """Finds out in seconds whether a cluster answers, and shows it this user's token.

    Ray itself tries an address that does not answer for many minutes. A cluster started where a
    token exists asks for it, but a driver offers it only if told to.

    Raises:
        ConfigError: The address is not host:port or auto.
        BackendError: Nothing answers there.
    """
    default_token = Path.home() / ".ray" / "auth_token"
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or default_token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"run.ray_address must read host:port or auto, got {address!r}")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER_TIMEOUT_S):
            return
    except OSError as exc:
        raise BackendError(
            f"no Ray cluster answers at {address} ({exc.strerror or exc}); start one there with "
            "`ray start --head`, or leave run.ray_address out"
        ) from exc


def _start_cluster(ray: Any, workload: Workload, settings: RunRecipe) -> None:
    # Quiet: workers' own chatter is of no use to somebody who searches.
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.ray_address is not None:
        ray.init(address=settings.ray_address, **common)
        return
    ray.init(
        # Asked for by name: a bare init would attach to whatever RAY_ADDRESS says.
        address="local",
        num_cpus=max(settings.workers, 1),
        num_gpus=gpus_here() if settings.gpus_per_worker > 0 else 0,
        include_dashboard=False,
        # The default is 30% of memory, more than /dev/shm holds in many containers.
        object_store_memory=max(80 << 20, 2 * _size(workload) + (64 << 20)),
        **common,
    )


def _size(workload: Workload) -> int:
    """Bytes that a workload takes when it is sent."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(workload, protocol=5, buffer_callback=arrays.append)
    return len(rest) + sum(array.raw().nbytes for array in arrays)


def _remote_scorer(ray: Any, settings: RunRecipe) -> Any:
    device = "cuda" if settings.gpus_per_worker > 0 else "cpu"

    class RemoteScorer:
        """A Scorer in a process of its own."""

        def __init__(self, workload: Workload) -> None:
            import torch

            torch.set_num_threads(1)
            keep_to_share(settings.gpus_per_worker)
            self._scorer = Scorer(workload, device)

        def ready(self) -> None:
            """Returns once the scorer has been made."""

        def score(self, policy: Policy, race: Race | None = None) -> Measurement:
            """Measures a policy."""
            return self._scorer.score(policy, race)

    return ray.remote(num_cpus=1, num_gpus=settings.gpus_per_worker)(RemoteScorer)


def make_pool(workload: Workload, settings: RunRecipe) -> Pool:
    """Makes the pool that the settings ask for."""
    if settings.workers == 0:
        return InProcessPool(workload, "cuda" if settings.gpus_per_worker > 0 else "cpu")
    return RayPool(workload, settings)
