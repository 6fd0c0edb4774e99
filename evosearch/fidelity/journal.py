"""What a study has found so far: one JSON record per line, appended and synced as it lands.

One process writes (it holds the directory's lock). A kill can tear the last line at most; it is
cut off when the file is opened again. Unlike a run's ledger nothing is looked up while it is
written, so a list in memory is index enough.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from evosearch.errors import BackendError, ConfigMismatch, LedgerCorrupt, LedgerVersionError
from evosearch.locks import RunLock

__all__ = ["Journal"]

VERSION = 1
_FILE = "fidelity.jsonl"
_KIND = "evosearch-fidelity"


class Journal:
    """The records of one study, in the order in which they landed.

    Guarantees:

    **Durability.** When `append` returns, the record survives a kill.
    **Single writer.** An open journal holds the directory's lock.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]], lock: RunLock) -> None:
        self.path = path
        self.records = records
        self._lock = lock
        # Nothing may linger in a buffer that closing would write a second time.
        self._stream = path.open("ab", buffering=0)
        self._end = self._stream.tell()

    @classmethod
    def open(cls, directory: Path, settings: Mapping[str, Any]) -> Self:
        """Opens the journal of a directory, or makes one that belongs to these settings.

        Args:
            directory: Made if missing.
            settings: Plain data that decides what records mean.

        Raises:
            ConfigMismatch: The journal was made with other settings; names the first.
            LedgerLocked: Another process writes to it.
            LedgerCorrupt: A line before the last one is damaged, or the file is no journal.
            BackendError: The directory cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise BackendError(f"--out: {directory} cannot be made: {exc.strerror}") from exc
        lock = RunLock(directory)
        path = directory / _FILE
        try:
            records = _read(path) if path.exists() else []
            if records:
                _check(path, records[0], _flat(settings))
            journal = cls(path, records[1:], lock)
        except BaseException:
            lock.release()
            raise
        if not records:
            header = {"kind": _KIND, "version": VERSION, "settings": settings}
            journal._write(header)
        return journal

    def append(self, kind: str, **fields: Any) -> None:
        """Adds a record and makes it durable."""
        record = {"kind": kind, **fields}
        self._write(record)
        self.records.append(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        left = memoryview(line)
        try:
            while left:
                left = left[self._stream.write(left) :]
            os.fsync(self._stream.fileno())
            self._end += len(line)
        except OSError as exc:
            with contextlib.suppress(OSError):
                self._stream.truncate(self._end)
            raise BackendError(
                f"{self.path}: {exc.strerror}; free some space and run the same command again"
            ) from exc

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, oldest first."""
        return [record for record in self.records if record["kind"] == kind]

    def close(self) -> None:
        """Closes the file and gives the lock back."""
        try:
            self._stream.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole records; what follows the last end of line is cut off the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, KeyError, TypeError) as exc:
            raise LedgerCorrupt(
                f"{path}, line {number} is damaged; restore the file from a copy, remove that line "
                "if it is not the first, or name another --out"
            ) from exc
        records.append(record)
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return records


def _check(path: Path, header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if header["kind"] != _KIND or not {"settings", "version"} <= header.keys():
        raise LedgerCorrupt(f"{path} is not a journal of evosearch fidelity; name another --out")
    if header["version"] != VERSION:
        raise LedgerVersionError(
            f"{path} has version {header['version']}, this evosearch reads {VERSION}; name another "
            "--out"
        )
    recorded = _flat(header["settings"])
    for key in sorted(recorded.keys() | settings.keys()):
        if recorded.get(key) != settings.get(key):
            raise ConfigMismatch(
                f"{path.parent} was made with {key} = {_short(recorded.get(key))}, now it is "
                f"{_short(settings.get(key))}; name another --out for another study, or that value "
                "to go on with this one"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, as JSON gives them back; a missing value is None."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(data)).items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
