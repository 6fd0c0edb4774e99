"""A study of proxies, from drawing policies to the table: every step continues where it ended.

DIR/fidelity.jsonl is the truth: policies, scores and fine-tuned networks as they landed. The
tables and the picture beside it are made from it at the end.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evosearch.assembly import Assembled, assemble
from evosearch.errors import ConfigError, ConfigMismatch
from evosearch.facts import read_facts
from evosearch.fidelity.comparison import Comparison, compare
from evosearch.fidelity.drawing import Band, draw, elite
from evosearch.fidelity.free import free_predictors
from evosearch.fidelity.journal import Journal
from evosearch.fidelity.truth import FineTuned, Truth, check_images, fine_tune_all, parts_of
from evosearch.fidelity.variants import FREE, RECIPE, Variant, choose, known_variants
from evosearch.fidelity.writing import write_files
from evosearch.latency import LatencyModel
from evosearch.ledger import Ledger
from evosearch.materials import source_of
from evosearch.measurement import Measurement, Status
from evosearch.policy import Policy
from evosearch.recipe import Recipe, change_recipe, load_recipe, parse_setting
from evosearch.run import Observer, StopSignal
from evosearch.scoring.proxies import proxy_named
from evosearch.scoring.workload import Workload

__all__ = ["Finished", "Options", "study", "subject"]

FEWEST = 5
_SIZES = ("data.calibration", "data.validation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how much of it.

    Args:
        policies: Per set.
        band: Where their MACs lie.
        truth: How they are fine-tuned.
        variants: Ways to score, by name.
        seed: Of the drawn policies, the resampling and the partitions.
        test: Whether the truth is measured on test images; None: if there are any.

    Raises:
        ConfigError: Too few policies to order, or fine-tuning starts from an unknown variant.
    """

    policies: int = 40
    band: Band = field(default_factory=lambda: Band(low=0.46, high=0.54))
    truth: Truth = field(default_factory=Truth)
    variants: Mapping[str, Variant] = field(default_factory=lambda: choose("all", ()))
    seed: int = 0
    test: bool | None = None

    def __post_init__(self) -> None:
        if self.policies < FEWEST:
            raise ConfigError(
                f"--policies {self.policies}: at least {FEWEST} are needed to compare orders"
            )
        if self.truth.start not in self._starts():
            raise ConfigError(
                f"--truth: start={self.truth.start} names no proxy variant; there are "
                f"{', '.join(self._starts())}"
            )

    def start(self) -> Variant:
        """The variant whose networks are fine-tuned."""
        return self._starts()[self.truth.start]

    def _starts(self) -> dict[str, Variant]:
        return {**known_variants(), **self.variants}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a study stands.

    Args:
        directory: Where it is kept.
        comparison: What could be compared.
        files: Written for people.
        interrupted: Whether Ctrl-C ended it early.
    """

    directory: Path
    comparison: Comparison
    files: tuple[Path, ...]
    interrupted: bool


def subject(
    name: str, settings: list[str] | None, overrides: Mapping[str, Any]
) -> tuple[Recipe, Path | None]:
    """The recipe of a study, and the run whose policies form the second set.

    Args:
        name: A recipe, or the directory of a run.
        settings: `key=value` changes.
        overrides: Dotted keys to values; None is skipped.

    Raises:
        EvosearchError: There is neither, or a change is wrong.
    """
    run = Path(name)
    if not run.is_dir():
        return load_recipe(name, settings or (), overrides), None
    with Ledger.open(run) as ledger:
        recipe = read_facts(ledger).recipe
    changes = dict(map(parse_setting, settings or ()))
    changes |= {key: value for key, value in overrides.items() if value is not None}
    return change_recipe(recipe, changes, f"the recipe of {run}"), run


def study(
    recipe: Recipe, run: Path | None, directory: Path, options: Options, observer: Observer
) -> Finished:
    """Draws, scores, fine-tunes and compares; what the journal knows is not done again.

    Args:
        recipe: The network, its images, and the proxy that fine-tuning starts from if the truth
            names no other.
        run: A run of that recipe, whose best policies form a second set; None for none.
        directory: Where journal, tables and picture are kept.
        options: What to compare.
        observer: Who watches.

    Raises:
        EvosearchError: Something is wrong with recipe, run, options or directory.
    """
    observer.phase(f"preparing {recipe.network.name}")
    # A study has no front to check, and its variants may want more images for validation.
    recipe = change_recipe(recipe, {"data.check": 0}, "the study")
    truth = options.truth.settled(gpu=recipe.run.gpus_per_worker > 0)
    options = replace(options, truth=truth)
    variants = _distinct(options.variants, recipe)
    check_images(recipe, options.truth)
    assembled = assemble(recipe, latency=None if run is None else _latency_of(run))
    start = _start(assembled, options)
    parts = parts_of(recipe, test=options.test)
    if options.test is None and "test" not in parts:
        observer.phase("the truth is measured on held-out images, as there are no test images")
    with Journal.open(directory, _settings(assembled, options, parts)) as journal:
        stop = StopSignal(observer)
        with _said_when_stopped(observer), stop.installed():
            sets = _policies(assembled, run, options, journal)
            everybody = list(dict.fromkeys(policy for chosen in sets.values() for policy in chosen))
            _register(variants, journal)
            for name, variant in variants.items():
                _score(name, variant, assembled, everybody, journal, stop, observer)
            _score_free(assembled, everybody, journal)
            tune = functools.partial(fine_tune_all, start, recipe, options.truth, parts)
            _fine_tune(tune, options.truth, everybody, journal, stop, observer)
        observer.phase("comparing")
        comparison = compare(
            journal,
            sets,
            assembled.workload.plan.table,
            variants=[*variants, FREE],
            seeds=options.truth.seeds,
            parts=parts,
            seed=options.seed,
        )
    files = write_files(comparison, directory)
    return Finished(
        directory=directory, comparison=comparison, files=files, interrupted=stop.requested
    )


@contextmanager
def _said_when_stopped(observer: Observer) -> Iterator[None]:
    """Whoever interrupts twice is told what becomes of the work."""
    try:
        yield
    except KeyboardInterrupt:
        observer.phase("stopped; what was found is recorded, and the same command continues")
        raise


def _settings(assembled: Assembled, options: Options, parts: tuple[str, ...]) -> dict[str, Any]:
    """All that decides what a record means; what concerns a search alone does not."""
    facts = assembled.facts()
    recipe = assembled.recipe.results_key()
    del recipe["search"], recipe["latency"], recipe["data"]["check"]
    return {
        "recipe": recipe,
        "macs": str(options.band),
        "seed": options.seed,
        "truth": {
            **options.truth.settings(),
            "on": list(parts),
            "start": dict(options.start().changes),
        },
        "images": {part: facts["images"][part] for part in ("calibration", "validation")},
        "weights": facts["weights"],
        "groups": [list(group) for group in facts["groups"]],
    }


def _policies(
    assembled: Assembled, run: Path | None, options: Options, journal: Journal
) -> dict[str, tuple[Policy, ...]]:
    """The sets by name. What was drawn once stays; larger sets begin with it."""
    table, n = assembled.workload.plan.table, options.policies
    known: dict[str, list[Policy]] = {"random": [], "elite": []}
    for record in journal.of_kind("policy"):
        known[record["set"]].append(Policy(tuple(record["keep"])))
    wanted: dict[str, tuple[Policy, ...]] = {}
    if len(known["random"]) < n:
        wanted["random"] = draw(assembled.space, table, options.band, n, options.seed)
    if run is not None and len(known["elite"]) < n:
        with Ledger.open(run) as ledger:
            wanted["elite"] = elite(ledger, table, options.band, n)
    if any(policy.blend for policies in wanted.values() for policy in policies):
        raise ConfigError(
            "fidelity compares policies by their widths, and these differ in blends of criteria, "
            "too; name a space without blends, such as --set space.name=layer-sparsity"
        )
    for name, policies in wanted.items():
        for policy in policies:
            if policy not in known[name] and len(known[name]) < n:
                journal.append("policy", set=name, keep=policy.keep)
                known[name].append(policy)
    return {name: tuple(policies[:n]) for name, policies in known.items() if policies}


def _check_sizes(changed: Mapping[str, Recipe], recipe: Recipe) -> None:
    """Checks that there are as many images as each variant asks for, before anything is scored.

    Raises:
        ConfigError: There are not; names the variant, and those that could be left.
    """
    source = source_of(recipe)
    there = {"validation": len(source.held_out().labels)}
    there["calibration"] = len(source.training().labels)
    short: dict[str, str] = {}
    for name, other in changed.items():
        for key, count in there.items():
            wanted = getattr(other.data, key)
            own = wanted == getattr(recipe.data, key)  # of which `assemble` tells
            if wanted is not None and not own and wanted > count:
                short[name] = f"{name} wants data.{key} = {wanted}, and there are {count} images"
    if short:
        left = [name for name in changed if name not in short]
        raise ConfigError(
            f"--proxies: {next(iter(short.values()))} in that part; name those that do with fewer: "
            f"--proxies {','.join(left)}"
        )


def _distinct(variants: Mapping[str, Variant], recipe: Recipe) -> dict[str, Variant]:
    """Without `recipe` where another variant is the very same, as nothing is learned from both.

    Raises:
        ConfigError: A variant sets what cannot be set; names it and the field.
    """
    changed = {
        name: change_recipe(recipe, variant.changes, f"proxy variant {name!r}")
        for name, variant in variants.items()
    }
    _check_sizes(changed, recipe)
    for other in changed.values():
        proxy_named(other.proxy.name)
    others = [other for name, other in changed.items() if name != RECIPE]
    return {
        name: variant
        for name, variant in variants.items()
        if name != RECIPE or changed[name] not in others
    }


def _register(variants: Mapping[str, Variant], journal: Journal) -> None:
    """Refuses a variant whose name stood for something else before."""
    known = {record["name"]: record["changes"] for record in journal.of_kind("variant")}
    for name, variant in variants.items():
        changes = dict(variant.changes)
        if name not in known:
            journal.append("variant", name=name, changes=changes)
        elif known[name] != changes:
            raise ConfigMismatch(
                f"the variant {name!r} meant {known[name]} in {journal.path.parent}, now it is "
                f"{changes}; give it another name, or name another --out"
            )


def _latency_of(run: Path) -> LatencyModel | None:
    """What was timed when a run was launched."""
    with Ledger.open(run) as ledger:
        return read_facts(ledger).latency


def _workload(assembled: Assembled, recipe: Recipe) -> Workload:
    """What a changed recipe prepares; made anew only if something has changed."""
    if recipe == assembled.recipe:
        return assembled.workload
    return assemble(recipe, latency=assembled.workload.plan.table.latency).workload


def _start(assembled: Assembled, options: Options) -> Workload:
    """Prepares the networks that are fine-tuned; now, as the journal will be bound to them.

    Raises:
        ConfigError: The start would calibrate on other images than the truth leaves it.
    """
    name, changes = options.truth.start, options.start().changes
    for key in changes:
        if not key.startswith("proxy.") and key not in _SIZES:
            raise ConfigError(
                f"--truth: start={name} sets {key}, and fine-tuning goes by the recipe's images; a "
                f"start may set keys of proxy, {' and '.join(_SIZES)}"
            )
    return _workload(assembled, change_recipe(assembled.recipe, changes, f"--truth: start={name}"))


def _score(
    name: str,
    variant: Variant,
    assembled: Assembled,
    policies: list[Policy],
    journal: Journal,
    stop: StopSignal,
    observer: Observer,
) -> None:
    from evosearch.scoring.pool import make_pool

    done = {
        tuple(record["keep"]) for record in journal.of_kind("score") if record["variant"] == name
    }
    missing = [policy for policy in policies if policy.keep not in done]
    if not missing or stop():
        return
    observer.phase(f"scoring {len(missing)} policies: {name}")
    recipe = change_recipe(assembled.recipe, variant.changes, f"proxy variant {name!r}")
    workload = _workload(assembled, recipe)
    count = len(done)

    def record(measurement: Measurement) -> None:
        nonlocal count
        count += 1
        journal.append(
            "score",
            variant=name,
            keep=measurement.policy.keep,
            status=measurement.status.value,
            metrics=dict(measurement.metrics),
            seconds=measurement.seconds,
            reason=measurement.reason,
        )
        observer.landed(name, measurement, count, len(policies))

    pool = make_pool(workload, recipe.run)
    stop.install()  # a cluster that is started here brings a SIGTERM handler of its own
    try:
        pool.score(missing, record, stop)
    finally:
        pool.close()


def _score_free(assembled: Assembled, policies: list[Policy], journal: Journal) -> None:
    done = {tuple(r["keep"]) for r in journal.of_kind("score") if r["variant"] == FREE}
    missing = [policy for policy in policies if policy.keep not in done]
    if not missing:
        return
    foretell = free_predictors(assembled.workload)
    for policy in missing:
        start = time.perf_counter()
        metrics = dict(foretell(policy))
        journal.append(
            "score",
            variant=FREE,
            keep=policy.keep,
            status=Status.OK.value,
            metrics=metrics,
            seconds=time.perf_counter() - start,
            reason=None,
        )


def _fine_tune(
    tune: Callable[..., None],
    truth: Truth,
    policies: list[Policy],
    journal: Journal,
    stop: StopSignal,
    observer: Observer,
) -> None:
    done = {(tuple(record["keep"]), record["seed"]) for record in journal.of_kind("truth")}
    # All policies once before any is repeated: an early table has as many policies as it can.
    wanted = [(policy, seed) for seed in range(truth.seeds) for policy in policies]
    missing = [(policy, seed) for policy, seed in wanted if (policy.keep, seed) not in done]
    if not missing or stop():
        return
    observer.phase(f"fine-tuning {len(missing)} networks, prepared as by {truth.start}")
    left = len(missing)

    def record(result: FineTuned) -> None:
        nonlocal left
        left -= 1
        journal.append(
            "truth",
            keep=result.policy.keep,
            seed=result.seed,
            numbers=dict(result.numbers),
            seconds=result.seconds,
            reason=result.reason,
        )
        told = result.reason or ", ".join(f"{k} {v:.4f}" for k, v in result.numbers.items())
        observer.phase(f"{result.policy.digest} {told} ({result.seconds:.0f} s; {left} left)")

    tune(missing, record, stop)
