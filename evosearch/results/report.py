"""Tables for the terminal. The only module, beside the command line, that imports rich."""

import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from evosearch.fidelity.statistics import Correlation, Finding
from evosearch.measurement import METRICS, Status
from evosearch.results.front import Results, Row

__all__ = ["fidelity_table", "front_table", "hypervolume_lines"]

_MAX_ROWS = 24
# A search of fewer policies has seen little but what it begins with.
_HARDLY_BEGUN = 50
# Metrics of how far a network is from the dense one.
_DISTANCES = ("divergence", "distortion")
_TIMED = "timed"


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """At most `_MAX_ROWS` rows, both ends among them, evenly spread."""
    if len(rows) <= _MAX_ROWS:
        return list(rows)
    step = (len(rows) - 1) / (_MAX_ROWS - 1)
    return [rows[round(i * step)] for i in range(_MAX_ROWS)]


def front_table(results: Results) -> Table:
    """The front: what each network costs and how it does."""
    front = results.front
    shown = _thinned(front)
    title = f"Pareto front: {len(front)} of {len(results.rows)} measured policies"
    if not results.feasible:
        title = f"Nothing satisfies the constraints; nearest of {len(results.rows)} measured"
    if len(shown) < len(front):
        title += f" ({len(shown)} shown)"
    table = Table(title=title)
    table.add_column("policy", no_wrap=True, min_width=len(front[0].policy.digest) if front else 0)
    metrics = _shown_metrics(results)
    costs = _shown_costs(results)
    for name in ("top-1", *metrics, *costs.values()):
        table.add_column(name, justify="right")
    dense = f"{1 - results.dense['error']:.2%}"
    zero = ["0" if name in _DISTANCES else "" for name in metrics]
    whole = ["100.0%"] * len(costs)
    table.add_row("dense", dense, *zero, *whole, style="dim", end_section=True)
    for row in shown:
        table.add_row(
            row.policy.digest,
            f"{1 - row.values['error']:.2%}",
            *(f"{row.values[name]:.4f}" for name in metrics),
            *(_cost(row, name) for name in costs),
        )
    return table


def _shown_metrics(results: Results) -> list[str]:
    """What was minimised beside error and costs; divergence if nothing was."""
    wanted = [name for name in results.goals.objectives if name in METRICS and name != "error"]
    return wanted or ["divergence"]


def _shown_costs(results: Results) -> dict[str, str]:
    """Titles of costs by name; latency where it is foreseen, and, if it was timed, that."""
    latency = {"latency": "latency"} if "latency" in results.dense else {}
    if any(row.timed is not None for row in results.front):
        latency[_TIMED] = "timed"
    return {**latency, "macs": "MACs", "params": "params"}


def _cost(row: Row, name: str) -> str:
    value = row.timed if name == _TIMED else row.values[name]
    return "" if value is None else f"{value:.1%}"


def _timed_lines(results: Results) -> list[str]:
    """What the clock says of the front's latencies, and whether they stay below their bound."""
    slowness = results.slowness()
    if slowness is None:
        return []
    timed = [row for row in results.front if row.timed is not None]
    how = f"{abs(slowness):.1%} {'longer' if slowness >= 0 else 'less'} than foreseen"
    what = "the network" if len(timed) == 1 else f"{len(timed)} networks"
    lines = [f"timed              {what} of the front took {how}, on average"]
    for bound in (c.bound for c in results.goals.constraints if c.name == "latency"):
        over = sum(row.timed > bound for row in timed if row.timed is not None)
        if over:
            less = math.floor(1000 * bound / (1 + max(slowness, 0.01))) / 1000
            lines.append(
                f"{'':18s} {over} of them more than {bound:g}; if that matters, "
                f"search for {less:.3f}"
            )
    return lines


def hypervolume_lines(results: Results) -> list[str]:
    """Hypervolume of the search and of the uniform ladder, and failures."""
    reference = ", ".join(
        f"{name} {value:.4g}"
        for name, value in zip(results.goals.objectives, results.reference, strict=True)
    )
    lines = [f"hypervolume        {results.hypervolume():.4f}  (reference: {reference})"]
    baseline = results.baseline_hypervolume()
    if baseline is not None:
        blends = any(row.policy.blend for row in results.baseline)
        ratios = "ratio" if len(results.baseline) == 1 else "ratios"
        ladder = f"{len(results.baseline)} {'pure criteria and ' if blends else ''}{ratios}"
        lines.append(f"uniform baseline   {baseline:.4f}  ({ladder}, same proxy)")
        if baseline > results.hypervolume() and len(results.rows) < _HARDLY_BEGUN:
            begun = f"{len(results.rows)} policies are a beginning"
            lines.append(f"{'':18s} {begun}: resume with more --evaluations")
    optimism, checked = results.optimism(), results.checked_hypervolume()
    if results.check is not None and optimism is not None and checked is not None:
        lines.append(
            f"on other images    {checked:.4f}  ({results.check[0]}; the front's top-1 is "
            f"{abs(100 * optimism):.2f} points {'lower' if optimism >= 0 else 'higher'} there, "
            "relative to the dense network)"
        )
    lines += _timed_lines(results)
    dropped = [row for row in results.rows if row.status is Status.DROPPED]
    if dropped:
        seen = sum(row.images or 0 for row in dropped) / len(dropped)
        lines.append(
            f"dropped early      {len(dropped)} of {len(results.rows)}, after {seen:.0f} images on "
            "average"
        )
    failed = [row for row in results.rows if row.status.failed]
    if failed:
        lines.append(f"failed             {len(failed)}, the first: {failed[0].reason}")
    return lines


def _tau(found: Correlation) -> str:
    known = np.isfinite((found.tau_low, found.tau_high)).all()
    return f"{found.tau:.3f}" + (f" ({found.tau_low:.2f} to {found.tau_high:.2f})" if known else "")


def fidelity_table(title: str, findings: Sequence[Finding]) -> Table:
    """Predictors by tau, the best first, beside what they cost."""
    table = Table(title=title)
    table.add_column("predictor", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("tau (95%)", "rho", "s/policy"):
        table.add_column(name, justify="right", no_wrap=True)
    # A predictor that is constant orders nothing: its tau is not a number, and comes last.
    for finding in sorted(findings, key=lambda f: -np.nan_to_num(f.correlation.tau, nan=-2.0)):
        table.add_row(
            finding.predictor,
            finding.metric,
            _tau(finding.correlation),
            f"{finding.correlation.rho:.3f}",
            f"{finding.seconds:.2f}",
            style="dim" if finding.learned else None,
        )
    return table
