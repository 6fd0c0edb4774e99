"""A study's files for people: tables, JSON and a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evosearch.fidelity.comparison import Comparison, PolicyRow
from evosearch.fidelity.statistics import Correlation, ceiling
from evosearch.files import write_atomically
from evosearch.results.export import Records, export

__all__ = ["write_files"]

_NUMBERS = ("tau", "tau_low", "tau_high", "rho", "rho_low", "rho_high")
_COLUMNS = ("set", "truth", "predictor", "metric", "n", *_NUMBERS, "seconds", "learned")


def write_files(comparison: Comparison, directory: Path) -> tuple[Path, ...]:
    """Writes what there is to tell; policies alone if nothing can be compared yet.

    Raises:
        BackendError: A file cannot be written.
    """
    policies = directory / "policies.csv"
    export(_policy_records(comparison), policies)
    if not comparison.findings:
        return (policies,)
    from evosearch.results.plots import plot_fidelity

    table, data = directory / "fidelity.csv", directory / "fidelity.json"
    export(_finding_records(comparison), table)
    text = json.dumps(_as_json(comparison), indent=2, allow_nan=False) + "\n"
    write_atomically(data, lambda scratch: scratch.write_text(text))
    files = [table, policies, data]
    main = comparison.truths[0]
    for name in comparison.sets:
        findings = comparison.of(name)
        if not findings:
            continue
        repeated = comparison.reliability.get((name, main))
        picture = directory / ("fidelity.png" if name == "random" else f"fidelity-{name}.png")
        best = None if repeated is None else ceiling(repeated.tau)
        write_atomically(picture, partial(plot_fidelity, findings, best))
        files.append(picture)
    return tuple(files)


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _numbers(found: Correlation) -> dict[str, Any]:
    return {name: _known(getattr(found, name)) for name in _NUMBERS}


def _finding_rows(comparison: Comparison) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "set": finding.policies,
            "truth": finding.truth,
            "predictor": finding.predictor,
            "metric": finding.metric,
            "n": finding.correlation.n,
            **_numbers(finding.correlation),
            "seconds": finding.seconds,
            "learned": finding.learned,
        }
        for finding in comparison.findings
    )


def _finding_records(comparison: Comparison) -> Records:
    return Records(_COLUMNS, _finding_rows(comparison))


def _cells(row: PolicyRow) -> dict[str, Any]:
    scores = {
        f"{variant}.{metric}": value
        for variant, metrics in row.scores.items()
        for metric, value in metrics.items()
    }
    repetitions = {
        f"{name}#{index}": value
        for index, numbers in enumerate(row.repetitions)
        for name, value in numbers.items()
    }
    seconds = {f"{variant}.seconds": value for variant, value in row.seconds.items()}
    return {**row.truth, **repetitions, **scores, **seconds}


def _policy_records(comparison: Comparison) -> Records:
    """One row per policy: costs, truth, scores, widths."""
    cells = [_cells(row) for row in comparison.rows]
    found = tuple(dict.fromkeys(name for cell in cells for name in cell))
    widths = tuple(f"keep:{name}" for name in comparison.groups)
    rows = tuple(
        {
            "set": row.policies,
            "policy": row.policy.digest,
            "macs": row.share,
            "macs_count": row.macs,
            "params_count": row.params,
            "truth_seconds": row.truth_seconds,
            **{name: cell.get(name) for name in found},
            **dict(zip(widths, row.policy.keep, strict=True)),
        }
        for row, cell in zip(comparison.rows, cells, strict=True)
    )
    costs = ("macs", "macs_count", "params_count", "truth_seconds")
    return Records(("set", "policy", *costs, *found, *widths), rows)


def _named(values: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    return [{"of": first, "truth": second, **value} for (first, second), value in values.items()]


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        **comparison.settings,
        "findings": list(_finding_rows(comparison)),
        "reliability": _named(
            {
                key: {**_numbers(found), "ceiling": _known(ceiling(found.tau))}
                for key, found in comparison.reliability.items()
            }
        ),
        "models": _named(comparison.models),
        "failures": list(comparison.failures),
        "policies": [
            {**asdict(row), "policy": row.policy.digest, "keep": row.policy.keep}
            for row in comparison.rows
        ],
    }
