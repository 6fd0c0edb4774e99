"""Tables of a run as files. The only module that imports pandas.

Columns depend on what was measured alone, not on when or where: a run that was killed and resumed
exports the same bytes. Only `--all` adds the seconds that scoring took.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evosearch.errors import BackendError, ConfigError
from evosearch.measurement import METRICS
from evosearch.results.front import Results, Row

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SUFFIXES", "export", "to_frame", "write_atomically"]

SUFFIXES = (".csv", ".json", ".parquet", ".png")


def to_frame(results: Results, rows: Sequence[Row], *, everything: bool = False) -> "pd.DataFrame":
    """A table with one row per policy.

    Args:
        results: Names of groups.
        rows: Which policies.
        everything: Add status, feasibility, seconds and reasons of failures.

    Returns:
        Columns `policy`, the metrics, `macs` and `params` as shares of dense, `macs_count` and
        `params_count`, and the kept channels of each group as `keep:NAME`.
    """
    import pandas as pd

    return pd.DataFrame.from_records(
        [_record(results, row, everything) for row in rows], columns=_columns(results, everything)
    )


def _columns(results: Results, everything: bool) -> list[str]:
    groups = [f"keep:{name}" for name, _ in results.groups]
    columns = ["policy", *METRICS, "macs", "params", "macs_count", "params_count", *groups]
    if everything:
        columns[1:1] = ["status", "on_front", "violation"]
        columns += ["seconds", "reason"]
    return columns


def _record(results: Results, row: Row, everything: bool) -> dict[str, object]:
    record: dict[str, object] = {"policy": row.policy.digest}
    record |= {name: row.values.get(name) for name in (*METRICS, "macs", "params")}
    record |= {"macs_count": row.macs, "params_count": row.params}
    record |= {
        f"keep:{name}": count
        for (name, _), count in zip(results.groups, row.policy.keep, strict=True)
    }
    if everything:
        record |= {
            "status": row.status.value,
            "on_front": row.on_front,
            "violation": row.violation,
            "seconds": row.seconds,
            "reason": row.reason,
        }
    return record


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, then gives it its own.

    Raises:
        BackendError: The file cannot be written.
    """
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as exc:
        raise BackendError(f"cannot write {path}: {exc.strerror or exc}") from exc
    finally:
        scratch.unlink(missing_ok=True)


def export(results: Results, path: Path, *, everything: bool = False) -> None:
    """Writes the front, or every measurement, in the format of the suffix.

    Raises:
        ConfigError: Another suffix.
        BackendError: The file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} must end with one of {', '.join(SUFFIXES)}")
    if path.suffix == ".png":
        from evosearch.results.plots import plot_front

        write_atomically(path, lambda scratch: plot_front(results, scratch))
        return
    rows = results.rows if everything else results.front
    if path.suffix == ".json":
        # Not by pandas, which rounds numbers.
        records = [_record(results, row, everything) for row in rows]
        text = json.dumps(records, indent=2) + "\n"
        write_atomically(path, lambda scratch: scratch.write_text(text))
        return
    frame = to_frame(results, rows, everything=everything)
    if path.suffix == ".csv":
        write_atomically(
            path, lambda scratch: frame.to_csv(scratch, index=False, lineterminator="\n")
        )
    else:
        write_atomically(path, lambda scratch: frame.to_parquet(scratch, index=False))
