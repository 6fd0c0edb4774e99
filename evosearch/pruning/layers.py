"""Layers that can be narrowed, how wide they are, and channels that might go together."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

__all__ = [
    "Channelwise",
    "Convolution",
    "Norm",
    "Proposal",
    "dimensions",
    "is_channelwise",
    "is_depthwise",
    "outputs_per_group",
]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""With statistics of a whole data set, which can be recalibrated, and folded away."""
Channelwise = (
    Norm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.PReLU | nn.GroupNorm
)
"""What passes each channel on at the same place, and treats it by itself or with its neighbours."""


@dataclass
class Proposal:
    """Channels that might have to go together: which indices of which layer follow which.

    Args:
        name: Of a layer that writes them.
        channels: How many there are.
        granularity: So many next to each other go or stay.
        outs, ins: By layer that writes, or reads, them: for each of its channels which one that is,
            or -1.
        reason: Why they cannot be cut.
        lost: Where else they go is not known.
    """

    name: str
    channels: int
    granularity: int = 1
    outs: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    ins: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    reason: str | None = None
    lost: bool = False


def is_channelwise(module: nn.Module) -> bool:
    """Whether a layer passes each channel on, and leaves it be when others go.

    A PReLU of one slope has no channels, and a norm of all channels together minds each.
    """
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if isinstance(module, nn.GroupNorm):
        return module.num_groups > 1
    return isinstance(module, Channelwise)


def outputs_per_group(module: nn.Module) -> int | None:
    """Of a grouped convolution or a group norm, which go or stay together; None of other layers."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    if isinstance(module, Convolution) and module.groups > 1:
        return module.out_channels // module.groups
    return None


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
    if isinstance(module, nn.PReLU):
        return module.num_parameters, module.num_parameters
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, module.num_channels
    assert isinstance(module, Channelwise)  # noqa: S101  callers pass supported layers only
    width: int = module.num_features  # type: ignore[assignment]
    return width, width
