"""Tables of a run as files. The only module that imports pandas.

Columns depend on what was measured alone, not on when or where: a run that was killed and resumed
exports the same bytes. Only `--all` adds the seconds that scoring took.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evosearch.errors import ConfigError
from evosearch.files import write_atomically
from evosearch.ledger import Member
from evosearch.measurement import METRICS
from evosearch.policy import Policy
from evosearch.results.front import Results, Row

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Records",
    "export",
    "frame",
    "front_records",
    "measurement_records",
    "population_records",
]


@dataclass(frozen=True)
class Records:
    """A table: names of columns, and one dict per row that has all of them."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


_VALUES = (*METRICS, "macs", "params", "latency")
_TIMED = "check:latency"
_CHECKED = (*(f"check:{name}" for name in METRICS), _TIMED)
_TEXT = ("policy", "status", "reason")
_NUMBERS = (*_VALUES, *_CHECKED, "violation", "seconds", "crowding")
_COUNTS = ("images",)


def _policy_columns(results: Results) -> tuple[str, ...]:
    """Widths per group and, in a run in which policies have them, blends."""
    blends = any(row.policy.blend for row in (*results.rows, *results.baseline))
    kinds = ("keep", "blend") if blends else ("keep",)
    return tuple(f"{kind}:{name}" for kind in kinds for name, _ in results.groups)


def _kept(results: Results, policy: Policy) -> dict[str, Any]:
    blends = policy.blend or ((),) * len(policy.keep)
    told = [" + ".join(f"{weight} {name}" for name, weight in pairs) for pairs in blends]
    columns = _policy_columns(results)
    return dict(zip(columns, [*policy.keep, *told][: len(columns)], strict=True))


def _value_columns(results: Results) -> tuple[str, ...]:
    """Metrics and shares; latency where it is known."""
    return _VALUES if "latency" in results.dense else _VALUES[:-1]


def _measured(row: Row, columns: tuple[str, ...]) -> dict[str, Any]:
    values = {name: row.values.get(name) for name in columns}
    return {**values, "macs_count": row.macs, "params_count": row.params}


def _checked_columns(results: Results) -> tuple[str, ...]:
    """Metrics on the check images; latency as it was timed, where it is foreseen."""
    return _CHECKED if "latency" in results.dense else _CHECKED[:-1]


def _checked(row: Row, columns: tuple[str, ...]) -> dict[str, Any]:
    found = {f"check:{name}": value for name, value in row.checked.items()}
    return {name: row.timed if name == _TIMED else found.get(name) for name in columns}


def front_records(results: Results) -> Records:
    """The front by first objective: metrics, costs as shares and counts, widths, how it held."""
    columns = (
        "policy",
        *_value_columns(results),
        "macs_count",
        "params_count",
        *_policy_columns(results),
        *_checked_columns(results),
    )
    return Records(
        columns,
        tuple(
            {
                "policy": row.policy.digest,
                **_measured(row, _value_columns(results)),
                **_kept(results, row.policy),
                **_checked(row, _checked_columns(results)),
            }
            for row in results.front
        ),
    )


def measurement_records(results: Results) -> Records:
    """Every measurement of the search in the order of first asking, failures included."""
    columns = (
        *("policy", "status", "on_front", "violation", *_value_columns(results)),
        *("macs_count", "params_count"),
        *(*_policy_columns(results), "images", "seconds", "reason"),
    )
    return Records(
        columns,
        tuple(
            {
                "policy": row.policy.digest,
                "status": row.status.value,
                "on_front": row.on_front,
                "violation": row.violation,
                **_measured(row, _value_columns(results)),
                **_kept(results, row.policy),
                "images": row.images,
                "seconds": row.seconds,
                "reason": row.reason,
            }
            for row in results.rows
        ),
    )


def population_records(results: Results, members: Sequence[Member]) -> Records:
    """A generation's population in the algorithm's order, with rank and crowding distance."""
    values = _value_columns(results)
    columns = ("policy", "status", "rank", "crowding", *values, *_policy_columns(results))
    measured = {row.policy: row for row in results.rows}
    return Records(
        columns,
        tuple(
            {
                "policy": member.policy.digest,
                # A policy that breaks a budget was never measured.
                "status": measured[member.policy].status.value
                if member.policy in measured
                else None,
                "rank": member.rank,
                "crowding": member.crowding,
                **{
                    name: measured[member.policy].values.get(name)
                    if member.policy in measured
                    else None
                    for name in values
                },
                **_kept(results, member.policy),
            }
            for member in members
        ),
    )


def _write_json(records: Records, path: Path) -> None:
    # Not by pandas, which rounds numbers. Infinite crowding is null: JSON has no word for it.
    rows = [
        {k: None if v in (float("inf"), float("-inf")) else v for k, v in row.items()}
        for row in records.rows
    ]
    path.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")


def frame(records: Records) -> "pd.DataFrame":
    """The table, each column with the type that it has in every run."""
    import pandas as pd

    found = pd.DataFrame.from_records(list(records.rows), columns=list(records.columns))
    # A column that happens to be empty in this run keeps the type it has in others.
    text = (*_TEXT, *(name for name in records.columns if name.startswith("blend:")))
    types = {
        **dict.fromkeys(
            text, "string"
        ),  # not `str`, which makes the text "None" of None in pandas 2
        **dict.fromkeys(_NUMBERS, "float64"),
        **dict.fromkeys(_COUNTS, "Int64"),
    }
    return found.astype({name: kind for name, kind in types.items() if name in found})


def _write_csv(records: Records, path: Path) -> None:
    frame(records).to_csv(path, index=False, lineterminator="\n")


def _write_parquet(records: Records, path: Path) -> None:
    frame(records).to_parquet(path, index=False)


_WRITERS: dict[str, Callable[[Records, Path], None]] = {
    ".csv": _write_csv,
    ".json": _write_json,
    ".parquet": _write_parquet,
}


def export(records: Records, path: Path) -> None:
    """Writes a table in the format of the suffix, atomically.

    Raises:
        ConfigError: The suffix is none of .csv, .json, .parquet.
        BackendError: The file cannot be written.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError(f"{path} must end with one of {', '.join(_WRITERS)}")
    write_atomically(path, lambda scratch: _WRITERS[path.suffix](records, scratch))
