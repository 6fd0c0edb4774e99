"""The work behind `evosearch export`: which table, picture or network goes into which file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evosearch.errors import ConfigError
from evosearch.files import PORTABLE, write_atomically
from evosearch.ledger import Ledger
from evosearch.results.export import (
    Records,
    export,
    front_records,
    measurement_records,
    population_records,
)
from evosearch.results.front import Results, read_results
from evosearch.results.preparation import AS_SEARCHED, Preparation

__all__ = ["FRONT", "SUFFIXES", "Choice", "export_file"]

_NETWORKS = (".safetensors", *PORTABLE)
SUFFIXES = (".csv", ".json", ".parquet", ".png", *_NETWORKS)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a run is wanted, where that is not its front, or not in the usual form.

    Args:
        everything: Every measurement instead of the front.
        generation: The population after this generation instead of the front.
        policy: First digits of the network to write.
        kind: Suffix of the networks in a folder, with or without its dot.

    Raises:
        ConfigError: Several exclude each other, or there are no such networks.
    """

    everything: bool = False
    generation: int | None = None
    policy: str | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        given = {
            "--all": self.everything,
            "--generation": self.generation is not None,
            "--policy": self.policy is not None,
        }
        chosen = [name for name, is_given in given.items() if is_given]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other")
        if self.suffix not in _NETWORKS:
            raise ConfigError(f"--as {self.kind}: networks are written as {_either(_NETWORKS)}")

    @property
    def suffix(self) -> str:
        """Of the networks in a folder."""
        return _NETWORKS[0] if self.kind is None else f".{self.kind.removeprefix('.')}"


FRONT = Choice()
"""The front, as usual."""


def _either(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _records(results: Results, ledger: Ledger, choice: Choice) -> Records:
    if choice.generation is not None:
        members = ledger.population(choice.generation)
        if not members:
            raise ConfigError(
                f"--generation {choice.generation}: {ledger.path.parent} has none recorded"
            )
        return population_records(results, members)
    return measurement_records(results) if choice.everything else front_records(results)


def export_file(
    run: Path,
    file: Path,
    choice: Choice = FRONT,
    preparation: Preparation = AS_SEARCHED,
    told: Callable[[str], None] = lambda _: None,
) -> str:
    """Writes one file from a run, or the networks of its front, also while it is being searched.

    Args:
        run: Directory of the run; or a network that was exported or fine-tuned, to be written so
            that it runs without evosearch.
        file: Its suffix decides what is written; a folder, or a name without a suffix, gets all
            networks of the front.
        choice: What of it.
        preparation: How networks are prepared.
        told: Hears of each network of a front that was written.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: The suffix is unknown, or does not go with the options.
        LedgerError: There is no usable run.
    """
    folder = file.is_dir() or not file.suffix
    networks = folder or file.suffix in _NETWORKS
    if not folder and file.suffix not in SUFFIXES:
        raise ConfigError(
            f"{file} must end with one of {', '.join(SUFFIXES)}, or be a folder for the front's "
            "networks: one that is there, or a name without a dot"
        )
    if choice.kind is not None and not folder:
        raise ConfigError(f"--as is for folders: {file} says itself what it is")
    if choice.policy is not None and (folder or not networks):
        raise ConfigError(f"--policy writes a network: FILE must end with {_either(_NETWORKS)}")
    if preparation and not networks:
        raise ConfigError(
            f"{preparation} prepares networks: FILE must end with {_either(_NETWORKS)}, or be a "
            "folder"
        )
    if (networks or file.suffix == ".png") and (choice.everything or choice.generation is not None):
        raise ConfigError(f"--all and --generation write tables, {file} is none")
    if networks or _is_network(run):
        return _export_networks(run, file, choice.policy, choice.suffix, preparation, told)
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        if file.suffix == ".png":
            from evosearch.results.plots import plot_front

            write_atomically(file, lambda scratch: plot_front(results, scratch))
            return f"{file}: {len(results.front)} of {len(results.rows)} policies on the front"
        records = _records(results, ledger, choice)
    export(records, file)
    return f"{file}: {len(records.rows)} policies"


def _is_network(run: Path) -> bool:
    return run.suffix == ".safetensors" and not run.is_dir()


def _export_networks(
    run: Path,
    file: Path,
    policy: str | None,
    suffix: str,
    preparation: Preparation,
    told: Callable[[str], None],
) -> str:
    from evosearch.results.networks import convert_network, export_front, export_network

    if _is_network(run):
        if policy is not None or preparation:
            raise ConfigError(f"{run} is one network, which is written as it is")
        if file.suffix not in PORTABLE:
            raise ConfigError(f"{run} is a network: FILE must end with {_either(PORTABLE)}")
        return convert_network(run, file)
    if file.is_dir() or file.suffix not in _NETWORKS:
        return export_front(run, file, suffix, preparation, told)
    return export_network(run, file, policy, preparation)
