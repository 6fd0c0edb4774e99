"""Snapshots of a search beside its ledger, so that a resume need not breed all generations again.

A snapshot is a shortcut. It is used when the code and the libraries that made it are the same to
the digit, and everything in it could be had again by replaying the ledger, which is what happens
otherwise.
"""

import hashlib
import importlib.metadata
import inspect
import json
import platform
import sys
import time
from pathlib import Path

from evosearch.algorithms import Algorithm, Resumable, State
from evosearch.ledger import Ledger, Snapshot
from evosearch.space import SearchSpace

__all__ = ["EVERY_S", "Snapshots", "snapshot_stamp", "versions"]

# A kill costs the breeding of so many seconds; writing takes at most such a share of the time.
EVERY_S = 5.0
_SHARE = 0.02


class Snapshots:
    """The snapshots of one track.

    Args:
        ledger: Open for writing.
        track: Whose.
        algorithm: Who remembers.
        stamp: What must be the same for a snapshot to be of use; empty: none are kept or used.
        every_s: Least seconds between two; 0 for one after each generation.
    """

    def __init__(
        self, ledger: Ledger, track: str, algorithm: Algorithm, stamp: str, every_s: float
    ) -> None:
        self._ledger = ledger
        self._track = track
        self._algorithm = algorithm if stamp and isinstance(algorithm, Resumable) else None
        self._stamp = stamp
        self._every_s = every_s
        self._due = time.monotonic() + every_s
        self._kept = 0

    def last(self) -> Snapshot | None:
        """The one to go on from."""
        if self._algorithm is None:
            return None
        snapshot = self._ledger.snapshot(self._track, self._stamp)
        if snapshot is not None:
            self._kept = snapshot.generation
        return snapshot

    def keep(self, generation: int, more: State, *, now: bool = False) -> None:
        """Keeps one if it is time, or has to be now.

        Args:
            generation: How many generations were told.
            more: To be kept beside what the algorithm remembers.
            now: Whether it has to be.
        """
        begun = time.monotonic()
        if self._algorithm is None or generation <= self._kept or (begun < self._due and not now):
            return
        self._ledger.keep_snapshot(
            self._track,
            Snapshot(
                stamp=self._stamp,
                generation=generation,
                state={**self._algorithm.state(), **more},
            ),
        )
        self._kept = generation
        ended = time.monotonic()
        if self._every_s:
            self._due = ended + max(self._every_s, (ended - begun) / _SHARE)


def versions() -> dict[str, str]:
    """Of Python and the libraries on which results may depend."""
    names = (
        *("evosearch", "torch", "torch-pruning", "ray", "numpy", "scipy"),
        *("pymoo", "moocore"),  # moocore ranks for pymoo
    )
    libraries = {name: importlib.metadata.version(name) for name in names}
    return libraries | {"python": platform.python_version()}


def snapshot_stamp(space: SearchSpace) -> str:
    """What must be the same for a snapshot to be used: versions, our own code and the space's."""
    packages = {Path(__file__).parent}
    modules = set()
    for kind in type(space).__mro__:
        top = kind.__module__.partition(".")[0]
        if top not in sys.stdlib_module_names:
            modules.add(Path(inspect.getfile(kind)))
            packages.update(map(Path, getattr(sys.modules.get(top), "__path__", ())))
    sources = sorted(modules.union(*(package.rglob("*.py") for package in packages)))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return json.dumps({**versions(), "code": code}, sort_keys=True)
