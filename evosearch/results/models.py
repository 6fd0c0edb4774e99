"""Pruned networks as files that load again.

The file holds the narrowed tensors, and in its metadata how the dense architecture is made and
which channel counts were kept. Loading makes the architecture, narrows it to those counts and
fills it; nothing is unpickled. The code that makes it is the reader's own: a name in the file says
which, and is followed only to what makes networks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from evosearch.errors import NetworkError, PolicyError
from evosearch.files import PORTABLE
from evosearch.networks import (
    InputSpec,
    Network,
    NetworkSpec,
    build_module,
    is_own,
    load_into,
    plain,
    read_weights,
    save_weights,
    trusted_factory,
    write_portable,
)
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.recipe import explain

__all__ = ["load_pruned", "read_pruned", "save_pruned"]

# So many inputs, and classes of each, tell whether a network is still the same.
_EXAMPLES, _SHOWN = 2, 16
# Of the largest output: other machines and versions of torch compute otherwise by less.
_TOLERANCE = 0.01


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
    outputs: tuple[tuple[float, ...], ...] | None = None
    """Of `Network.example`; files from before there were any have none."""

    def policy(self, groups: Sequence[tuple[str, int]]) -> Policy:
        """For the groups of the network, of which an earlier version may have cut fewer.

        Raises:
            PolicyError: The file has more or fewer counts than groups.
        """
        if len(self.keep) != len(self.groups):
            raise PolicyError(f"it has {len(self.keep)} counts for {len(self.groups)} groups")
        kept = dict(zip(self.groups, self.keep, strict=True))
        return Policy(tuple(kept.get(group, group[1]) for group in groups))


def save_pruned(
    file: Path,
    network: Network,
    groups: Sequence[tuple[str, int]],
    policy: Policy,
    more: Mapping[str, Any],
) -> None:
    """Writes a cut network: as `load_pruned` reads it, or to run without evosearch.

    Args:
        file: Its suffix says which: `.safetensors`, or one of `PORTABLE`. Its folder is made if
            need be.
        network: Narrowed.
        groups: Name and channels of each group of the dense network.
        policy: Channels kept.
        more: Facts for people, which loading does not need.

    Raises:
        ConfigError: The file cannot have that name, or what writes it is not installed.
        NetworkError: The network cannot be written like that.
        BackendError: The file cannot be written.
    """
    spec, shown = network.spec, network.input
    facts = {
        "evosearch": "pruned network",
        "network": spec.name,
        "num_classes": spec.num_classes,
        "arguments": dict(spec.arguments),
        "shape": shown.shape,
        "mean": shown.mean,
        "std": shown.std,
        "crop_padding": shown.crop_padding,
        "flip": shown.flip,
        "groups": groups,
        "keep": policy.keep,
        "policy": policy.digest,
        **more,
    }
    if file.suffix in PORTABLE:
        write_portable(network, file, facts)
    else:
        save_weights(file, network.module, {**facts, "outputs": _outputs(network)})


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
    return read_pruned(file, network)[0].module


def read_pruned(
    file: str | Path, network: str | Callable[..., nn.Module] | None = None
) -> tuple[Network, dict[str, Any]]:
    """As `load_pruned`, with what the network takes, and all facts that the file has."""
    if Path(file).suffix != ".safetensors":
        raise NetworkError(
            f"{file} is not a pruned network: wanted the .safetensors that `evosearch export` wrote"
        )
    state, metadata = read_weights(Path(file))
    try:
        facts = {key: json.loads(value) for key, value in metadata.items()}
        pruned = _Pruned.model_validate(facts)
    except ValueError as exc:
        told = explain(exc, _Pruned) if isinstance(exc, ValidationError) else str(exc)
        raise NetworkError(f"{file} is not a pruned network of evosearch ({told})") from exc
    with torch.inference_mode(mode=False):  # groups are found by autograd
        dense = _dense(file, pruned, network)
        plan = trace(dense, blocks=0 in pruned.keep)
    groups = tuple((group.name, group.channels) for group in plan.table.groups)
    if tuple(group for group in groups if group in pruned.groups) != pruned.groups:
        raise NetworkError(
            f"{file} was cut from another network than {dense.spec.name} makes: "
            f"{_difference(pruned.groups, groups)}; name the right one with "
            "load_pruned(file, network=...)"
        )
    try:
        policy = pruned.policy(groups)
        plan.table.check(policy)
    except PolicyError as exc:
        raise NetworkError(f"{file} cannot be cut as it says: {exc}") from exc
    # Which channels is a matter of values, and those come from the file.
    keep = plan.table.mask(np.array(policy.keep, dtype=np.int64))
    narrowed = Cutter(plan, dense.module).cut(keep)
    try:
        load_into(narrowed, state, str(file))
    except NetworkError as exc:
        raise NetworkError(
            f"{exc}; if {dense.spec.name} is not what the file was cut from, name that with "
            "load_pruned(file, network=...)"
        ) from exc
    small = replace(dense, module=narrowed.eval())
    _check_outputs(file, pruned, small)
    return small, facts


def _outputs(network: Network) -> list[list[float]] | None:
    """What a network makes of a fixed input; None if that tells nothing."""
    example = network.example(_EXAMPLES).to(next(network.module.parameters()).device)
    with torch.inference_mode():
        found = network.module(example)[:, :_SHOWN].float().cpu()
    return found.tolist() if bool(found.isfinite().all()) else None


def _check_outputs(file: str | Path, pruned: _Pruned, network: Network) -> None:
    """Raises if tensors fit, but the code around them has become another."""
    wanted = pruned.outputs
    if wanted is None:
        return
    try:
        found = _outputs(network)
    except Exception as exc:  # a user's forward may raise anything
        raise NetworkError(f"{file}: the network was loaded, but fails with {exc!r}") from exc
    expected = np.array(wanted)
    same = found is not None and np.shape(found) == expected.shape
    if not same or np.abs(np.array(found) - expected).max() > _TOLERANCE * np.abs(expected).max():
        raise NetworkError(
            f"{file}: its tensors fit {network.spec.name}, but what that computes has changed "
            "since the file was written; name what made it with load_pruned(file, network=...)"
        )


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
        if network is None and is_own(name):
            factory = trusted_factory(name)
        module, _ = build_module(spec, factory)
    except NetworkError as exc:
        if network is not None or not is_own(name):
            raise
        raise NetworkError(
            f"{file}: {exc}; say what makes it here with load_pruned(file, network=...)"
        ) from exc
    shown = InputSpec(shape=pruned.shape, mean=pruned.mean, std=pruned.std)
    return Network(spec=spec, module=plain(module.eval()), input=shown)


def _difference(wanted: Sequence[tuple[str, int]], found: Sequence[tuple[str, int]]) -> str:
    """The first group that differs, in words."""
    for then, now in zip_longest(wanted, found):
        if then != now:
            first, second = (f"{g[0]} with {g[1]} channels" if g else "none" for g in (then, now))
            return f"its groups have {first} where that has {second}"
    return "its groups are others"
