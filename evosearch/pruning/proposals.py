"""Which channels might have to be cut together.

Torch-Pruning's dependency graph proposes, plain chains where it gives up; what their bookkeeping
already rules out is objected to here. `groups` checks the rest.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evosearch.errors import NetworkError
from evosearch.pruning.chains import chains
from evosearch.pruning.dependencies import dependencies
from evosearch.pruning.hooks import hooked
from evosearch.pruning.layers import (
    Convolution,
    Proposal,
    dimensions,
    is_channelwise,
    is_depthwise,
    outputs_per_group,
)

__all__ = ["Positions", "output_positions", "propose"]

# Output positions per image, and height and width of the output.
Positions = dict[str, tuple[int, tuple[int, int]]]


def _shared_weights(layers: dict[str, nn.Module]) -> dict[str, str]:
    """By layer the other layer that holds the same weight tensor."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(set(names)) > 1
        for name in names
    }


def _join_over_grouped(proposals: list[Proposal], layers: dict[str, nn.Module]) -> list[Proposal]:
    """Makes what a grouped convolution reads and what it writes one proposal.

    The graph proposes them apart, but a group of the convolution can only go as a whole: so many
    channels read, and as many written, at the same places. Else it computes as it did, and like a
    depthwise convolution it is nobody's consumer.
    """
    for name, layer in layers.items():
        if not isinstance(layer, Convolution) or layer.groups == 1 or is_depthwise(layer):
            continue
        read = [p for p in proposals if name in p.ins]
        written = [p for p in proposals if name in p.outs]
        if why := _crooked(name, layer, read, written):
            for proposal in (*read, *written):
                proposal.reason = proposal.reason or (
                    f"{name}: grouped convolution ({layer.groups} groups) that {why}"
                )
            continue
        first, second = read[0], written[0]
        del first.ins[name]
        first.granularity = math.lcm(
            first.granularity, second.granularity, outputs_per_group(layer) or 1
        )
        if first is not second:
            proposals = [p for p in proposals if p is not second]
            first.reason = first.reason or second.reason
            for ours, theirs in ((first.outs, second.outs), (first.ins, second.ins)):
                for other, sources in theirs.items():
                    before = ours.get(other, sources)
                    ours[other] = np.where(sources >= 0, sources, before)
        if first.granularity == first.channels:
            first.reason = first.reason or f"{name}: grouped convolution, of which no group can go"
    return proposals


def _keep_norms_whole(proposals: Sequence[Proposal], layers: dict[str, nn.Module]) -> None:
    """Has channels that a group norm normalises together go together."""
    for proposal in proposals:
        for name, sources in proposal.outs.items():
            if not isinstance(layers[name], nn.GroupNorm):
                continue
            if not np.array_equal(sources, np.arange(proposal.channels)):
                proposal.reason = proposal.reason or (
                    f"{name}: group norm of channels that are mixed with others"
                )
                continue
            proposal.granularity = math.lcm(
                proposal.granularity, outputs_per_group(layers[name]) or 1
            )
            if proposal.granularity == proposal.channels:
                proposal.reason = proposal.reason or f"{name}: group norm, of which no group can go"


def _crooked(
    name: str, layer: nn.Module, read: Sequence[Proposal], written: Sequence[Proposal]
) -> str | None:
    """Why what a grouped convolution reads cannot go with what it writes, or None if it can."""
    writes, reads = dimensions(layer)
    if reads != writes:
        return f"reads {reads} channels and writes {writes}"
    straight = np.arange(writes)
    if (
        len(read) != 1
        or read[0].channels != reads
        or not np.array_equal(read[0].ins[name], straight)
    ):
        return "reads no single layer's channels in their order"
    if len(written) != 1 or not np.array_equal(written[0].outs[name], straight):
        return "writes channels that are mixed with others"
    return None


def _objection(
    candidate: Proposal, layers: dict[str, nn.Module], shared: dict[str, str]
) -> str | None:
    """Why the proposal cannot be cut, going by its own bookkeeping, or None."""
    if not candidate.ins:
        return "it is the network's output"
    for name in (*candidate.outs, *candidate.ins):
        if name in shared:
            return f"{name} shares its weights with {shared[name]}"
    for name, sources in candidate.outs.items():
        if not is_channelwise(layers[name]) and (sources < 0).any():
            covered = int((sources >= 0).sum())
            return f"it covers {covered} of the {len(sources)} output channels of {name}"
    for side in (candidate.outs, candidate.ins):
        for name, sources in side.items():
            counts = np.bincount(sources[sources >= 0], minlength=candidate.channels)
            if counts.min() != counts.max():
                return f"its channels appear a different number of times in {name}"
            if counts.max() > 1 and (sources < 0).any():
                return f"it is flattened together with other channels into {name}"
    return None


def output_positions(module: nn.Module, example: Tensor) -> Positions:
    """Output positions of each convolution and linear layer for one image, over all calls.

    Args:
        module: In evaluation mode, parameters requiring gradients.
        example: An input.

    Raises:
        NetworkError: It fails, returns no logits, other ones each time, or ones without gradients.
    """
    found: Positions = {}

    def hook(name: str, layer: nn.Module) -> RemovableHandle:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            width = dimensions(layer)[0]
            count = output.numel() // (len(example) * width)
            size = list(output.shape[2:]) if isinstance(layer, Convolution) else [1]
            resolution = (size[0], size[-1])
            before = found[name][0] if name in found else 0
            found[name] = (before + count, resolution)

        return layer.register_forward_hook(record)

    layers = module.named_modules()
    handles = [hook(n, layer) for n, layer in layers if isinstance(layer, nn.Linear | Convolution)]
    try:
        with hooked(handles), torch.enable_grad():
            output = module(example)
    except Exception as exc:  # a user's network may raise anything
        raise NetworkError(
            f"the network fails on an input of shape {tuple(example.shape)}: {exc!r}; "
            "check network.input_shape"
        ) from exc
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NetworkError(
            f"a network must return logits (images, classes), got {shape}; make it a module whose "
            "forward returns those"
        )
    if not output.requires_grad:
        raise NetworkError(
            "its outputs have no gradients, by which channels are followed: leave torch.no_grad, "
            "detach and the like out of forward"
        )
    with torch.inference_mode():
        again = module(example)
    output = output.detach()
    near = 1e-3 * float(output.abs().max())
    if not torch.allclose(again, output, rtol=1e-3, atol=near, equal_nan=True):
        raise NetworkError(
            "the network gives different outputs each time for the same images, in evaluation "
            "mode, too; F.dropout wants training=self.training, or nn.Dropout in its place"
        )
    return found


def propose(module: nn.Module, example: Tensor, positions: Positions) -> list[Proposal]:
    """All coupled channels of a network in forward order, with objections where there are any.

    Args:
        module: In evaluation mode, all parameters requiring gradients.
        example: An input.
        positions: From `output_positions`; its order is the order of execution.
    """
    layers = dict(module.named_modules())
    order = {name: place for place, name in enumerate(positions)}
    shared = _shared_weights(layers)
    try:
        proposals = dependencies(module, example)
    except NetworkError as exc:
        proposals = chains(module, example, str(exc))
    if any(proposal.lost for proposal in proposals):
        chained = {p.name: p for p in chains(module, example, "") if p.reason is None}
        proposals = [chained.get(p.name, p) if p.lost else p for p in proposals]
    proposals = _join_over_grouped(proposals, layers)
    _keep_norms_whole(proposals, layers)
    for proposal in proposals:
        producers = [name for name in proposal.outs if name in order]
        if producers:
            proposal.name = min(producers, key=order.__getitem__)
        proposal.reason = proposal.reason or _objection(proposal, layers, shared)
        if proposal.channels < 2:
            proposal.reason = proposal.reason or "it has a single channel"
    return sorted(proposals, key=lambda proposal: order.get(proposal.name, len(order)))
