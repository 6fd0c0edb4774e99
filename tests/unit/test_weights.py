"""Weights: which file, what is in it, and whether it fits the network."""

import argparse
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
    Network,
    NetworkSpec,
    load_into,
    load_network,
    read_weights,
    save_weights,
    weights_path,
)

LENET = "lenet-300-100"


def lenet(**settings: Any) -> Network:
    return load_network(NetworkSpec(name=LENET, **settings))


def saved_state(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


# --- safetensors


def test_saved_weights_come_back(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    saved = load_network(NetworkSpec(name="resnet20"))
    save_weights(path, saved.module, {})
    loaded = load_network(NetworkSpec(name="resnet20", weights=str(path)))
    wanted = saved.module.state_dict()
    found = loaded.module.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_weights_that_go_by_two_names_are_written_for_both(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    module = nn.ModuleDict({"a": first, "b": second, "c": first})
    save_weights(tmp_path / "w.safetensors", module, {})
    state, _ = read_weights(tmp_path / "w.safetensors")
    wanted = module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_equal_networks_are_equal_files(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    facts = {f"fact {n}": n for n in range(12)} | {"name": "Größe"}
    files = [tmp_path / f"{n}.safetensors" for n in range(4)]
    for file in files:
        save_weights(file, module, facts)
    assert len({file.read_bytes() for file in files}) == 1
    state, told = read_weights(files[0])
    assert torch.equal(state["weight"], module.weight)
    assert json.loads(told["name"]) == "Größe"


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


# --- state dicts


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


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state_dict", "net", "student_of_the_third_kind"]
)
def test_wrapped_state_dict_with_a_module_prefix_is_loaded(tmp_path: Path, wrapper: str) -> None:
    state = lenet().module.state_dict()
    content = {wrapper: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    loaded = lenet(weights=saved_state(tmp_path / "w.pth", content)).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=0.1, name="run 3")},
        {"best": np.float64(91.3), "epoch": np.int64(4), "history": np.arange(3.0)},
        {"optimizer": torch.optim.SGD([torch.ones(1)], 0.1).state_dict(), "scaler": {}},
        {"model_ema": {"other.weight": torch.ones(1)}},
    ],
)
def test_what_trainers_keep_beside_the_network_is_no_hindrance(
    tmp_path: Path, beside: dict[str, object]
) -> None:
    state = lenet().module.state_dict()
    content = {"model": state, **beside}
    loaded = lenet(weights=saved_state(tmp_path / "w.pth", content)).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_the_network_of_a_trainer_is_found_under_its_name(tmp_path: Path) -> None:
    state = lenet().module.state_dict()
    content = {
        **{f"model.{name}": value for name, value in state.items()},
        "criterion.weight": torch.ones(10),
    }
    weights = saved_state(tmp_path / "w.ckpt", {"state_dict": content})
    loaded = lenet(weights=weights).module.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)


def test_two_networks_in_one_file_are_not_chosen_between(tmp_path: Path) -> None:
    state, fronts = lenet().module.state_dict(), ("student", "teacher")
    content = {f"{front}.{name}": value for front in fronts for name, value in state.items()}
    with pytest.raises(NetworkError, match=r"missing: .*not in the network: student\."):
        lenet(weights=saved_state(tmp_path / "w.pt", content))


def test_counters_of_batch_norm_may_be_absent(tmp_path: Path) -> None:
    state = load_network(NetworkSpec(name="resnet20")).module.state_dict()
    old = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    spec = NetworkSpec(name="resnet20", weights=saved_state(tmp_path / "w.pt", old))
    assert torch.equal(load_network(spec).module.conv1.weight, state["conv1.weight"])


def test_pickled_network_is_refused_without_being_loaded(tmp_path: Path) -> None:
    path = saved_state(tmp_path / "w.pt", lenet().module)
    with pytest.raises(
        NetworkError,
        match=r"holds evosearch\.networks\.lenet\.\w+, .*would run its code; save network",
    ):
        lenet(weights=path)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"a": 1}, {}, {"b": {"x": torch.ones(1)}, "c": {"x": torch.ones(1)}}],
)
def test_file_that_holds_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = saved_state(tmp_path / "w.pt", content)
    with pytest.raises(NetworkError, match=r"w.pt is not a state dict: wanted tensors by name"):
        lenet(weights=path)


def test_what_a_file_holds_instead_is_told(tmp_path: Path) -> None:
    path = saved_state(tmp_path / "w.pt", {"epoch": 3, "best": 0.5})
    with pytest.raises(NetworkError, match=r"under state_dict or model, found epoch, best"):
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


# --- which weights, and whether they fit


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
