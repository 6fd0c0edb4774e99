"""Pictures of a run show what people read, beside what was minimised."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evosearch.measurement import METRICS, Status
from evosearch.policy import Policy
from evosearch.results.front import Results, Row
from evosearch.results.plots import _axes, plot_front
from evosearch.scoring.objectives import Constraint, Goals


def results(objectives: tuple[str, ...]) -> Results:
    rng = np.random.default_rng(0)
    rows = tuple(
        Row(
            policy=Policy((number,)),
            status=Status.OK,
            values={name: float(rng.random()) for name in (*METRICS, "macs", "params")},
            macs=1,
            params=1,
            violation=0.0,
            on_front=number % 2 == 0,
            seconds=1.0,
            reason=None,
            images=10,
            checked={},
        )
        for number in range(1, 9)
    )
    return Results(
        goals=Goals(objectives=objectives),
        groups=(("conv", 8),),
        dense={"macs": 1, "params": 1, "error": 0.1},
        rows=rows,
        baseline=rows[:2],
        reference=np.ones(len(objectives)),
    )


@pytest.mark.parametrize(
    ("objectives", "panels"),
    [
        (("error", "macs"), 1),
        (("params",), 1),
        (("distortion", "macs"), 2),
        (("divergence",), 2),
        (("macs", "loss", "error"), 2),
    ],
)
def test_a_front_by_another_metric_has_a_panel_for_error(
    tmp_path: Path, objectives: tuple[str, ...], panels: int
) -> None:
    path = tmp_path / "front.png"
    plot_front(results(objectives), path)
    with Image.open(path) as image:
        assert image.width == 150 * (1 + 6 * panels)
        # A panel without anything in it is white.
        for number in range(panels):
            part = image.convert("L").crop((900 * number + 200, 100, 900 * number + 800, 500))
            assert np.asarray(part).min() < 128


@pytest.mark.parametrize(
    ("objectives", "constraint", "shown"),
    [
        (("distortion",), "latency <= 0.8", "latency"),
        (("distortion", "params"), "latency <= 0.8", "params"),
        (("distortion",), "error <= 0.5", "macs"),
    ],
)
def test_a_front_lies_over_the_cost_that_counted(
    objectives: tuple[str, ...], constraint: str, shown: str
) -> None:
    goals = Goals(objectives=objectives, constraints=(Constraint.parse(constraint),))
    assert _axes(replace(results(objectives), goals=goals))[0] == shown
