"""Compensated residual energy: which channels least-squares compensation can least make up for.

References:
    [Hassibi1993] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal
        Brain Surgeon", NIPS 1992: eliminating one variable of a least-squares problem.
"""

import torch
from torch import Tensor

from evosearch.pruning.criteria.view import GroupView

__all__ = ["residual_energy"]


def residual_energy(view: GroupView) -> Tensor:
    """Order of greedy removal by compensated residual energy of the consumers.

    Removing input channel j of a least-squares-compensated consumer, with P = G_kk^-1 and W the
    compensated weights so far, adds ||W_j||^2 / P_jj to the energy of its output error; then
    W_k -= W_j P_jk / P_jj and P -= P_:j P_j: / P_jj [Hassibi1993]. The channel that adds least,
    summed over the consumers whatever the coupling rule, goes first.

    Returns:
        `(n_channels,)` the step at which each channel was removed: 0 is the least important. NaN
        if weights or moments are not finite.
    """
    states = []
    for consumer in view.consumers:
        assert consumer.gram is not None  # noqa: S101  channel_scores provides what is needed
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
