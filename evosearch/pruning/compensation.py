"""Making up for removed channels by changing the weights of those who read them.

With x the input of a layer and G = E[x x^T] over calibration images and positions, the removed
channels r are predicted from the kept ones k by least squares, x_r ~ A x_k with
A = G_rk G_kk^-1, and folded into the kept columns: W'_k = W_k + W_r A. This is the channel-level
form; [Xie2021] has the patch-level one.

References:
    [Xie2021] Z. Xie et al., "Pruning with Compensation", arXiv:2108.13728.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.statistics import units_of

__all__ = ["Compensator", "fold"]

_LEAST_RIDGE = 1e-9


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
    block = gram[kept][:, kept]
    # Never zero, so that equal or dead channels can still be factorised.
    load = max(max(ridge, _LEAST_RIDGE) * float(block.diagonal().mean()), 1e-12)
    identity = torch.eye(len(kept), dtype=block.dtype, device=block.device)
    factor = torch.linalg.cholesky(block + load * identity)
    return torch.cholesky_solve(gram[kept][:, removed], factor).T


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
        self._entries = [
            (
                entry,
                dense[entry.name].weight.detach(),
                layers[entry.name],
                # A copy: the array may be a read-only view into shared memory.
                torch.from_numpy(np.array(grams[entry.name])).to(dense[entry.name].weight.device),
                units_of(plan.table.axes[entry.in_axis]),
            )
            for entry in plan.cuts
            if entry.in_axis is not None
        ]

    def compensate(self, keep: NDArray[np.bool_]) -> None:
        """Folds the removed channels into the kept columns of every consumer.

        Args:
            keep: `(n_channels + 1,)` boolean by flat channel number, as given to the cutter.
        """
        with torch.no_grad():
            for entry, weight, layer, gram, units in self._entries:
                kept_units = keep[units.sources]
                if kept_units.all():
                    continue
                device = weight.device
                kept = torch.from_numpy(np.flatnonzero(kept_units)).to(device)
                removed = torch.from_numpy(np.flatnonzero(~kept_units)).to(device)
                rows = weight
                if entry.out_axis is not None:
                    out = self._axes[entry.out_axis].kept(keep)
                    rows = weight[torch.from_numpy(out).to(device)]
                matrix = units.gather(rows)
                mixing = fold(gram, kept, removed, self._ridge).to(matrix.dtype)
                n_out, _, rest = matrix.shape
                gone = matrix[:, removed].transpose(1, 2).reshape(-1, len(removed))
                added = (gone @ mixing).reshape(n_out, rest, len(kept)).transpose(1, 2)
                columns = matrix[:, kept] + added
                layer.weight.data = self._restore(columns, units.order[kept_units], layer.weight)

    @staticmethod
    def _restore(columns: Tensor, order: NDArray[np.int64], like: Tensor) -> Tensor:
        """Puts `(out, kept units, rest)` back into the shape and index order of a weight."""
        if order.shape[1] > 1:
            # Indices of kept units, in the order in which they stand in the narrowed weight.
            position = np.argsort(order.ravel(), kind="stable")
            flat = columns.reshape(len(like), order.size, -1)
            columns = flat[:, torch.from_numpy(position).to(flat.device)]
        return columns.reshape(like.shape)
