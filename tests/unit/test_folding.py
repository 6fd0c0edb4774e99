"""Copies made for speed compute what the network computes, and never write into it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evosearch.data import open_source
from evosearch.errors import NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.folding import FastCopy, Layout, layout_of
from evosearch.pruning.groups import trace
from evosearch.pruning.layers import Norm
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import (
    divergence,
    prepare_workload,
    settled_batch_size,
    settled_calibration_batch,
    settled_precision,
)


def lively(network: Network) -> Network:
    """Gives batch norms statistics that matter."""
    torch.manual_seed(0)
    for layer in network.module.modules():
        if isinstance(layer, Norm):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return network


def cut_in_half(network: Network) -> nn.Module:
    plan = trace(network)
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    start = 0
    for channels in plan.table.channels:
        keep[start + channels // 2 : start + channels] = False
        start += channels
    return Cutter(plan, network.module).cut(keep).eval()


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet20", 19),
        ("vgg16-cifar", 13),
        ("lenet-5", 0),
        ("torchvision:resnet18", 20),
    ],
)
def test_fast_copy_computes_what_the_cut_network_computes(name: str, folded: int) -> None:
    shape = (1, 28, 28) if name == "lenet-5" else (3, 32, 32)
    network = lively(load_network(NetworkSpec(name=name, input_shape=shape)))
    layout = layout_of(network)
    assert len(layout.pairs) == folded
    module = cut_in_half(network)
    fast = FastCopy(network.module, layout, torch.float32)
    fast.update(module)
    images = network.example(4)
    with torch.inference_mode():
        wanted, found = module(images), fast.module(images)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


class Reader(nn.Module):
    """The first norm reads a convolution alone; the second one's input goes elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, 3, h, w)` to `(n, 2)`."""
        x = self.conv2(self.bn1(self.conv1(x)).relu())
        return self.linear((x + self.bn2(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_norm_whose_input_goes_elsewhere_too_is_not_folded() -> None:
    spec = NetworkSpec(name="resnet20")
    network = load_network(spec)
    network = Network(spec=spec, module=Reader().eval(), input=network.input)
    layout = layout_of(network)
    assert layout.pairs == (("conv1", "bn1"),)
    assert layout.head == "linear"


def test_statistics_of_a_copy_are_its_own_until_they_are_given() -> None:
    network = load_network(NetworkSpec(name="resnet20"))
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    fast = FastCopy(network.module, Layout(), torch.float32)
    fast.update(network.module)
    fast.module.train()(network.example(8))
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, before[key])
    fast.give_statistics(network.module)
    assert not torch.equal(network.module.bn1.running_mean, before["bn1.running_mean"])  # type: ignore[union-attr, operator, arg-type]
    assert torch.equal(network.module.conv1.weight, before["conv1.weight"])  # type: ignore[union-attr, arg-type]


def test_bfloat16_rounds_but_hardly_diverges() -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    layout = layout_of(network)
    images = network.normalise(open_source("cifar10-sample").held_out().take(np.arange(64)).pixels)
    exact, rounded = (FastCopy(network.module, layout, d) for d in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        for fast in (exact, rounded):
            fast.update(network.module)
        wanted, found = exact.module(images), rounded.module(images.bfloat16())
    assert found.dtype == torch.float32  # the head is exact
    assert 0 < divergence(wanted, found) < 1e-3


class Stubborn(nn.Module):
    """Uses a float32 constant that is no tensor of the module's state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.linear = nn.Linear(4, 10)
        self.turn = [torch.eye(32)]

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, 3, 32, 32)` to `(n, 10)`."""
        x = self.conv1(x @ self.turn[0]).relu()
        return self.linear(self.conv2(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_network_that_does_not_bear_the_precision_is_refused_by_name() -> None:
    base = load_network(NetworkSpec(name="resnet20"))
    network = Network(spec=base.spec, module=Stubborn().eval(), input=base.input)
    held_out = open_source("cifar10-sample").held_out().take(np.arange(20))
    settings = ProxySettings(name="raw", criterion="l1", precision="bfloat16")
    with pytest.raises(NetworkError, match=r"does not bear proxy\.precision = 'bfloat16'"):
        prepare_workload(network, trace(network), settings, held_out, held_out)


def test_precision_that_is_named_is_not_second_guessed() -> None:
    assert settled_precision("float32") == "float32"
    assert settled_precision("bfloat16") == "bfloat16"
    assert settled_precision("auto") in ("float32", "bfloat16")


def test_batch_size_is_a_wish_or_what_the_device_likes() -> None:
    cifar = (3, 32, 32)
    assert settled_batch_size(None, cifar) == settled_batch_size(None, (1, 28, 28)) == 128
    assert settled_batch_size(None, cifar, gpu=True) > 128
    assert settled_batch_size(48, cifar, gpu=True) == 48


def test_larger_images_come_fewer_at_a_time() -> None:
    sizes = [settled_batch_size(None, (3, edge, edge)) for edge in (32, 48, 64, 224)]
    assert sizes == [128, 56, 32, 8]
    assert settled_batch_size(None, (3, 224, 224), gpu=True) == 64
    assert settled_batch_size(7, (3, 224, 224)) == 7


def test_calibration_images_run_together_unless_somebody_said_how_many() -> None:
    assert settled_calibration_batch(None, None, 8) == 32
    assert settled_calibration_batch(None, None, 56) is None
    # A size that was named, or that a run has recorded, is meant for all images.
    assert settled_calibration_batch(None, 8, 8) is None
    assert settled_calibration_batch(16, None, 8) == 16
    assert settled_calibration_batch(16, 8, 8) == 16
