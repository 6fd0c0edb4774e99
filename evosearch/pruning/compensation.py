"""Making up for removed channels by changing the weights of those who read them.

With x the input of a layer and G = E[x x^T] over calibration images and positions, the removed
channels r are predicted from the kept ones k by least squares, x_r ~ A x_k with
A = G_rk G_kk^-1, and folded into the kept columns: W'_k = W_k + W_r A. This is the channel-level
form; [Xie2021] has the patch-level one.

References:
    [Xie2021] Z. Xie et al., "Pruning with Compensation", arXiv:2108.13728.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.cutting import CuttingPlan, on_device
from evosearch.pruning.statistics import Units, shared_tensor, units_of

__all__ = ["Compensator", "fold", "loaded_factor"]

_LEAST_RIDGE = 1e-9
_LEAST_LOAD = 1e-12


def fold(gram: Tensor, kept: Tensor, removed: Tensor, ridge: float) -> Tensor:
    """Coefficients that predict removed channels from kept ones.

    Args:
        gram: `(n, n)` float64 second moments.
        kept: `(k,)` int64.
        removed: `(r,)` int64.
        ridge: Added to the diagonal of G_kk, as a share of its mean; channels without variance
            would make it singular.

    Returns:
        `(r, k)` float64, A = G_rk (G_kk + ridge I)^-1.
    """
    # Not by brackets, which take five times as long.
    rows = gram.index_select(0, kept)
    factor = loaded_factor(rows.index_select(1, kept), ridge)
    return torch.cholesky_solve(rows.index_select(1, removed), factor).T


def loaded_factor(block: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of a matrix of second moments plus a load on its diagonal.

    Args:
        block: `(n, n)` float64; the load is added to it in place.
        ridge: The load, as a share of the diagonal's mean.

    Returns:
        `(n, n)`; NaN if there is none all the same.
    """
    # Never next to nothing, so that equal or dead channels can still be factorised.
    load = (max(ridge, _LEAST_RIDGE) * block.diagonal().mean()).clamp_min(_LEAST_LOAD)
    block.diagonal().add_(load)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(block)
    # Nobody waits for a GPU to say so: a measurement that is not finite is a failure with a reason.
    return torch.where(failed == 0, factor, torch.nan)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A consumer: its dense weight, its cut layer, and what its input looks like."""

    weight: Tensor
    layer: Any
    gram: Tensor
    units: Units
    out_axis: int | None


class Compensator:
    """Rewrites the consumers of a cut network.

    Args:
        plan: How the network was cut.
        source: The dense network.
        target: The working copy that a cutter narrows.
        grams: By layer name, from `gram_matrices` of the dense network.
        ridge: See `fold`.
    """

    def __init__(
        self,
        plan: CuttingPlan,
        source: nn.Module,
        target: nn.Module,
        grams: Mapping[str, NDArray[np.float64]],
        ridge: float,
    ) -> None:
        dense, layers = dict(source.named_modules()), dict(target.named_modules())
        self._ridge = ridge
        self._axes = plan.table.axes
        self._device = next(source.parameters()).device
        self._entries = [
            _Entry(
                weight=dense[entry.name].weight.detach(),
                layer=layers[entry.name],
                gram=shared_tensor(grams[entry.name]).to(self._device),
                units=units_of(plan.table.axes[entry.in_axis]),
                out_axis=entry.out_axis,
            )
            for entry in plan.cuts
            if entry.in_axis is not None
        ]

    def compensate(self, keep: NDArray[np.bool_]) -> None:
        """Folds the removed channels into the kept columns of every consumer.

        Args:
            keep: `(n_channels + 1,)` boolean by flat channel number, as given to the cutter.
        """
        # Layers of a block that is left out have nothing to fold: no inputs, or no outputs.
        cut = [
            (entry, kept_units)
            for entry in self._entries
            if not (kept_units := keep[entry.units.sources]).all()
            and kept_units.any()
            and len(entry.layer.weight)
        ]
        indices: list[NDArray[np.int64]] = []
        for entry, kept_units in cut:
            indices += [np.flatnonzero(kept_units), np.flatnonzero(~kept_units)]
            if entry.out_axis is not None:
                indices.append(self._axes[entry.out_axis].kept(keep))
        there = iter(on_device(indices, self._device))
        with torch.no_grad():
            for entry, kept_units in cut:
                kept, removed = next(there), next(there)
                rows = entry.weight
                if entry.out_axis is not None:
                    rows = rows.index_select(0, next(there))
                matrix = entry.units.gather(rows)
                mixing = fold(entry.gram, kept, removed, self._ridge).to(matrix.dtype)
                n_out, _, rest = matrix.shape
                gone = matrix.index_select(1, removed).transpose(1, 2).reshape(-1, len(removed))
                added = (gone @ mixing).reshape(n_out, rest, len(kept)).transpose(1, 2)
                columns = matrix.index_select(1, kept) + added
                order = entry.units.order[kept_units]
                entry.layer.weight.data = self._restore(columns, order, entry.layer.weight)

    @staticmethod
    def _restore(columns: Tensor, order: NDArray[np.int64], like: Tensor) -> Tensor:
        """Puts `(out, kept units, rest)` back into the shape and index order of a weight."""
        if order.shape[1] > 1:
            # Indices of kept units, in the order in which they stand in the narrowed weight.
            position = np.argsort(order.ravel(), kind="stable")
            flat = columns.reshape(len(like), order.size, -1)
            columns = flat[:, torch.from_numpy(position).to(flat.device)]
        return columns.reshape(like.shape)
