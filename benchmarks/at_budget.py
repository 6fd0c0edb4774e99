"""Ways to find a policy that spends a share of a published ResNet's MACs or time.

And how it is prepared.

A policy is chosen by error, margin, divergence or distortion on validation images, of the last
5,000 training images; the published networks saw them in training, which flatters all methods
alike. `quick` searches score with a fifth of the images and time, and get five times the
evaluations.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fastnas
import global_pruning
import numpy as np
from common import complete_search, images
from rivals import Rival

from evosearch.assembly import Assembled, assemble
from evosearch.data import Images
from evosearch.errors import BudgetUnreachable
from evosearch.ledger import Ledger
from evosearch.materials import as_trained
from evosearch.measurement import Status
from evosearch.policy import Policy
from evosearch.recipe import load_recipe
from evosearch.results.front import read_results
from evosearch.scoring.workload import Workload, prepare_workload

Key = tuple[str, float, int]
"""Method, budget and seed."""

L1 = {"proxy.name": "recalibrated", "proxy.criterion": "l1"}
COMPENSATED = {"proxy.name": "compensated", "proxy.criterion": "residual-energy"}
VARIANCE = {"proxy.name": "recalibrated", "proxy.criterion": "output-variance"}
RECONSTRUCTED = {"proxy.name": "reconstructed", "proxy.criterion": "residual-energy"}
RECONSTRUCTED_L1 = {"proxy.name": "reconstructed", "proxy.criterion": "l1"}
QUICK = {
    **RECONSTRUCTED,
    "proxy.reconstruction_layers": "cut",
    "proxy.reconstruction_images": 64,
    "data.validation": 64,
}
FINALS = (
    *(L1, COMPENSATED, RECONSTRUCTED, RECONSTRUCTED_L1, VARIANCE),
    *(fastnas.PROXY, global_pruning.PROXY),
)
DISTORTION, ERROR, MARGIN = (
    {"search.objectives": [metric]} for metric in ("distortion", "error", "margin")
)
RANDOM = {"search.algorithm": "random", "search.seed_share": 0.0}
SURROGATE = {"search.algorithm": "surrogate", "search.population": 8}
FRONT = {**SURROGATE, "search.objectives": ["distortion", "macs"]}
RANKED = {
    "search.algorithm": "ranking",
    "search.rankings": [{"criterion": "bn-taylor", "scale": "none", "power": 1.0}],
}
SWEEP = {**FRONT, "search.algorithm": "sensitivity", "search.options": {"values": 1}}
BLOCKS = {"space.blocks": True}


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a policy is found, and its network prepared.

    Args:
        proxy: How policies are scored.
        search: Who asks, or another tool; None for the one uniform policy. A search for one
            objective is made for the budget, one for a front serves all budgets.
        final: The proxy that prepares the chosen policy.
        longer: Times as many evaluations as the others get.
    """

    proxy: Mapping[str, Any]
    search: Mapping[str, Any] | Rival | None = None
    final: Mapping[str, Any]
    longer: int = 1

    @property
    def seeded(self) -> bool:
        """Whether another seed finds another policy."""
        return isinstance(self.search, Mapping) and self.search.get("search.algorithm") != "ranking"

    @property
    def serves_all(self) -> bool:
        """Whether a search is made once for all budgets."""
        return (
            isinstance(self.search, Mapping) and len(self.search.get("search.objectives", ())) > 1
        )


METHODS = {
    "uniform, L1, recalibrated": Method(proxy=L1, final=L1),
    "uniform, compensated": Method(proxy=COMPENSATED, final=COMPENSATED),
    "uniform, reconstructed": Method(proxy=RECONSTRUCTED, final=RECONSTRUCTED),
    "uniform, L1, reconstructed": Method(proxy=RECONSTRUCTED_L1, final=RECONSTRUCTED_L1),
    "random best, L1, recalibrated": Method(proxy=L1, search=RANDOM, final=L1),
    "random best, reconstructed": Method(proxy=RECONSTRUCTED, search=RANDOM, final=RECONSTRUCTED),
    "FastNAS": Method(proxy=fastnas.PROXY, search=fastnas.FastNAS(), final=fastnas.PROXY),
    "FastNAS, reconstructed": Method(
        proxy=fastnas.PROXY, search=fastnas.FastNAS(), final=RECONSTRUCTED
    ),
    "FastNAS, divergence": Method(
        proxy=fastnas.PROXY, search=fastnas.FastNAS(score="divergence"), final=fastnas.PROXY
    ),
    "FastNAS, divergence, reconstructed": Method(
        proxy=fastnas.PROXY, search=fastnas.FastNAS(score="divergence"), final=RECONSTRUCTED
    ),
    "Torch-Pruning, global": Method(
        proxy=global_pruning.PROXY,
        search=global_pruning.GlobalPruning(),
        final=global_pruning.PROXY,
    ),
    "Torch-Pruning, global, reconstructed": Method(
        proxy=global_pruning.PROXY,
        search=global_pruning.GlobalPruning(),
        final=RECONSTRUCTED,
    ),
    "Torch-Pruning, global Taylor, reconstructed": Method(
        proxy=global_pruning.PROXY,
        search=global_pruning.GlobalPruning(importance="taylor"),
        final=RECONSTRUCTED,
    ),
    "ranked, Taylor per MAC, reconstructed": Method(
        proxy=RECONSTRUCTED, search={**RANKED, **DISTORTION}, final=RECONSTRUCTED
    ),
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
    "searched, distortion, blocks": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **DISTORTION, **BLOCKS}, final=RECONSTRUCTED
    ),
    "searched, distortion, unranked": Method(
        proxy=RECONSTRUCTED,
        search={**SURROGATE, **DISTORTION, "search.rankings": []},
        final=RECONSTRUCTED,
    ),
    "sensitivity sweep": Method(proxy=RECONSTRUCTED, search=SWEEP, final=RECONSTRUCTED),
    "searched, front of distortion": Method(proxy=RECONSTRUCTED, search=FRONT, final=RECONSTRUCTED),
    "searched, distortion, then L1": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **DISTORTION}, final=L1
    ),
    "searched, distortion, then consumer L2": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **DISTORTION}, final=fastnas.PROXY
    ),
    "searched, distortion, then variance": Method(
        proxy=RECONSTRUCTED, search={**SURROGATE, **DISTORTION}, final=VARIANCE
    ),
    "searched through L1, distortion": Method(
        proxy=L1, search={**SURROGATE, **DISTORTION}, final=L1
    ),
    "searched, distortion, quick": Method(
        proxy=QUICK, search={**SURROGATE, **DISTORTION}, final=RECONSTRUCTED, longer=5
    ),
}
RECIPE = """
[network]
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


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A policy that a method found.

    Args:
        policy: It.
        value: The objective's value that it was chosen by; None for uniform ratios and FastNAS.
        evaluations: Policies that were scored to find it; FastNAS's serve all budgets.
        seconds: That it took.
    """

    policy: Policy
    value: float | None = None
    evaluations: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """What a JSON says of it."""
        return {
            "evaluations": self.evaluations,
            "search_seconds": self.seconds,
            "chosen_by": self.value,
            "policy": list(self.policy.keep),
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A published network, its images, and a recipe that names both.

    Args:
        recipe: The file, to be changed by a method.
        common: Changes that all methods share.
        train: All training images.
        test: All test images.
        cost: Of which a share is spent, `macs` or `latency`.
        seconds: That searches took, by run directory.
    """

    recipe: Path
    common: Mapping[str, Any]
    train: Images
    test: Images
    cost: str = "macs"
    seconds: dict[Path, float] = field(default_factory=dict)

    def budget(self, share: float) -> dict[str, Any]:
        """Changes that have every policy spend a share of the cost."""
        return {
            "space.project_onto": {self.cost: share},
            "search.constraints": [f"{self.cost} <= {share}"],
        }

    def assembled(self, changes: Mapping[str, Any]) -> Assembled:
        """The objects of the recipe with a method's changes."""
        return assemble(load_recipe(str(self.recipe), (), {**self.common, **changes}))


@contextmanager
def setting(
    data: Path, network: str, workers: int, cost: str = "macs", images_timed: int = 1
) -> Iterator[Setting]:
    """A setting in a folder that lasts as long as the context."""
    train, test = (images(data, f"cifar10_{part}") for part in ("train", "test"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, found in (("train", train), ("test", test)):
            np.savez(folder / f"{part}.npz", images=found.pixels, labels=found.labels)
        recipe = folder / "at_budget.toml"
        recipe.write_text(RECIPE)
        common = {
            "network.name": network,
            "network.weights": str(data / "weights" / f"{network}_cifar10.pt"),
            "data.name": str(folder / "train.npz"),
            "data.test": str(folder / "test.npz"),
            "run.workers": workers,
            "latency.images": images_timed,
        }
        yield Setting(recipe=recipe, common=common, train=train, test=test, cost=cost)


def uniform(where: Setting, proxy: Mapping[str, Any], share: float) -> Policy:
    """The uniform ratio that spends most within a budget."""
    if where.cost != "macs":  # that of the space that spends it
        space = where.assembled({**proxy, **where.budget(share)}).space
        return space.decode(space.ladder(1))[0]
    assembled = where.assembled(proxy)
    space, table = assembled.space, assembled.workload.plan.table
    policies = space.decode(space.ladder(10**6))
    macs, _ = table.costs_of(policies)
    fits = np.flatnonzero(macs <= share * table.dense_costs[0])
    return policies[int(fits[np.argmax(macs[fits])])]


def searched(where: Setting, changes: Mapping[str, Any], folder: Path, share: float) -> Chosen:
    """The policy within the budget that is best by the search's first objective."""
    loaded = load_recipe(str(where.recipe), (), changes)
    if folder not in where.seconds:
        start = time.perf_counter()
        complete_search(loaded, folder)
        where.seconds[folder] = time.perf_counter() - start
    objective = loaded.search.objectives[0]
    with Ledger.open(folder) as ledger:
        rows = read_results(ledger).rows
    best = min(
        (row for row in rows if row.status is Status.OK and row.values[where.cost] <= share),
        key=lambda row: row.values[objective],
    )
    return Chosen(
        policy=best.policy,
        value=best.values[objective],
        evaluations=len(rows),
        seconds=where.seconds[folder],
    )


def found(
    where: Setting, method: Method, share: float, seed: int, evaluations: int, folder: Path
) -> Chosen:
    """What a method finds; `folder` is where its search runs, or has run."""
    if method.search is None:
        return Chosen(policy=uniform(where, method.proxy, share))
    if not isinstance(method.search, Mapping):
        workload = where.assembled(method.proxy).workload
        pruned = method.search.search(workload, share, folder.parent, where.common["run.workers"])
        return Chosen(policy=pruned.policy, evaluations=pruned.evaluations, seconds=pruned.seconds)
    changes = {
        **where.common,
        **method.proxy,
        **method.search,
        "search.seed": seed,
        "search.evaluations": method.longer * evaluations,
    }
    if not method.serves_all:
        changes |= where.budget(share)
    return searched(where, changes, folder, share)


def choose(
    where: Setting,
    methods: Sequence[str],
    shares: Sequence[float],
    seeds: int,
    evaluations: int,
    known: Container[Key] = (),
) -> dict[Key, Chosen]:
    """The policy of each method, share and seed that is not known; some have one for all seeds."""
    if any(isinstance(METHODS[name].search, fastnas.FastNAS) for name in methods):
        fastnas.check_installed()
    chosen: dict[Key, Chosen] = {}
    runs: dict[object, Path] = {}
    for share, name, seed in itertools.product(shares, methods, range(seeds)):
        key, method = (name, share, seed), METHODS[name]
        if key in known or (seed and not method.seeded):
            continue
        # Methods that only prepare what they found in another way share a run.
        budget = None if method.serves_all else share
        searching = (str(method.proxy), str(method.search), method.longer, budget, seed)
        run = runs.setdefault(searching, where.recipe.parent / f"run-{len(runs)}")
        try:
            chosen[key] = found(where, method, share, seed, evaluations, run)
        except BudgetUnreachable as exc:
            print(f"{share:.0%} {name}: {exc}", flush=True)
            continue
        print(
            f"{share:.0%} {name}, seed {seed}: {chosen[key].value} after "
            f"{chosen[key].evaluations} in {chosen[key].seconds:.0f} s",
            flush=True,
        )
    return chosen


def chosen_before(file: Path) -> dict[Key, Chosen]:
    """The policies in a JSON that `one_shot.py` or `fine_tuned.py` wrote."""
    rows = json.loads(file.read_text())["rows"]
    return {
        (row["method"], row["share"], row["seed"]): Chosen(
            policy=Policy(tuple(row["policy"])),
            value=row["chosen_by"],
            evaluations=row.get("evaluations", 0),
            seconds=row.get("search_seconds", 0.0),
        )
        for row in rows
    }


def by_final(chosen: Mapping[Key, Chosen]) -> list[tuple[Mapping[str, Any], dict[Key, Chosen]]]:
    """What was chosen, together where it is prepared in the same way."""
    parts: list[tuple[Mapping[str, Any], dict[Key, Chosen]]] = []
    for proxy in FINALS:
        mine = {key: value for key, value in chosen.items() if METHODS[key[0]].final is proxy}
        if mine:
            parts.append((proxy, mine))
    return parts


def that_prepares(proxy: Mapping[str, Any], chosen: Mapping[Key, Chosen]) -> dict[str, Any]:
    """Changes to a recipe whose networks are the chosen ones."""
    lacking = any(0 in found.policy.keep for found in chosen.values())
    return {**proxy, **(BLOCKS if lacking else {})}


def final_workload(where: Setting, assembled: Assembled, images: int, measured: Images) -> Workload:
    """A search's workload with that many images to prepare networks, and others to measure them."""
    searched = assembled.workload
    calibration = as_trained(where.train.take(np.arange(images)), searched.network(), 0)
    settings = replace(searched.settings, reconstruction_images=images)
    workload = prepare_workload(searched.network(), searched.plan, settings, calibration, measured)
    # The same channels go as in the search, as in `evosearch export --calibration`.
    return replace(workload, places=searched.places)


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Of some seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
