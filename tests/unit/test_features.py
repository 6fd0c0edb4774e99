"""Distortion: where features are read, and what their distance means."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evosearch.scoring.features as features_module
from evosearch.data import Images, open_source
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.scoring.features import Distortion, Features, FeatureTap, feature_layer
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload, prepare_workload, with_validation

DENSE = Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))
HALF = Policy((8, 8, 8, 16, 16, 16, 32, 32, 32))
FEW = Policy((2, 2, 2, 4, 4, 4, 8, 8, 8))


def workload(**settings: Any) -> Workload:
    """The shipped ResNet-20 with 40 validation images."""
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    source = open_source("cifar10-sample")
    return prepare_workload(
        network,
        trace(network),
        ProxySettings(**{"name": "recalibrated", "criterion": "l1", "batch_size": 16, **settings}),
        source.training().take(np.arange(64)),
        source.held_out().take(np.arange(40)),
    )


@pytest.fixture(scope="module")
def prepared() -> Workload:
    return workload()


def last_maps(module: nn.Module, images: Tensor) -> Tensor:
    """`(n, 64, 8, 8)` of a ResNet-20, in the plainest way."""
    found: list[Tensor] = []
    handle = module.get_submodule("layer3").register_forward_hook(
        lambda _module, _inputs, output: found.append(output)
    )
    with torch.inference_mode():
        module.eval()(images)
    handle.remove()
    return found[0]


def test_a_residual_network_is_compared_by_its_last_maps(prepared: Workload) -> None:
    assert prepared.features.layer == "layer3"
    assert prepared.features.values.shape == (40, 64 * 8 * 8)


def test_distortion_is_the_error_of_the_maps_as_a_share_of_their_energy(
    prepared: Workload,
) -> None:
    scorer = Scorer(prepared)
    found = scorer.score(HALF).metrics["distortion"]
    network = prepared.network()
    images = network.normalise(prepared.validation.pixels)
    wanted = last_maps(network.module, images)
    maps = last_maps(scorer.network_of(HALF), images)
    error = (maps - wanted).square().flatten(1).sum(1).mean()
    assert found == pytest.approx(float(error / wanted.square().flatten(1).sum(1).mean()), rel=1e-4)


def test_nothing_cut_is_no_distortion_and_more_cut_is_more(prepared: Workload) -> None:
    scorer = Scorer(prepared)
    dense, half, few = (scorer.score(p).metrics["distortion"] for p in (DENSE, HALF, FEW))
    uncut = Scorer(workload(name="raw")).score(DENSE).metrics["distortion"]
    assert uncut == pytest.approx(0, abs=1e-9)
    assert dense < half < few


def test_batches_do_not_matter() -> None:
    one, other = (
        Scorer(workload(name="raw", batch_size=size)).score(HALF).metrics["distortion"]
        for size in (16, 40)
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_on_other_images_the_dense_features_are_those_of_the_other_images(
    prepared: Workload,
) -> None:
    others = open_source("cifar10-sample").held_out().take(np.arange(40, 72))
    moved = with_validation(prepared, others)
    assert moved.features.layer == "layer3"
    assert moved.features.values.shape == (32, 64 * 8 * 8)
    assert Scorer(moved).score(HALF).metrics["distortion"] < 1
    network = prepared.network()
    wanted = last_maps(network.module, network.normalise(others.pixels)).flatten(1).numpy()
    assert np.allclose(moved.features.values, wanted, atol=1e-3)


def test_other_images_are_read_at_the_same_places(
    prepared: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = open_source("cifar10-sample").held_out().take(np.arange(40, 72))
    monkeypatch.setattr(features_module, "_MAX_BYTES", 4 * 40 * 64 * 5)
    sampled = workload()
    moved = with_validation(sampled, others)
    assert np.array_equal(moved.features.positions, sampled.features.positions)
    rows, columns = np.divmod(sampled.features.positions, 8)
    assert len(np.unique(rows)) > 2
    assert len(np.unique(columns)) > 2


def test_large_maps_are_read_at_fewer_places(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = Scorer(workload()).score(HALF).metrics["distortion"]
    monkeypatch.setattr(features_module, "_MAX_BYTES", 4 * 40 * 64 * 5)
    sampled = workload()
    assert len(sampled.features.positions) == 5
    assert sampled.features.values.shape == (40, 64 * 5)
    assert Scorer(sampled).score(HALF).metrics["distortion"] == pytest.approx(everywhere, rel=0.5)


class Ends(nn.Module):
    """A convolution whose channels can be narrowed or not, and what follows."""

    def __init__(self, width: int, *, twice: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, width, 3)
        self.again = nn.Conv2d(width, width, 3) if twice else nn.Identity()
        self.inplace = inplace
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.last(self.first(x))))
        if self.inplace:
            x.mul_(0)
        return self.head(x.mean((2, 3)))


def test_maps_that_lose_channels_are_not_compared() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert feature_layer(Ends(8), Ends(8), [["first"]], images) == "last"
    assert feature_layer(Ends(8), Ends(4), [["first"], ["last"]], images) is None


def test_a_module_that_runs_twice_is_not_named() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert feature_layer(Ends(8, twice=True), Ends(8, twice=True), [["first"]], images) == "last"


def test_a_network_without_maps_is_compared_by_its_outputs() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    assert feature_layer(plain, plain, [["1"]], torch.randn(2, 3, 2, 2)) is None


def test_maps_that_come_before_what_is_cut_are_not_compared() -> None:
    # Nothing that is cut moves the maps of a leading module: their distance would always be zero.
    first = nn.Sequential(
        nn.Dropout2d(), nn.Flatten(), nn.Linear(3 * 16, 12), nn.ReLU(), nn.Linear(12, 5)
    )
    images = torch.randn(2, 3, 4, 4)
    assert feature_layer(first.eval(), first, [["2"]], images) is None
    # A head with a hidden layer: the maps know of one cut, and not of the other.
    head = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Flatten()),
        *(nn.Linear(8 * 4, 6), nn.ReLU(), nn.Linear(6, 5)),
    )
    assert feature_layer(head, head, [["0"]], images) == "1"
    assert feature_layer(head, head, [["0"], ["3"]], images) is None


def test_a_network_is_looked_at_and_left_alone() -> None:
    module = Ends(8).requires_grad_(False)
    assert feature_layer(module, Ends(8), [["first"]], torch.randn(2, 3, 16, 16)) == "last"
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert not module.last._forward_hooks


def test_a_network_of_linear_layers_is_distorted_when_it_is_cut() -> None:
    """End to end through a scorer, by outputs, in both precisions."""
    source = open_source("cifar10-sample").held_out().take(np.arange(24))
    grey = Images(source.pixels[:, 2:30, 2:30, :1].copy(), source.labels)
    network = load_network(NetworkSpec(name="lenet-300-100"))
    plan = trace(network)
    for precision in ("float32", "bfloat16"):
        made = prepare_workload(
            network,
            plan,
            ProxySettings(name="raw", criterion="l1", precision=precision),
            grey.take(np.arange(8)),
            grey.take(np.arange(8, 24)),
        )
        assert made.features.layer is None
        scorer = Scorer(made)
        dense = plan.table.dense
        half = Policy(tuple((count + 1) // 2 for count in dense.keep))
        assert scorer.score(dense).metrics["distortion"] < 0.01
        assert scorer.score(half).metrics["distortion"] > 0.01


def test_what_happens_in_place_later_is_not_seen() -> None:
    module = Ends(8, inplace=True)
    tap = FeatureTap(module, "last", 2)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        outputs = module(images)
        wanted = module.last(module.first(images))
    assert torch.equal(tap.take(outputs), wanted.flatten(1))


def test_a_shift_of_all_classes_is_no_distortion() -> None:
    wanted = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -2.0]])
    features = Features(
        layer=None, positions=np.empty(0, dtype=np.int64), values=wanted.numpy().copy()
    )
    distortion = Distortion(nn.Identity(), features, "cpu")
    assert distortion.of(wanted + 5, 0).abs().max() < 1e-12
    # Outputs that say nothing: one, on average.
    assert float(distortion.of(torch.zeros(2, 3), 0).mean()) == pytest.approx(1)
    assert distortion.of(wanted[1:], 1).abs().max() == 0


def test_a_network_that_says_nothing_has_no_infinite_distortion() -> None:
    features = Features(
        layer=None,
        positions=np.empty(0, dtype=np.int64),
        values=np.zeros((2, 3), dtype=np.float32),
    )
    found = Distortion(nn.Identity(), features, "cpu").of(torch.tensor([[1.0, 2.0, 3.0]]), 0)
    assert torch.isfinite(found).all()
