"""Global pruning by Torch-Pruning: one threshold on the scores of all channels, no search.

As in its examples: `BasePruner(..., global_pruning=True)` with the group's L2 norm, which is its
default importance, or with first-order Taylor expansions of the loss on calibration images. A tenth
of each layer stays, and the ratio is found by bisection for the MACs to be within the budget.
Layers that feed a shortcut are left alone, as those of the published networks cannot be cut.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rivals import Pruned
from torch import nn
from torch.nn import functional as F

from evosearch.networks.threads import on_threads
from evosearch.policy import Policy
from evosearch.pruning.criteria import GroupView
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload

__all__ = ["PROXY", "GlobalPruning", "group_norm"]

_STEPS = 24
_MOST = 0.9
_BATCH = 128


def group_norm(view: GroupView) -> torch.Tensor:
    """Torch-Pruning's default: squares of all weights of a group, by channel, layers averaged."""
    parts = [weight.square().sum(dim=1) for weight in view.producers]
    parts += [scale.square() for scale in view.scales]
    parts += [
        consumer.weight[:, consumer.columns].transpose(0, 1).flatten(1).square().sum(dim=1)
        for consumer in view.consumers
    ]
    return torch.stack(parts).mean(dim=0)


PROXY = {"proxy.name": "recalibrated", "proxy.criterion": f"{Path(__file__)}:group_norm"}
"""Leaves the very network that its default does, batch norm recalibrated."""


@dataclass(frozen=True, kw_only=True)
class GlobalPruning:
    """A way to rank channels.

    Args:
        importance: By the group's norm, or by Taylor expansions.
    """

    importance: Literal["norm", "taylor"] = "norm"

    def search(self, workload: Workload, share: float, folder: Path, threads: int) -> Pruned:
        """The widths that need least of a cut for the MACs to be within the budget."""
        del folder, threads
        start = time.perf_counter()
        low, high, found = 0.0, 1.0, None
        with on_threads(1):
            gradients = _gradients(workload) if self.importance == "taylor" else {}
            for _ in range(_STEPS):
                ratio = (low + high) / 2
                module, policy = self._pruned(workload, ratio, gradients)
                if workload.plan.table.shares_of([policy])["macs"][0] <= share:
                    high, found = ratio, (module, policy)
                else:
                    low = ratio
        if found is None:
            raise SystemExit(f"Torch-Pruning reaches no {share:.0%} of the MACs")
        seconds = time.perf_counter() - start
        if self.importance == "norm":
            _check_same(found[0], workload, found[1])
        return Pruned(policy=found[1], evaluations=0, seconds=seconds)

    def _pruned(
        self, workload: Workload, ratio: float, gradients: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, Policy]:
        """The network that one ratio leaves, and its widths."""
        import torch_pruning as tp

        network, groups = workload.network(), workload.plan.table.groups
        module = network.module
        producers = {name for group in groups for name in group.producers}
        fixed = [
            layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and name not in producers
        ]
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].clone() if gradients else None
        made: Any = tp.importance
        score = made.GroupTaylorImportance if self.importance == "taylor" else None
        pruner = tp.pruner.BasePruner(
            module,
            network.example(),
            importance=(score or made.GroupMagnitudeImportance)(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=_MOST,
            ignored_layers=fixed,
        )
        pruner.step()
        layers = dict(module.named_modules())
        widths = (layers[group.producers[0]].out_channels for group in groups)
        return module, Policy(tuple(int(width) for width in widths))


def _gradients(workload: Workload) -> dict[str, torch.Tensor]:
    """Of the loss on all calibration images, batch norm frozen, by parameter."""
    network = workload.network()
    module = network.module
    inputs = torch.split(network.normalise(workload.calibration.pixels), _BATCH)
    labels = torch.split(torch.from_numpy(workload.calibration.labels.copy()), _BATCH)
    for batch, wanted in zip(inputs, labels, strict=True):
        loss = F.cross_entropy(module(batch), wanted, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
    named = module.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _check_same(theirs: nn.Module, workload: Workload, policy: Policy) -> None:
    """Their network computes what ours does, whatever its recalibration saw."""
    network = workload.network()
    shown = network.normalise(workload.validation.pixels[:64])
    ours = Scorer(workload).network_of(policy)

    def returned(module: nn.Module) -> torch.Tensor:
        module = copy.deepcopy(module).train()
        with torch.no_grad():
            return module(shown)  # type: ignore[no-any-return]

    if not torch.allclose(returned(theirs), returned(ours), rtol=1e-3, atol=1e-3):
        raise SystemExit("Torch-Pruning's network is not the one of its widths")
