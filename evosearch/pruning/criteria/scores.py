"""Scores of all channels by several criteria at once, and the order in which channels go."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from evosearch.errors import ConfigError, EvosearchError, NetworkError
from evosearch.pruning.blending import places_of
from evosearch.pruning.criteria.evidence import LABELLED, Samples, collect
from evosearch.pruning.criteria.registry import CRITERIA, Criterion, criterion_named
from evosearch.pruning.criteria.view import Coupling, Evidence, GroupView, group_views
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.statistics import gram_matrices
from evosearch.pruning.table import GroupTable

__all__ = ["applicable_criteria", "channel_order", "channel_scores"]

FloatArray = NDArray[np.float64]


def applicable_criteria(
    module: nn.Module, plan: CuttingPlan
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Built-in criteria that apply to every group of a network, controls left out.

    Returns:
        Their names, and for each that does not apply the reason.
    """
    bare = [view.group.name for view in group_views(module, plan) if not view.scales]
    refused = {
        name: f"group {bare[0]} has no batch norm"
        for name, criterion in CRITERIA.items()
        if bare and "norms" in criterion.needs
    }
    names = (n for n, c in CRITERIA.items() if n not in refused and not c.control)
    return tuple(names), refused


def _scores(name: str, criterion: Criterion, view: GroupView) -> FloatArray:
    """`(n_channels,)` of one group, checked."""
    where = f"criterion {name}, group {view.group.name}"
    try:
        scores = np.asarray(criterion.score(view), dtype=np.float64)
    except EvosearchError:
        raise
    except Exception as exc:  # a user's criterion may raise anything
        raise NetworkError(f"{where}: computing it failed with {exc!r}") from exc
    if scores.shape != (view.group.channels,):
        raise NetworkError(
            f"{where}: it must give {view.group.channels} scores, got shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise NetworkError(f"criterion {name} gives NaN for group {view.group.name}")
    return scores


def _whole(scores: FloatArray, view: GroupView) -> FloatArray:
    """Gives channels that can only go together the mean of their scores."""
    size = view.group.granularity
    return scores if size == 1 else np.repeat(scores.reshape(-1, size).mean(axis=1), size)


def _check_provided(
    found: Mapping[str, Criterion], table: GroupTable, samples: Samples | None, grams: bool
) -> None:
    first = table.groups[0].name
    for name, criterion in found.items():
        data = set(criterion.needs) - {"norms"} - ({"grams"} if grams else set())
        if data and samples is None:
            raise ConfigError(
                f"criterion {name} needs calibration images, from group {first} on; give some"
            )
        if data & LABELLED and samples is not None and not samples.has_targets:
            raise ConfigError(
                f"criterion {name} needs gradients, from group {first} on, and the images have no "
                'labels; set proxy.labels = "own", or leave it out'
            )


def channel_scores(
    module: nn.Module,
    plan: CuttingPlan,
    criteria: Sequence[str],
    samples: Samples | None = None,
    grams: Mapping[str, FloatArray] | None = None,
    coupling: Coupling = "mean",
) -> FloatArray:
    """Scores all channels by several criteria, sharing one pass over the images.

    Args:
        module: The dense network in evaluation mode; it is left as it was.
        plan: Its groups.
        criteria: Names; see `criterion_named`.
        samples: Images, for criteria that look at data.
        grams: Gram matrices, collected from the samples where they are needed and None.
        coupling: How scores of coupled layers become one.

    Returns:
        `(n_criteria, n_channels)` by flat channel number, larger = more important. Scales differ
        between criteria and groups. Channels that go together have one score, their mean.

    Raises:
        ConfigError: A criterion is unknown, or lacks images or labels.
        NetworkError: One does not apply, fails or gives NaN; names criterion and group.
    """
    found = {name: criterion_named(name) for name in criteria}
    _check_provided(found, plan.table, samples, grams is not None)
    needs = {need for criterion in found.values() for need in criterion.needs} - {"norms"}
    evidence = Evidence()
    if "grams" in needs and grams is None and samples is not None:
        grams = gram_matrices(module, plan, list(samples.batches))
    if needs - {"grams"} and samples is not None:
        evidence = collect(module, plan, needs - {"grams"}, samples)
    views = group_views(module, plan, grams, evidence, coupling)
    with torch.inference_mode():
        rows = [
            np.concatenate([_whole(_scores(name, criterion, view), view) for view in views])
            for name, criterion in found.items()
        ]
    return np.array(rows).reshape(len(found), int(plan.table.channels.sum()))


def channel_order(
    module: nn.Module,
    plan: CuttingPlan,
    criterion: str,
    grams: Mapping[str, FloatArray] | None = None,
    samples: Samples | None = None,
) -> NDArray[np.int64]:
    """Places of all channels by one criterion: `places_of` its `channel_scores`."""
    return places_of(channel_scores(module, plan, [criterion], samples, grams)[0], plan.table)
