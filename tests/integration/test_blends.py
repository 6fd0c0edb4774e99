"""Blends as a user meets them: searched, interrupted, exported; criteria shown and refused."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

import evosearch
from evosearch.pruning.criteria import CRITERIA as LISTED
from tests.integration.conftest import Cli

Refused = Callable[..., str]

CRITERIA = 'criteria = ["l1", "bn-scale", "apoz", "obd", "mine.py:first"]\n'
BLEND = f"""
[space]
name = "criterion-blend"
{CRITERIA}sparsity = [0.0, 0.9]

[proxy]
name = "raw"
criterion = "l2"
"""
OWN = """
import numpy as np

def first(view):
    "The first channels."
    return -np.arange(view.group.channels)
"""


@pytest.fixture
def blend(tmp_path: Path, recipe: Callable[..., str]) -> str:
    """A recipe that blends four criteria and one of its own, which lies beside it."""
    (tmp_path / "mine.py").write_text(OWN)
    return recipe("Tiny", BLEND)


def test_search_of_blends_that_was_continued_exports_what_one_in_a_row_does(
    cli: Cli, blend: str
) -> None:
    cli.here("launch", blend, "--out", "one", "--evaluations", "30")
    cli.here("launch", blend, "--out", "two", "--evaluations", "9")
    cli.run("resume", "two", "--evaluations", "30")
    for run in ("one", "two"):
        cli.here("export", run, f"{run}.csv")
    assert (cli.folder / "one.csv").read_bytes() == (cli.folder / "two.csv").read_bytes()
    table = pd.read_csv(cli.folder / "one.csv", keep_default_na=False)
    told = {text for name in table for text in table[name] if name.startswith("blend:")}
    assert any("mine.py:first" in text or "apoz" in text for text in told)


def test_run_of_a_version_that_knew_fewer_criteria_goes_on_with_those(
    cli: Cli, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = recipe("Tiny", BLEND.replace(CRITERIA, ""))
    with monkeypatch.context() as before:
        before.setattr(
            "evosearch.assembly.applicable_criteria", lambda *_: (("l1", "l2", "bn-scale"), {})
        )
        cli.here("launch", blend, "--out", "run", "--evaluations", "4")
    cli.here("resume", "run", "--evaluations", "8")
    cli.here("export", "run", "networks/", "--set", "proxy.recalibrate=true")
    cli.here("export", "run", "all.json", "--all")
    rows = json.loads((cli.folder / "all.json").read_text())
    told = {name for row in rows for name in LISTED if any(name in str(v) for v in row.values())}
    assert len(rows) == 8
    assert told <= {"l1", "l2", "bn-scale"}


def test_network_of_a_blend_is_exported_and_loads(cli: Cli, blend: str) -> None:
    cli.here("launch", blend, "--out", "run", "--evaluations", "12")
    cli.here("export", "run", "all.json", "--all")
    rows = json.loads((cli.folder / "all.json").read_text())
    blended = next(r for r in rows if any(v and k.startswith("blend:") for k, v in r.items()))
    cli.here("export", "run", "small.safetensors", "--policy", blended["policy"])
    l1 = ("--set", "proxy.criterion=l1")
    refused = cli.here(
        "export", "run", "l1.safetensors", "--policy", blended["policy"], *l1, code=2
    ).stderr
    assert "says itself by which criteria its channels go" in refused
    network = evosearch.load_pruned(cli.folder / "small.safetensors")
    assert network.features[0].out_channels == blended["keep:features.0"]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_clusters_that_changed_end_a_resume(cli: Cli, blend: str) -> None:
    cli.here("launch", blend, "--out", "run", "--evaluations", "4", "--set", "search.baseline=0")
    with sqlite3.connect(cli.folder / "run" / "ledger.sqlite") as db:
        ((text,),) = db.execute("SELECT value FROM meta WHERE key = 'criteria'").fetchall()
        facts = json.loads(text)
        facts["clusters"][0] = [facts["names"]]
        db.execute("UPDATE meta SET value = ? WHERE key = 'criteria'", (json.dumps(facts),))
    said = cli.here("resume", "run", code=2).stderr
    assert "clusters of criteria changed since run was launched" in said


def test_criteria_shows_clusters_and_draws_them(cli: Cli, blend: str) -> None:
    told = cli.run("criteria", blend, "--png", "all.png").stdout
    assert told.startswith("mean over groups\n")
    assert "features.3 (16 channels)" in told
    assert "mine.py:first" in told
    assert (cli.folder / "all.png").stat().st_size > 5000
    record = json.loads(cli.here("criteria", blend, "--json", "--group", "features.3").stdout)
    assert [group["name"] for group in record["groups"]] == ["features.3"]
    n = len(record["criteria"])
    assert n == 5
    for matrix in (record["spearman"], record["groups"][0]["spearman"]):
        assert [len(row) for row in matrix] == [n] * n
    cli.here("criteria", blend, "--png", "one.png", "--group", "features.3")
    assert (cli.folder / "one.png").stat().st_size > (cli.folder / "all.png").stat().st_size


def test_criteria_leaves_out_what_does_not_apply(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 6, 3, 4), nn.ReLU(), nn.Conv2d(6, 4, 3),\n"
        "    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))\n"
    )
    (tmp_path / "bare.toml").write_text(
        '[network]\nname = "bare.py:make"\n[data]\ncalibration = 64\nvalidation = 64\n'
    )
    told = cli.here("criteria", "bare.toml").stdout
    assert "bn-scale is left out: group 0 has no batch norm" in told
    assert "random" not in told
    said = cli.here(
        *("launch", "bare.toml", "--workers", "0"),
        *("--set", "space.name=criterion-blend", "--set", "space.criteria=['l1', 'bn-taylor']"),
        code=2,
    ).stderr
    assert "criterion bn-taylor needs a batch norm, and group 0 has none" in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("space.criteria=['l1', 'beauty']", r"no criterion 'beauty'; there are l1"),
        ("space.clusters=0", r"space.clusters"),
        ("proxy.coupling=median", r"proxy.coupling: .*'mean', 'max' or 'sum'"),
        ("proxy.labels=wishes", r"proxy.labels: .*'given' or 'own'"),
        ("proxy.criterion=mine.py:second", r"mine\.py has no function or class .second"),
    ],
)
def test_bad_criteria_are_refused_by_name(
    refused: Refused, blend: str, setting: str, message: str
) -> None:
    import re

    assert re.search(message, refused("launch", blend, "--set", setting))


def test_bad_arguments_of_criteria_are_refused(refused: Refused, blend: str) -> None:
    assert "--png c.jpg must end with .png" in refused("criteria", blend, "--png", "c.jpg")
    said = refused("criteria", blend, "--group", "nowhere")
    assert "--group nowhere: there are features.0, features.3, features.6" in said
