"""Predictors that run no network: what share of the weights' own importance a policy removes."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from evosearch.data import open_source
from evosearch.fidelity.free import free_predictors
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import Workload, prepare_workload

DENSE = Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))
HALF = Policy((8, 8, 8, 16, 16, 16, 32, 32, 32))


@pytest.fixture(scope="module")
def workload() -> Workload:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    held_out = open_source("cifar10-sample").held_out().take(np.arange(20))
    settings = ProxySettings(name="raw", criterion="l2")
    return prepare_workload(network, trace(network), settings, held_out, held_out)


@pytest.fixture(scope="module")
def lost(workload: Workload) -> Callable[[Policy], Mapping[str, float]]:
    return free_predictors(workload)


def test_nothing_is_lost_where_nothing_is_removed(
    lost: Callable[[Policy], Mapping[str, float]],
) -> None:
    assert lost(DENSE) == {"l1": 0.0, "l2": 0.0, "bn-scale": 0.0}


def test_the_squared_norm_is_the_energy_of_the_removed_filters(
    workload: Workload, lost: Callable[[Policy], Mapping[str, float]]
) -> None:
    shares = []
    for group in workload.plan.table.groups:
        filters = np.asarray(workload.state[f"{group.name}.weight"], dtype=np.float64)
        energy = np.sort((filters**2).sum(axis=(1, 2, 3)))
        # The criterion is the norm itself, so those of least energy go.
        shares.append(energy[: len(energy) // 2].sum() / energy.sum())
    assert lost(HALF)["l2"] == pytest.approx(np.mean(shares), rel=1e-6)


def test_removing_more_loses_more(lost: Callable[[Policy], Mapping[str, float]]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        keep = rng.integers(2, np.array(DENSE.keep))
        wide, narrow = lost(Policy(tuple(keep.tolist()))), lost(Policy(tuple((keep - 1).tolist())))
        assert all(narrow[name] > wide[name] for name in wide)


def test_a_group_of_zeros_has_nothing_to_lose() -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    with torch.no_grad():
        network.module.layer1[0].bn1.weight.zero_()
    held_out = open_source("cifar10-sample").held_out().take(np.arange(20))
    settings = ProxySettings(name="raw", criterion="l2")
    dead = prepare_workload(network, trace(network), settings, held_out, held_out)
    only = Policy((8, *DENSE.keep[1:]))
    assert free_predictors(dead)(only)["bn-scale"] == 0.0
    assert np.isfinite(list(free_predictors(dead)(HALF).values())).all()
