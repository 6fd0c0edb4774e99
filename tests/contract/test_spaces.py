"""Every shipped search space keeps the promises of its role, on real networks."""

from functools import cache
from typing import Any

import pytest

from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.space import CriteriaFacts, SearchSpace, make_space
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
    "blocks": {"blocks": True},
    "blocks-by-stage-and-8": {"blocks": True, "grouping": "stage", "round_to": 8},
    "half-the-macs-and-blocks": {"blocks": True, "project_onto": {"macs": 0.5}},
    "a-tenth-and-blocks": {"blocks": True, "sparsity": [0.0, 0.75], "project_onto": {"macs": 0.1}},
}
GROUPED = "regnet_y_400mf"  # whose convolutions have groups of 8 channels
CASES = [
    *((GROUPED, name) for name in ("layer", "narrow", "half-the-macs-by-stage-and-8")),
    *((GROUPED, name) for name in ("blocks", "half-the-macs-and-blocks")),
    *(("resnet20", configuration) for configuration in CONFIGURATIONS),
    *(("lenet-5", name) for name in ("layer", "round-to-8", "narrow", "half-the-params")),
    *(("vgg16-cifar", name) for name in ("layer", "stage", "half-the-macs-by-stage-and-8")),
]


@cache
def traced(network: str) -> GroupTable:
    shape = (3, 64, 64) if network == GROUPED else None
    dense = load_network(NetworkSpec(name=network, input_shape=shape))
    return trace(dense, blocks=network in (GROUPED, "resnet20")).table


@pytest.mark.parametrize(("network", "configuration"), CASES)
class TestLayerSparsity(SpaceContract):
    @pytest.fixture(autouse=True)
    def _choose(self, network: str, configuration: str) -> None:
        self.network = network
        self.options = CONFIGURATIONS[configuration]
        # Groups of one stage have widths of their own there.
        self.exact_inverse = network != GROUPED or self.options.get("grouping") != "stage"

    def table(self) -> GroupTable:
        return traced(self.network)

    def make(self, table: GroupTable) -> SearchSpace:
        return make_space("layer-sparsity", table, self.options)


class TestLayerSparsityOfAnUnevenStage(SpaceContract):
    # Two groups of different size share a gene: rounding leaves policies that no gene expresses.
    exact_inverse = False

    def make(self, table: GroupTable) -> SearchSpace:
        return make_space("layer-sparsity", table, {"grouping": "stage"})


CRITERIA = ("l1", "fpgm", "bn-scale", "apoz", "obd", "residual-energy")
CLUSTERS: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "three": (("apoz", "obd"), ("bn-scale",), ("fpgm", "l1", "residual-energy")),  # type: ignore[dict-item]
    "one": (CRITERIA,),
    "six": tuple((name,) for name in CRITERIA),  # type: ignore[misc]
}
BLENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("three", {"sparsity": 0.5}),
    "nothing-removed": ("three", {"sparsity": 0.0}),
    "one-cluster": ("one", {"sparsity": 0.3, "blending": "stage"}),
    "six-clusters": ("six", {"sparsity": 0.5, "blending": "network"}),
    "uniform": ("three", {"sparsity": [0.0, 0.9], "grouping": "network"}),
    "uniform-half-the-macs": (
        "three",
        {"sparsity": [0.0, 0.95], "grouping": "network", "project_onto": {"macs": 0.5}},
    ),
    "joint": ("three", {"sparsity": [0.0, 0.9]}),
    "joint-by-stage": ("one", {"sparsity": [0.0, 0.9], "grouping": "stage", "blending": "stage"}),
    "joint-half-the-macs": (
        "three",
        {"sparsity": [0.0, 0.9], "round_to": 4, "project_onto": {"macs": 0.5}},
    ),
}


@pytest.mark.parametrize(
    ("configuration", "default"),
    [*((name, "residual-energy") for name in BLENDS), ("fixed", "l2")],
)
class TestCriterionBlend(SpaceContract):
    @pytest.fixture(autouse=True)
    def _choose(self, configuration: str, default: str) -> None:
        self.clusters, self.options = BLENDS[configuration]
        self.default = default
        # One ratio of 16, 32 and 64 channels is not always the mean of their roundings.
        self.exact_inverse = configuration != "uniform"

    def table(self) -> GroupTable:
        return traced("resnet20")

    def make(self, table: GroupTable) -> SearchSpace:
        facts = CriteriaFacts(
            names=CRITERIA,
            default=self.default,
            clusters=(CLUSTERS[self.clusters],) * len(table.groups),
        )
        return make_space("criterion-blend", table, self.options, facts)
