"""Every shipped search space keeps the promises of its role, on real networks."""

from functools import cache
from typing import Any

import pytest

from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.space import SearchSpace, make_space
from evosearch.testing import SpaceContract

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "stage": {"grouping": "stage"},
    "round-to-8": {"round_to": 8},
    "narrow": {"sparsity": [0.25, 0.5]},
    "one-ratio": {"sparsity": [0.5, 0.5]},
    "everything": {"sparsity": [0.0, 1.0]},
    "half-the-macs": {"project_onto": {"macs": 0.5}},
    "half-the-params": {"project_onto": {"params": 0.5}},
    "half-the-macs-by-stage-and-8": {
        "grouping": "stage",
        "round_to": 8,
        "project_onto": {"macs": 0.5},
    },
}
CASES = [
    *(("resnet20", configuration) for configuration in CONFIGURATIONS),
    *(("lenet-5", name) for name in ("layer", "round-to-8", "narrow", "half-the-params")),
    *(("vgg16-cifar", name) for name in ("layer", "stage", "half-the-macs-by-stage-and-8")),
]


@cache
def traced(network: str) -> GroupTable:
    return trace(load_network(NetworkSpec(name=network))).table


@pytest.mark.parametrize(("network", "configuration"), CASES)
class TestLayerSparsity(SpaceContract):
    @pytest.fixture(autouse=True)
    def _choose(self, network: str, configuration: str) -> None:
        self.network = network
        self.options = CONFIGURATIONS[configuration]

    def table(self) -> GroupTable:
        return traced(self.network)

    def make(self, table: GroupTable) -> SearchSpace:
        return make_space("layer-sparsity", table, self.options)


class TestLayerSparsityOfAnUnevenStage(SpaceContract):
    # Two groups of different size share a gene: rounding leaves policies that no gene expresses.
    exact_inverse = False

    def make(self, table: GroupTable) -> SearchSpace:
        return make_space("layer-sparsity", table, {"grouping": "stage"})
