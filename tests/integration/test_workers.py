"""Where scoring runs is a detail; what goes wrong there is a measurement."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evosearch.ledger import Ledger
from evosearch.measurement import Measurement, Status
from tests.integration.conftest import Cli

pytestmark = pytest.mark.ray


def measured(run: Path) -> dict[str, Measurement]:
    with Ledger.open(run) as ledger:
        return ledger.measurements()


def test_ray_and_the_process_measure_the_same_bits(cli: Cli, recipe: Callable[..., str]) -> None:
    for workers in ("0", "2"):
        cli.run("launch", recipe(), "--out", workers, "--workers", workers, "--evaluations", "20")
    here, there = (
        {digest: dict(m.metrics) for digest, m in measured(cli.folder / workers).items()}
        for workers in ("0", "2")
    )
    assert here == there
    assert len(here) >= 20


def failures(cli: Cli, recipe: str, *options: str) -> list[Measurement]:
    cli.run("launch", recipe, "--out", "run", "--evaluations", "12", "--workers", "2", *options)
    found = measured(cli.folder / "run").values()
    assert any(m.ok for m in found)
    return [m for m in found if not m.ok]


def test_a_worker_that_dies_is_a_measurement_with_a_reason(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    lost = failures(cli, recipe("Dies"), "--set", "search.baseline=0")
    assert lost
    assert {m.status for m in lost} == {Status.WORKER_LOST}
    assert all("died twice" in str(m.reason) for m in lost)


def test_a_candidate_that_hangs_is_a_measurement_with_a_reason(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    options = ("--set", "run.timeout_s=6", "--set", "search.baseline=0")
    hung = failures(cli, recipe("Hangs"), *options)
    assert hung
    assert {m.status for m in hung} == {Status.TIMEOUT}
    assert all("run.timeout_s" in str(m.reason) for m in hung)
