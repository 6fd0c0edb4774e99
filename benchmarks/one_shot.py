"""How accurate is a searched network before any training?

The published ResNet-56 at 70, 50 and 30% of its MACs: test top-1 of the searched policy beside
uniform ratios and random search with the same number of evaluations. Policies are chosen by error,
margin, divergence or distortion on validation images (of the last 5,000 training images; the
published network saw them in training, which flatters all methods alike); test images are opened
once, for the chosen ones. `quick` searches score with a fifth of the images and time, and get five
times the evaluations. The chosen policies of `reconstructed` rows are prepared once more with as
many calibration images as `--final` says; the others with the images of the search, and with as
many for recalibration.

    python benchmarks/one_shot.py [--data FOLDER] [--evaluations 72] [--seeds 3]
        [--shares 0.7 0.5 0.3] [--methods "searched, distortion" ...] [--chosen JSON]
"""

import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

Key = tuple[str, float, int]
"""Method, budget and seed."""
SHARES = (0.7, 0.5, 0.3)
GOAL_SHARE, GOAL = 0.5, 91.5

L1 = {"proxy.name": "recalibrated", "proxy.criterion": "l1"}
COMPENSATED = {"proxy.name": "compensated", "proxy.criterion": "residual-energy"}
RECONSTRUCTED = {"proxy.name": "reconstructed", "proxy.criterion": "residual-energy"}
QUICK = {
    **RECONSTRUCTED,
    "proxy.reconstruction_layers": "cut",
    "proxy.reconstruction_images": 64,
    "data.validation": 64,
}
RANDOM = {"search.algorithm": "random", "search.seed_share": 0.0}
SURROGATE = {"search.algorithm": "surrogate", "search.population": 8}
DISTORTION, ERROR, MARGIN = (
    {"search.objectives": [metric]} for metric in ("distortion", "error", "margin")
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a policy is found.

    Args:
        proxy: How policies are scored.
        search: Who asks; None for the one uniform policy.
        final: The proxy that prepares the chosen policy.
        longer: Times as many evaluations as the others get.
    """

    proxy: Mapping[str, Any]
    search: Mapping[str, Any] | None = None
    final: Mapping[str, Any]
    longer: int = 1


METHODS = {
    "uniform, L1, recalibrated": Method(proxy=L1, final=L1),
    "uniform, compensated": Method(proxy=COMPENSATED, final=COMPENSATED),
    "uniform, reconstructed": Method(proxy=RECONSTRUCTED, final=RECONSTRUCTED),
    "random best, L1, recalibrated": Method(proxy=L1, search=RANDOM, final=L1),
    "random best, reconstructed": Method(proxy=RECONSTRUCTED, search=RANDOM, final=RECONSTRUCTED),
    "searched, divergence": Method(proxy=RECONSTRUCTED, search=SURROGATE, final=RECONSTRUCTED),
    "searched, error": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **ERROR}, final=RECONSTRUCTED
    ),
    "searched, margin": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **MARGIN}, final=RECONSTRUCTED
    ),
    "searched, distortion": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **DISTORTION}, final=RECONSTRUCTED
    ),
    "searched, distortion, quick": Method(
        proxy=QUICK, search={**SURROGATE, **DISTORTION}, final=RECONSTRUCTED, longer=5
    ),
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
    """The feasible policy that is best by the search's objective, and its value."""
    changes = {
        **overrides,
        "space.project_onto": {"macs": share},
        "search.constraints": [f"macs <= {share}"],
    }
    loaded = load_recipe(str(recipe), (), changes)
    launch(loaded, folder, Silent())
    objective = loaded.search.objectives[0]
    with Ledger.open(folder) as ledger:
        rows = [row for row in read_results(ledger).rows if not row.violation and row.values]
    best = min(rows, key=lambda row: row.values[objective])
    return best.policy, best.values[objective]


def on_test(
    assembled: Assembled,
    policies: list[Policy],
    calibration: Images,
    test: Images,
    final: int,
    workers: int,
) -> dict[Policy, dict[str, float]]:
    """Metrics on test images of policies, prepared with more calibration images."""
    searched = assembled.workload
    settings = replace(searched.settings, reconstruction_images=final)
    workload = prepare_workload(searched.network(), searched.plan, settings, calibration, test)
    # The same channels go as in the search, as in `evosearch export --calibration`.
    pool = make_pool(replace(workload, places=searched.places), PoolSettings(workers=workers))
    landed: list[Measurement] = []
    pool.score(list(dict.fromkeys(policies)), landed.append, lambda: False)
    pool.close()
    failed = [f"{m.policy.digest}: {m.reason}" for m in landed if not m.ok]
    if failed:
        raise SystemExit("; ".join(failed))
    return {m.policy: dict(m.metrics) for m in landed}


def choose(
    common: Mapping[str, Any], recipe: Path, options: Any
) -> dict[Key, tuple[Policy, float | None]]:
    """The policy of each key, and the objective's value that it was chosen by."""
    chosen: dict[Key, tuple[Policy, float | None]] = {}
    for share, name, seed in itertools.product(
        options.shares, options.methods, range(options.seeds)
    ):
        key, method = (name, share, seed), METHODS[name]
        if method.search is None:
            if not seed:
                assembled = assemble(load_recipe(str(recipe), (), {**common, **method.proxy}))
                chosen[key] = uniform(assembled, share), None
            continue
        start = time.perf_counter()
        run = recipe.parent / f"run-{len(chosen)}"
        changes = {
            **{**common, **method.proxy, **method.search},
            "search.seed": seed,
            "search.evaluations": method.longer * options.evaluations,
        }
        chosen[key] = searched(changes, recipe, run, share)
        seconds = time.perf_counter() - start
        print(
            f"{share:.0%} {name}, seed {seed}: {chosen[key][1]:.4f} in {seconds:.0f} s", flush=True
        )
    return chosen


def opened(
    assembled: Assembled,
    chosen: Mapping[Key, tuple[Policy, float | None]],
    train: Images,
    test: Images,
    options: Any,
) -> list[dict[str, Any]]:
    """Records of chosen policies, prepared for the last time and measured on test images."""
    more = train.take(np.arange(options.final))
    calibration = as_trained(more, assembled.workload.network(), 0)
    policies = [policy for policy, _ in chosen.values()]
    metrics = on_test(assembled, policies, calibration, test, options.final, options.workers)
    table = assembled.workload.plan.table
    return [
        {
            "share": share,
            "method": method,
            "seed": seed,
            "macs": int(table.costs_of([policy])[0][0]) / table.dense_costs[0],
            "evaluations": METHODS[method].longer * options.evaluations
            if METHODS[method].search
            else 0,
            "test_top1": 100 * (1 - metrics[policy]["error"]),
            "test_divergence": metrics[policy]["divergence"],
            "chosen_by": seen,
            "policy": list(policy.keep),
        }
        for (method, share, seed), (policy, seen) in chosen.items()
    ]


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Of some seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--evaluations", type=int, default=72)
    made.add_argument("--final", type=int, default=1024, help="calibration images in the end")
    made.add_argument("--shares", type=float, nargs="*", default=SHARES)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--chosen", type=Path, help="JSON of before: measure its policies again")
    made.add_argument("--seeds", type=int, default=3)
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
            "run.workers": options.workers,
        }
        chosen = choose(common, recipe, options)
        for row in json.loads(options.chosen.read_text())["rows"] if options.chosen else ():
            key = row["method"], row["share"], row["seed"]
            chosen.setdefault(key, (Policy(tuple(row["policy"])), row["chosen_by"]))
        for proxy in (L1, COMPENSATED, RECONSTRUCTED):
            mine = {key: value for key, value in chosen.items() if METHODS[key[0]].final is proxy}
            if mine:
                assembled = assemble(load_recipe(str(recipe), (), {**common, **proxy}))
                records += opened(assembled, mine, train, test, options)
    rows: list[list[Any]] = []
    shares = sorted({r["share"] for r in records}, reverse=True)
    for share, method in itertools.product(shares, METHODS):
        same = [r for r in records if (r["share"], r["method"]) == (share, method)]
        if not same:
            continue
        top1 = [r["test_top1"] for r in same]
        cells = [mean_and_range(top1, 2), mean_and_range([r["test_divergence"] for r in same], 3)]
        rows.append([f"{share:.0%}", method, same[0]["macs"], same[0]["evaluations"], *cells])
    show(
        f"ResNet-56 without training, {options.seeds} seeds: mean (range)",
        ["budget", "method", "MACs", "evaluations", "test top-1", "KL on test"],
        rows,
    )
    print(f"goal at {GOAL_SHARE:.0%}, by distortion: {GOAL}; dense 93.39")
    write(
        "one_shot",
        options.json,
        {
            "evaluations": options.evaluations,
            "final_calibration": options.final,
            "seeds": options.seeds,
            "rows": sorted(records, key=lambda r: -r["share"]),
            "goal": {"share": GOAL_SHARE, "top1": GOAL},
        },
    )


if __name__ == "__main__":
    main()
