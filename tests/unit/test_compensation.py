"""Gram matrices and compensation, against slow or hand-made computations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.compensation import Compensator, fold, loaded_factor
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.statistics import gram_matrices, units_of
from evosearch.pruning.table import Axis
from tests.unit.small_networks import Flat, FloatArray, Joined, Traced, own, spd

READ_TWICE = [True, False]


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


@pytest.fixture
def flat() -> Traced:
    torch.manual_seed(0)
    return own(Flat())


@pytest.fixture
def joined() -> Traced:
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


# --- Gram matrices


def test_gram_of_a_convolution_is_the_mean_over_images_and_positions(
    flat: Traced,
) -> None:
    network, plan = flat
    x = network.example(4)
    with torch.inference_mode():
        inputs = F.relu(network.module.norm(network.module.a(x))).flatten(2)
    found = gram_matrices(network.module, plan, [x])["b"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, second_moments(inputs), rtol=1e-5, atol=1e-7)


def test_gram_of_a_flattened_layer_is_by_channel(flat: Traced) -> None:
    network, plan = flat
    net, x = network.module, network.example(4)
    with torch.inference_mode():
        inputs = F.relu(net.b(F.relu(net.norm(net.a(x))))).flatten(2)
    found = gram_matrices(net, plan, [x])["hidden"]
    assert found.shape == (5, 5)
    np.testing.assert_allclose(found, second_moments(inputs), rtol=1e-5, atol=1e-7)


def test_gram_of_a_linear_layer_is_by_feature(flat: Traced) -> None:
    network, plan = flat
    seen = []
    network.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = gram_matrices(network.module, plan, [network.example(8)])["fc"]
    np.testing.assert_allclose(found, second_moments(seen[0][..., None]), rtol=1e-5, atol=1e-7)


def test_gram_covers_channels_that_no_policy_cuts(joined: Traced) -> None:
    network, plan = joined
    found = gram_matrices(network.module, plan, [network.example(2)])
    assert found["c"].shape == (12, 12)


def test_gram_does_not_depend_on_how_images_are_batched(flat: Traced) -> None:
    network, plan = flat
    x = network.example(7)
    whole = gram_matrices(network.module, plan, [x])
    parts = gram_matrices(network.module, plan, [x[:1], x[1:5], x[5:]])
    for name, gram in whole.items():
        np.testing.assert_allclose(parts[name], gram, rtol=1e-5, atol=1e-7)


def test_collecting_leaves_no_hook_behind(flat: Traced) -> None:
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


def test_compensating_nothing_changes_nothing(flat: Traced) -> None:
    network, plan = flat
    same = compensated(network, plan, keep_all_but(plan), 1e-4, network.example(4))
    wanted = network.module.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in same.state_dict().items())


def test_compensation_leaves_the_dense_network_alone(flat: Traced) -> None:
    network, plan = flat
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    compensated(network, plan, keep_all_but(plan, a=[1], b=[0, 2]), 1e-4, network.example(4))
    after = network.module.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_compensation_takes_read_only_grams(flat: Traced) -> None:
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


def test_what_has_no_factor_is_no_number() -> None:
    """Half a factor would make weights of it: only a NaN is told as a failure."""
    impossible = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    assert loaded_factor(impossible.clone(), 1e-3).isnan().all()
    kept, removed = torch.tensor([0, 1]), torch.tensor([2])
    assert fold(impossible, kept, removed, 1e-3).isnan().all()
