"""Repairs of a cut network that look at its outputs: a new classifier, a few steps of distillation.

Both follow the dense network's outputs on calibration images and need no labels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.pruning.hooks import first_input, hooked

__all__ = ["distil", "refit_head"]

_LEAST_VARIANCE = 1e-12


@torch.inference_mode()
def refit_head(
    module: nn.Module, head: Any, inputs: Iterable[Tensor], teacher: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Ridge regression of the dense network's outputs on the features that the classifier gets.

    Args:
        module: The cut network, in evaluation mode.
        head: Its last layer, linear.
        inputs: Normalised batches.
        teacher: `(n, n_classes)` outputs of the dense network for the same images.
        ridge: Load towards the weight there is, as a share of the features' mean variance.

    Returns:
        Weight `(n_classes, n_features)` and bias `(n_classes,)`, float32.
    """
    seen: list[Tensor] = []

    def note(_layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append(first_input(given, named).float())

    with hooked([head.register_forward_pre_hook(note, with_kwargs=True)]):
        for batch in inputs:
            module(batch)
    features = torch.cat(seen).double()
    wanted = teacher.to(features.device).double()
    before = head.weight.double()
    centre, wish = features.mean(0), wanted.mean(0)
    rows = features - centre
    residual = wanted - wish - rows @ before.T
    gram = rows.T @ rows
    gram.diagonal().add_(ridge * gram.diagonal().mean() + _LEAST_VARIANCE)
    factor = torch.linalg.cholesky(gram)
    weight = before + torch.cholesky_solve(rows.T @ residual, factor).T
    return weight.float(), (wish - weight @ centre).float()


def distil(
    module: nn.Module,
    batches: Sequence[Tensor],
    teacher: Sequence[Tensor],
    steps: int,
    lr: float,
    precision: torch.dtype,
) -> None:
    """A few steps of SGD towards the dense network's outputs, in place.

    Batch norm keeps its statistics, as so few images would spoil them. Momentum 0.9, gradients
    clipped to norm 1, one linear fall of the learning rate to zero.

    Args:
        module: The cut network, float32, in evaluation mode, and left in it.
        batches: Normalised images; taken in turn, again and again.
        teacher: Per batch `(n, n_classes)` outputs of the dense network.
        steps: How many.
        lr: Learning rate of the first step.
        precision: Of the forward pass.
    """
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in parameters]
    device = parameters[0].device
    optimiser = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - step / steps)
            images = batches[step % len(batches)]
            wanted = F.log_softmax(teacher[step % len(batches)].to(device), dim=1)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = module(images)
            found = F.log_softmax(outputs.float(), dim=1)
            loss = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            # A hard cut starts where gradients are steep.
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
    finally:
        for parameter, wish in zip(parameters, before, strict=True):
            parameter.requires_grad_(wish)
            parameter.grad = None
