"""Searching from Python, in a notebook say: what commands do, with objects for answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evosearch.exporting import Choice, export_file
from evosearch.ledger import Ledger
from evosearch.progress import Progress, Silence
from evosearch.recipe import load_recipe, recipe_of
from evosearch.results.export import frame, front_records, measurement_records
from evosearch.results.front import read_results
from evosearch.results.preparation import Preparation
from evosearch.status import read_status

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from evosearch.results.networks import NetworkWriter
    from evosearch.run import Finished

__all__ = ["Run", "launch"]


class Run:
    """A search on disk: to be looked at, also while it goes on elsewhere, continued, and used.

    Args:
        directory: Where it is.

    Raises:
        LedgerError: There is no usable run.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer: tuple[Preparation, NetworkWriter] | None = None
        Ledger.open(self.directory).close()

    def __repr__(self) -> str:
        """Where it is, and how far it has come."""
        now = self.status
        return (
            f"Run({str(self.directory)!r}): {now['state']}, {now['evaluations']} of "
            f"{now['budget']} policies, {now['front']} on the front"
        )

    @property
    def status(self) -> dict[str, Any]:
        """What `evosearch status --json` tells."""
        return read_status(self.directory)

    @property
    def front(self) -> "DataFrame":
        """The front by first objective, with the columns of `front.csv`."""
        with Ledger.open(self.directory) as ledger:
            return frame(front_records(read_results(ledger)))

    @property
    def measurements(self) -> "DataFrame":
        """All that was measured, in the order of asking, with failures and seconds."""
        with Ledger.open(self.directory) as ledger:
            return frame(measurement_records(read_results(ledger)))

    def resume(
        self,
        *,
        evaluations: int | None = None,
        workers: int | None = None,
        ray_address: str | None = None,
        quiet: bool = False,
    ) -> "Run":
        """Continues an interrupted search, or a finished one with a larger budget.

        Args:
            evaluations: The new budget.
            workers: Scorers on Ray from now on; 0 scores in this process.
            ray_address: Of a cluster to join.
            quiet: Say nothing on stderr.

        Returns:
            This run, so that it can be looked at in the same line.

        Raises:
            KeyboardInterrupt: It was stopped; what was measured is recorded.
            EvosearchError: It cannot go on; says why.
        """
        from evosearch.run import resume

        given = {"workers": workers, "ray_address": ray_address}
        options = {key: value for key, value in given.items() if value is not None}
        _whole(
            resume(self.directory, _observer(quiet), evaluations=evaluations, run_options=options)
        )
        return self

    def network(
        self,
        policy: str | None = None,
        *,
        calibration: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> "nn.Module":
        """A measured policy's network: narrower, as the search left it, to be run or trained.

        The first call takes as long as a launch takes to prepare, further ones a moment.

        Args:
            policy: First digits of its digest, which tables have under `policy`; None for a front
                of one.
            calibration: Training images to prepare it with, if not those of the search.
            changes: Keys of the recipe within `proxy` to other values, to prepare it otherwise:
                `{"proxy.criterion": "l1"}`.

        Returns:
            A network in float32 on the CPU, in evaluation mode, whose parameters are its own.

        Raises:
            ConfigError: There is no such policy, or it cannot be prepared like that.
            ConfigMismatch: Network or images are not the ones that were measured.
        """
        from evosearch.results.networks import NetworkWriter, chosen_row

        preparation = Preparation(calibration=calibration, settings=dict(changes or {}))
        with Ledger.open(self.directory) as ledger:
            row = chosen_row(read_results(ledger), policy, self.directory)
            if self._writer is None or self._writer[0] != preparation:
                writer = NetworkWriter(self.directory, ledger, preparation)
                self._writer = preparation, writer
        writer = self._writer[1]
        return writer.trainable(row).module

    def export(
        self,
        file: str | Path,
        policy: str | None = None,
        *,
        calibration: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes the front as a table or a picture, all its networks, or one network.

        Args:
            file: Ends with `.csv`, `.json`, `.parquet` or `.png`; with `.safetensors`, `.onnx` or
                `.pt2` for a network; a folder gets all networks of the front.
            policy: As for `network`.
            calibration: Likewise.
            changes: Likewise.

        Returns:
            The file.

        Raises:
            ConfigError: The suffix is unknown, or does not go with the other arguments.
        """
        preparation = Preparation(calibration=calibration, settings=dict(changes or {}))
        export_file(self.directory, Path(file), Choice(policy=policy), preparation)
        return Path(file)


def launch(
    recipe: str | Path | Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    seed_from: "Run | str | Path | None" = None,
    quiet: bool = False,
) -> Run:
    """Searches for pruning policies until the budget is spent.

    Args:
        recipe: A shipped recipe's name, a TOML file, or what such a file says as nested tables.
        changes: Dotted keys of the recipe to other values: `{"search.evaluations": 500}`.
        out: Directory of the run; `runs/NAME` if left out.
        seed_from: A run whose last population this one starts from.
        quiet: Say nothing on stderr.

    Returns:
        The run, finished.

    Raises:
        KeyboardInterrupt: It was stopped; `Run(directory).resume()` goes on where it was.
        ConfigError: Something in the recipe is wrong; names the field.
        EvosearchError: It cannot be carried out; says why.
    """
    from evosearch.run import launch as start
    from evosearch.run import new_run_directory

    if isinstance(recipe, Mapping):
        checked, name = recipe_of(recipe, changes), "search"
    else:
        checked, name = load_recipe(str(recipe), (), changes), str(recipe)
    seeds = seed_from.directory if isinstance(seed_from, Run) else seed_from
    directory = new_run_directory(name) if out is None else Path(out)
    finished = start(
        checked, directory, _observer(quiet), seed_from=None if seeds is None else Path(seeds)
    )
    _whole(finished)
    return Run(directory)


def _observer(quiet: bool) -> Progress | Silence:
    return Silence() if quiet else Progress()


def _whole(finished: "Finished") -> None:
    """Raises if a search was stopped: whoever asked for one would take a part for the whole."""
    if finished.interrupted:
        again = f"evosearch.Run({str(finished.directory)!r}).resume()"
        raise KeyboardInterrupt(f"{finished.outcome.reason}; {again} goes on")
