"""The catalogue, and finding a network by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evosearch.errors import NetworkError
from evosearch.networks import (
    BUILT_IN,
    Network,
    NetworkSpec,
    load_network,
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
