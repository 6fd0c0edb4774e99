"""A run: the directory of one search, from launch through interruptions to its front.

RUN/ledger.sqlite is the truth: recipe, facts and measurements. RUN/recipe.toml is the recipe with
all defaults written out, to read or to launch again; RUN/front.csv and RUN/front.png are made when
the search ends.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from evosearch.algorithms import RANKING, SURROGATE
from evosearch.assembly import Assembled, assemble, assemble_again
from evosearch.checking import check_front, time_front
from evosearch.errors import (
    BudgetUnreachable,
    ConfigError,
    ConfigMismatch,
    EvosearchError,
    NetworkError,
    RunExists,
    first_line,
    out_of_memory,
)
from evosearch.facts import RunFacts, read_facts
from evosearch.files import write_atomically
from evosearch.ledger import Ledger, check_new, leftovers
from evosearch.locks import LOCK_FILE
from evosearch.measurement import Measurement
from evosearch.networks import check_repeatable
from evosearch.recipe import Recipe, load_recipe
from evosearch.results.export import export, front_records
from evosearch.results.front import Results, read_results
from evosearch.search import BASELINE, SEARCH, Outcome, Scoring, Search
from evosearch.snapshots import snapshot_stamp
from evosearch.starting import begins_with_rankings, ranked_by_channels, seeds_of_run
from evosearch.strategy import Beginning, algorithm_of, goals_of, wants_latency

__all__ = ["Finished", "Observer", "StopSignal", "launch", "new_run_directory", "resume"]


_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Observer(Protocol):
    """Who watches a run."""

    def phase(self, text: str) -> None:
        """A new phase has begun."""

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        """A measurement landed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run stands.

    Args:
        directory: The run.
        outcome: Of the search.
        results: What was measured.
        interrupted: Whether it was stopped before all that belongs to a run was complete.
        files: What was written for people.
    """

    directory: Path
    outcome: Outcome
    results: Results
    interrupted: bool
    files: tuple[Path, ...]


class StopSignal:
    """Ctrl-C once: finish what is in flight. Twice: stop now."""

    def __init__(self, observer: Observer) -> None:
        self.requested = False
        self._observer = observer

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.requested

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._observer.phase("stopping: finishing what is in flight; Ctrl-C again to stop now")

    @staticmethod
    def _ours() -> tuple[signal.Signals, ...]:
        """Other threads may handle no signals, and are not sent any."""
        return _STOPPING if threading.current_thread() is threading.main_thread() else ()

    def install(self) -> None:
        """Handles SIGINT and SIGTERM from now on, whoever did before; in the main thread alone."""
        for number in self._ours():
            signal.signal(number, self._handle)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM meanwhile."""
        before = [signal.getsignal(number) for number in self._ours()]
        self.install()
        try:
            yield
        finally:
            for number, handler in zip(self._ours(), before, strict=True):
                signal.signal(number, handler)


def new_run_directory(recipe: str) -> Path:
    """`runs/NAME`, or the first of `runs/NAME-2`, ... that does not exist."""
    base = Path("runs") / Path(recipe).stem
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _check_free(run: Path) -> None:
    check_new(run)
    ours = {LOCK_FILE, *(path.name for path in leftovers(run))}
    if run.exists() and (not run.is_dir() or any(p.name not in ours for p in run.iterdir())):
        raise RunExists(f"{run} exists and is not empty; name another --out")


def launch(
    recipe: Recipe, directory: Path, observer: Observer, *, seed_from: Path | None = None
) -> Finished:
    """Starts a run in a directory of its own and searches until the budget is spent.

    Raises:
        RunExists: The directory is not free.
        EvosearchError: The recipe cannot be carried out.
    """
    _check_free(directory)
    timing = ", timing networks of many widths" if wants_latency(recipe, goals_of(recipe)) else ""
    observer.phase(f"preparing {recipe.network.name}{timing}")
    assembled = assemble(recipe, settles_widths=True)
    if recipe.network.weights is None:
        check_repeatable(assembled.workload.network())
    _announce(assembled, observer)
    begins = _beginning(assembled, seed_from, recipe.search.rankings is None, observer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--out: {directory} cannot be made: {exc.strerror}") from exc
    facts = {
        **assembled.facts(),
        "seeds": begins.seeds,
        "ranked": begins.ranked,
        "losses": begins.losses,
        "evaluations": recipe.search.evaluations,
        "state": "running",
    }
    with Ledger.create(directory, facts) as ledger:
        text = assembled.recipe.to_toml()
        write_atomically(directory / "recipe.toml", lambda scratch: scratch.write_text(text))
        return _drive(assembled, ledger, directory, observer)


def _beginning(
    assembled: Assembled, seed_from: Path | None, left_open: bool, observer: Observer
) -> Beginning:
    """What another run found, or what rankings give; no rankings if they fail and may."""
    seeds = seeds_of_run(seed_from, assembled) if seed_from else []
    name = assembled.recipe.search.algorithm
    # What another run found is ahead of what rankings give, but for guesses of losses.
    if seed_from and name != SURROGATE:
        return Beginning(seeds=seeds)
    if begins_with_rankings(assembled):
        observer.phase("ranking channels")
    try:
        begins = ranked_by_channels(assembled)
    except (NetworkError, MemoryError, RuntimeError) as exc:
        may_fail = (left_open or seed_from) and name != RANKING
        if not may_fail or not (isinstance(exc, NetworkError) or out_of_memory(exc)):
            raise
        observer.phase(f"the search begins without rankings of channels: {first_line(exc)}")
        begins = Beginning()
    return replace(begins, seeds=seeds, ranked=()) if seed_from else begins


def resume(
    directory: Path,
    observer: Observer,
    *,
    evaluations: int | None = None,
    run_options: dict[str, Any] | None = None,
) -> Finished:
    """Continues a run where its ledger ends.

    Args:
        directory: The run.
        observer: Who watches.
        evaluations: A new budget; larger than before continues a finished search.
        run_options: Replacements within the recipe's `[run]` table.

    Raises:
        LedgerError: There is no usable run.
        ConfigMismatch: Recipe, images, weights or groups are not what they were.
    """
    with Ledger.open(directory, write=True) as ledger:
        recorded = read_facts(ledger)
        recipe = recorded.recipe
        _check_unchanged(recipe, directory)
        options = dict(run_options or {})
        if options.get("workers") == 0:
            options.setdefault("ray_address", None)  # of no use without workers
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=options)})
        before = recorded.evaluations
        if evaluations is not None and evaluations < before:
            raise ConfigError(
                f"--evaluations {evaluations} is less than the {before} this run was to make; "
                "leave it out or name more"
            )
        observer.phase(f"preparing {recipe.network.name}")
        assembled = assemble_again(recorded, recipe, directory)
        _announce(assembled, observer)
        ledger.set_meta("evaluations", evaluations or before)
        ledger.set_meta("resumed_with_workers", recipe.run.workers)
        if recipe.run.gpus_per_worker > 0:
            ledger.set_meta("resumed_on_gpus", recipe.run.gpus_per_worker)
        ledger.set_meta("state", "running")
        return _drive(assembled, ledger, directory, observer)


def _announce(assembled: Assembled, observer: Observer) -> None:
    data = assembled.recipe.data
    observer.phase(
        f"{data.calibration} calibration and {data.validation} validation images of {data.name}"
    )
    table = assembled.workload.plan.table
    if table.latency is not None:
        observer.phase(f"latency: {table.latency.told(table.fewest)}")
    for doubt in assembled.doubts():
        observer.phase(doubt)


def _check_unchanged(recipe: Recipe, directory: Path) -> None:
    """A recipe edited inside a run is a misunderstanding worth a sentence."""
    path = directory / "recipe.toml"
    if not path.exists():
        return
    found = _flat(load_recipe(str(path)).results_key())
    recorded = _flat(recipe.results_key())
    for key in sorted(found.keys() | recorded.keys()):
        if found.get(key) != recorded.get(key):
            raise ConfigMismatch(
                f"{path} says {key} = {found.get(key)!r}, but this run was made with "
                f"{recorded.get(key)!r}; launch a new run for another recipe"
            )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _drive(assembled: Assembled, ledger: Ledger, directory: Path, observer: Observer) -> Finished:
    """The search, the uniform ladder beside it, the front on other images, files for people."""
    facts = read_facts(ledger)
    stop = StopSignal(observer)
    lazy = _LazyPool(assembled, observer, stop)
    with stop.installed(), _recorded_stop(ledger, observer):
        with lazy as pool:
            scoring = Scoring(
                table=assembled.workload.plan.table,
                goals=assembled.goals,
                worst=facts.worst,
                score=pool.score,
                stop=stop,
                racing=assembled.recipe.search.racing,
                overlap=assembled.recipe.search.overlap,
                snapshots=snapshot_stamp(assembled.space),
            )
            outcome = _search(assembled, ledger, scoring, observer, facts)
            if outcome.finished and assembled.recipe.search.baseline and outcome.evaluations:
                outcome = _with_baseline(outcome, _baseline(assembled, ledger, scoring, observer))
        # The pool is closed: the check may need its GPU.
        if outcome.finished and outcome.evaluations and assembled.recipe.data.check:
            observer.phase(f"measuring the front on {assembled.recipe.data.check} other images")
            if not check_front(assembled, ledger, stop):
                reason = "stopped before the front was measured on other images"
                outcome = replace(outcome, finished=False, reason=reason)
        if outcome.finished and not _timed(assembled, ledger, observer, stop):
            reason = "stopped before the front was timed"
            outcome = replace(outcome, finished=False, reason=reason)
    ledger.set_meta("state", "finished" if outcome.finished else "interrupted")
    ledger.set_meta("reason", outcome.reason)
    if outcome.finished and not outcome.evaluations:
        raise BudgetUnreachable(
            f"nothing was measured: of all that {assembled.recipe.search.algorithm} asked for, no "
            f"policy satisfies {' and '.join(map(str, assembled.goals.cost_constraints))} "
            f"({outcome.reason}); loosen search.constraints or [space] and launch a new run"
        )
    results = read_results(ledger)
    table, picture = directory / "front.csv", directory / "front.png"
    if results.rows:
        from evosearch.results.plots import plot_front

        export(front_records(results), table)
        write_atomically(picture, lambda scratch: plot_front(results, scratch))
    return Finished(
        directory=directory,
        outcome=outcome,
        results=results,
        interrupted=not outcome.finished,
        files=(table, picture) if results.rows else (),
    )


def _timed(
    assembled: Assembled, ledger: Ledger, observer: Observer, stop: Callable[[], bool]
) -> bool:
    """Times the front where latency counts; whether nothing is left to be timed."""
    if assembled.workload.plan.table.latency is None:
        return True
    observer.phase("timing the networks of the front")
    try:
        return time_front(assembled, ledger, stop)
    except ConfigError as exc:
        # The search is done, and a clock that is gone is no reason to withhold it.
        observer.phase(f"the front was not timed: {exc}")
        return True


@contextmanager
def _recorded_stop(ledger: Ledger, observer: Observer) -> Iterator[None]:
    """Being stopped at once, or by an error, is an end of its own, not a kill."""
    try:
        yield
    except KeyboardInterrupt:
        ledger.set_meta("state", "interrupted")
        observer.phase("stopped; what was measured is recorded")
        raise
    except EvosearchError as exc:
        with suppress(EvosearchError):  # of a full disk the first is told
            ledger.set_meta("reason", str(exc))
            ledger.set_meta("state", "interrupted")
        raise


def _with_baseline(search: Outcome, baseline: Outcome) -> Outcome:
    """How both together ended: a run whose ladder is missing is not finished."""
    if baseline.finished:
        return search
    return replace(search, finished=False, reason=f"{baseline.reason} in the uniform ladder")


def _landing(observer: Observer, track: str, budget: int) -> Callable[[Measurement, int], None]:
    def landed(measurement: Measurement, count: int) -> None:
        observer.landed(track, measurement, count, budget)

    return landed


def _search(
    assembled: Assembled, ledger: Ledger, scoring: Scoring, observer: Observer, facts: RunFacts
) -> Outcome:
    space, table = assembled.space, assembled.workload.plan.table
    begins = Beginning(seeds=facts.seeds, ranked=facts.ranked, losses=facts.losses)
    algorithm = algorithm_of(assembled.recipe, space, assembled.goals, table, begins)
    search = Search(assembled.space, algorithm, scoring, ledger)
    return search.run(facts.evaluations, _landing(observer, SEARCH, facts.evaluations))


def _baseline(
    assembled: Assembled, ledger: Ledger, scoring: Scoring, observer: Observer
) -> Outcome:
    settings = assembled.recipe.search
    recipe = assembled.recipe.model_copy(
        update={"search": settings.model_copy(update={"algorithm": "uniform", "options": {}})}
    )
    table = assembled.workload.plan.table
    algorithm = algorithm_of(recipe, assembled.space, assembled.goals, table)
    search = Search(assembled.space, algorithm, scoring, ledger, track=BASELINE)
    return search.run(settings.baseline, _landing(observer, BASELINE, settings.baseline))


class _LazyPool:
    """Starts the pool when the first unknown policy turns up: replays need no scorers."""

    def __init__(self, assembled: Assembled, observer: Observer, stop: StopSignal) -> None:
        self._assembled = assembled
        self._observer = observer
        self._stop = stop
        self._pool: Any = None

    def __enter__(self) -> "_LazyPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def score(self, *arguments: Any) -> None:
        """See Pool."""
        if self._pool is None:
            from evosearch.scoring.pool import make_pool

            settings = self._assembled.recipe.run
            if settings.workers:
                self._observer.phase(f"starting {settings.workers} workers")
            try:
                self._pool = make_pool(self._assembled.workload, settings)
            except SystemExit as exc:  # what Ray makes of SIGTERM while it starts
                raise KeyboardInterrupt from exc
            # A cluster that is started here brings a SIGTERM handler of its own, which aborts.
            self._stop.install()
            self._observer.phase("searching")
        self._pool.score(*arguments)
