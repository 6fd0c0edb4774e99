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
    found = dependencies(module, torch.zeros(2, 3, 6, 6))
    (lost,) = (proposal for proposal in found if proposal.lost)
    assert lost.name == "b"
    assert "OverflowError('a channel is followed to more" in str(lost.reason)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert names(trace(own(module, (3, 6, 6)))) == wanted


def test_stream_that_is_followed_in_circles_is_given_up_alone() -> None:
    # In ReXNet, which is made so, it would not end in minutes.
    plan = traced_own(Growing(8))
    assert names(plan) == [f"inner.{block}" for block in range(8)]
    circles = "OverflowError('a channel is followed in circles')"
    assert any(circles in reason for reason in reasons(plan).values())


def test_what_cannot_be_followed_leaves_other_streams_alone() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.growing = Growing(8)
            self.growing.stem = nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.growing(F.relu(x + self.branch(x)))

    # The residual stream, which no chain is.
    assert names(traced_own(Behind()))[0] == "stem"


def test_many_branches_are_no_circles() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
            self.stages = nn.ModuleList(
                nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(16)) for _ in range(12)
            )

        def forward(self, x: Tensor) -> Any:
            branches = [self.stem(x)] * 4
            for stage in self.stages:
                branches = [
                    F.silu(sum((stage[4 * i + j](b) for j, b in enumerate(branches)), branches[i]))
                    for i in range(4)
                ]
            return self.fc(sum(branches).mean((2, 3)))

    assert names(traced_own(Branches())) == ["stem"]
