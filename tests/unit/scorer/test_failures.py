"""A failure is a measurement with a reason, and leaves no trace."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evosearch.data import Images
from evosearch.errors import BackendError, NetworkError
from evosearch.measurement import Status
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload
from tests.unit.scorer.bench import BATCH, DENSE, HALF, ODD, Prepare, same

AT_HOME = """
import torch
from torch import nn

class Home(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).mean((2, 3))) + torch.ones(10)

def make(num_classes):
    torch.manual_seed(0)
    return Home()
"""


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
    """Makes forward passes raise for every batch larger than it likes; notes the sizes it saw."""

    def __init__(self, scorer: Scorer, most: int, error: BaseException) -> None:
        self.most, self.error = most, error
        self.seen: list[int] = []
        self.handles = [
            fast.module.register_forward_pre_hook(self)
            for fast in (scorer._recalibrated, scorer._measured)
        ]

    def remove(self) -> None:
        """Lets everything pass from now on."""
        for handle in self.handles:
            handle.remove()

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
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
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


def test_recalibration_is_tried_again_with_half_of_its_own_batch(prepared: Prepare) -> None:
    scorer = Scorer(prepared("recalibrated", batch_size=4, calibration_batch=20))
    greedy = Greedy(scorer, 10, MemoryError("no room"))
    assert scorer.score(HALF).ok
    assert greedy.seen[:2] == [20, 10]
    assert greedy.seen[-1] == 2
    # The next one is tried as before.
    greedy.seen.clear()
    scorer.score(HALF)
    assert greedy.seen[0] == 20
    scorer = Scorer(prepared("recalibrated", batch_size=4, calibration_batch=20))
    Greedy(scorer, 0, MemoryError("no room"))
    assert scorer.score(HALF).reason == "out of memory with batches of 2 and 10"


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


def test_the_second_attempt_has_the_memory_of_the_first(prepared: Prepare) -> None:
    scorer = Scorer(prepared("raw"))
    held: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def greedy(_module: nn.Module, args: tuple[Tensor]) -> None:
        freed.append(not any(one() is not None for one in held))
        if len(args[0]) > BATCH // 2:
            large = torch.ones(1000)
            held.append(weakref.ref(large))
            held.append(weakref.ref(args[0]))
            raise MemoryError(f"no room for {len(large)} more")

    scorer._measured.module.register_forward_pre_hook(greedy)
    assert scorer.score(HALF).ok
    assert len(held) == 2
    assert freed[0]
    assert freed[1:] == [True] * (len(freed) - 1)


def test_failure_of_the_gpu_is_no_measurement(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(_device: str) -> None:
        raise BackendError("the GPU has failed")

    scorer = Scorer(prepared("recalibrated"))
    monkeypatch.setattr(scorer, "recalibrate", broken)
    assert scorer.score(HALF).status is Status.FAILED
    monkeypatch.setattr("evosearch.scoring.scorer.check_alive", lost)
    with pytest.raises(BackendError, match="the GPU has failed"):
        scorer.score(HALF)


def test_network_that_does_not_run_on_the_device_is_refused_at_once(
    images: tuple[Images, Images], tmp_path: Path
) -> None:
    file = tmp_path / "at_home.py"
    file.write_text(AT_HOME)
    network = load_network(NetworkSpec(name=f"{file}:make", input_shape=(3, 32, 32)))
    settings = ProxySettings(name="raw", criterion="l1", batch_size=BATCH)
    workload = prepare_workload(network, trace(network), settings, *images)
    # A device that has no numbers, but is another one.
    with pytest.raises(NetworkError, match=r"at_home.py:make does not run on meta \(.*device"):
        Scorer(workload, "meta")


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("boom")])
@pytest.mark.parametrize("name", ["raw", "recalibrated", "compensated"])
def test_failure_leaves_no_trace_in_later_measurements(
    prepared: Prepare, name: str, error: Exception
) -> None:
    scorer = Scorer(prepared(name))
    greedy = Greedy(scorer, 0, error)
    assert not scorer.score(ODD).ok
    greedy.remove()
    assert same(scorer.score(HALF), Scorer(prepared(name)).score(HALF))


def test_failed_recalibration_restores_the_momentum(prepared: Prepare) -> None:
    scorer = Scorer(prepared("recalibrated"))
    greedy = Greedy(scorer, 0, RuntimeError("boom"))
    scorer.score(ODD)
    greedy.remove()
    module = scorer.network_of(HALF)
    assert {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_interrupt_is_not_a_failed_candidate(prepared: Prepare) -> None:
    scorer = Scorer(prepared("raw"))
    Greedy(scorer, 0, KeyboardInterrupt("stop"))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        scorer.score(ODD)
