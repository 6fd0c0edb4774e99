"""Criteria that look at distances, feature maps and gradients, against slow computations."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import ConfigError, DataError, NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.criteria import (
    COUPLINGS,
    CRITERIA,
    GroupView,
    Samples,
    applicable_criteria,
    channel_order,
    channel_scores,
)
from evosearch.pruning.criteria.evidence import LABELLED, collect
from evosearch.pruning.criteria.maps import LOOKS
from evosearch.pruning.criteria.weights import geometric_median
from evosearch.pruning.groups import trace
from evosearch.pruning.table import Group
from tests.unit.small_networks import (
    Ghost,
    Small,
    Stream,
    Traced,
    own,
    part,
    samples_of,
    scores_of,
    uneven,
)


@pytest.fixture
def small() -> Traced:
    torch.manual_seed(0)
    return own(uneven(Small()))


@pytest.fixture
def stream() -> Traced:
    torch.manual_seed(0)
    return own(uneven(Stream()))


# --- the Fermat point


def test_fermat_point_of_a_triangle_sees_its_sides_under_equal_angles() -> None:
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    towards = F.normalize(points - geometric_median(points), dim=1)
    torch.testing.assert_close(
        towards @ towards.T, 1.5 * torch.eye(3).double() - 0.5, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_point_has_a_smaller_sum_of_distances_than_the_fermat_point(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    best = geometric_median(points)
    total = (points - best).norm(dim=1).sum()
    for near in best + 1e-3 * torch.randn(50, 4, generator=generator, dtype=torch.float64):
        assert (points - near).norm(dim=1).sum() >= total


def test_fermat_point_may_be_a_data_point() -> None:
    points = torch.tensor([[0.0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(points), points[0], atol=1e-9, rtol=0)
    apart = torch.cat([points, torch.tensor([[9.0, 7.0]], dtype=torch.float64)])
    torch.testing.assert_close(geometric_median(apart[1:4]), points[1], atol=2.0, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fermat_point_of_equal_points_is_that_point(n: int) -> None:
    torch.testing.assert_close(geometric_median(torch.full((n, 3), 2.5)), torch.full((3,), 2.5))


# --- feature maps


def maps_seed(n: int = 3, channels: int = 5, height: int = 4, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 8, 2, 2), (2, 6, 1, 1), (1, 2, 3, 3)])
def test_independence_is_the_fall_of_the_nuclear_norm(shape: tuple[int, ...]) -> None:
    maps = maps_seed(*shape)
    found = LOOKS["independence"].summarise(maps)
    for image, row in zip(maps.flatten(2), found, strict=True):
        total = torch.linalg.matrix_norm(image, "nuc")
        for channel in range(shape[1]):
            rest = image.clone()
            rest[channel] = 0
            wanted = total - torch.linalg.matrix_norm(rest, "nuc")
            assert float(row[channel]) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)


def test_independence_of_dead_and_doubled_channels() -> None:
    maps = maps_seed()
    maps[:, 1] = 0
    maps[:, 3] = maps[:, 2]
    found = LOOKS["independence"].summarise(maps)
    assert torch.allclose(found[:, 1], torch.zeros(3, dtype=torch.float64), atol=1e-6)
    torch.testing.assert_close(found[:, 2], found[:, 3])
    dead = LOOKS["independence"].summarise(torch.zeros(1, 3, 2, 2))
    assert dead.abs().max() < 1e-6


def test_looks_are_those_on_paper() -> None:
    maps = torch.tensor([[[[1.0, -3.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 4.0]]]])
    found = {kind: LOOKS[kind].summarise(maps).tolist() for kind in ("size", "active", "pooled")}
    assert found == {"size": [[1.0, 2.25]], "active": [[0.5, 1.0]], "pooled": [[-0.5, 2.25]]}
    assert LOOKS["rank"].summarise(maps).tolist() == [[1.0, 1.0]]


def reads(network: Network, name: str, images: Tensor) -> Tensor:
    """What a layer reads."""
    seen = []
    layer = dict(network.module.named_modules())[name]
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        network.module(images)
    handle.remove()
    return seen[0]


def test_activations_are_what_the_consumers_read(small: Traced) -> None:
    network = small[0]
    x = reads(network, "b", network.example(40)).double()
    for criterion, wanted in (
        ("activation-mean", x.abs().mean((0, 2, 3))),
        ("apoz", (x != 0).double().mean((0, 2, 3))),
        ("feature-rank", torch.linalg.matrix_rank(x[:32].float()).double().mean(0)),
    ):
        found = part(small, "a", scores_of(small, criterion))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=criterion)


def test_maps_that_were_flattened_are_put_together_again(small: Traced) -> None:
    network = small[0]
    x = reads(network, "hidden", network.example(40)).unflatten(1, (5, 3, 3))
    found = part(small, "b", scores_of(small, "feature-rank"))
    np.testing.assert_allclose(found, torch.linalg.matrix_rank(x[:32]).double().mean(0))
    found = part(small, "b", scores_of(small, "channel-independence"))
    wanted = LOOKS["independence"].summarise(x[:32]).mean(0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_entropy_counts_over_images(small: Traced) -> None:
    network = small[0]
    pooled = reads(network, "b", network.example(40)).mean((2, 3)).double().numpy()
    found = part(small, "a", scores_of(small, "activation-entropy"))
    for channel, values in enumerate(pooled.T):
        share = np.histogram(values, bins=16)[0] / len(values)
        wanted = -sum(p * np.log(p) for p in share if p)
        assert found[channel] == pytest.approx(wanted, rel=1e-6), channel


def test_channel_without_activity_has_no_entropy(small: Traced) -> None:
    with torch.no_grad():
        small[0].module.norm.bias[2] = -100
    found = part(small, "a", scores_of(small, "activation-entropy"))
    assert found[2] == 0
    assert found.argmin() == 2


# --- gradients


def gradient(network: Network, tensor: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(network.module(images), labels), tensor)[0]


def test_taylor_and_obd_by_hand(small: Traced) -> None:
    network = small[0]
    samples = samples_of(network)
    parts = list(torch.cat(list(samples.batches)).split([24, 16]))  # batches are not mixed
    assert samples.labels is not None
    labels = samples.labels.split([24, 16])
    taylor, curve, norm = [], [], []
    module = network.module
    for images, wanted in zip(parts, labels, strict=True):
        product = module.a.weight * gradient(network, module.a.weight, images, wanted)
        taylor.append(product.flatten(1).sum(1) ** 2)
        curve.append((product**2).flatten(1).sum(1) / 2)
        gamma, beta = module.norm.weight, module.norm.bias
        norm.append(
            gamma * gradient(network, gamma, images, wanted)
            + beta * gradient(network, beta, images, wanted)
        )
    for criterion, values in (
        ("weight-taylor", taylor),
        ("obd", curve),
    ):
        found = part(small, "a", scores_of(small, criterion, samples=samples))
        np.testing.assert_allclose(found, torch.stack(values).mean(0).detach(), rtol=1e-4)
    plan = small[1]
    view_scores = collect(module, plan, {"norm-product"}, samples).written["norm-product"]["norm"]
    np.testing.assert_allclose(view_scores, torch.stack(norm).detach(), rtol=1e-4, atol=1e-9)


def test_taylor_of_the_norm_predicts_what_zeroing_a_channel_does(stream: Traced) -> None:
    """To first order, the loss changes by minus the product when the norm's output is scaled."""
    network, plan = stream
    samples = Samples(batches=[network.example(30)], labels=torch.arange(30) % 10)
    found = collect(network.module, plan, {"norm-product"}, samples).written["norm-product"]
    norm, images = network.module.inner_norm, samples.batches[0]

    def loss() -> float:
        with torch.inference_mode():
            return float(F.cross_entropy(network.module(images), samples.labels))

    before, step = loss(), 1e-2
    with torch.no_grad():
        norm.weight[3] *= 1 - step
        norm.bias[3] *= 1 - step
    assert before - loss() == pytest.approx(step * float(found["inner_norm"][0, 3]), rel=0.1)


def test_gradients_need_labels_or_own_ones(small: Traced) -> None:
    samples = samples_of(small[0], labels=None)
    for criterion in ("weight-taylor", "obd", "excitation"):
        message = rf"criterion {criterion} needs gradients, from group a on.*proxy.labels"
        with pytest.raises(ConfigError, match=message):
            scores_of(small, criterion, samples=samples)
    own_labels = samples_of(small[0], labels=None, own_labels=True)
    found = scores_of(small, "weight-taylor", samples=own_labels)
    assert (found[:6] > 0).all()
    np.testing.assert_array_equal(found, scores_of(small, "weight-taylor", samples=own_labels))


def test_own_labels_do_not_look_at_labels(small: Traced) -> None:
    one, other = (
        scores_of(small, "obd", samples=samples_of(small[0], own_labels=True, labels=labels))
        for labels in (torch.zeros(40, dtype=torch.int64), torch.arange(40) % 10)
    )
    np.testing.assert_array_equal(one, other)


def test_label_without_a_class_is_refused(small: Traced) -> None:
    samples = samples_of(small[0], labels=torch.full((40,), 10))
    with pytest.raises(DataError, match=r"10 classes, .* label 10; labels count from 0"):
        scores_of(small, "obd", samples=samples)


def test_frozen_parameters_stay_frozen(small: Traced) -> None:
    network = small[0]
    network.module.requires_grad_(False)
    wanted = scores_of(small, "weight-taylor")
    assert not any(p.requires_grad for p in network.module.parameters())
    network.module.requires_grad_(True)
    np.testing.assert_array_equal(scores_of(small, "weight-taylor"), wanted)
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())


# --- excitation


def test_excitation_prefers_the_channel_that_matters(stream: Traced) -> None:
    network = stream[0]
    module = network.module
    with torch.no_grad():
        module.outer.weight[:, 0] = 0  # nobody hears channel 0 of inner
    images = network.example(48)
    with torch.inference_mode():
        labels = network.module(images).argmax(1)
    found = part(
        stream,
        "inner",
        scores_of(stream, "excitation", samples=Samples(batches=[images], labels=labels)),
    )
    assert ((found > 0) & (found < 1)).all()
    assert abs(found[0] - 0.5) < abs(found[1:] - 0.5).max()
    assert np.ptp(found) > 1e-4


# --- coupled layers


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_coupled_layers_are_combined_by_the_rule(stream: Traced, coupling: Any) -> None:
    network, plan = stream
    name = next(g.name for g in plan.table.groups if len(g.producers) == 2)
    filters = [
        layer.weight.flatten(1).abs().sum(1)
        for layer in (network.module.stem, network.module.outer)
    ]
    stacked = torch.stack(filters).double().detach()
    wanted = {"mean": stacked.mean(0), "max": stacked.amax(0), "sum": stacked.sum(0)}[coupling]
    found = part(stream, name, scores_of(stream, "l1", coupling=coupling))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_feature_maps_of_all_consumers_count(stream: Traced) -> None:
    network, plan = stream
    name = next(g.name for g in plan.table.groups if len(g.producers) == 2)
    images = network.example(40)
    sizes = [
        reads(network, "inner", images).abs().mean((0, 2, 3)),
        reads(network, "fc", images).abs().mean(0),
    ]
    found = part(stream, name, scores_of(stream, "activation-mean", coupling="max"))
    np.testing.assert_allclose(found, torch.stack(sizes).amax(0), rtol=1e-5)


# --- all of them


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_what_else_is_asked(stream: Traced, criterion: str) -> None:
    network, plan = stream
    samples = samples_of(network)
    together = channel_scores(network.module, plan, list(CRITERIA), samples)
    alone = channel_scores(network.module, plan, [criterion], samples)
    np.testing.assert_allclose(alone[0], together[list(CRITERIA).index(criterion)], rtol=1e-9)


@pytest.mark.parametrize("criterion", [n for n, c in CRITERIA.items() if not c.control])
def test_permuted_channels_have_permuted_scores(criterion: str) -> None:
    torch.manual_seed(0)
    network, plan = own(uneven(Stream()))
    module = network.module
    before = part((network, plan), "inner", scores_of((network, plan), criterion))
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    with torch.no_grad():
        for layer in (module.inner, module.inner_norm):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.ndim:
                    tensor.copy_(tensor[order].clone())
        module.outer.weight.copy_(module.outer.weight[:, order].clone())
    after = part((network, plan), "inner", scores_of((network, plan), criterion))
    if criterion == "excitation":  # its gates start from random weights, channel by channel
        assert not np.array_equal(after, before)
    else:
        np.testing.assert_allclose(after, before[order.numpy()], rtol=1e-3, atol=1e-6)


def test_filters_of_a_channel_and_of_its_double_both_count() -> None:
    torch.manual_seed(0)
    traced = own(uneven(Ghost()))
    module = traced[0].module
    stem, single = module.stem.weight.abs().sum((1, 2, 3)), module.few.weight.abs().sum((1, 2, 3))
    wanted = torch.stack([stem[:4], stem[4:], single, module.twin.weight.abs().sum((1, 2, 3))])
    found = part(traced, "stem", scores_of(traced, "l1", coupling="max"))
    np.testing.assert_allclose(found, wanted.detach().amax(0), rtol=1e-6)


def test_norm_behind_a_flatten_says_nothing_of_channels() -> None:
    class Flattened(Small):
        def __init__(self) -> None:
            super().__init__()
            self.norm_b, self.norm_flat = nn.BatchNorm2d(5), nn.BatchNorm1d(45)
            self.norm_hidden = nn.BatchNorm1d(20)
            nn.init.uniform_(self.norm_flat.weight, 0.5, 1.5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm_b(self.b(F.relu(self.norm(self.a(x))))))
            hidden = self.norm_hidden(self.hidden(self.norm_flat(x.flatten(1))))
            logits: Tensor = self.fc(F.relu(hidden))
            return logits

    torch.manual_seed(0)
    traced = own(uneven(Flattened()))
    scale = traced[0].module.norm_b.weight.detach()
    np.testing.assert_allclose(part(traced, "b", scores_of(traced, "bn-scale")), scale, rtol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_channels_with_a_double_are_scored(criterion: str) -> None:
    torch.manual_seed(0)
    traced = own(uneven(Ghost()))
    found = part(traced, "stem", scores_of(traced, criterion))
    assert found.shape == (4,)
    assert np.isfinite(found).all()


def test_nothing_is_collected_that_nobody_needs(
    small: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network ran")

    handle = small[0].module.register_forward_pre_hook(refuse)
    scores_of(small, "l1")
    scores_of(small, "fermat")
    with pytest.raises(AssertionError, match="the network ran"):
        scores_of(small, "apoz")
    handle.remove()


def test_one_pass_serves_all_criteria_that_look_at_data(stream: Traced) -> None:
    network, plan = stream
    seen: list[int] = []
    handle = network.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    names = [n for n, c in CRITERIA.items() if not {"grams", "excitation"} & set(c.needs)]
    channel_scores(network.module, plan, names, samples_of(network))
    handle.remove()
    assert sum(seen) == 40


def test_criterion_that_looks_at_data_needs_images(small: Traced) -> None:
    network, plan = small
    with pytest.raises(ConfigError, match="criterion apoz needs calibration images, from group a"):
        channel_scores(network.module, plan, ["l1", "apoz"])


@pytest.mark.parametrize("criterion", ["apoz", "activation-entropy", "channel-independence", "obd"])
def test_activations_that_are_not_finite_are_refused_with_the_group(
    stream: Traced, criterion: str
) -> None:
    with torch.no_grad():
        stream[0].module.inner_norm.bias[1] = torch.nan
    with pytest.raises(NetworkError, match=f"criterion {criterion}.* group (inner|stem|outer)"):
        scores_of(stream, criterion)


def test_random_scores_differ_between_groups_but_not_between_calls(stream: Traced) -> None:
    one, other = scores_of(stream, "random"), scores_of(stream, "random")
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one)) == len(one)


def test_criteria_that_need_norms_do_not_apply_without(small: Traced) -> None:
    names, refused = applicable_criteria(small[0].module, small[1])
    assert refused == dict.fromkeys(["bn-scale", "bn-taylor"], "group b has no batch norm")
    assert set(names) == CRITERIA.keys() - refused.keys() - {"random"}


@pytest.mark.parametrize("criterion", ["bn-scale", "bn-taylor"])
def test_norm_criteria_without_norms_name_criterion_and_group(criterion: str) -> None:
    network = load_network(NetworkSpec(name="lenet-5"))
    message = rf"{criterion} needs a batch norm, and group conv1 has none"
    with pytest.raises(NetworkError, match=message):
        channel_scores(network.module, trace(network), [criterion], samples_of(network))


def test_labelled_kinds_are_those_of_gradients_and_gates() -> None:
    labelled = {name for name, c in CRITERIA.items() if set(c.needs) & LABELLED}
    assert labelled == {"bn-taylor", "weight-taylor", "obd", "excitation"}


def test_there_are_more_than_twelve_and_all_say_where_they_come_from() -> None:
    assert len(CRITERIA) >= 12
    for name, criterion in CRITERIA.items():
        assert criterion.score.__doc__, name


# --- views without evidence


def test_combining_is_over_layers() -> None:
    group = Group(name="g", channels=2, resolution=(1, 1), producers=("g",), consumers=("h",))
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    found = {
        rule: GroupView(group, (), (), (), coupling=rule).combine(scores).tolist()  # type: ignore[arg-type]
        for rule in COUPLINGS
    }
    assert found == {"mean": [2.0, 3.0], "max": [3.0, 5.0], "sum": [4.0, 6.0]}


def test_orders_by_mean_and_by_sum_are_one(stream: Traced) -> None:
    network, plan = stream
    mean = channel_order(network.module, plan, "l2")
    table = plan.table
    total = channel_scores(network.module, plan, ["l2"], coupling="sum")[0]
    for offset, n in zip(table.offsets, table.channels, strict=True):
        order = np.argsort(-total[offset : offset + n], kind="stable")
        assert mean[offset + order].tolist() == list(range(n))
