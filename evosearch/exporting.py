"""The work behind `evosearch export`: which table, picture or network goes into which file."""

from pathlib import Path

from evosearch.errors import ConfigError
from evosearch.files import write_atomically
from evosearch.ledger import Ledger
from evosearch.results.export import (
    Records,
    export,
    front_records,
    measurement_records,
    population_records,
)
from evosearch.results.front import Results, read_results

__all__ = ["SUFFIXES", "export_file"]

SUFFIXES = (".csv", ".json", ".parquet", ".png", ".safetensors")


def _records(results: Results, ledger: Ledger, everything: bool, generation: int | None) -> Records:
    if generation is not None:
        members = ledger.population(generation)
        if not members:
            raise ConfigError(f"--generation {generation}: {ledger.path.parent} has none recorded")
        return population_records(results, members)
    return measurement_records(results) if everything else front_records(results)


def export_file(
    run: Path,
    file: Path,
    everything: bool,
    generation: int | None,
    policy: str | None,
    calibration: int | None = None,
) -> str:
    """Writes one file from a run, also while it is being searched.

    Args:
        run: Directory of the run.
        file: Its suffix decides what is written.
        everything: Every measurement instead of the front.
        generation: The population after this generation instead of the front.
        policy: First digits of the network to write.
        calibration: Training images to prepare it with; None for those of the search.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: The suffix is unknown, or does not go with the options.
        LedgerError: There is no usable run.
    """
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{file} must end with one of {', '.join(SUFFIXES)}")
    if policy is not None and file.suffix != ".safetensors":
        raise ConfigError("--policy writes a network: FILE must end with .safetensors")
    if calibration is not None and file.suffix != ".safetensors":
        raise ConfigError("--calibration prepares a network: FILE must end with .safetensors")
    if file.suffix in (".png", ".safetensors") and (everything or generation is not None):
        raise ConfigError(f"--all and --generation write tables, {file} is none")
    if file.suffix == ".safetensors":
        from evosearch.results.models import export_network

        return export_network(run, file, policy, calibration)
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        if file.suffix == ".png":
            from evosearch.results.plots import plot_front

            write_atomically(file, lambda scratch: plot_front(results, scratch))
            return f"{file}: {len(results.front)} of {len(results.rows)} policies on the front"
        records = _records(results, ledger, everything, generation)
    export(records, file)
    return f"{file}: {len(records.rows)} policies"
