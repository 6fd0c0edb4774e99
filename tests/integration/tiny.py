"""A network small enough that a whole search takes seconds, and ways for it to misbehave."""

import os
import sys
import time

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Three convolutions with batch norm, for 32x32 images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 8, 2), (8, 16, 2), (16, 24, 2)):
            layers += [
                nn.Conv2d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, 3, 32, 32)` to logits."""
        return self.classifier(self.features(x).mean((2, 3)))


class _Adds(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, width, h, w)` to the same."""
        return (x + self.outer(self.norm(self.inner(x)).relu())).relu()


class Residual(Tiny):
    """A residual block behind each convolution; all of them may be left out."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        layers = list(self.features)
        parts = zip((layers[:3], layers[3:6], layers[6:]), (8, 16, 24), strict=True)
        self.features = nn.Sequential(*(nn.Sequential(*part, _Adds(n)) for part, n in parts))


def weigh(module: nn.Module, images: Tensor) -> float:
    """A stopwatch for networks whose time is that of their weights, the same at every look."""
    return 1e-6 * len(images) * sum(p.numel() for p in module.parameters())


def weigh_and_trip(module: nn.Module, images: Tensor) -> float:
    """As `weigh`, but some widths, which no sum of terms foresees, take half as long again."""
    odd = sum(len(p) for p in module.parameters()) % 2
    return weigh(module, images) * (1.5 if odd else 1.0)


def weigh_by_eights(module: nn.Module, images: Tensor) -> float:
    """As `weigh`, but layers whose widths are no multiples of 8 make it twice as much."""
    odd = any(isinstance(c, nn.Conv2d) and c.out_channels % 8 for c in module.modules())
    return weigh(module, images) * (2.0 if odd else 1.0)


class _Trap(Tiny):
    """Springs when the first layer has become narrower than the half that tracing tries."""

    width = 3

    def forward(self, x: Tensor) -> Tensor:
        """Like Tiny, until the trap springs."""
        if self.features[0].out_channels <= self.width:
            self.spring()
        return super().forward(x)

    def spring(self) -> None:
        """What happens then."""
        raise RuntimeError("this width is cursed")


class Raises(_Trap):
    """Narrow networks raise."""


class StaysAtHome(Tiny):
    """Cannot be made in a worker of Ray."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        if "default_worker" in sys.argv[0]:
            raise RuntimeError("its data are at home")


class Dies(_Trap):
    """Narrow networks take their process with them."""

    def spring(self) -> None:
        """Ends the process, as the system does when memory is short."""
        os._exit(1)


class Hangs(_Trap):
    """Narrow networks take very long."""

    def spring(self) -> None:
        """Sleeps for longer than any test."""
        time.sleep(3600)
