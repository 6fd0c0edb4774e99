"""How many candidates a second does one device score, with how many scorers on it?

Published ResNet-20 and ResNet-56, policies and proxies as in throughput.py: `same images`
(compensated, recalibrated on 500 images, measured on 1,000) and `quick` (reconstructed on 64,
measured on 64). One to eight scorers on Ray share a GPU, as `run.gpus_per_worker = 0.125` says, or
have a core each where the device is the CPU. All score the same policies, in blocks that take
turns. Beside it, how far a device's metrics are from those of a scorer on the CPU, and whether they
order the policies alike. Kernels of several scorers run at the same time only under CUDA's
Multi-Process Service; else they take turns. The JSON says which.

    python benchmarks/devices.py [--device cuda] [--scorers 1 2 4 8] [--blocks 3] [--policies 32]
        [--round-to 8]
"""

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import parser, published, show, write
from scipy.stats import kendalltau
from throughput import OURS, the_images

from evosearch.data import Images, augment
from evosearch.measurement import METRICS, Measurement
from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.recipe import RunRecipe
from evosearch.scoring.pool import InProcessPool, RayPool
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import (
    Workload,
    prepare_workload,
    settled_batch_size,
    settled_precision,
)

READ_BY = {"ours, compensated": "error", "ours, compensated, quick": "distortion"}


def random_policies(table: GroupTable, count: int, round_to: int) -> list[Policy]:
    """Channels kept at random, 20 to 75% removed per group, rounded up to a multiple."""
    rng = np.random.default_rng(0)

    def width(channels: int) -> int:
        kept = channels - math.floor(channels * rng.uniform(0.2, 0.75))
        return min(channels, -(-kept // round_to) * round_to)

    return [Policy(tuple(map(width, table.channels.tolist()))) for _ in range(count)]


def served_together() -> bool:
    """Whether processes share a GPU through CUDA's Multi-Process Service."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    return (pipes / "control").exists()


def prepared(network: Network, plan: CuttingPlan, folder: Path, name: str, gpu: bool) -> Workload:
    """What scorers on such a device hold."""
    calibration, validation = the_images(folder)
    n_calibration, n_validation, proxy = OURS[name]
    chosen = calibration.take(np.arange(n_calibration))
    settings = ProxySettings(
        **proxy,
        precision=settled_precision("auto", gpu=gpu),
        batch_size=settled_batch_size(None, network.input.shape, gpu=gpu),
    )
    return prepare_workload(
        network,
        plan,
        settings,
        Images(augment(chosen.pixels, 4, True, np.random.default_rng(0)), chosen.labels),
        validation.take(np.arange(n_validation)),
    )


def scored(pool: RayPool | InProcessPool, block: list[Policy]) -> tuple[float, list[Measurement]]:
    """Candidates per second, and what they were found to be, in the order of the block."""
    landed: list[Measurement] = []
    start = time.perf_counter()
    pool.score(block, landed.append, lambda: False)
    rate = len(block) / (time.perf_counter() - start)
    failed = [m.reason for m in landed if not m.ok]
    if failed:
        raise SystemExit(f"failed: {failed[0]}")
    found = {m.policy: m for m in landed}
    return rate, [found[policy] for policy in block]


def in_turns(
    workload: Workload, scorers: list[int], blocks: list[list[Policy]], gpu: bool
) -> tuple[dict[int, list[float]], list[Measurement]]:
    """Candidates per second of each number of scorers, and what the first of them measured."""
    everybody = sum(scorers)
    ray.init(
        address="local",
        num_cpus=everybody,
        num_gpus=1 if gpu else 0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
    )
    # Pools that wait hold memory of the device, and nothing else of it.
    share = 1 / everybody if gpu else 0.0
    pools = {n: RayPool(workload, RunRecipe(workers=n, gpus_per_worker=share)) for n in scorers}
    rates: dict[int, list[float]] = {n: [] for n in scorers}
    found: list[Measurement] = []
    for n, pool in pools.items():
        scored(pool, blocks[0][:n])  # warms up
    for block in blocks:
        for n, pool in pools.items():
            rate, measured = scored(pool, block)
            rates[n].append(rate)
            found += measured if n == scorers[0] else []
    for pool in pools.values():
        pool.close()
    ray.shutdown()
    return rates, found


def agreement(ours: list[Measurement], cpu: list[Measurement], metric: str) -> dict[str, float]:
    """Tau between both orders, and the largest difference of any metric."""
    orders = [[m.metrics[metric] for m in measured] for measured in (ours, cpu)]
    gaps = [
        abs(a.metrics[k] - b.metrics[k]) for a, b in zip(ours, cpu, strict=True) for k in METRICS
    ]
    return {"tau": float(kendalltau(*orders).statistic), "largest_difference": max(gaps)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    made.add_argument("--scorers", nargs="+", type=int, default=[1, 2, 4, 8])
    made.add_argument("--blocks", type=int, default=3)
    made.add_argument("--policies", type=int, default=32, help="per block")
    made.add_argument("--round-to", type=int, default=1, help="widths are multiples of this")
    made.add_argument("--compared", type=int, default=16, help="policies scored on the CPU as well")
    options = made.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --device cpu compares scorers on cores")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.networks:
        network = published(options.data, name)
        plan = trace(network)
        policies = random_policies(plan.table, options.blocks * options.policies, options.round_to)
        size = options.policies
        blocks = [policies[i * size : (i + 1) * size] for i in range(options.blocks)]
        for proxy, metric in READ_BY.items():
            workload = prepared(network, plan, options.data, proxy, gpu)
            rates, found = in_turns(workload, options.scorers, blocks, gpu)
            reference = prepared(network, plan, options.data, proxy, gpu=False)
            few = policies[: options.compared]
            _, cpu = scored(InProcessPool(reference), few)
            results[f"{name}, {proxy}"] = {
                "candidates_per_second": rates,
                "batch_size": workload.settings.batch_size,
                "precision": workload.settings.precision,
                "against_cpu": agreement(found[: len(few)], cpu, metric),
            }
    device = torch.cuda.get_device_name() if gpu else "CPU"
    show(
        f"Candidates a second on {device}, {options.blocks} blocks of {options.policies} policies",
        ["", *(f"{n} scorers" for n in options.scorers), "tau with CPU", "largest difference"],
        [
            [
                name,
                *(statistics.median(rates) for rates in part["candidates_per_second"].values()),
                *(f"{value:.4f}" for value in part["against_cpu"].values()),
            ]
            for name, part in results.items()
        ],
    )
    settings = {"device": device, "mps": gpu and served_together(), "round_to": options.round_to}
    write("devices", options.json, {**settings, "results": results})


if __name__ == "__main__":
    main()
