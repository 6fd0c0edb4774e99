"""What becomes a group, and what is fixed for which reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import NetworkError
from evosearch.networks import load_network
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.pruning.layers import is_depthwise
from tests.unit.cuts import (
    FIXED_STREAM,
    SPECS,
    Chain,
    Traced,
    choose,
    counted_macs,
    equal,
    ignoring,
    names,
    own,
    reasons,
    tensors,
    traced_once,
    traced_own,
)
from tests.unit.small_networks import Ghost


@pytest.fixture
def resnet20() -> Traced:
    return traced_once("resnet20")


# --- known networks


def test_cifar_resnet_is_pruned_inside_its_blocks(resnet20: Traced) -> None:
    _, plan = resnet20
    wanted = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert names(plan) == wanted
    assert plan.table.groups[0].consumers == ("layer1.0.conv2",)


def test_option_a_shortcut_fixes_the_residual_stream(resnet20: Traced) -> None:
    _, plan = resnet20
    assert reasons(plan)["conv1"] == FIXED_STREAM


def test_stages_are_groups_of_one_resolution(resnet20: Traced) -> None:
    _, plan = resnet20
    assert plan.table.stages == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert [group.resolution for group in plan.table.groups[::3]] == [(32, 32), (16, 16), (8, 8)]


def test_projection_shortcut_lets_the_residual_stream_be_pruned() -> None:
    plan = trace(load_network(SPECS["resnet18"]))
    stream = next(group for group in plan.table.groups if "layer2.0.conv2" in group.producers)
    assert set(stream.producers) == {"layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"}
    assert set(stream.consumers) == {"layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0"}


def test_squeeze_excitation_is_cut_with_what_it_scales() -> None:
    plan = trace(load_network(SPECS["mobilenet_v3_small"]))
    scaled = next(group for group in plan.table.groups if "features.1.block.0.0" in group.producers)
    assert "features.1.block.1.fc2" in scaled.producers
    assert "features.1.block.1.fc1" in scaled.consumers
    assert "features.1.block.1.fc1" in names(plan)


def test_flattened_channel_takes_all_its_positions_along() -> None:
    network = load_network(SPECS["lenet-5"])
    plan = trace(network)
    counts = np.array([20, 7, 500])
    cut = Cutter(plan, network.module).cut(choose(plan.table, counts, 0))
    assert plan.table.groups[1].consumers == ("ip1",)
    assert tuple(cut.ip1.weight.shape) == (500, 7 * 16)


def test_depthwise_convolution_follows_its_input() -> None:
    network, plan = traced_once("mobilenet_v2")
    cut = Cutter(plan, network.module).cut(choose(plan.table, np.ones_like(plan.table.channels), 0))
    depthwise = dict(cut.named_modules())["features.2.conv.1.0"]
    assert (depthwise.groups, depthwise.in_channels, tuple(depthwise.weight.shape)) == (
        1,
        1,
        (1, 1, 3, 3),
    )


def test_depthwise_convolution_of_one_channel_can_be_cut_again() -> None:
    network, plan = traced_once("mobilenet_v2")
    cutter = Cutter(plan, network.module)
    cutter.cut(choose(plan.table, np.ones_like(plan.table.channels), 0))
    cut = cutter.cut(choose(plan.table, plan.table.channels, 0))
    with torch.inference_mode():
        assert torch.equal(cut(network.example()), network.module(network.example()))


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(1, 1, 3), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_depthwise_means_one_input_channel_for_one_output_channel(
    layer: nn.Module, wanted: bool
) -> None:
    assert is_depthwise(layer) is wanted


# --- small networks of all kinds


class Scaled(Chain):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.b(self.a(x) * self.scale).mean((2, 3)))


def test_plain_chain_is_all_prunable() -> None:
    plan = traced_own(Chain())
    assert names(plan) == ["a", "b"]
    assert reasons(plan) == {"fc": "it is the network's output"}


MIXED = r"; a: [^;]* \(channels are mixed on the way\)"


class Faint(nn.Module):
    """A stream and a branch that mixes its channels, scaled by next to nothing.

    Any width bears this mixing, so that numbers alone can tell that it is wrong.
    """

    def __init__(self, scale: float, *, norm: bool) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 10)
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1.0 if norm else scale))
        if norm:
            nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.norm(self.b(F.gelu(self.a(x)).roll(1, 1)))
        return self.fc((x + self.scale * y).mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_branch_that_starts_as_nothing_hides_nothing(scale: float, norm: bool) -> None:
    with pytest.raises(NetworkError, match=MIXED):
        traced_own(Faint(scale, norm=norm))


def test_weights_that_are_all_zero_hide_nothing() -> None:
    network = Faint(1.0, norm=False)
    nn.init.zeros_(network.b.weight)
    with pytest.raises(NetworkError, match=MIXED):
        traced_own(network)


def test_network_that_needs_an_even_width_keeps_it() -> None:
    def halves(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=1)
        return torch.cat([first, second], 1) if first.shape == second.shape else y[:, :0]

    assert "a" in reasons(traced_own(Chain(halves)))


@pytest.mark.parametrize("affine", [True, False])
def test_channels_of_a_group_norm_go_as_it_groups_them(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8, affine=affine)
    network = own(Chain(norm, norm=norm))
    plan = trace(network)
    assert [(g.name, g.granularity) for g in plan.table.groups] == [("a", 2), ("b", 1)]
    cutter = Cutter(plan, network.module)
    for counts in ([6, 5], [2, 6], [8, 3]):
        keep = choose(plan.table, np.array(counts), 0)
        cut = cutter.cut(keep)
        assert (cut.norm.num_channels, cut.norm.num_groups) == (counts[0], counts[0] // 2)
        macs, params = plan.table.costs(np.array([counts]))
        assert macs.item() == counted_macs(network, cut)
        assert params.item() == sum(p.numel() for p in cut.parameters())
        example = network.example(2)
        wanted = ignoring(network.module, plan, keep)(example.double())
        torch.testing.assert_close(cut(example).double(), wanted, rtol=1e-4, atol=1e-5)


def test_layer_norm_fixes_its_channels() -> None:
    norm = nn.GroupNorm(1, 8)
    why = "norm: it normalises all channels together"
    assert reasons(traced_own(Chain(norm, norm=norm)))["a"] == why


def test_group_norm_of_what_is_joined_fixes_its_channels() -> None:
    class Both(Chain):
        def forward(self, x: Tensor) -> Any:
            return self.fc(self.b(self.norm(torch.cat([self.a(x), self.c(x)], 1))).mean((2, 3)))

    parts = {
        "c": nn.Conv2d(3, 4, 3, padding=1),
        "b": nn.Conv2d(12, 6, 3),
        "norm": nn.GroupNorm(3, 12),
    }
    assert set(reasons(traced_own(Both(**parts)))) == {"a", "c", "fc"}


def test_group_norms_of_a_stream_and_of_its_branch_agree() -> None:
    class Branched(Chain):
        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.a(x))
            return self.fc((x + self.other(self.b(x))).mean((2, 3)))

    parts = {
        "norm": nn.GroupNorm(6, 24),
        "other": nn.GroupNorm(4, 24),
        "a": nn.Conv2d(3, 24, 3),
        "b": nn.Conv2d(24, 24, 3, padding=1),
        "fc": nn.Linear(24, 10),
    }
    plan = traced_own(Branched(**parts))
    assert [(g.name, g.granularity) for g in plan.table.groups] == [("a", 12)]


@pytest.mark.parametrize(
    "act", [nn.PReLU(), nn.PReLU(8), nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True)]
)
def test_slopes_and_norms_of_instances_are_cut_along(act: nn.Module) -> None:
    assert names(traced_own(Chain(act, act=act))) == ["a", "b"]


def test_bare_parameter_fixes_its_channels_and_is_named_by_its_shape() -> None:
    plan = traced_own(Scaled(nn.Parameter(torch.ones(8, 1, 1))))
    assert reasons(plan)["a"] == "a bare parameter of shape (8, 1, 1) depends on it"


def test_parameter_for_all_channels_at_once_fixes_nothing() -> None:
    assert names(traced_own(Scaled(nn.Parameter(torch.tensor(2.0))))) == ["a", "b"]


def test_constant_per_channel_fixes_its_channels() -> None:
    plan = traced_own(Scaled(torch.rand(8, 1, 1, dtype=torch.float64).float()))
    assert reasons(plan)["a"].startswith("after cutting, the forward pass fails: The size of")


@pytest.mark.parametrize("mixing", [lambda y: y.flip(1), lambda y: y.softmax(1)])
def test_channels_that_are_mixed_on_the_way_are_fixed(mixing: Callable[[Tensor], Tensor]) -> None:
    assert "channels are mixed on the way" in reasons(traced_own(Chain(mixing)))["a"]


def test_channels_that_are_dropped_on_the_way_are_fixed() -> None:
    plan = traced_own(Chain(lambda y: y[:, :4], b=nn.Conv2d(4, 6, 3)))
    assert reasons(plan)["a"] == "its channels appear a different number of times in b"


def test_shape_written_into_the_code_fixes_its_channels() -> None:
    plan = traced_own(Chain(lambda y: y.reshape(-1, 8, 8, 8)))
    assert reasons(plan)["a"].startswith("after cutting, the forward pass fails: ")


def test_single_channel_is_fixed() -> None:
    plan = traced_own(Chain(a=nn.Conv2d(3, 1, 3), b=nn.Conv2d(1, 6, 3)))
    assert reasons(plan)["a"] == "it has a single channel"


def test_layer_that_is_never_used_costs_parameters_only() -> None:
    plain, spare = traced_own(Chain()), traced_own(Chain(spare=nn.Linear(5, 5)))
    assert names(spare) == names(plain)
    assert spare.table.dense_costs[0] == plain.table.dense_costs[0]
    assert spare.table.dense_costs[1] == plain.table.dense_costs[1] + 30


def test_parameters_of_layers_that_are_never_cut_are_counted() -> None:
    norm = nn.LayerNorm([8, 8, 8])
    plan = traced_own(Chain(norm, norm=norm))
    params = sum(p.numel() for p in Chain(norm=norm).parameters())
    assert plan.table.dense_costs[1] == params


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_of_every_kind_is_cut_along(affine: bool, tracked: bool) -> None:
    norm = nn.BatchNorm2d(8, affine=affine, track_running_stats=tracked)
    network = own(Chain(norm, norm=norm))
    plan = trace(network)
    cut = Cutter(plan, network.module).cut(choose(plan.table, np.array([3, 2]), 0))
    assert names(plan) == ["a", "b"]
    assert plan.table.costs(np.array([[3, 2]]))[1].item() == sum(
        p.numel() for p in cut.parameters()
    )
    assert cut(network.example(2)).shape == (2, 10)


def test_layer_that_is_called_twice_costs_twice_the_macs_and_once_the_parameters() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Any:
            return self.fc(self.b(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))

    network = own(Twice(b=nn.Conv2d(8, 8, 3, padding=1), fc=nn.Linear(8, 10)))
    plan = trace(network)
    cut = Cutter(plan, network.module).cut(choose(plan.table, np.array([5]), 0))
    macs, params = plan.table.costs(np.array([[5]]))
    assert macs.item() == counted_macs(network, cut)
    assert params.item() == sum(p.numel() for p in cut.parameters())


def test_channels_that_stand_twice_in_a_consumer_are_cut_twice() -> None:
    network = own(Chain(lambda y: torch.cat([y, -y], 1), b=nn.Conv2d(16, 6, 3)))
    plan = trace(network)
    keep = choose(plan.table, np.array([3, 6]), 0)
    cut = Cutter(plan, network.module).cut(keep)
    assert cut.b.in_channels == 6
    example = network.example(2)
    wanted = ignoring(network.module, plan, keep)(example.double())
    torch.testing.assert_close(cut(example).double(), wanted, rtol=1e-4, atol=1e-5)


def test_channel_and_its_double_are_one_channel() -> None:
    torch.manual_seed(0)
    network = own(Ghost())
    plan = trace(network)
    ghost = plan.table.groups[0]
    assert [(g.name, g.channels) for g in plan.table.groups] == [("stem", 4), ("inner", 6)]
    assert sorted(ghost.producers + ghost.consumers) == ["fc", "few", "inner", "stem", "twin"]
    keep = choose(plan.table, np.array([3, 4]), 0)
    cut = Cutter(plan, network.module).cut(keep)
    assert (cut.stem.out_channels, cut.few.out_channels, cut.twin.groups) == (6, 3, 3)
    macs, params = plan.table.costs(np.array([[3, 4]]))
    assert macs.item() == counted_macs(network, cut)
    assert params.item() == sum(p.numel() for p in cut.parameters())
    example = network.example(2)
    wanted = ignoring(network.module, plan, keep)(example.double())
    torch.testing.assert_close(cut(example).double(), wanted, rtol=1e-4, atol=1e-5)


def test_one_dimensional_convolutions_are_pruned() -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
            self.b, self.fc = nn.Conv1d(8, 6, 3), nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.b(self.norm(self.a(x.flatten(2)))).mean(2))
            return logits

    assert names(traced_own(Signal())) == ["a", "b"]


def test_tracing_leaves_the_network_alone() -> None:
    network = own(Chain(norm=nn.BatchNorm2d(8)).requires_grad_(False))
    before = tensors(network.module)
    trace(network)
    assert equal(tensors(network.module), before)
    assert not any(p.requires_grad for p in network.module.parameters())
    assert not network.module.training


def test_tracing_twice_gives_the_same_table(resnet20: Traced) -> None:
    network, plan = resnet20
    again = trace(network).table
    assert (again.groups, again.fixed, again.layers) == (
        plan.table.groups,
        plan.table.fixed,
        plan.table.layers,
    )


# --- refused networks


@pytest.mark.parametrize(
    ("after", "got"),
    [
        (lambda y: {"out": y}, "got dict"),
        (lambda y: (y, y), "got tuple"),
        (lambda y: y.mean(1), r"got \(2,\)"),
        (lambda y: y[..., None], r"got \(2, 10, 1\)"),
    ],
)
def test_network_that_returns_no_logits_is_refused(
    after: Callable[[Tensor], Any], got: str
) -> None:
    with pytest.raises(NetworkError, match=rf"return logits \(images, classes\), {got}"):
        trace(own(Chain(after=after)))


def test_input_of_another_shape_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"shape \(2, 1, 8, 8\): .*check network.input_shape"):
        trace(own(Chain(), (1, 8, 8)))


def test_network_that_keeps_what_it_computed_is_refused() -> None:
    class Keeping(Chain):
        def forward(self, x: Tensor) -> Any:
            self.kept = self.a(x)
            return self.fc(self.b(self.kept).mean((2, 3)))

    with pytest.raises(NetworkError, match="it keeps a tensor that its forward computed"):
        traced_own(Keeping())


def test_network_that_raises_is_named_with_its_error() -> None:
    def broken(_y: Tensor) -> Tensor:
        raise KeyError("frob")

    with pytest.raises(NetworkError, match=r"the network fails on an input .*KeyError\('frob'\)"):
        trace(own(Chain(broken)))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "1: it is the network's output"),
        (
            Chain(a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 8, 3, groups=2), fc=nn.Linear(8, 10)),
            r"a, b: b: grouped convolution \(2 groups\) that reads 4 channels and writes 8",
        ),
    ],
)
def test_network_in_which_nothing_can_be_pruned_is_refused(module: nn.Module, why: str) -> None:
    with pytest.raises(NetworkError, match=rf"nothing in own can be pruned; .*{why}"):
        trace(own(module))


def test_transposed_convolution_is_fixed() -> None:
    up = nn.ConvTranspose2d(8, 8, 2, 2)
    assert "ConvTranspose2d cannot be narrowed" in reasons(traced_own(Chain(up, up=up)))["a"]


@pytest.mark.parametrize("error", [AssertionError, KeyError, TypeError])
def test_network_that_checks_its_widths_fixes_them(error: type[Exception]) -> None:
    def check(y: Tensor) -> Tensor:
        if y.shape[1] != 8:
            raise error("eight channels were wanted")
        return y

    plan = traced_own(Chain(check))
    assert "eight channels were wanted" in reasons(plan)["a"]


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_what_two_layers_share_is_counted_once(kind: str) -> None:
    tied = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1))
    setattr(tied[1], kind, getattr(tied[0], kind))
    module = Chain(b=tied)
    plan = traced_own(module)
    assert plan.table.dense_costs[1] == sum(p.numel() for p in module.parameters())
