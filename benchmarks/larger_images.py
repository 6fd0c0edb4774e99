"""How many images of 224x224 should run at once? Time per image, and the memory that takes.

Forward passes as scorers run them, folded and fused, on one core, in the precision that `auto`
means here. Weights and pixels are random: neither decides how long it takes. Every row is a
process of its own, whose peak memory is read when it ends; sizes take turns.

    python benchmarks/larger_images.py [--networks resnet50 mobilenet_v2] [--sizes 8 32 128]
        [--repetitions 3]
"""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from common import parser, show, write

from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.folding import FastCopy, layout_of
from evosearch.scoring.workload import DTYPES, settled_batch_size, settled_precision

EDGE = 224
IMAGES = 128


def timed(name: str, size: int) -> dict[str, Any]:
    """Milliseconds per image, and peak memory of this process in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name=name, num_classes=10, input_shape=(3, EDGE, EDGE)))
    dtype = DTYPES[settled_precision("auto")]
    fast = FastCopy(network.module, layout_of(network), dtype)
    fast.update(network.module)
    images = torch.randn(IMAGES, 3, EDGE, EDGE).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        fast.module(images[:size])
        start = time.perf_counter()
        for batch in torch.split(images, size):
            fast.module(batch)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"network": name, "size": size, "ms": 1e3 * seconds / IMAGES, "peak_mb": peak}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", default=["resnet50", "mobilenet_v2"])
    made.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128])
    made.add_argument("--repetitions", type=int, default=3)
    options = made.parse_args()
    records: list[dict[str, Any]] = []
    for _ in range(options.repetitions):
        for name in options.networks:
            for size in options.sizes:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as process:
                    records.append(process.submit(timed, name, size).result())
    rows: list[list[Any]] = []
    largest = max(options.sizes)
    for name in options.networks:
        for size in options.sizes:
            mine, most = (
                [r for r in records if (r["network"], r["size"]) == (name, n)]
                for n in (size, largest)
            )
            # Of one round: loads change from one round to the next.
            times_as_fast = [b["ms"] / a["ms"] for a, b in zip(mine, most, strict=True)]
            rows.append(
                [
                    name,
                    size,
                    float(np.median([r["ms"] for r in mine])),
                    f"{np.median(times_as_fast):.2f} ({min(times_as_fast):.2f} to "
                    f"{max(times_as_fast):.2f})",
                    max(r["peak_mb"] for r in mine),
                ]
            )
    precision = settled_precision("auto")
    show(
        f"{EDGE}x{EDGE}, one core, {precision}; times as fast as {largest} at once, median (range)",
        ["network", "at once", "ms an image", "times as fast", "peak MB"],
        rows,
    )
    write(
        "larger_images",
        options.json,
        {
            "edge": EDGE,
            "images": IMAGES,
            "precision": precision,
            "default": settled_batch_size(None, (3, EDGE, EDGE)),
            "rows": records,
        },
    )


if __name__ == "__main__":
    main()
