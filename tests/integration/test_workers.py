"""Where scoring runs is a detail; what goes wrong there is a measurement.

All tests that start Ray are in this file, so that no two of them run at the same time.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evosearch.ledger import Ledger
from evosearch.measurement import Measurement, Status
from tests.integration.conftest import TINY, Cli
from tests.integration.test_kill_and_resume import check

pytestmark = pytest.mark.ray


def measured(run: Path) -> dict[str, Measurement]:
    with Ledger.open(run) as ledger:
        return ledger.measurements()


def failures(cli: Cli, recipe: str, *options: str) -> list[Measurement]:
    cli.run("launch", recipe, "--out", "run", "--evaluations", "6", "--workers", "2", *options)
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


def test_an_existing_cluster_can_be_joined(cli: Cli, recipe: Callable[..., str]) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = [ray, "start", "--head", "--port", port, "--num-cpus=2", "--include-dashboard=false"]
    # `ray stop` would end every cluster on this machine, whosever it is.
    cluster = psutil.Popen(
        [*start, "--disable-usage-stats", "--block"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert any("Ray runtime started" in line for line in cluster.stdout)
        address = f"127.0.0.1:{port}"
        options = ("--evaluations", "6", "--set", "search.baseline=0", "--workers", "2")
        cli.run("launch", recipe(), "--out", "joined", "--ray-address", address, *options)
        # The cluster is not ours: it must be there for the next one, too.
        cli.here("resume", "joined", "--evaluations", "10", "--ray-address", address)
    finally:
        for process in (*cluster.children(recursive=True), cluster):
            process.kill()
        cluster.wait()
        cluster.stdout.close()
    assert len(measured(cli.folder / "joined")) == 10


def test_a_scorer_that_cannot_be_made_says_why(cli: Cli, recipe: Callable[..., str]) -> None:
    said = cli.run("launch", recipe("StaysAtHome"), "--workers", "1", code=1)
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("evosearch: Ray failed: ")
    assert "its data are at home" in last
    assert "ray::" not in last


def test_a_cluster_that_does_not_answer_is_named_at_once(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    start = time.monotonic()
    said = cli.run("launch", recipe(), "--ray-address", "127.0.0.1:9", "--workers", "1", code=1)
    assert "no Ray cluster answers at 127.0.0.1:9" in said.stderr
    assert time.monotonic() - start < 60


def test_a_module_in_the_working_directory_is_found_also_by_workers(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    shutil.copy(TINY, cli.folder / "my_own_net.py")
    options = ("--evaluations", "6", "--set", "network.name=my_own_net:Tiny", "--workers", "1")
    cli.run("launch", recipe(), "--out", "run", *options, script=True)
    assert all(m.ok for m in measured(cli.folder / "run").values())


def test_sigterm_finishes_what_is_in_flight_on_ray(cli: Cli, recipe: Callable[..., str]) -> None:
    options = ("--workers", "1", "--evaluations", "400")
    process = cli.start("launch", recipe(), "--out", "run", *options)
    cli.wait_for(process, cli.folder / "run", 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "evosearch resume run" in err
    assert '"state": "interrupted"' in cli.here("status", "run", "--json").stdout


def test_interrupt_with_workers_resumes_to_the_same_end(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    cli.here("launch", recipe(), "--out", "whole")
    process = cli.start("launch", recipe(), "--out", "stopped", "--workers", "2")
    cli.wait_for(process, cli.folder / "stopped", 7)
    # As a terminal does: to the whole process group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    cli.here("resume", "stopped", "--workers", "0")
    for run in ("whole", "stopped"):
        cli.here("export", run, f"{run}.csv")
    whole, stopped = ((cli.folder / f"{run}.csv").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


def test_killed_search_on_ray_ends_as_if_never_killed(cli: Cli, recipe: Callable[..., str]) -> None:
    check(cli, recipe(), [], "ray", more=("--workers", "2"))
