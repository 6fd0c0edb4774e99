"""The fidelity command from end to end, on the tiny network."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from evosearch.assembly import assemble
from evosearch.fidelity.drawing import Band, draw
from evosearch.fidelity.truth import FineTuned, Truth, fine_tune_all
from evosearch.recipe import change_recipe, load_recipe
from tests.integration.conftest import Cli

TRUTH = "finetune:fraction=0.3,batch=64"


def study(recipe: str, *more: str, out: str = "study", truth: str = TRUTH) -> list[str]:
    return [
        *("fidelity", recipe, "--policies", "6", "--truth", truth, "--out", out),
        *("--proxies", "raw,recalibrated-l1,compensated", *more),
        # A network that has learned nothing is not worth being fitted to.
        *("--set", "proxy.name=compensated"),
    ]


def numbers(cli: Cli, out: str) -> pd.DataFrame:
    table = pd.read_csv(cli.folder / out / "policies.csv")
    return table[[name for name in table if "seconds" not in name]]


def wait_for(process: subprocess.Popen[str], path: Path, wanted: str) -> None:
    """Returns when a text stands in a file, or the process has ended."""
    while process.poll() is None and (not path.exists() or wanted not in path.read_text()):
        time.sleep(0.01)


def test_a_study_ends_with_a_table_and_continues_where_it_ended(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    said = cli.run(*study(recipe())).stdout
    assert "random: 6 policies at 4" in said
    found = pd.read_csv(cli.folder / "study" / "fidelity.csv")
    named = {"raw", "recalibrated-l1", "compensated"}
    assert set(found.predictor) == {*named, "free", "fine-tuned"}
    assert {"error", "loss", "divergence"} <= set(found.metric)
    assert found.tau.dropna().between(-1, 1).all()
    assert (found.tau_low.dropna() <= found.tau_high.dropna()).all()
    assert set(found.truth) == {
        f"{part}.{number}" for part in ("test", "held-out") for number in ("error", "loss")
    }
    for name in ("fidelity.png", "fidelity.json"):
        assert (cli.folder / "study" / name).stat().st_size > 1000
    policies = pd.read_csv(cli.folder / "study" / "policies.csv")
    assert policies.macs.between(0.46, 0.54).all()
    assert policies["test.error"].min() < policies["test.error"].max()

    # Nothing is done twice: the journal only grows by what is new.
    journal = (cli.folder / "study" / "fidelity.jsonl").read_text()
    assert cli.here(*study(recipe())).stdout == said
    assert (cli.folder / "study" / "fidelity.jsonl").read_text() == journal

    refused = cli.here(*study(recipe(), truth="finetune:lr=0.5"), code=2).stderr
    assert "truth.batch = 64, now it is 128; name another --out" in refused


def test_fine_tuning_may_start_elsewhere(cli: Cli, recipe: Callable[..., str]) -> None:
    """By a variant or by the recipe's own proxy: the same networks, and equal truths."""
    from_variant = study(recipe(), out="variant", truth=f"{TRUTH},start=recalibrated-l1")
    said = cli.here(*from_variant).stderr
    assert "prepared as by recalibrated-l1" in said
    l1 = ("--set", "proxy.name=recalibrated", "--set", "proxy.criterion=l1")
    cli.here(*study(recipe(), out="recipe"), *l1)
    cli.here(*study(recipe(), out="other"))
    found, same, other = (numbers(cli, out)["test.loss"] for out in ("variant", "recipe", "other"))
    pd.testing.assert_series_equal(found, same)
    assert (found != other).any()
    refused = cli.here(*study(recipe(), out="variant"), code=2).stderr
    assert "truth.start.proxy.criterion = 'l1', now it is None; name another --out" in refused


def test_workers_find_the_same_numbers(cli: Cli, recipe: Callable[..., str]) -> None:
    here = load_recipe(str(cli.folder / recipe()))
    assembled = assemble(here)
    policies = draw(
        assembled.space, assembled.workload.plan.table, Band(low=0.3, high=0.7), 3, seed=0
    )
    truth = Truth.parse(f"{TRUTH},seeds=2")
    found: list[dict[tuple[object, ...], Mapping[str, float]]] = []
    for workers in (0, 2):
        landed: list[FineTuned] = []
        there = change_recipe(here, {"run.workers": workers}, "test")
        fine_tune_all(
            assembled.workload,
            there,
            truth,
            ("held-out",),
            [(policy, seed) for policy in policies for seed in (0, 1)],
            landed.append,
            lambda: False,
        )
        found.append({(result.policy, result.seed): result.numbers for result in landed})
    assert len(found[0]) == 6
    assert found[0] == found[1]
    # Another seed is another order of images: repetitions tell something.
    assert found[0][policies[0], 0] != found[0][policies[0], 1]


def test_a_killed_study_loses_at_most_what_was_in_flight(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    whole, killed = study(recipe(), out="whole"), study(recipe(), out="killed")
    cli.here(*whole, "--policies", "8")
    path = cli.folder / "killed" / "fidelity.jsonl"
    for wanted in ('"kind":"score"', '"kind":"truth"'):
        process = cli.start(*killed)
        wait_for(process, path, wanted)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # More policies continue the same study.
    cli.run(*killed, "--policies", "8")
    pd.testing.assert_frame_equal(numbers(cli, "whole"), numbers(cli, "killed"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for kind, names in (("score", ("variant", "keep")), ("truth", ("keep", "seed"))):
        keys = [str([r[name] for name in names]) for r in records if r["kind"] == kind]
        assert len(keys) == len(set(keys))


def test_interrupted_study_exits_130_and_continues(cli: Cli, recipe: Callable[..., str]) -> None:
    process = cli.start(*study(recipe(), truth="finetune:epochs=2,batch=64"))
    path = cli.folder / "study" / "fidelity.jsonl"
    while process.poll() is None and (
        not path.exists() or '"kind":"truth"' not in path.read_text()
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert (
        "not yet fine-tuned"
        not in cli.run(*study(recipe(), truth="finetune:epochs=2,batch=64")).stdout
    )


def test_second_interrupt_stops_a_study_now(cli: Cli, recipe: Callable[..., str]) -> None:
    process = cli.start(*study(recipe(), truth="finetune:epochs=999,batch=64"))
    path = cli.folder / "study" / "fidelity.jsonl"
    wait_for(process, path, '"variant":"free"')  # fine-tuning comes next, and takes long
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what was found is recorded, and the same command continues" in err
    assert "Traceback" not in err


def test_a_run_adds_its_own_policies(cli: Cli, recipe: Callable[..., str]) -> None:
    cli.here("launch", recipe(), "--out", "run", "--evaluations", "24")
    said = cli.run(
        *study("run", "--truth-on", "held-out", truth=f"{TRUTH},seeds=2", out="run/fidelity")
    ).stdout
    assert "elite: 6 policies" in said
    assert "for a perfect predictor" in said
    found = pd.read_csv(cli.folder / "run" / "fidelity" / "fidelity.csv")
    assert set(found["set"]) == {"random", "elite"}
    assert set(found.truth) == {"held-out.error", "held-out.loss"}
    assert (cli.folder / "run" / "fidelity" / "fidelity-elite.png").stat().st_size > 1000


def test_mistakes_are_told_before_anything_is_measured(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    name = recipe()
    for options, told in (
        (
            ["--proxy-variant", "x:data.held_out=7", "--truth", "finetune:batch=64,start=x"],
            "start=x sets data.held_out, and fine-tuning goes by the recipe's images",
        ),
        (
            ["--proxy-variant", "x:data.validation=9999", "--truth", "finetune:batch=64,start=x"],
            "--proxies: x wants data.validation = 9999, and there are 2000 images in that part",
        ),
        (["--macs", "0.0001,0.0002"], "is out of reach; within the bounds of the space MACs"),
        (["--truth", "finetune:fraction=0.01"], "fewer than one batch of 128"),
        (["--proxy-variant", "x:proxy.name=magic"], "no proxy 'magic'"),
    ):
        assert told in cli.here("fidelity", name, "--out", "out", *options, code=2).stderr
    journal = cli.folder / "out" / "fidelity.jsonl"
    assert not journal.exists() or '"score"' not in journal.read_text()
