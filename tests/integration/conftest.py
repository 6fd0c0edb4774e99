"""How integration tests run evosearch: as a user does, through the command line."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from evosearch import cli as commands
from evosearch.ledger import Ledger
from evosearch.measurement import Terms
from evosearch.search import SEARCH

TINY = Path(__file__).with_name("tiny.py")

RECIPE = f"""
[network]
name = "{TINY}:NETWORK"
input_shape = [3, 32, 32]
mean = [0.49, 0.48, 0.45]
std = [0.25, 0.24, 0.26]

[data]
calibration = 128
validation = 200

[search]
objectives = ["divergence", "macs"]
population = 8
evaluations = 40
baseline = 4

[run]
workers = 0
"""


class Cli:
    """Runs `python -m evosearch` in a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, script: bool = False) -> subprocess.Popen[str]:
        """Starts a command in a process group of its own, as a module or by its script."""
        name = [str(Path(sys.executable).with_name("evosearch"))]
        process = subprocess.Popen(
            [*(name if script else [sys.executable, "-m", "evosearch"]), *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(
        self, *arguments: str, code: int = 0, script: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and checks its exit code."""
        process = self.start(*arguments, script=script)
        out, err = process.communicate(timeout=300)
        return _checked(arguments, process.returncode, code, out, err)

    def here(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """As `run`, but in this process, since starting another takes longer than most commands.

        Not for what is stopped, nor for what goes on after it: there, processes matter.
        """
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, chdir(self.folder):
            patch.setattr(sys, "argv", ["evosearch", *arguments])
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
                commands.main()
        return _checked(arguments, int(ended.value.code or 0), code, out.getvalue(), err.getvalue())

    def wait_for(self, process: subprocess.Popen[str], run: Path, measurements: int) -> None:
        """Returns when a run's ledger holds so many measurements."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            if (run / "ledger.sqlite").exists():
                with Ledger.open(run) as ledger:
                    entries = [
                        entry
                        for terms in (Terms.FULL, Terms.RACED)
                        for entry in ledger.entries(SEARCH, terms=terms)
                    ]
                    if sum(entry.measurement is not None for entry in entries) >= measurements:
                        return
            time.sleep(0.01)
        raise AssertionError(f"no {measurements} measurements in time")

    def close(self) -> None:
        """Ends what is left."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _checked(
    arguments: tuple[str, ...], found: int, wanted: int, out: str, err: str
) -> subprocess.CompletedProcess[str]:
    assert found == wanted, f"{arguments}: {found}\n{out}\n{err}"
    assert "Traceback" not in err
    return subprocess.CompletedProcess(arguments, found, out, err)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    runner = Cli(tmp_path)
    yield runner
    runner.close()


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    """Writes the tiny recipe with another network, and returns its file name."""

    def write(network: str = "Tiny", more: str = "") -> str:
        path = tmp_path / f"{network.lower()}.toml"
        path.write_text(RECIPE.replace("NETWORK", network) + more)
        return path.name

    return write


@pytest.fixture
def run(cli: Cli, recipe: Callable[..., str]) -> Path:
    """A finished run of the tiny recipe."""
    cli.here("launch", recipe(), "--out", "run", "--evaluations", "20")
    return cli.folder / "run"


@pytest.fixture
def refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that ends with exit code 2, and returns the sentence that it says."""
    monkeypatch.chdir(cli.folder)

    def run(*arguments: str, code: int = 2) -> str:
        said = cli.here(*arguments, code=code).stderr
        sentence = "\n".join(line for line in said.splitlines() if not line.startswith("["))
        assert 1 <= len(sentence.splitlines()) <= 2, said
        return sentence

    return run
