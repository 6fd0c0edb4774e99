"""Criteria that look at weights and Gram matrices, and the order that follows from one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evosearch.errors import ConfigError, NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.criteria import CRITERIA, Consumer, GroupView, Samples, channel_order
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.statistics import gram_matrices
from evosearch.pruning.table import Group
from tests.unit.small_networks import Flat, FloatArray, Joined, Traced, own, spd

WEIGHT_CRITERIA = ("l1", "l2", "fpgm", "bn-scale")
GREEDY = ("residual-energy", "output-variance")
FILTERS = [[3.0, -4.0], [0.0, 0.0], [-6.0, 8.0]]


@pytest.fixture
def flat() -> Traced:
    torch.manual_seed(0)
    return own(Flat())


@pytest.fixture
def joined() -> Traced:
    torch.manual_seed(0)
    return own(Joined())


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


def test_consumer_l2_is_the_norm_of_what_reads_a_channel() -> None:
    weight = torch.tensor([[[3.0], [9.0], [0.0]], [[4.0], [9.0], [2.0]]], dtype=torch.float64)
    first = Consumer(weight, None, torch.tensor([2, 0]))
    assert CRITERIA["consumer-l2"].score(view(consumers=[first])).tolist() == [2.0, 5.0]
    second = Consumer(weight, None, torch.tensor([0, 2]))
    assert CRITERIA["consumer-l2"].score(view(consumers=[first, second])).tolist() == [3.5, 3.5]


def granular(seen: GroupView, size: int) -> GroupView:
    """The same where so many channels in a row go together."""
    return replace(seen, group=replace(seen.group, granularity=size))


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


def brute_force(cost: Callable[[list[int]], float], channels: int, size: int = 1) -> list[int]:
    """The step at which each channel is removed, everything recomputed at every step.

    Args:
        cost: Of the channels that are gone.
        channels: How many there are.
        size: So many in a row go together.
    """
    gone: list[int] = []
    while len(gone) < channels // size:
        left = [part for part in range(channels // size) if part not in gone]
        totals = [
            cost([part * size + i for part in (*gone, more) for i in range(size)]) for more in left
        ]
        gone.append(left[int(np.argmin(totals))])
    return [gone.index(channel // size) for channel in range(channels)]


@pytest.mark.parametrize("block", [1, 2, 64])
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
    shapes: list[tuple[int, int, int, list[int]]],
    seed: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evosearch.pruning.criteria.residual._BLOCK", block)
    readers = [consumer(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]
    found = CRITERIA["residual-energy"].score(view(consumers=readers))
    wanted = brute_force(
        lambda gone: sum(energy(reader, gone) for reader in readers), len(shapes[0][3])
    )
    assert found.tolist() == wanted


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 3])
def test_residual_energy_removes_together_what_goes_together(seed: int, size: int) -> None:
    n = 4 * size
    order = np.random.default_rng(seed).permutation(n + 2)[:n].tolist()
    readers = [consumer(3, n, 4, list(range(n)), seed), consumer(2, n + 2, 1, order, seed + 9)]
    found = CRITERIA["residual-energy"].score(granular(view(consumers=readers), size))
    wanted = brute_force(lambda gone: sum(energy(reader, gone) for reader in readers), n, size)
    assert found.tolist() == wanted


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


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_twins_the_last_goes_first_whatever_rounding_does(sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 40, generator=generator, dtype=torch.float64).relu()
    weight = torch.randn(50, 40, 9, generator=generator, dtype=torch.float64)
    x, weight = torch.cat([x, x], dim=1), torch.cat([weight, sign * weight], dim=1)
    reader = Consumer(weight, x.T @ x / 900, torch.arange(80))
    first, second = CRITERIA["residual-energy"].score(view(consumers=[reader])).split(40)
    assert (second < first).all()


# --- output variance, by brute force


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_readers", [1, 2])
@pytest.mark.parametrize(("channels", "size"), [(5, 1), (6, 2), (6, 3)])
def test_output_variance_removes_what_adds_least_at_every_step(
    seed: int, n_readers: int, channels: int, size: int
) -> None:
    """With kernels of one, A is the true covariance of what is lost."""
    generator = torch.Generator().manual_seed(seed)
    readers, means, lost = [], [], []
    for _ in range(n_readers):
        mixing = torch.randn(7, 7, generator=generator, dtype=torch.float64)
        x = torch.randn(400, 7, generator=generator, dtype=torch.float64) @ mixing + 1
        weight = torch.randn(3, 7, 1, generator=generator, dtype=torch.float64)
        columns = torch.randperm(7, generator=generator)[:channels]
        readers.append(Consumer(weight, x.T @ x / 400, columns))
        means.append(x[:, columns])
        lost.append(x[:, columns, None] * weight[:, columns, 0].T)

    def variance(gone: list[int]) -> float:
        return sum(float(x[:, gone].sum(dim=1).var(dim=0, correction=0).sum()) for x in lost)

    seen = replace(view(consumers=readers), evidence={"pooled": tuple(means)})
    found = CRITERIA["output-variance"].score(granular(seen, size))
    assert found.tolist() == brute_force(variance, channels, size)


def test_channel_that_never_changes_goes_first_however_large_it_is() -> None:
    """Its mean is all it has, and recalibrated batch norm makes up for that."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 100
    reader = Consumer(torch.ones(3, 4, 1, dtype=torch.float64), x.T @ x / 500, torch.arange(4))
    seen = replace(view(consumers=[reader]), evidence={"pooled": (x,)})
    assert CRITERIA["output-variance"].score(seen)[1] == 0
    assert CRITERIA["residual-energy"].score(seen)[1] > 0


# --- the order


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


def test_most_important_channel_has_place_0(flat: Traced) -> None:
    network, plan = flat
    with torch.no_grad():
        for channel, size in enumerate((3.0, 1.0, 6.0, 2.0, 5.0, 4.0)):
            network.module.a.weight[channel] = -size
    assert channel_order(network.module, plan, "l1")[:6].tolist() == [3, 5, 0, 4, 1, 2]


def test_batch_norm_of_joined_channels_is_divided_among_the_groups(
    joined: Traced,
) -> None:
    network, plan = joined
    with torch.no_grad():
        network.module.norm.weight[:] = torch.tensor([4, 1, 3, 2, 10, 50, 40, 20, 30, 0, 0, 0])
    places = channel_order(network.module, plan, "bn-scale")[:9]
    assert places.tolist() == [0, 3, 1, 2, 4, 0, 1, 3, 2]


@pytest.mark.parametrize(
    "criterion",
    [*WEIGHT_CRITERIA, "consumer-l2", *GREEDY],
)
def test_ties_go_to_the_lower_channel(criterion: str) -> None:
    network, plan = own(Tied())
    # Channels that are all the same have no inverse; means must be those of the same inputs.
    grams = {"b": np.eye(6), "fc": np.eye(4)} if criterion == "residual-energy" else None
    places = channel_order(network.module, plan, criterion, grams, samples_of(network))
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


@pytest.mark.parametrize("criterion", ["consumer-l2", *GREEDY])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_readers_that_are_not_finite_are_refused_with_the_group(criterion: str, bad: float) -> None:
    network, plan = own(Tied())
    grams = {"b": np.eye(6), "fc": np.eye(4)}
    with torch.no_grad():
        network.module.fc.weight[:, 2] = bad
    with pytest.raises(NetworkError, match=rf"criterion {criterion} gives .* for group b"):
        channel_order(network.module, plan, criterion, grams, samples_of(network))


def test_unknown_criterion_lists_the_known_ones(flat: Traced) -> None:
    network, plan = flat
    with pytest.raises(
        ConfigError, match="no criterion 'frob'; there are l1, l2, consumer-l2, fpgm"
    ):
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


def test_a_layer_that_reads_two_groups_is_inverted_once(
    joined: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, plan = joined
    inverted: list[int] = []
    plain = torch.linalg.inv

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        inverted.append(len(matrix))
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "inv", counted)
    channel_order(network.module, plan, "residual-energy", samples=samples_of(network))
    readers = [name for group in plan.table.groups for name in group.consumers]
    assert len(inverted) == len(set(readers)) < len(readers)
