"""How the channels of grouped convolutions become groups."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evosearch.errors import PolicyError
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from tests.unit.cuts import Chain, names, own, reasons, traced_own


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
