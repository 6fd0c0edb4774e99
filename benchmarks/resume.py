"""How long does it take to go on with a long search, and does its driver's memory stay flat?

Two searches by quickstart's recipe (ResNet-20), whose measurements take no time: NSGA-II with a
population of 512 and 100,000 measurements (goal: 10 s), and the surrogate that the recipe ships
with, 8 at a time, 1,000 of them. Timed from `resume` to the moment at which the first unknown
policy is to be scored, in a fresh process, imports aside: as it is, with the snapshot that the
search left when it ended; and without one, which is what a change of libraries costs, by a replay
of the whole search. Beside it the memory of the driver while the measurements were made.

    python benchmarks/resume.py [--quick] [--repetitions 2]

The machine must be idle. The load is in the JSON.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import parser, show, write
from scaling import POPULATION, Formula, prepare, search

from evosearch.assembly import Assembled
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.run import resume
from evosearch.scoring.dispatch import Record

EVERY = 10_000  # measurements between two looks at the memory


@dataclass(frozen=True, kw_only=True)
class Long:
    """A long search.

    Args:
        algorithm, population: Of the recipe.
        measurements: How many it has made.
    """

    algorithm: str
    population: int
    measurements: int


LONG = (
    Long(algorithm="nsga2", population=POPULATION, measurements=100_000),
    Long(algorithm="surrogate", population=8, measurements=1_000),
)
QUICK = (
    Long(algorithm="nsga2", population=POPULATION, measurements=5_000),
    Long(algorithm="surrogate", population=8, measurements=100),
)


def grow(assembled: Assembled, run: Path, n: int) -> dict[str, Any]:
    """Makes a run of so many measurements, in no time each, and watches the memory."""
    formula = Formula(assembled.workload.plan.table.channels)
    process = psutil.Process()
    samples: list[tuple[int, float]] = []

    def score(policies: Sequence[Policy], record: Record, *_: object) -> None:
        for policy in policies:
            record(formula(policy, 0.5))

    def seen(_measurement: Measurement, count: int) -> None:
        if count % (n // 10 if n < EVERY else EVERY) == 0:
            samples.append((count, process.memory_info().rss / 2**20))

    facts = {**assembled.facts(), "seeds": [], "evaluations": n, "state": "interrupted"}
    run.mkdir()
    (run / "recipe.toml").write_text(assembled.recipe.to_toml())
    start, cpu = time.perf_counter(), time.process_time()
    with Ledger.create(run, facts) as ledger:
        search(assembled, ledger, score, n, seen)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    counts, megabytes = np.array(samples[1:]).T
    return {
        "measurements": n,
        "wall_s": wall,
        "driver_ms_per_candidate": 1e3 * wall / n,
        "driver_cpu_ms_per_candidate": 1e3 * cpu / n,
        "rss_mb": samples,
        "rss_mb_per_10000": float(np.polyfit(counts, megabytes, 1)[0] * 10_000),
        "ledger_mb": (run / "ledger.sqlite").stat().st_size / 2**20,
    }


class Ready(Exception):
    """The first unknown policy is to be scored."""


class Watch:
    """An observer that leaves when scorers are about to be started."""

    def phase(self, text: str) -> None:
        """A new phase has begun."""
        if text.startswith("starting"):
            raise Ready

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        """A measurement landed."""


def time_resume(run: Path, n: int) -> None:
    """In a process of its own: `resume` until it is ready; prints JSON."""
    import evosearch.run as run_module

    start, cpu = time.perf_counter(), time.process_time()
    replay: list[float] = []
    drive = run_module._drive

    def timed(*arguments: Any) -> Any:
        replay.extend([time.perf_counter(), time.process_time()])
        return drive(*arguments)

    run_module._drive = timed  # type: ignore[assignment]
    try:
        resume(run, Watch(), evaluations=n + POPULATION)
    except Ready:
        end, cpu_end = time.perf_counter(), time.process_time()
        found = {
            "resume_s": end - start,
            "resume_cpu_s": cpu_end - cpu,
            "replay_s": end - replay[0],
            "replay_cpu_s": cpu_end - replay[1],
            "rss_mb": psutil.Process().memory_info().rss / 2**20,
            "load": os.getloadavg()[0],
        }
        print(json.dumps(found))


def forget(run: Path) -> None:
    """Deletes the snapshots of a run; a replay leaves new ones."""
    with closing(sqlite3.connect(run / "ledger.sqlite")) as db:
        db.execute("DELETE FROM snapshots")
        db.commit()


def timings(run: Path, n: int, repetitions: int, *, replay: bool) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--resume", str(run), "--measurements", str(n)]
    found = []
    for _ in range(repetitions):
        if replay:
            forget(run)
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(made.stdout.splitlines()[-1]))
    return found


def measure(long: Long, repetitions: int) -> dict[str, Any]:
    """Makes a long search and resumes it, both ways."""
    n = long.measurements
    assembled = prepare(n, long.algorithm, long.population)
    with tempfile.TemporaryDirectory(prefix="evosearch-resume-") as folder:
        run = Path(folder) / "run"
        grown = grow(assembled, run, n)
        restored = timings(run, n, repetitions, replay=False)
        replayed = timings(run, n, repetitions, replay=True)
    memory = ", ".join(f"{megabytes:.0f}" for _, megabytes in grown["rss_mb"])
    print(f"{long.algorithm}: memory of the driver {memory} MB, {grown['rss_mb_per_10000']:.2f} MB")
    print(f"for each 10,000; {grown['driver_ms_per_candidate']:.2f} ms for each candidate\n")
    return {"algorithm": long.algorithm, **grown, "restored": restored, "replayed": replayed}


def seconds(resumes: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{r[key]:.1f}" for r in resumes)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="short ledgers, one repetition")
    made.add_argument("--repetitions", type=int, default=2)
    made.add_argument("--measurements", type=int, help="(internal) of the run that is resumed")
    made.add_argument("--resume", type=Path, help="(internal) time the resume of this run")
    options = made.parse_args()
    if options.resume:
        time_resume(options.resume, options.measurements)
        return
    repetitions = 1 if options.quick else options.repetitions
    found = [measure(long, repetitions) for long in (QUICK if options.quick else LONG)]
    rows = [
        [
            f"{r['algorithm']}, {r['measurements']:,}, {r['ledger_mb']:.0f} MB",
            way,
            *(seconds(r[way], key) for key in ("resume_s", "resume_cpu_s", "replay_s", "load")),
        ]
        for r in found
        for way in ("restored", "replayed")
    ]
    show(
        "From `resume` to the first unknown policy",
        ["ledger", "how", "seconds", "of the processor", "the search's part", "load"],
        rows,
    )
    write("resume", options.json, {"quick": options.quick, "ledgers": found})


if __name__ == "__main__":
    main()
