"""The table of groups, by hand: costs on paper, and which policies fit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evosearch.errors import PolicyError, SpaceError
from evosearch.policy import Policy
from evosearch.pruning.table import Axis, Group, GroupTable, LayerCost
from tests.unit.cuts import Traced, traced_once


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    return traced_once("resnet20")


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


@pytest.mark.parametrize("network", ["resnet20", "densenet121", "mobilenet_v2"])
def test_costs_are_sums_over_layers(network: str) -> None:
    table = traced_once(network)[1].table
    rng = np.random.default_rng(0)
    for _ in range(4):
        keep = rng.integers(1, table.channels + 1)
        expected_macs, expected_params = 0, table.other_params
        widths = [width(axis, table, keep) for axis in table.axes]
        for layer in table.layers:
            outs = widths[layer.out_axis]
            pairs = outs * (1 if layer.in_axis is None else widths[layer.in_axis])
            expected_macs += layer.macs * pairs
            expected_params += layer.weights * pairs + layer.per_output * outs
        macs, params = table.costs(keep[None])
        assert (macs.item(), params.item()) == (expected_macs, expected_params)
        for name, cost, dense in zip(
            ("macs", "params"), (macs, params), table.dense_costs, strict=True
        ):
            assert table.share(name, keep[None]).item() == cost.item() / dense


def width(axis: Axis, table: GroupTable, keep: NDArray[np.int64]) -> int:
    """Channels of an axis that stay, counted one by one."""
    place = np.arange(int(table.channels.sum())) - table.offsets[table.group_of]
    return sum(1 for s in axis.sources if s < 0 or place[s] < keep[table.group_of[s]])


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
