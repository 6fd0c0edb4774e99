"""The commands as a user meets them."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pandas as pd
import pytest
import torch

import evosearch
from tests.integration.conftest import TINY, Cli

COMMANDS = [
    *("launch", "resume", "status", "export", "profile", "criteria", "fidelity", "train"),
    *("finetune", "list"),
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_instant_and_has_an_example(command: str) -> None:
    arguments = [sys.executable, "-m", "evosearch", *([command] if command else []), "--help"]
    # What the process takes itself, at its best: a clock would tell of the others, too.
    spent = []
    while not spent or (min(spent) >= 0.5 and len(spent) < 10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5
    assert not command or f"Example: evosearch {command}" in out


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("recipes", "quickstart"),
        ("spaces", "layer-sparsity"),
        ("algorithms", "gde3"),
        ("criteria", "residual-energy"),
        ("proxies", "compensated"),
        ("variants", "recalibrated-l1"),
        ("networks", "resnet110"),
        ("datasets", "cifar10-sample"),
        ("stopwatches", "onnxruntime"),
        ("settings", "search.evaluations = 300\n    Distinct policies to measure"),
    ],
)
def test_list_names_what_a_recipe_can_name(cli: Cli, what: str, name: str) -> None:
    assert name in cli.here("list", what).stdout


def test_quickstart_ends_with_front_hypervolumes_and_files(cli: Cli) -> None:
    options = ("--workers", "0", "--evaluations", "5", "--set", "search.baseline=3")
    said = cli.run("launch", "quickstart", *options).stdout
    assert "Pareto front" in said
    assert "hypervolume" in said
    assert "uniform baseline" in said
    for name in ("front.csv", "front.png"):
        assert f"runs/quickstart/{name}" in said
        assert (cli.folder / "runs" / "quickstart" / name).stat().st_size > 500


def test_a_recipe_can_be_launched_again_beside_itself(cli: Cli, recipe: Callable[..., str]) -> None:
    options = ("--evaluations", "4", "--set", "search.baseline=0")
    for _ in range(2):
        cli.here("launch", recipe(), *options)
    assert (cli.folder / "runs" / "tiny-2" / "ledger.sqlite").exists()
    # What a run wrote down is a recipe that gives the same run.
    cli.run("launch", "runs/tiny/recipe.toml", "--out", "copy", *options)
    first, copy = (cli.folder / run / "front.csv" for run in ("runs/tiny", "copy"))
    assert first.read_bytes() == copy.read_bytes()


def test_the_front_shows_what_was_minimised(cli: Cli, recipe: Callable[..., str]) -> None:
    changes = ("--set", 'search.objectives=["distortion","macs"]', "--set", "search.baseline=0")
    said = cli.here("launch", recipe(), "--evaluations", "4", *changes).stdout
    heading = next(line for line in said.splitlines() if "top-1" in line)
    assert "distortion" in heading
    assert "divergence" not in heading


def test_a_finished_run_can_be_looked_at(cli: Cli, run: Path) -> None:
    facts = json.loads(cli.run("status", "run", "--json").stdout)
    assert facts["state"] == "finished"
    assert facts["evaluations"] == 20
    assert facts["by_status"] == {"ok": 20}
    for suffix in ("csv", "json", "parquet"):
        cli.here("export", "run", f"all.{suffix}", "--all")
    tables = [
        pd.read_csv(cli.folder / "all.csv"),
        pd.DataFrame(json.loads((cli.folder / "all.json").read_text())),
        pd.read_parquet(cli.folder / "all.parquet"),
    ]
    for table in tables:
        assert len(table) == 20
        # The formats have different words for "nothing": NaN, null, None.
        same = table.astype({"reason": "str"}).fillna({"reason": ""})
        expected = tables[0].astype({"reason": "str"}).fillna({"reason": ""})
        pd.testing.assert_frame_equal(same, expected, check_dtype=False)


def test_an_exported_network_loads_and_does_what_was_measured(cli: Cli, run: Path) -> None:
    cli.here("export", "run", "all.csv", "--all")
    rows = pd.read_csv(cli.folder / "all.csv")
    row = rows[rows.macs < 0.6].iloc[0]
    said = cli.run("export", "run", "small.safetensors", "--policy", row.policy[:8]).stdout
    assert f"{row.macs:.1%} of the MACs" in said
    network = evosearch.load_pruned(cli.folder / "small.safetensors")
    assert sum(p.numel() for p in network.parameters()) == row.params_count

    from evosearch.data import balanced_subset, open_source
    from evosearch.networks import NetworkSpec, load_network

    spec = NetworkSpec(
        name=f"{Path(__file__).with_name('tiny.py')}:Tiny",
        mean=(0.49, 0.48, 0.45),
        std=(0.25, 0.24, 0.26),
    )
    held_out = open_source("cifar10-sample").held_out()
    images = held_out.take(balanced_subset(held_out.labels, 200, 0))
    with torch.inference_mode():
        outputs = network(load_network(spec).normalise(images.pixels))
    error = float((outputs.argmax(1).numpy() != images.labels).mean())
    assert error == pytest.approx(row.error, abs=1e-9)

    more = ("--policy", row.policy[:8], "--calibration", "600")
    said = cli.here("export", "run", "better.safetensors", *more).stdout
    assert f"({1 - row.error:.2%} as it was measured in the search)" in said
    better = evosearch.load_pruned(cli.folder / "better.safetensors")
    pairs = zip(network.state_dict().values(), better.state_dict().values(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)
    with torch.inference_mode():
        outputs = better(load_network(spec).normalise(images.pixels))
    found = float((outputs.argmax(1).numpy() == images.labels).mean())
    assert f"validation top-1 {found:.2%}" in said
    refused = cli.here("export", "run", "f.csv", "--calibration", "64", code=2).stderr
    assert "FILE must end with .safetensors, .onnx or .pt2, or be a folder" in refused
    refused = cli.here("export", "run", "f.safetensors", *more[:3], "9999999", code=2).stderr
    assert "--calibration 9999999: data.calibration = 9999999" in refused


def test_networks_that_run_without_evosearch(cli: Cli, run: Path) -> None:
    cli.here("export", "run", "front.csv")
    row = pd.read_csv(cli.folder / "front.csv").iloc[-1]
    policy = ("--policy", row.policy)
    said = cli.run("export", "run", "small.pt2", *policy).stdout
    assert f"small.pt2: {Path(__file__).with_name('tiny.py')}:Tiny with {row.macs:.1%}" in said
    cli.here("export", "run", "small.onnx", *policy)
    cli.here("export", "run", "small.safetensors", *policy)
    assert "again.pt2" in cli.here("export", "small.safetensors", "again.pt2").stdout
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = evosearch.load_pruned(cli.folder / "small.safetensors")(images)
    for name in ("small.pt2", "again.pt2"):
        found = torch.export.load(cli.folder / name).module()(images)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(cli.folder / "small.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)

    for file, options, message in (
        ("other.onnx", policy, "small.safetensors is one network, which is written as it is"),
        ("other", (), "small.safetensors is a network: FILE must end with .onnx or .pt2"),
        ("other.csv", (), "small.safetensors is a network: FILE must end with .onnx or .pt2"),
        ("other.onnx", ("--all",), "--all and --generation write tables, other.onnx is none"),
    ):
        assert message in cli.here("export", "small.safetensors", file, *options, code=2).stderr
    refused = cli.here("export", "nothing.safetensors", "other.onnx", code=2).stderr
    assert "nothing.safetensors" in refused
    assert not (cli.folder / "other.onnx").exists()


def test_the_networks_of_a_front_are_exported_together(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    # A small front: each of its networks is written four times.
    few = ("--evaluations", "5", "--set", "search.baseline=0")
    cli.here("launch", recipe(), "--out", "run", *few)
    cli.here("export", "run", "front.csv")
    front = pd.read_csv(cli.folder / "front.csv")
    said = cli.here("export", "run", "networks").stdout
    assert f"networks: {len(front)} networks of the front, and networks.csv" in said
    index = pd.read_csv(cli.folder / "networks" / "networks.csv")
    pd.testing.assert_frame_equal(index.drop(columns=["file", "prepared"]), front)
    assert set(index["prepared"]) == {"as in the search"}
    for row in index.itertuples():
        network = evosearch.load_pruned(cli.folder / "networks" / str(row.file))
        assert sum(p.numel() for p in network.parameters()) == row.params_count

    # With more images they are other networks, and the table says how those do.
    cli.here("export", "run", "networks", "--calibration", "600")
    better = pd.read_csv(cli.folder / "networks" / "networks.csv")
    pd.testing.assert_frame_equal(better[list(front)], front)
    assert set(better["prepared"]) == {"--calibration 600"}
    last = better.iloc[-1]
    one = ("export", "run", "one.safetensors", "--policy", last.policy, "--calibration", "600")
    assert f"validation top-1 {1 - last['prepared:error']:.2%}" in cli.here(*one).stdout
    files = cli.folder / "one.safetensors", cli.folder / "networks" / last.file
    states = (evosearch.load_pruned(file).state_dict().values() for file in files)
    assert all(torch.equal(alone, among) for alone, among in zip(*states, strict=True))

    cli.here("export", "run", "for-phones", "--as", "onnx")
    index = pd.read_csv(cli.folder / "for-phones" / "networks.csv")
    assert all((cli.folder / "for-phones" / file).exists() for file in index["file"])
    images = torch.randn(4, 3, 32, 32)
    for row in index.iloc[[0, -1]].itertuples():
        session = onnxruntime.InferenceSession(cli.folder / "for-phones" / str(row.file))
        (found,) = session.run(None, {"images": images.numpy()})
        cli.here("export", "run", "one.safetensors", "--policy", row.policy)
        with torch.inference_mode():
            wanted = evosearch.load_pruned(cli.folder / "one.safetensors")(images)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-3)


def test_folders_of_networks_refuse_what_is_for_files(cli: Cli, run: Path) -> None:
    (run.parent / "networks").mkdir()
    for option in (("--all",), ("--generation", "1")):
        refused = cli.here("export", "run", "networks", *option, code=2).stderr
        assert "write tables, networks is none" in refused
    (cli.folder / "taken").touch()
    refused = cli.here("export", "run", "taken", code=2).stderr
    assert "taken is not a folder" in refused
    refused = cli.here("export", "run", "networks", "--policy", "5bf75d96", code=2).stderr
    assert "FILE must end with .safetensors" in refused
    refused = cli.here("export", "run", "networks", "--as", "onx", code=2).stderr
    assert "--as onx: networks are written as .safetensors, .onnx or .pt2" in refused
    refused = cli.here("export", "run", "front.csv", "--as", "onnx", code=2).stderr
    assert "--as is for folders: front.csv says itself what it is" in refused


def test_networks_are_prepared_by_another_proxy_than_the_searchs(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evosearch.assembly import assemble
    from evosearch.policy import Policy
    from evosearch.recipe import load_recipe
    from evosearch.scoring.scorer import Scorer

    monkeypatch.chdir(cli.folder)
    changes = {"proxy.name": "recalibrated", "proxy.criterion": "l1"}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    cli.here("export", "run", "by-l1", *options)
    table = pd.read_csv("by-l1/networks.csv")
    scorer = Scorer(assemble(load_recipe("run/recipe.toml", (), changes)).workload)
    widths = [name for name in table if name.startswith("keep:")]
    for _, row in table.iterrows():
        policy = Policy(tuple(int(row[name]) for name in widths))
        assert scorer.score(policy).metrics["error"] == row["prepared:error"]
        written = evosearch.load_pruned(f"by-l1/{row.file}").state_dict().values()
        wanted = scorer.network.state_dict().values()
        assert all(torch.equal(one, other) for one, other in zip(written, wanted, strict=True))
    assert not (table["prepared:error"] == table["error"]).all()

    refused = cli.here("export", "run", "f.csv", *options, code=2).stderr
    assert "FILE must end with .safetensors, .onnx or .pt2, or be a folder" in refused
    refused = cli.here("export", "run", "nets", "--set", "data.validation=64", code=2).stderr
    assert "--set data.validation: networks of a run can be prepared by another proxy" in refused
    refused = cli.here("export", "run", "nets", "--set", "proxy.criterion=nope", code=2).stderr
    assert "--set proxy.criterion=nope: proxy.criterion: " in refused
    refused = cli.here("export", "run", "nets", "--set", "proxy.nope=1", code=2).stderr
    assert "proxy.nope" in refused
    many = ("--set", "proxy.recalibration_images=4096")
    refused = cli.here("export", "run", "nets", *many, code=2).stderr
    assert "calibration images; ask for more with --calibration" in refused
    assert not (cli.folder / "nets").exists()


def test_profile_predicts_before_anything_is_searched(cli: Cli, recipe: Callable[..., str]) -> None:
    clock = ("--set", f"latency.measure={TINY}:weigh")
    said = cli.run("profile", recipe(), "--workers", "2", *clock).stdout
    assert "genes       3 for 3 groups" in said
    assert "classifier" in said
    assert "it is the network's output" in said
    assert "prediction  44 measurements with 2 workers" in said


def test_widths_that_suit_the_clock_are_settled_and_written_down(
    cli: Cli, recipe: Callable[..., str]
) -> None:
    (cli.folder / "tiny.py").write_bytes(TINY.read_bytes())
    name = recipe(more='[latency]\nmeasure = "tiny.py:weigh_by_eights"\n')
    goals = ("--set", 'search.objectives=["divergence", "latency"]', "--evaluations")
    said = cli.here("launch", name, "--out", "run", *goals, "3").stderr
    assert "widths are kept to multiples of 8 (space.round_to): with one channel less" in said
    assert "round_to = 8" in (cli.folder / "run" / "recipe.toml").read_text()
    cli.here("resume", "run", "--evaluations", "5")
    cli.here("export", "run", "all.csv", "--all")
    table = pd.read_csv(cli.folder / "all.csv")
    kept = table[[column for column in table if column.startswith("keep:")]]
    assert len(table) >= 5
    assert (kept % 8 == 0).all(axis=None)
    free = cli.here("launch", name, "--out", "free", "--set", "space.round_to=1", *goals, "3")
    assert "within its bounds, set space.round_to to 8" in free.stderr
    assert "round_to = 1" in (cli.folder / "free" / "recipe.toml").read_text()


def test_a_run_can_start_from_another_one(cli: Cli, recipe: Callable[..., str], run: Path) -> None:
    cli.here(
        "launch",
        recipe(),
        "--out",
        "second",
        "--seed-from",
        "run",
        "--seed",
        "5",
        "--evaluations",
        "8",
        "--set",
        "search.baseline=0",
    )
    from evosearch.ledger import Ledger

    with Ledger.open(run) as first, Ledger.open(cli.folder / "second") as second:
        best = {member.policy for member in first.population() if member.rank == 0}
        asked = {entry.policy for entry in second.entries("search")}
    assert best <= asked


def test_a_search_begins_with_rankings(cli: Cli, recipe: Callable[..., str]) -> None:
    from evosearch.ledger import Ledger

    goals = ("--evaluations", "12", "--set", "search.baseline=0")
    said = cli.here("launch", recipe(), "--out", "ranked", *goals).stderr
    assert re.match(r"\[ +0\.\d s\] loading torch\n", said)
    assert "ranking channels" in said
    cli.here("launch", recipe(), "--out", "alone", *goals, "--algorithm", "ranking")
    asked = []
    for name in ("ranked", "alone"):
        with Ledger.open(cli.folder / name) as ledger:
            asked.append([entry.policy for entry in ledger.entries("search")])
    assert asked[0][0] in asked[1]
    assert len(set(asked[1])) >= 12
    own = 'search.rankings=[{ criterion = "l1", scale = "mean", power = 0 }]'
    cli.here("launch", recipe(), "--out", "own", *goals, "--set", own)
    written = (cli.folder / "own" / "recipe.toml").read_text()
    assert '{ criterion = "l1", scale = "mean", power = 0.0 }' in written
    cli.here("resume", "own", "--evaluations", "14")
