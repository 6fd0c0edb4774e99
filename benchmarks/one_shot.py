"""How accurate is a searched network before any training?

A published ResNet at 70, 50 and 30% of its MACs: test top-1 of the searched policy beside uniform
ratios, random search with the same number of evaluations, and NVIDIA's FastNAS. Test images are
opened once, for the chosen policies, which are prepared once more with as many calibration images
as `--final` says; the same channels go as in the search.

    python benchmarks/one_shot.py [--network resnet56] [--data FOLDER] [--evaluations 72]
        [--seeds 3] [--shares 0.7 0.5 0.3] [--methods "searched, distortion" ...] [--chosen JSON]
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
)
from common import parser, show, write

from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.recipe import RunRecipe
from evosearch.scoring.pool import make_pool
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


def opened(
    where: Setting, proxy: Mapping[str, Any], chosen: Mapping[Key, Chosen], options: Any
) -> list[dict[str, Any]]:
    """Records of chosen policies, prepared for the last time and measured on test images."""
    assembled = where.assembled(proxy)
    workload = final_workload(where, assembled, options.final, where.test)
    metrics = measured(workload, [found.policy for found in chosen.values()], options.workers)
    table = assembled.workload.plan.table
    return [
        {
            "share": share,
            "method": method,
            "seed": seed,
            "macs": int(table.costs_of([found.policy])[0][0]) / table.dense_costs[0],
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
    made.add_argument("--final", type=int, default=1024, help="calibration images in the end")
    made.add_argument("--shares", type=float, nargs="*", default=SHARES)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--chosen", type=Path, help="JSON of before: measure its policies again")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=2)
    options = made.parse_args()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    with setting(options.data, options.network, options.workers) as where:
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
        rows.append([*shared, *cells])
    show(
        f"{options.network} without training, {options.seeds} seeds: mean (range)",
        ["budget", "method", "MACs", "evaluations", "s", "test top-1", "KL on test"],
        rows,
    )
    if options.network == "resnet56":
        print(f"goal at {GOAL_SHARE:.0%}, by distortion: {GOAL}; dense 93.39")
    write(
        "one_shot",
        options.json,
        {
            "network": options.network,
            "evaluations": options.evaluations,
            "final_calibration": options.final,
            "seeds": options.seeds,
            "rows": sorted(records, key=lambda r: -r["share"]),
            "goal": {"share": GOAL_SHARE, "top1": GOAL},
        },
    )


if __name__ == "__main__":
    main()
