"""The run's SQLite file. The only module that imports sqlite3.

One process writes (it holds a lock on `lock` beside the file), any number may read meanwhile:
the write-ahead log lets them. Every measurement is one transaction, committed before anybody
hears of it. What was asked, and the population of every generation, is there to look at.

A committed transaction is with the operating system: no kill of processes can lose it. Waiting
until it is on the disk costs some milliseconds each time, so that a cluster of hundreds would wait
for one file; therefore that is done at most once a second, and at most a second late. When the
power fails, what was committed within the last second may be missing, as if it had not been
measured; the file stays sound.
"""

import contextlib
import io
import json
import math
import os
import sqlite3
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import (
    BackendError,
    LedgerCorrupt,
    LedgerError,
    LedgerVersionError,
    RunExists,
)
from evosearch.locks import RunLock
from evosearch.measurement import Measurement, Status, Terms
from evosearch.policy import Policy

__all__ = [
    "LEDGER_FILE",
    "SCHEMA_VERSION",
    "Entry",
    "Ledger",
    "Member",
    "Snapshot",
    "check_new",
    "leftovers",
]

SCHEMA_VERSION = 3
_APPLICATION_ID = 0x45564F53  # "EVOS"
LEDGER_FILE = "ledger.sqlite"
"""Of a run, within its directory."""
_SCRATCH = ".tmp"
_SYNC_EVERY_S = 1.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE policies (
    digest TEXT PRIMARY KEY,
    policy TEXT NOT NULL,
    macs INTEGER NOT NULL,
    params INTEGER NOT NULL
) STRICT;
CREATE TABLE measurements (
    landed INTEGER PRIMARY KEY,
    digest TEXT NOT NULL REFERENCES policies,
    terms TEXT NOT NULL,
    status TEXT NOT NULL,
    metrics TEXT NOT NULL,
    images INTEGER,
    seconds REAL NOT NULL,
    reason TEXT,
    blocks BLOB NOT NULL,
    finished_at REAL NOT NULL,
    UNIQUE (digest, terms)
) STRICT;
CREATE TABLE asks (
    track TEXT NOT NULL,
    generation INTEGER NOT NULL,
    position INTEGER NOT NULL,
    digest TEXT NOT NULL REFERENCES policies,
    PRIMARY KEY (track, generation, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE population (
    generation INTEGER NOT NULL,
    position INTEGER NOT NULL,
    digest TEXT NOT NULL REFERENCES policies,
    rank INTEGER NOT NULL,
    crowding REAL NOT NULL,
    PRIMARY KEY (generation, position)
) STRICT, WITHOUT ROWID;
"""


# Ledgers without it are as good: whoever resumes one replays it.
_SNAPSHOTS = """
CREATE TABLE IF NOT EXISTS snapshots (
    track TEXT PRIMARY KEY,
    stamp TEXT NOT NULL,
    generation INTEGER NOT NULL,
    state BLOB NOT NULL
) STRICT;
"""
_STATE = "state."


_MEASURED = "status, metrics, images, seconds, reason, blocks"


def _measurement(
    policy: Policy,
    status: str,
    metrics: str,
    images: int | None,
    seconds: float,
    reason: str | None,
    blocks: bytes,
) -> Measurement:
    """From the columns of _MEASURED."""
    return Measurement(
        policy=policy,
        status=Status(status),
        metrics=json.loads(metrics),
        images=images,
        seconds=seconds,
        reason=reason,
        blocks=blocks,
    )


@dataclass(frozen=True, kw_only=True)
class Member:
    """One policy of a generation's population, with its standing there."""

    policy: Policy
    rank: int
    crowding: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a search remembered after some generations: a shortcut, not a truth of its own.

    Args:
        stamp: What must be the same for it to be of use.
        generation: How many generations had been told.
        state: Named arrays of numbers and strings.
    """

    stamp: str
    generation: int
    state: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A policy with its costs and, once it landed, its measurement."""

    policy: Policy
    macs: int
    params: int
    measurement: Measurement | None


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Lets no sqlite3 exception leave this module."""
    try:
        yield
    except sqlite3.IntegrityError as exc:
        raise LedgerError(
            f"{path}: {exc}; a policy is recorded once, after it was asked, with finite numbers"
        ) from exc
    except sqlite3.OperationalError as exc:
        if "disk" in str(exc) and "malformed" not in str(exc):
            raise BackendError(f"{path}: {exc}; free some space and resume") from exc
        if "readonly" in str(exc):
            raise LedgerError(f"{path} was opened for reading only") from exc
        if "unable to open" in str(exc):
            raise LedgerError(f"{path} cannot be opened: {exc}") from exc
        raise LedgerCorrupt(f"{path} cannot be used as a ledger: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise LedgerCorrupt(
            f"{path} is damaged or is not a ledger ({exc}); restore it from a copy, or launch anew "
            "with another --out"
        ) from exc


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turns a row that does not hold what it should into a sentence about the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as exc:
        raise LedgerCorrupt(
            f"{path} is damaged ({exc}); restore it from a copy, or launch anew with another --out"
        ) from exc


def check_new(run: Path) -> None:
    """Checks that a directory holds no run.

    Raises:
        RunExists: It does.
    """
    if (run / LEDGER_FILE).exists():
        again = f"evosearch resume {quote(str(run))}"
        raise RunExists(f"{run} is a run already; `{again}`, or name another --out")


def leftovers(run: Path) -> list[Path]:
    """What a launch that was killed at once may leave: a ledger that has no name yet."""
    return list(run.glob(f"{LEDGER_FILE}.*{_SCRATCH}"))


class Ledger:
    """The measurements of one run.

    Guarantees:

    **Durability.** When a recording method returns, what it recorded survives a kill; a second
    later a loss of power.
    **Immutability.** Measurements, asks and populations never change once they are recorded.
    **Single writer.** Opening for writing needs the run's lock.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: RunLock | None) -> None:
        self.path = path
        self._db = connection
        self._lock = lock
        self._synced_at = -math.inf
        self._later: threading.Timer | None = None

    @classmethod
    def create(cls, run: Path, meta: Mapping[str, Any]) -> Self:
        """Makes a ledger in a directory that has none, open for writing.

        Raises:
            RunExists: There is one already.
            LedgerLocked: Another process is about to make one.
        """
        lock = RunLock(run)
        path = run / LEDGER_FILE
        try:
            cls._make(path, meta)
            with _translated(path):
                connection = cls._connect(path, write=True)
                cls._prepare_writing(connection)
        except BaseException:
            lock.release()
            raise
        return cls(path, connection, lock)

    @staticmethod
    def _make(path: Path, meta: Mapping[str, Any]) -> None:
        """Complete before it has its name: a kill in between leaves no half-made ledger."""
        run = path.parent
        check_new(run)
        for leftover in (*run.glob(f"{LEDGER_FILE}-*"), *leftovers(run)):
            leftover.unlink(missing_ok=True)
        scratch = run / f"{LEDGER_FILE}.{os.getpid()}{_SCRATCH}"
        with _translated(path), contextlib.closing(sqlite3.connect(scratch)) as db:
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            rows = [(key, json.dumps(value)) for key, value in meta.items()]
            db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            db.commit()
        scratch.replace(path)

    @classmethod
    def open(cls, run: Path, *, write: bool = False) -> Self:
        """Opens the ledger of a run; readers never block a writer.

        Raises:
            LedgerError: There is no run.
            LedgerLocked: Another process writes to it (for writing only).
            LedgerVersionError: Another schema wrote it.
            LedgerCorrupt: It is damaged or no ledger.
        """
        path = run / LEDGER_FILE
        if not path.is_file():
            raise LedgerError(f"{run} is not a run: it has no {LEDGER_FILE}")
        lock = RunLock(run) if write else None
        try:
            with _translated(path):
                connection = cls._connect(path, write=write) if write else cls._reading(path)
                try:
                    cls._check(path, connection)
                    if write:
                        cls._prepare_writing(connection)
                except BaseException:
                    connection.close()
                    raise
        except BaseException:
            if lock:
                lock.release()
            raise
        return cls(path, connection, lock)

    @classmethod
    def _reading(cls, path: Path) -> sqlite3.Connection:
        """A connection for reading, in directories that one may not write to as well.

        Readers of a write-ahead log share an index that lies beside it. Where that cannot be made,
        the file is complete without if there is no log, as its last writer closed it.
        """
        connection = cls._connect(path, write=False)
        try:
            connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError as exc:
            connection.close()
            if os.access(path.parent, os.W_OK) or not os.access(path, os.R_OK):
                raise
            log = path.with_name(f"{path.name}-wal")
            if log.exists():
                raise LedgerError(
                    f"{path.parent} was not closed, or is being searched: some of it is in "
                    f"{log.name}, which cannot be read by who may not write to the directory; let "
                    "its owner run `evosearch status` there, or copy the directory"
                ) from exc
            return cls._connect(path, write=False, options="&immutable=1")
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _connect(path: Path, *, write: bool, options: str = "") -> sqlite3.Connection:
        mode = f"{'rw' if write else 'ro'}{options}"
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=30
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    @staticmethod
    def _prepare_writing(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_SNAPSHOTS)

    @staticmethod
    def _check(path: Path, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise LedgerCorrupt(f"{path} is not a ledger of evosearch")
        if version != SCHEMA_VERSION:
            raise LedgerVersionError(
                f"{path} has schema version {version}, this evosearch reads {SCHEMA_VERSION}; "
                "use the evosearch that wrote it"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            first = str(verdict).splitlines()[0]
            raise LedgerCorrupt(f"{path} is damaged ({first}); restore it from a copy")

    def close(self) -> None:
        """Closes the file and gives the lock back."""
        if self._later is not None:
            self._later.cancel()
        self._db.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _translated(self.path):
            now = time.monotonic()
            due = now - self._synced_at >= _SYNC_EVERY_S
            # FULL waits for the disk, for all that the log holds; NORMAL leaves it to a later one.
            self._db.execute(f"PRAGMA synchronous = {'FULL' if due else 'NORMAL'}")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            if due:
                self._synced_at = now
            elif self._later is None or not self._later.is_alive():
                # The next record may be long in coming.
                self._later = threading.Timer(_SYNC_EVERY_S, self._sync_log)
                self._later.daemon = True
                self._later.start()

    def _sync_log(self) -> None:
        """Waits until what was committed is on the disk; needs no connection of its thread."""
        # What fails here fails again, and is told, with the next record.
        with contextlib.suppress(OSError):
            log = os.open(self.path.with_name(f"{self.path.name}-wal"), os.O_RDONLY)
            try:
                os.fsync(log)
            finally:
                os.close(log)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with _translated(self.path):
            return self._db.execute(query, values).fetchall()

    def meta(self, key: str) -> Any:
        """A fact about the run; KeyError if it was never set."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        if not rows:
            raise KeyError(key)
        with _decoding(self.path):
            return json.loads(rows[0][0])

    def set_meta(self, key: str, value: Any) -> None:
        """Sets a fact about the run."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def record_ask(
        self,
        track: str,
        generation: int,
        policies: Sequence[Policy],
        costs: Sequence[tuple[int, int]],
    ) -> None:
        """Records what was asked, with costs `(macs, params)`; nothing if it already is there."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO policies VALUES (?, ?, ?, ?)",
                [
                    (policy.digest, policy.to_json(), macs, params)
                    for policy, (macs, params) in zip(policies, costs, strict=True)
                ],
            )
            db.executemany(
                "INSERT OR IGNORE INTO asks VALUES (?, ?, ?, ?)",
                [(track, generation, i, policy.digest) for i, policy in enumerate(policies)],
            )

    def asked(self, track: str, generation: int) -> list[str]:
        """Digests of what was asked in a generation, in order; empty if nothing was."""
        rows = self._rows(
            "SELECT digest FROM asks WHERE track = ? AND generation = ? ORDER BY position",
            (track, generation),
        )
        return [digest for (digest,) in rows]

    def record(
        self, measurement: Measurement, finished_at: float, *, terms: Terms = Terms.FULL
    ) -> None:
        """Records a measurement of an asked policy; it must be the first of its kind."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO measurements VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    measurement.policy.digest,
                    terms.value,
                    measurement.status.value,
                    json.dumps(dict(measurement.metrics), sort_keys=True),
                    measurement.images,
                    measurement.seconds,
                    measurement.reason,
                    measurement.blocks,
                    finished_at,
                ),
            )

    def record_population(self, generation: int, members: Sequence[Member]) -> None:
        """Records the population after a generation; nothing if it already is there."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO population VALUES (?, ?, ?, ?, ?)",
                [
                    (generation, i, member.policy.digest, member.rank, member.crowding)
                    for i, member in enumerate(members)
                ],
            )

    def keep_snapshot(self, track: str, snapshot: Snapshot) -> None:
        """Keeps a snapshot in place of the track's last one."""
        stream = io.BytesIO()
        arrays = {f"{_STATE}{name}": array for name, array in snapshot.state.items()}
        np.savez(stream, allow_pickle=False, **arrays)
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)",
                (track, snapshot.stamp, snapshot.generation, stream.getvalue()),
            )

    def snapshot(self, track: str, stamp: str) -> Snapshot | None:
        """The last snapshot of a track, of a ledger that is open for writing.

        Returns:
            None if there is none of that stamp, or it cannot be read: then there is the ledger.
        """
        rows = self._rows(
            "SELECT generation, state FROM snapshots WHERE track = ? AND stamp = ?", (track, stamp)
        )
        if not rows:
            return None
        ((generation, written),) = rows
        try:
            with np.load(io.BytesIO(written), allow_pickle=False) as arrays:
                state = {name.removeprefix(_STATE): array for name, array in arrays.items()}
        except (ValueError, EOFError, zipfile.BadZipFile):
            return None
        return Snapshot(stamp=stamp, generation=generation, state=state)

    def asked_before(self, track: str, generation: int) -> dict[str, Policy]:
        """What was asked before a generation, by digest."""
        rows = self._rows(
            "SELECT DISTINCT digest, policy FROM asks JOIN policies USING (digest) "
            "WHERE track = ? AND generation < ?",
            (track, generation),
        )
        with _decoding(self.path):
            return {digest: Policy.from_json(policy) for digest, policy in rows}

    def known(
        self, policies: Sequence[Policy], *, terms: Terms = Terms.FULL
    ) -> dict[str, Measurement]:
        """What is known about some policies, by digest."""
        by_digest = {policy.digest: policy for policy in policies}
        rows = self._rows(
            f"SELECT digest, {_MEASURED} FROM measurements "
            "WHERE terms = ? AND digest IN (SELECT value FROM json_each(?))",
            (terms.value, json.dumps(list(by_digest))),
        )
        with _decoding(self.path):
            return {digest: _measurement(by_digest[digest], *rest) for digest, *rest in rows}

    def generations(self) -> int:
        """How many populations are recorded; they are numbered from 0, without gaps."""
        ((last,),) = self._rows("SELECT COALESCE(MAX(generation), -1) FROM population")
        return int(last) + 1

    def measurements(self, *, terms: Terms = Terms.FULL) -> dict[str, Measurement]:
        """All measurements by digest, in the order in which they landed."""
        rows = self._rows(
            f"SELECT digest, policy, {_MEASURED} FROM measurements "
            "JOIN policies USING (digest) WHERE terms = ? ORDER BY landed",
            (terms.value,),
        )
        with _decoding(self.path):
            return {
                digest: _measurement(Policy.from_json(policy), *rest)
                for digest, policy, *rest in rows
            }

    def entries(self, track: str, *, terms: Terms = Terms.FULL) -> list[Entry]:
        """Distinct policies asked on a track, in the order of their first ask."""
        known = self.measurements(terms=terms)
        rows = self._rows(
            "SELECT digest, policy, macs, params, MIN(generation * 1000000 + position) AS first "
            "FROM asks JOIN policies USING (digest) WHERE track = ? GROUP BY digest ORDER BY first",
            (track,),
        )
        with _decoding(self.path):
            return [
                Entry(
                    policy=Policy.from_json(policy),
                    macs=macs,
                    params=params,
                    measurement=known.get(digest),
                )
                for digest, policy, macs, params, _ in rows
            ]

    def population(self, generation: int | None = None) -> list[Member]:
        """The population after a generation (the last one if None), in the algorithm's order."""
        if generation is None:
            ((generation,),) = self._rows("SELECT COALESCE(MAX(generation), -1) FROM population")
        rows = self._rows(
            "SELECT policy, rank, crowding FROM population JOIN policies USING (digest) "
            "WHERE generation = ? ORDER BY position",
            (generation,),
        )
        with _decoding(self.path):
            return [
                Member(policy=Policy.from_json(policy), rank=rank, crowding=crowding)
                for policy, rank, crowding in rows
            ]
