"""Ctrl-C loses nothing: once finishes what is in flight, twice stops now."""

import signal
import time
from collections.abc import Callable

from tests.integration.conftest import Cli


def test_first_interrupt_records_and_exits_130(cli: Cli, recipe: Callable[..., str]) -> None:
    run = cli.folder / "run"
    process = cli.start("launch", recipe(), "--out", "run", "--evaluations", "400")
    cli.wait_for(process, run, 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "evosearch resume run" in err
    assert "Pareto front" in out
    assert "Traceback" not in err
    assert '"state": "interrupted"' in cli.run("status", "run", "--json").stdout


def test_interrupted_search_resumes_to_the_same_end(cli: Cli, recipe: Callable[..., str]) -> None:
    cli.here("launch", recipe(), "--out", "whole")
    process = cli.start("launch", recipe(), "--out", "stopped")
    cli.wait_for(process, cli.folder / "stopped", 7)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    cli.run("resume", "stopped")
    for run in ("whole", "stopped"):
        cli.here("export", run, f"{run}.csv")
    whole, stopped = ((cli.folder / f"{run}.csv").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


def test_second_interrupt_stops_now(cli: Cli, recipe: Callable[..., str]) -> None:
    # A candidate that never ends: the first Ctrl-C waits for it, the second does not.
    process = cli.start("launch", recipe("Hangs"), "--out", "run", "--set", "search.baseline=0")
    cli.wait_for(process, cli.folder / "run", 1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
