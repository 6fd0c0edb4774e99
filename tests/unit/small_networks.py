"""Networks small enough for slow computations, what they are made of, and their criteria."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.networks import InputSpec, Network, NetworkSpec
from evosearch.pruning.criteria import Samples, channel_scores
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace

FloatArray = NDArray[np.float64]
Traced = tuple[Network, CuttingPlan]


class Flat(nn.Module):
    """Convolution a, norm, convolution b, flattened into the hidden layer, classifier."""

    def __init__(self, *, relu: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.hidden = nn.Linear(5 * 9, 7)
        self.fc = nn.Linear(7, 10)
        self.act = F.relu if relu else lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.a(x)))
        x = self.act(self.b(x))
        logits: Tensor = self.fc(self.act(self.hidden(x.flatten(1))))
        return logits


class Joined(nn.Module):
    """Convolutions a, b and d joined, normed and read by c; group norm fixes d."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 5, 3, padding=1)
        self.d = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
        self.norm = nn.BatchNorm2d(12)
        self.c, self.norm_c = nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        joined = torch.cat([a, self.b(a), self.d(x)], 1)
        logits: Tensor = self.fc(self.norm_c(self.c(self.norm(joined))).mean((2, 3)))
        return logits


class Small(nn.Module):
    """Convolution a with norm and ReLU, convolution b flattened into the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.hidden = nn.Linear(5 * 9, 20)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x))
        logits: Tensor = self.fc(F.relu(self.hidden(x.flatten(1))))
        return logits


class Ghost(nn.Module):
    """A stem of eight channels, to which is added a ghost module's four and their doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.few, self.few_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.twin = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        few = self.few_norm(self.few(F.relu(self.inner_norm(self.inner(x)))))
        x = F.relu(x + torch.cat([few, self.twin(few)], 1))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Normed(nn.Module):
    """Two convolutions with a group norm between them, of two channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8)
        self.b, self.norm_b = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        logits: Tensor = self.fc(F.relu(self.norm_b(self.b(x))).mean((2, 3)))
        return logits


class Stream(nn.Module):
    """A residual stream, written by two convolutions with norms and read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.outer, self.outer_norm = nn.Conv2d(7, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        logits: Tensor = self.fc(F.relu(x + y).mean((2, 3)))
        return logits


def uneven(module: nn.Module) -> nn.Module:
    """Batch norms with scales and shifts that differ from channel to channel."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return module


def own(module: nn.Module) -> Traced:
    network = Network(
        spec=NetworkSpec(name="own"),
        module=module.eval(),
        input=InputSpec(shape=(3, 6, 6), mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    return network, trace(network)


def spd(n: int, seed: int) -> Tensor:
    x = torch.randn(5 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def samples_of(network: Network, n: int = 40, **options: Any) -> Samples:
    images = network.example(n)
    options.setdefault("labels", torch.arange(n) % 10)
    return Samples(batches=list(images.split(24)), **options)


def scores_of(traced: Traced, criterion: str, **options: Any) -> np.ndarray[Any, Any]:
    network, plan = traced
    samples = options.pop("samples", None) or samples_of(network)
    return channel_scores(network.module, plan, [criterion], samples, **options)[0]


def part(traced: Traced, name: str, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    table = traced[1].table
    index = [group.name for group in table.groups].index(name)
    return scores[table.offsets[index] :][: table.channels[index]]
