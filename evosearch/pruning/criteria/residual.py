"""Greedy removal by what the consumers of a group lose, one channel after another.

What is lost depends on what is made up for: by least-squares compensation all that the remaining
channels can tell, by recalibrated batch norm the mean.

References:
    [Hassibi1993] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal
        Brain Surgeon", NIPS 1992: eliminating one variable of a least-squares problem.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evosearch.pruning.criteria.view import GroupView

__all__ = ["output_variance", "residual_energy"]

# Steps whose changes to the matrices are made together, as one product.
_BLOCK = 64
# Energies this near to each other, as a share, are equal.
_EQUAL = 1e-7
# Of moments, as a share.
_ROUNDING = 1e-6


class _Elimination:
    """Least squares of one consumer while its input channels are removed, one after another.

    Two symmetric matrices over the channels that are left say all: P, the inverse of their second
    moments, and M = W^T W of the weights as compensated so far. To remove channel j, with
    p = P_:j / P_jj, is P -= P_jj p p^T and W -= W_j p^T, so M -= v p^T + p v^T with
    v = M_:j - M_jj p / 2. Diagonals follow at once; of the rest only a column is needed at a time,
    so changes are kept and made to the whole matrices a block at a time.

    Args:
        inverse: `(n, n)` float64, P with all channels.
        products: `(n, n)` float64, M.
    """

    def __init__(self, inverse: Tensor, products: Tensor) -> None:
        self._inverse, self._products = inverse, products
        self._start()

    def _start(self) -> None:
        n = len(self._inverse)
        self._steps = 0
        self._pivots, self._halves = (self._inverse.new_empty(n, _BLOCK) for _ in range(2))
        self._scales = self._inverse.new_empty(_BLOCK)
        self._diagonals = torch.stack([self._products.diagonal(), self._inverse.diagonal()])

    @property
    def energy(self) -> Tensor:
        """`(n,)` what the removal of each channel that is left would add to the output error."""
        return self._diagonals[0] / self._diagonals[1]

    def remove(self, j: int) -> None:
        """Removes the channel at place j among those that were left when the block began."""
        done = self._steps
        pivots, halves = self._pivots[:, :done], self._halves[:, :done]
        column = self._inverse[:, j] - pivots @ (self._scales[:done] * pivots[j])
        products = self._products[:, j] - halves @ pivots[j] - pivots @ halves[j]
        pivot = column / column[j]
        half = products - products[j] / 2 * pivot
        self._diagonals[0].addcmul_(half, pivot, value=-2)
        self._diagonals[1].addcmul_(column, pivot, value=-1)
        self._pivots[:, done], self._halves[:, done] = pivot, half
        self._scales[done] = column[j]
        self._steps += 1

    def keep(self, left: Tensor) -> None:
        """Ends a block: brings the matrices up to date for the places that are left."""
        pivots, halves = self._pivots[left, : self._steps], self._halves[left, : self._steps]
        self._inverse = self._inverse[left][:, left]
        self._inverse.addmm_(pivots * self._scales[: self._steps], pivots.T, alpha=-1)
        self._products = self._products[left][:, left]
        self._products.addmm_(halves, pivots.T, alpha=-1).addmm_(pivots, halves.T, alpha=-1)
        self._start()


class _JointElimination:
    """The same where so many channels in a row can only go together.

    To remove channels b, with K = P_bb^-1 P_b:, is P -= P_:b K and W -= W_b K. There are fewer
    steps, and each changes the matrices by as many products as it removes channels.

    Args:
        inverse: `(n, n)` float64, P with all channels.
        products: `(n, n)` float64, M = W^T W.
        size: How many go together.
    """

    def __init__(self, inverse: Tensor, products: Tensor, size: int) -> None:
        self._inverse, self._products, self._size = inverse, products, size

    @property
    def energy(self) -> Tensor:
        """`(n / size,)` what removing each of those that are left would add: tr P_bb^-1 M_bb."""
        inverse, products = (
            torch.stack(
                [m[b : b + self._size, b : b + self._size] for b in range(0, len(m), self._size)]
            )
            for m in (self._inverse, self._products)
        )
        solved = torch.linalg.solve(inverse, products)
        energy: Tensor = solved.diagonal(dim1=1, dim2=2).sum(dim=1)
        return energy

    def remove(self, j: int) -> None:
        """Removes the j-th `size` of those that are left."""
        gone = torch.zeros(len(self._inverse), dtype=torch.bool)
        gone[j * self._size : (j + 1) * self._size] = True
        inverse, products = self._inverse, self._products
        mixing = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, ~gone])
        crossed = products[~gone][:, gone] @ mixing
        within = mixing.T @ products[gone][:, gone] @ mixing
        self._inverse = inverse[~gone][:, ~gone] - inverse[~gone][:, gone] @ mixing
        self._products = products[~gone][:, ~gone] - crossed - crossed.T + within


def _least(energy: Tensor, gone: Tensor, rounding: float = 0.0) -> int:
    """Which of those that are left has the least energy; of equals the last.

    So it is for all criteria, and which of two channels that do the same goes is not to hang on
    the last bits of sums, which differ between machines.
    """
    left = energy.masked_fill(gone, torch.inf)
    least = float(left.min())
    return int((left <= least + max(_EQUAL * abs(least), rounding)).nonzero()[-1])


def residual_energy(view: GroupView) -> Tensor:
    """Order of greedy removal by compensated residual energy of the consumers.

    Removing input channel j of a least-squares-compensated consumer, with P = G_kk^-1 and W the
    compensated weights so far, adds ||W_j||^2 / P_jj to the energy of its output error; then
    W_k -= W_j P_jk / P_jj and P -= P_:j P_j: / P_jj [Hassibi1993]. The channel that adds least,
    summed over the consumers whatever the coupling rule, goes first. Channels that can only go
    together do so.

    Returns:
        `(n_channels,)` the step at which each channel was removed: 0 is the least important. NaN
        if weights or moments are not finite.
    """
    n, size = view.group.channels, view.group.granularity
    pairs = []
    for consumer in view.consumers:
        assert consumer.gram is not None  # noqa: S101  channel_scores provides what is needed
        if not (torch.isfinite(consumer.gram).all() and torch.isfinite(consumer.weight).all()):
            return torch.full((n,), torch.nan)
        if "inverse" not in consumer.derived:
            consumer.derived["inverse"] = _loaded_inverse(consumer.gram)
        inverse, columns = consumer.derived["inverse"], consumer.columns
        weight = consumer.weight[:, columns].transpose(1, 2).reshape(-1, n)
        pairs.append((inverse[columns][:, columns], weight.T @ weight))
    if size > 1:
        return _joint_order([_JointElimination(*pair, size) for pair in pairs], n // size, size)
    return _order([_Elimination(*pair) for pair in pairs], n)


def _order(consumers: Sequence[_Elimination], n: int) -> Tensor:
    """`(n,)` steps at which channels were removed."""
    step = torch.zeros(n, dtype=torch.float64)
    left = torch.arange(n)
    for first in range(0, n, _BLOCK):
        gone = torch.zeros(len(left), dtype=torch.bool)
        for removed in range(first, min(first + _BLOCK, n)):
            energy = torch.zeros(len(left), dtype=torch.float64)
            for elimination in consumers:
                energy += elimination.energy
            if not torch.isfinite(energy[~gone]).all():
                return torch.full((n,), torch.nan)
            j = _least(energy, gone)
            step[left[j]] = removed
            gone[j] = True
            for elimination in consumers:
                elimination.remove(j)
        for elimination in consumers:
            elimination.keep(~gone)
        left = left[~gone]
    return step


def _joint_order(consumers: Sequence[_JointElimination], n: int, size: int) -> Tensor:
    """`(n * size,)` steps at which so many channels each were removed."""
    step = torch.zeros(n, dtype=torch.float64)
    left = list(range(n))
    for removed in range(n):
        energy = torch.stack([consumer.energy for consumer in consumers]).sum(dim=0)
        if not torch.isfinite(energy).all():
            return torch.full((n * size,), torch.nan)
        j = _least(energy, torch.zeros(len(left), dtype=torch.bool))
        step[left.pop(j)] = removed
        for consumer in consumers:
            consumer.remove(j)
    return step.repeat_interleave(size)


def _loaded_inverse(gram: Tensor) -> Tensor:
    """Of second moments, whose diagonal is loaded to be one."""
    load = max(1e-4 * float(gram.diagonal().mean()), 1e-12)
    inverse: Tensor = torch.linalg.inv(gram + load * torch.eye(len(gram), dtype=torch.float64))
    return inverse


def output_variance(view: GroupView) -> Tensor:
    """Order of greedy removal by the variance that the consumers' outputs lose.

    Without input channels S the output of a consumer lacks the sum of W_j x_j over S. Batch norm
    behind it, recalibrated, makes up for the mean of that sum, not for its variance, which is the
    sum of A_ij over S x S with A = (W^T W) * C, C being the covariance of the channels over images
    and positions, and positions of a kernel taken as independent. The channel that adds least,
    summed over the consumers whatever the coupling rule, goes first. Channels that can only go
    together do so.

    Returns:
        `(n_channels,)` the step at which each channel was removed: 0 is the least important. NaN
        if weights or moments are not finite.
    """
    n, size = view.group.channels, view.group.granularity
    shared = torch.zeros(n, n, dtype=torch.float64)
    rounding = 0.0
    for consumer, pooled in zip(view.consumers, view.seen("pooled"), strict=True):
        assert consumer.gram is not None  # noqa: S101  channel_scores provides what is needed
        columns, mean = consumer.columns, pooled.mean(dim=0)
        moments = consumer.gram[columns][:, columns]
        weight = consumer.weight[:, columns].transpose(1, 2).reshape(-1, n)
        products = weight.T @ weight
        shared += products * (moments - torch.outer(mean, mean))
        # Both are sums of single precision, and their difference may be small.
        rounding += _ROUNDING * float((products * moments).diagonal().max())
    if not torch.isfinite(shared).all():
        return torch.full((n,), torch.nan)
    n //= size
    shared, rounding = shared.reshape(n, size, n, size).sum(dim=(1, 3)), rounding * size
    step, gone = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
    added = shared.diagonal().clone()
    for removed in range(n):
        j = _least(added, gone, (1 + 2 * removed) * rounding)
        step[j] = removed
        gone[j] = True
        added += 2 * shared[:, j]
    return step.repeat_interleave(size)
