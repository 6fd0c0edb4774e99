"""What single algorithms promise beyond the contract: budgets kept, models that predict."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evosearch.algorithms import (
    ALGORITHMS,
    Algorithm,
    AlgorithmSettings,
    Foresight,
    Known,
    Population,
    make_algorithm,
)
from evosearch.algorithms.adaptive import SelfAdaptive
from evosearch.algorithms.baselines import RandomSearch
from evosearch.algorithms.evolution import Evolution, GeneticOptions, nsga2
from evosearch.algorithms.forecast import Forecaster, Told
from evosearch.algorithms.gaussian import GaussianProcess
from evosearch.algorithms.improvement import Improvement
from evosearch.algorithms.levels import LevelMoves, MoveOptions
from evosearch.algorithms.surrogate import SurrogateOptions, SurrogateSearch
from evosearch.algorithms.switching import LevelSwitching, SwitchingOptions
from evosearch.errors import ConfigError
from evosearch.pareto import hypervolume
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.space import SearchSpace, make_space
from evosearch.testing import chain_table

FloatArray = NDArray[np.float64]

WIDTHS = (16, 24, 32, 48, 64, 64, 96, 96)


@cache
def table() -> GroupTable:
    return chain_table(WIDTHS)


@cache
def space() -> SearchSpace:
    return make_space("layer-sparsity", table(), {})


def macs(policies: Sequence[Policy]) -> FloatArray:
    return np.asarray(table().costs_of(policies)[0] / table().dense_costs[0])


def damage(policies: Sequence[Policy], seed: int) -> FloatArray:
    """What pruning might do: convex in each group, unequal sensitivities, pairs that interact."""
    rng = np.random.default_rng(seed)
    n = len(WIDTHS)
    weights, powers = np.exp(rng.normal(-1, 1.2, n)), rng.uniform(1.5, 4, n)
    pairs = np.triu(rng.random((n, n)) < 0.3, 1) * np.sqrt(np.outer(weights, weights))
    gone = 1 - np.array([p.keep for p in policies]).reshape(-1, n) / np.array(WIDTHS)
    alone = (weights * gone**powers / (1.15 - gone)).sum(axis=1)
    together = np.einsum("ni,ij,nj->n", gone**2, pairs, gone**2)
    return np.asarray(3 * np.log1p((alone + together) / 2.5))


def foresight(policies: Sequence[Policy]) -> Known:
    unknown, cost = np.full(len(policies), np.nan), macs(policies)
    return Known(
        objectives=np.stack([unknown, cost], axis=1),
        violations=np.stack([cost / 0.8 - 1, unknown], axis=1),
        cost=cost,
    )


def guessing(policies: Sequence[Policy], seed: int) -> Known:
    """Knows losses, on another scale than the damage and wrong by a third."""
    narrowest = [space().cheapest()]
    lost, most = (np.expm1(damage(of, seed) / 3) for of in (policies, narrowest))
    wrong = np.exp(0.3 * np.sin([sum(policy.keep) for policy in policies]))
    return replace(foresight(policies), loss=np.asarray(0.7 * lost / most * wrong))


def make(
    name: str, seed: int = 0, population: int = 16, knows: Foresight = foresight, **options: object
) -> Algorithm:
    settings = AlgorithmSettings(name=name, population=population, seed=seed, options=options)
    return make_algorithm(settings, space(), 2, 2, foresight=knows)


def volume(name: str, seed: int, evaluations: int, **changes: Any) -> float:
    """Hypervolume after so many distinct policies."""
    algorithm, found = make(name, seed, **changes), dict[Policy, tuple[float, float]]()
    while len(found) < evaluations and (genomes := algorithm.ask()) is not None:
        policies = space().decode(genomes)
        told = np.stack([damage(policies, seed), macs(policies)], axis=1)
        for policy, row in zip(policies, told, strict=True):
            if len(found) < evaluations:
                found.setdefault(policy, (row[0], row[1]))
        algorithm.tell(told, np.zeros((len(told), 2)))
    return hypervolume(np.array(list(found.values())), np.array([2.3, 1.0]))


def moves(**changes: object) -> LevelMoves:
    return LevelMoves(space(), lambda p: foresight(p).cost, MoveOptions(**changes))


def some_levels(n: int = 64) -> NDArray[np.int64]:
    made = moves()
    return np.random.default_rng(0).integers(0, made.top + 1, size=(n, len(made.top)))


def test_a_switch_moves_genes_both_ways_and_keeps_the_budget() -> None:
    before = some_levels()
    after = moves().switch(before, np.random.default_rng(1))
    change = np.abs(moves().costs(after) / moves().costs(before) - 1)
    both_ways = (after > before).any(axis=1) & (after < before).any(axis=1)
    assert both_ways.mean() > 0.7
    assert np.median(change) < 0.02
    assert np.quantile(change, 0.9) < 0.1


def test_a_step_moves_few_genes_and_all_of_them_one_way() -> None:
    before = some_levels()
    moved = moves(flips=2).step(before, np.random.default_rng(1)) - before
    assert ((moved != 0).sum(axis=1) <= 2).all()
    assert not ((moved > 0).any(axis=1) & (moved < 0).any(axis=1)).any()
    assert (moved != 0).any(axis=1).mean() > 0.8


def test_moves_stay_within_the_levels() -> None:
    made, rng = moves(reach=1.0), np.random.default_rng(1)
    levels = some_levels()
    for _ in range(10):
        levels = made.step(made.switch(levels, rng), rng)
        assert (levels >= 0).all()
        assert (levels <= made.top).all()


def test_levels_and_genomes_are_inverse() -> None:
    assert np.array_equal(moves().indices(moves().genomes(some_levels())), some_levels())


class Unlevelled:
    """A space that knows nothing of levels."""

    def __init__(self) -> None:
        for name in ("decode", "encode", "ladder", "cheapest", "dearest", "n_genes", "gene_names"):
            setattr(self, name, getattr(space(), name))


@pytest.mark.parametrize("name", ["level-switch", "surrogate"])
def test_a_space_without_levels_is_refused(name: str) -> None:
    settings = AlgorithmSettings(name=name, population=8, seed=0, options={})
    unlevelled: SearchSpace = Unlevelled()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"moves by levels, and the space Unlevelled has none"):
        make_algorithm(settings, unlevelled, 2, 2)


def test_the_likelihoods_gradient_is_that_of_finite_differences() -> None:
    from scipy.optimize import check_grad

    rng = np.random.default_rng(0)
    points, values = rng.random((30, 4)), rng.normal(size=30)
    process = GaussianProcess(points, values)
    curves = 1 + points @ points.T

    def part(which: int):  # type: ignore[no-untyped-def]
        return lambda theta: process._negative_log_likelihood(theta, curves)[which]

    theta = rng.normal(size=7) / 3
    assert check_grad(part(0), part(1), theta) < 1e-3


def test_a_process_predicts_a_smooth_function_of_many_dimensions() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random(12)

    def smooth(x: FloatArray) -> FloatArray:
        return np.asarray((weights * x**2).sum(axis=1) + x[:, 0] * x[:, 1])

    points, others = rng.random((80, 12)), rng.random((50, 12))
    process = GaussianProcess(points, smooth(points))
    errors = process.mean(others) - smooth(others)
    assert np.sqrt((errors**2).mean()) < 0.1 * smooth(others).std()
    mean, covariance = process.mean_and_covariance(others)
    assert np.array_equal(mean, process.mean(others))
    assert np.linalg.eigvalsh(covariance).min() > -1e-6


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_improvement_is_the_difference_of_hypervolumes(n_objectives: int) -> None:
    rng = np.random.default_rng(0)
    # The origin and the far corner fix the scale; the far corner adds nothing.
    told = np.concatenate([rng.random((8, n_objectives)) + 0.1, np.full((1, n_objectives), 2.0)])
    improvement = Improvement(told, np.zeros((9, 1)))
    tried = rng.random((30, n_objectives)) + 0.1
    low, span = told.min(axis=0), np.ptp(told, axis=0) * 1.01
    tried = np.maximum(tried, low)

    def scaled_volume(points: FloatArray) -> float:
        return hypervolume((points - low) / span, np.ones(n_objectives))

    expected = [scaled_volume(np.concatenate([told, [p]])) - scaled_volume(told) for p in tried]
    assert np.allclose(improvement.of(tried), expected, atol=1e-12)
    improvement.add(tried[0])
    assert improvement.of(tried[:1])[0] == pytest.approx(0, abs=1e-12)


def test_forecasts_of_costs_are_exact_and_of_measurements_near() -> None:
    rng = np.random.default_rng(0)
    policies = space().decode(rng.random((60, len(WIDTHS))))
    told = np.stack([damage(policies, 1), macs(policies)], axis=1)
    forecaster = Forecaster(space(), foresight)
    violations = np.zeros((60, 2))
    forecaster.fit(Told(policies=policies[:50], objectives=told[:50], violations=violations[:50]))
    objectives, bounds = forecaster.expected(policies[50:])
    assert np.array_equal(objectives[:, 1], told[50:, 1])
    assert np.array_equal(bounds[:, 0], told[50:, 1] / 0.8 - 1)
    assert np.corrcoef(objectives[:, 0], told[50:, 0])[0, 1] > 0.9


def test_what_may_be_negative_is_modelled_as_it_is() -> None:
    policies = space().decode(np.random.default_rng(0).random((40, len(WIDTHS))))
    told = np.stack([damage(policies, 1) - 1, macs(policies)], axis=1)
    violations = np.stack([np.zeros(40), damage(policies, 2) - 2], axis=1)
    forecaster = Forecaster(space(), partial(guessing, seed=1))
    forecaster.fit(Told(policies=policies, objectives=told, violations=violations))
    objectives, bounds = forecaster.expected(policies)
    for found, real in ((objectives[:, 0], told[:, 0]), (bounds[:, 1], violations[:, 1])):
        assert real.min() < 0
        assert np.abs(found - real).max() < 0.1


def test_guessed_losses_are_worth_measurements() -> None:
    with_them, without = (
        [volume("surrogate", seed, 24, population=8, knows=knows(seed)) for seed in range(5)]
        for knows in (lambda seed: partial(guessing, seed=seed), lambda _: foresight)
    )
    assert np.mean(with_them) > np.mean(without) + 0.02


def test_a_surrogate_needs_fewer_evaluations_than_nsga2() -> None:
    ours = [volume("surrogate", seed, 80) for seed in range(3)]
    theirs = [volume("nsga2", seed, 240) for seed in range(3)]
    assert np.median(ours) > np.median(theirs)


def test_level_switches_find_more_than_random_genomes() -> None:
    ours = [volume("level-switch", seed, 160) for seed in range(3)]
    theirs = [volume("random", seed, 160) for seed in range(3)]
    assert np.median(ours) > np.median(theirs)


def test_a_surrogate_asks_for_nothing_that_costs_too_much() -> None:
    algorithm = make("surrogate")
    for generation in range(4):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = space().decode(genomes)
        if generation:
            assert (macs(policies) <= 0.8).all()
        told = np.stack([damage(policies, 1), macs(policies)], axis=1)
        algorithm.tell(told, np.stack([told[:, 1] / 0.8 - 1, np.zeros(len(told))], axis=1))


@pytest.mark.parametrize("knows", [foresight, partial(guessing, seed=1)], ids=["bare", "guessing"])
def test_a_surrogate_goes_on_when_everything_failed(knows: Foresight) -> None:
    algorithm = make("surrogate", knows=knows)
    for _ in range(3):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = space().decode(genomes)
        told = np.stack([np.full(len(policies), 2.3), macs(policies)], axis=1)
        algorithm.tell(told, np.stack([np.zeros(len(told)), np.full(len(told), 1e9)], axis=1))


def test_a_surrogate_asks_for_no_policy_twice() -> None:
    algorithm, asked = make("surrogate"), set[Policy]()
    for _ in range(4):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = space().decode(genomes)
        assert len(asked | set(policies)) == len(asked) + len(policies)
        asked.update(policies)
        told = np.stack([damage(policies, 1), macs(policies)], axis=1)
        algorithm.tell(told, np.zeros((len(told), 2)))


def test_self_adaptive_members_never_get_worse_and_their_parameters_stay_in_range() -> None:
    initial = np.random.default_rng(0).random((12, 5))
    algorithm = SelfAdaptive(initial, 1, 1, 3, f=0.5, cr=0.9)
    before = np.full(12, np.inf)
    for _ in range(40):
        genomes = algorithm.ask()
        assert ((genomes >= 0) & (genomes <= 1)).all()
        algorithm.tell(((genomes - 0.3) ** 2).sum(axis=1)[:, None], np.zeros((12, 1)))
        after = algorithm.population.objectives[:, 0]
        assert (after <= before).all()
        before = after
    assert before.max() < 0.01
    f, cr = algorithm._own.T
    assert len(np.unique(f)) > 1
    assert ((f >= 0.1) & (f <= 1)).all()
    assert ((cr >= 0) & (cr <= 1)).all()


@pytest.mark.parametrize("name", ["gde3", "de"])
def test_adaptive_is_true_or_false(name: str) -> None:
    settings = AlgorithmSettings(name=name, population=8, seed=0, options={"adaptive": 1})
    with pytest.raises(ConfigError, match=r"search\.options\.adaptive must be true or false"):
        make_algorithm(settings, space(), 1, 1)


@pytest.mark.parametrize("count", [1.5, float("nan"), float("inf")])
def test_a_count_is_a_whole_number(count: float) -> None:
    options = {"generations": count}
    settings = AlgorithmSettings(name="surrogate", population=8, seed=0, options=options)
    with pytest.raises(ConfigError, match=r"search\.options\.generations must be a whole number"):
        make_algorithm(settings, space(), 1, 1)


def test_the_sensitivity_sweep_cuts_the_insensitive_gene_first() -> None:
    algorithm = make("sensitivity", population=8)
    asked = []
    while (genomes := algorithm.ask()) is not None:
        asked.append(genomes)
        # Gene 4 costs next to nothing, the others a lot.
        price = np.where(np.arange(len(WIDTHS)) == 4, 0.001, 1.0)
        told = np.stack([genomes @ price, macs(space().decode(genomes))], axis=1)
        algorithm.tell(told, np.zeros((len(told), 2)))
    n_sweep = 1 + 3 * len(WIDTHS)
    ladder = np.concatenate(asked)[n_sweep:]
    assert ((np.concatenate(asked)[:n_sweep] > 0).sum(axis=1) <= 1).all()
    assert (ladder[:, 4] >= ladder.max(axis=1) - 1e-9).all()
    assert len(ladder) > 20


FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def asked_after(standing_in: float, why: str) -> list[FloatArray]:
    """What a surrogate asks when a number stands in for each policy that was not measured."""
    algorithm, asked = make("surrogate"), []
    for _ in range(4):
        genomes = algorithm.ask()
        assert genomes is not None
        asked.append(genomes)
        policies = space().decode(genomes)
        spent = macs(policies)
        keep = np.array([sum(policy.keep) for policy in policies])
        failed = (keep % 5 == 0) if why == "failed" else np.zeros(len(keep), dtype=bool)
        unmeasured = failed | (spent > 0.8)
        told = np.where(unmeasured, standing_in, damage(policies, 1))
        violations = np.stack([spent / 0.8 - 1, np.where(failed, 1e9, 0.0)], axis=1)
        algorithm.tell(np.stack([told, spent], axis=1), violations)
        assert len(asked) > 1 or unmeasured.any()
    return asked


@pytest.mark.parametrize("why", ["failed", "over budget"])
def test_a_surrogate_learns_nothing_from_what_was_not_measured(why: str) -> None:
    for one, other in zip(asked_after(2.3, why), asked_after(9.0, why), strict=True):
        assert np.array_equal(one, other)


def test_improvement_is_on_the_scale_of_what_is_feasible() -> None:
    objectives = np.array([[0.0, 1.0], [1.0, 0.0], [50.0, 80.0]])
    violations = np.array([[0.0], [-1.0], [0.1]])
    points = np.array([[0.5, 0.5], [0.2, 0.7]])
    found = Improvement(objectives, violations).of(points)
    assert np.array_equal(found, Improvement(objectives[:2], violations[:2]).of(points))
    assert (found > 0.1).all()


def test_improvement_knows_points_worse_than_all_that_was_told() -> None:
    told = np.array([[0.2, 0.8], [0.8, 0.2]])
    improvement = Improvement(told, np.zeros((2, 1)))
    # Better than all in one objective, worse than all in the other.
    improvement.add(np.array([0.9, 0.1]))
    points = np.array([[0.85, 0.05], [0.5, 0.5], [0.95, 0.0]])
    low, span = 0.2, 0.6 * 1.01
    front = (np.array([[0.2, 0.8], [0.8, 0.2], [0.9, 0.1]]) - low) / span + 1
    for point, found in zip((points - low) / span + 1, improvement.of(points), strict=True):
        # Where nothing is below the reference of the other, hypervolumes tell the same.
        box = np.array([2.0, 2.0])
        gained = hypervolume(np.vstack([front, point]), box) - hypervolume(front, box)
        assert found == pytest.approx(gained * 4, abs=1e-12)


def test_each_policy_of_a_generation_is_asked_for_what_it_adds_to_those_before() -> None:
    algorithm = make("surrogate", explore=0.0)
    objectives, violations = np.empty((0, 2)), np.zeros((0, 2))
    for _ in range(3):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = space().decode(genomes)
        told = np.stack([damage(policies, 1), macs(policies)], axis=1)
        if len(objectives):
            expected = algorithm._forecaster.expected(policies)[0]  # type: ignore[attr-defined]
            improvement = Improvement(objectives, violations)
            for row, point in enumerate(expected):
                gains = improvement.of(expected[row:])
                assert gains[0] >= gains.max() - 1e-12
                improvement.add(point)
        algorithm.tell(told, np.zeros((len(told), 2)))
        objectives = np.concatenate([objectives, told])
        violations = np.zeros((len(objectives), 2))


def test_a_surrogate_asks_for_no_policy_twice_where_there_are_few() -> None:
    small = chain_table((4, 4, 4))
    where = make_space("layer-sparsity", small, {"sparsity": [0.0, 1.0]})
    settings = AlgorithmSettings(name="surrogate", population=8, seed=0, options={})
    algorithm, asked = make_algorithm(settings, where, 2, 1), set[Policy]()
    for _ in range(6):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = where.decode(genomes)
        assert len(asked | set(policies)) == len(asked) + 8
        asked.update(policies)
        gone = 1 - np.array([policy.keep for policy in policies]) / 4
        cost = small.costs_of(policies)[0] / small.dense_costs[0]
        # The last group loses nothing: it is clear what is best, and that is asked for early.
        told = np.stack([(gone[:, :2] ** 2).sum(axis=1), cost], axis=1)
        algorithm.tell(told, np.zeros((8, 1)))


def test_a_surrogate_that_may_not_learn_from_all_learns_from_the_best() -> None:
    algorithm = make("surrogate", points=10)
    told: list[Population] = []
    for _ in range(3):
        genomes = algorithm.ask()
        assert genomes is not None
        policies = space().decode(genomes)
        objectives = np.stack([damage(policies, 1), macs(policies)], axis=1)
        violations = np.stack([objectives[:, 1] / 0.8 - 1, np.zeros(len(genomes))], axis=1)
        told.append(Population(genomes, objectives, violations))
        algorithm.tell(objectives, violations)
    algorithm.ask()
    archive = told[0].joined(told[1]).joined(told[2])
    best = space().decode(archive.best(10).genomes)
    forecaster = algorithm._forecaster  # type: ignore[attr-defined]
    learnt = forecaster._columns["objective", 0].process._points + 0.5
    wanted = forecaster.points(best, foresight(best))
    assert learnt.shape == (10, len(best[0].keep))
    np.testing.assert_allclose(np.sort(learnt, axis=0), np.sort(wanted, axis=0))


def told_once(name: str, n: int = 16, **options: object) -> Algorithm:
    """An algorithm with a population whose members differ in rank and crowding."""
    algorithm = make(name, population=n, **options)
    genomes = algorithm.ask()
    assert genomes is not None
    policies = space().decode(genomes)
    told = np.stack([damage(policies, 1), macs(policies)], axis=1)
    algorithm.tell(told, np.zeros((len(told), 2)))
    return algorithm


def test_of_two_parents_the_one_that_stands_better_breeds() -> None:
    algorithm = told_once("level-switch")
    rank, crowding = algorithm.population.ranks_and_crowding()
    assert len(np.unique(rank)) > 1
    order = np.lexsort((-crowding, rank))
    drawn = algorithm._tournament(40_000)  # type: ignore[attr-defined]
    n = len(rank)
    share = np.bincount(drawn, minlength=n)[order] / len(drawn)
    np.testing.assert_allclose(share, (2 * (n - np.arange(n)) - 1) / n**2, atol=0.01)


def offspring(**options: object) -> tuple[IntArray, IntArray]:
    """Levels of the population, and of what is asked next."""
    algorithm = told_once("level-switch", **options)
    parents = moves().indices(algorithm.population.genomes)
    genomes = algorithm.ask()
    assert genomes is not None
    return parents, moves().indices(genomes)


def test_as_many_offspring_keep_a_parents_budget_as_the_options_say() -> None:
    for switch in (0.0, 1.0):
        parents, children = offspring(switch=switch, crossover=0.0)
        change = children[:, None] - parents
        nearest = np.abs(change).astype(bool).sum(axis=2).argmin(axis=1)
        change = change[np.arange(len(children)), nearest]
        both_ways = (change > 0).any(axis=1) & (change < 0).any(axis=1)
        away = np.abs(moves().costs(children) / moves().costs(parents[nearest]) - 1)
        if switch:
            assert both_ways.mean() > 0.3
            assert np.median(away) < 0.05
        else:
            assert not both_ways.any()


def test_as_many_offspring_have_two_parents_as_the_options_say() -> None:
    for crossover, low, high in ((0.0, 0.0, 1.0), (1.0, 1.5, 8.0)):
        parents, children = offspring(switch=0.0, crossover=crossover, flips=1)
        apart = (children[:, None] != parents).sum(axis=2).min(axis=1)
        assert low <= apart.mean() <= high


def test_hardly_any_offspring_are_alike() -> None:
    where = make_space("layer-sparsity", chain_table((4, 4, 4)), {"sparsity": [0.0, 1.0]})
    alike = 0
    for seed in range(30):
        settings = AlgorithmSettings(name="level-switch", population=8, seed=seed, options={})
        algorithm = make_algorithm(settings, where, 2, 1)
        for _ in range(2):
            genomes = algorithm.ask()
            assert genomes is not None
            alike += 8 - len(set(where.decode(genomes)))
            told = np.stack([genomes[:, 0], -genomes.sum(axis=1)], axis=1)
            algorithm.tell(told, np.zeros((8, 1)))
    # A few tries find another one nearly always.
    assert alike <= 3


@pytest.mark.parametrize("name", ["de", "gde3", "nsde"])
def test_without_crossover_a_trial_takes_one_gene_of_its_donor(name: str) -> None:
    settings = AlgorithmSettings(name=name, population=12, seed=0, options={"cr": 0.0})
    objectives = 1 if name == "de" else 2
    algorithm = make_algorithm(settings, space(), objectives, 1)
    genomes = algorithm.ask()
    assert genomes is not None
    algorithm.tell(np.tile(genomes[:, :1], objectives), np.zeros((12, 1)))
    trials = algorithm.ask()
    assert trials is not None
    apart = (np.abs(trials[:, None] - genomes) > 1e-9).sum(axis=2).min(axis=1)
    assert (apart <= 1).all()
    assert apart.any()


def test_self_adaptive_trials_are_those_of_de_rand_1_bin() -> None:
    targets = np.random.default_rng(0).random((4, 6))
    for seed in range(20):
        algorithm = SelfAdaptive(targets, 1, 0, seed, f=0.9, cr=1.0)
        trials, own = algorithm._trials(targets)
        assert (own[:, 0] == 0.9).any()
        for row, (trial, (f, cr)) in enumerate(zip(trials, own, strict=True)):
            if cr < 1:
                continue
            others = [i for i in range(4) if i != row]
            wanted = []
            for a, b, c in itertools.permutations(targets[others]):
                donor = a + f * (b - c)
                # One that leaves the box ends halfway to the border.
                donor = np.where(donor < 0, a / 2, np.where(donor > 1, (a + 1) / 2, donor))
                wanted.append(donor)
            assert np.abs(np.array(wanted) - trial).max(axis=1).min() < 1e-12
        algorithm = SelfAdaptive(targets, 1, 0, seed, f=0.9, cr=0.0)
        trials, own = algorithm._trials(targets)
        assert ((trials != targets).sum(axis=1)[own[:, 1] == 0] == 1).all()


def test_parameters_survive_with_the_trials_that_they_made() -> None:
    algorithm = SelfAdaptive(np.random.default_rng(0).random((30, 5)), 1, 0, 3, f=0.5, cr=0.9)
    none = np.zeros((30, 0))
    algorithm.ask()
    algorithm.tell(np.ones((30, 1)), none)
    algorithm.ask()
    theirs, before = algorithm._open[-1].copy(), algorithm._own.copy()
    assert not np.array_equal(theirs, before)
    better = np.arange(30) % 2
    algorithm.tell(2.0 - 2 * better[:, None], none)
    assert np.array_equal(algorithm._own, np.where(better[:, None], theirs, before))


def test_whoever_is_asked_may_do_what_they_like_with_the_genomes() -> None:
    for name in ALGORITHMS:
        if ALGORITHMS[name].single_objective or name == "ranking":
            continue
        algorithm = make(name)
        genomes = algorithm.ask()
        assert genomes is not None
        before = {row.tobytes() for row in genomes}
        told = np.stack([genomes[:, 0], 1 - genomes[:, 0]], axis=1)
        genomes[:] = -1
        algorithm.tell(told, np.zeros((len(told), 2)))
        assert {row.tobytes() for row in algorithm.population.genomes} <= before


def test_the_sensitivity_sweep_learns_from_what_is_measured_wherever_that_stands() -> None:
    def knows(policies: Sequence[Policy]) -> Known:
        known = foresight(policies)
        return replace(known, objectives=known.objectives[:, ::-1])

    ladders = []
    for order in (slice(None), slice(None, None, -1)):
        algorithm = make("sensitivity", population=8, knows=knows if order.step else foresight)
        asked = []
        while (genomes := algorithm.ask()) is not None:
            asked.append(genomes)
            policies = space().decode(genomes)
            told = np.stack([damage(policies, 1), macs(policies)], axis=1)[:, order]
            algorithm.tell(told, np.zeros((len(told), 2)))
        ladders.append(np.concatenate(asked))
    assert np.array_equal(*ladders)


STARTED: dict[str, Callable[[FloatArray, int], Algorithm]] = {
    "nsga2": lambda first, seed: Evolution(
        lambda initial: nsga2(initial, GeneticOptions()), first, 2, 2, seed
    ),
    "adaptive": lambda first, seed: SelfAdaptive(first, 2, 2, seed, f=0.5, cr=0.9),
    "random": lambda first, seed: RandomSearch(first, seed, 2, 2),
    "level-switch": lambda first, seed: LevelSwitching(
        first, space(), foresight, 2, 2, seed, SwitchingOptions()
    ),
    "surrogate": lambda first, seed: SurrogateSearch(
        [first], space(), foresight, 2, 2, seed, SurrogateOptions()
    ),
}


@pytest.mark.parametrize("name", STARTED)
def test_another_seed_is_another_search_even_from_the_same_beginning(name: str) -> None:
    first = np.random.default_rng(0).random((8, len(WIDTHS)))
    asked = []
    for seed in (1, 1, 2):
        algorithm = STARTED[name](first, seed)
        genomes = algorithm.ask()
        assert genomes is not None
        assert np.array_equal(genomes, first)
        policies = space().decode(genomes)
        told = np.stack([damage(policies, 1), macs(policies)], axis=1)
        algorithm.tell(told, np.zeros((8, 2)))
        asked.append(algorithm.ask())
    assert np.array_equal(asked[0], asked[1])
    assert not np.array_equal(asked[0], asked[2])
