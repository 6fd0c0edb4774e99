"""Scoring: what a measurement rests on, what it does not depend on, and how it fails."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.data import Images, open_source
from evosearch.errors import ConfigError, NetworkError
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.folding import Layout
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import PROXIES, ProxySettings, proxy_named
from evosearch.scoring.racing import Race, Rival
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    Workload,
    batches,
    logits,
    prepare_workload,
    single_thread,
)

BATCH = 16
DENSE = Policy((16, 16, 16, 32, 32, 32, 64, 64, 64))
HALF = Policy((8, 8, 8, 16, 16, 16, 32, 32, 32))
ODD = Policy((3, 16, 5, 7, 32, 1, 64, 9, 33))
BARE = Policy((1,) * 9)

DROPOUT_FILE = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )
"""


@pytest.fixture(scope="module")
def images() -> tuple[Images, Images]:
    """40 calibration and 56 validation images."""
    source = open_source("cifar10-sample")
    return source.training().take(np.arange(40)), source.held_out().take(np.arange(56))


@pytest.fixture(scope="module")
def dense() -> tuple[Network, CuttingPlan]:
    """A ResNet-20 that learned nothing, but whose batch norm knows the images' statistics."""
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name="resnet20"))
    warm = network.normalise(open_source("cifar10-sample").training().take(np.arange(64)).pixels)
    network.module.train()(warm)
    network.module.eval()
    return network, trace(network)


Prepare = Callable[..., Workload]


@pytest.fixture(scope="module")
def prepared(dense: tuple[Network, CuttingPlan], images: tuple[Images, Images]) -> Prepare:
    """Makes workloads, each only once."""
    known: dict[tuple[Any, ...], Workload] = {}

    def prepare(name: str = "compensated", criterion: str = "l1", **options: Any) -> Workload:
        key = (name, criterion, *sorted(options.items()))
        if key not in known:
            proxy = ProxySettings(
                **{"name": name, "criterion": criterion, "batch_size": BATCH, **options}
            )
            known[key] = prepare_workload(*dense, proxy, *images)
        return known[key]

    return prepare


def same(left: Measurement, right: Measurement) -> bool:
    """Whether two measurements agree bit for bit in all but their seconds."""
    return (left.policy, left.status, left.metrics, left.reason) == (
        right.policy,
        right.status,
        right.metrics,
        right.reason,
    )


# --- races


FEW, MANY = 32, 512  # blocks are of 32 images, and eight of them decide


@pytest.fixture(scope="module")
def long_workload(dense: tuple[Network, CuttingPlan]) -> Workload:
    """512 validation images in 16 batches."""
    source = open_source("cifar10-sample")
    proxy = ProxySettings(name="compensated", criterion="l1", batch_size=FEW, recalibrate=False)
    calibration = source.training().take(np.arange(40))
    return prepare_workload(*dense, proxy, calibration, source.held_out().take(np.arange(MANY)))


def race_of(measurement: Measurement | None) -> Race:
    rivals = []
    if measurement:
        rivals = [Rival(name="rival", metrics=measurement.metrics, blocks=measurement.blocks)]
    return Race(measured=("divergence",), rivals=tuple(rivals), error_rate=0.05)


def test_race_that_is_run_to_its_end_measures_the_same_bits(long_workload: Workload) -> None:
    scorer = Scorer(long_workload)
    weak = scorer.score(BARE, race_of(None))
    alone, raced = scorer.score(HALF), scorer.score(HALF, race_of(weak))
    assert raced.status is Status.OK
    assert raced.metrics == alone.metrics
    assert raced.images == alone.images == MANY
    blocks = np.frombuffer(raced.blocks, dtype=np.float32).reshape(MANY // 32, len(METRICS))
    np.testing.assert_allclose(
        blocks.mean(axis=0), [raced.metrics[name] for name in METRICS], rtol=1e-5
    )


def test_dominated_candidate_is_dropped_early_and_leaves_no_trace(long_workload: Workload) -> None:
    scorer = Scorer(long_workload)
    before, strong = scorer.score(HALF), scorer.score(DENSE, race_of(None))
    lost = scorer.score(BARE, race_of(strong))
    assert lost.status is Status.DROPPED
    assert lost.images is not None
    assert lost.images < MANY
    assert lost.reason == f"worse than rival on its first {lost.images} images"
    assert lost.metrics["divergence"] > strong.metrics["divergence"]
    whole = scorer.score(BARE)
    assert lost.metrics["divergence"] == pytest.approx(whole.metrics["divergence"], rel=0.5)
    assert same(scorer.score(HALF), before)
    again = Scorer(long_workload).score(BARE, race_of(strong))
    assert same(again, lost)


# --- what metrics are


@pytest.mark.parametrize("name", ["raw", "compensated"])
def test_dense_policy_has_no_divergence_and_the_dense_error(prepared: Prepare, name: str) -> None:
    workload = prepared(name, recalibrate=False)
    measurement = Scorer(workload).score(DENSE)
    wrong = workload.dense_logits.argmax(1) != workload.validation.labels
    assert measurement.metrics["divergence"] == 0.0
    assert measurement.metrics["error"] == wrong.mean()


def test_metrics_are_those_of_the_networks_outputs(prepared: Prepare) -> None:
    workload = prepared("raw")
    scorer = Scorer(workload)
    found = scorer.score(HALF).metrics
    labels = torch.from_numpy(workload.validation.labels)
    with torch.inference_mode():
        outputs = scorer.network_of(HALF)(workload.network().normalise(workload.validation.pixels))
    outputs, wanted = outputs.double(), torch.from_numpy(workload.dense_logits).double()
    divergence = F.kl_div(outputs.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    assert found["error"] == pytest.approx(float((outputs.argmax(1) != labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["divergence"] == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("policy", [HALF, ODD, BARE])
def test_metrics_of_a_pruned_network_are_possible(
    prepared: Prepare, name: str, policy: Policy
) -> None:
    measurement = Scorer(prepared(name)).score(policy)
    assert measurement.ok
    assert 0 <= measurement.metrics["error"] <= 1
    assert measurement.metrics["loss"] > 0
    assert measurement.metrics["divergence"] > 0
    assert measurement.seconds > 0


@pytest.mark.parametrize("criterion", ["l1", "residual-energy"])
def test_compensation_brings_a_pruned_network_nearer_to_the_dense_one(
    prepared: Prepare, criterion: str
) -> None:
    raw = Scorer(prepared("raw", criterion)).score(HALF)
    compensated = Scorer(prepared("compensated", criterion, recalibrate=False)).score(HALF)
    assert compensated.metrics["divergence"] < raw.metrics["divergence"]


# --- what metrics do not depend on


@pytest.mark.parametrize("name", PROXIES)
def test_equal_policies_measure_alike_in_any_order(prepared: Prepare, name: str) -> None:
    scorer = Scorer(prepared(name))
    order = [HALF, BARE, DENSE, ODD]
    first = [scorer.score(policy) for policy in order]
    again = [scorer.score(policy) for policy in reversed(order)]
    assert all(same(*pair) for pair in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize("name", PROXIES)
def test_equal_policies_measure_alike_in_a_fresh_scorer(prepared: Prepare, name: str) -> None:
    used = Scorer(prepared(name))
    for policy in (BARE, ODD):
        used.score(policy)
    assert same(used.score(HALF), Scorer(prepared(name)).score(HALF))


def test_equal_policies_measure_alike_in_another_process(prepared: Prepare) -> None:
    workload = prepared("compensated", "residual-energy")
    sent = pickle.loads(pickle.dumps(workload))
    assert same(Scorer(sent).score(ODD), Scorer(workload).score(ODD))


def test_equal_workloads_are_prepared_alike(
    dense: tuple[Network, CuttingPlan], images: tuple[Images, Images], prepared: Prepare
) -> None:
    proxy = ProxySettings(name="compensated", criterion="residual-energy", batch_size=BATCH)
    again = prepare_workload(*dense, proxy, *images)
    assert same(
        Scorer(again).score(HALF), Scorer(prepared("compensated", "residual-energy")).score(HALF)
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_number_of_threads_changes_no_measurement(prepared: Prepare) -> None:
    scorer = Scorer(prepared("recalibrated"))
    found = scorer.score(HALF)
    torch.set_num_threads(1)
    assert same(found, scorer.score(HALF))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("policy", [HALF, Policy((1,))])
def test_number_of_threads_is_restored(prepared: Prepare, policy: Policy) -> None:
    Scorer(prepared("raw")).score(policy)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_single_thread_is_one_thread_for_a_while() -> None:
    def fail() -> None:
        with single_thread():
            raise KeyError(f"{torch.get_num_threads()} inside")

    with pytest.raises(KeyError, match="1 inside"):
        fail()
    assert torch.get_num_threads() == 2


def test_scoring_changes_nothing_in_the_workload(prepared: Prepare) -> None:
    workload = prepared("compensated")
    before = pickle.dumps((workload.state, workload.grams, workload.dense_logits, workload.places))
    Scorer(workload).score(ODD)
    after = (workload.state, workload.grams, workload.dense_logits, workload.places)
    assert pickle.dumps(after) == before


# --- which channels


def test_policy_keeps_as_many_channels_as_it_says(prepared: Prepare) -> None:
    workload = prepared("raw")
    keep = Scorer(workload).keep(ODD)
    parts = np.split(keep[:-1], workload.plan.table.offsets[1:])
    assert tuple(int(part.sum()) for part in parts) == ODD.keep
    assert keep[-1]


def test_wider_policy_keeps_what_the_narrower_one_keeps(prepared: Prepare) -> None:
    scorer = Scorer(prepared("raw"))
    assert not (scorer.keep(BARE) & ~scorer.keep(HALF)).any()


def test_most_important_channel_is_kept_longest(prepared: Prepare) -> None:
    workload = prepared("raw", "l1")
    kept = np.flatnonzero(Scorer(workload).keep(BARE)[:16])
    norms = workload.network().module.layer1[0].conv1.weight.abs().sum((1, 2, 3))
    assert kept.tolist() == [int(norms.argmax())]


def test_network_of_a_policy_has_its_widths_and_its_metrics(prepared: Prepare) -> None:
    workload = prepared("compensated")
    scorer = Scorer(workload)
    wanted = scorer.score(ODD).metrics["error"]
    module = copy.deepcopy(scorer.network_of(ODD))
    assert [block.conv1.out_channels for block in module.layer1] == [3, 16, 5]
    assert not any(part.training for part in module.modules())
    found = logits(module, batches(workload.network(), workload.validation, BATCH))
    assert (found.argmax(1).numpy() != workload.validation.labels).mean() == wanted


# --- recalibration


def batch_statistics(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Mean over batches of every batch norm's input mean and unbiased variance."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_layer: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().double()
            statistics = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True))
            for key, value in zip(("running_mean", "running_var"), statistics, strict=True):
                found.setdefault(f"{name}.{key}", []).append(value)

        return record

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(hook(name))
    module.train()
    with torch.no_grad():
        for x in inputs:
            module(x)
    return {key: torch.stack(values).mean(0) for key, values in found.items()}


@pytest.mark.parametrize("policy", [DENSE, ODD])
def test_recalibration_averages_the_statistics_of_batches(
    prepared: Prepare, policy: Policy
) -> None:
    workload = prepared("recalibrated")
    network = workload.network()
    halves = np.split(workload.calibration.pixels, 2)  # 40 images in batches of at least 16
    cut = copy.deepcopy(Scorer(prepared("raw")).network_of(policy))
    wanted = batch_statistics(cut, [network.normalise(half) for half in halves])
    found = Scorer(workload).network_of(policy).state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-5)


def test_recalibration_leaves_weights_and_momentum_alone(prepared: Prepare) -> None:
    raw = Scorer(prepared("raw")).network_of(HALF)
    module = Scorer(prepared("recalibrated")).network_of(HALF)
    wanted = dict(raw.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in module.named_parameters())
    assert {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_compensation_recalibrates_unless_told_not_to(prepared: Prepare) -> None:
    dense_mean = prepared("raw").state["bn1.running_mean"]
    means = [
        Scorer(prepared("compensated", recalibrate=wanted)).network_of(HALF).bn1.running_mean
        for wanted in (False, True)
    ]
    assert [np.array_equal(mean.numpy(), dense_mean) for mean in means] == [True, False]


@pytest.fixture
def with_dropout(tmp_path: Path, images: tuple[Images, Images]) -> Workload:
    (tmp_path / "dropout_net.py").write_text(DROPOUT_FILE)
    torch.manual_seed(0)
    spec = NetworkSpec(name=f"{tmp_path}/dropout_net.py:make", input_shape=(3, 32, 32))
    network = load_network(spec)
    settings = ProxySettings(name="recalibrated", criterion="l1", batch_size=BATCH)
    return prepare_workload(network, trace(network), settings, *images)


def test_dropout_stays_off_while_recalibrating(with_dropout: Workload) -> None:
    first, second = (Scorer(with_dropout).score(Policy((4, 3))) for _ in range(2))
    assert first.ok
    assert same(first, second)


# --- failures


def test_failing_step_is_a_failed_measurement_with_its_reason(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("the step is out of order")

    scorer = Scorer(prepared("recalibrated"))
    monkeypatch.setattr(scorer, "recalibrate", broken)
    measurement = scorer.score(HALF)
    assert measurement.status is Status.FAILED
    assert measurement.reason == "RuntimeError: the step is out of order"
    assert not measurement.metrics


def test_reason_of_many_lines_still_says_what_kind_of_error_it_was(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("what went wrong\nException raised from here\n")

    scorer = Scorer(prepared("recalibrated"))
    monkeypatch.setattr(scorer, "recalibrate", broken)
    reason = scorer.score(HALF).reason
    assert reason is not None
    assert "RuntimeError: what went wrong" in reason


def test_outputs_that_are_not_finite_are_a_failure_that_names_the_metrics(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(prepared("recalibrated"))
    module = scorer.network_of(HALF)
    monkeypatch.setattr(scorer, "recalibrate", lambda: module.linear.weight.data.fill_(3e38))
    measurement = scorer.score(HALF)
    assert measurement.status is Status.FAILED
    assert measurement.reason is not None
    assert "the pruned network's loss, margin, divergence is not finite" in measurement.reason


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_a_failure_though_a_relu_hides_them(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    scorer = Scorer(prepared("recalibrated", precision="bfloat16"))
    module = scorer.network_of(HALF)
    # A ReLU that the convolution does on the way makes a zero of it.
    conv = module.layer2[0].conv1
    monkeypatch.setattr(scorer, "recalibrate", lambda: conv.weight.data[0, 0].fill_(bad))
    measurement = scorer.score(HALF)
    assert measurement.status is Status.FAILED
    assert measurement.reason is not None
    assert "layer2.0.conv1.weight of the pruned network is not finite" in measurement.reason


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy((1,)), "a policy for this network has 9 counts, got 1"),
        (Policy((1,) * 10), "a policy for this network has 9 counts, got 10"),
        (Policy((17, *DENSE.keep[1:])), "group layer1.0.conv1 has 16 channels, not 17"),
    ],
)
def test_policy_of_another_network_is_a_failed_measurement(
    prepared: Prepare, policy: Policy, reason: str
) -> None:
    measurement = Scorer(prepared("raw")).score(policy)
    assert measurement.status is Status.FAILED
    assert measurement.reason is not None
    assert measurement.reason.endswith(f"PolicyError: {reason}")


class Greedy:
    """Makes measuring raise for every batch larger than it likes; notes the sizes it saw."""

    def __init__(self, scorer: Scorer, most: int, error: BaseException) -> None:
        self.most, self.error = most, error
        self.seen: list[int] = []
        self.handle = scorer._measured.module.register_forward_pre_hook(self)

    def __call__(self, _module: nn.Module, args: tuple[Tensor]) -> None:
        self.seen.append(len(args[0]))
        if len(args[0]) > self.most:
            raise self.error


def memory_error_of_the_cpu() -> RuntimeError:
    """What torch raises when the machine's memory is at its end."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as exc:
        return exc
    raise AssertionError("this machine has an exbibyte")


MEMORY_ERRORS = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"),
    memory_error_of_the_cpu(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_memory_error_is_tried_again_with_half_the_batch(
    prepared: Prepare, error: Exception
) -> None:
    scorer = Scorer(prepared("raw"))
    greedy = Greedy(scorer, BATCH // 2, error)
    assert scorer.score(HALF).ok
    assert greedy.seen[0] > BATCH // 2
    assert set(greedy.seen[1:]) == {BATCH // 2}


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_memory_error_with_half_the_batch_is_out_of_memory(
    prepared: Prepare, error: Exception
) -> None:
    scorer = Scorer(prepared("recalibrated"))
    greedy = Greedy(scorer, 0, error)
    measurement = scorer.score(HALF)
    assert measurement.status is Status.OUT_OF_MEMORY
    assert measurement.reason == f"out of memory with batches of {BATCH // 2}"
    assert len(greedy.seen) == 2


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("boom")])
@pytest.mark.parametrize("name", ["raw", "recalibrated", "compensated"])
def test_failure_leaves_no_trace_in_later_measurements(
    prepared: Prepare, name: str, error: Exception
) -> None:
    scorer = Scorer(prepared(name))
    greedy = Greedy(scorer, 0, error)
    assert not scorer.score(ODD).ok
    greedy.handle.remove()
    assert same(scorer.score(HALF), Scorer(prepared(name)).score(HALF))


def test_failed_recalibration_restores_the_momentum(prepared: Prepare) -> None:
    scorer = Scorer(prepared("recalibrated"))
    greedy = Greedy(scorer, 0, RuntimeError("boom"))
    scorer.score(ODD)
    greedy.handle.remove()
    module = scorer.network_of(HALF)
    assert {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_interrupt_is_not_a_failed_candidate(prepared: Prepare) -> None:
    scorer = Scorer(prepared("raw"))
    Greedy(scorer, 0, KeyboardInterrupt("stop"))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        scorer.score(ODD)


# --- workloads


def test_network_of_the_workload_computes_what_the_original_does(
    prepared: Prepare, dense: tuple[Network, CuttingPlan]
) -> None:
    network, _ = dense
    rebuilt = prepared("raw").network()
    x = network.example(4)
    with torch.inference_mode():
        assert torch.equal(rebuilt.module(x), network.module(x))
    assert rebuilt.input == network.input
    assert not rebuilt.module.training


def test_dense_outputs_are_those_of_the_original(
    prepared: Prepare, dense: tuple[Network, CuttingPlan]
) -> None:
    network, _ = dense
    workload = prepared("raw")
    with torch.inference_mode():
        wanted = network.module(network.normalise(workload.validation.pixels)).numpy()
    np.testing.assert_allclose(workload.dense_logits, wanted, rtol=1e-4, atol=1e-5)


def test_workload_needs_no_weights_file(prepared: Prepare) -> None:
    assert prepared("raw").spec.weights is None


def test_grams_travel_only_with_proxies_that_need_them(prepared: Prepare) -> None:
    assert not prepared("raw", "residual-energy").grams
    table = prepared("compensated", "l1").plan.table
    consumers = {name for group in table.groups for name in group.consumers}
    assert prepared("compensated", "l1").grams.keys() == consumers


def test_workload_does_not_change_with_the_network_that_it_was_made_of(
    with_dropout: Workload, images: tuple[Images, Images]
) -> None:
    network = with_dropout.network()
    workload = prepare_workload(network, with_dropout.plan, with_dropout.settings, *images)
    network.module[0].weight.data.zero_()
    assert workload.state["0.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "frob"}, "no proxy 'frob'; there are raw, recalibrated, compensated"),
        ({"criterion": "frob"}, "no criterion 'frob'; there are l1, l2"),
    ],
)
def test_unknown_name_lists_the_known_ones(
    prepared: Prepare, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(**options)


def test_labels_beyond_the_classes_are_refused(images: tuple[Images, Images]) -> None:
    network = load_network(NetworkSpec(name="resnet20", num_classes=5))
    proxy = ProxySettings(name="raw", criterion="l1")
    with pytest.raises(NetworkError, match=r"has 5 classes, .* label 9; set network.num_classes"):
        prepare_workload(network, trace(network), proxy, *images)


def test_dense_network_whose_outputs_are_not_finite_is_refused(
    images: tuple[Images, Images],
) -> None:
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network)
    nn.init.constant_(network.module.linear.bias, torch.inf)
    with pytest.raises(NetworkError, match="outputs are not finite; check its weights"):
        prepare_workload(network, plan, ProxySettings(name="raw", criterion="l1"), *images)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), size=st.integers(1, 12), at_least=st.booleans())
def test_batches_hold_every_image_once_and_in_order(
    dense: tuple[Network, CuttingPlan], count: int, size: int, at_least: bool
) -> None:
    pixels = np.zeros((count, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    pool = Images(pixels, np.zeros(count, np.int64))
    parts = list(batches(dense[0], pool, size, at_least=at_least))
    assert torch.equal(torch.cat(parts), dense[0].normalise(pixels))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, count) if at_least else max(sizes) <= size


# --- proxies


class Recorder:
    """A bench that only notes what is done on it."""

    def __init__(self, recalibrate: bool) -> None:
        self.settings = ProxySettings(name="x", criterion="l1", recalibrate=recalibrate)
        self.steps: list[str] = []

    def cut(self, keep: object) -> None:
        self.steps.append("cut")

    def compensate(self, keep: object) -> None:
        self.steps.append("compensate")

    def recalibrate(self) -> None:
        self.steps.append("recalibrate")


@pytest.mark.parametrize(
    ("name", "recalibrate", "steps"),
    [
        ("raw", True, ["cut"]),
        ("recalibrated", False, ["cut", "recalibrate"]),
        ("compensated", True, ["cut", "compensate", "recalibrate"]),
        ("compensated", False, ["cut", "compensate"]),
    ],
)
def test_proxy_takes_its_steps_in_order(name: str, recalibrate: bool, steps: list[str]) -> None:
    bench = Recorder(recalibrate)
    proxy_named(name).prepare(bench, np.ones(1, np.bool_))
    assert bench.steps == steps


def test_every_proxy_has_a_line_of_prose() -> None:
    assert all(proxy.title for proxy in PROXIES.values())


def test_margin_is_the_lead_of_the_right_class(prepared: Prepare) -> None:
    workload = prepared("raw")
    scorer = Scorer(workload)
    found = scorer.score(HALF).metrics["margin"]
    with torch.inference_mode():
        p = scorer.network_of(HALF)(
            workload.network().normalise(workload.validation.pixels)
        ).softmax(1)
    wanted = []
    for row, label in zip(p.tolist(), workload.validation.labels, strict=True):
        wanted.append(1 - row[label] + max(v for k, v in enumerate(row) if k != label))
    assert found == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("name", ["refitted", "distilled"])
def test_repairs_bring_the_outputs_nearer_to_the_dense_ones(name: str) -> None:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    plan = trace(network)
    source = open_source("cifar10-sample")
    parts = source.training().take(np.arange(192)), source.held_out().take(np.arange(128))
    found = {}
    for proxy in ("compensated", name):
        options = ProxySettings(name=proxy, criterion="l1", batch_size=64)
        scorer = Scorer(prepare_workload(network, plan, options, *parts))
        found[proxy] = scorer.score(HALF).metrics["divergence"]
        assert all(
            not p.requires_grad or p.grad is None for p in scorer.network_of(HALF).parameters()
        )
    assert found[name] < 0.9 * found["compensated"]


def test_network_without_a_linear_end_cannot_be_refitted(prepared: Prepare) -> None:
    workload = dataclasses.replace(prepared("refitted"), layout=Layout())
    measurement = Scorer(workload).score(HALF)
    assert measurement.status is Status.FAILED
    assert measurement.reason is not None
    assert "does not end with a linear layer" in measurement.reason
