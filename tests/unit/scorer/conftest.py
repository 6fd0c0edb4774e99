"""A ResNet-20 that learned nothing, some images, and workloads made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evosearch.data import Images, open_source
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import (
    Workload,
    prepare_workload,
)
from tests.unit.scorer.bench import BATCH, Prepare

DROPOUT_FILE = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )
"""


@pytest.fixture(scope="session")
def images() -> tuple[Images, Images]:
    """40 calibration and 56 validation images."""
    source = open_source("cifar10-sample")
    return source.training().take(np.arange(40)), source.held_out().take(np.arange(56))


@pytest.fixture(scope="session")
def dense() -> tuple[Network, CuttingPlan]:
    """A ResNet-20 that learned nothing, but whose batch norm knows the images' statistics."""
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name="resnet20"))
    warm = network.normalise(open_source("cifar10-sample").training().take(np.arange(64)).pixels)
    network.module.train()(warm)
    network.module.eval()
    return network, trace(network)


@pytest.fixture(scope="session")
def prepared(dense: tuple[Network, CuttingPlan], images: tuple[Images, Images]) -> Prepare:
    """Makes workloads, each only once."""
    known: dict[tuple[Any, ...], Workload] = {}

    def prepare(name: str = "compensated", criterion: str = "l1", **options: Any) -> Workload:
        key = (name, criterion, *sorted(options.items()))
        if key not in known:
            proxy = ProxySettings(
                **{"name": name, "criterion": criterion, "batch_size": BATCH, **options}
            )
            known[key] = prepare_workload(*dense, proxy, *images)
        return known[key]

    return prepare


@pytest.fixture
def with_dropout(tmp_path: Path, images: tuple[Images, Images]) -> Workload:
    (tmp_path / "dropout_net.py").write_text(DROPOUT_FILE)
    torch.manual_seed(0)
    spec = NetworkSpec(name=f"{tmp_path}/dropout_net.py:make", input_shape=(3, 32, 32))
    network = load_network(spec)
    settings = ProxySettings(name="recalibrated", criterion="l1", batch_size=BATCH)
    return prepare_workload(network, trace(network), settings, *images)
