"""Pictures of a run. The only module that imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.fidelity.statistics import Finding
from evosearch.measurement import Status
from evosearch.results.front import Results, Row
from evosearch.scoring.objectives import COSTS

__all__ = ["plot_correlations", "plot_fidelity", "plot_front"]

_LABELS = {
    "error": "top-1 error on validation images",
    "loss": "cross-entropy on validation images",
    "margin": "lost margin on validation images",
    "divergence": "KL divergence from the dense network",
    "distortion": "error of the last feature maps",
    "macs": "MACs (share of dense)",
    "params": "parameters (share of dense)",
    "latency": "latency (share of dense)",
}


def _axes(results: Results) -> tuple[str, list[str]]:
    """What to draw: a cost to the right; upwards what was minimised, and what people know.

    The cost is one that was minimised or else bounded; MACs where none was.
    """
    names = results.goals.objectives
    costs = [name for name in names if name in COSTS]
    costs += [constraint.name for constraint in results.goals.cost_constraints]
    metrics = [name for name in names if name not in COSTS]
    return (costs or ["macs"])[0], list(dict.fromkeys((*metrics[:1], "error")))


def plot_front(results: Results, path: Path) -> None:
    """Draws every measured policy, the front, the uniform ladder and the dense network.

    One panel for the metric that was minimised, and one for error if that is another.

    Args:
        results: What was measured.
        path: A PNG; written in place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, metrics = _axes(results)
    figure = Figure(figsize=(1 + 6 * len(metrics), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, y in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _draw_front(axes, results, x, y)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": "evosearch"})


def _draw_front(axes: Any, results: Results, x: str, y: str) -> None:
    def points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        ok = sorted((row for row in rows if row.status is Status.OK), key=lambda row: row.values[x])
        return [row.values[x] for row in ok], [row.values[y] for row in ok]

    measured = [row for row in results.rows if row.status is Status.OK]
    axes.scatter(*points(measured), s=9, color="0.75", label=f"measured ({len(measured)})")
    if results.baseline:
        blends = any(row.policy.blend for row in results.baseline)
        ladder = "pure criteria, uniform ratios" if blends else "uniform ratios"
        axes.plot(*points(results.baseline), "s", ms=4, color="C1", label=ladder)
    front = results.front
    name = "front" if results.feasible else "nearest to feasible"
    # Steps, not slopes: between two networks there is no third one on a line.
    (line,) = axes.plot(*points(front), "o-", color="C0", label=f"{name} ({len(front)})")
    line.set(drawstyle="steps-post", markersize=4, linewidth=1.2)
    dense_y = {"error": results.dense["error"], "divergence": 0.0, "distortion": 0.0}.get(y)
    if dense_y is not None:
        axes.plot([1.0], [dense_y], "*", ms=11, color="C3", label="dense network")
    for constraint in results.goals.constraints:
        if constraint.name == x:
            axes.axvline(constraint.bound, color="0.4", lw=0.8, ls=":")
        elif constraint.name == y:
            axes.axhline(constraint.bound, color="0.4", lw=0.8, ls=":")
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[y])
    axes.grid(alpha=0.25)


_LEARNED_SHOWN = 3
# What costs nothing still needs a place on a logarithmic axis.
_FREE_S = 1e-3


def _best(findings: Sequence[Finding]) -> list[Finding]:
    """Each predictor at its best metric; of what was learned, the best few."""
    found: dict[str, Finding] = {}
    ranked = sorted(
        (f for f in findings if np.isfinite(f.correlation.tau)), key=lambda f: -f.correlation.tau
    )
    learned = 0
    for finding in ranked:
        if finding.predictor in found or (finding.learned and learned == _LEARNED_SHOWN):
            continue
        found[finding.predictor] = finding
        learned += finding.learned
    return list(found.values())


def plot_fidelity(findings: Sequence[Finding], best: float | None, path: Path) -> None:
    """Draws tau against seconds per policy: a dot per predictor at its best metric.

    Args:
        findings: Of one set of policies and one truth.
        best: Tau of a perfect predictor; None if the truth was not repeated.
        path: A PNG; written in place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for number, finding in enumerate(_best(findings), start=1):
        found = finding.correlation
        place = (max(finding.seconds, _FREE_S), found.tau)
        axes.errorbar(
            *place,
            # With few policies and ties the interval may end short of the value itself.
            yerr=np.maximum([[found.tau - found.tau_low], [found.tau_high - found.tau]], 0),
            fmt="D" if finding.learned else "o",
            color="C1" if finding.learned else "C0",
            ecolor="0.85",
            ms=10,
            label=f"{number}  {found.tau:.2f}  {finding.predictor} ({finding.metric})",
        )
        # Names would cover each other: numbers stand in the dots, names in the legend.
        axes.annotate(str(number), place, ha="center", va="center", fontsize=6, color="w", zorder=9)
    if best is not None and np.isfinite(best):
        axes.axhline(best, color="0.4", lw=0.8, ls=":", label="a perfect predictor (estimate)")
    axes.set_xlabel("seconds per policy")
    axes.set_ylabel("Kendall's tau against fine-tuning, 95% interval")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    figure.savefig(path, dpi=150, metadata={"Software": "evosearch"})


def plot_correlations(
    names: Sequence[str], panels: Mapping[str, NDArray[np.float64]], path: Path
) -> None:
    """Draws matrices of rank correlations side by side.

    Args:
        names: Of rows and columns.
        panels: By title `(n, n)` numbers from -1 to 1.
        path: A PNG; written in place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The name of a criterion from a file begins with its path, which may be wider than the picture.
    labels = [name.rpartition("/")[2] for name in names]
    side = 1.8 + 0.38 * len(names)
    figure = Figure(figsize=(side * len(panels) + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(title)
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels if number == 0 else [])
        for row, column in np.ndindex(values.shape):
            value = round(float(values[row, column]), 1) + 0.0  # no minus before zero
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", size=6, color=color)
    figure.colorbar(image, ax=figure.axes, shrink=0.7, label="Spearman's rank correlation")
    figure.savefig(path, dpi=150, metadata={"Software": "evosearch"})
