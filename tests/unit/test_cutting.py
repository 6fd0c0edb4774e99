"""Closed-form costs, and cutting: against networks that are really cut."""

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evosearch.pruning.cutting import Cutter, kept_indices
from evosearch.pruning.layers import is_depthwise
from evosearch.pruning.table import FixedGroup, GroupTable
from tests.unit.cuts import (
    FIXED_STREAM,
    SPECS,
    Traced,
    choose,
    counted_macs,
    equal,
    ignoring,
    random_counts,
    reasons,
    tensors,
    tensors_of,
    traced_anew,
    traced_once,
)
from tests.unit.small_networks import own


@pytest.fixture(scope="module", params=SPECS)
def traced(request: pytest.FixtureRequest) -> Traced:
    return traced_anew(request.param)


@pytest.fixture
def resnet20() -> Traced:
    return traced_once("resnet20")


def some_counts(table: GroupTable) -> list[NDArray[np.int64]]:
    """Two random policies, the dense one, and the narrowest one."""
    return [random_counts(table, 0), random_counts(table, 1), table.channels, table.granularities]


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


def test_groups_and_fixed_groups_cover_every_layer(traced: Traced) -> None:
    network, plan = traced
    named = {name for group in plan.table.groups for name in group.producers}
    named |= {group.name for group in plan.table.fixed}
    convolutions = {n for n, m in network.module.named_modules() if isinstance(m, nn.Conv2d)}
    hidden = convolutions - named
    # What is left goes with fixed channels that are named by their first layer: of a residual
    # stream, or those that a depthwise convolution reads.
    layers = dict(network.module.named_modules())
    deep = {name for name in hidden if is_depthwise(layers[name])}
    assert hidden == deep or reasons(plan)["conv1"] == FIXED_STREAM
    assert all(name.endswith("conv2") for name in hidden - deep)


def test_classifier_is_fixed_as_the_networks_output(traced: Traced) -> None:
    network, plan = traced
    *_, (last, layer) = network.module.named_modules()
    assert isinstance(layer, nn.Linear)
    assert FixedGroup(name=last, channels=10, reason="it is the network's output") in (
        plan.table.fixed
    )


# --- one of them


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


# --- what is no layer


def test_products_outside_layers_count_and_stay() -> None:
    class Attending(nn.Module):
        """A hidden layer on 36 tokens of 8 channels, behind attention of two heads."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 10)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.wide, self.narrow = nn.Linear(8, 20), nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.stem(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            logits: Tensor = self.fc(self.narrow(self.wide(tokens).relu()).mean(1))
            return logits

    network, plan = own(Attending())
    table = plan.table
    # Queries, keys, values and what is made of them; then two products for each of two heads.
    assert table.other_macs == 36 * 4 * 8 * 8 + 2 * 2 * 36 * 36 * 4
    for counts in some_counts(table):
        cut = Cutter(plan, network.module).cut(choose(table, counts, 0))
        # Attention in one operation is unknown to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            cut(network.example(1))
        assert table.costs(counts[None])[0].item() == counter.get_total_flops() // 2
