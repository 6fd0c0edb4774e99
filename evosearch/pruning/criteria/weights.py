"""Criteria that look at weights alone, and a coin.

References:
    [Li2017] H. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (L1).
    [He2018] Y. He et al., "Soft Filter Pruning", IJCAI 2018 (L2).
    [He2019] Y. He et al., "Filter Pruning via Geometric Median", CVPR 2019 (FPGM).
    [He2021] W. He et al., "Blending Pruning Criteria", arXiv:2107.05033 (names the Fermat point).
    [Vardi2000] Y. Vardi, C.-H. Zhang, "The multivariate L1-median and associated data depth",
        PNAS 97(4), 2000: Weiszfeld's iteration, also where it meets a data point.
    [Liu2017] Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
        ICCV 2017 (batch-norm scale).
    [ModelOpt] NVIDIA, Model Optimizer 0.47: the order of channels of its FastNAS.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from evosearch.errors import NetworkError
from evosearch.pruning.criteria.view import GroupView

__all__ = [
    "bn_scale",
    "coin",
    "consumer_l2",
    "fermat",
    "fpgm",
    "geometric_median",
    "l1",
    "l2",
    "need_norms",
]

_STEPS, _TOLERANCE = 200, 1e-10


def l1(view: GroupView) -> Tensor:
    """Sum of absolute weights of the filter [Li2017]."""
    return view.combine(weight.abs().sum(dim=1) for weight in view.producers)


def l2(view: GroupView) -> Tensor:
    """Euclidean norm of the filter [He2018]."""
    return view.combine(weight.norm(dim=1) for weight in view.producers)


def consumer_l2(view: GroupView) -> Tensor:
    """Euclidean norm of the weights that read the channel [ModelOpt]."""
    return view.combine(
        consumer.weight[:, consumer.columns].transpose(0, 1).flatten(1).norm(dim=1)
        for consumer in view.consumers
    )


def fpgm(view: GroupView) -> Tensor:
    """Sum of distances to the other filters of the layer [He2019]; small = replaceable."""
    return view.combine(torch.cdist(weight, weight).sum(dim=1) for weight in view.producers)


def fermat(view: GroupView) -> Tensor:
    """Distance to the Fermat point of the layer's filters [He2021]; small = replaceable.

    The Fermat point (geometric median) has the smallest sum of distances to all filters, and need
    not be one of them.
    """
    return view.combine(
        (weight - geometric_median(weight)).norm(dim=1) for weight in view.producers
    )


def geometric_median(points: Tensor) -> Tensor:
    """The point with the smallest sum of distances to `(n, d)` points, by [Vardi2000].

    Returns:
        `(d,)`; NaN if a point is not finite.
    """
    median = points.mean(dim=0)
    scale = float((points - median).norm(dim=1).max())
    for _ in range(_STEPS):
        distances = (points - median).norm(dim=1)
        apart = distances > 1e-12 * scale
        if not apart.any():  # all points are one
            break
        pull = 1 / distances[apart]
        target = (points[apart] * pull[:, None]).sum(dim=0) / pull.sum()
        # On a data point, the others must pull harder than it holds.
        force = float(((points[apart] - median) * pull[:, None]).sum(dim=0).norm())
        held = float((~apart).sum())
        share = 0.0 if held == 0 else (1.0 if force <= held else held / force)
        step = (1 - share) * (target - median)
        median = median + step
        if float(step.norm()) <= _TOLERANCE * scale:
            break
    return median


def need_norms(view: GroupView, criterion: str) -> None:
    """Checks that a group has a batch norm with a scale.

    Raises:
        NetworkError: It has none.
    """
    if not view.scales:
        raise NetworkError(
            f"criterion {criterion} needs a batch norm, and group {view.group.name} has none; "
            "choose another criterion"
        )


def bn_scale(view: GroupView) -> Tensor:
    """Absolute batch-norm scale [Liu2017].

    Raises:
        NetworkError: No batch norm with a scale follows the group.
    """
    need_norms(view, "bn-scale")
    return view.combine(scale.abs() for scale in view.scales)


def coin(view: GroupView) -> Tensor:
    """Uniform random numbers, the same at every call: seeded by the name of the group."""
    seed = int.from_bytes(hashlib.sha256(view.group.name.encode()).digest()[:8])
    return torch.from_numpy(np.random.default_rng(seed).random(view.group.channels))
