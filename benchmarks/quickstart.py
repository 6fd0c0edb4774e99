"""What does the quickstart find, beside baselines of the same budget, and does it hold on test?

The quickstart's recipe with three seeds and several algorithms, each with the same number of
evaluations: the shipped one, NSGA-II and GDE3, with what rankings give as half of their first
population, random search without, one threshold on scores of all channels (`ranking`), and the
ladder of uniform ratios. All minimise distortion, as the recipe does; `error` minimises that in its
place, on the same images; `quick` measures 64 images, at about an eighth of the time each, and gets
four times the evaluations. Whatever was minimised, fronts are compared by top-1: hypervolume of
error and MACs on the validation images that the search saw, and on the 2,000 test images of the
sample, which nothing but this report opens: there, every policy of a front is measured again, for
all methods in the recipe's way. Mean and range over seeds.

With `--runs FOLDER` searches and what test images say are kept there, and the same command goes on
after the last of them; seconds of a search that was stopped are of its last part.

    python benchmarks/quickstart.py [--evaluations 120] [--seeds 3] [--methods ...] [--runs FOLDER]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import complete_search, parser, show, write
from numpy.typing import NDArray

from evosearch.assembly import assemble
from evosearch.data import open_source
from evosearch.measurement import Measurement
from evosearch.pareto import hypervolume
from evosearch.recipe import Recipe, RunRecipe, load_recipe
from evosearch.results.front import Results
from evosearch.scoring.objectives import reference_point
from evosearch.scoring.pool import make_pool
from evosearch.scoring.workload import prepare_workload

CLASSES = 10
QUICK, LONGER = "surrogate, quick", 4
ERROR = {"search.objectives": ["error", "macs"]}
METHODS: dict[str, dict[str, Any]] = {
    "surrogate": {"search.algorithm": "surrogate"},
    "surrogate, error": {"search.algorithm": "surrogate", **ERROR},
    "surrogate, by 24": {"search.algorithm": "surrogate", "search.population": 24},
    QUICK: {
        "search.algorithm": "surrogate",
        "proxy.reconstruction_layers": "cut",
        "proxy.reconstruction_images": 64,
        "data.validation": 64,
    },
    "nsga2": {"search.algorithm": "nsga2"},
    "nsga2, error": {"search.algorithm": "nsga2", **ERROR},
    "gde3": {"search.algorithm": "gde3"},
    "random, unseeded": {"search.algorithm": "random", "search.seed_share": 0.0},
    "ranking": {"search.algorithm": "ranking"},
    "uniform": {"search.algorithm": "uniform"},
}


def on_test(recipe: Recipe, results: list[Results], folder: Path, workers: int) -> dict[str, float]:
    """Error on the test images of every policy on any front, by its digest; kept in the folder."""
    file = folder / "test.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    errors: dict[str, float] = {k: v for line in lines for k, v in json.loads(line).items()}
    assembled = assemble(recipe)
    network = assembled.workload.network()
    workload = prepare_workload(
        network,
        assembled.workload.plan,
        assembled.workload.settings,
        assembled.workload.calibration,
        open_source("cifar10-sample").test().take(np.arange(2000)),
    )
    fronts = {row.policy.digest: row.policy for r in results for row in r.front}
    unknown = [fronts[digest] for digest in sorted(fronts) if digest not in errors]

    def record(measurement: Measurement) -> None:
        found = {measurement.policy.digest: measurement.metrics["error"]}
        errors.update(found)
        with file.open("a") as stream:
            stream.write(json.dumps(found) + "\n")

    pool = make_pool(workload, RunRecipe(workers=workers))
    pool.score(unknown, record, lambda: False)
    pool.close()
    return errors


def searches(options: argparse.Namespace, folder: Path) -> dict[str, list[tuple[Results, float]]]:
    """What each method found with each seed, and in how many seconds."""
    found: dict[str, list[tuple[Results, float]]] = {}
    for seed in range(options.seeds):
        for name in options.methods:
            if name in ("ranking", "uniform") and seed:
                continue  # it has no seed
            overrides: dict[str, Any] = {
                **METHODS[name],
                "search.seed": seed,
                "search.evaluations": options.evaluations * (LONGER if name == QUICK else 1),
                "search.baseline": 0,
                "data.check": 0,
                "run.workers": options.workers,
            }
            run = folder / f"{name}-{seed}"
            took = run / "seconds.json"
            start = time.perf_counter()
            results = complete_search(load_recipe("quickstart", (), overrides), run)
            if not took.is_file():
                took.write_text(json.dumps(time.perf_counter() - start))
            seconds = json.loads(took.read_text())
            found.setdefault(name, []).append((results, seconds))
            print(f"{name}, seed {seed}: {len(results.front)} on the front, {seconds:.0f} s")
    return found


def by_top1(results: Results, errors: Mapping[str, float], reference: NDArray[np.float64]) -> float:
    """Hypervolume of error and MACs of what a search calls its front."""
    points = [(errors[row.policy.digest], row.values["macs"]) for row in results.front]
    return hypervolume(np.array(points), reference)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--evaluations", type=int, default=120)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--runs", type=Path, help="keep all that is measured here, and go on with it")
    options = made.parse_args()
    recipe = load_recipe("quickstart", (), {"data.check": 0})
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        found = searches(options, folder)
        fronts = [results for runs in found.values() for results, _ in runs]
        errors = on_test(recipe, fronts, folder, options.workers)
    rows, records = [], []
    reference = reference_point(("error", "macs"), {"error": 1 - 1 / CLASSES})
    for name, runs in found.items():
        seen = [
            by_top1(r, {row.policy.digest: row.values["error"] for row in r.rows}, reference)
            for r, _ in runs
        ]
        test = [by_top1(r, errors, reference) for r, _ in runs]
        evaluations = [len(r.rows) for r, _ in runs]
        walls = [s for _, s in runs]
        cells = [
            f"{np.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" if len(v) > 1 else f"{v[0]:.4f}"
            for v in (seen, test)
        ]
        if name == QUICK:
            cells[0] = "-"  # other images
        rows.append([name, max(evaluations), *cells, f"{np.mean(walls):.0f}"])
        records.append(
            {
                "method": name,
                "evaluations": evaluations,
                "validation_hypervolume": None if name == QUICK else seen,
                "test_hypervolume": test,
                "seconds": walls,
            }
        )
    show(
        f"Quickstart, {options.evaluations} evaluations, {options.seeds} seeds: mean (range)",
        ["method", "policies", "hypervolume, validation", "hypervolume, test", "seconds"],
        rows,
    )
    write("quickstart", options.json, {"seeds": options.seeds, "rows": records})


if __name__ == "__main__":
    main()
