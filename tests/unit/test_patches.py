"""Compensation by patch: the least-squares solution, its bias and its variance, by other means."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.networks import InputSpec, Network, NetworkSpec
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.folding import layout_of
from evosearch.pruning.groups import trace
from evosearch.pruning.patches import PatchCompensator, patch_moments
from evosearch.pruning.patches import _step as step_of

SIDE = 8


class Chain(nn.Module):
    """Convolution, norm, ReLU, and someone who reads it."""

    def __init__(self, consumer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.consumer = consumer
        self.norm = norm or nn.Identity()
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, 3, 8, 8)` to logits."""
        x = F.relu(self.first(x))
        if isinstance(self.consumer, nn.Linear):
            x = self.consumer(x.mean((2, 3)))
            return self.head(F.relu(x))
        return self.head(F.relu(self.norm(self.consumer(x))).mean((2, 3)))


def network_of(consumer: nn.Module, norm: nn.Module | None = None) -> tuple[Network, CuttingPlan]:
    torch.manual_seed(0)
    module = Chain(consumer, norm).eval()
    shape = InputSpec(shape=(3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.2,) * 3)
    network = Network(spec=NetworkSpec(name="chain"), module=module, input=shape)
    return network, trace(network)


def batch(n: int = 300) -> Tensor:
    """Images whose neighbours resemble each other, so that channels can stand in for others."""
    torch.manual_seed(1)
    return F.avg_pool2d(torch.randn(n, 3, SIDE + 2, SIDE + 2), 3, 1) * 3 + 0.5


def compensated(network: Network, plan: CuttingPlan, kept: list[int]) -> tuple[Any, Any]:
    """The cut network before and after, the first layer keeping some channels."""
    module = network.module
    cutter = Cutter(plan, module)
    moments = patch_moments(module, plan, [batch()])
    compensator = PatchCompensator(
        plan, layout_of(network), module, cutter.network, moments, ridge=0.0
    )
    keep = np.ones(plan.table.channels.sum() + 1, dtype=np.bool_)
    names = [group.name for group in plan.table.groups]
    channels = np.flatnonzero(plan.table.group_of == names.index("first"))
    keep[channels] = np.isin(np.arange(12), kept)
    cutter.cut(keep)
    compensator.compensate(keep)
    return module, cutter.network


def patches(module: Any) -> Tensor:
    """What the consumer reads at the positions that moments are taken at."""
    x = F.relu(module.first(batch())).detach()
    columns = F.unfold(x, 3, padding=1)
    return columns[:, :, :: step_of(SIDE, SIDE)].transpose(1, 2).flatten(0, 1).double()


KEPT = [0, 2, 3, 7, 8, 11]


@pytest.fixture
def convolution() -> tuple[Any, Any]:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1))
    return compensated(network, plan, KEPT)


def wanted_fit(module: Any) -> tuple[Tensor, Tensor]:
    """Weights and bias by an ordinary regression with an intercept."""
    rows = patches(module)
    outputs = rows @ module.consumer.weight.detach().double().flatten(1).T
    columns = np.concatenate([np.arange(9) + 9 * channel for channel in KEPT])
    design = torch.cat([rows[:, columns], torch.ones(len(rows), 1).double()], dim=1)
    solution = torch.linalg.lstsq(design, outputs).solution
    return solution[:-1].T, solution[-1]


def test_weights_and_bias_are_those_of_a_regression(convolution: tuple[Any, Any]) -> None:
    dense, cut = convolution
    weight, bias = wanted_fit(dense)
    found = cut.consumer.weight.detach().double().flatten(1)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4)
    moved = (cut.consumer.bias - dense.consumer.bias).detach().double()
    torch.testing.assert_close(moved, bias, rtol=1e-3, atol=1e-4)


def test_with_a_norm_its_input_keeps_mean_and_variance() -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    module: Any = network.module
    rows = patches(module)
    outputs = rows @ module.consumer.weight.detach().double().flatten(1).T
    module.norm.running_mean = outputs.mean(0).float()
    module.norm.running_var = outputs.var(0, correction=0).float()
    _, cut = compensated(network, plan, KEPT)
    columns = np.concatenate([np.arange(9) + 9 * channel for channel in KEPT])
    after = rows[:, columns] @ cut.consumer.weight.detach().double().flatten(1).T
    assert cut.consumer.bias is None
    torch.testing.assert_close(after.mean(0).float(), cut.norm.running_mean, rtol=1e-3, atol=1e-4)
    variance = after.var(0, correction=0).float()
    torch.testing.assert_close(variance, cut.norm.running_var, rtol=1e-3, atol=1e-5)
    assert (variance < outputs.var(0, correction=0).float()).all()


def test_linear_consumers_are_refitted_too() -> None:
    network, plan = network_of(nn.Linear(12, 5))
    dense, cut = compensated(network, plan, KEPT)
    rows = F.relu(dense.first(batch())).mean((2, 3)).detach().double()
    outputs = rows @ dense.consumer.weight.detach().double().T
    design = torch.cat([rows[:, KEPT], torch.ones(len(rows), 1).double()], dim=1)
    solution = torch.linalg.lstsq(design, outputs).solution
    found = cut.consumer.weight.detach().double()
    torch.testing.assert_close(found, solution[:-1].T, rtol=1e-3, atol=1e-4)
    moved = (cut.consumer.bias - dense.consumer.bias).detach().double()
    torch.testing.assert_close(moved, solution[-1], rtol=1e-3, atol=1e-4)


def test_layer_that_lost_no_input_stays_as_it_was() -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1))
    dense, cut = compensated(network, plan, list(range(12)))
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=0, atol=0)


def test_layers_that_are_read_otherwise_are_left_to_the_channels() -> None:
    odd = nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect")
    network, plan = network_of(odd)
    assert "consumer" not in patch_moments(network.module, plan, [batch()])


def test_dead_inputs_are_no_obstacle() -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    module: Any = network.module
    with torch.no_grad():
        module.first.weight[:6] = 0
        module.first.bias[:6] = -1
    for kept in ([0, 1], [0, 6], [6]):
        _, cut = compensated(network, plan, kept)
        assert all(torch.isfinite(tensor).all() for tensor in cut.state_dict().values())
        assert (cut.norm.running_var > 0).all()


@pytest.mark.parametrize("side", [4, 7, 8, 9, 14, 16, 28, 32, 56])
def test_positions_are_spread_over_all_columns_and_rows(side: int) -> None:
    read = np.arange(0, side * side, step_of(side, side))
    assert min(len(read), side * side) >= min(32, side * side)
    columns = np.bincount(read % side, minlength=side)
    assert columns.max() - columns.min() <= 1
    if side <= 32:
        assert (np.bincount(read // side, minlength=side) > 0).all()


def test_long_patches_are_left_to_the_channels() -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 21, padding=10))
    assert "consumer" not in patch_moments(network.module, plan, [batch(2)])


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_patches_far_from_zero_are_told_apart_as_well(offset: float) -> None:
    torch.manual_seed(0)
    # 64 maps of 27 numbers, so that most of them follow from the others.
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 16, 3), nn.Flatten(), nn.Linear(16 * 196, 10)
    ).eval()
    with torch.no_grad():
        module[0].bias.fill_(offset)  # type: ignore[union-attr, operator]
    shown = InputSpec(shape=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    network = Network(spec=NetworkSpec(name="offset"), module=module, input=shown)
    plan = trace(network)
    images = torch.randn(64, 3, 16, 16)
    moments = patch_moments(module, plan, [images[:32], images[32:]])
    covariance = torch.from_numpy(moments["1"].covariance)
    least = float(torch.linalg.eigvalsh(covariance)[0] / covariance.diagonal().mean())
    assert least > -1e-5
    assert float((torch.from_numpy(moments["1"].mean) - offset).abs().mean()) < 1.0 + offset / 3


def test_moments_are_those_of_all_batches_together() -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1))
    # Batches that differ: the first is no sample of the whole.
    parts = [batch(60), 2 * batch(60) + 1, batch(60)[:7] - 2]
    whole, split = (
        patch_moments(network.module, plan, batches)["consumer"]
        for batches in ([torch.cat(parts)], parts)
    )
    np.testing.assert_allclose(split.mean, whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(split.covariance, whole.covariance, rtol=1e-4, atol=1e-4)
    assert np.linalg.eigvalsh(split.covariance).min() > -1e-6


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_ridge_shrinks_weights_and_is_no_variance_of_the_images(ridge: float) -> None:
    network, plan = network_of(nn.Conv2d(12, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    module = network.module
    cutter = Cutter(plan, module)
    compensator = PatchCompensator(
        plan,
        layout_of(network),
        module,
        cutter.network,
        patch_moments(module, plan, [batch()]),
        ridge=ridge,
    )
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    first = [group.name for group in plan.table.groups].index("first")
    keep[np.flatnonzero(plan.table.group_of == first)] = np.isin(np.arange(12), KEPT)
    cut = cutter.cut(keep)
    compensator.compensate(keep)
    rows = patches(module)
    columns = np.concatenate([np.arange(9) + 9 * channel for channel in KEPT])
    dense = rows @ module.consumer.weight.detach().double().flatten(1).T
    fitted = rows[:, columns] @ cut.consumer.weight.detach().double().flatten(1).T
    ratio = (fitted.var(0, correction=0) / dense.var(0, correction=0)).clamp(max=1)
    torch.testing.assert_close(
        cut.norm.running_var.double(), module.norm.running_var * ratio, rtol=1e-4, atol=1e-6
    )
