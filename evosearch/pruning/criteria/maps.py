"""Criteria that look at feature maps: what the consumers of a group read, channel by channel.

Maps are taken where they are read, behind batch norm, activation and pooling. Each image is
summarised by one number per channel while the images pass; the criteria make scores of these.
None needs labels.

References:
    [Molchanov2017] P. Molchanov et al., "Pruning Convolutional Neural Networks for Resource
        Efficient Inference", ICLR 2017 (activation mean).
    [Hu2016] H. Hu et al., "Network Trimming", arXiv:1607.03250 (APoZ).
    [Luo2017] J.-H. Luo, J. Wu, "An Entropy-based Pruning Method for CNN Compression",
        arXiv:1706.05791.
    [Lin2020] M. Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020.
    [Sui2021] Y. Sui et al., "CHIP: CHannel Independence-based Pruning", NeurIPS 2021.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evosearch.pruning.criteria.view import GroupView

__all__ = [
    "LOOKS",
    "Look",
    "activation_entropy",
    "activation_mean",
    "apoz",
    "channel_independence",
    "feature_rank",
]

_BINS = 16
# Decompositions are costly, and [Lin2020] finds that ranks hardly depend on the images.
_DECOMPOSED = 32
# Nodes of the integral in `_independence`, in powers of e around the largest eigenvalue.
_NODES = torch.arange(-30, 30, 0.25, dtype=torch.float64)


@dataclass(frozen=True)
class Look:
    """How an image is summarised while it passes.

    Args:
        summarise: Maps `(n, channels, height, width)` to `(n, channels)`.
        images: How many images to look at, all if None.
    """

    summarise: Callable[[Tensor], Tensor]
    images: int | None = None


def _rank(maps: Tensor) -> Tensor:
    ranks: Tensor = torch.linalg.matrix_rank(maps)
    return ranks.double()


def _independence(maps: Tensor) -> Tensor:
    """How much the nuclear norm of (channels x positions) falls without each channel.

    With K = A A^T, the norm is the integral over t of tr K (K + t)^-1 t^-1/2 / pi, and taking
    channel i away lowers tr (K + t)^-1 by [(K + t)^-2]_ii / [(K + t)^-1]_ii. So one decomposition
    serves all channels. The integrand falls off exponentially in log t on both sides, where the
    trapezoid rule is as good as exact.
    """
    u, s, _ = torch.linalg.svd(maps.flatten(2).double(), full_matrices=False)
    inside = u**2
    rest = (1 - inside.sum(dim=2)).clamp(min=0)[:, :, None]
    t = (s.amax(dim=1, keepdim=True) ** 2).clamp(min=1e-30) * _NODES.exp()
    inverse = 1 / (s[:, :, None] ** 2 + t[:, None])
    first = inside @ inverse + rest / t[:, None]
    second = inside @ inverse**2 + rest / t[:, None] ** 2
    integrand = (1 - t[:, None] * second / first) * t[:, None].sqrt()
    step = float(_NODES[1] - _NODES[0])
    total: Tensor = integrand.sum(dim=2)
    return total * step / torch.pi


LOOKS: Mapping[str, Look] = {
    "size": Look(lambda maps: maps.abs().mean(dim=(2, 3))),
    "active": Look(lambda maps: (maps != 0).double().mean(dim=(2, 3))),
    "pooled": Look(lambda maps: maps.mean(dim=(2, 3))),
    "rank": Look(_rank, images=_DECOMPOSED),
    "independence": Look(_independence, images=_DECOMPOSED),
}


def activation_mean(view: GroupView) -> Tensor:
    """Mean absolute activation over images and positions [Molchanov2017]."""
    return view.combine(size.mean(dim=0) for size in view.seen("size"))


def apoz(view: GroupView) -> Tensor:
    """Share of activations that are not zero: 1 - APoZ [Hu2016]; 1 for all without a ReLU."""
    return view.combine(active.mean(dim=0) for active in view.seen("active"))


def _entropy(pooled: Tensor) -> Tensor:
    low, high = pooled.amin(dim=0), pooled.amax(dim=0)
    span = torch.where(high > low, high - low, 1.0)
    bins = ((pooled - low) / span * _BINS).nan_to_num().long().clamp(0, _BINS - 1)
    share = F.one_hot(bins, _BINS).double().mean(dim=0)
    # NaN stays NaN: it is for the caller to refuse.
    entropy: Tensor = torch.special.entr(share).sum(dim=1)
    return entropy + 0 * low


def activation_entropy(view: GroupView) -> Tensor:
    """Entropy of the map's mean over images, in nats, from 16 bins of its range [Luo2017]."""
    return view.combine(_entropy(pooled) for pooled in view.seen("pooled"))


def feature_rank(view: GroupView) -> Tensor:
    """Rank of the feature map as a matrix (height x width), mean over images [Lin2020]."""
    return view.combine(rank.mean(dim=0) for rank in view.seen("rank"))


def channel_independence(view: GroupView) -> Tensor:
    """Fall of the nuclear norm of all maps (channels x positions) without this one [Sui2021].

    Mean over images.
    """
    return view.combine(fall.mean(dim=0) for fall in view.seen("independence"))
