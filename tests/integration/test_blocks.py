"""Searches that may leave out whole blocks, as a user runs them."""

from collections.abc import Callable

import pandas as pd
import torch

from evosearch import load_pruned
from tests.integration.conftest import TINY, Cli

BLOCKS = ("--set", "space.blocks=true")
NAMES = [f"features.{stage}.3" for stage in range(3)]


def test_a_search_that_leaves_out_blocks(cli: Cli, recipe: Callable[..., str]) -> None:
    name = recipe("Residual")
    cli.here("launch", name, "--out", "whole", *BLOCKS, "--evaluations", "40")
    cli.here("launch", name, "--out", "parts", *BLOCKS, "--evaluations", "15")
    cli.here("resume", "parts", "--evaluations", "40")
    tables = []
    for run in ("whole", "parts"):
        cli.here("export", run, f"{run}.csv", "--all")
        table = pd.read_csv(cli.folder / f"{run}.csv").drop(columns="seconds")
        tables.append(table)
    pd.testing.assert_frame_equal(*tables)
    table = tables[0]
    assert (table.status == "ok").all()
    inner = table[[f"keep:{block}.inner" for block in NAMES]]
    assert (inner == 0).any(axis=0).all()
    assert (inner > 0).any(axis=0).all()
    assert (table.drop(columns=inner.columns).filter(like="keep:") > 0).all(axis=None)
    # A network that lacks some of them is exported, loaded, written for others, and trained.
    lacks = table[(inner == 0).sum(axis=1) == 2].iloc[0]
    said = cli.here("export", "whole", "small.safetensors", "--policy", lacks.policy).stdout
    assert "of the parameters, 2 blocks left out, validation top-1" in said
    small = load_pruned(cli.folder / "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) == lacks.params_count
    present = [block for block, kept in zip(NAMES, lacks[inner.columns], strict=True) if kept]
    assert {key.rsplit(".", 2)[0] for key in small.state_dict() if ".3." in key} == set(present)
    cli.here("export", "small.safetensors", "small.pt2")
    images = torch.randn(3, 3, 32, 32)
    program = torch.export.load(cli.folder / "small.pt2").module()
    torch.testing.assert_close(program(images), small(images), rtol=1e-4, atol=1e-5)
    tuned = ("finetune", "whole", "tuned.safetensors", "--policy", lacks.policy, "--epochs", "1")
    assert "2 blocks left out" in cli.here(*tuned).stdout
    assert list(load_pruned(cli.folder / "tuned.safetensors").state_dict()) == list(
        small.state_dict()
    )


def test_a_search_that_keeps_all_blocks_can_begin_where_one_left_some_out(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    name = recipe("Residual")
    cli.here("launch", name, "--out", "first", *BLOCKS, "--evaluations", "16")
    seeded = ("--seed-from", "first", "--set", "search.seed_share=1.0", "--evaluations", "8")
    cli.here("launch", name, "--out", "second", *seeded)
    cli.here("export", "second", "all.csv", "--all")
    table = pd.read_csv(cli.folder / "all.csv")
    assert (table.filter(like="keep:") > 0).all(axis=None)
    assert (table.filter(like=".3.inner") == 1).any(axis=None)


def test_blocks_are_told_and_timed(cli: Cli, recipe: Callable[..., str]) -> None:
    name, clock = recipe("Residual"), ("--set", f"latency.measure={TINY}:weigh")
    said = cli.here("profile", name, *clock).stdout
    assert "blocks      3 stay; with space.blocks = true they may go: features.0.3" in said
    said = cli.here("profile", name, *clock, *BLOCKS).stdout
    assert "blocks      3 may be left out: features.0.3, features.1.3, features.2.3" in said
    assert "genes       9 for 6 groups" in said
    budget = ("--set", "space.project_onto={latency=0.3}", "--evaluations", "8")
    said = cli.here("launch", name, "--out", "fast", *clock, *BLOCKS, *budget).stderr
    assert "of that with as few channels as can be and no blocks; 64 networks" in said
    cli.here("export", "fast", "fast.csv", "--all")
    table = pd.read_csv(cli.folder / "fast.csv")
    assert (table.latency <= 0.3 + 1e-6).all()


def test_networks_without_blocks_say_so(
    recipe: Callable[..., str], refused: Callable[..., str]
) -> None:
    told = refused("launch", recipe(), *BLOCKS)
    assert "space.blocks: no block of this network can be left out" in told
