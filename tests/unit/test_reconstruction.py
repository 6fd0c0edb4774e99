"""Layer-wise fitting: what it recovers, what it leaves alone, and what is written back."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from evosearch.data import open_source
from evosearch.errors import NetworkError
from evosearch.networks import InputSpec, Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.folding import layout_of
from evosearch.pruning.groups import trace
from evosearch.pruning.reconstruction import Reconstructor
from evosearch.pruning.targets import targets_of
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload

HALF = Policy((8, 8, 8, 16, 16, 16, 32, 32, 32))
DENSE = Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))


def reconstructor(
    network: Network, plan: CuttingPlan, images: torch.Tensor, ridge: float = 1e-6
) -> Reconstructor:
    layout = layout_of(network)
    targets = targets_of(network.module, layout, images, 16)
    return Reconstructor(plan, layout, network.module, targets, torch.float32, ridge)


def kept(plan: CuttingPlan, removed: dict[str, list[int]]) -> NDArray[np.bool_]:
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    start = 0
    for group in plan.table.groups:
        for channel in removed.get(group.name, []):
            keep[start + channel] = False
        start += group.channels
    return keep


def make_twins(network: Network, conv: str, norm: str, pairs: list[tuple[int, int]]) -> None:
    """Makes channels of a layer copies of others."""
    layers = dict(network.module.named_modules())
    with torch.no_grad():
        for kept_one, twin in pairs:
            for tensor in (
                *layers[conv].state_dict().values(),
                *layers[norm].state_dict().values(),
            ):
                if tensor.ndim:
                    tensor[twin] = tensor[kept_one]


def test_what_twins_did_is_recovered_exactly() -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    make_twins(network, "layer2.1.conv1", "layer2.1.bn1", [(0, 5), (1, 6), (2, 30)])
    plan = trace(network)
    name = next(g.name for g in plan.table.groups if "layer2.1" in g.name)
    keep = kept(plan, {name: [5, 6, 30]})
    pixels = open_source("cifar10-sample").training().take(np.arange(96)).pixels
    images = network.normalise(pixels)
    cutter = Cutter(plan, network.module)
    with torch.inference_mode():
        wanted = network.module(images)
        raw = cutter.cut(keep)(images)
        reconstructor(network, plan, images).reconstruct(cutter.cut(keep), keep, images)
        found = cutter.network(images)
    assert (raw - wanted).abs().mean() > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("layers", ["all", "cut"])
def test_fitted_network_is_nearer_on_images_that_were_not_fitted(layers: str) -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    plan = trace(network)
    source = open_source("cifar10-sample")
    found = {}
    for name in ("compensated", "reconstructed"):
        settings = ProxySettings(
            name=name,
            criterion="l1",
            reconstruction_images=96,
            reconstruction_layers=layers,
        )
        workload = prepare_workload(
            network,
            plan,
            settings,
            source.training().take(np.arange(128)),
            source.held_out().take(np.arange(128)),
        )
        scorer = Scorer(workload)
        found[name] = scorer.score(HALF).metrics["divergence"]
    assert scorer.score(DENSE).metrics["divergence"] < 0.01
    assert found["reconstructed"] < 0.8 * found["compensated"]


@pytest.mark.parametrize(
    ("name", "summed"),
    [
        ("resnet20", {"layer1.0.conv2", "layer2.0.conv2", "layer3.2.conv2"}),
        ("torchvision:resnet18", {"layer1.0.conv2", "layer2.0.conv2"}),
        ("torchvision:mobilenet_v2", {"features.3.conv.2"}),
    ],
)
def test_sums_are_fitted_as_sums(name: str, summed: set[str]) -> None:
    network = load_network(NetworkSpec(name=name, input_shape=(3, 32, 32)))
    targets = targets_of(network.module, layout_of(network), network.example(4), 4)
    found = {layer for layer, target in targets.items() if target.summed}
    assert summed <= found
    assert not any(layer.endswith("conv1") for layer in found)


def learned(network: Network) -> Network:
    """Statistics of batch norm that fit the images, as a trained network has them."""
    torch.manual_seed(0)
    pixels = open_source("cifar10-sample").training().take(np.arange(64)).pixels
    shape = network.input.shape
    images = nn.functional.interpolate(network.normalise(pixels)[:, : shape[0]], shape[1:])
    network.module.train()(images)
    network.module.eval()
    return network


@pytest.mark.parametrize(
    "name",
    ["resnet20", "torchvision:resnet18"],
)
def test_written_network_computes_what_was_fitted(name: str) -> None:
    network = learned(load_network(NetworkSpec(name=name, input_shape=(3, 32, 32))))
    plan = trace(network)
    images = network.example(24)
    rng = np.random.default_rng(0)
    keep = np.append(rng.random(int(plan.table.channels.sum())) < 0.7, True)
    start = 0
    for channels in plan.table.channels:
        keep[start] = True
        start += channels
    fitted = reconstructor(network, plan, images, ridge=0.1)
    cutter = Cutter(plan, network.module)
    before = copy.deepcopy(cutter.cut(keep).state_dict())
    fitted.reconstruct(cutter.network, keep, images)
    after = cutter.network.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    with torch.inference_mode():
        dense = network.module(images)
        raw = cutter.cut(keep)(images)
        fitted.reconstruct(cutter.cut(keep), keep, images)
        found = cutter.network(images)
    assert (found - dense).square().mean() < 0.5 * (raw - dense).square().mean()


def test_targets_are_the_same_for_a_copy_of_the_images() -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    layout = layout_of(network)
    images = network.normalise(open_source("cifar10-sample").training().take(np.arange(8)).pixels)
    first, second = (
        targets_of(network.module, layout, shown, 8) for shown in (images, images.clone())
    )
    assert len(first) == 20
    for name, target in first.items():
        assert np.array_equal(target.values, second[name].values)
        if target.positions is not None:
            height, width = target.shape
            assert len({tuple(p) for p in target.positions}) == 8
            assert (target.positions < (height, width)).all()
            assert len(target.values) == 64


def test_linear_networks_are_fitted_too() -> None:
    network = load_network(NetworkSpec(name="lenet-300-100"))
    plan = trace(network)
    images = network.example(64)
    keep = np.append(np.arange(int(plan.table.channels.sum())) % 2 == 0, True)
    cutter = Cutter(plan, network.module)
    with torch.inference_mode():
        wanted = network.module(images)
        raw = cutter.cut(keep)(images)
        reconstructor(network, plan, images, 1e-3).reconstruct(cutter.cut(keep), keep, images)
        found = cutter.network(images)
    assert (found - wanted).square().mean() < 0.5 * (raw - wanted).square().mean()


def test_fitted_network_can_be_trained_as_it_is() -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    plan = trace(network)
    source = open_source("cifar10-sample")
    images = network.normalise(source.training().take(np.arange(128)).pixels)
    keep = np.append(np.arange(int(plan.table.channels.sum())) % 2 == 0, True)
    cutter = Cutter(plan, network.module)
    reconstructor(network, plan, images, 0.1).reconstruct(cutter.cut(keep), keep, images)
    others = network.normalise(source.training().take(np.arange(128, 256)).pixels)
    with torch.inference_mode():
        measured = cutter.network.eval()(others)
        dense = network.module(others)
        in_training = cutter.network.train()(others)
        dense_in_training = copy.deepcopy(network.module).train()(others)
    # Statistics of a batch change outputs, but no more than those of any network.
    change = float((in_training - measured).square().mean() / measured.square().mean())
    usual = float((dense_in_training - dense).square().mean() / dense.square().mean())
    assert change < 3 * usual
    lengths = {
        name: layer.weight.detach().flatten(1).norm(dim=1)
        for name, layer in cutter.cut(keep).named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    reconstructor(network, plan, images, 0.1).reconstruct(cutter.network, keep, images)
    for name, layer in cutter.network.named_modules():
        if name in lengths:
            torch.testing.assert_close(
                layer.weight.detach().flatten(1).norm(dim=1), lengths[name], rtol=1e-4, atol=1e-5
            )


class Small(nn.Module):
    """Padding by name, and a ReLU that works in place behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding="same")
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 16)
        self.linear = nn.Linear(16, 10)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(n, 3, h, w)` to `(n, 10)`."""
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.linear(self.act(self.hidden(x.mean((2, 3)))))  # type: ignore[no-any-return]


def small() -> Network:
    torch.manual_seed(0)
    base = load_network(NetworkSpec(name="resnet20"))
    return Network(spec=base.spec, module=Small().eval(), input=base.input)


def test_targets_are_what_a_layer_returned_before_anything_worked_in_place() -> None:
    network = small()
    images = network.example(8)
    targets = targets_of(network.module, layout_of(network), images, 16)
    assert list(targets) == ["conv2", "hidden", "linear"]
    assert min(target.values.min() for target in targets.values()) < 0


def test_layer_that_pads_by_name_is_left_as_it_is() -> None:
    network = small()
    plan = trace(network)
    images = network.example(64)
    keep = np.append(np.arange(int(plan.table.channels.sum())) % 4 > 0, True)
    cutter = Cutter(plan, network.module)
    with torch.inference_mode():
        wanted = network.module(images)
        raw = cutter.cut(keep)(images)
        before = cutter.network.get_submodule("conv1").weight.clone()  # type: ignore[operator, union-attr]
        reconstructor(network, plan, images, 1e-2).reconstruct(cutter.network, keep, images)
        assert torch.equal(cutter.network.get_submodule("conv1").weight, before)
        found = cutter.network(images)
    assert (found - wanted).square().mean() < 0.5 * (raw - wanted).square().mean()


class Depthwise(nn.Module):
    """A depthwise convolution between two others, norms behind all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.norm_deep = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(n, 3, h, w)` to `(n, 10)`."""
        x = F.relu(self.norm_deep(self.deep(F.relu(self.norm_a(self.a(x))))))
        return self.fc(F.relu(self.norm_b(self.b(x))).mean((2, 3)))  # type: ignore[no-any-return]


def deep() -> Network:
    torch.manual_seed(0)
    shape = InputSpec(shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    return Network(spec=NetworkSpec(name="deep"), module=Depthwise().eval(), input=shape)


def test_a_heavy_load_leaves_scales_and_weights_where_they_were() -> None:
    network = deep()
    plan, images = trace(network), network.example(16)
    keep = kept(plan, {"a": [1, 4]})
    cutter = Cutter(plan, network.module)
    before = {k: v.clone() for k, v in cutter.cut(keep).named_parameters()}
    reconstructor(network, plan, images, ridge=1e6).reconstruct(cutter.network, keep, images)
    after = dict(cutter.network.named_parameters())
    torch.testing.assert_close(after["deep.weight"], before["deep.weight"])
    torch.testing.assert_close(
        after["norm_deep.weight"], before["norm_deep.weight"], rtol=1e-4, atol=0
    )
    torch.testing.assert_close(after["b.weight"], before["b.weight"], rtol=1e-3, atol=1e-5)


def test_a_filter_of_zeros_is_no_obstacle() -> None:
    network = deep()
    with torch.no_grad():
        network.module.b.weight[2] = 0
    plan, images = trace(network), network.example(16)
    keep = kept(plan, {"a": [1, 4]})
    cutter = Cutter(plan, network.module)
    reconstructor(network, plan, images, ridge=0.1).reconstruct(cutter.cut(keep), keep, images)
    assert all(tensor.isfinite().all() for tensor in cutter.network.state_dict().values())


def test_where_few_digits_give_no_factor_more_are_taken() -> None:
    network = small()
    plan, images = trace(network), network.example(8)
    layout = layout_of(network)
    targets = targets_of(network.module, layout, images, 16)
    rough = Reconstructor(plan, layout, network.module, targets, torch.bfloat16, 1e-3)
    rng = np.random.default_rng(0)
    # Inputs that hardly differ: what sets them apart is below the digits of the products.
    rows = rng.normal(size=(256, 1)) @ rng.uniform(0.5, 1.5, (1, 64)) + 1e-2 * rng.normal(
        size=(256, 64)
    )
    residual = rows @ rng.normal(size=(64, 4))
    gram = rows.T @ rows
    gram += 1e-3 * gram.diagonal().mean() * np.eye(64)
    wanted = np.linalg.solve(gram, rows.T @ residual).T
    found = rough._step(*(torch.from_numpy(part).float() for part in (rows, residual)))
    np.testing.assert_allclose(found.numpy(), wanted, atol=0.05 * np.abs(wanted).max())


def test_the_head_is_fitted_even_where_it_lost_no_inputs() -> None:
    network = load_network(NetworkSpec(name="resnet20"))
    plan, images = trace(network), network.example(8)
    keep = np.append(np.arange(int(plan.table.channels.sum())) % 2 == 0, True)
    layout = layout_of(network)
    targets = targets_of(network.module, layout, images, 4)
    few = Reconstructor(
        plan, layout, network.module, targets, torch.float32, 1e-3, every_layer=False
    )
    cutter = Cutter(plan, network.module)
    before = {k: v.clone() for k, v in cutter.cut(keep).named_parameters()}
    few.reconstruct(cutter.network, keep, images)
    after = dict(cutter.network.named_parameters())
    assert layout.head == "linear"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    # Of a block the second convolution loses inputs, and the first does not.
    assert {"linear.weight", "layer1.0.conv2.weight"} <= changed
    assert not {"conv1.weight", "layer1.0.conv1.weight"} & changed


def test_a_bias_before_a_norm_counts_once() -> None:
    network = deep()
    with torch.no_grad():
        network.module.b.bias.add_(2)
    plan, images = trace(network), network.example(32)
    keep = kept(plan, {"a": [1, 4, 5]})
    cutter = Cutter(plan, network.module)
    with torch.inference_mode():
        wanted = network.module(images)
        raw = cutter.cut(keep)(images)
        reconstructor(network, plan, images, 1e-3).reconstruct(cutter.cut(keep), keep, images)
        found = cutter.network(images)
    assert (found - wanted).square().mean() < 0.5 * (raw - wanted).square().mean()


class Fickle(nn.Module):
    """Adds its branch to its stream, unless the stream is very narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(n, 3, h, w)` to `(n, 10)`."""
        x = F.relu(self.a(x))
        y = self.b(x)
        y = x + y if x.shape[1] > 3 else F.relu(y)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_sum_that_does_not_come_is_no_silent_error() -> None:
    network = replace(deep(), module=Fickle().eval())
    plan, images = trace(network), network.example(8)
    fitted = reconstructor(network, plan, images, 0.1)
    cutter = Cutter(plan, network.module)
    name = plan.table.groups[0].name
    keep = kept(plan, {name: [0, 1]})
    fitted.reconstruct(cutter.cut(keep), keep, images)
    keep = kept(plan, {name: [0, 1, 2, 3, 4, 5]})
    with pytest.raises(NetworkError, match="b: the output was added in the dense network"):
        fitted.reconstruct(cutter.cut(keep), keep, images)
    # Nor is it held against the next one.
    keep = kept(plan, {name: [0, 1]})
    fitted.reconstruct(cutter.cut(keep), keep, images)


class ReadTwice(Fickle):
    """Adds its branch to its stream, and reads it by itself as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(n, 3, h, w)` to `(n, 10)`."""
        x = F.relu(self.a(x))
        y = self.b(x)
        return self.fc(((x + y) * torch.tanh(y)).mean((2, 3)))  # type: ignore[no-any-return]


def test_an_output_that_is_read_beside_its_sum_is_fitted_by_itself() -> None:
    network = replace(deep(), module=ReadTwice().eval())
    images = network.example(8)
    found = targets_of(network.module, layout_of(network), images, 16)
    assert {name: target.summed for name, target in found.items()} == {
        "a": False,
        "b": False,
        "fc": False,
    }
    network = replace(network, module=Fickle().eval())
    assert targets_of(network.module, layout_of(network), images, 16)["b"].summed
