"""Every shipped algorithm keeps the promises of its role, on the genes of a real network."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from evosearch.algorithms import (
    ALGORITHMS,
    UNSEEDED,
    Algorithm,
    AlgorithmSettings,
    Resumable,
    make_algorithm,
    ranked_count,
)
from evosearch.errors import ConfigError
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.criteria import channel_scores
from evosearch.pruning.groups import trace
from evosearch.pruning.ranking import importance, savings, thresholds
from evosearch.space import SearchSpace, make_space
from evosearch.testing import AlgorithmContract

FloatArray = NDArray[np.float64]


@cache
def space() -> SearchSpace:
    table = trace(load_network(NetworkSpec(name="resnet20"))).table
    return make_space("layer-sparsity", table, {})


@cache
def ranked() -> FloatArray:
    """Rungs of the ranking of all channels by the norm of their filters."""
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network)
    scores = channel_scores(network.module, plan, ["l2"])[0]
    path = thresholds(importance(scores, plan.table), plan.table, savings(plan.table), 1.0)
    return np.array([space().encode(Policy(tuple(row))) for row in path[::2].tolist()])


def build(name: str, population: int, seed: int = 1, constraints: int = 2) -> Algorithm:
    objectives = 1 if ALGORITHMS[name].single_objective else 2
    settings = AlgorithmSettings(name=name, population=population, seed=seed, options={})
    known = ranked()[: ranked_count(settings)]
    return make_algorithm(settings, space(), objectives, constraints, ranked=known)


@pytest.mark.parametrize("name", ALGORITHMS)
class TestAlgorithms(AlgorithmContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.name = name
        self.n_genes = space().n_genes
        self.n_objectives = 1 if ALGORITHMS[name].single_objective else 2
        self.seeded = name not in UNSEEDED

    def make(self, seed: int) -> Algorithm:
        return build(self.name, 8, seed, self.n_constraints)

    def test_it_can_write_down_what_it_remembers(self) -> None:
        assert isinstance(self.make(1), Resumable)

    def test_there_is_nothing_to_write_down_before_the_first_tell(self) -> None:
        algorithm = self.make(1)
        assert isinstance(algorithm, Resumable)
        algorithm.ask()
        with pytest.raises(RuntimeError, match="before the first tell"):
            algorithm.state()

    def test_it_works_with_the_smallest_population(self) -> None:
        algorithm = build(self.name, ALGORITHMS[self.name].min_population)
        assert len(self._converse(algorithm)) >= 6

    def test_a_smaller_population_is_refused(self) -> None:
        least = ALGORITHMS[self.name].min_population
        with pytest.raises(
            ConfigError, match=rf"at least {least} for {self.name}, got {least - 1}"
        ):
            build(self.name, least - 1)

    def test_the_best_feasible_value_is_never_lost(self) -> None:
        best = np.full(self.n_objectives, np.inf)
        for exchange in self._converse(self.make(5)):
            feasible = (exchange.violations <= 0).all(axis=1)
            best = np.minimum(best, exchange.objectives[feasible].min(axis=0, initial=np.inf))
            members = exchange.population
            kept = members.objectives[(members.violations <= 0).all(axis=1)]
            assert np.array_equal(kept.min(axis=0, initial=np.inf), best)


@pytest.mark.parametrize("name", ["de", "gde3"])
class TestSelfAdaptive(AlgorithmContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.name = name
        self.n_objectives = 1 if ALGORITHMS[name].single_objective else 2
        self.n_genes = space().n_genes

    def make(self, seed: int) -> Algorithm:
        settings = AlgorithmSettings(
            name=self.name, population=8, seed=seed, options={"adaptive": True}
        )
        return make_algorithm(settings, space(), self.n_objectives, self.n_constraints)


def test_seed_genomes_come_first_in_the_first_ask() -> None:
    seeds = np.random.default_rng(0).random((3, space().n_genes))
    for name in ("nsga2", "gde3", "nsde", "level-switch", "surrogate", "random"):
        settings = AlgorithmSettings(name=name, population=8, seed=1, options={})
        asked = make_algorithm(settings, space(), 2, 1, seeds).ask()
        assert asked is not None
        assert np.array_equal(asked[:3], seeds)


@pytest.mark.parametrize("name", ["nsga2", "gde3", "nsde", "level-switch", "random"])
def test_rankings_fill_their_share_of_the_first_population(name: str) -> None:
    asked = build(name, 8).ask()
    assert asked is not None
    assert np.array_equal(asked[:4], ranked()[:4])
    settings = AlgorithmSettings(name=name, population=8, seed=1, options={})
    few = make_algorithm(settings, space(), 2, 1, ranked=ranked()[5:6]).ask()
    assert few is not None
    assert np.array_equal(few[:4], [ranked()[5], *space().ladder(3)])


def test_surrogate_asks_for_rankings_and_then_for_a_first_population_without_them() -> None:
    settings = AlgorithmSettings(name="surrogate", population=8, seed=1, options={})
    with_them = make_algorithm(settings, space(), 2, 1, ranked=ranked()[:8])
    first = with_them.ask()
    assert np.array_equal(first, ranked()[:8])
    with_them.tell(np.zeros((8, 2)), np.zeros((8, 1)))
    plain = make_algorithm(settings, space(), 2, 1).ask()
    assert np.array_equal(with_them.ask(), plain)


def test_ranking_asks_for_its_rungs_and_then_for_nothing() -> None:
    algorithm = build("ranking", 16)
    parts = []
    while (genomes := algorithm.ask()) is not None:
        parts.append(genomes)
        algorithm.tell(np.zeros((len(genomes), 2)), np.zeros((len(genomes), 2)))
    assert np.array_equal(np.concatenate(parts), ranked())


def test_the_first_population_holds_no_policy_twice() -> None:
    asked = build("nsga2", 48).ask()
    assert asked is not None
    assert len(set(space().decode(asked))) == len(asked) == 48


def test_uniform_asks_for_the_ladder_and_then_for_nothing() -> None:
    algorithm = build("uniform", 16)
    parts = []
    while (genomes := algorithm.ask()) is not None:
        parts.append(genomes)
        algorithm.tell(np.zeros((len(genomes), 2)), np.zeros((len(genomes), 2)))
    assert np.array_equal(np.concatenate(parts), space().ladder(10**6))


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    settings = AlgorithmSettings(name="pso", population=8, seed=1, options={})
    with pytest.raises(ConfigError, match=r"no 'pso'; there are de, nsga2, gde3, nsde, level-"):
        make_algorithm(settings, space(), 2, 1)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    settings = AlgorithmSettings(name="gde3", population=8, seed=1, options={"CR": 0.9})
    with pytest.raises(
        ConfigError, match=r"search\.options\.CR: unknown for gde3; it has f, cr, ad"
    ):
        make_algorithm(settings, space(), 2, 1)


@pytest.mark.parametrize("value", [True, "0.9", -0.1, None])
def test_an_option_that_is_no_number_is_refused(value: object) -> None:
    settings = AlgorithmSettings(name="gde3", population=8, seed=1, options={"cr": value})
    with pytest.raises(ConfigError, match=r"search\.options\.cr must (be a number|lie in)"):
        make_algorithm(settings, space(), 2, 1)


def test_differential_evolution_refuses_a_second_objective() -> None:
    settings = AlgorithmSettings(name="de", population=8, seed=1, options={})
    with pytest.raises(ConfigError, match=r"takes one objective, got 2; .* or use nsga2, gde3"):
        make_algorithm(settings, space(), 2, 1)
