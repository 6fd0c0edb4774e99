"""A search that is killed and resumed ends as if it had never been killed."""

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import psutil
import pytest

from evosearch.ledger import Ledger
from evosearch.measurement import Terms
from tests.integration.conftest import TINY, Cli

# Every algorithm is stopped and resumed in unit/test_search_resuming.py, in one process; here it is
# the process that matters. The surrogate, races and nsga2 are killed in tests of their own.
CONSTRAINED = ('search.objectives=["divergence"]', 'search.constraints=["macs <= 0.6"]')


def kill_tree(pid: int) -> None:
    """kill -9 of a process and everything it started, Ray's own process groups included."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def landed(run: Path) -> list[tuple[str, str, float]]:
    with Ledger.open(run) as ledger:
        return [
            (digest, str(m.metrics), m.seconds)
            for terms in (Terms.RACED, Terms.FULL)
            for digest, m in ledger.measurements(terms=terms).items()
        ]


def check(
    cli: Cli,
    recipe: str,
    options: Sequence[str],
    name: str,
    latest: int = 25,
    more: Sequence[str] = (),
) -> None:
    """Searches twice, kills one at a random moment, resumes it, compares the exports.

    The one that is killed has `more` options: the other one never leaves the process of the tests.
    """
    whole, killed = cli.folder / f"{name}-whole", cli.folder / f"{name}-killed"
    cli.here("launch", recipe, "--out", str(whole), *options)
    process = cli.start("launch", recipe, "--out", str(killed), *options, *more)
    moment = random.Random(os.urandom(8)).randint(1, latest)
    cli.wait_for(process, killed, moment)
    kill_tree(process.pid)
    before = landed(killed)
    cli.run("resume", str(killed))
    assert landed(killed)[: len(before)] == before, f"killed after {moment}"
    for run in (whole, killed):
        cli.here("export", str(run), f"{run}.csv")
        cli.here("export", str(run), f"{run}-all.csv", "--all")
    first, second = (Path(f"{run}.csv").read_bytes() for run in (whole, killed))
    assert first == second, f"killed after {moment}"
    everything = [pd.read_csv(f"{run}-all.csv").drop(columns="seconds") for run in (whole, killed)]
    assert len(everything[0]) > 20
    pd.testing.assert_frame_equal(*everything)


def test_killed_search_ends_as_if_never_killed(cli: Cli, recipe: Callable[..., str]) -> None:
    """One of a residual network, which may leave out blocks."""
    goals = [part for goal in (*CONSTRAINED, "space.blocks=true") for part in ("--set", goal)]
    check(cli, recipe("Residual"), ["--algorithm", "de", *goals], "de")


def test_killed_search_with_races_ends_as_if_never_killed(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    options = ["--set", "search.racing=0.1", "--set", "proxy.batch_size=32"]
    check(cli, recipe(), [*options, "--set", "data.validation=1000"], "races")
    everything = pd.read_csv(cli.folder / "races-whole-all.csv")
    lost = everything[everything["status"] == "dropped"]
    assert len(lost) > 0
    assert (lost["images"] < 1000).all()
    assert not lost["on_front"].any()
    assert "dropped early" in cli.here("resume", str(cli.folder / "races-whole")).stdout
    policy = str(lost["policy"].iloc[0])
    refused = cli.here(
        "export", str(cli.folder / "races-whole"), "net.safetensors", "--policy", policy, code=2
    )
    assert "was dropped: worse than" in refused.stderr


def test_killed_search_for_speed_ends_as_if_never_killed(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    more = (
        '[latency]\nmeasure = "tiny.py:weigh"\nimages = 4\n'
        "[space]\nproject_onto = { latency = 0.7 }\n"
    )
    (cli.folder / "tiny.py").write_bytes(TINY.read_bytes())
    changes = (
        'search.objectives=["divergence", "latency"]',
        'search.constraints=["latency <= 0.7"]',
    )
    options = [part for change in changes for part in ("--set", change)]
    # There are few policies that spend so much time: 21 were found.
    check(cli, recipe(more=more), ["--algorithm", "nsga2", *options], "fast", latest=15)
    found = pd.read_csv(cli.folder / "fast-whole.csv")
    assert found["latency"].between(0.6, 0.7).all()
    said = cli.here("export", "fast-whole", "net.safetensors", "--policy", found["policy"][0])
    # Such a network takes the time of its weights, and the front was timed to see.
    assert found["check:latency"].to_numpy() == pytest.approx(found["params"].to_numpy())
    timed, foreseen = found["check:latency"][0], found["latency"][0]
    assert f"with {timed:.1%} of the time ({foreseen:.1%} foreseen), " in said.stdout
    # What was timed at launch is what counts: a clock that is gone is not missed.
    (cli.folder / "tiny.py").unlink()
    again = cli.here("resume", "fast-killed")
    assert "latency: the dense network takes" in again.stderr
    slower = (found["check:latency"] / found["latency"]).mean() - 1
    how = f"{abs(slower):.1%} {'longer' if slower >= 0 else 'less'} than foreseen"
    assert f"{len(found)} networks of the front took {how}" in again.stdout
    over = int((found["check:latency"] > 0.7).sum())
    assert ("of them more than 0.7; if that matters, search for" in again.stdout) == (over > 0)


def test_larger_budget_later_is_a_larger_budget_at_once(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    cli.here("launch", recipe(), "--out", "whole", "--evaluations", "30")
    cli.here("launch", recipe(), "--out", "grown", "--evaluations", "13")
    cli.run("resume", "grown", "--evaluations", "30")
    for run in ("whole", "grown"):
        cli.here("export", run, f"{run}.csv")
    whole, grown = ((cli.folder / f"{run}.csv").read_bytes() for run in ("whole", "grown"))
    assert whole == grown
