"""How well is the time of a cut network foreseen, and what is that worth to a search?

Networks of random widths are cut and timed in turns. A model is fitted to 64 of them, as
`evosearch launch` does where a latency is a goal, and a line over MACs to the same ones. Of the
others, which no fit has seen: mean relative error of both, of those with widths about a level and
of those with uneven ones; Kendall's tau with the measured order; and how long the one with about
half of the MACs takes, and the one with three quarters of all channels, in multiples of eight, and
with one channel less in each group.

With `--search IMAGES`, the published ResNet-20, or the network of a recipe, is searched by
distortion and latency, with so many images per pass, and by distortion and MACs. The fronts of a
seed are timed in turns, together with uniform ratios: hypervolume of distortion and measured time,
reference (1, 1).

    python benchmarks/latency.py [--networks resnet20:1 resnet20:64 ...] [--timed 40] [--round-to 8]
    python benchmarks/latency.py --networks --search 64 [--seeds 3] [--evaluations 120]
        [--recipe benchmarks/recipes/fidelity-small-mobilenet.toml --set network.weights=... ...]

By PyTorch's clock, or with `--measure onnxruntime` by another's.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from at_budget import RECONSTRUCTED, SURROGATE, mean_and_range, setting
from common import complete_search, parser, show, write
from scipy.stats import kendalltau

from evosearch.latency import fit_latency
from evosearch.materials import network_spec
from evosearch.measurement import Status
from evosearch.networks import NetworkSpec, load_network
from evosearch.pareto import hypervolume
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.recipe import LatencyRecipe, load_recipe
from evosearch.scoring.timing import draw_widths, even_and_odd, seconds_of

FITTED = 64
UNIFORM = 32
LIMITS = (0.9, 0.8, 0.7)
NETWORKS = (
    "resnet20:1",
    "resnet20:64",
    "resnet56:1",
    "vgg16:1",
    "torchvision:resnet18:1",
    "torchvision:mobilenet_v2:1",
)


def timed_by(images: int, options: Any) -> LatencyRecipe:
    return LatencyRecipe(images=images, measure=options.measure)


def compared(name: str, images: int, options: Any) -> dict[str, Any]:
    """One row."""
    network = load_network(NetworkSpec(name=name), (32, 32, 3) if ".py:" in name else None)
    plan = trace(network)
    table = plan.table
    fresh = draw_widths(table, 1 + options.timed, 1, options.round_to)[1:]
    drawn = draw_widths(table, FITTED, 0, options.round_to)
    keep = np.concatenate([drawn, fresh, even_and_odd(table)])
    start = time.perf_counter()
    seconds = seconds_of(network, plan, timed_by(images, options), keep)
    spent = time.perf_counter() - start
    quarters = seconds[-2:] / seconds[0]
    keep, seconds = keep[:-2], seconds[:-2]
    shares = table.shares(keep)["macs"]
    fitted, other = slice(FITTED), slice(FITTED, None)
    # As draw_widths divides them, less the dense one.
    uneven = np.arange(1, 1 + options.timed) >= (1 + options.timed) // 2
    kinds = {"level": ~uneven, "uneven": uneven}
    model = fit_latency(table.shapes(), table.channels.tolist(), keep[fitted], seconds[fitted])
    line = np.polyfit(shares[fitted], seconds[fitted], 1, w=1 / seconds[fitted])
    guesses = {
        "model": model.seconds(keep[other]),
        "line over MACs": np.polyval(line, shares[other]),
    }
    macs, found = shares[other], seconds[other]
    errors = {key: guess / found - 1 for key, guess in guesses.items()}
    half = int(np.abs(macs - 0.5).argmin())
    return {
        "network": name,
        "images": images,
        "dense_ms": 1e3 * float(seconds[0]),
        "timing_seconds": spent,
        "out_of_fold": model.error,
        "mean_error": {
            key: {kind: float(np.abs(error[rows]).mean()) for kind, rows in kinds.items()}
            for key, error in errors.items()
        },
        "mean_excess": {
            key: {kind: float(error[rows].mean()) for kind, rows in kinds.items()}
            for key, error in errors.items()
        },
        "largest_error": {key: float(np.abs(error).max()) for key, error in errors.items()},
        "tau": {key: float(kendalltau(guess, found).statistic) for key, guess in guesses.items()},
        "three_quarters": {"in eights": float(quarters[0]), "one less": float(quarters[1])},
        "half": {"macs": float(macs[half]), "time": float(found[half] / seconds[0])},
        "others": [
            {"macs": float(m), "seconds": float(s), "foreseen": float(f), "uneven": bool(u)}
            for m, s, f, u in zip(macs, found, guesses["model"], uneven, strict=True)
        ],
    }


COSTS = ("macs", "latency")


@contextmanager
def place(options: Any) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """A recipe, a folder for its runs, and changes to it."""
    if options.recipe is None:
        with setting(options.data, "resnet20", options.workers) as where:
            yield where.recipe, where.recipe.parent, dict(where.common)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield options.recipe, Path(folder), {"run.workers": options.workers}


def searched(
    file: Path, folder: Path, common: dict[str, Any], seed: int, options: Any
) -> list[dict[str, Any]]:
    """Fronts of all searches of a seed, timed in the same turns."""
    fronts: dict[str, dict[Policy, float]] = {}
    for cost in COSTS:
        recipe = load_recipe(
            str(file),
            options.set,
            {
                **common,
                **RECONSTRUCTED,
                **SURROGATE,
                "search.objectives": ["distortion", cost],
                "space.round_to": options.round_to,
                "latency.images": options.search,
                "latency.measure": options.measure,
                "search.seed": seed,
                "search.evaluations": options.evaluations,
                "search.baseline": UNIFORM,
            },
        )
        results = complete_search(recipe, folder / f"{seed}-{len(fronts)}")
        print(f"seed {seed}, distortion and {cost}: searched", flush=True)
        fronts[f"distortion and {cost}"] = {
            row.policy: row.values["distortion"] for row in results.front
        }
        ladder = (row for row in results.baseline if row.status is Status.OK)
        fronts.setdefault(
            "uniform ratios", {row.policy: row.values["distortion"] for row in ladder}
        )
    network = load_network(network_spec(recipe.network))
    plan = trace(network)
    found = [policy for front in fronts.values() for policy in front]
    policies = list(dict.fromkeys([plan.table.dense, *found]))
    keep = np.array([policy.keep for policy in policies])
    seconds = seconds_of(network, plan, timed_by(options.search, options), keep)
    shares = dict(zip(policies, seconds / seconds[0], strict=True))
    return [
        {
            "seed": seed,
            "search": name,
            "hypervolume": hypervolume(
                np.array([(distortion, shares[policy]) for policy, distortion in front.items()]),
                np.ones(2),
            ),
            "front": sorted((float(shares[policy]), value) for policy, value in front.items()),
        }
        for name, front in fronts.items()
    ]


def name_of(options: Any) -> str:
    return options.recipe.stem if options.recipe else "ResNet-20"


def search(options: Any) -> list[dict[str, Any]]:
    """Searches, and shows what they found."""
    rows: list[dict[str, Any]] = []
    with place(options) as where:
        for seed in range(options.seeds):
            rows += searched(*where, seed, options)
    table = []
    for name in dict.fromkeys(row["search"] for row in rows):
        mine = [row for row in rows if row["search"] == name]
        best = [
            mean_and_range(
                [min(d for share, d in row["front"] if share <= limit) for row in mine], 3
            )
            for limit in LIMITS
        ]
        table.append([name, mean_and_range([row["hypervolume"] for row in mine], 4), *best])
    show(
        f"{name_of(options)}, {options.search} images per pass by {options.measure}, "
        f"{options.evaluations} policies, {options.seeds} seeds: distortion beside measured time",
        ["searched by", "hypervolume", *(f"{limit:.0%} of the time" for limit in LIMITS)],
        table,
    )
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="*", default=NETWORKS, help="name:images at a time")
    made.add_argument(
        "--timed", type=int, default=40, help="networks that no fit has seen, 3 or more"
    )
    made.add_argument("--round-to", type=int, default=1, help="widths are multiples of this")
    made.add_argument("--search", type=int, default=0, help="images per pass; none if left out")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--evaluations", type=int, default=120)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--measure", default="pytorch", help="a stopwatch, as in latency.measure")
    made.add_argument("--recipe", type=Path, help="whose network is searched")
    made.add_argument("--set", action="append", default=[], help="KEY=VALUE, of that recipe")
    options = made.parse_args()
    torch.set_num_threads(1)
    rows = []
    for given in options.networks:
        name, _, images = given.rpartition(":")
        rows.append(compared(name, int(images), options))
        print(f"{given}: {rows[-1]['timing_seconds']:.0f} s", flush=True)
    if rows:
        report(rows, options.timed)
    searches = search(options) if options.search else []
    write(
        "latency",
        options.json,
        {
            "measure": options.measure,
            "recipe": options.recipe and options.recipe.name,
            "round_to": options.round_to,
            "rows": rows,
            "images_per_pass": options.search,
            "evaluations": options.evaluations,
            "searches": searches,
        },
    )


def report(rows: list[dict[str, Any]], timed: int) -> None:
    """A table of how well times are foreseen."""
    columns = ("network", "images", "dense ms", "level", "uneven", "MACs: level", "uneven")
    show(
        f"Errors on {timed} networks that were not fitted, one thread",
        (*columns, "tau", "tau of MACs", "half of the MACs", "3/4 in eights"),
        [
            [
                row["network"].removeprefix("torchvision:"),
                row["images"],
                row["dense_ms"],
                *(
                    f"{row['mean_error'][key][kind]:.1%}"
                    for key in row["tau"]
                    for kind in ("level", "uneven")
                ),
                *row["tau"].values(),
                f"{row['half']['macs']:.0%}: {row['half']['time']:.0%}",
                "{in eights:.0%}, {one less:.0%}".format(**row["three_quarters"]),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
