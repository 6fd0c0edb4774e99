"""What changed since a launch, who stopped it when, and networks taken elsewhere.

In this process, since starting another takes longer than these searches.
"""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

import evosearch
from evosearch import cli as commands
from evosearch.errors import (
    BackendError,
    BudgetUnreachable,
    ConfigError,
    ConfigMismatch,
    NetworkError,
)
from evosearch.exporting import Choice, export_file
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.networks import read_weights, save_weights
from evosearch.recipe import load_recipe
from evosearch.run import Finished, launch, resume
from evosearch.scoring.objectives import Goals
from evosearch.scoring.scorer import Scorer
from evosearch.search import BASELINE, SEARCH
from evosearch.status import read_status
from tests.integration.tiny import Tiny

TINY = Path(__file__).with_name("tiny.py")
RECIPE = """
[network]
name = "net.py:Tiny"
weights = "net.safetensors"
[data]
calibration = 64
validation = 100
[search]
population = 4
evaluations = 4
baseline = 6
[proxy]
criterion = "l1"
[run]
workers = 0
"""


@dataclass
class Watch:
    """Presses Ctrl-C when so many measurements of a track have landed."""

    track: str = ""
    at: int = 0
    times: int = 1
    phases: list[str] = field(default_factory=list)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        if (track, count) == (self.track, self.at):
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


Start = Callable[..., Finished]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Launches the tiny recipe of this folder, where network and weights can be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, "net.py")
    save_weights(Path("net.safetensors"), Tiny(), {"mean": [0.5] * 3, "std": [0.25] * 3})
    Path("tiny.toml").write_text(RECIPE)

    def go(*settings: str, watch: Watch | None = None, run: str = "run") -> Finished:
        return launch(load_recipe("tiny.toml", settings), Path(run), watch or Watch())

    return go


def change_weights() -> None:
    network = Tiny()
    with torch.no_grad():
        network.classifier.weight += 0.1
    save_weights(Path("net.safetensors"), network, {"mean": [0.5] * 3, "std": [0.25] * 3})


def change_code() -> None:
    net = Path("net.py")
    net.write_text(net.read_text().replace("nn.ReLU()", "nn.LeakyReLU(0.5)"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_weights, r"the network's weights changed since run"),
        (change_code, r"what the dense network puts out changed since run .*libraries: .*torch"),
    ],
)
def test_another_network_is_neither_exported_nor_searched(
    start: Start, change: Callable[[], None], what: str
) -> None:
    policy = start().results.front[0].policy.digest
    change()
    with pytest.raises(ConfigMismatch, match=what):
        export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy))
    assert not Path("small.safetensors").exists()
    with pytest.raises(ConfigMismatch, match=what):
        resume(Path("run"), Watch(), evaluations=8)
    assert read_status(Path("run"))["evaluations"] == 4


def test_stopped_in_the_uniform_ladder_is_interrupted_and_resumes(start: Start) -> None:
    whole = start(run="whole")
    stopped = start(watch=Watch(BASELINE, 4), run="stopped")
    assert stopped.interrupted
    assert "uniform ladder" in stopped.outcome.reason
    assert read_status(Path("stopped"))["state"] == "interrupted"
    done = resume(Path("stopped"), Watch())
    assert not done.interrupted
    assert len(done.results.baseline) == 6
    assert done.results.baseline_hypervolume() == whole.results.baseline_hypervolume()
    assert read_status(Path("stopped"))["state"] == "finished"


def test_stopped_in_the_search_is_interrupted(start: Start) -> None:
    stopped = start(watch=Watch(SEARCH, 2))
    assert stopped.interrupted
    assert len(stopped.results.rows) == 2
    assert not stopped.results.baseline


@pytest.mark.parametrize(("track", "at"), [(SEARCH, 1), (BASELINE, 4)])
def test_stopped_at_once_is_interrupted_not_killed(start: Start, track: str, at: int) -> None:
    watch = Watch(track, at, times=2)
    with pytest.raises(KeyboardInterrupt):
        start(watch=watch)
    assert watch.phases[-1] == "stopped; what was measured is recorded"
    assert read_status(Path("run"))["state"] == "interrupted"


def test_a_search_that_fails_is_interrupted_and_says_why(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise BackendError("no scorer is left")

    with monkeypatch.context() as patched:
        patched.setattr("evosearch.run._LazyPool.score", gone)
        with pytest.raises(BackendError):
            start()
    assert read_status(Path("run"))["state"] == "interrupted"
    with Ledger.open(Path("run")) as ledger:
        assert ledger.meta("reason") == "no scorer is left"
    assert not resume(Path("run"), Watch()).interrupted


def test_a_search_that_can_afford_nothing_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Goals, "check_reachable", lambda *_: None)
    monkeypatch.setattr("evosearch.search._STALLED_ASKS", 20)
    goals = ("space.project_onto={macs=0.5}", "search.constraints=['macs <= 0.4']")
    with pytest.raises(BudgetUnreachable, match=r"nothing was measured: .*surrogate .*macs <= 0.4"):
        start(*goals)


def test_an_exported_network_loads_where_its_code_has_another_place(start: Start) -> None:
    policy = start().results.front[0].policy.digest
    export_file(Path("run"), Path("new/small.safetensors"), Choice(policy=policy))
    small = evosearch.load_pruned("new/small.safetensors")
    Path("net.py").rename("moved.py")
    with pytest.raises(NetworkError, match=r"net.py does not exist; .*load_pruned\(file, network="):
        evosearch.load_pruned("new/small.safetensors")
    for network in ("moved.py:Tiny", Tiny):
        moved = evosearch.load_pruned("new/small.safetensors", network)
        example = torch.ones(2, 3, 32, 32)
        assert torch.equal(moved(example), small(example))


def test_weights_are_named_or_made_again(start: Start) -> None:
    code = Path("net.py").read_text()
    Path("net.py").write_text(code.replace("torch.manual_seed(0)", "torch.seed()"))
    assert start().results.rows
    assert resume(Path("run"), Watch(), evaluations=5).results.rows
    recipe = Path("tiny.toml").read_text()
    Path("tiny.toml").write_text(recipe.replace('weights = "net.safetensors"', ""))
    with pytest.raises(NetworkError, match=r"different weights each time it is made: name a file"):
        start(run="again")
    assert not Path("again").exists()


def test_a_run_goes_on_where_its_files_were_moved_to(start: Start) -> None:
    policy = start().results.front[0].policy.digest
    Path("elsewhere").mkdir()
    for name in ("net.py", "net.safetensors"):
        Path(name).rename(f"elsewhere/{name}")
    with pytest.raises(NetworkError, match=r"exist; if it was moved, say where to in run/recipe"):
        resume(Path("run"), Watch(), evaluations=8)
    recipe = Path("run/recipe.toml")
    recipe.write_text(recipe.read_text().replace("/net.", "/elsewhere/net."))
    assert len(resume(Path("run"), Watch(), evaluations=8).results.rows) == 8
    export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy))
    assert evosearch.load_pruned("small.safetensors")
    # Where they lie is all that can be said anew, and only of the same ones.
    other = Tiny()
    torch.nn.init.ones_(other.classifier.weight)
    save_weights(Path("elsewhere/net.safetensors"), other, {})
    with pytest.raises(ConfigMismatch, match="the network's weights changed since run"):
        resume(Path("run"), Watch(), evaluations=9)
    recipe.write_text(recipe.read_text().replace("population = 4", "population = 6"))
    with pytest.raises(ConfigMismatch, match=r"search.population = 6, but this run"):
        resume(Path("run"), Watch(), evaluations=9)


class Wider(Tiny):
    """Another network, in which the file's channel counts would fit, too."""

    def __init__(self) -> None:
        super().__init__()
        self.features[0] = torch.nn.Conv2d(3, 12, 3, 2, 1, bias=False)
        self.features[1] = torch.nn.BatchNorm2d(12)
        self.features[3] = torch.nn.Conv2d(12, 16, 3, 2, 1, bias=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_run_of_a_gpu_goes_on_and_exports_without_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = start().results.front[0].policy.digest
    with Ledger.open(Path("run"), write=True) as ledger:
        recipe = ledger.meta("recipe")
        recipe["run"]["gpus_per_worker"] = 1.0  # as if it had been
        ledger.set_meta("recipe", recipe)
    with pytest.raises(BackendError, match=r"finds no GPU .*resume: --gpus-per-worker 0"):
        resume(Path("run"), Watch(), evaluations=6)
    options = {"gpus_per_worker": 0.0}
    assert not resume(Path("run"), Watch(), evaluations=6, run_options=options).interrupted
    assert read_status(Path("run"))["evaluations"] == 6
    # What a CPU fits differs in some digits: the file has the metrics of what is in it.
    measured: list[Measurement] = []
    score = Scorer.score

    def noted(self: Scorer, *arguments: Any) -> Measurement:
        measured.append(score(self, *arguments))
        return measured[-1]

    monkeypatch.setattr(Scorer, "score", noted)
    export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy))
    (found,) = measured
    with safe_open("small.safetensors", "pt") as file:
        assert float(file.metadata()["validation_error"]) == found.metrics["error"]
    export_file(Path("run"), Path("networks"), Choice())
    table = pd.read_csv("networks/networks.csv")
    assert set(table.prepared) == {"as in the search, but on a CPU"}
    np.testing.assert_allclose(table["prepared:error"], table.error)


@pytest.mark.usefixtures("no_gpu")
def test_a_run_that_was_resumed_on_a_gpu_is_measured_anew_without_one(start: Start) -> None:
    start()
    with Ledger.open(Path("run"), write=True) as ledger:
        ledger.set_meta("resumed_on_gpus", 0.5)
    export_file(Path("run"), Path("networks"), Choice())
    table = pd.read_csv("networks/networks.csv")
    assert set(table.prepared) == {"as in the search, but on a CPU"}


@pytest.mark.usefixtures("no_gpu")
def test_precision_of_a_cluster_that_is_not_seen_is_asked_for(start: Start) -> None:
    joined = ("run.workers=2", "run.gpus_per_worker=1", "run.ray_address=10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"proxy.precision: .* set it to bfloat16"):
        start(*joined)
    assert not Path("run").exists()


def test_an_exported_network_is_not_put_into_another_one(start: Start) -> None:
    policy = start().results.front[0].policy.digest
    export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy))
    with pytest.raises(NetworkError, match=r"features.0 with 8 channels .* features.0 with 12"):
        evosearch.load_pruned("small.safetensors", Wider)
    with pytest.raises(NetworkError, match=r"no network 'resnet21'"):
        evosearch.load_pruned("small.safetensors", "resnet21")


class Rectified(Tiny):
    """The same tensors, another network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.relu())


def test_code_that_changed_around_the_same_tensors_is_noticed(start: Start) -> None:
    front = start().results.front
    policy = next(row.policy for row in front if row.policy.keep[0] < 8)
    export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy.digest))
    with pytest.raises(NetworkError, match=r"fit .*Rectified, but what that computes has changed"):
        evosearch.load_pruned("small.safetensors", Rectified)
    assert evosearch.load_pruned("small.safetensors", Tiny)


@pytest.mark.parametrize("keep", [[99, 16, 24], [8, 16], [0, 16, 24], ["x"]])
def test_an_impossible_pruned_network_is_refused(start: Start, keep: list[object]) -> None:
    policy = start().results.front[0].policy.digest
    export_file(Path("run"), Path("small.safetensors"), Choice(policy=policy))
    state, metadata = read_weights(Path("small.safetensors"))
    import json

    facts = {**{k: json.loads(v) for k, v in metadata.items()}, "keep": keep}

    class Holder(torch.nn.Module):
        def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return state

    save_weights(Path("broken.safetensors"), Holder(), facts)
    with pytest.raises(NetworkError, match=r"broken.safetensors (cannot be cut|is not a pruned)"):
        evosearch.load_pruned("broken.safetensors")


def test_a_table_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("policy,error\n")
    with pytest.raises(NetworkError, match=r"f.csv is not a pruned network: wanted the .safeten"):
        evosearch.load_pruned(tmp_path / "f.csv")


def test_a_wrong_file_is_a_wrong_input(start: Start) -> None:
    start()
    Path("notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot write notes/x.csv: notes is not a folder"):
        export_file(Path("run"), Path("notes/x.csv"))


def test_the_unexpected_is_a_sentence_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(_: Path) -> None:
        raise ZeroDivisionError("of all things\nand more")

    monkeypatch.setattr("evosearch.status.read_status", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["evosearch", "status", "run"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "unexpected ZeroDivisionError: of all things; this should not happen" in said
    (details,) = tmp_path.glob("evosearch-*.log")
    assert str(details) in said
    assert "Traceback" in details.read_text()


def test_a_launch_says_what_it_measures_on(start: Start) -> None:
    watch = Watch()
    start(watch=watch)
    assert "64 calibration and 100 validation images of cifar10-sample" in watch.phases
    assert any("warning: the dense network is right on" in phase for phase in watch.phases)


def test_a_damaged_ledger_is_a_sentence_everywhere(start: Start) -> None:
    start()
    with Ledger.open(Path("run"), write=True) as ledger:
        ledger.set_meta("worst", "gone")
    for use in (
        lambda: read_status(Path("run")),
        lambda: resume(Path("run"), Watch()),
        lambda: export_file(Path("run"), Path("f.csv")),
        lambda: export_file(Path("run"), Path("f.safetensors"), Choice(policy="aa")),
    ):
        with pytest.raises(evosearch.errors.LedgerCorrupt, match=r"worst: .*restore it"):
            use()
