"""Layers that can be narrowed, how wide they are, and channels that might go together."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

__all__ = ["Convolution", "Norm", "Proposal", "dimensions", "is_depthwise"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass
class Proposal:
    """Channels that might have to go together: which indices of which layer follow which."""

    name: str
    channels: int
    granularity: int = 1
    outs: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    ins: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    reason: str | None = None


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel reads the one input channel of the same number."""
    return (
        isinstance(module, Convolution)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def dimensions(module: nn.Module) -> tuple[int, int]:
    """Output and input width of a layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Convolution):
        return module.out_channels, module.in_channels
    assert isinstance(module, Norm)  # noqa: S101  callers pass supported layers only
    return module.num_features, module.num_features
