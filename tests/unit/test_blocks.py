"""Blocks that can be left out: which they are, what goes with them, and what is left."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import PolicyError
from evosearch.networks import Network, load_network
from evosearch.policy import Policy
from evosearch.pruning.blocks import find_blocks
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from tests.unit.cuts import SPECS, counted_macs
from tests.unit.small_networks import uneven


@cache
def with_blocks(name: str) -> tuple[Network, CuttingPlan]:
    torch.manual_seed(0)
    network = load_network(SPECS[name])
    uneven(network.module)
    return network, trace(network, blocks=True)


class Adds(nn.Module):
    """Returns what it is given, plus what two convolutions make of it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, width, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.norm(self.inner(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class AddsInPlace(Adds):
    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


class ThenRelu(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class ThenSilu(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.branch(x))


class Doubles(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.branch(x)


class Learns(Adds):
    """A scale of its own, which no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Asks(Adds):
    """Another input beside the first."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return x + self.branch(x) + (0 if more is None else more)


class Chain(nn.Module):
    """A stem, blocks in a row, a head."""

    def __init__(self, *blocks: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*blocks)
        self.fc = nn.Linear(8, 10)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(F.relu(x) if self.relu else x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc(self.body(self.stem(x)).mean((2, 3)))


class Reads(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.body[0].outer.weight.mean()  # type: ignore[union-attr]


class Gives(Chain):
    """Hands the block a second input."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        logits: Tensor = self.fc(self.body[0](x, more=x).mean((2, 3)))
        return logits


def found(module: nn.Module) -> list[str]:
    torch.manual_seed(0)
    return find_blocks(module.eval(), torch.randn(2, 3, 6, 6))


def test_a_module_that_only_adds_to_its_input_is_a_block() -> None:
    blocks = Adds(), AddsInPlace(), ThenRelu(), Learns()
    assert found(Chain(*blocks)) == ["body.0", "body.1", "body.3"]
    # What has been through a ReLU is what a ReLU leaves as it is.
    assert found(Chain(ThenRelu(), ThenRelu())) == ["body.0", "body.1"]
    assert found(Chain(ThenRelu(), relu=False)) == []


@pytest.mark.parametrize("other", [ThenSilu(), Doubles(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)])
def test_what_does_more_than_that_is_none(other: nn.Module) -> None:
    assert found(Chain(other)) == []


def test_innermost_ones_are_meant() -> None:
    assert found(Chain(nn.Sequential(Adds(), Adds()))) == ["body.0.0", "body.0.1"]
    assert found(Chain(nn.Sequential(Adds()))) == ["body.0.0"]


@pytest.mark.parametrize("network", [Twice, Reads, Gives])
def test_blocks_that_somebody_asks_for_more_are_none(network: type[Chain]) -> None:
    assert found(network(Asks())) == []
    assert found(Chain(Asks())) == ["body.0"]


def test_blocks_that_share_tensors_are_none() -> None:
    one, other = Adds(), Adds()
    other.inner.weight = one.inner.weight
    assert found(Chain(one, other, Adds())) == ["body.2"]


def test_finding_blocks_leaves_the_network_as_it_was() -> None:
    network = Chain(Adds(), AddsInPlace()).eval()
    before = copy.deepcopy(network.state_dict())
    found(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 7), ("mobilenet_v2", 10), ("regnet_y_400mf", 12), ("densenet121", 0)],
)
def test_blocks_of_known_networks(name: str, count: int) -> None:
    table = with_blocks(name)[1].table
    assert len(table.blocks) == count
    for block in table.blocks:
        for group in block.groups:
            names = (*table.groups[group].producers, *table.groups[group].consumers)
            assert all(layer.startswith(f"{block.name}.") for layer in names)


def test_blocks_are_looked_for_only_if_so_wished() -> None:
    network, plan = with_blocks("resnet20")
    assert trace(network).table.blocks == ()
    assert trace(network).table.groups == plan.table.groups
    assert trace(network).table.dense_costs == plan.table.dense_costs


def drawn(table: GroupTable, seed: int, chance: float = 0.5) -> tuple[Policy, list[str]]:
    """A random policy, and the names of the blocks that it leaves out."""
    rng = np.random.default_rng(seed)
    keep = table.whole(rng.integers(1, table.channels + 1))
    out = rng.random(len(table.blocks)) < chance
    keep[table.in_block[out].any(axis=0)] = 0
    return Policy(tuple(keep.tolist())), [
        block.name for block, gone in zip(table.blocks, out, strict=True) if gone
    ]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small", "regnet_y_400mf", "learns"])
def test_costs_are_those_of_the_network_that_is_left(name: str) -> None:
    network, plan = learning() if name == "learns" else with_blocks(name)
    cutter = Cutter(plan, network.module)
    for seed in range(4):
        policy, _ = drawn(plan.table, seed)
        plan.table.check(policy)
        small = cutter.cut(plan.table.mask(np.array(policy.keep))).eval()
        macs, params = plan.table.costs_of([policy])
        assert macs.item() == counted_macs(network, small)
        assert params.item() == sum(tensor.numel() for tensor in small.parameters())
        shares = plan.table.shares_of([policy])
        assert plan.table.share("macs", np.array([policy.keep])) == shares["macs"]


def learning() -> tuple[Network, CuttingPlan]:
    """Blocks with parameters that are no layer's."""
    from tests.unit.small_networks import own

    torch.manual_seed(0)
    network, _ = own(Chain(Learns(), Adds(), Learns()))
    return network, trace(network, blocks=True)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_left_out_is_what_adds_nothing(name: str) -> None:
    network, plan = with_blocks(name)
    table, images = plan.table, network.example(2)
    cutter = Cutter(plan, network.module)
    for seed in range(3):
        _, gone = drawn(table, seed)
        keep = table.channels.copy()
        keep[table.in_block[[block.name in gone for block in table.blocks]].any(axis=0)] = 0
        silent = copy.deepcopy(network.module)
        with torch.no_grad():
            for block in gone:
                for tensor in silent.get_submodule(block).parameters():
                    tensor.zero_()
            small = cutter.cut(table.mask(keep)).eval()
            assert torch.equal(small(images), silent(images))
        absent = {n for n, part in small.named_modules() if isinstance(part, nn.Identity)}
        assert absent >= set(gone)
        assert not any(key.startswith(f"{n}.") for n in gone for key in small.state_dict())


def test_what_was_left_out_comes_back() -> None:
    network, plan = with_blocks("resnet20")
    cutter = Cutter(plan, network.module)
    policy, gone = drawn(plan.table, 0)
    assert gone
    cutter.cut(plan.table.mask(np.array(policy.keep)))
    whole = cutter.cut(plan.table.mask(plan.table.channels)).eval()
    assert list(whole.state_dict()) == list(network.module.state_dict())
    with torch.inference_mode():
        images = network.example(2)
        assert torch.equal(whole(images), network.module(images))


def test_a_block_goes_as_a_whole() -> None:
    table = with_blocks("regnet_y_400mf")[1].table
    block = table.blocks[0]
    assert len(block.groups) > 1
    keep = table.channels.copy()
    keep[block.groups[1]] = 0
    with pytest.raises(PolicyError, match=f"block {block.name} is left out as a whole"):
        table.check(Policy(tuple(keep.tolist())))


def test_no_group_outside_of_blocks_loses_every_channel() -> None:
    table = with_blocks("resnet20")[1].table
    outside = next(g for g in range(len(table.groups)) if not table.in_block[:, g].any())
    keep = table.channels.copy()
    keep[outside] = 0
    with pytest.raises(PolicyError, match=rf"group {table.groups[outside].name} would lose every"):
        table.check(Policy(tuple(keep.tolist())))
    # Nor those of blocks that nobody looked for.
    with pytest.raises(PolicyError, match="keep at least 1"):
        trace(with_blocks("resnet20")[0]).table.check(drawn(table, 0)[0])
