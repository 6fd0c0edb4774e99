"""NVIDIA's FastNAS, the pruning search of its Model Optimizer, driven as its documentation says.

It measures each layer alone at every width (the network cut there only, batch norm recalibrated),
makes that monotonic, and takes for every layer the smallest width whose loss stays under one
threshold, found by bisection. One such map serves all budgets. Channels are ordered by the norm of
the weights that read them. As it comes, widths are multiples of 32, which leaves these networks
next to nothing to cut; here they are whatever its twenty ratios give.

Needs `pip install -e '.[bench]'`.
"""

import contextlib
import importlib.util
import io
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rivals import Pruned
from torch import Tensor, nn

from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload, divergence

__all__ = ["PROXY", "FastNAS", "check_installed"]

BATCH = 128


PROXY = {"proxy.name": "recalibrated", "proxy.criterion": "consumer-l2"}
"""Leaves the very network that FastNAS does."""


def check_installed() -> None:
    """Ends it all before hours are spent."""
    if importlib.util.find_spec("modelopt") is None:
        raise SystemExit("FastNAS is not installed: pip install -e '.[bench]', or name --methods")


@dataclass(frozen=True, kw_only=True)
class FastNAS:
    """A way to search.

    Args:
        score: What is lost where a layer is cut.
    """

    score: Literal["error", "divergence"] = "error"

    def search(self, workload: Workload, share: float, folder: Path, threads: int) -> Pruned:
        """Widths for a budget.

        Args:
            workload: Made for `PROXY`: its calibration images recalibrate, its validation images
                score, and the network that was found must be the one that it would build.
            share: Of the MACs.
            folder: Where the map is kept; a second budget finds it there.
            threads: Of torch.
        """
        network = workload.network()
        normalised = network.normalise(workload.calibration.pixels)
        shown = network.normalise(workload.validation.pixels)
        score = _Score(self.score, shown, workload)
        kept = folder / f"fastnas-{self.score}.txt"
        before, spent = map(float, kept.read_text().split()) if kept.is_file() else (0.0, 0.0)
        start = time.perf_counter()
        with _quietly(threads):
            import modelopt.torch.prune as mtp

            module, _ = mtp.prune(
                network.module,
                mode=[("fastnas", _rules())],
                constraints={"flops": f"{100 * share:.6g}%"},
                dummy_input=network.example(),
                config={
                    "data_loader": torch.split(normalised, BATCH),
                    "collect_func": lambda batch: batch,
                    "score_func": score,
                    "checkpoint": str(kept.with_suffix(".pth")),
                },
            )
        seconds = spent + time.perf_counter() - start
        evaluations = int(before) + score.count
        kept.write_text(f"{evaluations} {seconds}")
        layers, groups = dict(module.named_modules()), workload.plan.table.groups
        policy = Policy(tuple(int(layers[group.name].out_channels) for group in groups))
        _check_same(module, Scorer(workload).network_of(policy), network, shown[:64])
        return Pruned(policy=policy, evaluations=evaluations, seconds=seconds)


class _Score:
    """What FastNAS maximises, with a count."""

    def __init__(self, name: str, shown: Tensor, workload: Workload) -> None:
        self.count = 0
        self._name = name
        self._shown = shown
        self._labels = torch.from_numpy(workload.validation.labels)
        self._dense = torch.from_numpy(workload.dense_logits)

    def __call__(self, module: nn.Module) -> float:
        self.count += 1
        with torch.no_grad():
            outputs = torch.cat([module(batch) for batch in torch.split(self._shown, BATCH)])
        if self._name == "error":
            return 100 * float((outputs.argmax(1) == self._labels).double().mean())
        return -divergence(self._dense, outputs)


def _rules() -> dict[str, dict[str, dict[str, Any]]]:
    """Its own ratios, without the divisor that large networks on GPUs are fine with."""
    import modelopt.torch.prune as mtp

    rules = mtp.fastnas.FastNASConfig().model_dump()
    return {
        "nn.Conv2d": {"*": {**rules["nn.Conv2d"]["*"], "channel_divisor": 1}},
        "nn.BatchNorm2d": {"*": {**rules["nn.BatchNorm2d"]["*"], "feature_divisor": 1}},
    }


@contextlib.contextmanager
def _quietly(threads: int) -> Iterator[None]:
    """With that many threads of torch; tables, progress and warnings are not printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    said = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _check_same(theirs: nn.Module, ours: nn.Module, network: Network, shown: Tensor) -> None:
    """Their network computes what ours does, whatever its recalibration saw."""

    def returned(module: nn.Module) -> Tensor:
        module.train()
        with torch.no_grad():
            return module(shown)  # type: ignore[no-any-return]

    if not torch.allclose(returned(theirs), returned(ours), rtol=1e-3, atol=1e-3):
        raise SystemExit(f"{network.spec.name}: FastNAS's network is not the one of its widths")
