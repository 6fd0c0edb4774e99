"""Proxies take their steps in order, and better networks come of it."""

import dataclasses

import numpy as np
import pytest
import torch

from evosearch.data import open_source
from evosearch.measurement import Status
from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.folding import Layout
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import PROXIES, ProxySettings, proxy_named
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    prepare_workload,
)
from tests.unit.scorer.bench import HALF, Prepare


class Recorder:
    """A bench that only notes what is done on it."""

    def __init__(self, recalibrate: bool) -> None:
        self.settings = ProxySettings(name="x", criterion="l1", recalibrate=recalibrate)
        self.steps: list[str] = []

    def cut(self, keep: object) -> None:
        self.steps.append("cut")

    def compensate(self, keep: object) -> None:
        self.steps.append("compensate")

    def recalibrate(self) -> None:
        self.steps.append("recalibrate")


@pytest.mark.parametrize(
    ("name", "recalibrate", "steps"),
    [
        ("raw", True, ["cut"]),
        ("recalibrated", False, ["cut", "recalibrate"]),
        ("compensated", True, ["cut", "compensate", "recalibrate"]),
        ("compensated", False, ["cut", "compensate"]),
    ],
)
def test_proxy_takes_its_steps_in_order(name: str, recalibrate: bool, steps: list[str]) -> None:
    bench = Recorder(recalibrate)
    proxy_named(name).prepare(bench, np.ones(1, np.bool_))
    assert bench.steps == steps


def test_every_proxy_has_a_line_of_prose() -> None:
    assert all(proxy.title for proxy in PROXIES.values())


def test_margin_is_the_lead_of_the_right_class(prepared: Prepare) -> None:
    workload = prepared("raw")
    scorer = Scorer(workload)
    found = scorer.score(HALF).metrics["margin"]
    with torch.inference_mode():
        p = scorer.network_of(HALF)(
            workload.network().normalise(workload.validation.pixels)
        ).softmax(1)
    wanted = []
    for row, label in zip(p.tolist(), workload.validation.labels, strict=True):
        wanted.append(1 - row[label] + max(v for k, v in enumerate(row) if k != label))
    assert found == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("name", ["refitted", "distilled"])
def test_repairs_bring_the_outputs_nearer_to_the_dense_ones(name: str) -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    plan = trace(network)
    source = open_source("cifar10-sample")
    parts = source.training().take(np.arange(192)), source.held_out().take(np.arange(128))
    found = {}
    for proxy in ("compensated", name):
        options = ProxySettings(name=proxy, criterion="l1", batch_size=64)
        scorer = Scorer(prepare_workload(network, plan, options, *parts))
        found[proxy] = scorer.score(HALF).metrics["divergence"]
        assert all(
            not p.requires_grad or p.grad is None for p in scorer.network_of(HALF).parameters()
        )
    assert found[name] < 0.9 * found["compensated"]


def test_network_without_a_linear_end_cannot_be_refitted(prepared: Prepare) -> None:
    workload = dataclasses.replace(prepared("refitted"), layout=Layout())
    measurement = Scorer(workload).score(HALF)
    assert measurement.status is Status.FAILED
    assert measurement.reason is not None
    assert "does not end with a linear layer" in measurement.reason
