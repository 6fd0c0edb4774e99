"""Candidates of a network whose channels stand twice in what is added to them, as GhostNet's do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from evosearch.data import Images
from evosearch.networks import InputSpec, Network, NetworkSpec
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.results.models import load_pruned, save_pruned
from evosearch.scoring.proxies import PROXIES, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload
from tests.unit.small_networks import Ghost, uneven

Traced = tuple[Network, CuttingPlan]
NARROW = Policy((3, 4))


@pytest.fixture(scope="module")
def traced(images: tuple[Images, Images]) -> Traced:
    torch.manual_seed(0)
    module = uneven(Ghost())
    network = Network(
        spec=NetworkSpec(name="tests.unit.small_networks:Ghost"),
        module=module,
        input=InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # of all that was seen
    module.train()(network.normalise(images[0].pixels))
    module.eval()
    return network, trace(network)


@pytest.mark.parametrize("name", PROXIES)
def test_every_proxy_scores_it(traced: Traced, images: tuple[Images, Images], name: str) -> None:
    settings = ProxySettings(name=name, criterion="l1", batch_size=16, precision="float32")
    scorer = Scorer(prepare_workload(*traced, settings, *images))
    found = scorer.score(NARROW)
    assert found.reason is None
    layers = dict(scorer.network_of(NARROW).named_modules())
    widths = [layers[name].out_channels for name in ("stem", "inner", "few", "twin")]
    assert widths == [6, 4, 3, 3]
    whole = scorer.score(traced[1].table.dense)
    assert whole.metrics["distortion"] < found.metrics["distortion"]


def test_reconstruction_comes_nearer_than_recalibration(
    traced: Traced, images: tuple[Images, Images]
) -> None:
    def distortion(name: str) -> float:
        settings = ProxySettings(name=name, criterion="l1", batch_size=16, precision="float32")
        scorer = Scorer(prepare_workload(*traced, settings, *images))
        return scorer.score(NARROW).metrics["distortion"]

    assert distortion("reconstructed") < distortion("recalibrated")


def test_exported_network_loads(
    traced: Traced, images: tuple[Images, Images], tmp_path: Path
) -> None:
    network, plan = traced
    settings = ProxySettings(name="reconstructed", criterion="l1", batch_size=16)
    cut = Scorer(prepare_workload(network, plan, settings, *images)).network_of(NARROW)
    groups = [(group.name, group.channels) for group in plan.table.groups]
    file = tmp_path / "cut.safetensors"
    save_pruned(file, replace(network, module=cut), groups, NARROW, {})
    example = network.example(4)
    with torch.inference_mode():
        assert torch.equal(load_pruned(file, Ghost)(example), cut(example))
