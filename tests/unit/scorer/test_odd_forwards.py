"""Networks whose forwards do not call layers as most do: uncut, they are what they were."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.assembly import Assembled, assemble
from evosearch.recipe import check_recipe
from evosearch.scoring.scorer import Scorer


class Base(nn.Module):
    """A stem, something odd, and a head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, 2, 1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, num_classes)

    def odd(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.odd(self.a(x).relu()).relu().mean((2, 3)))


class AddsInPlace(Base):
    def odd(self, x: Tensor) -> Tensor:
        x.add_(self.b(x))
        return self.c(x)


class AddsByAnotherName(Base):
    def odd(self, x: Tensor) -> Tensor:
        kept = x
        x += self.b(x)
        return self.c(kept)


class AddsToTheOutput(Base):
    def odd(self, x: Tensor) -> Tensor:
        y = self.b(x)
        y.add_(x)
        return self.c(y.relu()) + y


class ByKeyword(Base):
    def odd(self, x: Tensor) -> Tensor:
        return self.c(input=self.b(input=x).relu())


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Gain(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 1.5, self.bias)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.std(), self.bias)


class OfItsOwn(Base):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.b = PadsItself(16, 16, 3)
        self.c = Gain(16, 16, 3, padding=1)
        self.fc = Standardised(16, num_classes)

    def odd(self, x: Tensor) -> Tensor:
        return self.c(self.b(x).relu())


class OnlyNormalises(Base):
    """Depthwise convolutions, and batch norms without weights."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn, self.cn = (nn.BatchNorm2d(16, affine=False) for _ in range(2))
        for norm in (self.bn, self.cn):
            norm.running_mean += torch.randn(16)
            norm.running_var *= torch.rand(16) + 0.5

    def odd(self, x: Tensor) -> Tensor:
        return self.cn(self.c(self.bn(self.b(x)).relu()))


class Tokens(Base):
    """A batch norm that cannot be folded beside one that can."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.bn = nn.BatchNorm2d(16)
        self.mix, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(256)

    def odd(self, x: Tensor) -> Tensor:
        x = self.bn(self.b(x)).relu()
        tokens = self.norm(self.mix(x.flatten(2).transpose(1, 2)))  # a channel for each place
        return self.c(tokens.transpose(1, 2).unflatten(2, (16, 16)).relu())


NAMES = [
    *("AddsInPlace", "AddsByAnotherName", "AddsToTheOutput", "ByKeyword", "OfItsOwn"),
    *("OnlyNormalises", "Tokens"),
]


def made(name: str, proxy: str) -> Assembled:
    recipe = {
        "network": {"name": f"{__name__}:{name}"},
        "data": {"calibration": 64, "validation": 64},
        "proxy": {"name": proxy, "criterion": "l1", "precision": "float32"},
        "run": {"workers": 0},
    }
    return assemble(check_recipe(recipe, "a test"))


@pytest.mark.parametrize("proxy", ["reconstructed", "patchwise"])
@pytest.mark.parametrize("name", NAMES)
def test_uncut_networks_compute_what_they_did(name: str, proxy: str) -> None:
    workload = made(name, proxy).workload
    images = workload.network().example(8)
    with torch.inference_mode():
        wanted = workload.network().module(images)
        found = Scorer(workload).network_of(workload.plan.table.dense)(images)
    assert float((found - wanted).abs().mean()) < 1e-3 * float(wanted.std())


@pytest.mark.parametrize("name", NAMES)
def test_cut_networks_are_nearer_to_what_they_did_than_without_fits(name: str) -> None:
    distances = []
    for proxy in ("raw", "reconstructed"):
        assembled = made(name, proxy)
        half = assembled.space.decode(np.full((1, assembled.space.n_genes), 0.3))[0]
        measured = Scorer(assembled.workload).score(half)
        assert measured.ok, measured.reason
        distances.append(measured.metrics["distortion"])
    assert distances[1] < distances[0]


def test_a_norm_that_cannot_be_folded_leaves_the_others_to_be() -> None:
    layout = made("Tokens", "raw").workload.layout
    assert ("b", "bn") in layout.pairs
    assert layout.head == "fc"
