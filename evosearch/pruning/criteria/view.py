"""What a criterion may look at: the layers of one group, and what images told about them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import ConfigError
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.layers import Norm
from evosearch.pruning.statistics import units_of
from evosearch.pruning.table import Group

__all__ = ["COUPLINGS", "Consumer", "Coupling", "Evidence", "GroupView", "group_views"]

FloatArray = NDArray[np.float64]
Coupling = Literal["mean", "max", "sum"]
COUPLINGS: tuple[str, ...] = get_args(Coupling)

_ByLayer = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What images told about a network: per kind and layer `(n, width)`, a row an image or batch.

    Args:
        read: Of what consumers read, by unit of their input.
        written: Of what producers and norms write, by output channel.
    """

    read: _ByLayer = field(default_factory=dict)
    written: _ByLayer = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the group.

    Args:
        weight: `(out, n_units, rest)` float64, all of the layer's input channels.
        gram: `(n_units, n_units)` float64 second moments of its input, or None.
        columns: `(n_channels,)` the units that are the group's channels, in channel order.
        derived: What was computed from weight and moments alone, by name: of one layer that reads
            many groups, as in a DenseNet, it need not be computed for each.
    """

    weight: Tensor
    gram: Tensor | None
    columns: Tensor
    derived: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GroupView:
    """Everything a criterion may look at.

    Args:
        group: Names and sizes.
        producers: Per producing layer `(n_channels, fan_in)` float64: its filters. A layer that
            has every channel at two places, as before a ghost module's sum, counts as two.
        scales: Per batch norm of the group `(n_channels,)` float64: gamma; likewise.
        consumers: The layers that read the group.
        evidence: Per kind, for each layer that it was collected from `(n, n_channels)` float64;
            only of the kinds that a requested criterion needs.
        coupling: How scores of coupled layers become one.
    """

    group: Group
    producers: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    consumers: tuple[Consumer, ...]
    evidence: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    coupling: Coupling = "mean"

    def combine(self, scores: Iterable[Tensor]) -> Tensor:
        """One score per channel from one `(n_channels,)` per coupled layer."""
        stacked = torch.stack(list(scores))
        if self.coupling == "max":
            return stacked.amax(dim=0)
        return stacked.sum(dim=0) if self.coupling == "sum" else stacked.mean(dim=0)

    def seen(self, kind: str) -> tuple[Tensor, ...]:
        """What was collected under a kind: per layer `(n, n_channels)`.

        Raises:
            ConfigError: It was not: the criterion does not name it among its needs.
        """
        if not self.evidence.get(kind):
            raise ConfigError(
                f"group {self.group.name}: there is no {kind!r}; a criterion that reads it must "
                "name it in its needs"
            )
        return self.evidence[kind]


_NOTHING = Evidence()


def _places(sources: NDArray[np.int64], first: int, n: int) -> tuple[Tensor, ...]:
    """Indices of an axis that are channels `first` to `first + n - 1`, in channel order.

    Each `(n,)`: as many as there are places at which an axis has every channel, mostly one.
    """
    inside = np.flatnonzero((sources >= first) & (sources < first + n))
    ordered = inside[np.argsort(sources[inside], kind="stable")]
    return tuple(torch.from_numpy(ordered.reshape(n, -1).T.copy()))


def _written_at(
    plan: CuttingPlan, layers: Mapping[str, nn.Module], group: Group, first: int
) -> dict[str, tuple[Tensor, ...]]:
    """Where producers of a group, and its norms with scales, have its channels."""
    axes = {entry.name: entry.out_axis for entry in plan.cuts if entry.out_axis is not None}
    norms = [name for name in axes if isinstance(layers[name], Norm) and layers[name].affine]
    found = {
        name: _places(plan.table.axes[axes[name]].sources, first, group.channels)
        for name in (*norms, *group.producers)
    }
    # Behind a flatten a norm has a scale for each position, which says little of a channel.
    most = max(len(found[name]) for name in group.producers)
    return {name: places for name, places in found.items() if 0 < len(places) <= most}


def group_views(
    module: nn.Module,
    plan: CuttingPlan,
    grams: Mapping[str, FloatArray] | None = None,
    evidence: Evidence = _NOTHING,
    coupling: Coupling = "mean",
) -> list[GroupView]:
    """Views of all groups, in the order of the table.

    Args:
        module: The dense network.
        plan: Its groups.
        grams: By consumer, from `gram_matrices`.
        evidence: From `collect`.
        coupling: See GroupView.
    """
    table = plan.table
    layers = dict(module.named_modules())
    cuts = {entry.name: entry for entry in plan.cuts}
    read: dict[str, tuple[Tensor, Tensor | None, dict[str, Tensor]]] = {}
    views = []
    for group, first in zip(table.groups, map(int, table.offsets), strict=True):
        places = _written_at(plan, layers, group, first)
        weights = {name: layers[name].weight.detach().double() for name in places}
        filters = [
            weights[name][where].flatten(1) for name in group.producers for where in places[name]
        ]
        scales = [
            weights[name][where]
            for name, found in places.items()
            if name not in group.producers
            for where in found
        ]
        consumers = []
        columns: dict[str, tuple[Tensor, ...]] = {}
        for name in group.consumers:
            in_axis = cuts[name].in_axis
            assert in_axis is not None  # noqa: S101  consumers are cut along their inputs
            units = units_of(table.axes[in_axis])
            if name not in read:
                weight = units.gather(layers[name].weight.detach().double())
                gram = None if grams is None else torch.from_numpy(np.array(grams[name]))
                read[name] = weight, gram, {}
            columns[name] = _places(units.sources, first, group.channels)
            (of_units,) = columns[name]
            weight, gram, derived = read[name]
            consumers.append(Consumer(weight, gram, of_units, derived))
        seen = {
            kind: tuple(
                by_layer[name][:, where]
                for name, places_of_it in side.items()
                if name in by_layer
                for where in places_of_it
            )
            for kinds, side in ((evidence.read, columns), (evidence.written, places))
            for kind, by_layer in kinds.items()
        }
        views.append(
            GroupView(group, tuple(filters), tuple(scales), tuple(consumers), seen, coupling)
        )
    return views
