"""Each gene alone: the ladder that follows, and the search that begins with it."""

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from evosearch.algorithms import AlgorithmSettings, Known, Resumable, make_algorithm
from evosearch.algorithms.base import Algorithm
from evosearch.algorithms.sweep import Sweep
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.space import SearchSpace, make_space
from evosearch.testing import chain_table

FloatArray = NDArray[np.float64]

WIDTHS = (16, 40, 24)


@cache
def table() -> GroupTable:
    return chain_table(WIDTHS)


@cache
def space(**options: object) -> SearchSpace:
    return make_space("layer-sparsity", table(), options)


def macs(policies: Sequence[Policy]) -> FloatArray:
    return np.asarray(table().costs_of(policies)[0] / table().dense_costs[0])


def foresight(policies: Sequence[Policy], bound: float = 2.0) -> Known:
    unknown, cost = np.full(len(policies), np.nan), macs(policies)
    return Known(
        objectives=np.stack([unknown, cost], axis=1),
        violations=np.stack([cost / bound - 1, unknown], axis=1),
        cost=cost,
    )


def rise(policies: Sequence[Policy], powers: Sequence[float] = (1.0, 1.0, 1.0)) -> FloatArray:
    """Of each group a power of the odds of its channels to go, added up."""
    keep = np.array([policy.keep for policy in policies], dtype=np.float64)
    odds = (np.array(WIDTHS) - keep) / keep
    return np.asarray((np.array([0.02, 0.1, 0.005]) * odds ** np.array(powers)).sum(axis=1))


def path(values: int, powers: Sequence[float] = (1.0, 1.0, 1.0)) -> FloatArray:
    sweep = Sweep(space(), foresight, values)
    return sweep.path(0.3 + rise(space().decode(sweep.genomes), powers))


def test_a_sweep_raises_one_gene_at_a_time() -> None:
    genomes = Sweep(space(), foresight, 3).genomes
    assert genomes.shape == (1 + 3 * 3, 3)
    assert not genomes[0].any()
    assert ((genomes[1:] > 0).sum(axis=1) == 1).all()
    assert sorted(set(genomes[genomes > 0])) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("values", "powers"), [(1, (0.9, 0.9, 0.9)), (3, (1.3, 0.8, 1.1)), (5, (0.7, 1.5, 1.0))]
)
def test_no_policy_of_a_rungs_cost_has_less_damage(values: int, powers: Sequence[float]) -> None:
    """Rises to the power 1.5, each gene alone, are what the ladder minimises."""
    grid = np.linspace(0, 1, 17)
    everywhere = space().decode(np.array(list(itertools.product(grid, repeat=3))))

    def damage(policies: Sequence[Policy]) -> tuple[FloatArray, FloatArray]:
        """The sum over genes of their damage, and of what they save alone."""
        total, saved = np.zeros(len(policies)), np.zeros(len(policies))
        for group, width in enumerate(WIDTHS):
            keep = [[*WIDTHS[:group], p.keep[group], *WIDTHS[group + 1 :]] for p in policies]
            alone = [Policy(tuple(row)) for row in keep]
            assert max(p.keep[group] for p in alone) <= width
            total += rise(alone, powers) ** 1.5
            saved += 1 - macs(alone)
        return total, saved

    rungs = space().decode(path(values, powers))
    assert len(rungs) > 20
    ours, theirs = damage(rungs), damage(everywhere)
    for total, saved in zip(*ours, strict=True):
        best = theirs[0][theirs[1] >= saved - 1e-9].min()
        assert total <= 1.15 * best + 1e-4


def test_a_ladder_goes_down_step_by_step() -> None:
    rungs = path(1)
    assert not rungs[0].any()
    assert (np.diff(rungs, axis=0) >= 0).all()
    assert ((np.diff(rungs, axis=0) > 0).sum(axis=1) >= 1).all()
    costs = macs(space().decode(rungs))
    assert (np.diff(costs) < 0).all()
    # The group that can least spare its channels goes last.
    half = rungs[np.abs(costs - 0.5).argmin()]
    assert half.argmin() == 1


def test_noise_that_falls_does_not_turn_a_ladder_around() -> None:
    sweep = Sweep(space(), foresight, 3)
    told = rise(space().decode(sweep.genomes))
    told[2], told[9] = -1.0, told[8] - 0.01
    rungs = sweep.path(told)
    assert np.isfinite(rungs).all()
    assert (np.diff(rungs, axis=0) >= 0).all()


# --- before the models take over


def surrogate(seen: SearchSpace, bound: float = 2.0, sweep: int = 1) -> Algorithm:
    options = {"sweep": sweep}
    settings = AlgorithmSettings(name="surrogate", population=4, seed=0, options=options)
    return make_algorithm(settings, seen, 2, 2, foresight=lambda p: foresight(p, bound))


def tell(algorithm: Algorithm, genomes: FloatArray) -> None:
    policies = space().decode(genomes)
    told = np.stack([rise(policies), macs(policies)], axis=1)
    algorithm.tell(told, np.zeros((len(told), 2)))


def asked(algorithm: Algorithm, n: int) -> FloatArray:
    """The next n asks, each of which is told."""
    found = []
    for _ in range(n):
        genomes = algorithm.ask()
        assert genomes is not None
        tell(algorithm, genomes)
        found.append(genomes)
    return np.concatenate(found)


def alone(genomes: FloatArray) -> NDArray[np.bool_]:
    return np.asarray((genomes > 0).sum(axis=1) <= 1)


def test_a_surrogate_begins_with_a_sweep_and_its_ladder() -> None:
    algorithm = surrogate(space())
    genomes = asked(algorithm, 3)[4:]
    assert alone(genomes[:4]).all()
    ladder = {tuple(row) for row in path(1)}
    rungs = genomes[4:]
    assert len(rungs) == 3
    assert {tuple(row) for row in rungs} <= ladder
    assert np.ptp(macs(space().decode(rungs))) > 0.3


def test_a_surrogate_asked_ahead_waits_for_its_sweep() -> None:
    algorithm = surrogate(space())
    asked(algorithm, 1)
    sweep = algorithm.ask()
    assert sweep is not None
    assert algorithm.ask() is None
    tell(algorithm, sweep)
    assert algorithm.ask() is not None


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda: surrogate(space(), sweep=0),
        # The dense network is over budget, and is never measured.
        lambda: surrogate(space(), bound=0.9),
        # Every policy spends the same.
        lambda: surrogate(make_space("layer-sparsity", table(), {"project_onto": {"macs": 0.5}})),
    ],
    ids=["not wanted", "over budget", "one budget"],
)
def test_there_is_no_sweep_where_it_tells_nothing(algorithm) -> None:  # type: ignore[no-untyped-def]
    genomes = asked(algorithm(), 2)[4:]
    assert not alone(genomes).all()


@pytest.mark.parametrize("n_asks", [1, 2, 3])
def test_a_search_that_is_restored_during_its_sweep_asks_for_the_same(n_asks: int) -> None:
    algorithm, later = surrogate(space()), surrogate(space())
    asked(algorithm, n_asks)
    assert isinstance(algorithm, Resumable)
    assert isinstance(later, Resumable)
    later.restore(algorithm.state())
    assert np.array_equal(asked(later, 3), asked(algorithm, 3))


def test_blocks_are_measured_left_out() -> None:
    """Else leaving them out would seem to do nothing."""
    blocks = trace(load_network(NetworkSpec(name="resnet20")), blocks=True).table
    with_them = make_space("layer-sparsity", blocks, {"blocks": True})

    def known(policies: Sequence[Policy]) -> Known:
        cost = np.asarray(blocks.costs_of(policies)[0] / blocks.dense_costs[0])
        return Known(
            objectives=np.stack([np.full(len(cost), np.nan), cost], axis=1),
            violations=np.zeros((len(cost), 1)),
            cost=cost,
        )

    n = len(blocks.groups)
    for values in (1, 3):
        sweep = Sweep(with_them, known, values)
        policies = with_them.decode(sweep.genomes)
        out = blocks.left_out(np.array([policy.keep for policy in policies]))
        assert (out.sum(axis=0) == 1).all()
        # Blocks that cost much to lose go last.
        told = 0.1 + np.where(out.any(axis=1), 5.0, 0.01 * (sweep.genomes > 0).any(axis=1))
        path = sweep.path(told)
        gone = blocks.left_out(np.array([p.keep for p in with_them.decode(path)])).any(axis=1)
        assert gone[-1]
        first = int(gone.argmax())
        assert (path[first, :n] > 0.5).all()
