"""What computing on a GPU takes beyond computing on a CPU."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evosearch.errors import BackendError, first_line

__all__ = ["check_alive", "like_a_cpu", "on_cpu", "sent"]


@contextlib.contextmanager
def like_a_cpu(device: str | torch.device) -> Iterator[None]:
    """Has layers on a GPU give equal numbers for equal work, float32 with all its digits.

    Left alone, cuDNN adds up gradients of weights in whatever order threads end, and rounds the
    factors of float32 convolutions to ten bits (TF32); so do products of matrices where somebody
    has asked for it. Gradients of pooling are still summed in any order.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    wanted: tuple[tuple[Any, str, Any], ...] = (
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        # Not by `allow_tf32`, which fails where a user has set these.
        (cudnn.conv, "fp32_precision", "ieee"),
        (matmul, "fp32_precision", "ieee"),
    )
    before = [getattr(where, name) for where, name, _ in wanted]
    try:
        for where, name, value in wanted:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(wanted, before, strict=True):
            setattr(where, name, value)


def check_alive(device: str | torch.device) -> None:
    """Checks that a GPU can still be used; to be asked when something has failed on it.

    After an illegal access or a fault of its memory all that a process does on a GPU fails.

    Raises:
        BackendError: It cannot.
    """
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as exc:
        raise BackendError(
            f"the GPU has failed ({first_line(exc)}); nothing that was measured is lost, and the "
            "run can be resumed, by a new process"
        ) from exc


def on_cpu(module: nn.Module) -> nn.Module:
    """The module itself, or a copy of one that is on a GPU."""
    first = next(module.parameters(), None)
    return module if first is None or first.device.type == "cpu" else copy.deepcopy(module).cpu()


def sent(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor there; a GPU goes on with what it is doing meanwhile."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
