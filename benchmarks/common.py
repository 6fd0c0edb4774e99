"""What all benchmarks share: where the data is, how a table looks, where the JSON goes."""

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from evosearch.data import Images
from evosearch.ledger import LEDGER_FILE
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.progress import Silence
from evosearch.recipe import Recipe
from evosearch.results.front import Results
from evosearch.run import launch, resume

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The normalisation of the published CIFAR ResNets, which is ImageNet's.
PUBLISHED: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder with the image sets, images.py and weights/",
    )
    made.add_argument("--json", type=Path, help="where the JSON goes [benchmarks/results]")
    return made


def complete_search(recipe: Recipe, folder: Path) -> Results:
    """What a search found, all of its budget spent: a part is no evidence.

    A folder that exists holds this search, or the part of it that a benchmark came to.
    """
    begun = (folder / LEDGER_FILE).is_file()
    done = resume(folder, Silence()) if begun else launch(recipe, folder, Silence())
    if done.interrupted:
        raise SystemExit(f"stopped while searching: {done.outcome.reason}")
    return done.results


def images(folder: Path, name: str) -> Images:
    """A whole set, such as `cifar10_train`, in official order."""
    spec = importlib.util.spec_from_file_location("image_sets", folder / "images.py")
    if spec is None or spec.loader is None or not (folder / "images.py").is_file():
        raise SystemExit(f"no image sets in {folder}; name their folder with --data")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = module.read(name)
    return Images(arrays["images"], arrays["labels"].astype(np.int64))


def published(folder: Path, name: str, **changes: Any) -> Network:
    """A published CIFAR-10 ResNet, such as `resnet56`."""
    return load_network(
        NetworkSpec(
            name=name,
            weights=str(folder / "weights" / f"{name}_cifar10.pt"),
            **PUBLISHED,
            **changes,
        )
    )


def policies_and_truth(network: str) -> tuple[list[Policy], NDArray[np.float64]]:
    """Random policies of a fidelity study, and their errors on test images after fine-tuning."""
    table = pd.read_csv(RESULTS / f"fidelity-{network}-policies.csv")
    table = table[table["set"] == "random"].dropna(subset=["test.error"])
    keeps = table[[column for column in table if str(column).startswith("keep:")]].to_numpy()
    return [Policy(tuple(map(int, row))) for row in keeps], table["test.error"].to_numpy()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
    Console(width=120).print(table)


def write(name: str, path: Path | None, content: dict[str, Any]) -> None:
    """Writes a benchmark's JSON, with the machine it ran on."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n")
    print(f"wrote {path}")
