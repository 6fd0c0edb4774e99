"""Is a searched blend of criteria better than the best single one, at equal MACs and evaluations?

At each budget every network spends the same MACs, and every search measures as many policies by the
same proxy: cut, compensate, recalibrate, divergence on validation images. What is chosen is chosen
there; test images are opened for the report, without training and after a common short fine-tune.

    single, by validation   every criterion at uniform ratios; the one of least divergence
    single, by oracle       likewise, but the one of best test top-1: what no one can choose
    average of all          one blend of all criteria in equal parts, uniform ratios
    random blends           random blends for the whole network, uniform ratios
    evolved, network        differential evolution from the pure criteria: one blend for all groups
    evolved, layers         likewise, a blend per group
    evolved sparsities      the criterion `by validation`, a ratio per group: a control
    evolved both            one blend for all groups and a ratio per group, in one genome

Mean and 95% interval over seeds (Student's t). Expect little at mild ratios: norm criteria are near
copies, so gains come from crossing families.

    python benchmarks/blend.py [--data FOLDER] [--recipe blend-resnet20-cifar10] [--seeds 3]
    python benchmarks/blend.py --quick
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import images, parser, show, write
from scipy import stats

from evosearch.assembly import Assembled, assemble
from evosearch.data import Images, open_source
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.pruning.blending import cluster_groups
from evosearch.recipe import Recipe, load_recipe
from evosearch.scoring.pool import Pool, make_pool
from evosearch.scoring.scorer import Scorer
from evosearch.search import SEARCH, Scoring, Search
from evosearch.space import CriteriaFacts, SearchSpace, make_space
from evosearch.strategy import algorithm_of
from evosearch.training import TrainSettings, top1, train

UNIFORM = {"sparsity": [0.0, 0.95], "grouping": "network"}
QUICK_CRITERIA = ["l1", "fpgm", "bn-scale", "bn-taylor", "apoz", "residual-energy"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method came up with.

    Args:
        method: Its name.
        budget: Share of MACs.
        seed: Of the search; None for a method without chance.
        policy: The best by divergence on validation images (or by oracle).
        divergence: There.
        evaluations: Policies that were measured to find it.
    """

    method: str
    budget: float
    seed: int | None
    policy: Policy
    divergence: float
    evaluations: int


class Bench:
    """One network with its criteria, and searches over it.

    Args:
        assembled: From a recipe whose space is `criterion-blend`.
        evaluations: Per search.
    """

    def __init__(self, assembled: Assembled, evaluations: int) -> None:
        assert assembled.criteria is not None  # noqa: S101  the recipe's space asks for them
        assert assembled.workload.blends is not None  # noqa: S101  likewise
        self.assembled = assembled
        self.workload = assembled.workload
        self.facts = assembled.criteria
        self.evaluations = evaluations
        self.pool: Pool = make_pool(self.workload, assembled.recipe.run)

    def space(self, budget: float, facts: CriteriaFacts, **options: Any) -> SearchSpace:
        """A space of blends of some criteria, every policy of which spends the budget."""
        table = self.workload.plan.table
        given = {**options, "project_onto": {"macs": budget}}
        return make_space("criterion-blend", table, given, facts)

    def shared_by(self, sharing: Literal["layer", "network"]) -> CriteriaFacts:
        """The criteria, clustered for groups that share a blend."""
        assert self.workload.blends is not None  # noqa: S101  see above
        table, scores = self.workload.plan.table, self.workload.blends.scores
        clusters = cluster_groups(self.facts.names, scores, table, None, table.units(sharing))
        return replace(self.facts, clusters=clusters)

    def measure(self, policies: Sequence[Policy]) -> list[Measurement]:
        """Measures policies by the proxy."""
        landed: dict[Policy, Measurement] = {}

        def record(measurement: Measurement) -> None:
            landed[measurement.policy] = measurement

        self.pool.score(list(dict.fromkeys(policies)), record, lambda: False)
        return [landed[policy] for policy in policies]

    def singles(self, budget: float) -> list[tuple[str, Measurement]]:
        """Every criterion alone, at uniform ratios."""
        space = self.space(budget, self.facts, **UNIFORM)
        policies = space.decode(space.ladder(len(self.facts.names)))
        default = ((self.facts.default, 1),)
        names = [(policy.blend[0] if policy.blend else default)[0][0] for policy in policies]
        return list(zip(names, self.measure(policies), strict=True))

    def average(self, budget: float, keep: tuple[int, ...]) -> Found:
        """All criteria in equal parts."""
        blend = (tuple((name, 1) for name in self.facts.names),) * len(keep)
        (measurement,) = self.measure([Policy(keep, blend)])
        return found("average of all", budget, None, [measurement])

    def search(self, method: str, budget: float, seed: int, space: SearchSpace, name: str) -> Found:
        """One search with this many evaluations; no uniform seeds for random ones."""
        settings = self.assembled.recipe.search.model_copy(
            update={"algorithm": name, "seed": seed, "seed_share": 0.0 if name == "random" else 0.5}
        )
        recipe = self.assembled.recipe.model_copy(update={"search": settings})
        facts = {**self.assembled.facts(), "recipe": recipe.model_dump(mode="json")}
        table = self.workload.plan.table
        scoring = Scoring(
            table=table,
            goals=self.assembled.goals,
            worst=facts["worst"],
            score=self.pool.score,
        )
        algorithm = algorithm_of(recipe, space, self.assembled.goals, table)
        with (
            tempfile.TemporaryDirectory() as folder,
            Ledger.create(Path(folder), facts) as ledger,
        ):
            Search(space, algorithm, scoring, ledger).run(self.evaluations)
            landed = [e.measurement for e in ledger.entries(SEARCH) if e.measurement]
        result = found(method, budget, seed, landed)
        print(f"{budget:.0%} {method}, seed {seed}: divergence {result.divergence:.4f}", flush=True)
        return result


def found(method: str, budget: float, seed: int | None, landed: Sequence[Measurement]) -> Found:
    best = min((m for m in landed if m.ok), key=lambda m: m.metrics["divergence"])
    return Found(
        method=method,
        budget=budget,
        seed=seed,
        policy=best.policy,
        divergence=best.metrics["divergence"],
        evaluations=len(landed),
    )


class Judge:
    """Opens the test images: top-1 of policies, as cut and after the same short training.

    Args:
        scorer: Makes the pruned networks.
        network: The dense one.
        training, test: Images.
        settings: Of the fine-tune.
    """

    def __init__(
        self,
        scorer: Scorer,
        network: Network,
        training: Images,
        test: Images,
        settings: TrainSettings,
    ) -> None:
        self._scorer, self._network = scorer, network
        self._training, self._test = training, test
        self._settings = settings
        self._known: dict[tuple[Policy, bool], float] = {}

    def top1(self, policy: Policy, *, tuned: bool) -> float:
        """Share of test images that the network of a policy gets right."""
        key = (policy, tuned)
        if key not in self._known:
            module = copy.deepcopy(self._scorer.network_of(policy))
            network = replace(self._network, module=module)
            if tuned:
                train(network, self._training, self._test.take(np.arange(1)), self._settings)
            self._known[key] = top1(network, self._test)
        return self._known[key]


def all_methods(bench: Bench, budget: float, seeds: int, judge: Judge) -> list[Found]:
    singles = bench.singles(budget)
    every = [m for _, m in singles]
    chosen = found("single, by validation", budget, None, every)
    oracle = max((m for m in every if m.ok), key=lambda m: judge.top1(m.policy, tuned=False))
    best = next(name for name, m in singles if m.policy == chosen.policy)
    print(f"{budget:.0%} single, by validation: {best}")
    results = [
        chosen,
        replace(found("single, by oracle", budget, None, [oracle]), evaluations=len(every)),
        bench.average(budget, chosen.policy.keep),
    ]
    one = replace(bench.facts, names=(best,), clusters=(((best,),),) * len(chosen.policy.keep))
    everywhere = bench.shared_by("network")
    shared = bench.space(budget, everywhere, **UNIFORM, blending="network")
    layers = bench.space(budget, bench.shared_by("layer"), **UNIFORM, blending="layer")
    ratios = bench.space(budget, one, sparsity=[0.0, 0.95])
    both = bench.space(budget, everywhere, sparsity=[0.0, 0.95], blending="network")
    for seed in range(seeds):
        results += [
            bench.search("random blends", budget, seed, shared, "random"),
            bench.search("evolved, network", budget, seed, shared, "de"),
            bench.search("evolved, layers", budget, seed, layers, "de"),
            bench.search("evolved sparsities", budget, seed, ratios, "de"),
            bench.search("evolved both", budget, seed, both, "de"),
        ]
    return results


def interval(values: Sequence[float], digits: int) -> str:
    """Mean, and half the width of its 95% interval where there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean} ± {half:.{digits}f}"


def told(result: Found, judge: Judge) -> dict[str, Any]:
    return {
        "method": result.method,
        "budget": result.budget,
        "seed": result.seed,
        "evaluations": result.evaluations,
        "divergence": result.divergence,
        "test_top1": 100 * judge.top1(result.policy, tuned=False),
        "tuned_top1": 100 * judge.top1(result.policy, tuned=True),
        "policy": result.policy.to_json(),
    }


def image_sets(options: Any, recipe: Recipe) -> tuple[Images, Images]:
    """Training images of the fine-tune, and test images."""
    if options.quick:
        source = open_source("cifar10-sample")
        training, test = source.training(), source.test()
        return training.take(np.arange(256)), test.take(np.arange(400))
    name = "cifar100" if recipe.network.num_classes == 100 else "cifar10"
    # The last tenth is held out: validation images of the search are among it.
    training = images(options.data, f"{name}_train").take(np.arange(options.tune_images))
    return training, images(options.data, f"{name}_test")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="blend-resnet20-cifar10")
    made.add_argument("--set", action="append", default=[], help="change the recipe")
    made.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    made.add_argument("--evaluations", type=int, default=200)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--tune-epochs", type=int, default=2)
    made.add_argument("--tune-images", type=int, default=10_000)
    made.add_argument("--quick", action="store_true", help="a smoke test of two minutes")
    options = made.parse_args()
    changes: dict[str, Any] = {"run.workers": options.workers}
    if options.quick:
        options.budgets, options.evaluations, options.seeds = [0.5], 12, 1
        options.tune_epochs = 1
        changes |= {"data.calibration": 128, "data.validation": 128, "search.population": 12}
        changes |= {"space.criteria": QUICK_CRITERIA}
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.set, changes)
    assembled = assemble(recipe)
    bench = Bench(assembled, options.evaluations)
    training, test = image_sets(options, recipe)
    settings = TrainSettings(
        epochs=options.tune_epochs,
        batch_size=64,
        lr=0.01,
        warmup_epochs=0.0,
        precision=assembled.recipe.proxy.precision,
        threads=1,
    )
    network = assembled.workload.network()
    judge = Judge(Scorer(assembled.workload), network, training, test, settings)
    dense = 100 * top1(network, test)
    rows, records = [], []
    for budget in options.budgets:
        results = all_methods(bench, budget, options.seeds, judge)
        for method in dict.fromkeys(result.method for result in results):
            mine = [told(result, judge) for result in results if result.method == method]
            print(f"{budget:.0%} {method}: {[round(r['test_top1'], 2) for r in mine]}", flush=True)
            records += mine
            rows.append(
                [
                    f"{budget:.0%}",
                    method,
                    max(r["evaluations"] for r in mine),
                    interval([r["divergence"] for r in mine], 4),
                    interval([r["test_top1"] for r in mine], 2),
                    interval([r["tuned_top1"] for r in mine], 2),
                ]
            )
    bench.pool.close()
    show(
        f"{options.recipe}, dense test top-1 {dense:.2f}, {options.seeds} seeds: mean ± 95%",
        ["MACs", "method", "evaluations", "divergence", "test top-1", "after tuning"],
        rows,
    )
    content = {
        "recipe": options.recipe,
        "quick": options.quick,
        "dense_test_top1": dense,
        "tuning": {"epochs": options.tune_epochs, "images": len(training)},
        "clusters": assembled.facts()["criteria"]["clusters"],
        "rows": records,
    }
    write("blend", options.json, content)


if __name__ == "__main__":
    main()
