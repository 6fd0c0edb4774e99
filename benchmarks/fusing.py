"""What does it bring that convolutions sum and activate on the way?

Two copies of each network, batch norm folded in both, run the same images on one core: one as
torch runs it, one whose convolutions do what follows them. They take turns. Weights and pixels are
random: neither decides how long it takes. The largest difference of their outputs, as a share of
the largest output, is told too.

    python benchmarks/fusing.py [--networks resnet56 mobilenet_v2 ...] [--repetitions 9]
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import parser, show, write

from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.folding import FastCopy, layout_of
from evosearch.scoring.workload import DTYPES, settled_batch_size, settled_precision

NETWORKS = (
    *("resnet56", "torchvision:resnet50", "torchvision:mobilenet_v2"),
    *("torchvision:mobilenet_v3_large", "torchvision:efficientnet_b0"),
)


def in_turns(name: str, precision: str, repetitions: int) -> dict[str, Any]:
    """Milliseconds of both copies, pass by pass."""
    torch.manual_seed(0)
    shape = (3, 32, 32) if ":" not in name else (3, 224, 224)
    network = load_network(NetworkSpec(name=name, num_classes=10, input_shape=shape))
    layout = layout_of(network)
    size = settled_batch_size(None, shape)
    dtype = DTYPES[precision]
    copies = [FastCopy(network.module, kept, dtype) for kept in (replace(layout, tails=()), layout)]
    images = torch.randn(size, *shape).to(dtype, memory_format=torch.channels_last)
    taken: list[list[float]] = [[], []]
    with torch.inference_mode():
        for fast in copies:
            fast.update(network.module)
        plain, fused = (fast.module(images).double() for fast in copies)
        for _ in range(repetitions):
            for seconds, fast in zip(taken, copies, strict=True):
                start = time.perf_counter()
                fast.module(images)
                seconds.append(time.perf_counter() - start)
    return {
        "network": name,
        "precision": precision,
        "images": size,
        "tails": len(layout.tails),
        "plain_ms": [1e3 * s for s in taken[0]],
        "fused_ms": [1e3 * s for s in taken[1]],
        "difference": float((plain - fused).abs().max() / plain.abs().max()),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", default=list(NETWORKS))
    made.add_argument("--repetitions", type=int, default=9)
    options = made.parse_args()
    torch.set_num_threads(1)
    precisions = dict.fromkeys(("float32", settled_precision("auto")))
    records = [
        in_turns(name, precision, options.repetitions)
        for name in options.networks
        for precision in precisions
    ]
    rows = []
    for record in records:
        ratios = np.divide(record["plain_ms"], record["fused_ms"])
        rows.append(
            [
                f"{record['network']}, {record['precision']}",
                record["tails"],
                float(np.median(record["plain_ms"])),
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
                f"{record['difference']:.0e}",
            ]
        )
    show(
        "a pass on one core; times as fast where convolutions sum and activate, median (range)",
        ["network", "convolutions that do", "apart, ms", "times as fast", "outputs differ by"],
        rows,
    )
    write("fusing", options.json, {"rows": records})


if __name__ == "__main__":
    main()
