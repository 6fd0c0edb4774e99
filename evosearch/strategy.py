"""Who asks: the algorithm that a recipe names, what it knows before measuring, what it begins with.

Nothing here needs a network: the costs of its groups are enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import (
    Algorithm,
    AlgorithmSettings,
    Foresight,
    Known,
    make_algorithm,
    settled_algorithm,
    settled_population,
)
from evosearch.policy import Policy, widths_of
from evosearch.pruning.table import GroupTable
from evosearch.recipe import Recipe
from evosearch.scoring.objectives import Constraint, Goals
from evosearch.space import SearchSpace

__all__ = [
    "Beginning",
    "algorithm_of",
    "algorithm_settings",
    "foresight_of",
    "goals_of",
    "wants_latency",
]


def goals_of(recipe: Recipe) -> Goals:
    """Objectives and constraints."""
    return Goals(
        objectives=tuple(recipe.search.objectives),
        constraints=tuple(Constraint.parse(text) for text in recipe.search.constraints),
    )


def wants_latency(recipe: Recipe, goals: Goals) -> bool:
    """Whether an objective, a constraint or the budget of the space is a latency."""
    budget = recipe.space.get("project_onto")
    return "latency" in goals.names or (isinstance(budget, dict) and "latency" in budget)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a search knows before anything is measured.

    Args:
        seeds: Genomes that its first population should hold.
        ranked: Genomes that rankings of channels gave, the most telling first.
        losses: For each group, by the number of channels that it keeps, what it should lose.
    """

    seeds: Sequence[Sequence[float]] = ()
    ranked: Sequence[Sequence[float]] = ()
    losses: Sequence[Sequence[float]] = ()


def foresight_of(
    goals: Goals, table: GroupTable, losses: Sequence[Sequence[float]] = ()
) -> Foresight:
    """What is known before measuring: objectives and constraints that are costs; what is saved.

    That is latency where it is a goal, and MACs elsewhere.

    Args:
        goals: The objectives and constraints.
        table: Knows the costs.
        losses: For each group, by the number of channels that it keeps, what it should lose.
    """
    saved = "latency" if "latency" in goals.names else "macs"
    guesses = [np.array(group, dtype=np.float64) for group in losses]

    def foresee(policies: Sequence[Policy]) -> Known:
        shares = table.shares_of(policies)
        unknown = np.full(len(policies), np.nan)
        objectives = [shares.get(name, unknown) for name in goals.objectives]
        violations = [shares.get(c.name, unknown) / c.bound - 1 for c in goals.constraints]
        # Like the last violation, which tells failures, only measuring tells.
        return Known(
            objectives=np.stack(objectives, axis=1),
            violations=np.stack([*violations, unknown], axis=1),
            cost=shares[saved],
            loss=guess(policies) if guesses else None,
        )

    def guess(policies: Sequence[Policy]) -> NDArray[np.float64]:
        keep = widths_of(policies, len(guesses))
        lost = [group[kept] for group, kept in zip(guesses, keep.T, strict=True)]
        return np.asarray(np.sum(lost, axis=0))

    return foresee


def algorithm_of(
    recipe: Recipe,
    space: SearchSpace,
    goals: Goals,
    table: GroupTable,
    beginning: Beginning | None = None,
) -> Algorithm:
    """The recipe's algorithm; one constraint more than named, for failures."""
    settings, begins = algorithm_settings(recipe, space), beginning or Beginning()
    seeds, ranked = (
        np.array(genomes, dtype=np.float64).reshape(-1, space.n_genes)
        for genomes in (begins.seeds, begins.ranked)
    )
    return make_algorithm(
        settings,
        space,
        len(goals.objectives),
        len(goals.constraints) + 1,
        seeds,
        foresight_of(goals, table, begins.losses),
        ranked,
    )


def algorithm_settings(recipe: Recipe, space: SearchSpace) -> AlgorithmSettings:
    """Of the recipe's algorithm, which may be left open."""
    search = recipe.search
    name = settled_algorithm(search.algorithm, space)
    return AlgorithmSettings(
        name=name,
        population=settled_population(search.population, name, recipe.run.workers),
        seed=search.seed,
        seed_share=search.seed_share,
        options=search.options,
    )
