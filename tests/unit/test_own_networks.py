"""Networks that people have: what they are wrapped in, and what cannot be pruned like that."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from evosearch.assembly import assemble
from evosearch.errors import DataError, NetworkError
from evosearch.networks import (
    NetworkSpec,
    check_repeatable,
    load_into,
    load_network,
    plain,
    save_weights,
    trusted_factory,
)
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.recipe import check_recipe
from evosearch.results.models import load_pruned, save_pruned
from evosearch.scoring.scorer import Scorer

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """Two convolutions, the first of which may be wrapped."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def scaled() -> nn.Module:
    net = Net()
    net.a, net.b = weight_norm(net.a), weight_norm(net.b)
    return net


def parametrized() -> nn.Module:
    net = Net()
    parametrizations.weight_norm(net.a)
    parametrizations.spectral_norm(net.b)
    return net


def bounded() -> nn.Module:
    net = Net()
    spectral_norm(net.b)
    return net


def double() -> nn.Module:
    return Net().double()


class Lazy(Net):
    """Has a layer that nothing has run through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(10)  # type: ignore[assignment]


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(1568, 10)))


class Random(Net):
    """Drops features in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x))


class Closed(Net):
    """Lets no gradients through."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def unseeded() -> nn.Module:
    torch.seed()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))


def spec(name: str, **more: object) -> NetworkSpec:
    return NetworkSpec(name=f"{__name__}:{name}", input_shape=SHAPE, **more)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["scaled", "parametrized", "bounded", "double"])
def test_wrapped_networks_compute_the_same_and_can_be_cut(name: str) -> None:
    made = globals()[name]().eval()
    network = load_network(spec(name))
    images = network.example(3)
    with torch.no_grad():
        wanted = made(images.to(next(made.parameters()).dtype)).float()
        torch.testing.assert_close(network.module(images), wanted, rtol=1e-5, atol=1e-5)
    learned = {name for name, _ in network.module.named_parameters()}
    assert learned == {name for name, _ in Net().named_parameters()}
    assert all(tensor.requires_grad for tensor in network.module.parameters())
    plan = trace(network)
    assert [group.channels for group in plan.table.groups] == [8, 12]
    keep = np.ones(21, dtype=np.bool_)
    keep[:4] = False
    cut = Cutter(plan, network.module).cut(keep)
    assert cut(images).shape == (3, 10)


def test_weights_that_were_kept_from_training_are_kept_from_it_still() -> None:
    made = parametrized().eval().requires_grad_(False)
    fixed = dict(plain(made).named_parameters())
    assert {"a.weight", "b.weight"} <= fixed.keys()
    assert not any(tensor.requires_grad for tensor in fixed.values())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["scaled", "parametrized"])
def test_wrapped_networks_are_scored_and_load_again(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_weights(weights, globals()[name](), {})
    recipe = {
        "network": {"name": f"{__name__}:{name}", "weights": str(weights)},
        "data": {"calibration": 64, "validation": 64},
        "proxy": {"criterion": "l1"},
        "run": {"workers": 0},
    }
    made = assemble(check_recipe(recipe, "a test"))
    table = made.workload.plan.table
    scorer = Scorer(made.workload)
    policy = made.space.decode(np.full((1, made.space.n_genes), 0.5))[0]
    assert scorer.score(policy).ok
    network = made.workload.network()
    cut = scorer.network_of(policy)
    groups = [(group.name, group.channels) for group in table.groups]
    file = tmp_path / "small.safetensors"
    save_pruned(file, replace(network, module=cut), groups, policy, {})
    images = network.example(3)
    with torch.inference_mode():
        torch.testing.assert_close(load_pruned(file)(images), cut(images))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Lazy", "fc has seen no input yet"),
        ("scripted", "is TorchScript, whose layers cannot be cut"),
        ("Random", r"different outputs each time .* F.dropout wants training=self.training"),
        ("Closed", "no gradients, by which channels are followed: leave torch.no_grad"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit.script")
def test_what_cannot_be_followed_says_why(name: str, told: str) -> None:
    with pytest.raises(NetworkError, match=told):
        trace(load_network(spec(name)))


def test_a_network_is_found_by_gradients_also_where_there_are_none() -> None:
    with torch.no_grad():
        assert len(trace(load_network(spec("Net"))).table.groups) == 2


def test_weights_that_nobody_could_make_again_are_noticed() -> None:
    check_repeatable(load_network(spec("Net")))
    network = load_network(spec("unseeded"))
    with pytest.raises(NetworkError, match=r"different weights each time .*network.weights"):
        check_repeatable(network)
    with pytest.raises(NetworkError, match=r"'resnet20' gets different weights each time"):
        check_repeatable(load_network(NetworkSpec(name="resnet20")))


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "blocks_of_mine.py").write_text("from torch import nn\nWIDTH = 24\n")
    lines = (
        "from torch import nn",
        "from blocks_of_mine import WIDTH",
        "def make():",
        "    layers = nn.Conv2d(3, WIDTH, 3), nn.Flatten(), nn.Linear(WIDTH * 196, 10)",
        "    return nn.Sequential(*layers)",
    )
    (tmp_path / "net_of_mine.py").write_text("\n".join(lines))
    made = load_network(NetworkSpec(name=f"{tmp_path}/net_of_mine.py:make", input_shape=SHAPE))
    assert made.module[0].out_channels == 24  # type: ignore[index, union-attr]


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_what_wrappers_put_in_front_of_names_is_removed(front: str) -> None:
    source, target = Net(), Net()
    nn.init.zeros_(target.a.weight)
    load_into(target, {f"{front}{k}": v for k, v in source.state_dict().items()}, "w.pt")
    assert torch.equal(target.a.weight, source.a.weight)


def test_names_that_fit_as_they_are_stay() -> None:
    module = nn.Sequential()
    module.add_module("module", Net())
    state = {name: value + 1 for name, value in module.state_dict().items()}
    load_into(module, state, "w.pt")
    assert torch.equal(module.state_dict()["module.a.weight"], state["module.a.weight"])


def test_images_of_more_channels_than_the_network_takes_are_told_from_a_wrong_mean() -> None:
    with pytest.raises(NetworkError, match=r"the images have 4 channels, .* 3 channels that"):
        load_network(NetworkSpec(name=f"{__name__}:Net"), (16, 16, 4))


class Gain(nn.Conv2d):
    """Has a parameter beside its weight, of each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class Gained(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = Gain(8, 12)


def test_parameters_that_a_layer_has_beside_its_weight_are_counted_and_cut() -> None:
    network = load_network(spec("Gained"))
    plan = trace(network)
    for kept in (8, 5):
        policy = Policy((kept, kept))
        keep = np.ones(21, dtype=np.bool_)
        keep[kept:8] = keep[8 + kept : 20] = False
        cut = Cutter(plan, network.module).cut(keep)
        count = sum(tensor.numel() for tensor in cut.parameters())
        assert plan.table.costs_of([policy])[1][0] == count


def borrowed(*_: object, **__: object) -> nn.Module:
    return Net()


PARTIAL = functools.partial(borrowed, 1)
FOREIGN = os.system


@pytest.mark.parametrize("name", ["Net", "borrowed", "PARTIAL"])
@pytest.mark.parametrize("place", [__name__, __file__])
def test_a_file_may_name_classes_of_networks_and_what_a_user_wrote(place: str, name: str) -> None:
    trusted_factory(f"{place}:{name}")


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "subprocess:run", "builtins:exec", "torch.hub:load", "torch:load"),
        *("numpy:load", f"{os.__file__}:system", f"{__name__}:FOREIGN", f"{__file__}:FOREIGN"),
    ],
)
def test_no_other_function_is_called_because_a_file_names_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="so it is not called"):
        trusted_factory(name)


def test_a_file_that_names_a_command_is_refused_before_that_is_run(tmp_path: Path) -> None:
    file, done = tmp_path / "n.safetensors", tmp_path / "done"
    facts = {
        "network": "os:system",
        "num_classes": 10,
        "arguments": {"command": f"touch {done}"},
        "shape": [3, 16, 16],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "groups": [["a", 8]],
        "keep": [4],
    }
    save_weights(file, Net(), facts)
    with pytest.raises(NetworkError, match=r"system of os .* load_pruned\(file, network=\.\.\.\)"):
        load_pruned(file)
    assert not done.exists()


def test_normalisation_that_was_left_out_is_said_to_be_imagenets() -> None:
    with pytest.raises(NetworkError, match=r"channel \(1\), got 3, as it is not set and Ima"):
        load_network(NetworkSpec(name=f"{__name__}:Net", input_shape=(1, 16, 16)))
    with pytest.raises(NetworkError, match=r"channel \(3\), got 1$"):
        load_network(spec("Net", mean=(0.5,)))


def images_file(folder: Path, shape: tuple[int, ...], labels: np.ndarray) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(folder / "mine.npz", images=pixels, labels=labels)
    return str(folder / "mine.npz")


def assembled(file: str, **data: int) -> object:
    network = {"name": f"{__name__}:Net"}
    recipe = {"network": network, "data": {"name": file, **data}, "run": {"workers": 0}}
    return assemble(check_recipe(recipe, "a test"))


def test_images_in_torchs_order_are_noticed(tmp_path: Path) -> None:
    file = images_file(tmp_path, (100, 3, 16, 16), np.arange(100) % 10)
    with pytest.raises(DataError, match=r"look like .n, channels, .*transpose\(0, 2, 3, 1\)"):
        assembled(file)


def test_labels_in_a_column_are_labels(tmp_path: Path) -> None:
    file = images_file(tmp_path, (200, 16, 16, 3), (np.arange(200) % 10)[:, None])
    assert assembled(file, validation=20)


def test_labels_that_count_from_one_are_noticed(tmp_path: Path) -> None:
    file = images_file(tmp_path, (200, 16, 16, 3), np.arange(200) % 10 + 1)
    with pytest.raises(DataError, match=r"10 classes, but .* label 10; labels count from 0"):
        assembled(file, validation=20)


@pytest.mark.parametrize("proxy", ["compensated", "patchwise", "reconstructed"])
def test_slopes_and_norms_of_all_kinds_are_scored(proxy: str) -> None:
    recipe = {
        "network": {"name": "tests.unit.cuts:OwnNorms"},
        "data": {"calibration": 64, "validation": 64},
        "proxy": {"name": proxy, "criterion": "residual-energy", "precision": "float32"},
        "run": {"workers": 0},
    }
    made = assemble(check_recipe(recipe, "a test"))
    assert [group.channels for group in made.workload.plan.table.groups] == [16, 12]
    scorer = Scorer(made.workload)
    policy = made.space.decode(np.full((1, made.space.n_genes), 0.5))[0]
    measured = scorer.score(policy)
    assert measured.ok, measured.reason
    images = made.workload.network().normalise(made.workload.validation.pixels)
    with torch.inference_mode():
        found = scorer.network_of(policy)(images).argmax(1).numpy()
    assert measured.metrics["error"] == pytest.approx(
        float((found != made.workload.validation.labels).mean()), abs=1 / 64
    )
