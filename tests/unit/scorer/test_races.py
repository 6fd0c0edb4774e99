"""A candidate that is dropped early, and one that is not."""

import numpy as np
import pytest

from evosearch.data import open_source
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.networks import Network
from evosearch.pruning.cutting import CuttingPlan
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.racing import Race, Rival
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    Workload,
    prepare_workload,
)
from tests.unit.scorer.bench import BARE, DENSE, HALF, same

FEW, MANY = 32, 512  # blocks are of 32 images, and eight of them decide


@pytest.fixture(scope="module")
def long_workload(dense: tuple[Network, CuttingPlan]) -> Workload:
    """512 validation images in 16 batches."""
    source = open_source("cifar10-sample")
    proxy = ProxySettings(name="compensated", criterion="l1", batch_size=FEW, recalibrate=False)
    calibration = source.training().take(np.arange(40))
    return prepare_workload(*dense, proxy, calibration, source.held_out().take(np.arange(MANY)))


def race_of(measurement: Measurement | None) -> Race:
    rivals = []
    if measurement:
        rivals = [Rival(name="rival", metrics=measurement.metrics, blocks=measurement.blocks)]
    return Race(measured=("divergence",), rivals=tuple(rivals), error_rate=0.05)


def test_race_that_is_run_to_its_end_measures_the_same_bits(long_workload: Workload) -> None:
    scorer = Scorer(long_workload)
    weak = scorer.score(BARE, race_of(None))
    alone, raced = scorer.score(HALF), scorer.score(HALF, race_of(weak))
    assert raced.status is Status.OK
    assert raced.metrics == alone.metrics
    assert raced.images == alone.images == MANY
    blocks = np.frombuffer(raced.blocks, dtype=np.float32).reshape(MANY // 32, len(METRICS))
    np.testing.assert_allclose(
        blocks.mean(axis=0), [raced.metrics[name] for name in METRICS], rtol=1e-5
    )


def test_dominated_candidate_is_dropped_early_and_leaves_no_trace(long_workload: Workload) -> None:
    scorer = Scorer(long_workload)
    before, strong = scorer.score(HALF), scorer.score(DENSE, race_of(None))
    lost = scorer.score(BARE, race_of(strong))
    assert lost.status is Status.DROPPED
    assert lost.images is not None
    assert lost.images < MANY
    assert lost.reason == f"worse than rival on its first {lost.images} images"
    assert lost.metrics["divergence"] > strong.metrics["divergence"]
    whole = scorer.score(BARE)
    assert lost.metrics["divergence"] == pytest.approx(whole.metrics["divergence"], rel=0.5)
    assert same(scorer.score(HALF), before)
    again = Scorer(long_workload).score(BARE, race_of(strong))
    assert same(again, lost)
