"""What single algorithms promise beyond the contract: budgets kept, models that predict."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evosearch.algorithms import (
    Algorithm,
    AlgorithmSettings,
    Foresight,
    Known,
    make_algorithm,
)
from evosearch.algorithms.adaptive import SelfAdaptive
from evosearch.algorithms.forecast import Forecaster, Told
from evosearch.algorithms.gaussian import GaussianProcess
from evosearch.algorithms.improvement import Improvement
from evosearch.algorithms.levels import LevelMoves, MoveOptions
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
