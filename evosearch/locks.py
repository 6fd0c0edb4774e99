"""Who may write to a run's directory, or a study's: one process at a time."""

import fcntl
import os
import socket
import time
from pathlib import Path

from evosearch.errors import BackendError, LedgerLocked

__all__ = ["LOCK_FILE", "RunLock", "lock_holder"]

LOCK_FILE = "lock"
_TRIES, _PAUSE_S = 20, 0.02


class RunLock:
    """Exclusive right to write to a run; the system takes it back when the process ends."""

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK_FILE
        try:
            self._stream = self._path.open("a+")
        except OSError as exc:
            raise BackendError(f"cannot write to {run}: {exc.strerror}") from exc
        # Somebody who asks for the holder takes the lock for a moment, so one refusal is no answer.
        for patience in range(_TRIES):
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if patience + 1 < _TRIES:
                    time.sleep(_PAUSE_S)
                    continue
                self._stream.close()
                raise LedgerLocked(
                    f"{run} is in use by {lock_holder(run) or 'another process'}; "
                    "wait for it to end, or stop it"
                ) from exc
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._stream.flush()

    def release(self) -> None:
        """Gives the right back."""
        self._stream.truncate(0)
        self._stream.close()


def lock_holder(run: Path) -> str | None:
    """Who writes to a run right now, or None."""
    try:
        with (run / LOCK_FILE).open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return stream.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None
