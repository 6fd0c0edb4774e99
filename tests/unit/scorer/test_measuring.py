"""What a measurement is, rests on, and does not depend on."""

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evosearch.data import Images
from evosearch.networks import Network
from evosearch.networks.threads import on_threads
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.scoring.proxies import PROXIES, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    batches,
    logits,
    prepare_workload,
)
from tests.unit.scorer.bench import BARE, BATCH, DENSE, HALF, ODD, Prepare, same


@pytest.mark.parametrize("name", ["raw", "compensated"])
def test_dense_policy_has_no_divergence_and_the_dense_error(prepared: Prepare, name: str) -> None:
    workload = prepared(name, recalibrate=False)
    measurement = Scorer(workload).score(DENSE)
    wrong = workload.dense_logits.argmax(1) != workload.validation.labels
    assert measurement.metrics["divergence"] == 0.0
    assert measurement.metrics["error"] == wrong.mean()


def test_metrics_are_those_of_the_networks_outputs(prepared: Prepare) -> None:
    workload = prepared("raw")
    scorer = Scorer(workload)
    found = scorer.score(HALF).metrics
    labels = torch.from_numpy(workload.validation.labels)
    with torch.inference_mode():
        outputs = scorer.network_of(HALF)(workload.network().normalise(workload.validation.pixels))
    outputs, wanted = outputs.double(), torch.from_numpy(workload.dense_logits).double()
    divergence = F.kl_div(outputs.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    assert found["error"] == pytest.approx(float((outputs.argmax(1) != labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["divergence"] == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("policy", [HALF, ODD, BARE])
def test_metrics_of_a_pruned_network_are_possible(
    prepared: Prepare, name: str, policy: Policy
) -> None:
    measurement = Scorer(prepared(name)).score(policy)
    assert measurement.ok
    assert 0 <= measurement.metrics["error"] <= 1
    assert measurement.metrics["loss"] > 0
    assert measurement.metrics["divergence"] > 0
    assert measurement.seconds > 0


@pytest.mark.parametrize("criterion", ["l1", "residual-energy"])
def test_compensation_brings_a_pruned_network_nearer_to_the_dense_one(
    prepared: Prepare, criterion: str
) -> None:
    raw = Scorer(prepared("raw", criterion)).score(HALF)
    compensated = Scorer(prepared("compensated", criterion, recalibrate=False)).score(HALF)
    assert compensated.metrics["divergence"] < raw.metrics["divergence"]


@pytest.mark.parametrize("name", PROXIES)
def test_equal_policies_measure_alike_in_any_order(prepared: Prepare, name: str) -> None:
    scorer = Scorer(prepared(name, distillation_steps=3))
    order = [HALF, BARE, DENSE, ODD]
    first = [scorer.score(policy) for policy in order]
    again = [scorer.score(policy) for policy in reversed(order)]
    assert all(same(*pair) for pair in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize("name", PROXIES)
def test_equal_policies_measure_alike_in_a_fresh_scorer(prepared: Prepare, name: str) -> None:
    workload = prepared(name, distillation_steps=3)
    used = Scorer(workload)
    for policy in (BARE, ODD):
        used.score(policy)
    assert same(used.score(HALF), Scorer(workload).score(HALF))


def test_equal_policies_measure_alike_in_another_process(prepared: Prepare) -> None:
    workload = prepared("compensated", "residual-energy")
    sent = pickle.loads(pickle.dumps(workload))
    assert same(Scorer(sent).score(ODD), Scorer(workload).score(ODD))


def test_equal_workloads_are_prepared_alike(
    dense: tuple[Network, CuttingPlan], images: tuple[Images, Images], prepared: Prepare
) -> None:
    proxy = ProxySettings(name="compensated", criterion="residual-energy", batch_size=BATCH)
    again = prepare_workload(*dense, proxy, *images)
    assert same(
        Scorer(again).score(HALF), Scorer(prepared("compensated", "residual-energy")).score(HALF)
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_number_of_threads_changes_no_measurement(prepared: Prepare) -> None:
    scorer = Scorer(prepared("recalibrated"))
    found = scorer.score(HALF)
    torch.set_num_threads(1)
    assert same(found, scorer.score(HALF))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("policy", [HALF, Policy((1,))])
def test_number_of_threads_is_restored(prepared: Prepare, policy: Policy) -> None:
    Scorer(prepared("raw")).score(policy)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_are_one_thread_for_a_while() -> None:
    def fail() -> None:
        with on_threads(1):
            raise KeyError(f"{torch.get_num_threads()} inside")

    with pytest.raises(KeyError, match="1 inside"):
        fail()
    assert torch.get_num_threads() == 2


def test_scoring_changes_nothing_in_the_workload(prepared: Prepare) -> None:
    workload = prepared("compensated")
    before = pickle.dumps((workload.state, workload.grams, workload.dense_logits, workload.places))
    Scorer(workload).score(ODD)
    after = (workload.state, workload.grams, workload.dense_logits, workload.places)
    assert pickle.dumps(after) == before


def test_policy_keeps_as_many_channels_as_it_says(prepared: Prepare) -> None:
    workload = prepared("raw")
    keep = Scorer(workload).keep(ODD)
    parts = np.split(keep[:-1], workload.plan.table.offsets[1:])
    assert tuple(int(part.sum()) for part in parts) == ODD.keep
    assert keep[-1]


def test_wider_policy_keeps_what_the_narrower_one_keeps(prepared: Prepare) -> None:
    scorer = Scorer(prepared("raw"))
    assert not (scorer.keep(BARE) & ~scorer.keep(HALF)).any()


def test_most_important_channel_is_kept_longest(prepared: Prepare) -> None:
    workload = prepared("raw", "l1")
    kept = np.flatnonzero(Scorer(workload).keep(BARE)[:16])
    norms = workload.network().module.layer1[0].conv1.weight.abs().sum((1, 2, 3))
    assert kept.tolist() == [int(norms.argmax())]


def test_network_of_a_policy_has_its_widths_and_its_metrics(prepared: Prepare) -> None:
    workload = prepared("compensated")
    scorer = Scorer(workload)
    wanted = scorer.score(ODD).metrics["error"]
    module = copy.deepcopy(scorer.network_of(ODD))
    assert [block.conv1.out_channels for block in module.layer1] == [3, 16, 5]
    assert not any(part.training for part in module.modules())
    found = logits(module, batches(workload.network(), workload.validation, BATCH))
    assert (found.argmax(1).numpy() != workload.validation.labels).mean() == wanted
