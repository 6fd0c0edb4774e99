"""What calibration images tell about a dense network: the Gram matrix of each consumer's input."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.hooks import first_input, hooked
from evosearch.pruning.table import Axis

__all__ = ["InputHook", "Units", "gram_matrices", "run_watched", "shared_tensor", "units_of"]


@dataclass(frozen=True, eq=False)
class Units:
    """How the input indices of a consumer fall into channels.

    Most layers have one input index per channel; a linear layer behind a flatten has one per
    channel and position, a layer that reads a channel twice has two. A unit is one channel with
    all its indices.

    Args:
        order: `(n_units, multiplicity)` input indices, one row per unit.
        sources: `(n_units,)` flat channel number of each unit, -1 for a fixed one.
    """

    order: NDArray[np.int64]
    sources: NDArray[np.int64]

    def gather(self, tensor: Tensor) -> Tensor:
        """A weight or an input `(n, indices, ...)` as `(n, n_units, rest)`."""
        flat = tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(2)
        if self.order.shape[1] > 1:
            flat = flat[:, torch.from_numpy(self.order.ravel()).to(tensor.device)]
        return flat.reshape(len(tensor), len(self.order), -1)


def units_of(axis: Axis) -> Units:
    """Groups the indices of an input axis by channel."""
    multiplicity = axis.multiplicity
    if multiplicity == 1:
        return Units(np.arange(axis.size)[:, None], axis.sources)
    order = np.argsort(axis.sources, kind="stable").reshape(-1, multiplicity)
    return Units(order, axis.sources[order[:, 0]])


def shared_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over the very memory of an array, which nobody may write to.

    Arrays from Ray's object store are read-only views that all workers of a machine share; torch
    knows no such tensors and warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class _GramHook:
    """Adds up the Gram matrix of one layer's input, in float64."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.total = torch.zeros(len(units.sources), len(units.sources), dtype=torch.float64)
        self.positions = 0

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        x = first_input(inputs, named).detach()
        if isinstance(module, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
        channels = self.units.gather(x).transpose(0, 1).flatten(1)
        self.total += (channels @ channels.T).double().cpu()
        self.positions += channels.shape[1]


def gram_matrices(
    module: nn.Module, plan: CuttingPlan, batches: list[Tensor]
) -> Mapping[str, NDArray[np.float64]]:
    """Second moments of the inputs of all consumers, over images and positions, not centred.

    Args:
        module: The dense network, in evaluation mode.
        plan: Says which layers have an input that a policy cuts.
        batches: Normalised images, each `(n, channels, height, width)`.

    Returns:
        By layer name: `(n_units, n_units)` float64, the mean of x x^T over images and positions,
        a unit being an input channel.
    """
    hooks = {
        entry.name: _GramHook(units_of(plan.table.axes[entry.in_axis]))
        for entry in plan.cuts
        if entry.in_axis is not None
    }
    run_watched(module, hooks, batches)
    return {name: (hook.total / max(hook.positions, 1)).numpy() for name, hook in hooks.items()}


class InputHook(Protocol):
    """Sees what a layer is called with."""

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        """Positional and named inputs."""


def run_watched(module: nn.Module, hooks: Mapping[str, InputHook], batches: list[Tensor]) -> None:
    """Runs a network over images while hooks see the inputs of some layers.

    Args:
        module: The network.
        hooks: By layer name.
        batches: Normalised images.
    """
    layers = dict(module.named_modules())
    handles = [
        layers[name].register_forward_pre_hook(hook, with_kwargs=True)
        for name, hook in hooks.items()
    ]
    with hooked(handles), torch.inference_mode():
        for batch in batches:
            module(batch)
