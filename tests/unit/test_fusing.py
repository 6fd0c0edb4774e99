"""Sums and activations that convolutions do on the way: found where they are, nowhere else."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning import folding, fusing
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.folding import FastCopy, layout_of
from evosearch.pruning.fusing import Fused, Tail, can_fuse, tails_of
from evosearch.pruning.groups import trace
from evosearch.pruning.watching import RELU, Activation

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not can_fuse(CPU, torch.float32), reason="this torch was built without oneDNN"
)


ON_RELU, ON_ADD = Tail(activation=RELU), Tail(added=True)
ON_ADD_RELU = Tail(added=True, activation=RELU)
ON_RELU6 = Tail(activation=Activation("hardtanh", (0.0, 6.0)))


class Toy(nn.Module):
    """Two convolutions of equal shape and a forward of one's own."""

    def __init__(self, forward: Callable[["Toy", Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.between = nn.Identity()
        self.linear = nn.Linear(4, 2)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, 3, h, w)` to `(n, 2)`."""
        return self.linear(self._forward(self, x).mean((2, 3)))  # type: ignore[no-any-return]


def plain_residual(net: Toy, x: Tensor) -> Tensor:
    x = net.act(net.first(x))
    return F.relu(net.second(x) + x)


def in_place_sum(net: Toy, x: Tensor) -> Tensor:
    x = net.act(net.first(x))
    y = net.second(x)
    y += x
    return y.relu_()


def sum_alone(net: Toy, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    return torch.tanh(torch.add(x, net.second(x)))


def read_twice(net: Toy, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.second(F.relu(y)) * y


def sum_read_twice(net: Toy, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    y = net.second(x) + x
    return F.relu(y) * y


def run_twice(net: Toy, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    return net.second(net.second(x).relu()).relu()


def both_sides(net: Toy, x: Tensor) -> Tensor:
    return F.relu(net.second(torch.tanh(net.first(x))) + net.first(x))


def other_activations(net: Toy, x: Tensor) -> Tensor:
    return F.silu(net.second(F.relu6(net.first(x))), inplace=True)


def unknown_activations(net: Toy, x: Tensor) -> Tensor:
    return F.elu(net.second(torch.sin(net.first(x))))


def activated_sum(net: Toy, x: Tensor) -> Tensor:
    x = F.hardswish(net.first(x))
    return F.relu6(net.second(x) + x)  # the library has ReLU alone for sums


def doubled(net: Toy, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.second(y + y).relu()


def read_after_its_sum(net: Toy, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    y, z = net.second(x), net.between(x)
    return (z + y) * F.relu(y)


TOYS = {
    plain_residual: {"first": ON_RELU, "second": ON_ADD_RELU},
    in_place_sum: {"first": ON_RELU, "second": ON_ADD_RELU},
    sum_alone: {"first": ON_RELU, "second": ON_ADD},
    read_twice: {},
    sum_read_twice: {"first": ON_RELU},
    run_twice: {"first": ON_RELU},
    both_sides: {"second": ON_ADD_RELU},
    other_activations: {"first": ON_RELU6, "second": Tail(activation=Activation("swish"))},
    unknown_activations: {},
    doubled: {"second": ON_RELU},
    read_after_its_sum: {"first": ON_RELU},
    activated_sum: {"first": Tail(activation=Activation("hardswish")), "second": ON_ADD},
}


def toy(forward: Callable[[Toy, Tensor], Tensor]) -> Network:
    torch.manual_seed(0)
    base = load_network(NetworkSpec(name="resnet20"))
    return Network(spec=base.spec, module=Toy(forward).eval(), input=base.input)


@pytest.mark.parametrize("forward", TOYS, ids=lambda f: f.__name__)
def test_tails_are_found_where_nobody_else_reads(forward: Callable[[Toy, Tensor], Tensor]) -> None:
    network = toy(forward)
    assert tails_of(network.module, network.example(2)) == TOYS[forward]
    assert dict(layout_of(network).tails) == TOYS[forward]


@pytest.mark.parametrize("forward", TOYS, ids=lambda f: f.__name__)
def test_fused_toy_computes_the_same(forward: Callable[[Toy, Tensor], Tensor]) -> None:
    network = toy(forward)
    layout = layout_of(network)
    assert dict(layout.tails) == TOYS[forward]
    fast = FastCopy(network.module, layout, torch.float32)
    fast.update(network.module)
    images = network.example(4)
    with torch.inference_mode():
        wanted, found, again = network.module(images), fast.module(images), fast.module(images)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, again)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": nn.ReLU(inplace=True),
    "torch.relu": torch.relu,
    "relu_": Tensor.relu_,
    "ReLU6": nn.ReLU6(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.5, 0.25),
    "hardtanh, one bound": functools.partial(F.hardtanh, min_val=-0.25),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "leaky_relu, by position": lambda x: F.leaky_relu(x, 0.3, True),
    "SiLU": nn.SiLU(inplace=True),
    "Hardswish": nn.Hardswish(),
    "GELU": nn.GELU(),
    "GELU, tanh": nn.GELU("tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_activate_as_torch_does(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_fuse(CPU, dtype):
        pytest.skip("no bfloat16 here")
    network = toy(lambda net, x: activation(net.second(x.repeat(1, 2, 1, 1)[:, :4])))
    module, images = network.module, network.example(4) * 3
    tails = tails_of(module, images)
    assert tails["second"].activation is not None
    done: list[object] = []
    convolve = fusing.convolve
    monkeypatch.setattr(fusing, "convolve", lambda *args: done.append(args) or convolve(*args))
    plain, fused = (copy.deepcopy(module).to(dtype) for _ in range(2))
    Fused(fused, tails)
    with torch.inference_mode():
        wanted, found = plain(images.to(dtype)), fused(images.to(dtype))
    near = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    assert len(done) == 1


def test_an_activation_that_changes_with_the_network_is_no_silent_error() -> None:
    network = toy(lambda net, x: F.leaky_relu(net.second(net.first(x)), 1 / len(net.first.weight)))
    layout = layout_of(network)
    assert dict(layout.tails)["second"].activation == Activation("leaky_relu", (0.25,))
    fast = FastCopy(network.module, layout, torch.float32)
    fast.update(network.module)
    network.module.first = nn.Conv2d(3, 2, 3, padding=1)
    network.module.second = nn.Conv2d(2, 4, 3, padding=1)
    fast.update(network.module)
    with (
        torch.inference_mode(),
        pytest.raises(NetworkError, match=r"leaky_relu.*0\.5.* was .*0\.25"),
    ):
        fast.module(network.example(2))


def in_place_without_a_name(net: Toy, x: Tensor) -> Tensor:
    x = net.act(net.first(x))
    y = net.second(x)
    y.add_(x)  # what is returned is not looked at
    return y


def input_changed_meanwhile(net: Toy, x: Tensor) -> Tensor:
    x = net.first(x).relu()
    y = net.second(x)
    x.mul_(2.0)
    return y + x


def test_what_fusing_would_change_is_not_fused() -> None:
    assert layout_of(toy(input_changed_meanwhile)).tails == ()


def test_sums_in_place_go_by_the_name_of_what_was_added_to() -> None:
    network = toy(in_place_without_a_name)
    layout = layout_of(network)
    assert dict(layout.tails)["second"] == Tail(added=True)
    fast = FastCopy(network.module, layout, torch.float32)
    fast.update(network.module)
    images = network.example(3)
    with torch.inference_mode():
        torch.testing.assert_close(fast.module(images), network.module(images))


def test_nothing_is_fused_across_what_is_watched() -> None:
    def forward(net: Toy, x: Tensor) -> Tensor:
        return F.relu(net.between(net.first(x)))

    network = toy(forward)
    assert dict(layout_of(network).tails) == {"first": ON_RELU}
    assert layout_of(network, watched=("between",)).tails == ()
    assert layout_of(network, watched=("first",)).tails == ()


def test_sum_behind_a_grouped_convolution_is_left_to_torch() -> None:
    # The library refuses it in bfloat16, though it does it in float32.
    network = toy(plain_residual)
    network.module.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    layout = layout_of(network)
    assert dict(layout.tails) == {"first": ON_RELU}
    for dtype in (torch.float32, torch.bfloat16):
        fast = FastCopy(network.module, layout, dtype)
        fast.update(network.module)
        with torch.inference_mode():
            fast.module(network.example(4).to(dtype))


class Narrow(nn.Module):
    """A block on a stream, both perhaps a single channel wide."""

    def __init__(self, stream: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(stream, inner, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(inner, stream, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, stream, h, w)` to itself."""
        return F.relu(self.second(F.relu(self.first(x))) + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_cut_to_one_channel_or_place_computes_the_same(dtype: torch.dtype) -> None:
    # Strides of such maps tell no layout, and the library refuses to add some of them.
    if not can_fuse(CPU, dtype):
        pytest.skip("no bfloat16 here")
    torch.manual_seed(0)
    tails = {"first": ON_RELU, "second": ON_ADD_RELU}
    shapes = itertools.product((1, 2), (1, 3, 16), (1, 3, 16), (1, 3), [(1, 1), (1, 3), (4, 4)])
    for n, stream, inner, kernel, size in shapes:
        module = Narrow(stream, inner, kernel).to(dtype, memory_format=torch.channels_last)
        x = torch.randn(n, stream, *size).to(dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = module(x)
            Fused(module, tails)
            torch.testing.assert_close(module(x), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("resnet20", {ON_RELU: 10, ON_ADD_RELU: 9}),
        ("vgg16-cifar", {ON_RELU: 13}),
        ("torchvision:resnet18", {ON_RELU: 9, ON_ADD_RELU: 8}),
        ("torchvision:mobilenet_v2", {ON_RELU6: 35, ON_ADD: 10}),
    ],
)
def test_cut_networks_compute_the_same(name: str, fused: dict[Tail, int]) -> None:
    network = load_network(NetworkSpec(name=name, input_shape=(3, 32, 32)))
    layout = layout_of(network)
    tails = list(dict(layout.tails).values())
    assert {tail: tails.count(tail) for tail in set(tails)} == fused
    plan = trace(network)
    keep = np.append(np.arange(int(plan.table.channels.sum())) % 3 > 0, True)
    module = Cutter(plan, network.module).cut(keep).eval()
    images = network.example(4).to(memory_format=torch.channels_last)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        copies = [
            FastCopy(network.module, lay, dtype) for lay in (layout, replace(layout, tails=()))
        ]
        with torch.inference_mode():
            for fast in copies:
                fast.update(module)
            found, wanted = (fast.module(images.to(dtype)).float() for fast in copies)
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )


def test_without_the_library_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy(plain_residual)
    layout = layout_of(network)
    monkeypatch.setattr(folding, "can_fuse", lambda _device, _dtype: False)
    assert layout_of(network).tails == ()
    fast = FastCopy(network.module, layout, torch.float32)  # a layout from another machine
    fast.update(network.module)
    assert "forward" not in vars(fast.module)
    images = network.example(2)
    with torch.inference_mode():
        torch.testing.assert_close(fast.module(images), network.module(images))
    assert not can_fuse(CPU, torch.float64)
    assert not can_fuse(torch.device("cuda"), torch.bfloat16)
