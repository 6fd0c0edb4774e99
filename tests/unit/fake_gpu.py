"""Scores a policy on a GPU that does not exist: every step, with tensors that have no numbers.

torch's fake tensors know shape, type and device, and refuse what a real GPU would make wait or
fail: a number that is asked for (`.item()`, a branch on a tensor), and tensors of two devices in
one operation. Prints, as JSON, how often a second candidate of each network moved something between
devices, where all layers are fitted or those that are cut.

    python -m tests.unit.fake_gpu resnet20,all resnet32,all resnet20,cut
"""

import json
import os
import sys
import warnings
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from evosearch.data import open_source
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.scoring import proxies
from evosearch.scoring.proxies import Bench, Keep, Proxy, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload

# Fake tensors that stood in for parameters are not freed in peace.
LIVING: list[Scorer] = []


def everything(bench: Bench, keep: Keep) -> None:
    """All steps but distillation: a backward pass asks for a real device."""
    bench.cut(keep)
    bench.compensate(keep)
    bench.compensate_patches(keep)
    bench.recalibrate()
    bench.reconstruct(keep)
    bench.refit()


class Transfers(TorchDispatchMode):
    """Counts what moves between devices, by direction."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            # Whatever the operation's name: composite ones are not taken apart in inference mode.
            for given in args:
                if isinstance(given, Tensor) and given.device.type != result.device.type:
                    self.counts[f"{given.device.type} to {result.device.type}"] += 1
        return result


def moved(module: nn.Module, device: str) -> nn.Module:
    """What `Module.to` does; that one cannot be used while tensors are fake."""
    for layer in module.modules():
        for key, value in layer._parameters.items():
            if value is not None:
                layer._parameters[key] = nn.Parameter(value.detach().to(device))
        for key, buffer in layer._buffers.items():
            if isinstance(buffer, Tensor):
                layer._buffers[key] = buffer.to(device)
    return module


def transfers(name: str, layers: str) -> dict[str, int]:
    """How often the second candidate moved something, by direction."""
    network = load_network(NetworkSpec(name=name))
    plan = trace(network)
    source = open_source("cifar10-sample")
    settings = ProxySettings(
        name="everything",
        criterion="l1",
        precision="bfloat16",
        batch_size=32,
        reconstruction_images=16,
        reconstruction_layers=layers,
    )
    images = source.training().take(np.arange(64)), source.held_out().take(np.arange(64))
    workload = prepare_workload(network, plan, settings, *images)
    # Workloads are prepared with real tensors.
    with (
        patch.object(nn.Module, "to", moved),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        scorer = Scorer(workload, "cuda")
        LIVING.append(scorer)
        for keep in (plan.table.channels // 2, plan.table.channels // 3):
            with Transfers() as seen:
                everything(scorer, scorer.keep(Policy(tuple(map(int, keep)))))
                for outputs, distortion in scorer._answers():
                    assert outputs.shape == (32, 10)
                    assert distortion.shape == (32,)
    return dict(seen.counts)


def main(*names: str) -> None:
    proxies.PROXIES["everything"] = Proxy(
        title="all steps",
        prepare=everything,
        needs_grams=True,
        needs_moments=True,
        needs_targets=True,
        needs_teacher=True,
    )
    sys.stdout.write(json.dumps([transfers(*name.split(",")) for name in names]))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
