"""Does dropping dominated candidates early save time, and does it drop the right ones?

Every search is run twice over the same network, images and seed: all validation images for
everyone, and races with a stated error rate. Then every candidate that was dropped is measured on
all images after all. Reported are the scoring seconds of both, their hypervolumes, how many
candidates were dropped and after how many images, and how many of those were not dominated on all
images by the policy that had beaten them: an error, which may happen to a share of candidates no
larger than the error rate.

The network ships with the package; validation images are among those it was not trained on, from
the whole of CIFAR-10 if --data has it.

    python benchmarks/racing.py [--data FOLDER] [--objectives error divergence] [--seeds 3]
    python benchmarks/racing.py --quick
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import complete_search, images, parser, show, write

from evosearch.assembly import assemble
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement, Status, Terms
from evosearch.recipe import Recipe, load_recipe
from evosearch.results.front import Results, read_results
from evosearch.scoring.scorer import Scorer


def run(recipe: Recipe, folder: Path) -> tuple[Results, list[Measurement]]:
    """Searches, and returns what was found and all measurements in the order of asking."""
    complete_search(recipe, folder)
    with Ledger.open(folder) as ledger:
        entries = ledger.entries(
            "search", terms=Terms.RACED if recipe.search.racing else Terms.FULL
        )
        return read_results(ledger), [e.measurement for e in entries if e.measurement]


def errors(scorer: Scorer, landed: list[Measurement], objective: str) -> tuple[int, list[float]]:
    """How many were dropped wrongly, and by how much estimates were off, relatively."""
    full = {m.policy.digest: m.metrics[objective] for m in landed if m.ok}
    wrong, off = 0, []
    for measurement in landed:
        if measurement.status is not Status.DROPPED:
            continue
        assert measurement.reason is not None  # noqa: S101  says who dominates it
        rival = measurement.reason.split()[2]
        truth = scorer.score(measurement.policy).metrics[objective]
        wrong += truth <= full[rival]
        off.append(measurement.metrics[objective] / truth - 1)
    return wrong, off


def compare(recipe: Recipe, objective: str, seed: int, rate: float) -> dict[str, Any]:
    """One search with and one without races."""
    search = recipe.search.model_copy(update={"seed": seed, "objectives": [objective, "macs"]})
    plain = recipe.model_copy(update={"search": search})
    raced = recipe.model_copy(update={"search": search.model_copy(update={"racing": rate})})
    with tempfile.TemporaryDirectory() as folder:
        whole, everything = run(plain, Path(folder) / "plain")
        early, landed = run(raced, Path(folder) / "raced")
    scorer = Scorer(assemble(plain).workload)
    wrong, off = errors(scorer, landed, objective)
    dropped = [m for m in landed if m.status is Status.DROPPED]
    seconds = sum(m.seconds for m in everything), sum(m.seconds for m in landed)
    found = {
        "objective": objective,
        "algorithm": recipe.search.algorithm,
        "proxy": recipe.proxy.name,
        "seed": seed,
        "evaluations": len(landed),
        "dropped": len(dropped),
        "wrongly": wrong,
        "images_of_dropped": float(np.mean([m.images for m in dropped])) if dropped else None,
        "estimate_off": float(np.median(np.abs(off))) if off else None,
        "seconds": seconds,
        "ratio": seconds[0] / seconds[1],
        "hypervolume": (whole.hypervolume(), early.hypervolume()),
    }
    print(found, flush=True)
    return found


def rows_of(found: list[dict[str, Any]]) -> list[list[Any]]:
    """One row per objective and proxy: medians over seeds, sums of counts."""
    rows = []
    for key in dict.fromkeys((f["objective"], f["algorithm"], f["proxy"]) for f in found):
        mine = [f for f in found if (f["objective"], f["algorithm"], f["proxy"]) == key]
        total = sum(f["evaluations"] for f in mine)
        dropped, wrong = (sum(f[name] for f in mine) for name in ("dropped", "wrongly"))
        ratios = sorted(f["ratio"] for f in mine)
        seen = [f["images_of_dropped"] for f in mine if f["images_of_dropped"]]
        volumes = np.array([f["hypervolume"] for f in mine])
        rows.append(
            [
                ", ".join(key),
                f"{dropped} of {total}",
                f"{np.mean(seen):.0f}" if seen else "-",
                f"{wrong} ({wrong / total:.1%})",
                f"{np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                " / ".join(f"{v:.4f}" for v in np.median(volumes, axis=0)),
            ]
        )
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--objectives", nargs="+", default=["error", "divergence"])
    made.add_argument("--algorithms", nargs="+", default=["surrogate", "nsga2"])
    made.add_argument("--proxies", nargs="+", default=["reconstructed", "compensated"])
    made.add_argument("--evaluations", type=int, default=240)
    made.add_argument("--validation", type=int, default=2000)
    made.add_argument("--rate", type=float, default=0.05, help="error rate of races")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="a smoke test on the sample")
    options = made.parse_args()
    torch.set_num_threads(1)
    changes: dict[str, Any] = {
        "run.workers": options.workers,
        "search.baseline": 0,
        "search.evaluations": options.evaluations,
        "data.validation": options.validation,
        "proxy.recalibrate": False,
    }
    if options.quick:
        options.objectives, options.seeds = ["error"], 1
        options.algorithms, options.proxies = ["nsga2"], ["compensated"]
        changes |= {"search.evaluations": 48, "data.validation": 1000}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:
            whole = images(options.data, "cifar10_train")
            path = Path(folder) / "cifar10_train.npz"
            np.savez(path, images=whole.pixels, labels=whole.labels)
            # The shipped network has not seen the last 5,000.
            changes |= {"data.name": str(path), "data.official_order": True}
            changes |= {"data.held_out": 5000}
        for algorithm in options.algorithms:
            for proxy in options.proxies:
                for objective in options.objectives:
                    recipe = load_recipe(
                        "quickstart",
                        (),
                        {**changes, "search.algorithm": algorithm, "proxy.name": proxy},
                    )
                    found += [
                        compare(recipe, objective, seed, options.rate)
                        for seed in range(options.seeds)
                    ]
    show(
        f"ResNet-20, error rate {options.rate}: all images for everyone / races",
        ["search", "dropped", "images seen", "wrongly", "times as fast", "hypervolume"],
        rows_of(found),
    )
    write("racing", options.json, {"rate": options.rate, "quick": options.quick, "rows": found})


if __name__ == "__main__":
    main()
