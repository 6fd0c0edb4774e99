"""Cutting a network along a plan that was prepared once: a few index selections per layer.

Blocks of which no channel is kept are left out: an identity is in their place.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.blocks import put_blocks
from evosearch.pruning.layers import Channelwise, outputs_per_group
from evosearch.pruning.table import GroupTable

__all__ = ["Cutter", "CuttingPlan", "LayerCut", "kept_indices", "on_device"]

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """Which axes the dimensions of a layer's weight run over; None where no group does."""

    name: str
    out_axis: int | None
    in_axis: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class CuttingPlan:
    """How to narrow every layer of a network for any choice of kept channels.

    Args:
        table: Groups, axes and costs.
        cuts: The layers that change.
    """

    table: GroupTable
    cuts: tuple[LayerCut, ...]

    def cut(self, source: nn.Module, target: nn.Module, keep: BoolArray) -> None:
        """Narrows `target` to the kept channels of `source`, a network of the same layers.

        Args:
            source: The dense network; untouched.
            target: A copy of it, cut before or not.
            keep: `(n_channels + 1,)` boolean by flat channel number, the last entry True.
        """
        Cutter(self, source, target).cut(keep)


@dataclass(frozen=True, eq=False)
class _Tensor:
    """One tensor to narrow: where from, where to, along which axes."""

    dense: Tensor
    ours: Tensor
    out_axis: int | None
    in_axis: int | None


class Cutter:
    """Narrows one working copy of a network again and again.

    Args:
        plan: How.
        source: The dense network; it must not change while the cutter is used.
        target: The working copy; a fresh one is made if None.
    """

    def __init__(
        self, plan: CuttingPlan, source: nn.Module, target: nn.Module | None = None
    ) -> None:
        self.plan = plan
        self.network = copy.deepcopy(source) if target is None else target
        dense = dict(source.named_modules())
        self._layers = dict(self.network.named_modules())
        self._blocks = {block.name: self._layers[block.name] for block in plan.table.blocks}
        self._device = next(source.parameters()).device
        self._tensors: list[_Tensor] = []
        cuts = {entry.name: entry for entry in plan.cuts}
        for name, layer in self._layers.items():
            entry = cuts.get(name, LayerCut(name=name, out_axis=None, in_axis=None))
            self._tensors += self._tensors_of(entry, dense[name], layer)
        # How many outputs a group has shows in the dense network alone: with one group left a
        # convolution looks like any other.
        self._resized = [
            (self._layers[entry.name], outputs_per_group(dense[entry.name]), entry.out_axis)
            for entry in plan.cuts
        ]

    @staticmethod
    def _tensors_of(entry: LayerCut, dense: nn.Module, layer: nn.Module) -> list[_Tensor]:
        found = []
        theirs = {**dict(dense.named_parameters("", False)), **dict(dense.named_buffers("", False))}
        for name, tensor in theirs.items():
            reads_input = name == "weight" and tensor.ndim > 1
            found.append(
                _Tensor(
                    tensor.detach(),
                    getattr(layer, name),
                    entry.out_axis if tensor.ndim else None,  # counters of batch norm have none
                    entry.in_axis if reads_input else None,
                )
            )
        return found

    def cut(self, keep: BoolArray) -> nn.Module:
        """Narrows the working copy to the kept channels and returns it.

        Every tensor is written anew, so that nothing of an earlier cut, compensation or
        recalibration is left. Blocks that are left out keep their modules for later cuts.

        Args:
            keep: `(n_channels + 1,)` boolean by flat channel number, the last entry True.
        """
        axes = self.plan.table.axes
        indices = kept_indices(self.plan.table, keep, self._device)
        widths = [
            axis.size if kept is None else len(kept)
            for axis, kept in zip(axes, indices, strict=True)
        ]
        with torch.no_grad():
            for entry in self._tensors:
                tensor = entry.dense
                out = None if entry.out_axis is None else indices[entry.out_axis]
                into = None if entry.in_axis is None else indices[entry.in_axis]
                if out is not None:
                    tensor = tensor.index_select(0, out)
                if into is not None:
                    tensor = tensor.index_select(1, into)
                entry.ours.data = tensor.clone() if tensor is entry.dense else tensor
            for layer, per_group, axis in self._resized:
                _resize(layer, per_group, 0 if axis is None else widths[axis])
        put_blocks(self.network, self._blocks, self.plan.table.blocks_without(keep))
        return self.network


def on_device(arrays: Sequence[NDArray[np.int64]], device: torch.device | str) -> list[Tensor]:
    """Arrays of indices as tensors, in one transfer: each would make a GPU wait."""
    if not arrays:
        return []
    whole = torch.from_numpy(np.concatenate(arrays)).to(device)
    return list(torch.split(whole, [len(array) for array in arrays]))


def kept_indices(
    table: GroupTable, keep: BoolArray, device: torch.device | str = "cpu"
) -> list[Tensor | None]:
    """Per axis the kept indices, int64; None where the axis stays whole."""
    kept = [axis.kept(keep) for axis in table.axes]
    shortened = [k for k, axis in zip(kept, table.axes, strict=True) if len(k) < axis.size]
    there = iter(on_device(shortened, device))
    return [
        next(there) if len(k) < axis.size else None
        for k, axis in zip(kept, table.axes, strict=True)
    ]


def _resize(layer: nn.Module, per_group: int | None, width: int) -> None:
    """Makes the attributes that state a layer's widths agree with its tensors.

    Args:
        layer: Cut.
        per_group: From `outputs_per_group`, before anything was cut.
        width: Channels of what has none to count, as norms without scales.
    """
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.out_channels = layer.weight.shape[0]
        if per_group is not None:
            layer.groups = layer.out_channels // per_group
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = width
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels, layer.num_groups = width, width // (per_group or 1)
    elif isinstance(layer, Channelwise):
        layer.num_features = width
