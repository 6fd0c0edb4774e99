"""Algorithms by name, all behind one ask/tell interface; pymoo waits until one is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import evolution
from evosearch.algorithms.adaptive import SelfAdaptive
from evosearch.algorithms.base import Algorithm, Population, Resumable, State
from evosearch.algorithms.baselines import FixedSequence, RandomSearch
from evosearch.algorithms.foresight import Foresight, Known, nothing_known
from evosearch.algorithms.seeding import initial_population
from evosearch.algorithms.sensitivity import SensitivityOptions, SensitivitySweep
from evosearch.algorithms.surrogate import SurrogateOptions, SurrogateSearch
from evosearch.algorithms.switching import LevelSwitching, SwitchingOptions
from evosearch.errors import ConfigError
from evosearch.space import SearchSpace

__all__ = [
    "ALGORITHMS",
    "RANKING",
    "SURROGATE",
    "UNSEEDED",
    "Algorithm",
    "AlgorithmSettings",
    "Foresight",
    "Known",
    "Population",
    "Resumable",
    "State",
    "make_algorithm",
    "ranked_count",
    "settled_algorithm",
    "settled_population",
]

FloatArray = NDArray[np.float64]

SURROGATE, RANKING = "surrogate", "ranking"
UNSEEDED = ("uniform", RANKING, "sensitivity")
"""Algorithms without a first population, whose asks follow from the space and the network."""
# What the benchmarks of search efficiency found best, and what is customary.
_FEW, _MANY = 8, 32
# 24 rungs of a ranking before the models were no better than 16, and 8 were worse.
_RANKED = 16


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """How to search.

    Args:
        name: A name from ALGORITHMS.
        population: Genomes per generation.
        seed: Of everything random.
        seed_share: Share of the first population that rankings and uniform ratios may fill.
        options: Options of the algorithm; unknown ones are refused.
    """

    name: str
    population: int
    seed: int
    seed_share: float = 0.5
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an algorithm is made for.

    Args:
        space: What genomes mean.
        n_objectives, n_constraints: Numbers it will be told per genome.
        foresight: What is known of policies without measuring them.
        seeds: `(m, n_genes)` put into the first population before everything else.
        ranked: `(m, n_genes)` that rankings of channels gave, the most telling first.
    """

    space: SearchSpace
    n_objectives: int
    n_constraints: int
    foresight: Foresight
    seeds: FloatArray
    ranked: FloatArray


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named algorithm.

    Args:
        title: One line for people.
        make: Makes it from settings, its own options, and the problem.
        options: Its options, a dataclass; None if it has none.
        min_population: Fewest members it works with.
        single_objective: Whether it takes exactly one objective.
    """

    title: str
    make: Callable[[AlgorithmSettings, Any, Problem], Algorithm]
    options: type | None = None
    min_population: int = 1
    single_objective: bool = False


def _options(entry: Entry, given: Mapping[str, Any], name: str) -> Any:
    known = {f.name: f.type for f in fields(entry.options)} if entry.options else {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"search.options.{key}: unknown for {name}; it has {', '.join(known) or 'none'}"
            )
        if known[key] is bool:
            if not isinstance(value, bool):
                raise ConfigError(f"search.options.{key} must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"search.options.{key} must be a number, got {value!r}")
        elif known[key] is int and value % 1 != 0:
            raise ConfigError(f"search.options.{key} must be a whole number, got {value!r}")
    return entry.options(**given) if entry.options else None


def _initial(
    settings: AlgorithmSettings, problem: Problem, ranked: FloatArray | None = None
) -> FloatArray:
    return initial_population(
        problem.space,
        settings.population,
        settings.seed,
        seeds=problem.seeds,
        ranked=problem.ranked if ranked is None else ranked,
        seed_share=settings.seed_share,
    )


def _evolution(
    factory: Callable[[FloatArray, Any], Any],
    settings: AlgorithmSettings,
    options: Any,
    problem: Problem,
) -> Algorithm:
    return evolution.Evolution(
        lambda initial: factory(initial, options),
        _initial(settings, problem),
        problem.n_objectives,
        problem.n_constraints,
        settings.seed,
    )


def _differential(
    factory: Callable[[FloatArray, evolution.DifferentialOptions], Any],
    settings: AlgorithmSettings,
    options: evolution.AdaptiveOptions,
    problem: Problem,
) -> Algorithm:
    if not options.adaptive:
        return _evolution(factory, settings, options, problem)
    return SelfAdaptive(
        _initial(settings, problem),
        problem.n_objectives,
        problem.n_constraints,
        settings.seed,
        f=options.f,
        cr=options.cr,
    )


def _level_switch(
    settings: AlgorithmSettings, options: SwitchingOptions, problem: Problem
) -> Algorithm:
    return LevelSwitching(
        _initial(settings, problem),
        problem.space,
        problem.foresight,
        problem.n_objectives,
        problem.n_constraints,
        settings.seed,
        options,
    )


def _surrogate(
    settings: AlgorithmSettings, options: SurrogateOptions, problem: Problem
) -> Algorithm:
    # Its models learn most from what is spread widely, so rankings come besides.
    return SurrogateSearch(
        [problem.ranked, _initial(settings, problem, problem.ranked[:0])],
        problem.space,
        problem.foresight,
        problem.n_objectives,
        problem.n_constraints,
        settings.seed,
        options,
    )


def _sensitivity(
    settings: AlgorithmSettings, options: SensitivityOptions, problem: Problem
) -> Algorithm:
    return SensitivitySweep(
        settings.population,
        problem.space,
        problem.foresight,
        problem.n_objectives,
        problem.n_constraints,
        options,
    )


def _random(settings: AlgorithmSettings, _options: None, problem: Problem) -> Algorithm:
    initial = _initial(settings, problem)
    return RandomSearch(initial, settings.seed, problem.n_objectives, problem.n_constraints)


def _uniform(settings: AlgorithmSettings, _options: None, problem: Problem) -> Algorithm:
    return _sequence(problem.space.ladder(10**6), settings, problem)


def _ranking(settings: AlgorithmSettings, _options: None, problem: Problem) -> Algorithm:
    return _sequence(problem.ranked, settings, problem)


def _sequence(genomes: FloatArray, settings: AlgorithmSettings, problem: Problem) -> Algorithm:
    return FixedSequence(genomes, settings.population, problem.n_objectives, problem.n_constraints)


ALGORITHMS: dict[str, Entry] = {
    "de": Entry(
        title="differential evolution, one objective under constraints",
        make=partial(_differential, evolution.de),
        options=evolution.AdaptiveOptions,
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
        make=partial(_differential, evolution.gde3),
        options=evolution.AdaptiveOptions,
        min_population=4,
    ),
    "nsde": Entry(
        title="NSGA-II with offspring by differential evolution",
        make=partial(_evolution, evolution.nsde),
        options=evolution.DifferentialOptions,
        min_population=4,
    ),
    "level-switch": Entry(
        title="elitist evolution by level switches that keep a budget, and steps",
        make=_level_switch,
        options=SwitchingOptions,
        min_population=2,
    ),
    SURROGATE: Entry(
        title="level switches and steps, pre-screened by Gaussian processes",
        make=_surrogate,
        options=SurrogateOptions,
        min_population=2,
    ),
    "random": Entry(title="random genomes after the same first population", make=_random),
    "uniform": Entry(title="the ladder of uniform ratios", make=_uniform),
    RANKING: Entry(
        title="one threshold on a score of all channels: global pruning, no evolution",
        make=_ranking,
    ),
    "sensitivity": Entry(
        title="each gene alone, then a ladder from what that costs: no evolution",
        make=_sensitivity,
        options=SensitivityOptions,
    ),
}


def settled_algorithm(wish: str | None, space: SearchSpace) -> str:
    """The name itself; if None, of the algorithm that needs fewest evaluations in such a space."""
    if wish is not None:
        return wish
    return SURROGATE if hasattr(space, "levels") else "nsga2"


def settled_population(wish: int | None, name: str, workers: int) -> int:
    """The number itself; if None, one that suits the algorithm and keeps all workers busy.

    Args:
        wish: What is asked for.
        name: Of the algorithm.
        workers: Scorers at work.
    """
    if wish is not None:
        return wish
    # It learns from every answer before it asks again.
    return max(_FEW, workers) if name == SURROGATE else _MANY


def ranked_count(settings: AlgorithmSettings) -> int | None:
    """How many genomes of rankings an algorithm makes use of; None for all that there are."""
    if settings.name == RANKING:
        return None
    if settings.name in UNSEEDED:
        return 0
    if settings.name == SURROGATE:
        return _RANKED
    return int(settings.population * settings.seed_share)


def make_algorithm(
    settings: AlgorithmSettings,
    space: SearchSpace,
    n_objectives: int,
    n_constraints: int,
    seeds: FloatArray | None = None,
    foresight: Foresight | None = None,
    ranked: FloatArray | None = None,
) -> Algorithm:
    """Makes an algorithm.

    Args:
        settings: Name and settings.
        space: What genomes mean.
        n_objectives: Numbers it will be told per genome.
        n_constraints: Likewise.
        seeds: `(m, n_genes)` put into the first population before everything else.
        foresight: What is known of policies without measuring them; None if nothing is.
        ranked: `(m, n_genes)` that rankings of channels gave, the most telling first.

    Raises:
        ConfigError: No such algorithm, too small a population, an unknown option, several
            objectives for an algorithm of one, or a space that the algorithm cannot move in.
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
    options = _options(entry, settings.options, name)
    nothing = np.empty((0, space.n_genes))
    problem = Problem(
        space=space,
        n_objectives=n_objectives,
        n_constraints=n_constraints,
        foresight=foresight or nothing_known(n_objectives, n_constraints),
        seeds=nothing if seeds is None else seeds,
        ranked=nothing if ranked is None else ranked,
    )
    return entry.make(settings, options, problem)
