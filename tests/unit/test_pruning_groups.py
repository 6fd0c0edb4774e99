"""Groups, their closed-form costs, and cutting: against networks that are really cut."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from evosearch.errors import NetworkError, PolicyError, SpaceError
from evosearch.networks import BUILT_IN, InputSpec, Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter, CuttingPlan, kept_indices
from evosearch.pruning.groups import trace
from evosearch.pruning.proposals import is_depthwise
from evosearch.pruning.table import Axis, FixedGroup, Group, GroupTable, LayerCost

Keep = NDArray[np.bool_]
Traced = tuple[Network, CuttingPlan]

SMALL = {"input_shape": (3, 64, 64)}
SPECS: dict[str, NetworkSpec] = {name: NetworkSpec(name=name) for name in BUILT_IN} | {
    "resnet18": NetworkSpec(name="resnet18", **SMALL),
    "mobilenet_v2": NetworkSpec(name="mobilenet_v2", **SMALL),
    "mobilenet_v3_small": NetworkSpec(name="mobilenet_v3_small", **SMALL),
    "densenet121": NetworkSpec(name="densenet121", **SMALL),
    "vgg11_bn": NetworkSpec(name="vgg11_bn", input_shape=(3, 32, 32)),
}
SLOW = {"vgg11_bn"}  # 129 million parameters; tracing alone takes 12 s
FIXED_STREAM = "it covers 16 of the 32 output channels of layer2.0.conv2"


def shaken(module: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales that differ from channel to channel."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SPECS],
)
def traced(request: pytest.FixtureRequest) -> Traced:
    torch.manual_seed(0)
    network = load_network(SPECS[request.param])
    shaken(network.module)
    return network, trace(network)


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    torch.manual_seed(0)
    network = load_network(SPECS["resnet20"])
    shaken(network.module)
    return network, trace(network)


def choose(table: GroupTable, counts: NDArray[np.int64], seed: int) -> Keep:
    """Keeps `counts` channels of each group, any of them."""
    rng = np.random.default_rng(seed)
    keep = np.ones(int(table.channels.sum()) + 1, dtype=np.bool_)
    for offset, channels, count in zip(table.offsets, table.channels, counts, strict=True):
        keep[offset + rng.permutation(channels)[count:]] = False
    return keep


def random_counts(table: GroupTable, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, table.channels + 1)


def some_counts(table: GroupTable) -> list[NDArray[np.int64]]:
    """Two random policies, the dense one, and one channel everywhere."""
    ones = np.ones_like(table.channels)
    return [random_counts(table, 0), random_counts(table, 1), table.channels, ones]


def counted_macs(network: Network, module: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(network.example(1))
    return counter.get_total_flops() // 2


def ignoring(module: nn.Module, plan: CuttingPlan, keep: Keep) -> nn.Module:
    """The dense network in float64, its consumers blind to the removed channels."""
    blind = copy.deepcopy(module).double()
    layers = dict(blind.named_modules())

    def hook(seen: Tensor) -> Callable[..., tuple[Tensor]]:
        def apply(_layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            shape = (-1, 1, 1) if inputs[0].ndim == 4 else (-1,)
            return (inputs[0] * seen.view(shape),)

        return apply

    for entry in plan.cuts:
        if entry.in_axis is not None:
            seen = torch.from_numpy(keep[plan.table.axes[entry.in_axis].sources])
            layers[entry.name].register_forward_pre_hook(hook(seen))
    return blind


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics; the counters of batch norm have no part in what it computes."""
    return {k: v.clone() for k, v in module.state_dict().items() if v.is_floating_point()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- every network


def test_closed_form_macs_are_those_of_the_cut_network(traced: Traced) -> None:
    network, plan = traced
    cutter = Cutter(plan, network.module)
    for counts in some_counts(plan.table):
        cut = cutter.cut(choose(plan.table, counts, 0))
        assert plan.table.costs(counts[None])[0].item() == counted_macs(network, cut)


def test_closed_form_parameters_are_those_of_the_cut_network(traced: Traced) -> None:
    network, plan = traced
    cutter = Cutter(plan, network.module)
    for counts in some_counts(plan.table):
        cut = cutter.cut(choose(plan.table, counts, 0))
        params = sum(p.numel() for p in cut.parameters())
        assert plan.table.costs(counts[None])[1].item() == params


def test_cut_network_computes_what_the_dense_one_does_without_those_channels(
    traced: Traced,
) -> None:
    network, plan = traced
    keep = choose(plan.table, random_counts(plan.table, 2), 2)
    example = network.example(2).double()
    with torch.inference_mode():
        wanted = ignoring(network.module, plan, keep)(example)
        found = Cutter(plan, network.module).cut(keep).double()(example)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * scale)


def test_built_widths_are_those_of_the_policy(traced: Traced) -> None:
    network, plan = traced
    counts = random_counts(plan.table, 3)
    cut = Cutter(plan, network.module).cut(choose(plan.table, counts, 3))
    layers = dict(cut.named_modules())
    for group, count in zip(plan.table.groups, counts, strict=True):
        assert {len(layers[name].weight) for name in group.producers} == {count}


def test_stated_widths_of_a_cut_network_are_those_of_its_tensors(traced: Traced) -> None:
    network, plan = traced
    cut = Cutter(plan, network.module).cut(choose(plan.table, random_counts(plan.table, 4), 4))
    for layer in cut.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(
                layer.weight.shape[:2]
            )
        elif isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.running_mean) == len(layer.weight)


def test_cutting_twice_leaves_no_trace_of_the_first_cut(traced: Traced) -> None:
    network, plan = traced
    table = plan.table
    first, second = (choose(table, random_counts(table, seed), seed) for seed in (5, 6))
    cutter = Cutter(plan, network.module)
    wanted = tensors(cutter.cut(second))
    with torch.no_grad():
        for tensor in tensors_of(cutter.cut(first)):
            tensor.add_(1)
    assert equal(tensors(cutter.cut(second)), wanted)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module.parameters())
    yield from (b for b in module.buffers() if b.is_floating_point())


def test_groups_and_fixed_groups_cover_every_layer(traced: Traced) -> None:
    network, plan = traced
    named = {name for group in plan.table.groups for name in group.producers}
    named |= {group.name for group in plan.table.fixed}
    convolutions = {n for n, m in network.module.named_modules() if isinstance(m, nn.Conv2d)}
    hidden = convolutions - named
    # What is left belongs to a fixed residual stream, named by its first layer.
    assert not hidden or reasons(plan)["conv1"] == FIXED_STREAM
    assert all(name.endswith("conv2") for name in hidden)


def test_classifier_is_fixed_as_the_networks_output(traced: Traced) -> None:
    network, plan = traced
    *_, (last, layer) = network.module.named_modules()
    assert isinstance(layer, nn.Linear)
    assert FixedGroup(name=last, channels=10, reason="it is the network's output") in (
        plan.table.fixed
    )


# --- cutting


def test_cutting_leaves_the_dense_network_alone(resnet20: Traced) -> None:
    network, plan = resnet20
    before = tensors(network.module)
    cutter = Cutter(plan, network.module)
    cutter.cut(choose(plan.table, random_counts(plan.table, 0), 0))
    for tensor in tensors_of(cutter.network):
        tensor.data.add_(1)
    assert equal(tensors(network.module), before)


def test_keeping_everything_gives_the_dense_network_back(resnet20: Traced) -> None:
    network, plan = resnet20
    cutter = Cutter(plan, network.module)
    cutter.cut(choose(plan.table, np.ones_like(plan.table.channels), 0))
    cut = cutter.cut(choose(plan.table, plan.table.channels, 0))
    assert equal(tensors(cut), tensors(network.module))


def test_statistics_of_batch_norm_are_cut_anew(resnet20: Traced) -> None:
    network, plan = resnet20
    cutter = Cutter(plan, network.module)
    keep = choose(plan.table, random_counts(plan.table, 0), 0)
    wanted = tensors(cutter.cut(keep))
    cutter.network.train()(network.example(8))
    cutter.network.eval()
    assert not equal(tensors(cutter.network), wanted)
    assert equal(tensors(cutter.cut(keep)), wanted)


def test_plan_narrows_a_copy_that_it_is_given(resnet20: Traced) -> None:
    network, plan = resnet20
    target = copy.deepcopy(network.module)
    keep = choose(plan.table, random_counts(plan.table, 1), 1)
    plan.cut(network.module, target, keep)
    assert equal(tensors(target), tensors(Cutter(plan, network.module).cut(keep)))


def test_cut_network_can_be_trained(resnet20: Traced) -> None:
    network, plan = resnet20
    cut = Cutter(plan, network.module).cut(choose(plan.table, random_counts(plan.table, 0), 0))
    cut.train()(network.example(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in cut.parameters())


def test_axis_that_stays_whole_needs_no_indices(resnet20: Traced) -> None:
    _, plan = resnet20
    table = plan.table
    assert kept_indices(table, choose(table, table.channels, 0)) == [None] * len(table.axes)


# --- what the groups are


def reasons(plan: CuttingPlan) -> dict[str, str]:
    return {group.name: group.reason for group in plan.table.fixed}


def names(plan: CuttingPlan) -> list[str]:
    return [group.name for group in plan.table.groups]


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
    network = load_network(SPECS["mobilenet_v2"])
    plan = trace(network)
    cut = Cutter(plan, network.module).cut(choose(plan.table, np.ones_like(plan.table.channels), 0))
    depthwise = dict(cut.named_modules())["features.2.conv.1.0"]
    assert (depthwise.groups, depthwise.in_channels, tuple(depthwise.weight.shape)) == (
        1,
        1,
        (1, 1, 3, 3),
    )


def test_depthwise_convolution_of_one_channel_can_be_cut_again() -> None:
    network = load_network(SPECS["mobilenet_v2"])
    plan = trace(network)
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


def test_grouped_convolution_is_fixed_with_the_number_of_its_groups() -> None:
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    plan = traced_own(Chain(b=nn.Sequential(grouped, nn.Conv2d(8, 6, 3))))
    assert names(plan) == ["b.1"]
    assert reasons(plan)["a"] == "b.0: grouped convolution (2 groups)"
    assert reasons(plan)["b.0"] == "b.0: grouped convolution (2 groups)"


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
            Chain(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3, groups=2), fc=nn.Linear(8, 10)),
            r"a, b: b: grouped convolution \(2 groups\)",
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


# --- the table, by hand


@pytest.fixture
def table() -> GroupTable:
    """A 3x3 convolution 3 -> 4 with bias and norm, flattened at 2x2 into a linear layer to 10."""
    group = Group(
        name="conv", channels=4, resolution=(2, 2), producers=("conv",), consumers=("fc",)
    )
    axes = (
        Axis(np.full(3, -1)),
        Axis(np.arange(4)),
        Axis(np.repeat(np.arange(4), 4)),
        Axis(np.full(10, -1)),
    )
    layers = (
        LayerCost(name="conv", in_axis=0, out_axis=1, macs=36, weights=9, per_output=1),
        LayerCost(name="norm", in_axis=None, out_axis=1, macs=0, weights=0, per_output=2),
        LayerCost(name="fc", in_axis=2, out_axis=3, macs=1, weights=1, per_output=1),
    )
    return GroupTable(groups=(group,), fixed=(), axes=axes, layers=layers, other_params=5)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_costs_are_those_on_paper(table: GroupTable, kept: int) -> None:
    macs, params = table.costs(np.array([[kept]]))
    assert macs.item() == 36 * 3 * kept + 4 * kept * 10
    assert params.item() == (27 + 1 + 2) * kept + (4 * kept * 10 + 10) + 5


def test_costs_of_many_policies_are_those_of_each(table: GroupTable) -> None:
    macs, params = table.costs_of([Policy((1,)), Policy((4,)), Policy((1,))])
    assert (macs[0], params[0]) == (macs[2], params[2])
    assert (macs[1], params[1]) == table.dense_costs


def test_costs_of_no_policies_are_empty(table: GroupTable) -> None:
    assert [len(costs) for costs in table.costs_of([])] == [0, 0]


def test_costs_are_exact_beyond_32_bits(table: GroupTable) -> None:
    huge = LayerCost(name="x", in_axis=2, out_axis=3, macs=2**40, weights=0, per_output=0)
    big = GroupTable(groups=table.groups, fixed=(), axes=table.axes, layers=(huge,))
    assert big.costs(np.array([[3]]))[0].item() == 2**40 * 12 * 10


@pytest.mark.parametrize("keep", [np.ones(1), np.ones((1, 2)), np.ones((1, 1, 1))])
def test_counts_of_another_shape_are_refused(table: GroupTable, keep: NDArray[Any]) -> None:
    with pytest.raises(SpaceError, match=r"keep must have shape \(n, 1\), got"):
        table.costs(keep)


@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_costs_never_fall_when_a_group_widens(resnet20: Traced, data: st.DataObject) -> None:
    channels = resnet20[1].table.channels.tolist()
    narrow = data.draw(st.tuples(*(st.integers(1, n) for n in channels)))
    wide = data.draw(st.tuples(*(st.integers(k, n) for k, n in zip(narrow, channels, strict=True))))
    macs, params = resnet20[1].table.costs(np.array([narrow, wide]))
    assert macs[0] <= macs[1]
    assert params[0] <= params[1]


def test_dense_policy_keeps_every_channel(resnet20: Traced) -> None:
    assert resnet20[1].table.dense == Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))


def test_policy_that_fits_is_accepted(table: GroupTable) -> None:
    table.check(Policy((4,)))


def test_policy_of_another_length_is_refused(table: GroupTable) -> None:
    with pytest.raises(PolicyError, match="a policy for this network has 1 counts, got 2"):
        table.check(Policy((1, 1)))


def test_policy_that_keeps_more_than_there_is_is_refused(table: GroupTable) -> None:
    with pytest.raises(PolicyError, match="group conv has 4 channels, not 5"):
        table.check(Policy((5,)))


def test_axis_keeps_fixed_channels_always() -> None:
    axis = Axis(np.array([-1, 0, 1, -1, 1]))
    assert axis.kept(np.array([False, False, True])).tolist() == [0, 3]
    assert (axis.size, axis.multiplicity) == (5, 2)
