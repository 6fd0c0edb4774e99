"""Gram matrices, compensation and criteria, against slow or hand-made computations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.errors import ConfigError, NetworkError
from evosearch.networks import InputSpec, Network, NetworkSpec, load_network
from evosearch.pruning.compensation import Compensator, fold
from evosearch.pruning.criteria import CRITERIA, Consumer, GroupView, Samples, channel_order
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.statistics import gram_matrices, units_of
from evosearch.pruning.table import Axis, Group

FloatArray = NDArray[np.float64]
WEIGHT_CRITERIA = ("l1", "l2", "fpgm", "bn-scale")


class Flat(nn.Module):
    """Convolution a, norm, convolution b, flattened into the hidden layer, classifier."""

    def __init__(self, *, relu: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.hidden = nn.Linear(5 * 9, 7)
        self.fc = nn.Linear(7, 10)
        self.act = F.relu if relu else lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.a(x)))
        x = self.act(self.b(x))
        logits: Tensor = self.fc(self.act(self.hidden(x.flatten(1))))
        return logits


class Joined(nn.Module):
    """Convolutions a, b and d joined, normed and read by c; group norm fixes d."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 5, 3, padding=1)
        self.d = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
        self.norm = nn.BatchNorm2d(12)
        self.c, self.norm_c = nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        joined = torch.cat([a, self.b(a), self.d(x)], 1)
        logits: Tensor = self.fc(self.norm_c(self.c(self.norm(joined))).mean((2, 3)))
        return logits


class Mirrored(nn.Module):
    """Layer b reads every channel of a twice, once with the sign changed."""

    def __init__(self, *, pool: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Linear(12, 5) if pool else nn.Conv2d(12, 5, 6)
        self.fc = nn.Linear(5, 10)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mean((2, 3)) if self.pool else self.a(x)
        logits: Tensor = self.fc(self.b(torch.cat([y, -y], 1)).flatten(1))
        return logits


READ_TWICE = [True, False]


def own(module: nn.Module) -> tuple[Network, CuttingPlan]:
    network = Network(
        spec=NetworkSpec(name="own"),
        module=module.eval(),
        input=InputSpec(shape=(3, 6, 6), mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    return network, trace(network)


@pytest.fixture
def flat() -> tuple[Network, CuttingPlan]:
    torch.manual_seed(0)
    return own(Flat())


@pytest.fixture
def joined() -> tuple[Network, CuttingPlan]:
    torch.manual_seed(0)
    return own(Joined())


def keep_all_but(plan: CuttingPlan, **removed: Sequence[int]) -> NDArray[np.bool_]:
    """Removes channels of groups by name."""
    assert removed.keys() <= {group.name for group in plan.table.groups}
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    for group, offset in zip(plan.table.groups, plan.table.offsets, strict=True):
        keep[offset + np.array(removed.get(group.name, []), dtype=np.int64)] = False
    return keep


def second_moments(x: Tensor) -> FloatArray:
    """Of `(n, channels, positions)`, one position after another."""
    rows = x.double().numpy().transpose(0, 2, 1).reshape(-1, x.shape[1])
    return sum(np.outer(row, row) for row in rows) / len(rows)


def spd(n: int, seed: int) -> Tensor:
    x = torch.randn(5 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


# --- Gram matrices


def test_gram_of_a_convolution_is_the_mean_over_images_and_positions(
    flat: tuple[Network, CuttingPlan],
) -> None:
    network, plan = flat
    x = network.example(4)
    with torch.inference_mode():
        inputs = F.relu(network.module.norm(network.module.a(x))).flatten(2)
    found = gram_matrices(network.module, plan, [x])["b"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, second_moments(inputs), rtol=1e-5, atol=1e-7)


def test_gram_of_a_flattened_layer_is_by_channel(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    net, x = network.module, network.example(4)
    with torch.inference_mode():
        inputs = F.relu(net.b(F.relu(net.norm(net.a(x))))).flatten(2)
    found = gram_matrices(net, plan, [x])["hidden"]
    assert found.shape == (5, 5)
    np.testing.assert_allclose(found, second_moments(inputs), rtol=1e-5, atol=1e-7)


def test_gram_of_a_linear_layer_is_by_feature(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    seen = []
    network.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = gram_matrices(network.module, plan, [network.example(8)])["fc"]
    np.testing.assert_allclose(found, second_moments(seen[0][..., None]), rtol=1e-5, atol=1e-7)


def test_gram_covers_channels_that_no_policy_cuts(joined: tuple[Network, CuttingPlan]) -> None:
    network, plan = joined
    found = gram_matrices(network.module, plan, [network.example(2)])
    assert found["c"].shape == (12, 12)


def test_gram_does_not_depend_on_how_images_are_batched(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    x = network.example(7)
    whole = gram_matrices(network.module, plan, [x])
    parts = gram_matrices(network.module, plan, [x[:1], x[1:5], x[5:]])
    for name, gram in whole.items():
        np.testing.assert_allclose(parts[name], gram, rtol=1e-5, atol=1e-7)


def test_collecting_leaves_no_hook_behind(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    with pytest.raises(RuntimeError, match="channels"):
        gram_matrices(network.module, plan, [torch.zeros(1, 1, 6, 6)])
    assert not any(layer._forward_pre_hooks for layer in network.module.modules())


@pytest.mark.parametrize("pool", READ_TWICE)
def test_gram_of_channels_that_are_read_twice_is_by_channel(pool: bool) -> None:
    network, plan = own(Mirrored(pool=pool))
    x = network.example(4)
    with torch.inference_mode():
        inputs = network.module.a(x).flatten(2)
    if pool:
        inputs = inputs.mean(2, keepdim=True)
    found = gram_matrices(network.module, plan, [x])["b"]
    # Signs do not matter to second moments.
    np.testing.assert_allclose(found, second_moments(inputs), rtol=1e-5, atol=1e-7)


def test_layer_may_be_called_by_keyword() -> None:
    class ByKeyword(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.b(input=self.a(x)).mean((2, 3)))

    module = ByKeyword()
    module.fc = nn.Linear(5, 10)
    network, plan = own(module)
    assert gram_matrices(network.module, plan, [network.example(2)])["fc"].shape == (5, 5)


def test_units_of_a_flattened_axis_gather_each_channels_indices() -> None:
    units = units_of(Axis(np.array([1, 1, 0, 0])))
    assert units.order.tolist() == [[2, 3], [0, 1]]
    assert units.sources.tolist() == [0, 1]
    assert units.gather(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[[3.0, 4.0], [1.0, 2.0]]]


# --- fold


@pytest.mark.parametrize("seed", range(5))
def test_fold_is_the_least_squares_solution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    kept, removed = [4, 0, 2], [1, 3, 5]
    wanted, *_ = np.linalg.lstsq(x[:, kept], x[:, removed])
    gram = torch.from_numpy(x.T @ x / len(x))
    found = fold(gram, torch.tensor(kept), torch.tensor(removed), 1e-12)
    np.testing.assert_allclose(found.numpy(), wanted.T, rtol=1e-6, atol=1e-8)


def test_fold_loads_the_diagonal_by_a_share_of_its_mean() -> None:
    gram = spd(4, 0)
    kept, removed = torch.tensor([0, 3]), torch.tensor([1, 2])
    block = gram[kept][:, kept].numpy()
    load = 0.5 * np.trace(block) / 2
    wanted = gram[removed][:, kept].numpy() @ np.linalg.inv(block + load * np.eye(2))
    np.testing.assert_allclose(fold(gram, kept, removed, 0.5).numpy(), wanted, rtol=1e-10)


def test_removed_channel_that_equals_a_kept_one_is_taken_over_whole() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = x[:, 0]
    found = fold(x.T @ x / 100, torch.tensor([0, 1]), torch.tensor([2]), 1e-12)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize("dead", [[0], [0, 1], [0, 1, 2, 3]])
def test_dead_channels_do_not_break_the_factorisation(ridge: float, dead: list[int]) -> None:
    gram = spd(4, 0)
    gram[dead] = 0
    gram[:, dead] = 0
    found = fold(gram, torch.tensor([0, 1, 2]), torch.tensor([3]), ridge)
    assert torch.isfinite(found).all()
    assert not found[0, [c for c in dead if c < 3]].any()


def test_equal_kept_channels_do_not_break_the_factorisation_without_a_ridge() -> None:
    x = 1e4 * torch.randn(99, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = x[:, 0]
    assert torch.isfinite(fold(x.T @ x, torch.tensor([0, 1, 2]), torch.tensor([3]), 0.0)).all()


# --- compensation


def compensated(
    network: Network, plan: CuttingPlan, keep: NDArray[np.bool_], ridge: float, images: Tensor
) -> nn.Module:
    grams = gram_matrices(network.module, plan, [images])
    cutter = Cutter(plan, network.module)
    cutter.cut(keep)
    Compensator(plan, network.module, cutter.network, grams, ridge).compensate(keep)
    return cutter.network


def linear_network() -> tuple[Network, CuttingPlan, Tensor]:
    """Without ReLU; channels 5 of a and 4 of b are combinations of channels before them."""
    torch.manual_seed(0)
    network, plan = own(Flat(relu=False))
    module = network.module.double()
    with torch.no_grad():
        for layer in (module.a, module.b):
            for tensor in (layer.weight, layer.bias):
                tensor[-1] = 2 * tensor[0] - 0.5 * tensor[1]
    return network, plan, network.example(64).double()


@pytest.mark.parametrize("removed", [{"a": [5]}, {"b": [4]}, {"a": [5], "b": [4]}, {"a": [0]}])
def test_removing_a_combination_of_other_channels_changes_nothing(
    removed: dict[str, list[int]],
) -> None:
    network, plan, images = linear_network()
    keep = keep_all_but(plan, **removed)
    with torch.inference_mode():
        found = compensated(network, plan, keep, 1e-13, images)(images)
        wanted = network.module(images)
        uncompensated = Cutter(plan, network.module).cut(keep)(images)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(uncompensated, wanted, rtol=1e-2)


@pytest.mark.parametrize("pool", READ_TWICE)
def test_channels_that_are_read_twice_are_made_up_for_twice(pool: bool) -> None:
    torch.manual_seed(0)
    network, plan = own(Mirrored(pool=pool))
    layer = network.module.double().a
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor[2] = 2 * tensor[0] - 0.5 * tensor[1]
    images = network.example(64).double()
    with torch.inference_mode():
        found = compensated(network, plan, keep_all_but(plan, a=[2]), 1e-13, images)(images)
        torch.testing.assert_close(found, network.module(images), rtol=1e-6, atol=1e-7)


def test_compensated_weights_fit_the_dense_outputs_by_least_squares() -> None:
    network, plan, images = linear_network()
    seen = []
    network.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    with torch.inference_mode():
        network.module(images)
    kept = [0, 2, 3, 6]
    dense = network.module.fc.weight.detach().numpy()
    wanted, *_ = np.linalg.lstsq(seen[0][:, kept], seen[0] @ dense.T)
    keep = keep_all_but(plan, hidden=[1, 4, 5])
    found = compensated(network, plan, keep, 1e-14, images).fc.weight.detach().numpy()
    np.testing.assert_allclose(found, wanted.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["resnet20", "lenet-5", "joined"])
def test_every_consumer_is_rewritten_by_the_formula(name: str) -> None:
    torch.manual_seed(0)
    if name == "joined":
        network, plan = own(Joined())
    else:
        network = load_network(NetworkSpec(name=name))
        plan = trace(network)
    images = network.example(8)
    rng = np.random.default_rng(0)
    keep = np.append(rng.random(int(plan.table.channels.sum())) < 0.6, True)
    cut = dict(compensated(network, plan, keep, 1e-2, images).named_modules())
    dense = dict(network.module.named_modules())
    grams = gram_matrices(network.module, plan, [images])
    for entry in plan.cuts:
        if entry.in_axis is not None:
            wanted = rewritten(dense[entry.name].weight, grams[entry.name], entry, plan, keep)
            found = cut[entry.name].weight.detach().double().numpy()
            np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=1e-3, atol=1e-5)


def rewritten(
    weight: Tensor, gram: FloatArray, entry: Any, plan: CuttingPlan, keep: NDArray[np.bool_]
) -> FloatArray:
    """W'_k = W_k + W_r G_rk (G_kk + ridge)^-1 for weights whose channels are consecutive."""
    dense = weight.detach().double().numpy()
    if entry.out_axis is not None:
        dense = dense[keep[plan.table.axes[entry.out_axis].sources]]
    sources = plan.table.axes[entry.in_axis].sources
    kept = keep[sources if len(sources) == len(gram) else np.unique(sources)]
    w = dense.reshape(len(dense), len(kept), -1)
    block = gram[kept][:, kept]
    load = 1e-2 * np.trace(block) / len(block)
    mixing = gram[~kept][:, kept] @ np.linalg.inv(block + load * np.eye(len(block)))
    return w[:, kept] + np.einsum("orp,rk->okp", w[:, ~kept], mixing)


def test_compensating_nothing_changes_nothing(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    same = compensated(network, plan, keep_all_but(plan), 1e-4, network.example(4))
    wanted = network.module.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in same.state_dict().items())


def test_compensation_leaves_the_dense_network_alone(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    compensated(network, plan, keep_all_but(plan, a=[1], b=[0, 2]), 1e-4, network.example(4))
    after = network.module.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_compensation_takes_read_only_grams(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    grams = dict(gram_matrices(network.module, plan, [network.example(4)]))
    for gram in grams.values():
        gram.flags.writeable = False
    cutter, keep = Cutter(plan, network.module), keep_all_but(plan, a=[1])
    cutter.cut(keep)
    Compensator(plan, network.module, cutter.network, grams, 1e-4).compensate(keep)
    assert cutter.network(network.example(2)).shape == (2, 10)


def test_compensation_moves_outputs_towards_the_dense_ones() -> None:
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name="lenet-5"))
    plan = trace(network)
    images = network.example(64)
    keep = keep_all_but(plan, conv1=[0, 1, 2, 3], conv2=range(20), ip1=range(100))
    with torch.inference_mode():
        dense = network.module(images)
        plain = (Cutter(plan, network.module).cut(keep)(images) - dense).norm()
        better = (compensated(network, plan, keep, 1e-4, images)(images) - dense).norm()
    assert better < 0.7 * plain


# --- criteria, by hand


def view(
    producers: Sequence[Any] = (), scales: Sequence[Any] = (), consumers: Sequence[Consumer] = ()
) -> GroupView:
    first = [*producers, *scales, *(consumer.columns for consumer in consumers)][0]
    group = Group(
        name="g", channels=len(first), resolution=(1, 1), producers=("g",), consumers=("h",)
    )
    return GroupView(
        group,
        tuple(torch.tensor(p, dtype=torch.float64) for p in producers),
        tuple(torch.tensor(s, dtype=torch.float64) for s in scales),
        tuple(consumers),
    )


FILTERS = [[3.0, -4.0], [0.0, 0.0], [-6.0, 8.0]]


@pytest.mark.parametrize(
    ("criterion", "wanted"),
    [("l1", [7.0, 0.0, 14.0]), ("l2", [5.0, 0.0, 10.0]), ("fpgm", [20.0, 15.0, 25.0])],
)
def test_weight_criterion_is_that_on_paper(criterion: str, wanted: list[float]) -> None:
    found = CRITERIA[criterion].score(view([FILTERS]))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("criterion", "wanted"), [("l1", [4.0, 4.5]), ("l2", [3.0, 4.5]), ("fpgm", [7.5, 7.5])]
)
def test_several_producers_are_averaged(criterion: str, wanted: list[float]) -> None:
    producers = [[[3.0, 4.0], [0.0, 0.0]], [[1.0], [-9.0]]]
    found = CRITERIA[criterion].score(view(producers))
    np.testing.assert_allclose(found.numpy(), wanted)


def test_batch_norm_scale_counts_by_its_size() -> None:
    found = CRITERIA["bn-scale"].score(view([FILTERS], [[-3.0, 1.0, 2.0], [1.0, 1.0, 0.0]]))
    assert found.tolist() == [2.0, 1.0, 1.0]


def test_batch_norm_scale_without_a_batch_norm_is_refused() -> None:
    with pytest.raises(NetworkError, match="group g has none; choose another criterion"):
        CRITERIA["bn-scale"].score(view([FILTERS]))


# --- residual energy, by brute force


def consumer(n_out: int, n_units: int, rest: int, columns: list[int], seed: int) -> Consumer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_units, rest, generator=generator, dtype=torch.float64)
    return Consumer(weight, spd(n_units, seed), torch.tensor(columns))


def energy(reader: Consumer, gone: list[int]) -> float:
    """Output error energy of a consumer that makes up for `gone` as well as it can."""
    assert reader.gram is not None
    gram = reader.gram.numpy()
    gram = gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
    removed = reader.columns.numpy()[gone]
    kept = np.setdiff1d(np.arange(len(gram)), removed)
    cross = gram[np.ix_(removed, kept)]
    rest = gram[np.ix_(removed, removed)]
    if len(kept):
        rest = rest - cross @ np.linalg.solve(gram[np.ix_(kept, kept)], cross.T)
    w = reader.weight.numpy()[:, removed]
    return float(np.einsum("oip,ij,ojp->", w, rest, w))


def brute_force(readers: Sequence[Consumer], channels: int) -> list[int]:
    """The step at which each channel is removed, everything recomputed at every step."""
    gone: list[int] = []
    while len(gone) < channels:
        left = [channel for channel in range(channels) if channel not in gone]
        totals = [sum(energy(reader, [*gone, channel]) for reader in readers) for channel in left]
        gone.append(left[int(np.argmin(totals))])
    return [gone.index(channel) for channel in range(channels)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 5, 1, [0, 1, 2, 3, 4])],
        [(4, 6, 9, [5, 3, 1, 0, 2, 4])],
        [(3, 8, 2, [1, 2, 5, 7, 6])],  # three further units are never removed
        [(3, 5, 4, [0, 1, 2, 3, 4]), (2, 7, 1, [6, 0, 5, 1, 4])],
    ],
)
def test_residual_energy_removes_what_costs_least_at_every_step(
    shapes: list[tuple[int, int, int, list[int]]], seed: int
) -> None:
    readers = [consumer(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    found = CRITERIA["residual-energy"].score(view(consumers=readers))
    assert found.tolist() == brute_force(readers, len(shapes[0][3]))


def test_residual_energy_leaves_its_arguments_alone() -> None:
    reader = consumer(3, 5, 2, [0, 1, 2, 3, 4], 0)
    assert reader.gram is not None
    weight, gram = reader.weight.clone(), reader.gram.clone()
    CRITERIA["residual-energy"].score(view(consumers=[reader]))
    assert torch.equal(reader.weight, weight)
    assert torch.equal(reader.gram, gram)


def test_channel_that_nobody_reads_goes_first() -> None:
    reader = consumer(3, 5, 2, [0, 1, 2, 3, 4], 0)
    reader.weight[:, 3] = 0
    reader.gram[3], reader.gram[:, 3] = 0, 0  # type: ignore[index]
    assert CRITERIA["residual-energy"].score(view(consumers=[reader]))[3] == 0


def test_twin_of_a_channel_goes_before_channels_of_their_own() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = x[:, 0]
    reader = Consumer(torch.ones(3, 4, 1, dtype=torch.float64), x.T @ x / 500, torch.arange(4))
    steps = CRITERIA["residual-energy"].score(view(consumers=[reader]))
    assert 0 in (steps[0], steps[2])
    assert {int(steps[0]), int(steps[2])} != {0, 1}


# --- channel_order


def grams_of(network: Network, plan: CuttingPlan) -> dict[str, FloatArray]:
    return dict(gram_matrices(network.module, plan, [network.example(16)]))


def samples_of(network: Network) -> Samples:
    return Samples(batches=[network.example(8)], labels=torch.arange(8))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_places_are_a_permutation_within_each_group(criterion: str) -> None:
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network)
    grams, samples = grams_of(network, plan), samples_of(network)
    places = channel_order(network.module, plan, criterion, grams, samples)
    for offset, n in zip(plan.table.offsets, plan.table.channels, strict=True):
        assert sorted(places[offset : offset + n]) == list(range(n))


def test_most_important_channel_has_place_0(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    with torch.no_grad():
        for channel, size in enumerate((3.0, 1.0, 6.0, 2.0, 5.0, 4.0)):
            network.module.a.weight[channel] = -size
    assert channel_order(network.module, plan, "l1")[:6].tolist() == [3, 5, 0, 4, 1, 2]


def test_batch_norm_of_joined_channels_is_divided_among_the_groups(
    joined: tuple[Network, CuttingPlan],
) -> None:
    network, plan = joined
    with torch.no_grad():
        network.module.norm.weight[:] = torch.tensor([4, 1, 3, 2, 10, 50, 40, 20, 30, 0, 0, 0])
    places = channel_order(network.module, plan, "bn-scale")[:9]
    assert places.tolist() == [0, 3, 1, 2, 4, 0, 1, 3, 2]


@pytest.mark.parametrize(
    "criterion",
    [*WEIGHT_CRITERIA, "residual-energy"],
)
def test_ties_go_to_the_lower_channel(criterion: str) -> None:
    network, plan = own(Tied())
    grams = {"b": np.eye(6), "fc": np.eye(4)}
    places = channel_order(network.module, plan, criterion, grams)
    assert places.tolist() == [*range(6), *range(4)]


class Tied(nn.Module):
    """Every channel is like every other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)
        for layer in (self.a, self.b, self.fc):
            nn.init.ones_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_b(self.b(self.norm_a(self.a(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_group(criterion: str, bad: float) -> None:
    network, plan = own(Tied())
    with torch.no_grad():
        network.module.b.weight[2] = bad
        network.module.norm_b.weight[2] = bad
    with pytest.raises(NetworkError, match=rf"criterion {criterion} gives .* for group b"):
        channel_order(network.module, plan, criterion)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_readers_that_are_not_finite_are_refused_with_the_group(bad: float) -> None:
    network, plan = own(Tied())
    grams = {"b": np.eye(6), "fc": np.eye(4)}
    with torch.no_grad():
        network.module.fc.weight[:, 2] = bad
    with pytest.raises(NetworkError, match=r"criterion residual-energy gives .* for group b"):
        channel_order(network.module, plan, "residual-energy", grams)


def test_unknown_criterion_lists_the_known_ones(flat: tuple[Network, CuttingPlan]) -> None:
    network, plan = flat
    with pytest.raises(ConfigError, match="no criterion 'frob'; there are l1, l2, fpgm, fermat"):
        channel_order(network.module, plan, "frob")


def test_network_without_batch_norm_refuses_its_scale() -> None:
    network = load_network(NetworkSpec(name="lenet-5"))
    with pytest.raises(NetworkError, match="bn-scale needs a batch norm, and group conv1 has none"):
        channel_order(network.module, trace(network), "bn-scale")


def test_batch_norm_without_a_scale_is_no_help() -> None:
    module = Tied()
    module.norm_a = nn.BatchNorm2d(6, affine=False)
    network, plan = own(module)
    with pytest.raises(NetworkError, match="group a has none"):
        channel_order(network.module, plan, "bn-scale")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ordering_leaves_the_network_alone(criterion: str) -> None:
    network, plan = own(Tied())
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    grams = {"b": np.eye(6), "fc": np.eye(4)}
    channel_order(network.module, plan, criterion, grams, samples_of(network))
    after = network.module.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_has_a_line_of_prose(criterion: str) -> None:
    assert CRITERIA[criterion].title
