"""Batch-norm statistics of a cut network."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evosearch.policy import Policy
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    Workload,
)
from tests.unit.scorer.bench import DENSE, HALF, ODD, Prepare, same


def batch_statistics(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Mean over batches of every batch norm's input mean and unbiased variance."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_layer: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().double()
            statistics = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True))
            for key, value in zip(("running_mean", "running_var"), statistics, strict=True):
                found.setdefault(f"{name}.{key}", []).append(value)

        return record

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(hook(name))
    module.train()
    with torch.no_grad():
        for x in inputs:
            module(x)
    return {key: torch.stack(values).mean(0) for key, values in found.items()}


@pytest.mark.parametrize("policy", [DENSE, ODD])
# 40 images in batches of at least 16, like all images, or of a size of their own.
@pytest.mark.parametrize(("together", "parts"), [(None, 2), (10, 4), (21, 1)])
def test_recalibration_averages_the_statistics_of_batches(
    prepared: Prepare, policy: Policy, together: int | None, parts: int
) -> None:
    workload = prepared("recalibrated", calibration_batch=together)
    network = workload.network()
    split = np.split(workload.calibration.pixels, parts)
    cut = copy.deepcopy(Scorer(prepared("raw")).network_of(policy))
    wanted = batch_statistics(cut, [network.normalise(part) for part in split])
    found = Scorer(workload).network_of(policy).state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-5)


def test_recalibration_leaves_weights_and_momentum_alone(prepared: Prepare) -> None:
    raw = Scorer(prepared("raw")).network_of(HALF)
    module = Scorer(prepared("recalibrated")).network_of(HALF)
    wanted = dict(raw.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in module.named_parameters())
    assert {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_compensation_recalibrates_unless_told_not_to(prepared: Prepare) -> None:
    dense_mean = prepared("raw").state["bn1.running_mean"]
    means = [
        Scorer(prepared("compensated", recalibrate=wanted)).network_of(HALF).bn1.running_mean
        for wanted in (False, True)
    ]
    assert [np.array_equal(mean.numpy(), dense_mean) for mean in means] == [True, False]


def test_dropout_stays_off_while_recalibrating(with_dropout: Workload) -> None:
    first, second = (Scorer(with_dropout).score(Policy((4, 3))) for _ in range(2))
    assert first.ok
    assert same(first, second)
