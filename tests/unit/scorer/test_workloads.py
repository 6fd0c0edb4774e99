"""What scorers are sent: equal, complete, checked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evosearch.data import Images
from evosearch.errors import ConfigError, DataError, NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import (
    Workload,
    batches,
    prepare_workload,
)
from tests.unit.scorer.bench import BATCH, Prepare


def test_network_of_the_workload_computes_what_the_original_does(
    prepared: Prepare, dense: tuple[Network, CuttingPlan]
) -> None:
    network, _ = dense
    rebuilt = prepared("raw").network()
    x = network.example(4)
    with torch.inference_mode():
        assert torch.equal(rebuilt.module(x), network.module(x))
    assert rebuilt.input == network.input
    assert not rebuilt.module.training


def test_dense_outputs_are_those_of_the_original(
    prepared: Prepare, dense: tuple[Network, CuttingPlan]
) -> None:
    network, _ = dense
    workload = prepared("raw")
    with torch.inference_mode():
        wanted = network.module(network.normalise(workload.validation.pixels)).numpy()
    np.testing.assert_allclose(workload.dense_logits, wanted, rtol=1e-4, atol=1e-5)


def test_workload_needs_no_weights_file(prepared: Prepare) -> None:
    assert prepared("raw").spec.weights is None


def test_workload_of_a_network_that_asks_for_the_version_of_its_state(
    images: tuple[Images, Images],
) -> None:
    network = load_network(NetworkSpec(name="mnasnet0_5", input_shape=(3, 32, 32)))
    proxy = ProxySettings(name="raw", criterion="l1", batch_size=BATCH)
    workload = prepare_workload(network, trace(network), proxy, *images)
    state, made = network.module.state_dict(), workload.network().module.state_dict()
    assert all(torch.equal(state[key], made[key]) for key in state)


def test_grams_travel_only_with_proxies_that_need_them(prepared: Prepare) -> None:
    assert not prepared("raw", "residual-energy").grams
    table = prepared("compensated", "l1").plan.table
    consumers = {name for group in table.groups for name in group.consumers}
    assert prepared("compensated", "l1").grams.keys() == consumers


def test_workload_does_not_change_with_the_network_that_it_was_made_of(
    with_dropout: Workload, images: tuple[Images, Images]
) -> None:
    network = with_dropout.network()
    workload = prepare_workload(network, with_dropout.plan, with_dropout.settings, *images)
    network.module[0].weight.data.zero_()
    assert workload.state["0.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "frob"}, "no proxy 'frob'; there are raw, recalibrated, compensated"),
        ({"criterion": "frob"}, "no criterion 'frob'; there are l1, l2"),
    ],
)
def test_unknown_name_lists_the_known_ones(
    prepared: Prepare, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(**options)


def test_labels_beyond_the_classes_are_refused(images: tuple[Images, Images]) -> None:
    network = load_network(NetworkSpec(name="resnet20", num_classes=5))
    proxy = ProxySettings(name="raw", criterion="l1")
    with pytest.raises(DataError, match=r"has 5 classes, .* label 9; set network.num_classes"):
        prepare_workload(network, trace(network), proxy, *images)


def test_dense_network_whose_outputs_are_not_finite_is_refused(
    images: tuple[Images, Images],
) -> None:
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network)
    nn.init.constant_(network.module.linear.bias, torch.inf)
    with pytest.raises(NetworkError, match="outputs are not finite; check its weights"):
        prepare_workload(network, plan, ProxySettings(name="raw", criterion="l1"), *images)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), size=st.integers(1, 12), at_least=st.booleans())
def test_batches_hold_every_image_once_and_in_order(
    dense: tuple[Network, CuttingPlan], count: int, size: int, at_least: bool
) -> None:
    pixels = np.zeros((count, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    pool = Images(pixels, np.zeros(count, np.int64))
    parts = list(batches(dense[0], pool, size, at_least=at_least))
    assert torch.equal(torch.cat(parts), dense[0].normalise(pixels))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, count) if at_least else max(sizes) <= size
