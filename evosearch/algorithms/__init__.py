"""Algorithms by name, all behind one ask/tell interface; pymoo waits until one is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import evolution
from evosearch.algorithms.base import Algorithm, Population
from evosearch.algorithms.baselines import FixedSequence, RandomSearch
from evosearch.algorithms.seeding import initial_population
from evosearch.errors import ConfigError
from evosearch.space import SearchSpace

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmSettings", "Population", "make_algorithm"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """How to search.

    Args:
        name: A name from ALGORITHMS.
        population: Genomes per generation.
        seed: Of everything random.
        seed_share: Share of the first population that uniform ratios may fill.
        options: Options of the algorithm; unknown ones are refused.
    """

    name: str
    population: int
    seed: int
    seed_share: float = 0.5
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named algorithm.

    Args:
        title: One line for people.
        make: Makes it from settings, space, numbers of objectives and constraints, seed genomes.
        options: Its options, a dataclass; None if it has none.
        min_population: Fewest members it works with.
        single_objective: Whether it takes exactly one objective.
    """

    title: str
    make: Callable[[AlgorithmSettings, SearchSpace, int, int, FloatArray], Algorithm]
    options: type | None = None
    min_population: int = 1
    single_objective: bool = False


def _options(entry: Entry, given: Mapping[str, Any], name: str) -> Any:
    known = [f.name for f in fields(entry.options)] if entry.options else []
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"search.options.{key}: unknown for {name}; it has {', '.join(known) or 'none'}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"search.options.{key} must be a number, got {value!r}")
    return entry.options(**given) if entry.options else None


def _initial(settings: AlgorithmSettings, space: SearchSpace, seeds: FloatArray) -> FloatArray:
    return initial_population(
        space,
        settings.population,
        settings.seed,
        seeds=seeds,
        seed_share=settings.seed_share,
    )


def _evolution(
    factory: Callable[[FloatArray, Any], Any],
    settings: AlgorithmSettings,
    space: SearchSpace,
    n_objectives: int,
    n_constraints: int,
    seeds: FloatArray,
) -> Algorithm:
    options = _options(ALGORITHMS[settings.name], settings.options, settings.name)
    return evolution.Evolution(
        lambda initial: factory(initial, options),
        _initial(settings, space, seeds),
        n_objectives,
        n_constraints,
        settings.seed,
    )


def _random(
    settings: AlgorithmSettings,
    space: SearchSpace,
    n_objectives: int,
    n_constraints: int,
    seeds: FloatArray,
) -> Algorithm:
    initial = _initial(settings, space, seeds)
    return RandomSearch(initial, settings.seed, n_objectives, n_constraints)


def _uniform(
    settings: AlgorithmSettings,
    space: SearchSpace,
    n_objectives: int,
    n_constraints: int,
    _seeds: FloatArray,
) -> Algorithm:
    return FixedSequence(space.ladder(10**6), settings.population, n_objectives, n_constraints)


ALGORITHMS: dict[str, Entry] = {
    "de": Entry(
        title="differential evolution, one objective under constraints",
        make=partial(_evolution, evolution.de),
        options=evolution.DifferentialOptions,
        min_population=4,
        single_objective=True,
    ),
    "nsga2": Entry(
        title="NSGA-II, several objectives",
        make=partial(_evolution, evolution.nsga2),
        options=evolution.GeneticOptions,
        min_population=2,
    ),
    "gde3": Entry(
        title="GDE3: differential evolution for several objectives",
        make=partial(_evolution, evolution.gde3),
        options=evolution.DifferentialOptions,
        min_population=4,
    ),
    "nsde": Entry(
        title="NSGA-II with offspring by differential evolution",
        make=partial(_evolution, evolution.nsde),
        options=evolution.DifferentialOptions,
        min_population=4,
    ),
    "random": Entry(title="random genomes after the same first population", make=_random),
    "uniform": Entry(title="the ladder of uniform ratios", make=_uniform),
}


def make_algorithm(
    settings: AlgorithmSettings,
    space: SearchSpace,
    n_objectives: int,
    n_constraints: int,
    seeds: FloatArray | None = None,
) -> Algorithm:
    """Makes an algorithm.

    Args:
        settings: Name and settings.
        space: What genomes mean.
        n_objectives: Numbers it will be told per genome.
        n_constraints: Likewise.
        seeds: `(m, n_genes)` put into the first population before everything else.

    Raises:
        ConfigError: No such algorithm, too small a population, an unknown option, or several
            objectives for an algorithm of one.
    """
    name = settings.name
    if name not in ALGORITHMS:
        raise ConfigError(f"search.algorithm: no {name!r}; there are {', '.join(ALGORITHMS)}")
    entry = ALGORITHMS[name]
    if settings.population < entry.min_population:
        raise ConfigError(
            f"search.population must be at least {entry.min_population} for {name}, "
            f"got {settings.population}"
        )
    if entry.single_objective and n_objectives != 1:
        several = ", ".join(k for k, e in ALGORITHMS.items() if not e.single_objective)
        raise ConfigError(
            f"search.algorithm {name} takes one objective, got {n_objectives}; keep one and put "
            f"the others into search.constraints, or use {several}"
        )
    _options(entry, settings.options, name)
    if seeds is None:
        seeds = np.empty((0, space.n_genes))
    return entry.make(settings, space, n_objectives, n_constraints, seeds)
