"""What computing on a GPU takes, as far as it can be shown without one."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from evosearch.errors import BackendError
from evosearch.networks import check_alive, like_a_cpu, on_cpu, sent


def flags() -> tuple[bool, bool, str, str]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        *(cudnn.deterministic, cudnn.benchmark),
        *(cudnn.conv.fp32_precision, matmul.fp32_precision),
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_convolutions_on_a_gpu_are_exact_and_repeatable_meanwhile(
    device: str | torch.device,
) -> None:
    seen = []

    def failing() -> None:
        with like_a_cpu(device):
            seen.append(flags())
            raise RuntimeError("boom")

    before = flags()
    with pytest.raises(RuntimeError, match="boom"):
        failing()
    assert seen == [(True, False, "ieee", "ieee")]
    assert flags() == before


TF32 = """
import torch
{}
from evosearch.networks import like_a_cpu
for _ in range(2):
    with like_a_cpu("cuda"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
"""


@pytest.mark.parametrize(
    "setting",
    [
        'torch.backends.fp32_precision = "tf32"',
        'torch.backends.cudnn.conv.fp32_precision = "ieee"',
        "torch.backends.cudnn.allow_tf32 = False",
        'torch.set_float32_matmul_precision("high")',
    ],
)
def test_whatever_a_user_has_asked_of_their_gpu(setting: str) -> None:
    # In a process of its own: torch refuses to be asked in the old and the new way.
    run = [sys.executable, "-W", "error", "-c", TF32.format(setting)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_on_a_cpu_nothing_is_switched() -> None:
    before = flags()
    with like_a_cpu("cpu"):
        assert flags() == before


def test_a_gpu_that_has_failed_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def failing(device: object) -> None:
        asked.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    check_alive("cpu")
    assert not asked
    with pytest.raises(BackendError, match="the GPU has failed") as told:
        check_alive("cuda:1")
    assert asked == ["cuda:1"]
    assert "illegal memory access was encountered);" in str(told.value)
    assert "and more" not in str(told.value)


def test_what_is_on_the_cpu_stays_as_it_is() -> None:
    layer, tensor = nn.Linear(2, 2), torch.ones(2)
    assert on_cpu(layer) is layer
    assert on_cpu(nn.ReLU()).training
    assert sent(tensor, "cpu") is tensor
    assert sent(tensor, "meta").device.type == "meta"
