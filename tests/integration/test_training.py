"""Baselines and fine-tuned networks, through the command line."""

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch

import evosearch
from tests.integration.conftest import Cli


def stopped(cli: Cli, checkpoint: Path, how: signal.Signals, code: int, *arguments: str) -> str:
    """Starts a training, stops it after an epoch of its own, and returns what it said."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = cli.start(*arguments)
    while process.poll() is None:
        with suppress(FileNotFoundError):
            if checkpoint.stat().st_mtime_ns != before:
                break
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert checkpoint.exists()
    assert "Traceback" not in err
    return err


def test_training_can_be_stopped_and_continued(cli: Cli) -> None:
    # So many epochs that it is not done before the signal comes, however busy the machine.
    options = ["--epochs", "20", "--batch-size", "100", "--seed", "1", "--device", "cpu"]
    options += ["--threads", "1"]
    network = f"{Path(__file__).with_name('tiny.py')}:Tiny"
    data = ["train", network, "cifar10-sample", *options]
    cli.here(*data, "--out", "whole.safetensors")
    again = [*data, "--out", "stopped.safetensors"]
    checkpoint = cli.folder / "stopped.checkpoint.pt"
    stopped(cli, checkpoint, signal.SIGKILL, -signal.SIGKILL, *again)
    said = stopped(cli, checkpoint, signal.SIGINT, 130, *again)
    assert "the same command continues after the last whole epoch" in said
    assert "held out" in cli.here(*again).stdout
    logs = [pd.read_csv(cli.folder / f"{name}.log.csv") for name in ("whole", "stopped")]
    pd.testing.assert_frame_equal(*(log.drop(columns="seconds") for log in logs))


def small_policy(cli: Cli) -> str:
    """Digits of a policy of the run that cuts much."""
    cli.here("export", "run", "all.csv", "--all")
    rows = pd.read_csv(cli.folder / "all.csv")
    return str(rows[rows.macs < 0.6].policy.iloc[0])[:8]


def test_a_network_of_a_run_is_fine_tuned_and_loads(cli: Cli, run: Path) -> None:
    policy = small_policy(cli)
    options = ("--policy", policy, "--epochs", "3", "--batch-size", "100", "--lr", "0.05")
    options += ("--device", "cpu")
    said = cli.here("finetune", "run", "fine/small.safetensors", *options)
    record = json.loads((cli.folder / "fine" / "small.json").read_text())
    assert record["policy"].startswith(policy)
    assert record["start"] == "as in the search"
    assert record["settings"]["distillation"] == 0.9
    assert record["settings"]["threads"] >= 1
    assert record["training_images"] == 1000
    log = pd.read_csv(cli.folder / "fine" / "small.log.csv")
    assert list(log.epoch) == [1, 2, 3]
    assert log.train_loss.iloc[-1] < log.train_loss.iloc[0]
    assert f"held out {record['held_out_top1']['before']:.2%} before training" in said.stderr
    assert (
        f"test {record['test_top1']:.2%} (dense {record['dense_top1']['test']:.2%})" in said.stdout
    )

    from evosearch.data import open_source
    from evosearch.networks import NetworkSpec, load_network

    # What loads is what was measured on test images, batch norm and all.
    network = evosearch.load_pruned(cli.folder / "fine" / "small.safetensors")
    spec = NetworkSpec(
        name=f"{Path(__file__).with_name('tiny.py')}:Tiny",
        mean=(0.49, 0.48, 0.45),
        std=(0.25, 0.24, 0.26),
    )
    source = open_source("cifar10-sample")
    images = source.test().take(np.arange(2000))
    with torch.inference_mode():
        outputs = network(load_network(spec).normalise(images.pixels))
    right = float((outputs.argmax(1).numpy() == images.labels).mean())
    assert right == pytest.approx(record["test_top1"], abs=1e-9)
    assert not (cli.folder / "fine" / "small.checkpoint.pt").exists()

    # What was trained is not written over by what was not.
    again = cli.here("export", "run", "fine/small.safetensors", "--policy", policy, code=2)
    assert "fine/small.safetensors is a network that was trained" in again.stderr

    # The same in a runtime that knows nothing of us.
    said = cli.here("export", "fine/small.safetensors", "small.onnx").stdout
    assert "small.onnx: fine/small.safetensors, to run without evosearch" in said
    session = onnxruntime.InferenceSession(cli.folder / "small.onnx")
    (found,) = session.run(None, {"images": load_network(spec).normalise(images.pixels).numpy()})
    np.testing.assert_allclose(found, outputs.numpy(), rtol=1e-3, atol=1e-3)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["policy"]) == record["policy"]
    assert json.loads(told["mean"]) == [0.49, 0.48, 0.45]


def test_fine_tuning_can_be_stopped_and_continued(cli: Cli, run: Path) -> None:
    assert run.is_dir()
    options = ("--policy", small_policy(cli), "--epochs", "20", "--batch-size", "100")
    options += ("--device", "cpu", "--threads", "1")
    cli.here("finetune", "run", "whole.safetensors", *options)
    again = ("finetune", "run", "stopped.safetensors", *options)
    said = stopped(cli, cli.folder / "stopped.checkpoint.pt", signal.SIGINT, 130, *again)
    assert "the same command continues after the last whole epoch" in said
    other = cli.here(*again, "--distillation", "0.5", code=2).stderr
    assert "stopped.checkpoint.pt was trained with distillation = 0.9, now it is 0.5" in other
    other = cli.here(*again, "--set", "proxy.criterion=l1", code=2).stderr
    assert "now it is --set proxy.criterion=l1; remove the file to start over" in other
    cli.here(*again)
    states = [
        evosearch.load_pruned(cli.folder / f"{name}.safetensors").state_dict().values()
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_search_for_one_budget_needs_no_name(cli: Cli, recipe: Callable[..., str]) -> None:
    changes = (
        *("--set", 'search.objectives=["distortion"]', "--set", "search.baseline=0"),
        *("--set", "space.project_onto={macs=0.5}", "--evaluations", "6"),
    )
    cli.here("launch", recipe(), "--out", "run", *changes)
    options = ("--epochs", "1", "--batch-size", "100", "--distillation", "1")
    cli.here("finetune", "run", "tuned.safetensors", *options)
    cli.here("export", "run", "small.safetensors")
    before, after = (
        evosearch.load_pruned(cli.folder / f"{name}.safetensors") for name in ("small", "tuned")
    )
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    assert not any(torch.equal(one, other) for one, other in pairs)


def test_training_in_vain_says_so(cli: Cli) -> None:
    from evosearch.data import open_source

    # A network whose batch norm a few steps of that size unsettle.
    found = open_source("cifar10-sample").training().take(np.arange(600))
    np.savez(cli.folder / "mine.npz", images=found.pixels, labels=found.labels)
    changes = ("data.name=mine.npz", "data.validation=60", "data.check=0", "search.baseline=0")
    options = [part for change in changes for part in ("--set", change)]
    cli.here(
        "launch", "quickstart", "--workers", "0", "--evaluations", "3", "--out", "run", *options
    )
    policy = ("--policy", small_policy(cli))
    said = cli.here("finetune", "run", "short.safetensors", *policy, "--epochs", "1", "--lr", "1")
    assert "the training left it no better than it was" in said.stderr


REFUSED = (
    (("--policy", "zzz"), "--policy zzz: no measured policies of run start like that"),
    ((), "name the network with --policy"),
    (("--lr", "0"), "--lr must be above 0"),
    (("--distillation", "1.5"), "--distillation must lie in 0 to 1, got 1.5"),
    (("--temperature", "0"), "--temperature must be above 0 and finite, got 0"),
    (("--precision", "half"), "precision is float32 or bfloat16, got 'half'"),
    (("--device", "tpu"), "--device is cpu, cuda, cuda:1 and so on, or auto, got 'tpu'"),
    (("--set", "data.validation=64"), "--set data.validation: networks of a run"),
    (("--batch-size", "2000"), "there are 1000 training images, less than one batch of 2000"),
)


def test_fine_tuning_refuses_what_it_cannot_do(
    cli: Cli, run: Path, refused: Callable[..., str]
) -> None:
    assert run.is_dir()
    policy = ("--policy", small_policy(cli))
    for options, said in REFUSED:
        named = policy if options and "--policy" not in options else ()
        assert said in refused("finetune", "run", "w.safetensors", *named, *options), options
        assert not (cli.folder / "w.safetensors").exists()
    (cli.folder / "there.json").touch()
    assert "there.json exists" in refused("finetune", "run", "there.safetensors")
    (cli.folder / "there.safetensors").touch()
    assert "there.safetensors exists" in refused("finetune", "run", "there.safetensors")
    assert "FILE must end with .safetensors" in refused("finetune", "run", "there.pt")


@pytest.mark.parametrize("test", [np.zeros((0, 32, 32, 3)), np.zeros((4, 32, 32, 1)), None])
def test_test_images_that_do_not_fit_are_told_before_training(
    cli: Cli, recipe: Callable[..., str], refused: Callable[..., str], test: np.ndarray | None
) -> None:
    from evosearch.data import open_source

    found = open_source("cifar10-sample").training().take(np.arange(300))
    np.savez(cli.folder / "mine.npz", images=found.pixels, labels=found.labels)
    labels = np.zeros(4, dtype=np.int64)
    np.savez(cli.folder / "test.npz", images=found.pixels[:4], labels=labels)
    changes = ("data.name=mine.npz", "data.test=test.npz", "data.validation=20")
    options = [part for change in changes for part in ("--set", change)]
    more = ("--set", "data.check=0", "--set", "search.baseline=0", "--evaluations", "4")
    cli.here("launch", recipe(), "--out", "run", *options, *more)
    (cli.folder / "test.npz").unlink()
    if test is not None:
        file = cli.folder / "test.npz"
        np.savez(file, images=test.astype(np.uint8), labels=labels[: len(test)])
    policy = ("--policy", small_policy(cli))
    said = refused("finetune", "run", "w.safetensors", *policy, "--epochs", "1")
    assert "test" in said
    assert not (cli.folder / "w.checkpoint.pt").exists()
