"""Does a search survive being killed? So many random kills of the quickstart, one after another.

One quickstart runs undisturbed. Another is killed with SIGKILL, the whole process tree, Ray's
processes included, after a random time counted from the moment it searches, and resumed, until it
has been killed so often (or has finished; then a fresh one is started). In the end the exported
CSV files must be equal byte for byte, and no measurement that was recorded before a kill may have
been scored again.

    python benchmarks/kills.py [--kills 20]
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from common import parser, show, write

from evosearch.ledger import Ledger


def evosearch(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "evosearch", *arguments], check=True, capture_output=True)


def landed(run: Path) -> list[tuple[str, str, float]]:
    if not (run / "ledger.sqlite").exists():
        return []
    with Ledger.open(run) as ledger:
        return [(d, str(m.metrics), m.seconds) for d, m in ledger.measurements().items()]


def kill_tree(process: subprocess.Popen[bytes]) -> int:
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    return len(family) + 1


@dataclass
class Victim:
    """Runs that are killed until one finishes, then another."""

    folder: Path
    recipe: str
    options: list[str]
    number: int = 0
    rescored: int = 0
    finished: list[Path] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run that is being killed."""
        return self.folder / f"killed-{self.number}"

    def _verb(self) -> list[str]:
        if landed(self.run):
            return ["resume", str(self.run)]
        if self.run.exists():
            shutil.rmtree(self.run)  # killed before anything was recorded: nothing to resume
        return ["launch", self.recipe, "--out", str(self.run)]

    def proceed(self, seconds: float) -> tuple[int, int, int] | None:
        """Kills after so long: processes, records before and after. None if it finished first."""
        before = landed(self.run)
        process = subprocess.Popen(
            [sys.executable, "-m", "evosearch", *self._verb(), *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            killed = kill_tree(process)
            after = landed(self.run)
            self.rescored += after[: len(before)] != before
            return killed, len(before), len(after)
        self.rescored += landed(self.run)[: len(before)] != before
        self.finished.append(self.run)
        self.number += 1
        return None


def exported(run: Path) -> bytes:
    evosearch("export", str(run), f"{run}.csv")
    return Path(f"{run}.csv").read_bytes()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--recipe", default="quickstart")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", default="2")
    options = made.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="evosearch-kills-"))
    common = ["--workers", options.workers]
    start = time.perf_counter()
    evosearch("launch", options.recipe, "--out", str(folder / "whole"), *common)
    undisturbed_s = time.perf_counter() - start
    wanted = exported(folder / "whole")
    victim = Victim(folder, options.recipe, common)
    rows: list[list[object]] = []
    while len(rows) < options.kills:
        moment = rng.uniform(2, undisturbed_s * 0.66)
        found = victim.proceed(moment)
        if found:
            rows.append([len(rows) + 1, f"{moment:.1f}", *found])
            print(*rows[-1], flush=True)
    while victim.run.exists() and victim.proceed(1e6):
        pass
    equal = sum(exported(run) == wanted for run in victim.finished)
    show(
        f"{options.kills} kills of {options.recipe}",
        ["kill", "after s", "processes", "recorded before", "recorded after"],
        rows,
    )
    runs = len(victim.finished)
    print(f"{equal} of {runs} killed runs export the same bytes as the undisturbed one")
    print(f"{victim.rescored} times a recorded measurement was scored again")
    write(
        "kills",
        options.json,
        {
            "recipe": options.recipe,
            "kills": len(rows),
            "killed_runs": runs,
            "equal_exports": equal,
            "rescored": victim.rescored,
            "undisturbed_seconds": undisturbed_s,
        },
    )
    shutil.rmtree(folder)
    sys.exit(equal != runs or victim.rescored > 0)


if __name__ == "__main__":
    main()
