"""How accurate is a searched network before any training?

The published ResNet-56 at 70, 50 and 30% of its MACs: test top-1 of the searched policy beside
uniform ratios and random search with the same number of evaluations. Policies are chosen by
divergence on validation images (the last 5,000 training images; the published network saw them in
training, which flatters all methods alike); test images are opened once, for the chosen ones. The
chosen policies of `reconstructed` rows are prepared once more with as many calibration images as
`--final` says; the others with the images of the search, and with as many for recalibration.

    python benchmarks/one_shot.py [--data FOLDER] [--evaluations 72]
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import images, parser, show, write

from evosearch.assembly import Assembled, as_trained, assemble
from evosearch.data import Images
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.recipe import load_recipe
from evosearch.results.front import read_results
from evosearch.run import launch
from evosearch.scoring.pool import PoolSettings, make_pool
from evosearch.scoring.workload import prepare_workload

Key = tuple[str, float]
SHARES = (0.7, 0.5, 0.3)
GOAL_SHARE, GOAL = 0.5, 91.5

L1 = {"proxy.name": "recalibrated", "proxy.criterion": "l1"}
COMPENSATED = {"proxy.name": "compensated", "proxy.criterion": "residual-energy"}
RECONSTRUCTED = {"proxy.name": "reconstructed", "proxy.criterion": "residual-energy"}
RANDOM = {"search.algorithm": "random", "search.seed_share": 0.0}
# How policies are scored and found; `uniform` is one policy, the others cost evaluations.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "uniform, L1, recalibrated": (L1, None),
    "uniform, compensated": (COMPENSATED, None),
    "uniform, reconstructed": (RECONSTRUCTED, None),
    "random best, L1, recalibrated": (L1, RANDOM),
    "random best, reconstructed": (RECONSTRUCTED, RANDOM),
    "searched, reconstructed": (RECONSTRUCTED, {"search.algorithm": "surrogate"}),
}
RECIPE = """
[network]
name = "resnet56"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
[data]
official_order = true
held_out = 5000
calibration = 500
validation = 512
[space]
name = "layer-sparsity"
[search]
objectives = ["divergence"]
population = 24
baseline = 0
"""


class Silent:
    """Watches and says nothing."""

    def phase(self, text: str) -> None:
        """A new phase has begun."""

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        """A measurement landed."""


def uniform(assembled: Assembled, share: float) -> Policy:
    """The ladder's policy with the most MACs within a budget."""
    space, table = assembled.space, assembled.workload.plan.table
    policies = space.decode(space.ladder(10**6))
    macs, _ = table.costs_of(policies)
    fits = np.flatnonzero(macs <= share * table.dense_costs[0])
    return policies[int(fits[np.argmax(macs[fits])])]


def searched(
    overrides: Mapping[str, Any], recipe: Path, folder: Path, share: float
) -> tuple[Policy, float]:
    """The feasible policy of least divergence, and that divergence."""
    changes = {
        **overrides,
        "space.project_onto": {"macs": share},
        "search.constraints": [f"macs <= {share}"],
    }
    launch(load_recipe(str(recipe), (), changes), folder, Silent())
    with Ledger.open(folder) as ledger:
        rows = [row for row in read_results(ledger).rows if not row.violation and row.values]
    best = min(rows, key=lambda row: row.values["divergence"])
    return best.policy, best.values["divergence"]


def on_test(
    assembled: Assembled,
    policies: list[Policy],
    calibration: Images,
    test: Images,
    final: int,
    workers: int,
) -> dict[Policy, dict[str, float]]:
    """Metrics on test images of policies, prepared with more calibration images."""
    workload = assembled.workload
    settings = replace(workload.settings, reconstruction_images=final)
    pool = make_pool(
        prepare_workload(workload.network(), workload.plan, settings, calibration, test),
        PoolSettings(workers=workers),
    )
    landed: list[Measurement] = []
    pool.score(list(dict.fromkeys(policies)), landed.append, lambda: False)
    pool.close()
    failed = [f"{m.policy.digest}: {m.reason}" for m in landed if not m.ok]
    if failed:
        raise SystemExit("; ".join(failed))
    return {m.policy: dict(m.metrics) for m in landed}


def choose(
    common: Mapping[str, Any], recipe: Path, shares: Sequence[float]
) -> dict[Key, tuple[Policy, float | None]]:
    """Per method and budget its policy, and the divergence it was chosen by."""
    chosen: dict[Key, tuple[Policy, float | None]] = {}
    for share in shares:
        for index, (method, (proxy, search)) in enumerate(METHODS.items()):
            if search is None:
                assembled = assemble(load_recipe(str(recipe), (), {**common, **proxy}))
                chosen[method, share] = uniform(assembled, share), None
            else:
                run = recipe.parent / f"run-{share}-{index}"
                chosen[method, share] = searched({**common, **proxy, **search}, recipe, run, share)
                print(f"{share:.0%} {method}: {chosen[method, share][1]:.4f}", flush=True)
    return chosen


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--evaluations", type=int, default=72)
    made.add_argument("--final", type=int, default=1024, help="calibration images in the end")
    made.add_argument("--shares", type=float, nargs="*", default=SHARES)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=2)
    options = made.parse_args()
    torch.set_num_threads(1)
    train, test = (images(options.data, f"cifar10_{part}") for part in ("train", "test"))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "train.npz", images=train.pixels, labels=train.labels)
        recipe = Path(name) / "one_shot.toml"
        recipe.write_text(RECIPE)
        common = {
            "network.weights": str(options.data / "weights" / "resnet56_cifar10.pt"),
            "data.name": str(Path(name) / "train.npz"),
            "search.evaluations": options.evaluations,
            "search.seed": options.seed,
            "run.workers": options.workers,
        }
        chosen = choose(common, recipe, options.shares)
        for proxy in (L1, COMPENSATED, RECONSTRUCTED):
            assembled = assemble(load_recipe(str(recipe), (), {**common, **proxy}))
            more = train.take(np.arange(options.final))
            calibration = as_trained(more, assembled.workload.network(), 0)
            mine = {key: value for key, value in chosen.items() if METHODS[key[0]][0] is proxy}
            policies = [policy for policy, _ in mine.values()]
            metrics = on_test(
                assembled, policies, calibration, test, options.final, options.workers
            )
            table = assembled.workload.plan.table
            records += [
                {
                    "share": share,
                    "method": method,
                    "macs": int(table.costs_of([policy])[0][0]) / table.dense_costs[0],
                    "evaluations": 0 if METHODS[method][1] is None else options.evaluations,
                    "test_top1": 100 * (1 - metrics[policy]["error"]),
                    "test_divergence": metrics[policy]["divergence"],
                    "validation_divergence": seen,
                    "policy": list(policy.keep),
                }
                for (method, share), (policy, seen) in mine.items()
            ]
    records.sort(key=lambda record: -record["share"])
    columns = ("method", "macs", "evaluations", "test_top1", "test_divergence")
    show(
        "ResNet-56 without training",
        ["budget", "method", "MACs", "evaluations", "test top-1", "KL on test"],
        [[f"{r['share']:.0%}", *(r[column] for column in columns)] for r in records],
    )
    at_goal = [r["test_top1"] for r in records if r["share"] == GOAL_SHARE]
    if at_goal:
        print(f"goal at {GOAL_SHARE:.0%}: {GOAL}; best {max(at_goal):.2f}; dense 93.39")
    write(
        "one_shot",
        options.json,
        {
            "evaluations": options.evaluations,
            "final_calibration": options.final,
            "seed": options.seed,
            "rows": records,
            "goal": {"share": GOAL_SHARE, "top1": GOAL},
        },
    )


if __name__ == "__main__":
    main()
