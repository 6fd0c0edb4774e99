"""Networks that run without evosearch, and how long ONNX Runtime takes for them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from evosearch.errors import BackendError, ConfigError, NetworkError
from evosearch.networks import NetworkSpec, load_network, write_portable
from evosearch.networks.onnx_models import (
    exported_program,
    onnx_model,
    onnx_runner,
    optimized,
    serialized,
    with_weights_of,
)
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.recipe import LatencyRecipe
from evosearch.scoring import stopwatches, timing
from evosearch.scoring.timing import draw_widths, seconds_of, shares_of
from tests.unit.small_networks import Flat, own, uneven


class Inverted(nn.Module):
    """Pointwise, depthwise and pointwise convolution, flattened, as in a MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


class Reshaped(nn.Module):
    """What its graph reshapes to are widths, in three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        logits: Tensor = self.fc(y.reshape(y.shape[0], y.shape[1], -1).mean(2))
        return logits


class Windowed(Inverted):
    """What its graph reshapes to in two numbers is no batch of images."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(12.0).reshape(4, 3).mean(1)
        logits: Tensor = self.body(x * table.repeat(3).reshape(2, 6)[0].mean())
        return logits


class Counting(Inverted):
    """Knows after its trace how many images there are."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x).view(len(x), -1)
        return logits


class Undecided(nn.Module):
    """Asks its input for a number, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def run_onnx(file: Path, images: Tensor) -> Any:
    return onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})[0]


def run_program(file: Path, images: Tensor) -> Any:
    return torch.export.load(file).module()(images).detach().numpy()


# Torch 2.11 says so of what its own torch.export.load reads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(("name", "run"), [("a.onnx", run_onnx), ("a.pt2", run_program)])
def test_what_was_written_computes_the_same_for_any_number_of_images(
    tmp_path: Path, name: str, run: Any
) -> None:
    network, _ = own(uneven(Inverted()))
    write_portable(network, tmp_path / name, {"policy": "5bf7", "mean": [0.5, 0.4, 0.3]})
    for count in (1, 2, 5):
        images = network.example(count)
        wanted = network.module(images).detach().numpy()
        np.testing.assert_allclose(run(tmp_path / name, images), wanted, rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    network, _ = own(Inverted())
    for name in ("a.onnx", "a.pt2"):
        write_portable(network, tmp_path / name, {"policy": "5bf7", "keep": [1, 2]})
    said = {prop.key: prop.value for prop in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert (said["policy"], said["keep"]) == ('"5bf7"', "[1, 2]")
    more = {"evosearch.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=more)
    assert json.loads(more["evosearch.json"]) == {"policy": "5bf7", "keep": [1, 2]}


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_a_network_that_cannot_be_followed_is_refused(tmp_path: Path, name: str) -> None:
    network, _ = own(Inverted())
    network = replace(network, module=Undecided().eval())
    with pytest.raises(NetworkError, match=r"torch\.export cannot follow the network: \S"):
        write_portable(network, tmp_path / name, {})
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = own(Inverted())
    other = exported_program(Inverted().eval(), network.example(2))
    monkeypatch.setattr("evosearch.networks.portable.exported_program", lambda *_: other)
    with pytest.raises(NetworkError, match=r"a\.onnx: what was written computes something else"):
        write_portable(network, tmp_path / "a.onnx", {})
    assert not list(tmp_path.iterdir())


def test_what_hinders_is_told(tmp_path: Path) -> None:
    network, _ = own(Inverted())
    fixed = replace(network, module=Counting().eval())
    with pytest.raises(
        NetworkError, match=r"len\(x\) fixes it, x\.shape\[0\] and flatten\(1\) do not"
    ):
        write_portable(fixed, tmp_path / "a.onnx", {})
    named = replace(network, module=Inverted().eval())
    named.module.register_buffer("images", torch.ones(1))
    named.module.register_forward_pre_hook(lambda module, given: (given[0] * module.images,))
    with pytest.raises(NetworkError, match="the network has a tensor 'images'"):
        write_portable(named, tmp_path / "a.onnx", {})
    burst = replace(network, module=Inverted().eval())
    nn.init.constant_(burst.module.body[-1].bias, np.nan)
    with pytest.raises(NetworkError, match=r"a\.pt2: outputs of the network are not finite"):
        write_portable(burst, tmp_path / "a.pt2", {})
    for suffix in (".onnx", ".pt2"):
        with pytest.raises(BackendError, match=r"cannot write .*: File name too long"):
            write_portable(network, tmp_path / f"{'a' * 250}{suffix}", {})
    assert not list(tmp_path.iterdir())


def test_models_that_onnx_cannot_hold_are_refused() -> None:
    class Large:
        def SerializeToString(self) -> bytes:  # noqa: N802 -- as protobuf calls it
            raise ValueError("exceeds")

    with pytest.raises(NetworkError, match=r"ONNX allows 2 GB .* write it as \.pt2"):
        serialized(Large())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    network, plan = own(Flat())
    message = rf"{package} is missing; pip install 'evosearch\[onnx\]'"
    with pytest.raises(ConfigError, match=message):
        write_portable(network, tmp_path / "a.onnx", {})
    with pytest.raises(ConfigError, match=message):
        seconds_of(network, plan, LatencyRecipe(measure="onnxruntime"), np.array([[3, 3, 3]]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [Inverted, Flat])
def test_a_graph_serves_other_widths(made: type[nn.Module]) -> None:
    network, plan = own(uneven(made()))
    graph = onnx_model(exported_program(network.module, network.example(2)), {}, folded=False)
    cutter = Cutter(plan, network.module)
    kept = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    kept[[0, 2, 7]] = False
    narrow = cutter.cut(kept).eval()
    run = onnx_runner(with_weights_of(graph, narrow).SerializeToString())
    wanted = narrow(network.example(3)).detach().numpy()
    np.testing.assert_allclose(run(network.example(3)), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_timed_is_what_is_exported(tmp_path: Path) -> None:
    """A graph that computes its constants anew with each pass took four times as long."""
    network, _ = own(uneven(Inverted()))
    program = exported_program(network.module, network.example(2))
    graph = with_weights_of(onnx_model(program, {}, folded=False), network.module)
    kinds = []
    for model in (serialized(onnx_model(program, {})), serialized(optimized(graph))):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "run.onnx")
        onnxruntime.InferenceSession(model, options)
        run = onnx.load(tmp_path / "run.onnx").graph.node
        kinds.append(sorted(node.op_type for node in run if node.op_type not in FLATTENING))
    assert kinds[0] == kinds[1]
    assert "BatchNormalization" not in kinds[1]


FLATTENING = ("Reshape", "Flatten")


@pytest.mark.parametrize(
    ("made", "graphs"), [(Inverted, 1), (Windowed, 1), (Reshaped, 4), (Counting, 4)]
)
def test_networks_are_timed_by_a_graph_that_fits(
    monkeypatch: pytest.MonkeyPatch, made: type[nn.Module], graphs: int
) -> None:
    """One graph for all widths, or one for each: the reference's, and of three networks."""
    exported: list[nn.Module] = []

    def counted(module: nn.Module, images: Tensor, **options: Any) -> Any:
        program = exported_program(module, images, **options)
        exported.append(module)
        return program

    monkeypatch.setattr(stopwatches, "exported_program", counted)
    network, plan = own(uneven(made()))
    keep = draw_widths(plan.table, 3, 0)
    assert len({tuple(row) for row in keep}) == 3
    seconds = seconds_of(network, plan, LatencyRecipe(measure="onnxruntime", images=2), keep)
    assert len(exported) == graphs
    assert np.isfinite(seconds).all()


def test_networks_with_the_same_blocks_are_timed_by_one_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[nn.Module] = []

    def counted(module: nn.Module, images: Tensor, **options: Any) -> Any:
        exported.append(module)
        return exported_program(module, images, **options)

    monkeypatch.setattr(stopwatches, "exported_program", counted)
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network, blocks=True)
    keep = np.tile(plan.table.channels, (6, 1))
    keep[1::2] //= 2
    keep[2:4, 1] = keep[4:, 2] = 0
    seconds = seconds_of(network, plan, LatencyRecipe(measure="onnxruntime"), keep)
    assert len(exported) == 3
    assert seconds[2:].max() < seconds[0]


def test_time_of_the_runtime_grows_with_the_network() -> None:
    network = load_network(NetworkSpec(name="resnet20"))
    _, plan = own(network.module)
    stopwatch = stopwatches.stopwatch_named("onnxruntime")
    cutter = Cutter(plan, network.module)
    images = network.example(16)
    dense = stopwatch(network.module, images)
    kept = np.zeros(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    kept[[*plan.table.offsets, -1]] = True
    narrow = cutter.cut(kept).eval()
    assert min(stopwatch(narrow, images) for _ in range(3)) < dense


def test_a_front_is_timed_by_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, with room for few models: old ones make room."""
    exported: list[nn.Module] = []
    monkeypatch.setattr(stopwatches, "_MOST_BYTES", 10_000)
    monkeypatch.setattr(timing, "_TOGETHER", 2)
    monkeypatch.setattr(
        stopwatches,
        "exported_program",
        lambda *given: exported.append(given[0]) or exported_program(*given),
    )
    network, plan = own(uneven(Inverted()))
    keep = draw_widths(plan.table, 5, 0)
    shares = dict(shares_of(network, plan, LatencyRecipe(measure="onnxruntime"), keep))
    assert list(shares) == [0, 1, 2, 3, 4]
    assert len(exported) == 1


def test_a_network_that_the_runtime_cannot_have_is_refused() -> None:
    stopwatch = stopwatches.stopwatch_named("onnxruntime")
    with pytest.raises(ConfigError, match=r"latency.measure = 'onnxruntime': torch\.export"):
        stopwatch(Undecided().eval(), torch.ones(1, 3, 6, 6))


def test_an_unknown_stopwatch_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match="there are pytorch, onnxruntime, or name your own"):
        stopwatches.stopwatch_named("onnx")
    assert stopwatches.stopwatch_named("pytorch") is stopwatches.eager_seconds
