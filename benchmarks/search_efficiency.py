"""How many evaluations does a search need for the front that another one has after 2,000?

Hypervolume against evaluations and against seconds, several seeds: our algorithms, Optuna's NSGA-II
(as it comes, and with uniform ratios tried first) and TPE, pymoo's NSGA-II cold (no uniform ratios
in its first population), random, uniform ratios, and the sensitivity sweep. All search the same
space of the same network through the same proxy; only who asks differs. Goal: what Optuna's NSGA-II
has after 2,000 evaluations, in at most 200 of ours.

An evaluation is a distinct policy that was measured. Policies are scored for real, once: scores and
their seconds are kept in a table (--cache), so that methods which meet the same policy do not
pay twice in wall time, yet are charged the seconds it took. Two scorers work at a time, so a
generation is charged half of its candidates' seconds, plus the seconds that the method took to
ask and to be told. Optuna is asked for a population at a time, too.

Scores are made cheap, for the benchmark to finish: Gram matrices of 256 calibration images,
compensation without recalibration, 256 or 128 validation images, and bfloat16 where the machine has
it. The hypervolume's reference is fixed: the dense network's MACs, and outputs that say nothing.

    pip install -e '.[bench]'
    python benchmarks/search_efficiency.py [--quick] [--networks resnet20 resnet56] [--seeds 5]
        [--methods surrogate nsga2 ...] [--evaluations 300] [--cache FILE]
"""

import json
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, images, parser, published, show, write
from numpy.typing import NDArray

from evosearch.algorithms import AlgorithmSettings, Foresight, make_algorithm, ranked_count
from evosearch.algorithms.seeding import ranked_genomes
from evosearch.data import Images, open_source
from evosearch.materials import as_trained
from evosearch.measurement import METRICS, Measurement
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pareto import front_mask, hypervolume
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.recipe import RANKINGS, RunRecipe
from evosearch.scoring.objectives import Goals, reference_point, worst_metrics
from evosearch.scoring.pool import Pool, make_pool
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import Workload, prepare_workload, settled_precision
from evosearch.space import SearchSpace, make_space, unique_rows
from evosearch.starting import Ranked, rank_channels
from evosearch.strategy import foresight_of

FloatArray = NDArray[np.float64]

# Images that policies are measured on, by network; fewer where a pass takes longer.
NETWORKS = {"resnet20": 256, "resnet56": 128}
CALIBRATION = 256


def network_and_images(name: str, data: Path) -> tuple[Network, Images, Images]:
    """A trained network, calibration and validation images; no test images."""
    n = NETWORKS[name]
    if name == "resnet20":
        # Ships with the package, and was not trained on the images held out here.
        network = load_network(NetworkSpec(name=name, weights="shipped:resnet20-cifar10"))
        source = open_source("cifar10-sample")
        calibration = source.training().take(np.arange(CALIBRATION))
        return network, calibration, source.held_out().take(np.arange(n))
    # The published weights saw all training images. Methods are compared here, not networks.
    train = images(data, "cifar10_train")
    calibration = train.take(np.arange(CALIBRATION))
    validation = train.take(np.arange(CALIBRATION, CALIBRATION + n))
    return published(data, name), calibration, validation


class Scores:
    """Measured values of policies of one workload, in a table on disk; scores what is missing.

    Args:
        workload: What to score with.
        path: The table; made if there is none.
        workers: Scorers on Ray; 0 scores in this process.
    """

    def __init__(self, workload: Workload, path: Path, workers: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table = workload.plan.table
        self.worst = worst_metrics(workload.dense_logits)
        self.workload = workload
        self._workers = workers
        self._pool: Pool | None = None
        self._file = sqlite3.connect(path)
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS scores (workload TEXT, policy TEXT, metrics TEXT, "
            "seconds REAL, PRIMARY KEY (workload, policy))"
        )
        key = sha256(repr(workload.settings).encode())
        for part in (workload.calibration.digest(), workload.validation.digest()):
            key.update(part.encode())
        key.update(workload.dense_logits.tobytes())
        self._key = key.hexdigest()[:16]
        rows = self._file.execute(
            "SELECT policy, metrics, seconds FROM scores WHERE workload = ?", (self._key,)
        )
        read = ((policy, json.loads(metrics), seconds) for policy, metrics, seconds in rows)
        # A table may be older than a metric; what lacks one is measured again.
        self._known: dict[str, tuple[dict[str, float], float]] = {
            policy: (metrics, seconds)
            for policy, metrics, seconds in read
            if metrics.keys() >= set(METRICS)
        }
        self.fresh = 0

    def of(self, policies: Sequence[Policy]) -> list[tuple[dict[str, float], float]]:
        """Metrics and seconds of each policy; the worst metrics for one that failed."""
        missing = [p for p in dict.fromkeys(policies) if p.digest not in self._known]
        if missing:
            costs = self.table.costs_of(missing)[0]
            order = sorted(range(len(missing)), key=lambda i: -int(costs[i]))
            if self._pool is None:
                self._pool = make_pool(self.workload, RunRecipe(workers=self._workers))
            self._pool.score([missing[i] for i in order], self._record, lambda: False)
            self._file.commit()
        return [self._known[policy.digest] for policy in policies]

    def _record(self, measurement: Measurement) -> None:
        metrics = dict(measurement.metrics) if measurement.ok else self.worst
        digest = measurement.policy.digest
        self._known[digest] = metrics, measurement.seconds
        self._file.execute(
            "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)",
            (self._key, digest, json.dumps(metrics), measurement.seconds),
        )
        self.fresh += 1

    def close(self) -> None:
        """Ends scorers and closes the table."""
        if self._pool is not None:
            self._pool.close()
        self._file.commit()
        self._file.close()


def scores_of(name: str, data: Path, cache: Path, workers: int) -> Scores:
    network, plain, validation = network_and_images(name, data)
    settings = ProxySettings(
        name="compensated",
        criterion="residual-energy",
        recalibrate=False,
        precision=settled_precision("auto", gpu=False),
    )
    calibration = as_trained(plain, network, 0)
    workload = prepare_workload(network, trace(network), settings, calibration, validation)
    return Scores(workload, cache, workers)


class Ours:
    """One of our algorithms; `ahead` asks for the next generation before the last one is told."""

    def __init__(self, task: "Task", seed: int, settings: dict[str, Any]) -> None:
        settings = dict(settings)
        self._depth = 2 if settings.pop("ahead", False) else 1
        self._open: deque[FloatArray] = deque()
        self._told = False
        self._space = task.space
        ranked, guessed = settings.pop("ranked", True), settings.pop("guessed", True)
        made = AlgorithmSettings(
            **{"population": POPULATION, "options": {}, "seed": seed, **settings}
        )
        self._algorithm = make_algorithm(
            made,
            task.space,
            2,
            1,
            foresight=task.foresight(guessed=ranked and guessed),
            ranked=task.ranked(ranked_count(made)) if ranked else None,
        )

    def ask(self) -> FloatArray | None:
        """A population."""
        while len(self._open) < (self._depth if self._told else 1):
            genomes = self._algorithm.ask()
            if genomes is None:
                break
            self._open.append(genomes)
        return self._open[0] if self._open else None

    def tell(self, objectives: FloatArray) -> None:
        """Both objectives of each; nothing is constrained and nothing fails."""
        self._open.popleft()
        self._told = True
        self._algorithm.tell(objectives, np.zeros((len(objectives), 1)))


class Optuna:
    """A sampler of Optuna: genes as floats, in-memory storage, two trials at a time.

    `ladder` first tries so many uniform ratios, as a user might enqueue them.
    """

    AT_ONCE = 2

    def __init__(self, task: "Task", seed: int, settings: dict[str, Any]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = getattr(optuna.samplers, settings["sampler"])(seed=seed)
        self._study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        self._genes = [f"gene{i}" for i in range(task.space.n_genes)]
        for rung in task.space.ladder(settings["ladder"]) if "ladder" in settings else ():
            self._study.enqueue_trial(dict(zip(self._genes, rung.tolist(), strict=True)))
        self._open: list[Any] = []

    def ask(self) -> FloatArray:
        """As many trials as there are scorers."""
        self._open = [self._study.ask() for _ in range(self.AT_ONCE)]
        return np.array([[t.suggest_float(g, 0, 1) for g in self._genes] for t in self._open])

    def tell(self, objectives: FloatArray) -> None:
        """Both objectives of each trial."""
        for trial, values in zip(self._open, objectives, strict=True):
            self._study.tell(trial, [float(v) for v in values])


# Of all that do not say otherwise. The surrogate learns from each answer, so it asks for few.
POPULATION = 24
REFERENCE = "optuna nsga2"
METHODS: dict[str, tuple[type[Ours] | type[Optuna], dict[str, Any]]] = {
    "surrogate": (Ours, {"name": "surrogate", "population": 8}),
    "surrogate, unranked": (Ours, {"name": "surrogate", "population": 8, "ranked": False}),
    "surrogate, no guesses": (
        Ours,
        {"name": "surrogate", "population": 8, "guessed": False},
    ),
    "surrogate, sweep": (Ours, {"name": "surrogate", "population": 8, "options": {"sweep": 1}}),
    "surrogate, overlapping": (Ours, {"name": "surrogate", "population": 8, "ahead": True}),
    "surrogate, by 24": (Ours, {"name": "surrogate"}),
    "level-switch": (Ours, {"name": "level-switch"}),
    "gde3, self-adaptive": (Ours, {"name": "gde3", "options": {"adaptive": True}}),
    "gde3": (Ours, {"name": "gde3"}),
    "nsde": (Ours, {"name": "nsde"}),
    "nsga2": (Ours, {"name": "nsga2"}),
    "nsga2, unranked": (Ours, {"name": "nsga2", "ranked": False}),
    "pymoo nsga2, cold": (Ours, {"name": "nsga2", "seed_share": 0.0}),
    "random": (Ours, {"name": "random", "seed_share": 0.0}),
    "uniform": (Ours, {"name": "uniform"}),
    "ranking": (Ours, {"name": "ranking"}),
    "sensitivity": (Ours, {"name": "sensitivity"}),
    "sensitivity, one value": (Ours, {"name": "sensitivity", "options": {"values": 1}}),
    "optuna nsga2, ladder first": (
        Optuna,
        {"sampler": "NSGAIISampler", "ladder": POPULATION // 2},
    ),
    "optuna tpe": (Optuna, {"sampler": "TPESampler"}),
    REFERENCE: (Optuna, {"sampler": "NSGAIISampler"}),
}
OBJECTIVES = ("divergence", "distortion", "error")
UNSEEDED = ("uniform", "ranking", "sensitivity", "sensitivity, one value")
WORKERS_CHARGED = 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all methods search.

    Args:
        space: What genomes mean.
        goals: The measured objective, and MACs.
        scores: Measures.
    """

    space: SearchSpace
    goals: Goals
    scores: Scores

    @cached_property
    def _ranked(self) -> Ranked:
        return rank_channels(self.scores.workload, RANKINGS, "macs")

    def foresight(self, *, guessed: bool) -> Foresight:
        """What is known before measuring, with or without the losses that rankings guess."""
        return foresight_of(self.goals, self.scores.table, self._ranked.losses if guessed else ())

    def ranked(self, count: int | None) -> FloatArray:
        """`(n, n_genes)` that rankings give, as many as an algorithm takes."""
        return ranked_genomes(self._ranked.paths, self.space, self.foresight(guessed=False), count)

    def objectives(self, policies: Sequence[Policy]) -> tuple[FloatArray, FloatArray]:
        """`(n, 2)` objectives and `(n,)` seconds."""
        macs = self.scores.table.costs_of(policies)[0] / self.scores.table.dense_costs[0]
        found = self.scores.of(policies)
        vectors = [
            self.goals.vector({**metrics, "macs": float(share)})
            for (metrics, _), share in zip(found, macs, strict=True)
        ]
        return np.array(vectors), np.array([seconds for _, seconds in found])

    @property
    def reference(self) -> FloatArray:
        """`(2,)` of the hypervolume."""
        return reference_point(self.goals.objectives, self.scores.worst)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a search went: after each evaluation the hypervolume, and the seconds until then.

    Args:
        hypervolumes, seconds: `(n_evaluations,)`.
        own_seconds: What of the seconds the method took to ask and to be told.
    """

    hypervolumes: FloatArray
    seconds: FloatArray
    own_seconds: float

    def needed(self, target: float) -> int | None:
        """Evaluations until a hypervolume was reached; None if it was not."""
        reached = np.flatnonzero(self.hypervolumes >= target)
        return int(reached[0]) + 1 if len(reached) else None


def search(task: Task, method: str, seed: int, evaluations: int) -> Course:
    """Runs a method until so many distinct policies were measured, or it has no more to ask."""
    make, settings = METHODS[method]
    own, clock = 0.0, 0.0
    start = time.perf_counter()
    searcher = make(task, seed, settings)
    own += time.perf_counter() - start
    seen: set[Policy] = set()
    front = np.empty((0, 2))
    volumes: list[float] = []
    seconds: list[float] = []
    idle = 0
    while len(volumes) < evaluations and idle < 200:
        start = time.perf_counter()
        genomes = searcher.ask()
        asking = time.perf_counter() - start
        if genomes is None:
            break
        policies = task.space.decode(genomes)
        told, cost = task.objectives(policies)
        new = [row for row in unique_rows(policies) if policies[row] not in seen]
        idle = 0 if new else idle + 1
        clock += asking
        for row in new[: evaluations - len(volumes)]:
            seen.add(policies[row])
            clock += cost[row] / WORKERS_CHARGED
            front = np.concatenate([front, told[row : row + 1]])
            front = front[front_mask(front)]
            volumes.append(hypervolume(front, task.reference))
            seconds.append(clock)
        start = time.perf_counter()
        searcher.tell(told)
        telling = time.perf_counter() - start
        clock += telling
        own += asking + telling
    return Course(hypervolumes=np.array(volumes), seconds=np.array(seconds), own_seconds=own)


def at(course: Course, evaluations: int) -> float:
    """Hypervolume after so many evaluations, or at the end."""
    return float(course.hypervolumes[min(evaluations, len(course.hypervolumes)) - 1])


def text_of(values: Sequence[float | None], form: str) -> str:
    """Median and range; what was not reached is larger than everything."""
    shown = sorted(np.inf if v is None else v for v in values)
    middle = shown[len(shown) // 2] if len(shown) % 2 else np.mean(shown[len(shown) // 2 - 1 :][:2])

    def one(value: float) -> str:
        return "never" if np.isinf(value) else form.format(value)

    return f"{one(float(middle))} ({one(shown[0])} to {one(shown[-1])})"


def compare(task: Task, options: Any) -> dict[str, dict[int, Course]]:
    """Courses of all methods by method and seed; the reference first."""
    found: dict[str, dict[int, Course]] = {}
    for method in dict.fromkeys([REFERENCE, *options.methods]):
        for seed in range(1 if method in UNSEEDED else options.seeds):
            budget = options.target if method == REFERENCE else options.evaluations
            before, start = task.scores.fresh, time.perf_counter()
            course = search(task, method, seed, budget)
            found.setdefault(method, {})[seed] = course
            print(
                f"{method}, seed {seed}: {course.hypervolumes[-1]:.4f} after "
                f"{len(course.hypervolumes)} ({task.scores.fresh - before} scored now, "
                f"{time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    return found


def report(network: str, found: dict[str, dict[int, Course]], options: Any) -> dict[str, Any]:
    """Prints the table of a network and returns its part of the JSON."""
    targets = {seed: float(c.hypervolumes[-1]) for seed, c in found[REFERENCE].items()}
    rows, records = [], []
    for method, courses in found.items():
        # Methods without a seed meet every seed's target with their one course.
        by_seed = {seed: courses.get(seed, courses[0]) for seed in targets}
        needed = [course.needed(targets[seed]) for seed, course in by_seed.items()]
        seconds = [
            None if n is None else float(course.seconds[n - 1])
            for n, course in zip(needed, by_seed.values(), strict=True)
        ]
        share = [c.own_seconds / c.seconds[-1] for c in courses.values()]
        budget = options.target if method == REFERENCE else options.evaluations
        ratio = [None if n is None else options.target / n for n in needed]
        rows.append(
            [
                method,
                text_of([at(c, 100) for c in courses.values()], "{:.4f}"),
                f"{np.median([c.hypervolumes[-1] for c in courses.values()]):.4f}"
                f" at {min(budget, max(len(c.hypervolumes) for c in courses.values()))}",
                text_of(needed, "{:.0f}"),
                text_of(seconds, "{:.0f}"),
                f"{100 * np.median(share):.1f}",
            ]
        )
        marks = [*range(10, 301, 10), *range(350, options.target + 1, 50)]
        records.append(
            {
                "method": method,
                "needed": needed,
                "seconds_needed": seconds,
                "ratio": ratio,
                "own_share": [round(s, 4) for s in share],
                "seconds": [round(float(c.seconds[-1]), 1) for c in courses.values()],
                "evaluations": [len(c.hypervolumes) for c in courses.values()],
                "hypervolume": {
                    str(n): [round(at(c, n), 5) for c in courses.values()]
                    for n in marks
                    if n <= max(len(c.hypervolumes) for c in courses.values())
                },
            }
        )
    show(
        f"{network}, {options.objective} and MACs, {len(targets)} seeds; target: {REFERENCE} after "
        f"{options.target}, {text_of(list(targets.values()), '{:.4f}')}",
        ["method", "after 100", "at the end", "evaluations to target", "seconds", "own %"],
        rows,
    )
    return {"network": network, "targets": list(targets.values()), "rows": records}


def draw(drawn: dict[str, dict[str, dict[int, Course]]], path: Path) -> None:
    """Medians with ranges, against evaluations and against seconds, one row per network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(drawn), 2, figsize=(12, 4.5 * len(drawn)), squeeze=False)
    for (network, found), (left, right) in zip(drawn.items(), axes, strict=True):
        for number, (method, courses) in enumerate(found.items()):
            # Ten colours for more methods: the next ten are dashed.
            style = "-" if number < 10 else "--"
            n = min(len(c.hypervolumes) for c in courses.values())
            volumes = np.stack([c.hypervolumes[:n] for c in courses.values()])
            seconds = np.median([c.seconds[:n] for c in courses.values()], axis=0)
            for axis, x in ((left, np.arange(1, n + 1)), (right, seconds)):
                (line,) = axis.plot(x, np.median(volumes, axis=0), style, label=method, lw=1.5)
                axis.fill_between(
                    x, volumes.min(axis=0), volumes.max(axis=0), color=line.get_color(), alpha=0.15
                )
        top = max(c.hypervolumes[-1] for courses in found.values() for c in courses.values())
        for axis, label in ((left, "evaluations"), (right, "seconds, two scorers")):
            axis.set(xscale="log", xlabel=label, ylabel="hypervolume", title=network)
            axis.set_ylim(0.5 * top, 1.02 * top)
            axis.grid(alpha=0.3)
        left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--objective", choices=OBJECTIVES, default="divergence")
    made.add_argument("--evaluations", type=int, default=200, help="of each method")
    made.add_argument("--target", type=int, default=2000, help=f"evaluations of {REFERENCE}")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--workers", type=int, default=2, help="scorers; 0 for none but this process")
    made.add_argument("--cache", type=Path, default=ROOT / "build" / "search_efficiency.sqlite")
    made.add_argument("--quick", action="store_true", help="ResNet-20, one seed, small budgets")
    options = made.parse_args()
    if options.quick:
        options.networks, options.seeds = ["resnet20"], 1
        options.evaluations, options.target = 72, 150
    parts, drawn = [], {}
    for network in options.networks:
        scores = scores_of(network, options.data, options.cache, options.workers)
        try:
            task = Task(
                space=make_space("layer-sparsity", scores.table, {}),
                goals=Goals(objectives=(options.objective, "macs")),
                scores=scores,
            )
            drawn[network] = compare(task, options)
        finally:
            scores.close()
        parts.append(report(network, drawn[network], options))
    settings = {key: getattr(options, key) for key in ("objective", "evaluations", "target")}
    write("search_efficiency", options.json, {**settings, "networks": parts})
    path = options.json or RESULTS / "search_efficiency.json"
    draw(drawn, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
