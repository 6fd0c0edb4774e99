"""What becomes a group, and what is fixed for which reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import NetworkError, PolicyError
from evosearch.networks import InputSpec, Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.dependencies import dependencies
from evosearch.pruning.groups import trace
from evosearch.pruning.layers import Proposal, is_depthwise
from tests.unit.cuts import (
    FIXED_STREAM,
    SPECS,
    Traced,
    choose,
    counted_macs,
    equal,
    ignoring,
    names,
    reasons,
    tensors,
    traced_once,
)
from tests.unit.small_networks import Flat


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


class Chain(nn.Module):
    """Convolution a, something between, convolution b, mean, classifier."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)
        for name, part in parts.items():
            setattr(self, name, part)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = self.b(F.relu(self.between(y) if self.between else y))
        logits = self.fc(F.relu(y).mean((2, 3)))
        return self.after(logits) if self.after else logits


class Scaled(Chain):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.b(self.a(x) * self.scale).mean((2, 3)))


def own(module: nn.Module, shape: tuple[int, int, int] = (3, 8, 8)) -> Network:
    return Network(
        spec=NetworkSpec(name="own"),
        module=module.eval(),
        input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
    )


def traced_own(module: nn.Module) -> CuttingPlan:
    torch.manual_seed(0)
    return trace(own(module))


def test_plain_chain_is_all_prunable() -> None:
    plan = traced_own(Chain())
    assert names(plan) == ["a", "b"]
    assert reasons(plan) == {"fc": "it is the network's output"}


def grouped(reads: int, writes: int, groups: int) -> Chain:
    """Convolution a of so many channels, a grouped one, and a plain one."""
    layers = nn.Conv2d(reads, writes, 3, groups=groups), nn.ReLU(), nn.Conv2d(writes, 6, 3)
    return Chain(a=nn.Conv2d(3, reads, 3), b=nn.Sequential(*layers), fc=nn.Linear(6, 10))


def test_groups_of_a_grouped_convolution_go_as_a_whole() -> None:
    plan = traced_own(grouped(12, 12, 4))
    assert names(plan) == ["a", "b.2"]
    first = plan.table.groups[0]
    assert (first.granularity, first.producers, first.consumers) == (3, ("a", "b.0"), ("b.2",))
    assert plan.table.whole(np.array([[1, 1], [4, 5], [12, 6]])).tolist() == [
        [3, 1],
        [6, 5],
        [12, 6],
    ]


def test_grouped_convolution_is_cut_to_its_kept_groups() -> None:
    network = own(grouped(12, 12, 4))
    plan = trace(network)
    keep = np.ones(19, dtype=np.bool_)
    keep[3:9] = False
    layer = dict(Cutter(plan, network.module).cut(keep).named_modules())["b.0"]
    dense = dict(network.module.named_modules())["b.0"]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (2, 6, 6)
    assert torch.equal(layer.weight, dense.weight[[0, 1, 2, 9, 10, 11]])


def test_policy_that_would_split_a_group_of_a_convolution_is_refused() -> None:
    table = traced_own(grouped(12, 12, 4)).table
    table.check(Policy((6, 5)))
    with pytest.raises(PolicyError, match="group a keeps multiples of 3 channels, not 4"):
        table.check(Policy((4, 5)))


def test_two_grouped_convolutions_in_a_row_go_by_what_both_allow() -> None:
    first, second = nn.Conv2d(12, 12, 3, groups=6), nn.Conv2d(12, 12, 1, groups=4)
    plan = traced_own(
        Chain(a=nn.Conv2d(3, 12, 3), b=nn.Sequential(first, second), fc=nn.Linear(12, 10))
    )
    assert [(group.name, group.granularity) for group in plan.table.groups] == [("a", 6)]
    assert plan.table.groups[0].producers == ("a", "b.0", "b.1")


def test_grouped_convolution_in_a_residual_stream_is_cut_with_it() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
            self.b = nn.Conv2d(8, 8, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return self.fc((x + self.b(x)).mean((2, 3)))

    (group,) = traced_own(Stream()).table.groups
    assert (group.granularity, group.producers, group.consumers) == (2, ("a", "b"), ("fc",))


def test_grouped_convolution_that_widens_is_fixed_with_the_reason() -> None:
    plan = traced_own(grouped(8, 16, 4))
    assert names(plan) == ["b.2"]
    why = "b.0: grouped convolution (4 groups) that reads 8 channels and writes 16"
    assert reasons(plan)["a"] == reasons(plan)["b.0"] == why


def test_grouped_convolutions_of_which_only_all_could_go_are_fixed() -> None:
    pair = nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 6, 1, groups=2)
    b = nn.Sequential(*pair, nn.Conv2d(6, 6, 1))
    plan = traced_own(Chain(a=nn.Conv2d(3, 6, 3), b=b))
    assert names(plan) == ["b.2"]
    assert reasons(plan)["a"] == "b.1: grouped convolution, of which no group can go"


def shuffled(x: Tensor) -> Tensor:
    """Channels of two halves in turns, by a reshape that the dependency graph cannot follow."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffled(nn.Module):
    """Half of a stream goes through a, a depthwise convolution and b; then halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.b, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Any:
        first, second = self.stem(x).chunk(2, dim=1)
        second = self.b(self.deep(F.relu(self.norm(self.a(second)))))
        return self.fc(shuffled(torch.cat([first, second], 1)).mean((2, 3)))


def gives_up(_module: nn.Module, _example: Tensor) -> list[Proposal]:
    raise NetworkError("Torch-Pruning cannot follow this network: as a test wants it")


def test_chains_are_found_where_the_dependency_graph_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evosearch.pruning.proposals.dependencies", gives_up)
    plan = traced_own(Shuffled())
    assert [(g.name, g.producers, g.consumers) for g in plan.table.groups] == [
        ("a", ("a", "deep"), ("b",))
    ]
    why = "and Torch-Pruning cannot follow this network: as a test wants it"
    assert reasons(plan) == {
        "stem": f"a reads 4 channels where it has 8, {why}",
        "b": f"fc reads it along with stem, {why}",
        "fc": "it is the network's output",
    }


@pytest.mark.parametrize("name", ["resnet18", "vgg16-cifar", "lenet-5"])
def test_chains_are_groups_that_the_dependency_graph_finds_too(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = {group.name: group for group in traced_once(name)[1].table.groups}
    monkeypatch.setattr("evosearch.pruning.proposals.dependencies", gives_up)
    chained = trace(load_network(SPECS[name])).table.groups
    assert chained
    assert all(found[group.name] == group for group in chained)
    # All but the residual streams, of which there is one per stage.
    assert len(found) - len(chained) == (4 if name == "resnet18" else 0)


def test_layer_that_runs_twice_is_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Any:
            y = self.b(self.b(self.a(x)))
            return self.fc(y.mean((2, 3)))

    monkeypatch.setattr("evosearch.pruning.proposals.dependencies", gives_up)
    with pytest.raises(NetworkError, match="a: b reads it along with b, and Torch-Pruning cannot"):
        trace(own(Twice(b=nn.Conv2d(8, 8, 3), fc=nn.Linear(8, 10))))


def test_graph_that_follows_channels_too_far_gives_up_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = Flat()
    wanted = names(trace(own(module, (3, 6, 6))))
    monkeypatch.setattr("evosearch.pruning.dependencies._MOST_TIMES", 0)
    with pytest.raises(NetworkError, match=r"this network: OverflowError\('a channel"):
        dependencies(module, torch.zeros(2, 3, 6, 6))
    assert not any(layer._forward_hooks for layer in module.modules())
    assert names(trace(own(module, (3, 6, 6)))) == wanted


def test_grouped_convolution_of_the_image_stays() -> None:
    b = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    plan = traced_own(Chain(a=nn.Conv2d(3, 6, 3, groups=3), b=b))
    assert names(plan) == ["b.0", "b.1"]
    assert "reads 3 channels and writes 6" in reasons(plan)["a"]


def test_grouped_convolution_that_reads_two_layers_fixes_them() -> None:
    class Joining(Chain):
        def forward(self, x: Tensor) -> Any:
            y = self.b(torch.cat([self.a(x), self.c(x)], 1))
            return self.fc(self.last(y).mean((2, 3)))

    layers = {"a": nn.Conv2d(3, 4, 1), "c": nn.Conv2d(3, 4, 1), "last": nn.Conv2d(8, 6, 1)}
    plan = traced_own(Joining(b=nn.Conv2d(8, 8, 1, groups=2), **layers))
    assert names(plan) == ["last"]
    assert {"a", "c", "b"} <= reasons(plan).keys()
    assert "reads no single layer's channels in their order" in reasons(plan)["a"]


class Faint(nn.Module):
    """A stream and a branch with a shuffle in its midst, scaled by next to nothing."""

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
        y = self.norm(self.b(shuffled(F.gelu(self.a(x)))))
        return self.fc((x + self.scale * y).mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_branch_that_starts_as_nothing_hides_nothing(scale: float, norm: bool) -> None:
    with pytest.raises(NetworkError, match="nothing in own can be pruned"):
        traced_own(Faint(scale, norm=norm))


def test_weights_that_are_all_zero_hide_nothing() -> None:
    network = Faint(1.0, norm=False)
    nn.init.zeros_(network.b.weight)
    with pytest.raises(NetworkError, match="nothing in own can be pruned"):
        traced_own(network)


def test_network_that_needs_an_even_width_keeps_it() -> None:
    def halves(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=1)
        return torch.cat([first, second], 1) if first.shape == second.shape else y[:, :0]

    assert "a" in reasons(traced_own(Chain(halves)))


def test_forward_without_gradients_is_told_where_the_graph_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Blind(Chain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    monkeypatch.setattr("evosearch.pruning.proposals.dependencies", gives_up)
    with pytest.raises(NetworkError, match="wants it; and its forward keeps no gradients"):
        trace(own(Blind()))


def test_group_norm_fixes_its_channels() -> None:
    norm = nn.GroupNorm(2, 8)
    assert reasons(traced_own(Chain(norm, norm=norm)))["a"] == "norm: GroupNorm cannot be narrowed"


def test_per_channel_prelu_fixes_its_channels() -> None:
    act = nn.PReLU(8)
    assert reasons(traced_own(Chain(act, act=act)))["a"] == "act: PReLU cannot be narrowed"


def test_prelu_with_one_slope_is_cut_along() -> None:
    act = nn.PReLU()
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


def test_weights_that_two_layers_share_are_counted_once() -> None:
    tied = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1))
    tied[1].weight = tied[0].weight
    module = Chain(b=tied)
    plan = traced_own(module)
    assert plan.table.dense_costs[1] == sum(p.numel() for p in module.parameters())
