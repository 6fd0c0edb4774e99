"""Pruned networks as files that load again: cut, repaired as the proxy does, safetensors.

The file holds the narrowed tensors, and in its metadata how the dense architecture is made and
which channel counts were kept. Loading makes the architecture, narrows it to those counts and
fills it; nothing is unpickled.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from evosearch.assembly import Assembled, assemble
from evosearch.errors import ConfigError, DataError, NetworkError, PolicyError
from evosearch.facts import check_same, read_facts
from evosearch.ledger import Ledger
from evosearch.measurement import Status
from evosearch.networks import (
    InputSpec,
    Network,
    NetworkSpec,
    build_module,
    is_own,
    load_into,
    read_weights,
    save_weights,
)
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.recipe import RunRecipe, change_recipe, explain
from evosearch.results.front import Row, read_results
from evosearch.scoring.scorer import Scorer, out_of_memory
from evosearch.scoring.workload import Workload

__all__ = ["export_network", "load_pruned"]


class _Pruned(BaseModel):
    """What the metadata of a pruned network must say."""

    model_config = ConfigDict(frozen=True)

    network: str
    num_classes: int
    arguments: dict[str, Any]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: tuple[tuple[str, int], ...]
    keep: tuple[int, ...]


def _chosen(rows: tuple[Row, ...], digits: str | None, run: Path) -> Row:
    if not digits:
        raise ConfigError(
            f"name the network with --policy; `evosearch export {run} front.csv` lists them"
        )
    found = [row for row in rows if row.policy.digest.startswith(digits)]
    if len(found) != 1:
        raise ConfigError(
            f"--policy {digits}: {len(found) or 'no'} measured policies of {run} start like that"
        )
    if found[0].status is Status.DROPPED:
        raise ConfigError(f"--policy {digits}: that policy was dropped: {found[0].reason}")
    if found[0].status is not Status.OK:
        raise ConfigError(f"--policy {digits}: that policy failed: {found[0].reason}")
    return found[0]


def _with_more_images(assembled: Assembled, images: int) -> Workload:
    """The workload whose proxy has that many training images, and cuts the same channels.

    A search is frugal: hundreds of candidates are prepared, and only their order matters. The one
    that is kept can have all layers fitted, on as many images as one likes.
    """
    changes = {
        "data.calibration": images,
        "proxy.recalibration_images": images,
        "proxy.reconstruction_images": images,
        "proxy.reconstruction_layers": "all",
    }
    option = f"--calibration {images}"
    recipe = change_recipe(assembled.recipe, changes, option)
    try:
        found = assemble(recipe).workload
    except (ConfigError, DataError) as exc:
        raise ConfigError(f"{option}: {exc}") from exc
    except (RuntimeError, MemoryError) as exc:
        if not out_of_memory(exc):
            raise
        raise ConfigError(f"{option}: out of memory; name fewer images") from exc
    known = assembled.workload
    return replace(found, places=known.places, blends=known.blends)


def export_network(
    run: Path, file: Path, digits: str | None, calibration: int | None = None
) -> str:
    """Writes the network of one measured policy, as the proxy left it before measuring.

    Args:
        run: Directory of the run.
        file: Ends with `.safetensors`.
        digits: The first digits of the policy's digest.
        calibration: Training images that it is prepared with; None for those of the search.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: No such policy, or several; or it cannot be prepared with so many images.
        ConfigMismatch: Network or images are not the ones that were measured.
    """
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        recorded = read_facts(ledger)
        # What the search dropped early, the ladder may have measured in full: the later entry wins.
        rows = sorted((*results.baseline, *results.rows), key=lambda row: row.status is Status.OK)
        row = _chosen(tuple({row.policy: row for row in rows}.values()), digits, run)
    # Where it was searched does not matter any more.
    assembled = assemble(recorded.recipe.model_copy(update={"run": RunRecipe(workers=0)}))
    check_same(recorded, assembled.facts(), run)
    error, note, workload = row.values["error"], "", assembled.workload
    if calibration is not None:
        workload = _with_more_images(assembled, calibration)
        measured = Scorer(workload).score(row.policy)
        if not measured.ok:
            raise ConfigError(f"--calibration {calibration}: {measured.reason}")
        note = f" ({1 - error:.2%} as it was measured in the search)"
        error = measured.metrics["error"]
    module = Scorer(workload).network_of(row.policy)
    spec = workload.spec
    facts = {
        "evosearch": "pruned network",
        "network": spec.name,
        "num_classes": spec.num_classes,
        "arguments": dict(spec.arguments),
        "shape": assembled.workload.input.shape,
        "mean": assembled.workload.input.mean,
        "std": assembled.workload.input.std,
        "crop_padding": assembled.workload.input.crop_padding,
        "flip": assembled.workload.input.flip,
        "groups": recorded.groups,
        "keep": row.policy.keep,
        "policy": row.policy.digest,
        "macs": row.macs,
        "params": row.params,
        "validation_error": error,
    }
    save_weights(file, module, facts)
    return (
        f"{file}: {spec.name} with {row.values['macs']:.1%} of the MACs and "
        f"{row.values['params']:.1%} of the parameters, validation top-1 "
        f"{1 - error:.2%}{note}"
    )


def load_pruned(
    file: str | Path, network: str | Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Loads a network that `evosearch export RUN FILE.safetensors` wrote, ready to run.

    Args:
        file: What was written.
        network: Makes the dense architecture where the name in the file means nothing, on another
            machine, say: a function or a class, or a name as in a recipe.

    Returns:
        The narrowed network in evaluation mode, on the CPU.

    Raises:
        NetworkError: The file is no such network, or its architecture cannot be made here.
    """
    if Path(file).suffix != ".safetensors":
        raise NetworkError(
            f"{file} is not a pruned network: wanted the .safetensors that `evosearch export` wrote"
        )
    state, metadata = read_weights(Path(file))
    try:
        pruned = _Pruned.model_validate({key: json.loads(value) for key, value in metadata.items()})
    except ValueError as exc:
        told = explain(exc, _Pruned) if isinstance(exc, ValidationError) else str(exc)
        raise NetworkError(f"{file} is not a pruned network of evosearch ({told})") from exc
    dense = _dense(file, pruned, network)
    plan = trace(dense)
    groups = tuple((group.name, group.channels) for group in plan.table.groups)
    if groups != pruned.groups:
        raise NetworkError(
            f"{file} was cut from another network than {dense.spec.name} makes: "
            f"{_difference(pruned.groups, groups)}; name the right one with "
            "load_pruned(file, network=...)"
        )
    try:
        policy = Policy(pruned.keep)
        plan.table.check(policy)
    except PolicyError as exc:
        raise NetworkError(f"{file} cannot be cut as it says: {exc}") from exc
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    for offset, channels, count in zip(
        plan.table.offsets, plan.table.channels, policy.keep, strict=True
    ):
        # Which channels is a matter of values, and those come from the file.
        keep[offset + count : offset + channels] = False
    narrowed = Cutter(plan, dense.module).cut(keep)
    load_into(narrowed, state, str(file))
    return narrowed.eval()


def _dense(
    file: str | Path, pruned: _Pruned, network: str | Callable[..., nn.Module] | None
) -> Network:
    """The dense architecture of a file, its weights random."""
    name = network if isinstance(network, str) else pruned.network
    factory = None
    if network is not None and not isinstance(network, str):
        name, factory = getattr(network, "__qualname__", repr(network)), network
    spec = NetworkSpec(name=name, num_classes=pruned.num_classes, arguments=pruned.arguments)
    try:
        module, _ = build_module(spec, factory)
    except NetworkError as exc:
        if network is not None or not is_own(name):
            raise
        raise NetworkError(
            f"{file}: {exc}; say what makes it here with load_pruned(file, network=...)"
        ) from exc
    shown = InputSpec(shape=pruned.shape, mean=pruned.mean, std=pruned.std)
    return Network(spec=spec, module=module.eval(), input=shown)


def _difference(wanted: Sequence[tuple[str, int]], found: Sequence[tuple[str, int]]) -> str:
    """The first group that differs, in words."""
    for then, now in zip_longest(wanted, found):
        if then != now:
            first, second = (f"{g[0]} with {g[1]} channels" if g else "none" for g in (then, now))
            return f"its groups have {first} where that has {second}"
    return "its groups are others"
