"""Networks of a run: cut, prepared as the proxy does, written as files that load again."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from evosearch.assembly import Assembled, assemble, assemble_again
from evosearch.errors import BackendError, ConfigError, DataError, NetworkError, out_of_memory
from evosearch.facts import read_facts
from evosearch.files import make_parent
from evosearch.ledger import Ledger
from evosearch.measurement import METRICS, Status
from evosearch.networks import Network, on_cpu, read_weights, write_portable
from evosearch.recipe import RunRecipe, change_recipe
from evosearch.results.export import Records, export, front_records
from evosearch.results.front import Results, Row, read_results
from evosearch.results.models import read_pruned, save_pruned
from evosearch.results.preparation import AS_SEARCHED, Preparation
from evosearch.scoring.devices import local_device
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload
from evosearch.training.baseline import trainable

__all__ = [
    "INDEX",
    "NetworkWriter",
    "chosen_row",
    "convert_network",
    "export_front",
    "export_network",
]

# What decides which channels go first.
_ORDERING = ("criterion", "coupling", "labels")
_COUNTS = ("recalibration_images", "reconstruction_images")
INDEX = "networks.csv"
"""The table beside the networks of a front."""


def chosen_row(results: Results, digits: str | None, run: Path) -> Row:
    """The measured policy that is meant.

    Args:
        results: Of the run.
        digits: The first digits of its digest; None for the one network of a front of one.
        run: Directory of the run, for messages.

    Raises:
        ConfigError: No such policy, or several; or it was not measured to the end.
    """
    if not digits:
        if len(results.front) == 1:
            return results.front[0]
        raise ConfigError(
            f"name the network with --policy; `evosearch export {quote(str(run))} front.csv` "
            "lists them"
        )
    # What the search dropped early, the ladder may have measured in full: the later entry wins.
    rows = sorted((*results.baseline, *results.rows), key=lambda row: row.status is Status.OK)
    distinct = {row.policy: row for row in rows}.values()
    found = [row for row in distinct if row.policy.digest.startswith(digits)]
    if len(found) != 1:
        raise ConfigError(
            f"--policy {digits}: {len(found) or 'no'} measured policies of {run} start like that"
        )
    if found[0].status is Status.DROPPED:
        raise ConfigError(f"--policy {digits}: that policy was dropped: {found[0].reason}")
    if found[0].status is not Status.OK:
        raise ConfigError(f"--policy {digits}: that policy failed: {found[0].reason}")
    return found[0]


def _workload(assembled: Assembled, preparation: Preparation) -> Workload:
    """The search's workload, prepared for that.

    Raises:
        ConfigError: Something does not fit together, or into memory.
    """
    known = assembled.workload
    if not preparation:
        return known
    before = assembled.recipe
    recipe = change_recipe(before, preparation.changes(), str(preparation))
    images = recipe.data.calibration
    for name in _COUNTS:
        wanted = preparation.settings.get(f"proxy.{name}")
        if wanted is not None and images is not None and wanted > images:
            raise ConfigError(
                f"--set proxy.{name}={wanted}: there are {images} calibration images; ask for more "
                "with --calibration"
            )
    try:
        criteria = assembled.criteria.names if assembled.criteria else ()
        latency = assembled.workload.plan.table.latency
        found = assemble(recipe, criteria, latency).workload
    except (ConfigError, DataError, NetworkError) as exc:
        raise ConfigError(f"{preparation}: {exc}") from exc
    except (RuntimeError, MemoryError) as exc:
        if not out_of_memory(exc):
            raise
        raise ConfigError(f"{preparation}: out of memory; name fewer images") from exc
    if any(getattr(recipe.proxy, name) != getattr(before.proxy, name) for name in _ORDERING):
        return found
    # The same channels go, however they were ranked on more images.
    return replace(found, places=known.places, blends=known.blends)


class NetworkWriter:
    """Prepares and writes one network after another of a run.

    Its `recipe`, `dense` network and the digest of that one's `weights` are the run's. Networks are
    measured `anew` if they are prepared in another way than in the search, or where that was on a
    GPU that is not here: fits on a CPU and on a GPU agree to some digits, and so do the networks.

    Args:
        run: Directory of the run.
        ledger: Its ledger.
        preparation: If not that of the search.

    Raises:
        ConfigError: They cannot be prepared like that.
        ConfigMismatch: Network or images are not the ones that were measured.
    """

    def __init__(self, run: Path, ledger: Ledger, preparation: Preparation) -> None:
        recorded = read_facts(ledger)
        # Where it was searched does not matter any more.
        recipe = recorded.recipe.model_copy(update={"run": RunRecipe(workers=0)})
        assembled = assemble_again(recorded, recipe, run)
        self._groups = recorded.groups
        self._preparation = preparation
        workload = _workload(assembled, preparation)
        self.recipe = recorded.recipe
        self.weights = recorded.weights
        self.dense = workload.network()
        self._table = workload.plan.table
        wanted = recorded.gpus_per_worker
        device = local_device(wanted)
        self._scorer = Scorer(workload, device)
        self._elsewhere = wanted > 0 and device == "cpu"
        self.anew = self._elsewhere or bool(preparation)

    @property
    def prepared(self) -> str:
        """How networks are prepared, in words."""
        searched = "as in the search, but on a CPU" if self._elsewhere else "as in the search"
        return str(self._preparation) or searched

    def described(self, row: Row) -> str:
        """A network of that policy, in words: what was cut, and what is left of its costs."""
        latency = row.values.get("latency")
        time = "" if latency is None else f"{latency:.1%} of the time, "
        if row.timed is not None:
            time = f"{row.timed:.1%} of the time ({latency:.1%} foreseen), "
        count = int(self._table.left_out(np.array([row.policy.keep])).sum())
        blocks = f", {count} block{'s' if count > 1 else ''} left out" if count else ""
        return (
            f"{self.dense.spec.name} with {time}{row.values['macs']:.1%} of the MACs and "
            f"{row.values['params']:.1%} of the parameters{blocks}"
        )

    def check(self, row: Row) -> None:
        """Raises if a policy cannot be prepared like that."""
        if row.policy.blend and "proxy.criterion" in self._preparation.settings:
            raise ConfigError(
                f"--set proxy.criterion: policy {row.policy.digest} says itself by which criteria "
                "its channels go; leave it out"
            )

    def prepare(self, row: Row) -> tuple[Network, Mapping[str, float]]:
        """The network of a measured policy, and its metrics on the validation images.

        It is valid until the next call, and on the CPU.

        Raises:
            ConfigError: It cannot be prepared like that.
        """
        self.check(row)
        if not self.anew:
            module = self._scorer.network_of(row.policy)
            network = replace(self.dense, module=on_cpu(module))
            return network, {name: row.values[name] for name in METRICS}
        measured = self._scorer.score(row.policy)
        if not measured.ok:
            less = "; name fewer images" if measured.status is Status.OUT_OF_MEMORY else ""
            raise ConfigError(f"{self.prepared}: {row.policy.digest}: {measured.reason}{less}")
        return replace(self.dense, module=on_cpu(self._scorer.network)), measured.metrics

    def trainable(self, row: Row) -> Network:
        """The network of a measured policy, to be trained: a copy that is the caller's own.

        Raises:
            ConfigError: As `prepare`.
        """
        found, _ = self.prepare(row)
        module = trainable(copy.deepcopy(found.module), like=self.dense.module)
        return replace(found, module=module)

    def save(self, row: Row, network: Network, file: Path, facts: Mapping[str, Any]) -> None:
        """Writes a network of that policy, with facts for people beside what loading needs."""
        costs: dict[str, Any] = {"macs": row.macs, "params": row.params}
        save_pruned(
            file, network, self._groups, row.policy, {**costs, "prepared": self.prepared, **facts}
        )

    def write(self, row: Row, file: Path) -> Mapping[str, float]:
        """Prepares and writes a network; returns its metrics, as `prepare` does."""
        network, metrics = self.prepare(row)
        self.save(row, network, file, {"validation_error": metrics["error"]})
        return metrics


def export_network(
    run: Path, file: Path, digits: str | None, preparation: Preparation = AS_SEARCHED
) -> str:
    """Writes the network of one measured policy, as the proxy left it before measuring.

    Args:
        run: Directory of the run.
        file: Ends with `.safetensors`, or one of `PORTABLE`.
        digits: The first digits of the policy's digest; None for a front of one.
        preparation: If not that of the search.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: No such policy, or several; or it cannot be prepared like that; or the file is
            a network that was trained.
        ConfigMismatch: Network or images are not the ones that were measured.
    """
    _check_not_trained(file)
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        row = chosen_row(results, digits, run)
        writer = NetworkWriter(run, ledger, preparation)
    found = 1 - writer.write(row, file)["error"]
    searched = 1 - row.values["error"]
    note = f" ({searched:.2%} as it was measured in the search)" if preparation else ""
    return f"{file}: {writer.described(row)}, validation top-1 {found:.2%}{note}"


def _check_not_trained(file: Path) -> None:
    """Refuses to write over what took hours."""
    if file.suffix != ".safetensors" or not file.is_file():
        return
    try:
        _, facts = read_weights(file)
    except NetworkError:  # nothing that anybody could miss
        return
    if "finetuned" in facts or "training_images" in facts:
        raise ConfigError(f"{file} is a network that was trained; remove it or name another file")


def convert_network(source: Path, file: Path) -> str:
    """Writes a network that `evosearch export` or `finetune` wrote, to run without evosearch.

    Args:
        source: Ends with `.safetensors`.
        file: Ends with one of `PORTABLE`.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: The file cannot have that name, or what writes it is not installed.
        NetworkError: The source is no such network, its architecture cannot be made here, or the
            network cannot be written like that.
    """
    network, facts = read_pruned(source)
    write_portable(network, file, facts)
    return f"{file}: {source}, to run without evosearch"


def export_front(
    run: Path,
    folder: Path,
    suffix: str = ".safetensors",
    preparation: Preparation = AS_SEARCHED,
    told: Callable[[str], None] = lambda _: None,
) -> str:
    """Writes every network of the front, named by its digest, and a table, `networks.csv`.

    The table has the columns of the front's, the name of each file, how it was prepared, and, where
    that is not as in the search, its metrics on the validation images (`prepared:error` and so on).
    It is written last: where it is, the networks that it names are. Other files in the folder,
    networks of an earlier front, say, are left alone.

    Args:
        run: Directory of the run.
        folder: Is made if need be.
        suffix: `.safetensors`, or one of `PORTABLE`.
        preparation: If not that of the search.
        told: Hears of each network that was written.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: Nothing was measured yet, the folder cannot be made, a network cannot be
            prepared like that, or what writes it is not installed.
        NetworkError: A network cannot be written like that.
        ConfigMismatch: Network or images are not the ones that were measured.
    """
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        if not results.front:
            raise ConfigError(f"{run} has no front yet: no policy was measured to the end")
        writer = NetworkWriter(run, ledger, preparation)
    for row in results.front:
        writer.check(row)
    make_parent(folder / INDEX)
    prepared: list[Mapping[str, float]] = []
    for count, row in enumerate(results.front, 1):
        file = folder / f"{row.policy.digest}{suffix}"
        prepared.append(writer.write(row, file))
        _remove(folder / INDEX)
        told(f"{count} of {len(results.front)}: {file}")
    index = _index(results, suffix, writer.prepared, prepared if writer.anew else [])
    export(index, folder / INDEX)
    least = "" if results.feasible else ", the least violating ones, as none is feasible"
    return f"{folder}: {len(results.front)} networks of the front{least}, and {INDEX}"


def _remove(index: Path) -> None:
    """Removes an old table: it may say of networks how they were prepared before."""
    try:
        index.unlink(missing_ok=True)
    except OSError as exc:
        raise BackendError(f"cannot replace {index}: {exc.strerror or exc}") from exc


def _index(results: Results, suffix: str, how: str, prepared: list[Mapping[str, float]]) -> Records:
    """The front's table, with files, and with metrics of networks that were prepared anew."""
    front = front_records(results)
    names = tuple(f"prepared:{name}" for name in METRICS) if prepared else ()
    rows = []
    for index, row in enumerate(front.rows):
        file = {"file": f"{row['policy']}{suffix}", "prepared": how}
        anew = {f"prepared:{key}": value for key, value in prepared[index].items()} if names else {}
        rows.append({**row, **file, **anew})
    return Records(("file", "prepared", *names, *front.columns), tuple(rows))
