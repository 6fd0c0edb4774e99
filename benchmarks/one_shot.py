"""How accurate is a searched network before any training?

The published ResNet-56 at 70, 50 and 30% of its MACs: test top-1 of the searched policy beside
uniform ratios and random search with the same number of evaluations. Policies are chosen by
divergence on validation images (the last 5,000 training images; the published network saw them in
training, which flatters all methods alike); test images are opened once, for the chosen ones. The
chosen policies of `reconstructed` rows are prepared once more with as many calibration images as
`--final` says; the others with the images of the search, and with as many for recalibration.

    python benchmarks/one_shot.py [--data FOLDER] [--evaluations 120]
"""

import tempfile
from collections.abc import Mapping
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
    assembled: Assembled, policy: Policy, calibration: Images, test: Images, final: int
) -> dict[str, float]:
    """Metrics on test images of a policy, prepared with more calibration images."""
    workload = assembled.workload
    settings = replace(workload.settings, reconstruction_images=final)
    pool = make_pool(
        prepare_workload(workload.network(), workload.plan, settings, calibration, test),
        PoolSettings(workers=0),
    )
    landed: list[Measurement] = []
    pool.score([policy], landed.append, lambda: False)
    if not landed[0].ok:
        raise SystemExit(f"{policy.digest}: {landed[0].reason}")
    return dict(landed[0].metrics)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--evaluations", type=int, default=120)
    made.add_argument("--final", type=int, default=2048, help="calibration images in the end")
    made.add_argument("--shares", type=float, nargs="*", default=SHARES)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=2)
    options = made.parse_args()
    torch.set_num_threads(1)
    train, test = (images(options.data, f"cifar10_{part}") for part in ("train", "test"))
    rows, records = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "train.npz", images=train.pixels, labels=train.labels)
        recipe = folder / "one_shot.toml"
        recipe.write_text(RECIPE)
        common = {
            "network.weights": str(options.data / "weights" / "resnet56_cifar10.pt"),
            "data.name": str(folder / "train.npz"),
            "search.evaluations": options.evaluations,
            "search.seed": options.seed,
            "run.workers": options.workers,
        }
        for share in options.shares:
            for index, (method, (proxy, search)) in enumerate(METHODS.items()):
                assembled = assemble(load_recipe(str(recipe), (), {**common, **proxy}))
                chosen = train.take(np.arange(options.final))
                calibration = as_trained(chosen, assembled.workload.network(), 0)
                if search is None:
                    policy, seen = uniform(assembled, share), None
                else:
                    run = folder / f"run-{share}-{index}"
                    policy, seen = searched({**common, **proxy, **search}, recipe, run, share)
                found = on_test(assembled, policy, calibration, test, options.final)
                table = assembled.workload.plan.table
                macs = int(table.costs_of([policy])[0][0]) / table.dense_costs[0]
                top1 = 100 * (1 - found["error"])
                print(f"{share:.0%} {method}: {top1:.2f} at {macs:.3f} of MACs", flush=True)
                rows.append(
                    [
                        f"{share:.0%}",
                        method,
                        f"{macs:.3f}",
                        0 if search is None else options.evaluations,
                        f"{top1:.2f}",
                        f"{found['divergence']:.3f}",
                        "" if seen is None else f"{seen:.3f}",
                    ]
                )
                records.append(
                    {
                        "share": share,
                        "method": method,
                        "macs": macs,
                        "test_top1": top1,
                        "test_divergence": found["divergence"],
                        "validation_divergence": seen,
                        "policy": list(policy.keep),
                    }
                )
    show(
        "ResNet-56 without training",
        ["budget", "method", "MACs", "evaluations", "test top-1", "KL test", "KL validation"],
        rows,
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
