"""What a training leaves beside weights: a checkpoint meanwhile, then a log and a record."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evosearch.errors import ConfigError
from evosearch.files import write_atomically
from evosearch.training.baseline import EpochLog, TrainSettings, write_log

__all__ = ["CHECKPOINT", "check_result", "how_trained", "write_records"]

CHECKPOINT = ".checkpoint.pt"
"""Ends the name of the file beside the weights that a stopped training goes on from."""


def check_result(file: Path, named: str) -> None:
    """Checks that weights can be written there, before anything is trained.

    Raises:
        ConfigError: The name does not end with `.safetensors`, or that file, its log or its record
            exists; says `named`.
    """
    if file.suffix != ".safetensors":
        raise ConfigError(f"{named} must end with .safetensors, got {file}")
    others = (file.with_suffix(suffix) for suffix in (".json", ".log.csv"))
    # Where a training was stopped, these may be its own.
    going_on = file.with_suffix(CHECKPOINT).exists()
    for each in (file, *(() if going_on else others)):
        if each.exists():
            raise ConfigError(f"{named}: {each} exists; remove it or name another file")


def how_trained(settings: TrainSettings) -> dict[str, Any]:
    """What a record says of how something was trained, beside what it was."""
    return {
        "settings": {**asdict(settings), "threads": settings.threads or torch.get_num_threads()},
        "command": shlex.join(["evosearch", *sys.argv[1:]]),
        "torch": torch.__version__,
    }


def write_records(file: Path, log: list[EpochLog], facts: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes the log as `.log.csv` and facts as `.json` beside the weights `file`; returns both."""
    log_path, record = file.with_suffix(".log.csv"), file.with_suffix(".json")
    write_log(log_path, log)
    text = json.dumps(facts, indent=2) + "\n"
    write_atomically(record, lambda scratch: scratch.write_text(text))
    return log_path, record
