"""Does one driver keep hundreds of workers busy?

Two questions about quickstart's recipe (ResNet-20, NSGA-II); `resume.py` asks how a long search is
resumed, and what memory it takes:

1. Candidates per second with one and with two real workers, in turns. Beside it the time that a
   worker waits for its next candidate, which is what queueing one ahead could save.
2. Busy share of simulated clusters: busy seconds over workers times wall. Search, ledger on disk,
   dispatcher and clock are the real ones, the population is 512; a worker is an entry in a heap of
   alarms, which takes as long as its policy's MACs say: the line through a few candidates timed
   here, with their scatter, scaled to `--seconds` on average. What Ray takes of the driver for each
   candidate is measured and spent as well. `ray` is the same with Ray itself and 256 coroutines
   that sleep in two actors. Beside the measured share, what is possible for these candidates with
   a driver that costs nothing, in simulated time: longest first, as here; any schedule that waits
   for the last candidate of a generation; and overlapping generations, each bred when the last but
   one is complete, while stragglers of the last are still scored. `+ overlap` is the search with
   overlapping generations (`search.overlap`), measured.

    python benchmarks/scaling.py [--quick] [--seconds 1.0] [--only real,busy]

The machine must be idle: one that is shared makes the driver look slow. The load is in the JSON.
"""

import asyncio
import heapq
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import parser, show, write
from numpy.typing import NDArray

from evosearch.assembly import Assembled, assemble
from evosearch.ledger import Ledger
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy
from evosearch.recipe import RunRecipe, load_recipe
from evosearch.scoring.dispatch import Dispatcher, Record, Stop, Transport
from evosearch.scoring.pool import RayPool, RayTransport
from evosearch.scoring.racing import NO_RACES, Race, Races
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.simulation import Fate, RealClock, SimulatedCluster
from evosearch.search import Scoring, Search
from evosearch.snapshots import snapshot_stamp
from evosearch.starting import ranked_by_channels
from evosearch.strategy import algorithm_of

POPULATION = 512
TIMEOUT_S = 600.0


def never() -> bool:
    return False


def prepare(evaluations: int, algorithm: str = "nsga2", population: int = POPULATION) -> Assembled:
    changes = {
        "search.algorithm": algorithm,
        "search.population": population,
        "search.evaluations": evaluations,
        "search.baseline": 0,
        "run.workers": 2,
    }
    return assemble(load_recipe("quickstart", (), changes))


@dataclass(frozen=True)
class Formula:
    """Measures without a network: channels of early groups matter most."""

    channels: NDArray[np.int64]

    def __call__(self, policy: Policy, seconds: float = 0.0) -> Measurement:
        """What is recorded."""
        weights = 1 / np.arange(1, len(self.channels) + 1)
        removed = 1 - np.array(policy.keep) / self.channels
        error = float((removed**2 * weights).sum() / weights.sum() * 0.8)
        metrics = {
            "error": error,
            "loss": 2 * error,
            "margin": error,
            "divergence": 3 * error,
            "distortion": error,
        }
        return Measurement(policy=policy, status=Status.OK, metrics=metrics, seconds=seconds)


@dataclass(frozen=True)
class Durations:
    """Seconds of a candidate: the line through some that were timed, with their scatter."""

    constant: float
    slope: float
    scatter: float
    scale: float
    assembled: Assembled = field(repr=False)

    def __call__(self, policy: Policy) -> float:
        """Always the same for a policy."""
        table = self.assembled.workload.plan.table
        share = float(table.costs_of([policy])[0][0]) / table.dense_costs[0]
        noise = np.random.default_rng(int(policy.digest, 16)).normal(0, self.scatter)
        return max(self.scale * (self.constant + self.slope * share) * (1 + noise), 1e-3)


def time_candidates(assembled: Assembled, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """MACs as shares of dense, and the least processor time of two, of random policies."""
    table, scorer = assembled.workload.plan.table, Scorer(assembled.workload)
    genomes = np.random.default_rng(0).random((n, assembled.space.n_genes))
    policies = assembled.space.decode(genomes * np.linspace(0.1, 1, n)[:, None])

    def one(policy: Policy) -> float:
        start = time.process_time()  # a machine that others use, too, adds none
        scorer.score(policy)
        return time.process_time() - start

    one(policies[0])
    seconds = [min(one(policy) for _ in range(2)) for policy in policies]
    return table.costs_of(policies)[0] / table.dense_costs[0], np.array(seconds)


def fit(assembled: Assembled, n: int, mean_seconds: float) -> tuple[Durations, dict[str, Any]]:
    shares, seconds = time_candidates(assembled, n)
    slope, constant = np.polyfit(shares, seconds, 1)
    scatter = float(np.std(seconds / (constant + slope * shares) - 1))
    line = Durations(float(constant), float(slope), scatter, 1.0, assembled)
    first = first_population(assembled)
    mean = float(np.mean([line(policy) for policy in first]))
    scaled = Durations(line.constant, line.slope, scatter, mean_seconds / mean, assembled)
    facts = {
        "constant_s": line.constant,
        "slope_s": line.slope,
        "relative_scatter": scatter,
        "mean_s_of_first_population": mean,
        "scaled_to_mean_s": mean_seconds,
        "share_of_macs": shares.tolist(),
        "seconds": seconds.tolist(),
    }
    return scaled, facts


def first_population(assembled: Assembled) -> list[Policy]:
    genomes = make_algorithm(assembled).ask()
    assert genomes is not None  # noqa: S101  there is a first population
    return assembled.space.decode(genomes)


# What a launch ranks once.
beginning = cache(ranked_by_channels)


def make_algorithm(assembled: Assembled) -> Any:
    table, begins = assembled.workload.plan.table, beginning(assembled)
    return algorithm_of(assembled.recipe, assembled.space, assembled.goals, table, begins)


Score = Callable[..., None]


def search(
    assembled: Assembled,
    ledger: Ledger,
    score: Score,
    budget: int,
    seen: Any = None,
    *,
    overlap: bool = False,
) -> None:
    scoring = Scoring(
        table=assembled.workload.plan.table,
        goals=assembled.goals,
        worst=assembled.facts()["worst"],
        score=score,
        overlap=overlap,
        snapshots=snapshot_stamp(assembled.space),
    )
    Search(assembled.space, make_algorithm(assembled), scoring, ledger).run(budget, seen)


# 1. Real workers.


def real(assembled: Assembled, candidates: int, repetitions: int) -> dict[str, Any]:
    import ray

    # Room for both pools at once; they work in turns.
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    pools = {n: RayPool(assembled.workload, RunRecipe(workers=n)) for n in (1, 2)}
    genomes = np.random.default_rng(1).random((candidates, assembled.space.n_genes))
    policies = assembled.space.decode(genomes)
    macs = assembled.workload.plan.table.costs_of(policies)[0]
    policies = [policies[i] for i in np.argsort(-macs)]
    for pool in pools.values():
        pool.score(policies[:2], lambda _: None, never)
    rates: dict[int, list[float]] = {1: [], 2: []}
    busy: dict[int, list[float]] = {1: [], 2: []}
    gaps = []
    for _ in range(repetitions):
        for n, pool in pools.items():
            landed: list[Measurement] = []
            start = time.perf_counter()
            pool.score(policies, landed.append, never)
            wall = time.perf_counter() - start
            scoring = sum(measurement.seconds for measurement in landed)
            rates[n].append(len(landed) / wall)
            busy[n].append(scoring / (n * wall))
            if n == 1:
                gaps.append((wall - scoring) / len(landed))
    costs = ray_costs()
    ray.shutdown()
    rows = [
        [n, np.median(rates[n]), min(rates[n]), max(rates[n]), f"{np.median(busy[n]):.1%}"]
        for n in (1, 2)
    ]
    show(
        f"Real workers, {candidates} candidates, {repetitions} repetitions in turns",
        ["workers", "candidates/s", "least", "most", "busy"],
        rows,
    )
    ratio = float(np.median(np.array(rates[2]) / np.array(rates[1])))
    gap_ms = 1e3 * float(np.median(gaps))
    print(f"two workers over one: {ratio:.2f}; a worker waits {gap_ms:.2f} ms for the next one")
    print(f"Ray takes {costs['submit_ms']:.2f} + {costs['result_ms']:.2f} ms of the driver each\n")
    return {
        "candidates_per_s": {str(n): r for n, r in rates.items()},
        "busy_share": {str(n): b for n, b in busy.items()},
        "ratio": ratio,
        "gap_ms": gap_ms,
        "ray": costs,
    }


class Sleeper:
    """An actor that is many workers, all of which sleep."""

    async def ready(self) -> None:
        """Returns once it has started."""

    async def score(self, policy: Policy, _race: Race | None = None) -> Measurement:
        """Sleeps for the first count, in milliseconds."""
        seconds = policy.keep[0] / 1e3
        await asyncio.sleep(seconds)
        metrics = dict.fromkeys(METRICS, 0.1)
        return Measurement(policy=policy, status=Status.OK, metrics=metrics, seconds=seconds)


def sleepers(workers: int) -> RayTransport:
    """So many workers in two processes, on a cluster that is there already."""
    import ray

    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2 * workers}
    remote: Any = ray.remote(**options)(Sleeper)
    actors = [remote.remote() for _ in range(2)]
    ray.get([actor.ready.remote() for actor in actors])
    turns = iter(range(10**9))
    return RayTransport(lambda: actors[next(turns) % 2], workers)


def ray_costs(n: int = 300) -> dict[str, float]:
    """Milliseconds of the driver per call, beside 255 others that are under way."""
    transport = sleepers(256)
    others = [transport.submit(worker, Policy((20_000,))) for worker in range(255)]
    submit, fetch = [], []
    for _ in range(n):
        start = time.perf_counter()
        handle = transport.submit(255, Policy((1,)))
        submit.append(time.perf_counter() - start)
        time.sleep(0.005)
        start = time.perf_counter()
        while not transport.wait([*others, handle], 1.0):
            pass
        transport.result(handle)
        fetch.append(time.perf_counter() - start)
    transport.kill_all()
    return {
        "submit_ms": 1e3 * float(np.median(submit)),
        "result_ms": 1e3 * float(np.median(fetch)),
    }


# 2. Busy share.


@dataclass
class Cluster:
    """Scores through a dispatcher, and keeps what the generations were."""

    transport: Transport
    seconds: Durations
    generations: list[list[float]] = field(default_factory=list)
    total: float = 0.0
    """Seconds of all that landed."""

    def __post_init__(self) -> None:
        self._dispatcher = Dispatcher(self.transport, TIMEOUT_S)

    def score(
        self,
        policies: Sequence[Policy],
        record: Record,
        stop: Stop,
        races: Races = NO_RACES,
        ahead: Sequence[Policy] = (),
    ) -> None:
        """See Pool."""
        self.generations.append([self.seconds(policy) for policy in policies])

        def landed(measurement: Measurement) -> None:
            self.total += self.seconds(measurement.policy)
            record(measurement)

        self._dispatcher.score(policies, landed, stop, races, ahead)

    def walls(self) -> dict[str, float]:
        """Seconds that the same candidates take a driver without costs.

        `longest_first`: each generation as here, in simulated time. `any_schedule`: less no
        schedule can that waits for the end of each generation. `overlapping`: a generation is bred
        when the last but one is complete, while stragglers of the last are still scored.
        """
        workers = self.transport.workers
        longest_first = any_schedule = 0.0
        for seconds in self.generations:
            longest_first += makespan([seconds], workers, 1)
            falling = sorted(seconds, reverse=True)
            pair = falling[workers - 1] + falling[workers] if len(seconds) > workers else 0.0
            any_schedule += max(falling[0], sum(seconds) / workers, pair)
        return {
            "longest_first": longest_first,
            "any_schedule": any_schedule,
            "overlapping": makespan(self.generations, workers, 2),
        }


def makespan(generations: Sequence[Sequence[float]], workers: int, lag: int) -> float:
    """When all is done if a generation may begin once the one `lag` before it is complete."""
    free, ends = [0.0] * workers, [0.0] * lag
    for seconds in generations:
        released = end = ends[-lag]
        for duration in seconds:
            landing = max(free[0], released) + duration
            heapq.heapreplace(free, landing)
            end = max(end, landing)
        ends.append(end)
    return max(ends)


class Translated:
    """Ray's sleepers get their time in place of the policy."""

    def __init__(self, transport: RayTransport, seconds: Durations, formula: Formula) -> None:
        self._transport, self._seconds, self._formula = transport, seconds, formula
        self._policies: dict[Any, Policy] = {}
        self.slept_s = 0.0
        self.workers = transport.workers
        self.replace = transport.replace

    def wait(self, handles: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """See Transport. What comes back after less than a millisecond was there already."""
        start = time.perf_counter()
        done = self._transport.wait(handles, timeout_s)
        waited = time.perf_counter() - start
        self.slept_s += waited if waited > 1e-3 else 0.0
        return done

    def submit(self, worker: int, policy: Policy, _race: Race | None = None) -> Any:
        """See Transport."""
        handle = self._transport.submit(worker, Policy((round(1e3 * self._seconds(policy)),)))
        self._policies[handle] = policy
        return handle

    def result(self, handle: Any) -> Measurement:
        """See Transport."""
        slept = self._transport.result(handle)
        assert slept is not None  # noqa: S101  nothing is ever replaced here
        return self._formula(self._policies.pop(handle), slept.seconds)


def busy(
    assembled: Assembled, seconds: Durations, size: "Size", costs: dict[str, float]
) -> dict[str, Any]:
    kind, workers = size.kind, size.workers
    formula = Formula(assembled.workload.plan.table.channels)
    transport: Any
    if kind == "ray":
        transport = Translated(sleepers(workers), seconds, formula)
    else:
        transport = SimulatedCluster(
            workers,
            lambda policy: Fate(
                seconds=seconds(policy), measurement=formula(policy, seconds(policy))
            ),
            RealClock(),
            submit_s=costs["submit_ms"] / 1e3,
            result_s=costs["result_ms"] / 1e3,
        )
    cluster = Cluster(transport, seconds)
    budget = size.generations * size.population
    with (
        tempfile.TemporaryDirectory(prefix="evosearch-scaling-") as folder,
        Ledger.create(Path(folder), {}) as ledger,
    ):
        start, cpu = time.perf_counter(), time.process_time()
        search(assembled, ledger, cluster.score, budget, overlap=size.overlap)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    total = cluster.total
    # With overlap a call to score is no generation.
    walls = {} if size.overlap else cluster.walls()
    shares = {name: total / (workers * seconds) for name, seconds in walls.items()}
    return {
        "kind": f"{kind} + overlap" if size.overlap else kind,
        "workers": workers,
        "population": size.population,
        "candidates": budget,
        "wall_s": wall,
        "busy_share": total / (workers * wall),
        "possible_share": shares,
        "driver_ms_per_candidate": 1e3 * (wall - transport.slept_s) / budget,
        "driver_cpu_ms_per_candidate": 1e3 * cpu / budget,
        "load": os.getloadavg()[0],
    }


@dataclass(frozen=True)
class Size:
    """One row of the table."""

    kind: str
    workers: int
    generations: int
    population: int = POPULATION
    overlap: bool = False


def clusters(
    assembled: Assembled, seconds: Durations, costs: dict[str, float], sizes: Sequence[Size]
) -> list[dict[str, Any]]:
    found = []
    for size in sizes:
        if size.kind == "ray":
            import ray

            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        search_settings = assembled.recipe.search.model_copy(update={"population": size.population})
        recipe = assembled.recipe.model_copy(update={"search": search_settings})
        found.append(busy(replace(assembled, recipe=recipe), seconds, size, costs))
        last = found[-1]
        print(f"{size}: {last['busy_share']:.1%} in {last['wall_s']:.0f} s", flush=True)
        if size.kind == "ray":
            ray.shutdown()
    columns = ["workers", "kind", "popul.", "scored", "busy", "free driver", "any barrier"]
    columns += ["overlap", "driver ms", "cpu ms", "load"]
    rows = [
        [
            row["workers"],
            row["kind"],
            row["population"],
            row["candidates"],
            f"{row['busy_share']:.1%}",
            *([f"{share:.1%}" for share in row["possible_share"].values()] or ["", "", ""]),
            row["driver_ms_per_candidate"],
            row["driver_cpu_ms_per_candidate"],
            row["load"],
        ]
        for row in found
    ]
    show(f"Busy share, {seconds.scale:.3g} times the measured seconds", columns, rows)
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="one minute instead of several")
    made.add_argument("--seconds", type=float, default=1.0, help="mean of a simulated candidate")
    made.add_argument("--only", default="real,busy")
    options = made.parse_args()
    quick = options.quick
    only = set(options.only.split(","))
    found: dict[str, Any] = {"load_before": os.getloadavg(), "quick": quick}
    assembled = prepare(5_000)
    costs = {"submit_ms": 0.25, "result_ms": 0.15}
    if "real" in only:
        found["real"] = real(assembled, 4 if quick else 8, 1 if quick else 3)
        costs = found["real"]["ray"]
    if "busy" in only:
        seconds, found["durations"] = fit(assembled, 4 if quick else 12, options.seconds)
        found["ray_costs_spent"] = costs
        sizes = [
            Size("alarms", 64, 1),
            Size("alarms", 256, 2),
            Size("alarms", 256, 4, overlap=True),
        ]
        if not quick:
            sizes = [
                Size("alarms", 16, 1),
                Size("alarms", 64, 3),
                Size("alarms", 256, 6),
                Size("alarms", 256, 36, overlap=True),
                Size("alarms", 512, 6),
                Size("ray", 256, 4),
                Size("alarms", 256, 3, 2048),
            ]
        found["busy"] = clusters(assembled, seconds, costs, sizes)
    write("scaling", options.json, found)


if __name__ == "__main__":
    main()
