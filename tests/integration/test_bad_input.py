"""Bad input is one or two lines that name the field or file and the way out; never a traceback."""

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evosearch.ledger import SCHEMA_VERSION
from evosearch.locks import RunLock
from tests.integration.conftest import Cli

SETTINGS = [
    ("search.populaton=3", r"search.populaton: unknown key; did you mean 'population'"),
    ("search.population=2.5", r"search.population: .*integer, got 2.5"),
    ("search.population=0", r"search.population: .*greater than or equal to 1, got 0"),
    ("search.evaluations=many", r"search.evaluations: .*integer, got 'many'"),
    ("search.objectives=['error', 'beauty']", r"search.objectives: unknown 'beauty'; there are"),
    ("search.objectives=['macs', 'macs']", r"search.objectives must name at least one, each once"),
    ("search.constraints=['macs < 0.5']", r"constraint 'macs < 0.5' must read like 'macs <= 0.5'"),
    ("search.constraints=['macs <= 0.001']", r"macs <= 0.001 is out of reach; .*0\.\d+ to 1\.0"),
    ("search.algorithm=annealing", r"search.algorithm: no 'annealing'; there are de, nsga2"),
    ("search.algorithm=de", r"de takes one objective, got 2; .* use nsga2"),
    ("search.options={cr=0.5}", r"search.options.cr: unknown for surrogate; it has flips"),
    (
        "space.name=hyperbolic",
        r"space.name: no search space 'hyperbolic'; there are criterion-blend, lay",
    ),
    ("space.sparsty=[0.0, 0.5]", r"space.sparsty: unknown key; did you mean 'sparsity'"),
    ("space.sparsity=[0.9, 0.1]", r"the lower bound 0.9 exceeds the upper bound 0.1"),
    ("space.project_onto={macs=0.001}", r"project_onto.macs = 0.001 is out of reach: .* 0\.\d+ to"),
    ("space.sparsity=[0.5]", r"space.sparsity: must be two shares, .*, got \[0.5\]"),
    ("space.sparsity=0.5", r"space.sparsity: must be two shares, smallest and largest, got 0.5$"),
    ("space.round_to=1000", r"space: round_to = 1000 leaves every group a single width"),
    ("run.ray_address=10.0.0.1:6379", r"run.ray_address = '10.0.0.1:6379' is of no use with"),
    (
        "proxy.name=oracle",
        r"proxy.name: no proxy 'oracle'; there are raw, recalibrated, compensated",
    ),
    ("proxy.criterion=beauty", r"proxy.criterion: no criterion 'beauty'; there are l1"),
    ("network.name=resnet21", r"no network 'resnet21'; there are resnet20"),
    ("network.weights=nowhere.pt", r"weights file .*nowhere.pt does not exist"),
    ("network.num_classes=5", r"network has 5 classes, but a validation image has the label 9"),
    ("network.mean=[0.5]", r"network.mean needs one number per input channel \(3\), got 1"),
    ("network.input_shape=[3,16,16]", r"images of shape \(32, 32, 3\).*takes \(3, 16, 16\)"),
    ("data.name=cifar11", r"no data set 'cifar11'; there are cifar10-sample"),
    ("data.name=nowhere.npz", r"data file .*nowhere.npz does not exist"),
    ("data.validation=3000", r"data.validation = 3000: wanted 3000 images of the 2000 there are"),
    ("data.name=cifar10", r"CIFAR10 in .*data: .*; set download = true"),
    ("run.timeout_s=0.0", r"run.timeout_s: .*greater than 0, got 0.0"),
    ("no equals sign", r"--set 'no equals sign' must read key=value"),
]


@pytest.mark.parametrize(("setting", "sentence"), SETTINGS, ids=[s for s, _ in SETTINGS])
def test_a_wrong_setting_is_named(
    refused: Callable[..., str], recipe: Callable[..., str], setting: str, sentence: str
) -> None:
    said = refused("launch", recipe(), "--workers", "0", "--set", setting)
    assert re.search(sentence, said), said


def test_nothing_is_left_behind_by_a_refused_launch(
    refused: Callable[..., str], recipe: Callable[..., str], tmp_path: Path
) -> None:
    refused("launch", recipe(), "--out", "run", "--set", "search.constraints=['macs <= 0.001']")
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_lists_the_known_ones(refused: Callable[..., str]) -> None:
    said = refused("launch", "slowstart")
    assert "neither a file nor one of blend-resnet20-cifar10, " in said
    assert "quickstart" in said


def test_broken_toml_names_the_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[network\nname = 3")
    assert "line 1" in refused("launch", "broken.toml")


def test_npz_of_the_wrong_shape_is_named(
    refused: Callable[..., str], recipe: Callable[..., str], tmp_path: Path
) -> None:
    np.savez(tmp_path / "flat.npz", images=np.zeros((9, 12), np.uint8), labels=np.zeros(9, int))
    said = refused("launch", recipe(), "--set", "data.name=flat.npz")
    assert "flat.npz: images must be uint8 of shape (n, height, width, channels)" in said


def test_weights_of_another_network_name_the_keys(
    refused: Callable[..., str], recipe: Callable[..., str], tmp_path: Path
) -> None:
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pt")
    said = refused("launch", recipe(), "--set", "network.weights=other.pt")
    assert "missing: features.0.weight" in said
    assert "not in the network: stem.weight" in said


@pytest.fixture
def run(cli: Cli, recipe: Callable[..., str]) -> Path:
    """A finished run of a few evaluations."""
    cli.here("launch", recipe(), "--out", "run", "--evaluations", "8", "--set", "search.baseline=0")
    return cli.folder / "run"


def test_a_run_directory_is_defended(refused: Callable[..., str], run: Path) -> None:
    """One run serves all these checks: making it takes seconds."""
    again = refused("launch", "tiny.toml", "--out", "run")
    assert "run is a run already; `evosearch resume run`" in again

    lock = RunLock(run)
    assert "run is in use by process" in refused("resume", "run")
    lock.release()

    assert "less than the 8" in refused("resume", "run", "--evaluations", "5")
    assert "must end with one of .csv" in refused("export", "run", "front.xlsx")
    assert "--policy writes a network" in refused("export", "run", "f.csv", "--policy", "ab")
    assert "no measured policies" in refused("export", "run", "n.safetensors", "--policy", "zz")
    assert "name the network with --policy" in refused("export", "run", "n.safetensors")

    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("population = 8", "population = 9"))
    said = refused("resume", "run")
    assert "search.population = 9, but this run was made with 8" in said
    (run / "recipe.toml").write_text(text)

    ledger = run / "ledger.sqlite"
    with sqlite3.connect(ledger) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert f"has schema version 99, this evosearch reads {SCHEMA_VERSION}" in refused(
        "status", "run"
    )

    ledger.write_bytes(b"not a database at all, but long enough to be looked at" * 50)
    assert "is damaged or is not a ledger" in refused("export", "run", "front.csv")
    ledger.unlink()
    assert "run is not a run" in refused("resume", "run")


def test_a_directory_with_other_things_is_not_touched(
    refused: Callable[..., str], recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    said = refused("launch", recipe(), "--out", "photos")
    assert "photos exists and is not empty" in said


def test_changed_weights_are_not_mixed_in(
    cli: Cli, recipe: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    from tests.integration.tiny import Tiny

    network = Tiny()
    torch.save(network.state_dict(), tmp_path / "tiny.pt")
    options = ("--evaluations", "4", "--set", "network.weights=tiny.pt")
    cli.here("launch", recipe(), "--out", "run", "--set", "search.baseline=0", *options)
    torch.save({k: v + 1 for k, v in network.state_dict().items()}, tmp_path / "tiny.pt")
    assert "the network's weights changed since run" in refused(
        "resume", "run", "--evaluations", "9"
    )


def test_training_refuses_what_it_cannot_do(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--out must end with .safetensors" in refused(
        "train", "resnet20", "cifar10-sample", "--out", "weights.pt"
    )
    (tmp_path / "there.safetensors").touch()
    assert "there.safetensors exists" in refused(
        "train", "resnet20", "cifar10-sample", "--out", "there.safetensors"
    )
    assert "no network 'nope'" in refused("train", "nope", "cifar10", "--out", "w.safetensors")
    for option, value in (("--lr", "0"), ("--lr", "nan"), ("--weight-decay", "inf")):
        options = ("--out", "w.safetensors", option, value)
        assert f"{option} must be" in refused("train", "nope", "cifar10", *options)
    (tmp_path / "notes").touch()
    assert "notes is not a folder" in refused(
        "train", "resnet20", "cifar10-sample", "--out", "notes/w.safetensors"
    )
    assert "has a label 9" in refused(
        "train", "resnet20", "cifar10-sample", "--out", "w.safetensors", "--num-classes", "4"
    )


def test_an_unknown_command_is_a_usage_error(refused: Callable[..., str]) -> None:
    assert "nothing to list under 'pets'" in refused("list", "pets")
