"""What do the operations of a candidate cost, beside what the machine could do at best?

Convolutions of a ResNet's three stages at widths that a search asks for, on one core in bfloat16
(float32 where the hardware knows no other), and what stands between them. Beside each its share of
the roofline: of the time that its multiplications take in a large matrix product, or that its maps
take to be copied, whichever is longer. What is said about single operations in docs/speed.md.

    python benchmarks/operations.py [--images 128]
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common import parser, show, write
from torch import Tensor
from torch.nn import functional as F

from evosearch.pruning.fusing import can_fuse, convolve
from evosearch.pruning.watching import RELU
from evosearch.scoring.workload import DTYPES, settled_precision

# Maps of a CIFAR ResNet: width of the stream, and height and width.
STAGES = ((16, 32), (32, 16), (64, 8))
SHARES = (0.3, 0.5, 0.52, 0.8, 1.0)


def seconds(run: Callable[[], Any]) -> float:
    """Of the fastest of several dozen runs."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(40):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def maps(images: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(images, channels, side, side).to(dtype)
    return made.contiguous(memory_format=torch.channels_last)


def layer(into: int, out: int, dtype: torch.dtype) -> Any:
    """A convolution with a bias, as a folded one has."""
    made = torch.nn.Conv2d(into, out, 3, padding=1).to(dtype)
    return made.to(memory_format=torch.channels_last)


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / seconds(lambda: left @ right)


def copied(like: Tensor) -> float:
    """Bytes a second that are read and written when such maps are copied."""
    target = torch.empty_like(like)
    return 2 * like.nbytes / seconds(lambda: target.copy_(like))


def convolutions(
    images: int, width: int, side: int, inner: int, dtype: torch.dtype, best: float
) -> dict[str, Any]:
    """The two of a block, with `inner` channels between them, alone and with what follows."""
    stream, between = (maps(images, channels, side, dtype) for channels in (width, inner))
    first, second = layer(width, inner, dtype), layer(inner, width, dtype)
    bandwidth = copied(stream)
    flops = 2 * 9 * width * inner * images * side**2
    moved = stream.nbytes + between.nbytes
    alone = [seconds(lambda: first(stream)), seconds(lambda: second(between))]
    row = {
        "width": width,
        "inner": inner,
        "side": side,
        "seconds": alone,
        "bound": [max(flops / best, moved / bandwidth)] * 2,
        "share_of_peak": [flops / best / s for s in alone],
    }
    if can_fuse(torch.device("cpu"), dtype):
        row["fused"] = [
            seconds(lambda: convolve(first, stream, None, RELU)),
            seconds(lambda: convolve(second, between, stream, RELU)),
        ]
    return row


def others(images: int, width: int, side: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What a network does to a map, or we might; with the bytes that it has to move."""
    x = maps(images, width, side, dtype)
    per_channel = torch.randn(1, width, 1, 1).to(dtype)
    mean, variance, scale, shift = (torch.ones(width) for _ in range(4))
    rows = x.permute(0, 2, 3, 1).reshape(-1, width)
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (2, x.clone),
        "sum of two maps": (3, lambda: x + x),
        "ReLU in place": (2, lambda: F.relu_(x)),
        "batch norm, training": (3, lambda: F.batch_norm(x, mean, variance, scale, shift, True)),
        "batch norm, evaluating": (2, lambda: F.batch_norm(x, mean, variance, scale, shift)),
        "one number per channel added": (2, lambda: x + per_channel),
        "mean and variance by var_mean": (1, lambda: torch.var_mean(rows.float(), 0)),
    }
    found = []
    for name, (passes, run) in runs.items():
        took = seconds(run)
        found.append(
            {
                "operation": name,
                "width": width,
                "side": side,
                "seconds": took,
                "bytes_per_second": passes * x.nbytes / took,
            }
        )
    return found


@torch.inference_mode()
def main() -> None:
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=128)
    options = made.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[settled_precision("auto")]
    best = peak(dtype)
    rows = [
        convolutions(options.images, width, side, max(1, round(share * width)), dtype, best)
        for width, side in STAGES
        for share in SHARES
    ]
    more = [row for stage in STAGES for row in others(options.images, *stage, dtype)]
    show(
        f"3x3 convolutions, {options.images} images, {dtype}, one core: the two of a block",
        ["stream and inner width, side", "ms", "share of roofline", "share of peak", "ms, fused"],
        [
            [
                f"{r['width']} and {r['inner']}, {r['side']}",
                pair(1000 * s for s in r["seconds"]),
                pair(b / s for b, s in zip(r["bound"], r["seconds"], strict=True)),
                pair(r["share_of_peak"]),
                pair(1000 * s for s in r.get("fused", ())),
            ]
            for r in rows
        ],
    )
    show(
        "Between them",
        ["operation", "width, side", "ms", "GB/s"],
        [
            [
                r["operation"],
                f"{r['width']}, {r['side']}",
                1000 * r["seconds"],
                r["bytes_per_second"] / 1e9,
            ]
            for r in more
        ],
    )
    content = {
        "images": options.images,
        "dtype": str(dtype),
        "peak_flops_per_second": best,
        "convolutions": rows,
        "others": more,
    }
    write("operations", options.json, content)


def pair(values: Iterable[float]) -> str:
    """Numbers side by side; a dash for none."""
    return "  ".join(f"{value:.2f}" for value in values) or "-"


if __name__ == "__main__":
    main()
