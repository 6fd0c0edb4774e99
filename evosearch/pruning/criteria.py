"""What a channel is worth: criteria that score the channels of a group.

A criterion maps a view of a group to one number per channel, larger = more important. A group
with several producers (or norms, or consumers) gets the mean over them.

References:
    [Li2017] H. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (L1).
    [He2018] Y. He et al., "Soft Filter Pruning", IJCAI 2018 (L2).
    [Liu2017] Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
        ICCV 2017 (batch-norm scale).
    [He2019] Y. He et al., "Filter Pruning via Geometric Median", CVPR 2019 (FPGM).
    [Hassibi1993] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal
        Brain Surgeon", NIPS 1992: eliminating one variable of a least-squares problem.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import ConfigError, NetworkError
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.proposals import Norm
from evosearch.pruning.statistics import units_of
from evosearch.pruning.table import Group

__all__ = ["CRITERIA", "Consumer", "Criterion", "GroupView", "channel_order"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the group.

    Args:
        weight: `(out, n_units, rest)` float64, all of the layer's input channels.
        gram: `(n_units, n_units)` float64 second moments of its input, or None.
        columns: `(n_channels,)` the units that are the group's channels, in channel order.
    """

    weight: Tensor
    gram: Tensor | None
    columns: Tensor


@dataclass(frozen=True, eq=False)
class GroupView:
    """Everything a criterion may look at.

    Args:
        group: Names and sizes.
        producers: Per producing layer `(n_channels, fan_in)` float64: its filters.
        scales: Per batch norm of the group `(n_channels,)` float64: gamma.
        consumers: The layers that read the group.
    """

    group: Group
    producers: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    consumers: tuple[Consumer, ...]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A named criterion.

    Args:
        title: One line for people.
        score: Maps a view to `(n_channels,)`, larger = more important.
        needs_grams: Whether consumers must have Gram matrices.
    """

    title: str
    score: Callable[[GroupView], Tensor]
    needs_grams: bool = False


def _mean(scores: list[Tensor]) -> Tensor:
    return torch.stack(scores).mean(dim=0)


def l1(view: GroupView) -> Tensor:
    """Sum of absolute weights of the filter [Li2017]."""
    return _mean([weight.abs().sum(dim=1) for weight in view.producers])


def l2(view: GroupView) -> Tensor:
    """Euclidean norm of the filter [He2018]."""
    return _mean([weight.norm(dim=1) for weight in view.producers])


def fpgm(view: GroupView) -> Tensor:
    """Sum of distances to the other filters of the layer [He2019]; small = replaceable."""
    return _mean([torch.cdist(weight, weight).sum(dim=1) for weight in view.producers])


def bn_scale(view: GroupView) -> Tensor:
    """Absolute batch-norm scale [Liu2017].

    Raises:
        NetworkError: No batch norm with a scale follows the group.
    """
    if not view.scales:
        raise NetworkError(
            f"criterion bn-scale needs a batch norm, and group {view.group.name} has none; "
            "choose another criterion"
        )
    return _mean([scale.abs() for scale in view.scales])


def residual_energy(view: GroupView) -> Tensor:
    """Order of greedy removal by compensated residual energy of the consumers.

    Removing input channel j of a least-squares-compensated consumer, with P = G_kk^-1 and W the
    compensated weights so far, adds ||W_j||^2 / P_jj to the energy of its output error; then
    W_k -= W_j P_jk / P_jj and P -= P_:j P_j: / P_jj [Hassibi1993]. The channel that adds least,
    summed over the consumers, goes first.

    Returns:
        `(n_channels,)` the step at which each channel was removed: 0 is the least important. NaN
        if weights or moments are not finite.
    """
    states = []
    for consumer in view.consumers:
        assert consumer.gram is not None  # noqa: S101  channel_order provides what is needed
        size = len(consumer.gram)
        if not (torch.isfinite(consumer.gram).all() and torch.isfinite(consumer.weight).all()):
            return torch.full((view.group.channels,), torch.nan)
        load = max(1e-4 * float(consumer.gram.diagonal().mean()), 1e-12)
        inverse = torch.linalg.inv(consumer.gram + load * torch.eye(size, dtype=torch.float64))
        columns = consumer.columns
        weight = consumer.weight[:, columns].transpose(1, 2).reshape(-1, len(columns))
        states.append((weight.clone(), inverse[columns][:, columns].clone()))
    n = view.group.channels
    step = torch.zeros(n, dtype=torch.float64)
    gone = torch.zeros(n, dtype=torch.bool)
    for removed in range(n):
        energy = sum(
            ((weight**2).sum(dim=0) / inverse.diagonal() for weight, inverse in states),
            torch.zeros(n, dtype=torch.float64),
        )
        if not torch.isfinite(energy[~gone]).all():
            return torch.full((n,), torch.nan)
        # Of equals the last goes first, as for all criteria.
        j = n - 1 - int(energy.masked_fill(gone, torch.inf).flip(0).argmin())
        step[j] = removed
        gone[j] = True
        for weight, inverse in states:
            pivot = inverse[j] / inverse[j, j]
            weight.sub_(weight[:, j : j + 1] * pivot)
            inverse.sub_(inverse[:, j : j + 1] * pivot)
            # The eliminated row and column are zero up to rounding; 1 keeps divisions finite.
            weight[:, j] = 0
            inverse[j], inverse[:, j] = 0, 0
            inverse[j, j] = 1
    return step


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(title="L1 norm of the filter", score=l1),
    "l2": Criterion(title="L2 norm of the filter", score=l2),
    "fpgm": Criterion(title="distance to the other filters of the layer", score=fpgm),
    "bn-scale": Criterion(title="absolute batch-norm scale", score=bn_scale),
    "residual-energy": Criterion(
        title="greedy removal by compensated residual energy of the consumers",
        score=residual_energy,
        needs_grams=True,
    ),
}


def _views(
    module: nn.Module, plan: CuttingPlan, grams: Mapping[str, FloatArray] | None
) -> list[GroupView]:
    table = plan.table
    layers = dict(module.named_modules())
    cuts = {entry.name: entry for entry in plan.cuts}
    views = []
    for index, group in enumerate(table.groups):
        first = int(table.offsets[index])

        def places(
            sources: NDArray[np.int64], first: int = first, n: int = group.channels
        ) -> Tensor:
            """Indices of an axis that are the group's channels, in channel order."""
            inside = np.flatnonzero((sources >= first) & (sources < first + n))
            return torch.from_numpy(inside[np.argsort(sources[inside], kind="stable")])

        producers, scales, consumers = [], [], []
        for entry in plan.cuts:
            layer = layers[entry.name]
            if isinstance(layer, Norm) and layer.affine and entry.out_axis is not None:
                found = places(table.axes[entry.out_axis].sources)
                if len(found) == group.channels:
                    scales.append(layer.weight.detach().double()[found])
        for name in group.producers:
            out_axis = cuts[name].out_axis
            assert out_axis is not None  # noqa: S101  producers are cut along their outputs
            weight = layers[name].weight.detach().double()
            producers.append(weight[places(table.axes[out_axis].sources)].flatten(1))
        for name in group.consumers:
            in_axis = cuts[name].in_axis
            assert in_axis is not None  # noqa: S101  consumers are cut along their inputs
            units = units_of(table.axes[in_axis])
            weight = layers[name].weight.detach().double()
            gram = None if grams is None else torch.from_numpy(np.array(grams[name]))
            consumers.append(Consumer(units.gather(weight), gram, places(units.sources)))
        views.append(GroupView(group, tuple(producers), tuple(scales), tuple(consumers)))
    return views


def channel_order(
    module: nn.Module,
    plan: CuttingPlan,
    criterion: str,
    grams: Mapping[str, FloatArray] | None = None,
) -> NDArray[np.int64]:
    """Ranks the channels of every group, most important first.

    Args:
        module: The dense network.
        plan: Its groups.
        criterion: A name from CRITERIA.
        grams: Needed by criteria that look at data.

    Returns:
        `(n_channels,)` by flat channel number: the place of each channel within its group, 0 for
        the most important. A policy that keeps k channels keeps places 0 to k - 1. Ties go to the
        lower channel number.

    Raises:
        ConfigError: The criterion is unknown.
        NetworkError: The criterion does not apply, or gives NaN; names the group.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"no criterion {criterion!r}; there are {', '.join(CRITERIA)}")
    if CRITERIA[criterion].needs_grams and grams is None:
        raise ConfigError(f"criterion {criterion} needs Gram matrices")
    places = np.empty(int(plan.table.channels.sum()), dtype=np.int64)
    views = _views(module, plan, grams)
    for view, offset in zip(views, plan.table.offsets, strict=True):
        scores = CRITERIA[criterion].score(view).numpy()
        if not np.isfinite(scores).all():
            raise NetworkError(f"criterion {criterion} gives NaN for group {view.group.name}")
        order = np.argsort(-scores, kind="stable")
        places[offset + order] = np.arange(len(order))
    return places
