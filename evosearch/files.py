"""Files appear whole or not at all, and one that cannot be written is a sentence."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from evosearch.errors import BackendError, ConfigError

__all__ = ["PORTABLE", "make_parent", "write_atomically"]

PORTABLE = (".onnx", ".pt2")
"""Suffixes of networks that run without evosearch: ONNX, and what torch.export.load reads."""


def make_parent(path: Path) -> None:
    """Makes the folder that a file goes into.

    Raises:
        ConfigError: The file cannot have that name: something on the way is no folder.
        BackendError: The system refuses.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise ConfigError(f"cannot write {path}: {path.parent} is not a folder") from exc
    except OSError as exc:
        raise BackendError(f"cannot write {path}: {exc.strerror or exc}") from exc


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, then gives it its own.

    Args:
        path: The file; its folder is made if need be.
        write: Called with the temporary name, which has the same suffix.

    Raises:
        ConfigError: The file cannot have that name.
        BackendError: The file cannot be written.
    """
    make_parent(path)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(scratch)
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as exc:
        raise BackendError(f"cannot write {path}: {exc.strerror or exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
