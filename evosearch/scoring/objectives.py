"""Objectives and constraints by name: numbers of a measurement or of a policy's costs.

`error`, `loss`, `margin`, `divergence` and `distortion` are measured; `macs`, `params` and
`latency` are fractions of the dense network, known before anything is built. All are minimised.
Knows nothing of torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.measurement import METRICS

__all__ = ["COSTS", "Constraint", "Goals", "check_name", "reference_point", "worst_metrics"]

COSTS: dict[str, str] = {
    "macs": "multiply-accumulates, as a share of the dense network's",
    "params": "parameters, as a share of the dense network's",
    "latency": "time of a forward pass, as a share of the dense network's; foreseen from passes "
    "timed at launch (`[latency]`)",
}

FloatArray = NDArray[np.float64]
_CONSTRAINT = re.compile(r"\s*([a-z_]+)\s*<=\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """`name <= bound`."""

    name: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Reads `macs <= 0.5`.

        Raises:
            ConfigError: The text has another form, an unknown name or an impossible bound.
        """
        match = _CONSTRAINT.fullmatch(text)
        try:
            name, bound = match.group(1, 2) if match else ("", "")
            value = float(bound)
        except ValueError:
            raise ConfigError(
                f"constraint {text!r} must read like 'macs <= 0.5'; names are "
                f"{', '.join((*METRICS, *COSTS))}"
            ) from None
        check_name(name, f"constraint {text!r}")
        if value <= 0:
            raise ConfigError(f"constraint {text!r}: the bound must be positive")
        return cls(name=name, bound=value)

    def __str__(self) -> str:
        return f"{self.name} <= {self.bound:g}"


def check_name(name: str, where: str) -> None:
    """Checks the name of an objective.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in METRICS and name not in COSTS:
        raise ConfigError(f"{where}: unknown {name!r}; there are {', '.join((*METRICS, *COSTS))}")


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What a search minimises and what it must hold.

    Args:
        objectives: Names, at least one.
        constraints: All must hold.
    """

    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        for name in self.objectives:
            check_name(name, "search.objectives")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(
                f"search.objectives must name at least one, each once, got {self.objectives}"
            )

    @property
    def names(self) -> frozenset[str]:
        """Of all objectives and constraints."""
        return frozenset((*self.objectives, *(c.name for c in self.constraints)))

    @property
    def cost_constraints(self) -> tuple[Constraint, ...]:
        """Those that are decided before anything is measured."""
        return tuple(c for c in self.constraints if c.name in COSTS)

    def vector(self, values: Mapping[str, float]) -> FloatArray:
        """`(n_objectives,)` of one candidate."""
        return np.array([values[name] for name in self.objectives], dtype=np.float64)

    def violations(self, values: Mapping[str, float]) -> FloatArray:
        """`(n_constraints,)` relative excess over each bound, <= 0 holds; 1 for missing values."""
        return np.array(
            [values[c.name] / c.bound - 1 if c.name in values else 1.0 for c in self.constraints],
            dtype=np.float64,
        )

    def affordable(self, costs: Mapping[str, float]) -> bool:
        """Whether the costs alone leave every constraint satisfiable."""
        return all(costs[c.name] <= c.bound for c in self.cost_constraints)

    def check_reachable(self, lowest: Mapping[str, float], highest: Mapping[str, float]) -> None:
        """Checks that every cost constraint can be satisfied, one by one.

        Costs never fall when a group widens. So where the cheapest policy can be asked for, it is
        the cheapest in all costs, and constraints that hold one by one hold together.

        Raises:
            BudgetUnreachable: One cannot be satisfied; names the reachable range.
        """
        for constraint in self.cost_constraints:
            low, high = lowest[constraint.name], highest[constraint.name]
            if low > constraint.bound:
                raise BudgetUnreachable(
                    f"search.constraints: {constraint} is out of reach; within the bounds of the "
                    f"space {constraint.name} can be {low:.4f} to {high:.4f} of dense"
                )


def reference_point(objectives: Sequence[str], worst: Mapping[str, float]) -> FloatArray:
    """The fixed reference of the hypervolume: dense costs, and outputs that say nothing.

    Args:
        objectives: Names.
        worst: Per metric its value for uniform outputs; from `worst_metrics`.

    Returns:
        `(n_objectives,)`: 1 for costs.
    """
    return np.array([1.0 if name in COSTS else worst[name] for name in objectives])


def worst_metrics(dense_logits: NDArray[np.float32]) -> dict[str, float]:
    """Metrics of a network that gives every class the same probability.

    Args:
        dense_logits: `(n, n_classes)` outputs of the dense network.

    Returns:
        `error` 1 - 1/K, `loss` log K, `divergence` log K minus the mean entropy of the dense
        network's outputs, `distortion` 1: features of zeros.
    """
    logits = dense_logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    entropy = float(-(np.exp(log_p) * log_p).sum(axis=1).mean())
    classes = logits.shape[1]
    return {
        "error": 1 - 1 / classes,
        "loss": float(np.log(classes)),
        "margin": 1.0,
        "divergence": float(np.log(classes)) - entropy,
        "distortion": 1.0,
    }
