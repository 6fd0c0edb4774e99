"""Criteria that look at distances, feature maps and gradients, against slow computations."""

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import ConfigError, NetworkError
from evosearch.networks import InputSpec, Network, NetworkSpec, load_network
from evosearch.pruning.criteria import (
    COUPLINGS,
    CRITERIA,
    Criterion,
    GroupView,
    Samples,
    applicable_criteria,
    channel_order,
    channel_scores,
    criterion_named,
    registry,
)
from evosearch.pruning.criteria.evidence import LABELLED, collect
from evosearch.pruning.criteria.maps import LOOKS
from evosearch.pruning.criteria.weights import geometric_median
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import Group


class Small(nn.Module):
    """Convolution a with norm and ReLU, convolution b flattened into the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.hidden = nn.Linear(5 * 9, 20)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x))
        logits: Tensor = self.fc(F.relu(self.hidden(x.flatten(1))))
        return logits


class Stream(nn.Module):
    """A residual stream, written by two convolutions with norms and read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.outer, self.outer_norm = nn.Conv2d(7, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        logits: Tensor = self.fc(F.relu(x + y).mean((2, 3)))
        return logits


Traced = tuple[Network, CuttingPlan]


def own(module: nn.Module) -> Traced:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    network = Network(
        spec=NetworkSpec(name="own"),
        module=module.eval(),
        input=InputSpec(shape=(3, 6, 6), mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    return network, trace(network)


@pytest.fixture
def small() -> Traced:
    torch.manual_seed(0)
    return own(Small())


@pytest.fixture
def stream() -> Traced:
    torch.manual_seed(0)
    return own(Stream())


def samples_of(network: Network, n: int = 40, **options: Any) -> Samples:
    images = network.example(n)
    options.setdefault("labels", torch.arange(n) % 10)
    return Samples(batches=list(images.split(24)), **options)


def scores_of(traced: Traced, criterion: str, **options: Any) -> np.ndarray[Any, Any]:
    network, plan = traced
    samples = options.pop("samples", None) or samples_of(network)
    return channel_scores(network.module, plan, [criterion], samples, **options)[0]


def part(traced: Traced, name: str, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    table = traced[1].table
    index = [group.name for group in table.groups].index(name)
    return scores[table.offsets[index] :][: table.channels[index]]


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
    with pytest.raises(NetworkError, match=r"10 classes, .* label 10; set network.num_classes"):
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
    network, plan = own(Stream())
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


# --- own criteria

OWN = """
from evosearch.pruning.criteria import Criterion

def loudest(view):
    "Largest weight of the filter."
    return view.producers[0].abs().amax(dim=1)

def short(view):
    return [1.0]

def broken(view):
    raise KeyError("lost")

def hungry(view):
    return view.seen("pooled")[0].mean(dim=0)

fed = Criterion(title="fed", score=hungry, needs=("pooled",))
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_own_criterion_by_file(small: Traced, file: str) -> None:
    found = scores_of(small, f"{file}:loudest")
    wanted = small[0].module.a.weight.abs().amax((1, 2, 3)).detach()
    np.testing.assert_allclose(part(small, "a", found), wanted)
    assert criterion_named(f"{file}:loudest").title == "Largest weight of the filter."


def test_own_criterion_may_say_what_it_needs(small: Traced, file: str) -> None:
    assert scores_of(small, f"{file}:fed").shape == (6 + 5 + 20,)
    with pytest.raises(ConfigError, match=r"group a: there is no 'pooled'.* name it in its needs"):
        scores_of(small, f"{file}:hungry")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "criterion .*:short, group a: it must give 6 scores, got shape"),
        ("broken", r"criterion .*:broken, group a: computing it failed with KeyError\('lost'\)"),
    ],
)
def test_own_criterion_that_fails_is_named_with_its_group(
    small: Traced, file: str, name: str, message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        scores_of(small, f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:nothing", "importing it failed with AttributeError"),
        ("{file}:number", "is no function, but a int"),
        ("no/such.py:f", "file no/such.py does not exist"),
        ("no_such_module:f", "importing it failed with ModuleNotFoundError"),
    ],
)
def test_own_criterion_that_cannot_be_had_is_refused(file: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        criterion_named(name.format(file=file))


def test_criterion_cannot_need_what_nobody_collects() -> None:
    with pytest.raises(ConfigError, match="cannot need 'luck'; there are active, excitation"):
        Criterion(title="lucky", score=CRITERIA["l1"].score, needs=("luck",))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def points(**values: str) -> None:
        found = [
            EntryPoint(n.replace("_", "-"), v, "evosearch.criteria") for n, v in values.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry.known_criteria.cache_clear()

    yield points
    registry.known_criteria.cache_clear()


def test_criterion_by_entry_point(small: Traced, register: Callable[..., None]) -> None:
    register(theirs="evosearch.pruning.criteria.weights:l2")
    np.testing.assert_array_equal(scores_of(small, "theirs"), scores_of(small, "l2"))


def test_criterion_registered_under_a_name_of_ours_is_refused(
    register: Callable[..., None],
) -> None:
    register(l1="somewhere:else")
    with pytest.raises(ConfigError, match="'l1' of somewhere:else is registered by evosearch"):
        criterion_named("theirs")


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
