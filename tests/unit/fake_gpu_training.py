"""Trains on a GPU that does not exist: what `fake_gpu` does for scoring.

A backward pass asks for a real device, so gradients are zeros here. Prints, as JSON, for a short
and a long epoch what moved between devices, and how often a number was asked for.

    python -m tests.unit.fake_gpu_training
"""

import json
import os
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from evosearch.data import open_source
from evosearch.networks import NetworkSpec, load_network
from evosearch.training.baseline import TrainSettings, make_optimiser, train_epoch
from tests.unit.fake_gpu import Transfers, moved


def main() -> None:
    student, teacher = (load_network(NetworkSpec(name="resnet20")) for _ in range(2))
    images = open_source("cifar10-sample").training()
    settings = TrainSettings(batch_size=16, distillation=0.9, precision="bfloat16")
    asked: list[str] = []

    def number(tensor: Tensor) -> float:
        asked.append(tensor.device.type)
        return 1.0

    def backward(loss: Tensor, *_args: Any, **_kwargs: Any) -> None:
        assert loss.device.type == "cuda"
        for parameter in student.module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    Tensor.__float__ = number  # type: ignore[method-assign]
    Tensor.__int__ = lambda tensor: int(number(tensor))  # type: ignore[method-assign]
    Tensor.backward = backward  # type: ignore[method-assign, assignment]
    nn.Module.to = moved  # type: ignore[method-assign, assignment]
    Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign, assignment]
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (student, teacher):
            moved(network.module, "cuda")
        for steps in (2, 5):
            asked.clear()
            optimiser = make_optimiser(student.module, settings)
            some = images.take(np.arange(16 * steps))
            with Transfers() as transfers:
                train_epoch(student, some, optimiser, settings, 0, teacher.module)
            found.append({**transfers.counts, "numbers": len(asked)})
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    # Fake tensors that stood in for parameters are not freed in peace.
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
