"""Does compiling a candidate pay?

Every candidate has widths of its own, so its forward pass is compiled anew. Published ResNet-56,
cut at random, folded: seconds of one pass over a batch as scorers run it, without fused sums and
ReLUs, and as torch.compile makes it (weights frozen, so that it fuses them, too), beside the
seconds of compiling. From these follows how many images a candidate would have to be shown before
compiling it pays. On a GPU also as a CUDA graph (`mode="reduce-overhead"`).

    python benchmarks/compiling.py [--device cpu] [--policies 3]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from common import parser, policies_and_truth, published, show, write
from torch import Tensor

from evosearch.pruning.cutting import Cutter
from evosearch.pruning.folding import FastCopy, layout_of
from evosearch.pruning.groups import trace
from evosearch.scoring.workload import DTYPES, settled_batch_size, settled_precision

PASSES = 10
OURS = "as scorers run it"


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Of one run, everything waited for."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(plain: FastCopy, ours: FastCopy, batch: Tensor, modes: tuple[str, ...]) -> list[Any]:
    """Per way to run: seconds of a pass, and seconds before the first pass is through."""
    device = batch.device.type
    rows: list[Any] = []
    for name, fast in (("nothing fused", plain), (OURS, ours)):
        module = fast.module
        module(batch)
        passes = [seconds_of(lambda m=module: m(batch), device) for _ in range(PASSES)]  # type: ignore[misc]
        rows.append((name, min(passes), 0.0))
    for mode in modes:
        torch._dynamo.reset()
        compiled = torch.compile(plain.module, mode=mode)
        first = seconds_of(lambda c=compiled: c(batch), device)  # type: ignore[misc]
        passes = [seconds_of(lambda c=compiled: c(batch), device) for _ in range(PASSES)]  # type: ignore[misc]
        rows.append((f"compiled, {mode}", min(passes), first))
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--policies", type=int, default=3)
    options = made.parse_args()
    gpu = options.device == "cuda"
    torch.set_num_threads(1)
    torch._inductor.config.freezing = True
    torch._inductor.config.force_disable_caches = True  # every candidate is the first of its kind
    network = published(options.data, "resnet56")
    layout, plan = layout_of(network), trace(network)
    dense = network.module.to(options.device)
    dtype = DTYPES[settled_precision("auto", gpu=gpu)]
    size = settled_batch_size(None, network.input.shape, gpu=gpu)
    batch = torch.randn(size, *network.input.shape, generator=torch.Generator().manual_seed(0))
    batch = batch.to(options.device, dtype, memory_format=torch.channels_last)
    cutter = Cutter(plan, dense)
    modes = ("default", "reduce-overhead") if gpu else ("default",)
    found: dict[str, list[tuple[float, float]]] = {}
    for policy in policies_and_truth("resnet56")[0][: options.policies]:
        parts = [np.arange(c) < k for c, k in zip(plan.table.channels, policy.keep, strict=True)]
        cutter.cut(np.append(np.concatenate(parts), True))
        plain, ours = (FastCopy(dense, lay, dtype) for lay in (replace(layout, tails=()), layout))
        for copied in (plain, ours):
            copied.update(cutter.network)
        for name, seconds, first in compare(plain, ours, batch, modes):
            found.setdefault(name, []).append((seconds, first))
    best = statistics.median(s for s, _ in found[OURS])
    rows = []
    for name, numbers in found.items():
        seconds, first = (statistics.median(column) for column in zip(*numbers, strict=True))
        gain = best - seconds
        pays = f"{first / gain * size:,.0f}" if first and gain > 0 else "never" if first else "-"
        rows.append([name, 1000 * seconds, f"{best / seconds:.2f}", first, pays])
    show(
        f"ResNet-56 on {options.device}, batches of {size}, {options.policies} policies: medians",
        ["", "ms a pass", "times as fast", "s to compile", "pays after images"],
        rows,
    )
    write("compiling", options.json, {"device": options.device, "batch": size, "seconds": found})


if __name__ == "__main__":
    main()
