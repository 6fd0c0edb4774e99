"""What algorithms may know of a policy before it is measured: costs exactly, losses by guess."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.pareto import total_violation
from evosearch.policy import Policy

__all__ = ["Foresight", "Known", "nothing_known"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is known of n policies without measuring them.

    Args:
        objectives: `(n, n_objectives)`, as they would be told; NaN where only measuring tells.
        violations: `(n, n_constraints)`, likewise.
        cost: `(n,)`, positive: what a policy costs, in any unit.
        loss: `(n,)` from 0 for the dense network to 1: how much a policy loses, by a guess that
            costs nothing. It need only be more for what loses more. None without such a guess.
    """

    objectives: FloatArray
    violations: FloatArray
    cost: FloatArray
    loss: FloatArray | None = None

    @property
    def affordable(self) -> BoolArray:
        """`(n,)`: whether all constraints hold that can be known."""
        return np.asarray(total_violation(np.nan_to_num(self.violations, nan=0.0)) <= 0)


Foresight = Callable[[Sequence[Policy]], Known]


def nothing_known(n_objectives: int, n_constraints: int) -> Foresight:
    """Everything must be measured; the number of kept channels stands for the cost."""

    def foresee(policies: Sequence[Policy]) -> Known:
        n = len(policies)
        return Known(
            objectives=np.full((n, n_objectives), np.nan),
            violations=np.full((n, n_constraints), np.nan),
            cost=np.array([sum(policy.keep) for policy in policies], dtype=np.float64),
        )

    return foresee
