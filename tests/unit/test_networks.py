"""The catalogue, finding a network by name, and reading its weights."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evosearch.errors import NetworkError
from evosearch.networks import (
    BUILT_IN,
    Network,
    NetworkSpec,
    load_into,
    load_network,
    read_weights,
    save_weights,
    weights_path,
)
from evosearch.networks.cifar_resnet import CifarResNet
from evosearch.networks.cifar_vgg import CifarVgg
from evosearch.networks.lenet import LeNet5

LENET = "lenet-300-100"
PUBLISHED_PARAMS = {
    # [He2016], table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    # The counts that the pruning papers print: 266,610 and 431,080.
    "lenet-300-100": 266_610,
    "lenet-5": 431_080,
}

OWN_FILE = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Settings:  # looks its own module up while it is made
    width: "int" = 4

class Own(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def make(num_classes, width=Settings().width):
    return Own(num_classes, width)

def fixed():
    return Own(3, 2)

def broken():
    raise RuntimeError("the factory is out of order")

def text():
    return "no network"

constant = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Path of a file with factories; append `:name`."""
    path = tmp_path / "own_networks.py"
    path.write_text(OWN_FILE)
    return str(path)


def lenet(**settings: Any) -> Network:
    return load_network(NetworkSpec(name=LENET, **settings))


def saved_state(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


# --- the catalogue


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_maps_its_example_to_finite_logits(name: str) -> None:
    network = load_network(NetworkSpec(name=name))
    with torch.inference_mode():
        logits = network.module(network.example(2))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["resnet20", "vgg16-cifar", "lenet-300-100", "lenet-5"])
def test_built_in_has_as_many_outputs_as_classes_are_asked_for(name: str) -> None:
    network = load_network(NetworkSpec(name=name, num_classes=7))
    with torch.inference_mode():
        assert network.module(network.example()).shape == (1, 7)


@pytest.mark.parametrize(("name", "params"), PUBLISHED_PARAMS.items())
def test_built_in_has_the_published_number_of_parameters(name: str, params: int) -> None:
    module = load_network(NetworkSpec(name=name)).module
    assert sum(p.numel() for p in module.parameters()) == params


def test_loaded_network_is_in_evaluation_mode() -> None:
    module = load_network(NetworkSpec(name="resnet20")).module
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("depth", [2, 7, 21])
def test_resnet_of_a_depth_that_does_not_exist_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 with n >= 1, got {depth}"):
        CifarResNet(depth)


def test_vgg_of_a_depth_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 16 or 19, got 11"):
        CifarVgg(11)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = CifarResNet(8).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.rand(1, 16, 4, 4)
    with torch.inference_mode():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


# --- the network's input


def test_example_is_the_same_at_every_call() -> None:
    network = lenet()
    torch.manual_seed(1)
    first = network.example(3)
    torch.manual_seed(2)
    assert torch.equal(network.example(3), first)
    assert first.shape == (3, 1, 28, 28)


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    network = load_network(NetworkSpec(name="resnet20", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    wanted = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    found = network.normalise(pixels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), wanted, atol=1e-6)


def test_normalised_images_are_channels_last() -> None:
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    found = load_network(NetworkSpec(name="resnet20")).normalise(pixels)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_normalise_takes_read_only_pixels_and_leaves_them_alone() -> None:
    pixels = np.full((2, 28, 28, 1), 7, dtype=np.uint8)
    pixels.flags.writeable = False
    lenet().normalise(pixels)
    assert (pixels == 7).all()


def test_spec_overrides_shape_and_normalisation_of_the_catalogue() -> None:
    network = load_network(
        NetworkSpec(
            name="resnet20", input_shape=(3, 16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )
    )
    assert network.input.shape == (3, 16, 16)
    assert network.input.mean == (0.0, 0.0, 0.0)
    assert network.input.std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_normalisation_of_another_length_than_the_channels_is_refused(key: str) -> None:
    with pytest.raises(NetworkError, match=rf"network.{key} needs one number .*\(3\), got 1"):
        load_network(NetworkSpec(name="resnet20", **{key: (0.5,)}))


@pytest.mark.parametrize("std", [(1.0, 0.0, 1.0), (1.0, 1.0, -2.0)])
def test_deviation_that_is_not_positive_is_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(NetworkError, match=r"network.std must be positive, got \(1.0"):
        load_network(NetworkSpec(name="resnet20", std=std))


# --- torchvision


def test_torchvision_network_is_found_with_and_without_its_prefix() -> None:
    bare = load_network(NetworkSpec(name="mobilenet_v3_small"))
    prefixed = load_network(NetworkSpec(name="torchvision:mobilenet_v3_small"))
    assert repr(bare.module) == repr(prefixed.module)
    assert bare.input == prefixed.input
    assert bare.input.shape == (3, 224, 224)


def test_torchvision_network_has_as_many_outputs_as_classes_are_asked_for() -> None:
    network = load_network(
        NetworkSpec(name="mobilenet_v3_small", num_classes=6, input_shape=(3, 32, 32))
    )
    with torch.inference_mode():
        assert network.module(network.example()).shape == (1, 6)


def test_arguments_reach_a_torchvision_network() -> None:
    narrow = load_network(
        NetworkSpec(name="torchvision:mobilenet_v2", arguments={"width_mult": 0.25})
    )
    assert narrow.module.features[1].conv[0][0].in_channels == 8


def test_unknown_argument_of_a_torchvision_network_is_named() -> None:
    with pytest.raises(NetworkError, match=r"'resnet18': making it failed .*frob"):
        load_network(NetworkSpec(name="resnet18", arguments={"frob": 1}))


# --- a user's own


def test_module_and_factory_name_a_network() -> None:
    spec = NetworkSpec(
        name="evosearch.networks.lenet:LeNet5",
        num_classes=4,
        input_shape=(1, 28, 28),
        mean=(0.0,),
        std=(1.0,),
    )
    network = load_network(spec)
    assert isinstance(network.module, LeNet5)
    assert network.module.ip2.out_features == 4


def test_file_and_factory_name_a_network(own: str) -> None:
    network = load_network(NetworkSpec(name=f"{own}:make", num_classes=5))
    with torch.inference_mode():
        assert network.module(network.example()).shape == (1, 5)


def test_file_may_be_named_relative_to_the_working_directory(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(own).parent)
    assert load_network(NetworkSpec(name="own_networks.py:make")).module.fc.out_features == 10


def test_arguments_reach_a_users_factory(own: str) -> None:
    spec = NetworkSpec(name=f"{own}:make", arguments={"width": 9, "num_classes": 2}, num_classes=5)
    module = load_network(spec).module
    assert (module.conv.out_channels, module.fc.out_features) == (9, 2)


def test_factory_that_takes_no_number_of_classes_is_not_given_one(own: str) -> None:
    assert load_network(NetworkSpec(name=f"{own}:fixed")).module.fc.out_features == 3


def test_files_of_one_name_in_two_folders_are_two_networks(tmp_path: Path) -> None:
    for classes in (2, 3):
        (tmp_path / str(classes)).mkdir()
        (tmp_path / str(classes) / "net.py").write_text(
            f"from torch import nn\ndef make():\n    return nn.Linear(1, {classes})\n"
        )
    for classes in (2, 3):
        module = load_network(NetworkSpec(name=f"{tmp_path}/{classes}/net.py:make")).module
        assert module.out_features == classes


@pytest.mark.parametrize("name", ["resnet21", "torchvision:resnet21", ""])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(NetworkError, match=rf"no network '{name}'; .*resnet20.*lenet-5.*:factory"):
        load_network(NetworkSpec(name=name))


def test_built_in_refuses_arguments() -> None:
    with pytest.raises(NetworkError, match="built-in 'resnet20' takes none, got depth"):
        load_network(NetworkSpec(name="resnet20", arguments={"depth": 20}))


def test_missing_file_is_named_in_full(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=rf"file {tmp_path}/nowhere.py does not exist"):
        load_network(NetworkSpec(name=f"{tmp_path}/nowhere.py:make"))


def test_missing_module_is_named() -> None:
    with pytest.raises(NetworkError, match=r"importing no_such failed with ModuleNotFoundError"):
        load_network(NetworkSpec(name="no_such:make"))


def test_file_that_fails_to_import_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(NetworkError, match=r"importing .*bad.py failed with ZeroDivisionError"):
        load_network(NetworkSpec(name=f"{tmp_path}/bad.py:make"))


@pytest.mark.parametrize("attribute", ["absent", "constant", ""])
def test_attribute_that_is_no_factory_is_named(own: str, attribute: str) -> None:
    with pytest.raises(NetworkError, match=f"has no function or class '{attribute}'"):
        load_network(NetworkSpec(name=f"{own}:{attribute}"))


def test_factory_that_raises_is_named_with_its_error(own: str) -> None:
    with pytest.raises(NetworkError, match=r"making it failed .*the factory is out of order"):
        load_network(NetworkSpec(name=f"{own}:broken"))


def test_factory_that_returns_no_module_is_refused(own: str) -> None:
    with pytest.raises(NetworkError, match=r"must return a torch.nn.Module, got str"):
        load_network(NetworkSpec(name=f"{own}:text"))


def test_factory_without_a_signature_is_refused_like_any_other() -> None:
    with pytest.raises(NetworkError, match=r"must return a torch.nn.Module, got dict"):
        load_network(NetworkSpec(name="builtins:dict"))


# --- weights: safetensors


def test_saved_weights_come_back(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    saved = load_network(NetworkSpec(name="resnet20"))
    save_weights(path, saved.module, {})
    loaded = load_network(NetworkSpec(name="resnet20", weights=str(path)))
    wanted = saved.module.state_dict()
    found = loaded.module.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_normalisation_comes_back_from_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, lenet().module, {"shape": (1, 28, 28), "mean": (0.25,), "std": (0.75,)})
    network = lenet(weights=str(path))
    assert network.input.shape == (1, 28, 28)
    assert (network.input.mean, network.input.std) == ((0.25,), (0.75,))


def test_augmentation_comes_back_from_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, lenet().module, {"crop_padding": 3, "flip": True})
    network = lenet(weights=str(path))
    assert (network.input.crop_padding, network.input.flip) == (3, True)


def test_spec_overrides_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, lenet().module, {"mean": (0.25,), "std": (0.75,)})
    network = lenet(weights=str(path), mean=(0.5,))
    assert (network.input.mean, network.input.std) == ((0.5,), (0.75,))


def test_metadata_is_stored_as_json_text(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(2, 2), {"mean": (0.5, 1), "note": "x"})
    _, metadata = read_weights(path)
    assert {key: json.loads(value) for key, value in metadata.items()} == {
        "mean": [0.5, 1],
        "note": "x",
    }


def test_saving_leaves_no_other_file_behind(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_saving_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for layer in (nn.Linear(2, 2), nn.Linear(3, 1)):
        save_weights(path, layer, {})
    assert read_weights(path)[0]["weight"].shape == (1, 3)


def test_channels_last_weights_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_weights(path, layer, {})
    assert torch.equal(read_weights(path)[0]["weight"], layer.weight)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64])
def test_damaged_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(NetworkError, match=r"w.safetensors is not a readable safetensors file"):
        lenet(weights=str(path))


@pytest.mark.parametrize(
    "metadata", [{"mean": "no json"}, {"mean": "0.5"}, {"std": '["one"]'}, {"shape": "[1]"}]
)
def test_metadata_that_is_no_normalisation_is_refused(
    tmp_path: Path, metadata: Mapping[str, str]
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(lenet().module.state_dict(), path, dict(metadata))
    with pytest.raises(NetworkError, match=next(iter(metadata))):
        lenet(weights=str(path))


# --- weights: state dicts


def test_plain_state_dict_is_loaded(tmp_path: Path) -> None:
    state = lenet().module.state_dict()
    loaded = lenet(weights=saved_state(tmp_path / "w.pt", state)).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_network_that_asks_for_the_version_of_its_state_is_loaded(tmp_path: Path) -> None:
    # MNASNet refuses a state dict that does not say which version it is of, as safetensors cannot.
    network = load_network(NetworkSpec(name="mnasnet0_5"))
    save_weights(tmp_path / "w.safetensors", network.module, {})
    spec = NetworkSpec(name="mnasnet0_5", weights=str(tmp_path / "w.safetensors"))
    state, loaded = network.module.state_dict(), load_network(spec).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dict_with_a_module_prefix_is_loaded(tmp_path: Path, wrapper: str) -> None:
    state = lenet().module.state_dict()
    content = {wrapper: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    loaded = lenet(weights=saved_state(tmp_path / "w.pth", content)).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_counters_of_batch_norm_may_be_absent(tmp_path: Path) -> None:
    state = load_network(NetworkSpec(name="resnet20")).module.state_dict()
    old = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    spec = NetworkSpec(name="resnet20", weights=saved_state(tmp_path / "w.pt", old))
    assert torch.equal(load_network(spec).module.conv1.weight, state["conv1.weight"])


def test_pickled_network_is_refused_without_being_loaded(tmp_path: Path) -> None:
    path = saved_state(tmp_path / "w.pt", lenet().module)
    with pytest.raises(NetworkError, match=r"would run its code; save network.state_dict\(\)"):
        lenet(weights=path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"net": {"a": torch.ones(1)}}])
def test_file_that_holds_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = saved_state(tmp_path / "w.pt", content)
    with pytest.raises(NetworkError, match=r"w.pt is not a state dict: wanted tensors by name"):
        lenet(weights=path)


def test_truncated_state_dict_is_named(tmp_path: Path) -> None:
    path = Path(saved_state(tmp_path / "w.pt", {"a": torch.ones(1000)}))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(NetworkError, match=r"w.pt is not a readable state dict"):
        read_weights(path)


def test_empty_state_dict_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.touch()
    with pytest.raises(NetworkError, match=r"w.pt is not a readable state dict"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"hello world", b"G" * 50])
def test_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(NetworkError, match=r"w.pt"):
        read_weights(path)


def test_part_of_a_network_may_be_called_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(OrderedDict(module=nn.Linear(1, 2)))\n"
    )
    name = f"{tmp_path}/net.py:make"
    state = load_network(NetworkSpec(name=name)).module.state_dict()
    load_network(NetworkSpec(name=name, weights=saved_state(tmp_path / "w.pt", state)))


# --- which weights


def test_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=rf"weights file {tmp_path}/nowhere.pt does not exist"):
        lenet(weights=f"{tmp_path}/nowhere.pt")


def test_folder_is_no_weights_file(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"weights file .* does not exist"):
        weights_path(str(tmp_path))


def test_unknown_shipped_weights_are_named() -> None:
    with pytest.raises(NetworkError, match=r"no shipped weights 'shipped:frob'; there are"):
        lenet(weights="shipped:frob")


def test_missing_and_surplus_tensors_are_named() -> None:
    state = {"weight": torch.ones(2, 3), "frob": torch.ones(1)}
    with pytest.raises(
        NetworkError, match=r"weights w.pt do not fit .*missing: bias; not in the network: frob"
    ):
        load_into(nn.Linear(3, 2), state, "w.pt")


def test_tensors_of_another_shape_are_named_with_both_shapes() -> None:
    state = nn.Linear(4, 2).state_dict()
    with pytest.raises(NetworkError, match=r"shape: weight is \(2, 4\), wanted \(2, 3\)"):
        load_into(nn.Linear(3, 2), state, "w.pt")


def test_long_list_of_misfits_is_cut_short() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(NetworkError, match=r"missing: 0.weight, .*1.bias and 4 more"):
        load_into(module, {}, "w.pt")


def test_weights_that_do_not_fit_change_nothing() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(NetworkError, match="missing: bias"):
        load_into(layer, {"weight": torch.zeros(2, 3)}, "w.pt")
    assert torch.equal(layer.weight, before)


def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    path = saved_state(tmp_path / "w.pt", lenet(num_classes=7).module.state_dict())
    with pytest.raises(NetworkError, match=r"ip3.weight is \(7, 100\), wanted \(10, 100\)"):
        lenet(weights=path)


def test_network_whose_state_says_no_versions_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "plain_net.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def state_dict(self, *args, **kwargs):\n"
        "        return dict(super().state_dict(*args, **kwargs))\n"
        "def make():\n"
        "    return Net(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 10))\n"
    )
    spec = NetworkSpec(name=f"{file}:make", input_shape=(3, 4, 4))
    first = load_network(spec).module.state_dict()
    weights = saved_state(tmp_path / "w.pt", first)
    second = load_network(dataclasses.replace(spec, weights=weights)).module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
