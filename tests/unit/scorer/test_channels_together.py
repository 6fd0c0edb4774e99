"""Channels that go together: of grouped convolutions and norms, and with doubles, as in GhostNet.

What they ask of criteria, stopwatches, repairs and exports.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evosearch.data import Images
from evosearch.errors import NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.blending import places_of
from evosearch.pruning.criteria import CRITERIA, applicable_criteria, channel_scores
from evosearch.pruning.criteria.view import group_views
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.results.models import load_pruned, save_pruned
from evosearch.scoring.proxies import PROXIES, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.timing import draw_widths
from evosearch.scoring.workload import prepare_workload
from tests.unit.small_networks import samples_of, uneven

FILE = """
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.c, self.norm_c = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = F.relu(self.norm_a(self.a(x)))
        y = F.relu(self.norm_b(self.b(y)))
        return F.relu(x + self.norm_c(self.c(y)))

def make(num_classes):
    stem = nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(
        *stem, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )
"""
NARROW = Policy((8, 4, 12))
Traced = tuple[Network, CuttingPlan]


def warmed(name: str, images: Images) -> Traced:
    """A network whose norms differ from channel to channel, and know the images."""
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name=name, input_shape=(3, 32, 32)))
    uneven(network.module)
    norms = [layer for layer in network.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # of all that was seen
    network.module.train()(network.normalise(images.pixels))
    network.module.eval()
    return network, trace(network)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, images: tuple[Images, Images]) -> Traced:
    """A stream of 8 channels and two blocks whose inner 16 channels go four at a time."""
    file = tmp_path_factory.mktemp("grouped") / "grouped_net.py"
    file.write_text(FILE)
    network, plan = warmed(f"{file}:make", images[0])
    assert [(g.channels, g.granularity) for g in plan.table.groups] == [(8, 1), (16, 4), (16, 4)]
    return network, plan


@dataclass(frozen=True)
class Case:
    """A network, a policy, and what that leaves of some layers."""

    traced: Traced
    policy: Policy
    widths: Mapping[str, tuple[int, int]]


@pytest.fixture(scope="module", params=["grouped", "normed", "doubled"])
def case(request: pytest.FixtureRequest, traced: Traced, images: tuple[Images, Images]) -> Case:
    if request.param == "grouped":
        return Case(traced, NARROW, {"3.b": (4, 1), "4.b": (12, 3)})
    if request.param == "normed":
        normed = warmed("tests.unit.small_networks:Normed", images[0])
        return Case(normed, Policy((4, 5)), {"a": (4, 1), "b": (5, 1)})
    ghost = warmed("tests.unit.small_networks:Ghost", images[0])
    widths = {"stem": (6, 1), "inner": (4, 1), "few": (3, 1), "twin": (3, 3)}
    return Case(ghost, Policy((3, 4)), widths)


def test_channels_that_go_together_have_the_mean_of_their_scores(traced: Traced) -> None:
    network, plan = traced
    alone = np.asarray(CRITERIA["l1"].score(group_views(network.module, plan)[1]))
    scores = channel_scores(network.module, plan, ["l1"])[0][8:24]
    assert np.array_equal(scores, alone.reshape(4, 4).mean(axis=1).repeat(4))


def test_every_criterion_orders_whole_groups(traced: Traced) -> None:
    network, plan = traced
    known, _ = applicable_criteria(network.module, plan)
    samples = samples_of(network, labels=torch.arange(40) % 10)
    for scores in channel_scores(network.module, plan, known, samples):
        places = places_of(scores, plan.table)[8:].reshape(-1, 4)
        # Four in a row, beginning where a whole group may.
        assert (places - places[:, :1] == np.arange(4)).all()
        assert (places[:, 0] % 4 == 0).all()


def test_widths_that_are_timed_are_whole_groups(traced: Traced) -> None:
    _, plan = traced
    for round_to in (1, 3, 8):
        for keep in draw_widths(plan.table, 40, 0, round_to):
            plan.table.check(Policy(tuple(keep.tolist())))


@pytest.mark.parametrize("name", PROXIES)
def test_every_proxy_scores_it(case: Case, images: tuple[Images, Images], name: str) -> None:
    settings = ProxySettings(name=name, criterion="l1", batch_size=16, precision="float32")
    scorer = Scorer(prepare_workload(*case.traced, settings, *images))
    found = scorer.score(case.policy)
    assert found.reason is None
    layers = dict(scorer.network_of(case.policy).named_modules())
    left = {name: (layers[name].out_channels, layers[name].groups) for name in case.widths}
    assert left == case.widths
    whole = scorer.score(case.traced[1].table.dense)
    assert whole.metrics["distortion"] < found.metrics["distortion"]


def test_reconstruction_comes_nearer_than_recalibration(
    case: Case, images: tuple[Images, Images]
) -> None:
    found = []
    for name in ("reconstructed", "recalibrated"):
        settings = ProxySettings(name=name, criterion="l1", batch_size=16, precision="float32")
        scorer = Scorer(prepare_workload(*case.traced, settings, *images))
        found.append(scorer.score(case.policy).metrics["distortion"])
    assert found[0] < 0.9 * found[1]


def test_policy_that_splits_a_group_is_a_failed_measurement(
    traced: Traced, images: tuple[Images, Images]
) -> None:
    settings = ProxySettings(name="raw", criterion="l1", batch_size=16)
    found = Scorer(prepare_workload(*traced, settings, *images)).score(Policy((8, 6, 16)))
    assert found.reason is not None
    assert "keeps multiples of 4 channels, not 6" in found.reason


def test_exported_network_loads(case: Case, images: tuple[Images, Images], tmp_path: Path) -> None:
    network, plan = case.traced
    settings = ProxySettings(name="reconstructed", criterion="l1", batch_size=16)
    cut = Scorer(prepare_workload(network, plan, settings, *images)).network_of(case.policy)
    groups = [(group.name, group.channels) for group in plan.table.groups]
    file = tmp_path / "cut.safetensors"
    save_pruned(file, replace(network, module=cut), groups, case.policy, {})
    loaded = load_pruned(file)
    example = network.example(4)
    with torch.inference_mode():
        assert torch.equal(loaded(example), cut(example))


def test_network_of_a_version_that_left_grouped_convolutions_alone_loads(
    traced: Traced, tmp_path: Path
) -> None:
    network, plan = traced
    keep = np.ones(41, dtype=np.bool_)
    keep[5:8] = False
    cut = Cutter(plan, network.module).cut(keep)
    (group, *_) = plan.table.groups
    groups, counts = [(group.name, group.channels)], Policy((5,))
    file = tmp_path / "old.safetensors"
    save_pruned(file, replace(network, module=cut), groups, counts, {})
    example = network.example(4)
    with torch.inference_mode():
        assert torch.equal(load_pruned(file)(example), cut.eval()(example))


def test_file_of_another_network_says_what_to_name(
    traced: Traced, images: tuple[Images, Images], tmp_path: Path
) -> None:
    network, plan = traced
    settings = ProxySettings(name="raw", criterion="l1", batch_size=16)
    cut = Scorer(prepare_workload(network, plan, settings, *images)).network_of(NARROW)
    (group, *_) = plan.table.groups
    # As if an earlier version had cut the stream alone: the rest has other widths than that says.
    groups, counts = [(group.name, group.channels)], Policy((8,))
    save_pruned(tmp_path / "c.safetensors", replace(network, module=cut), groups, counts, {})
    with pytest.raises(NetworkError, match=r"do not fit .*name that with load_pruned\(file, netw"):
        load_pruned(tmp_path / "c.safetensors")
