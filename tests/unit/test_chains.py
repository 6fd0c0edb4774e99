"""Groups where the dependency graph gives up."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import NetworkError
from evosearch.networks import load_network
from evosearch.pruning.dependencies import dependencies
from evosearch.pruning.groups import trace
from evosearch.pruning.layers import Proposal
from tests.unit.cuts import SPECS, Chain, names, own, reasons, shuffled, traced_once, traced_own
from tests.unit.small_networks import Flat


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


class Growing(nn.Module):
    """Blocks that add their input to the first of their channels, and append the others."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        widths = range(4, 4 + 2 * blocks, 2)
        self.stem = nn.Conv2d(3, 4, 3)
        self.inner = nn.ModuleList(nn.Conv2d(width, 6, 1) for width in widths)
        self.outer = nn.ModuleList(nn.Conv2d(6, width + 2, 1) for width in widths)
        self.fc = nn.Linear(4 + 2 * blocks, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            width, y = x.shape[1], outer(F.relu(inner(x)))
            x = torch.cat([y[:, :width] + x, y[:, width:]], 1)
        return self.fc(x.mean((2, 3)))


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


def test_graph_that_follows_channels_in_circles_gives_up() -> None:
    # In ReXNet, which is made so, it would go on for hours.
    plan = traced_own(Growing(8))
    assert names(plan) == [f"inner.{block}" for block in range(8)]
    assert "OverflowError('a channel is followed in circles')" in reasons(plan)["stem"]
