"""What the weights alone foretell: predictors that see no image and run no network.

For each criterion that reads weights only, the share of its scores that a policy removes, averaged
over groups. With the squared norm of filters this is the data-free reconstruction loss: the energy
that removed filters had, were all their inputs alike.
"""

from collections.abc import Callable, Mapping

import numpy as np

from evosearch.policy import Policy
from evosearch.pruning.criteria import CRITERIA, applicable_criteria, channel_scores
from evosearch.scoring.workload import Workload

__all__ = ["free_predictors"]

# Norms to the power at which they add up.
_POWERS = {"l1": 1, "l2": 2, "bn-scale": 2}


def free_predictors(workload: Workload) -> Callable[[Policy], Mapping[str, float]]:
    """Makes the function from a policy to what it removes, by name of the criterion.

    Which channels go is decided by the workload's order, as in every proxy.
    """
    table, module = workload.plan.table, workload.network().module
    applicable = applicable_criteria(module, workload.plan)[0]
    names = [name for name in _POWERS if name in applicable and name in CRITERIA]
    scores = channel_scores(module, workload.plan, names)
    powers = np.array([_POWERS[name] for name in names])
    mass = np.abs(scores) ** powers[:, None]
    groups = [np.flatnonzero(table.group_of == group) for group in range(len(table.groups))]

    def lost(policy: Policy) -> Mapping[str, float]:
        shares = []
        for channels, kept in zip(groups, policy.keep, strict=True):
            gone = channels[workload.places[channels] >= kept]
            whole = mass[:, channels].sum(axis=1)
            # A group of nothing but zeros has nothing to lose.
            shares.append(mass[:, gone].sum(axis=1) / np.where(whole > 0, whole, 1.0))
        return dict(zip(names, np.mean(shares, axis=0).tolist(), strict=True))

    return lost
