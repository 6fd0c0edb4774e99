"""How accurate is a searched network before any training?

A published ResNet at 70, 50 and 30% of its MACs: test top-1 of the searched policy beside uniform
ratios, random search with the same number of evaluations, and NVIDIA's FastNAS. Test images are
opened once, for the chosen policies, which are prepared once more with as many calibration images
as `--final` says; the same channels go as in the search.

With `--cost latency`, shares are of the time that a pass of `--images` takes by PyTorch's clock;
searches foresee it, and the chosen networks are timed together, each beside a reference.

    python benchmarks/one_shot.py [--network resnet56] [--data FOLDER] [--evaluations 72]
        [--seeds 3] [--shares 0.7 0.5 0.3] [--methods "searched, distortion" ...] [--chosen JSON]
        [--cost latency --images 1]
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from at_budget import (
    METHODS,
    Chosen,
    Key,
    Setting,
    by_final,
    choose,
    chosen_before,
    final_workload,
    mean_and_range,
    setting,
    that_prepares,
)
from common import parser, show, write

from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.recipe import LatencyRecipe, RunRecipe
from evosearch.scoring.pool import make_pool
from evosearch.scoring.timing import seconds_of
from evosearch.scoring.workload import Workload

SHARES = (0.7, 0.5, 0.3)
GOAL_SHARE, GOAL = 0.5, 91.5


def measured(
    workload: Workload, policies: list[Policy], workers: int
) -> dict[Policy, dict[str, float]]:
    """Metrics of policies, or an end of it all."""
    pool = make_pool(workload, RunRecipe(workers=workers))
    landed: list[Measurement] = []
    pool.score(list(dict.fromkeys(policies)), landed.append, lambda: False)
    pool.close()
    failed = [f"{m.policy.digest}: {m.reason}" for m in landed if not m.ok]
    if failed:
        raise SystemExit("; ".join(failed))
    return {m.policy: dict(m.metrics) for m in landed}


def timed(workload: Workload, policies: list[Policy], images: int) -> dict[Policy, float]:
    """The time that policies take, as shares of the dense network's."""
    plan = workload.plan
    keep = np.array([plan.table.dense.keep, *(policy.keep for policy in policies)])
    seconds = seconds_of(workload.network(), plan, LatencyRecipe(images=images), keep)
    return dict(zip(policies, (seconds[1:] / seconds[0]).tolist(), strict=True))


def opened(
    where: Setting, proxy: Mapping[str, Any], chosen: Mapping[Key, Chosen], options: Any
) -> list[dict[str, Any]]:
    """Records of chosen policies, prepared for the last time and measured on test images."""
    assembled = where.assembled(that_prepares(proxy, chosen))
    workload = final_workload(where, assembled, options.final, where.test)
    policies = list(dict.fromkeys(found.policy for found in chosen.values()))
    metrics = measured(workload, policies, options.workers)
    table = assembled.workload.plan.table
    times = timed(workload, policies, options.images) if where.cost == "latency" else {}
    return [
        {
            "share": share,
            "method": method,
            "seed": seed,
            "macs": int(table.costs_of([found.policy])[0][0]) / table.dense_costs[0],
            "time": times.get(found.policy),
            "blocks_out": int(table.left_out(np.array([found.policy.keep])).sum()),
            "test_top1": 100 * (1 - metrics[found.policy]["error"]),
            "test_divergence": metrics[found.policy]["divergence"],
            **found.record(),
        }
        for (method, share, seed), found in chosen.items()
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet56")
    made.add_argument("--evaluations", type=int, default=72)
    made.add_argument("--cost", choices=("macs", "latency"), default="macs")
    made.add_argument("--images", type=int, default=1, help="of a pass that is timed")
    made.add_argument("--final", type=int, default=1024, help="calibration images in the end")
    made.add_argument("--shares", type=float, nargs="*", default=SHARES)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--chosen", type=Path, help="JSON of before: measure its policies again")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=2)
    options = made.parse_args()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    how = (options.data, options.network, options.workers, options.cost, options.images)
    with setting(*how) as where:
        before = chosen_before(options.chosen) if options.chosen else {}
        chosen = before | choose(
            where, options.methods, options.shares, options.seeds, options.evaluations, before
        )
        for proxy, mine in by_final(chosen):
            records += opened(where, proxy, mine, options)
    rows: list[list[Any]] = []
    shares = sorted({r["share"] for r in records}, reverse=True)
    for share, method in itertools.product(shares, METHODS):
        same = [r for r in records if (r["share"], r["method"]) == (share, method)]
        if not same:
            continue
        top1 = [r["test_top1"] for r in same]
        cells = [mean_and_range(top1, 2), mean_and_range([r["test_divergence"] for r in same], 3)]
        seconds = mean_and_range([r["search_seconds"] for r in same], 0)
        shared = [f"{share:.0%}", method, same[0]["macs"], same[0]["evaluations"], seconds]
        if options.cost == "latency":
            cells.insert(0, mean_and_range([r["time"] for r in same], 3))
            cells.insert(1, mean_and_range([r["blocks_out"] for r in same], 0))
        rows.append([*shared, *cells])
    show(
        f"{options.network} without training, {options.seeds} seeds: mean (range)",
        [
            *("budget", "method", "MACs", "evaluations", "s"),
            *(("measured time", "blocks out") if options.cost == "latency" else ()),
            *("test top-1", "KL on test"),
        ],
        rows,
    )
    if options.network == "resnet56" and options.cost == "macs":
        print(f"goal at {GOAL_SHARE:.0%}, by distortion: {GOAL}; dense 93.39")
    write(
        "one_shot",
        options.json,
        {
            "network": options.network,
            "cost": options.cost,
            "images_per_pass": options.images if options.cost == "latency" else None,
            "evaluations": options.evaluations,
            "final_calibration": options.final,
            "seeds": options.seeds,
            "rows": sorted(records, key=lambda r: -r["share"]),
            "goal": {"share": GOAL_SHARE, "top1": GOAL},
        },
    )


if __name__ == "__main__":
    main()
