"""What foretells the time of a forward pass."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

from evosearch.errors import ConfigError
from evosearch.latency import AxisWidth, LatencyModel, LayerShape, fit_latency, minds_odd_widths
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.recipe import LatencyRecipe
from evosearch.scoring import timing
from evosearch.scoring.timing import time_passes
from evosearch.testing import chain_table
from tests.unit.latencies import random_widths, seconds_of, timed
from tests.unit.small_networks import Joined, Small, own

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

tables = st.lists(st.integers(2, 40), min_size=1, max_size=5).map(lambda w: timed(chain_table(w)))


def model_of(table: GroupTable) -> LatencyModel:
    assert table.latency is not None
    return table.latency


def refitted(table: GroupTable, keep: IntArray, seconds: FloatArray) -> LatencyModel:
    return fit_latency(table.shapes(), table.channels.tolist(), keep, seconds)


def test_seconds_that_follow_from_widths_are_found_again() -> None:
    table = timed(trace(load_network(NetworkSpec(name="resnet20"))).table)
    model = model_of(table)
    other = np.random.default_rng(1).integers(1, table.channels + 1, (50, len(table.groups)))
    dense = seconds_of(table, table.channels[None])
    np.testing.assert_allclose(model.shares(other), seconds_of(table, other) / dense, rtol=2e-3)
    assert model.error < 2e-3
    assert model.dense_seconds == pytest.approx(float(dense[0]))


def test_noise_is_told() -> None:
    table = chain_table()
    keep = random_widths(table)
    noise = np.random.default_rng(0).normal(1, 0.1, len(keep))
    assert 0.05 < refitted(table, keep, seconds_of(table, keep) * noise).error < 0.15


def test_a_dense_network_that_is_faster_than_foreseen_lends_no_share_to_others() -> None:
    table = chain_table()
    keep = random_widths(table)
    seconds = seconds_of(table, keep)
    half = table.channels[None] // 2
    plain = refitted(table, keep, seconds)
    seconds[0] *= 0.9
    model = refitted(table, keep, seconds)
    assert model.shares(table.channels[None])[0] == 1
    found = model.shares(half)[0] * model.dense_seconds
    assert found == pytest.approx(plain.shares(half)[0] * plain.dense_seconds, rel=0.05)


def test_time_that_no_width_changes_is_a_constant() -> None:
    table = chain_table()
    keep = random_widths(table)
    model = refitted(table, keep, np.full(len(keep), 0.25))
    np.testing.assert_allclose(model.shares(keep), 1.0, atol=1e-6)
    assert model.constant == pytest.approx(0.25)


@pytest.mark.parametrize("block", [8, 16])
def test_steps_of_channels_are_seen(block: int) -> None:
    table = chain_table([128, 128])
    keep = random_widths(table, 120)
    up = -(-keep // block) * block
    seconds = 1e-3 + 1e-9 * table.costs(up)[0]
    model = refitted(table, keep, seconds)
    assert model.error < 0.01
    inner = np.array([[3, 5], [4, 6]]) * block
    lowest, first, same, more = model.shares(np.stack([inner[0], *(inner[1] - [[7], [0], [-1]])]))
    assert lowest < first
    assert same - first < 0.2 * (more - same)


def test_a_model_of_before_there_were_sixteens_means_the_same() -> None:
    table = timed(chain_table([24, 40]))
    model = model_of(table)
    plain = model.model_copy(update={"terms": tuple(t for t in model.terms if t.block < 16)})
    earlier = plain.model_dump()
    for term in earlier["terms"]:
        term["rounded"] = term.pop("block") == 8
    keep = random_widths(table)
    assert (
        LatencyModel.model_validate(earlier).shares(keep).tobytes() == plain.shares(keep).tobytes()
    )
    assert any(term["rounded"] for term in earlier["terms"])


@settings(max_examples=60, deadline=None)
@given(tables, st.data())
def test_wider_is_never_faster_and_dense_is_one(table: GroupTable, data: st.DataObject) -> None:
    model = model_of(table)
    shape = (len(table.groups),)
    draws = arrays(np.float64, shape, elements=st.floats(0, 1))
    one, other = (np.ceil(data.draw(draws) * table.channels).clip(1).astype(int) for _ in range(2))
    narrow, wide, dense = model.shares(
        np.array([np.minimum(one, other), np.maximum(one, other), table.channels])
    )
    assert 0 < narrow <= wide <= dense == 1


@settings(max_examples=30, deadline=None)
@given(tables)
def test_what_the_ledger_keeps_is_the_same_model(table: GroupTable) -> None:
    model = model_of(table)
    again = LatencyModel.model_validate_json(model.model_dump_json())
    keep = random_widths(table)
    assert again == model
    assert again.shares(keep).tobytes() == model.shares(keep).tobytes()


def test_shares_of_a_table_have_a_latency_only_where_it_is_known() -> None:
    table = chain_table()
    policies = [table.dense, Policy((8, 12, 16))]
    assert set(table.shares_of(policies)) == {"macs", "params"}
    shares = timed(table).shares_of(policies)
    assert shares["latency"][0] == shares["macs"][0] == 1
    assert shares["macs"][1] < shares["latency"][1] < 1


@pytest.mark.parametrize("network", [Small(), Joined()], ids=["flattened", "joined"])
def test_networks_are_really_cut_and_timed(network: nn.Module) -> None:
    traced, plan = own(network)
    dense = sum(p.numel() for p in network.parameters())
    model = time_passes(traced, plan, LatencyRecipe(images=3, measure=f"{__name__}:by_parameters"))
    assert model.dense_seconds == pytest.approx(3e-9 * dense)
    keep = random_widths(plan.table)
    np.testing.assert_allclose(model.shares(keep), plan.table.costs(keep)[1] / dense, atol=0.02)
    assert sum(p.numel() for p in network.parameters()) == dense


def by_parameters(module: nn.Module, images: torch.Tensor) -> float:
    assert not module.training
    module.double()(images.double())  # does not harm the next one
    return 1e-9 * len(images) * sum(p.numel() for p in module.parameters())


def test_a_wider_network_takes_longer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only test that reads a clock: products of 64 channels beside products of 1."""
    monkeypatch.setattr(timing, "_POLICIES", 24)
    traced = load_network(NetworkSpec(name="resnet20"))
    plan = trace(traced)
    threads = torch.get_num_threads()
    model = time_passes(traced, plan, LatencyRecipe())
    assert model.shares(np.ones((1, len(plan.table.groups)), dtype=int))[0] < 0.95
    assert torch.get_num_threads() == threads


def test_a_stopwatch_that_computes_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, plan = own(Small())
    asked: list[int] = []

    def computed(module: nn.Module, _images: torch.Tensor) -> float:
        asked.append(sum(p.numel() for p in module.parameters()))
        return 1e-9 * asked[-1]

    monkeypatch.setattr(timing, "stopwatch_named", lambda _name: computed)
    keep = random_widths(plan.table)
    timing.seconds_of(traced, plan, LatencyRecipe(), keep)
    # Each network beside the reference.
    assert len(asked) == 2 * 2 * len(keep)


def test_widths_are_drawn_as_the_space_rounds_them() -> None:
    traced = load_network(NetworkSpec(name="resnet20"))
    plan = trace(traced)
    time_passes(traced, plan, LatencyRecipe(measure=f"{__name__}:rounded"), round_to=8)


def rounded(module: nn.Module, _images: torch.Tensor) -> float:
    widths = {c.out_channels for c in module.modules() if isinstance(c, nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)
    return 1.0


def odd_is_slow(module: nn.Module, images: torch.Tensor) -> float:
    widths = {c.out_channels for c in module.modules() if isinstance(c, nn.Conv2d)}
    return by_parameters(module, images) * (1 + any(width % 8 for width in widths))


class Plain(nn.Sequential):
    """Three convolutions of 64 channels."""

    def __init__(self) -> None:
        convolutions = (nn.Conv2d(n, 64, 3, padding=1) for n in (3, 64, 64))
        layers = [part for each in convolutions for part in (each, nn.ReLU())]
        super().__init__(*layers, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(64, 10))


def test_widths_that_the_kernels_do_not_like_are_noticed() -> None:
    traced, plan = own(Plain())
    clock = LatencyRecipe(measure=f"{__name__}:odd_is_slow")
    found = time_passes(traced, plan, clock).odd
    assert found is not None
    assert 1.8 < found < 2
    assert time_passes(traced, plan, clock, round_to=8).odd is None
    found = time_passes(traced, plan, LatencyRecipe(measure=f"{__name__}:by_parameters")).odd
    assert found is not None
    assert 0.9 < found < 1


def test_one_slow_moment_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, plan = own(Plain())
    asked: list[int] = []

    def busy_at_first(module: nn.Module, images: torch.Tensor) -> float:
        odd = any(c.out_channels % 8 for c in module.modules() if isinstance(c, nn.Conv2d))
        asked.append(odd)
        noise = float(np.random.default_rng(len(asked)).uniform(0.99, 1.01))
        return by_parameters(copy.deepcopy(module), images) * noise * (2 if sum(asked) < 3 else 1)

    monkeypatch.setattr(timing, "stopwatch_named", lambda _name: busy_at_first)
    found = time_passes(traced, plan, LatencyRecipe(), round_to=None).odd
    assert found is not None
    assert found < 1.05


def test_a_network_that_cannot_be_narrowed_is_not_timed() -> None:
    traced, plan = own(Small())
    traced.module.forward = lambda _x: (_ for _ in ()).throw(RuntimeError("no"))  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError, match=r"latency: with half of all channels .* leave latency out"
    ):
        time_passes(traced, plan, LatencyRecipe())


def test_the_least_that_is_told_is_what_can_be_kept() -> None:
    table = timed(chain_table([16, 24], granularities=[8, 1]))
    model = model_of(table)
    share = float(model.shares(np.array([[8, 1]]))[0])
    assert f", and {share:.0%} of that with as few channels" in model.told(table.granularities)


def test_a_dense_network_that_is_slower_than_foreseen_is_the_whole_all_the_same() -> None:
    table = chain_table()
    keep = random_widths(table)
    seconds = seconds_of(table, keep)
    seconds[0] *= 1.2
    model = refitted(table, keep, seconds)
    assert model.shares(table.channels[None])[0] == 1


def test_the_error_is_that_on_policies_that_a_fit_has_not_seen() -> None:
    table = chain_table()
    keep = random_widths(table)[:20]
    seconds = seconds_of(table, keep) * np.random.default_rng(0).normal(1, 0.2, 20)
    errors = []
    for fold in range(5):
        out = np.arange(20) % 5 == fold
        model = fit_latency(table.shapes(), table.channels.tolist(), keep[~out], seconds[~out])
        errors += list(np.abs(model.seconds(keep[out]) / seconds[out] - 1))
    assert refitted(table, keep, seconds).error == pytest.approx(np.mean(errors), rel=1e-6)


def test_odd_widths_are_minded_where_they_are_half_as_slow_again() -> None:
    assert [minds_odd_widths(odd) for odd in (None, 0.9, 1.4, 1.6)] == [False, False, False, True]


def test_kernels_of_two_sizes_have_speeds_of_their_own() -> None:
    axes = [
        AxisWidth(fixed=3, per_kept=()),
        *(AxisWidth(fixed=0, per_kept=((group, 1),)) for group in range(3)),
    ]
    positions = 256
    layers = [
        LayerShape(in_axis=axis, out_axis=axis + 1, macs=area * positions, positions=positions)
        for axis, area in enumerate((9, 9, 1))
    ]
    keep = np.random.default_rng(0).integers(1, 65, (200, 3))
    keep[0] = 64
    one, two, three = keep.T
    slow, fast = 1e-8 * positions * two * three, 1e-9 * 9 * positions * (3 + two) * one
    model = fit_latency((axes, layers, ()), [64] * 3, keep, 1e-4 + slow + fast)
    assert model.error < 1e-3


def test_a_model_of_before_there_were_sixteens_means_the_same_where_eights_count() -> None:
    table = chain_table([24, 40])
    keep = random_widths(table)
    up = -(-keep // 8) * 8
    model = refitted(table, keep, 1e-3 + 1e-9 * table.costs(up)[0])
    plain = model.model_copy(update={"terms": tuple(t for t in model.terms if t.block < 16)})
    earlier = plain.model_dump()
    for term in earlier["terms"]:
        term["rounded"] = term.pop("block") == 8
    again = LatencyModel.model_validate(earlier)
    assert again == plain
    assert again.shares(keep).tobytes() == plain.shares(keep).tobytes()
    assert any(term["rounded"] for term in earlier["terms"])


def test_a_slow_moment_of_another_network_is_none_of_the_dense_one() -> None:
    table = chain_table()
    keep = random_widths(table)
    seconds = seconds_of(table, keep)
    seconds[7] *= 5
    assert refitted(table, keep, seconds).dense_seconds == seconds[0]


@cache
def resnet_with_blocks() -> GroupTable:
    return trace(load_network(NetworkSpec(name="resnet20")), blocks=True).table


def seconds_by_block(table: GroupTable, keep: IntArray) -> FloatArray:
    """A millisecond, a nanosecond for each MAC, a tenth of a millisecond for each block."""
    there = (~table.left_out(keep)).sum(axis=1)
    return np.asarray(1e-3 + 1e-9 * table.costs(keep)[0] + 1e-4 * there)


def test_blocks_that_are_left_out_save_what_they_take() -> None:
    table = resnet_with_blocks()
    keep = timing.draw_widths(table, 64, 0)
    model = refitted(table, keep, seconds_by_block(table, keep))
    other = timing.draw_widths(table, 60, 1)
    np.testing.assert_allclose(model.seconds(other), seconds_by_block(table, other), rtol=1e-2)
    assert model.error < 5e-3
    again = LatencyModel.model_validate_json(model.model_dump_json())
    assert (again.seconds(other) == model.seconds(other)).all()
    # Were all of them there, they would be part of what no width changes.
    whole = keep[~table.left_out(keep).any(axis=1)]
    assert all(term.axes for term in refitted(table, whole, seconds_by_block(table, whole)).terms)


def test_networks_without_blocks_are_drawn_where_they_may_go() -> None:
    table = resnet_with_blocks()
    keep = timing.draw_widths(table, 64, 0)
    assert (keep[0] == table.channels).all()
    for row in keep:
        table.check(Policy(tuple(row.tolist())))
    out = table.left_out(keep)
    assert (~out.any(axis=1)).sum() == 16
    assert out.all(axis=1).sum() == 8
    assert len({tuple(row) for row in out}) == 7
    plain = replace(table, blocks=())
    assert (timing.draw_widths(plain, 64, 0)[:, 3] > 0).all()


def test_layers_of_a_block_take_no_time_without_it() -> None:
    """Also those that read and write channels that stay."""
    torch.manual_seed(0)
    network, _ = own(Depthwise())
    table = trace(network, blocks=True).table
    keep = timing.draw_widths(table, 64, 0)
    seconds = 1e-4 + 1e-8 * table.costs(keep)[0]
    model = refitted(table, keep, seconds)
    np.testing.assert_allclose(model.seconds(keep), seconds, rtol=1e-3)


class Depthwise(nn.Module):
    """A block that first convolves each channel of the stream by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), InvertedBlock(), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.body(self.stem(x)).mean((2, 3)))
        return logits


class InvertedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.narrow = nn.Conv2d(8, 20, 1), nn.Conv2d(20, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.wide(self.each(x)).relu())
