"""Pruned networks as files that load again: cut, repaired as the proxy does, safetensors.

The file holds the narrowed tensors, and in its metadata how the dense architecture is made and
which channel counts were kept. Loading makes the architecture, narrows it to those counts and
fills it; nothing is unpickled.
"""

import json
from pathlib import Path

import numpy as np
from torch import nn

from evosearch.assembly import assemble
from evosearch.errors import ConfigError, NetworkError
from evosearch.facts import check_same, read_facts
from evosearch.ledger import Ledger
from evosearch.measurement import Status
from evosearch.networks import (
    InputSpec,
    Network,
    NetworkSpec,
    build_module,
    load_into,
    read_weights,
    save_weights,
)
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.recipe import RunRecipe
from evosearch.results.front import Row, read_results
from evosearch.scoring.scorer import Scorer

__all__ = ["export_network", "load_pruned"]


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
    if found[0].status is not Status.OK:
        raise ConfigError(f"--policy {digits}: that policy failed: {found[0].reason}")
    return found[0]


def export_network(run: Path, file: Path, digits: str | None) -> str:
    """Writes the network of one measured policy, as the proxy left it before measuring.

    Args:
        run: Directory of the run.
        file: Ends with `.safetensors`.
        digits: The first digits of the policy's digest.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: No such policy, or several.
        ConfigMismatch: Network or images are not the ones that were measured.
    """
    with Ledger.open(run) as ledger:
        results = read_results(ledger)
        recorded = read_facts(ledger)
        measured = {row.policy: row for row in (*results.baseline, *results.rows)}
        row = _chosen(tuple(measured.values()), digits, run)
    # Where it was searched does not matter any more.
    assembled = assemble(recorded.recipe.model_copy(update={"run": RunRecipe(workers=0)}))
    check_same(recorded, assembled.facts(), run)
    module = Scorer(assembled.workload).network_of(row.policy)
    spec = assembled.workload.spec
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
        "keep": row.policy.keep,
        "policy": row.policy.digest,
        "macs": row.macs,
        "params": row.params,
        "validation_error": row.values["error"],
    }
    save_weights(file, module, facts)
    return (
        f"{file}: {spec.name} with {row.values['macs']:.1%} of the MACs and "
        f"{row.values['params']:.1%} of the parameters, validation top-1 "
        f"{1 - row.values['error']:.2%}"
    )


def load_pruned(file: str | Path) -> nn.Module:
    """Loads a network that `evosearch export RUN FILE.safetensors` wrote, ready to run.

    Returns:
        The narrowed network in evaluation mode, on the CPU.

    Raises:
        NetworkError: The file is no such network, or its architecture cannot be made here.
    """
    state, metadata = read_weights(Path(file))
    try:
        facts = {key: json.loads(value) for key, value in metadata.items()}
        spec = NetworkSpec(
            name=facts["network"], num_classes=facts["num_classes"], arguments=facts["arguments"]
        )
        policy = Policy(tuple(facts["keep"]))
        shape, mean, std = (tuple(facts[key]) for key in ("shape", "mean", "std"))
    except (KeyError, ValueError) as exc:
        raise NetworkError(f"{file} is not a pruned network of evosearch ({exc!r})") from exc
    module, _ = build_module(spec)
    network = Network(
        spec=spec,
        module=module.eval(),
        input=InputSpec(shape=shape, mean=mean, std=std),
    )
    plan = trace(network)
    plan.table.check(policy)
    keep = np.ones(int(plan.table.channels.sum()) + 1, dtype=np.bool_)
    for offset, channels, count in zip(
        plan.table.offsets, plan.table.channels, policy.keep, strict=True
    ):
        # Which channels is a matter of values, and those come from the file.
        keep[offset + count : offset + channels] = False
    narrowed = Cutter(plan, module).cut(keep)
    load_into(narrowed, state, str(file))
    return narrowed.eval()
