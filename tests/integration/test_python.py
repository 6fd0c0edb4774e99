"""Searches from Python, as in a notebook."""

import signal
import threading
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import evosearch
from evosearch.errors import ConfigError, LedgerError
from evosearch.progress import Progress
from tests.integration.conftest import RECIPE

TABLES: dict[str, Any] = tomllib.loads(RECIPE.replace("NETWORK", "Tiny"))
FEW = {"search.evaluations": 12, "search.baseline": 0, "proxy.precision": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> evosearch.Run:
    return evosearch.launch(TABLES, FEW, out=tmp_path_factory.mktemp("python") / "run", quiet=True)


def test_front_is_the_one_that_is_exported(run: evosearch.Run) -> None:
    written = (run.directory / "front.csv").read_text()
    assert run.front.to_csv(index=False, lineterminator="\n") == written
    assert set(run.front.policy) == set(run.measurements.query("on_front").policy)
    assert len(run.measurements) == 12


def test_network_is_the_one_that_was_measured(run: evosearch.Run, tmp_path: Path) -> None:
    row = run.front.iloc[0]
    network = run.network(row.policy)
    loaded = evosearch.load_pruned(run.export(tmp_path / "small.safetensors", row.policy))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), loaded(images))
    assert not network.training
    assert all(p.requires_grad for p in network.parameters())


def test_network_is_the_callers_own(run: evosearch.Run) -> None:
    first, second = run.front.policy[0], run.front.policy[1]
    network = run.network(first)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run.network(second)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    again = run.network(first).state_dict()
    assert all(torch.equal(before[name], value) for name, value in again.items())


def test_network_is_prepared_otherwise_if_so_wanted(run: evosearch.Run, tmp_path: Path) -> None:
    policy, changes = run.front.policy[0], {"proxy.criterion": "l1", "proxy.name": "raw"}
    other = run.network(policy, changes=changes).state_dict()
    file = run.export(tmp_path / "other.safetensors", policy, changes=changes)
    exported = evosearch.load_pruned(file).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in other.items())
    searched = run.network(policy).state_dict()
    assert any(not torch.equal(searched[name], value) for name, value in other.items())


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path: Path) -> None:
    whole = evosearch.launch(TABLES, FEW, out=tmp_path / "whole", quiet=True)
    part = evosearch.launch(
        TABLES, {**FEW, "search.evaluations": 5}, out=tmp_path / "part", quiet=True
    )
    assert repr(part).startswith(f"Run({str(tmp_path / 'part')!r}): finished, 5 of 5 policies, ")
    front = part.resume(evaluations=12, quiet=True).front
    pd.testing.assert_frame_equal(front, whole.front)
    assert part.status["evaluations"] == 12
    assert part.status["hypervolume"] == whole.status["hypervolume"]


def test_a_run_seeds_another(run: evosearch.Run, tmp_path: Path) -> None:
    seeded = evosearch.launch(TABLES, FEW, out=tmp_path / "seeded", seed_from=run, quiet=True)
    assert set(seeded.measurements.policy) & set(run.front.policy)


def test_recipes_come_as_tables_or_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(RECIPE.replace("NETWORK", "Tiny"))
    few = {**FEW, "search.evaluations": 4}
    by_file = evosearch.launch("mine.toml", few)
    assert "search 4 of 4" in capsys.readouterr().err
    by_tables = evosearch.launch(TABLES, few, quiet=True)
    assert "".join(capsys.readouterr()) == ""
    assert (by_file.directory, by_tables.directory) == (Path("runs/mine"), Path("runs/search"))
    pd.testing.assert_frame_equal(by_file.front, by_tables.front)
    assert TABLES["data"] == {"calibration": 128, "validation": 200}


def test_wrong_values_name_their_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.population"):
        evosearch.launch(TABLES, {"search.population": "many"}, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="no recipe 'nothing'"):
        evosearch.launch("nothing")
    with pytest.raises(LedgerError, match="nowhere"):
        evosearch.Run(tmp_path / "nowhere")


def test_ctrl_c_raises_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed = Progress.landed

    def pressed(self: Progress, track: str, measurement: Any, count: int, budget: int) -> None:
        landed(self, track, measurement, count, budget)
        if count == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "landed", pressed)
    with pytest.raises(KeyboardInterrupt, match=r"evosearch\.Run\('.*run'\)\.resume\(\) goes on"):
        evosearch.launch(TABLES, FEW, out=tmp_path / "run")
    stopped = evosearch.Run(tmp_path / "run")
    assert stopped.status["state"] == "interrupted"
    monkeypatch.undo()
    whole = evosearch.launch(TABLES, FEW, out=tmp_path / "whole", quiet=True)
    pd.testing.assert_frame_equal(stopped.resume(quiet=True).front, whole.front)


def test_other_threads_may_search(run: evosearch.Run, tmp_path: Path) -> None:
    """Only the main thread may handle signals; a server's thread, or a notebook's, searches too."""
    found: list[evosearch.Run] = []

    def search() -> None:
        found.append(evosearch.launch(TABLES, FEW, out=tmp_path / "run", quiet=True))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    pd.testing.assert_frame_equal(found[0].front, run.front)
