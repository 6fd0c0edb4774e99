"""The work behind `evosearch criteria`: how alike criteria rank the channels of a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import ConfigError
from evosearch.files import write_atomically
from evosearch.materials import network_and_images
from evosearch.networks.threads import on_threads
from evosearch.pruning.blending import cluster, cluster_groups, spearman
from evosearch.pruning.criteria import applicable_criteria, channel_scores
from evosearch.pruning.groups import trace
from evosearch.recipe import Recipe
from evosearch.scoring.workload import (
    samples_of,
    settled_batch_size,
    settled_calibration_batch,
)
from evosearch.space import CriteriaWish, criteria_wish

__all__ = ["Comparison", "compare", "comparison_lines", "comparison_record", "write_heatmap"]

Clusters = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """How alike criteria rank.

    Args:
        names: The criteria.
        refused: Built-in ones that do not apply, with the reason.
        correlations: By group `(n_criteria, n_criteria)` Spearman correlations over its channels.
        clusters: By group the criteria that rank alike.
        channels: By group how many there are.
        overall: Clusters on the mean correlation over groups.
    """

    names: tuple[str, ...]
    refused: Mapping[str, str]
    correlations: Mapping[str, NDArray[np.float64]]
    clusters: Mapping[str, Clusters]
    channels: Mapping[str, int]
    overall: Clusters

    @property
    def mean(self) -> NDArray[np.float64]:
        """`(n_criteria, n_criteria)` mean correlation over groups."""
        return np.asarray(np.mean(list(self.correlations.values()), axis=0))

    def check_group(self, group: str | None) -> None:
        """Checks the name of a group.

        Raises:
            ConfigError: There is none of that name; lists them.
        """
        if group is not None and group not in self.clusters:
            raise ConfigError(f"--group {group}: there are {', '.join(self.clusters)}")


def compare(recipe: Recipe) -> Comparison:
    """Scores all channels by all criteria that apply, or by those that the space names.

    Raises:
        EvosearchError: Network, images or a criterion cannot be used.
    """
    options = {key: value for key, value in recipe.space.items() if key != "name"}
    wish = criteria_wish(recipe.space["name"], options) or CriteriaWish()
    network, images = network_and_images(recipe)
    plan = trace(network)
    names, refused = applicable_criteria(network.module, plan)
    if wish.names:
        names, refused = wish.names, {}
    elif recipe.proxy.criterion not in names:
        names = (*names, recipe.proxy.criterion)
    proxy = recipe.proxy
    size = settled_batch_size(proxy.batch_size, network.input.shape)
    together = settled_calibration_batch(proxy.calibration_batch, proxy.batch_size, size)
    samples = samples_of(network, images.calibration, together or size, proxy.labels)
    with on_threads(1):
        scores = channel_scores(network.module, plan, names, samples, coupling=proxy.coupling)
    table = plan.table
    groups = [group.name for group in table.groups]
    parts = np.split(scores, table.offsets[1:], axis=1)
    correlations = dict(zip(groups, map(spearman, parts), strict=True))
    clusters = cluster_groups(names, scores, table, wish.clusters, table.units(wish.sharing))
    mean = np.mean(list(correlations.values()), axis=0)
    return Comparison(
        names=names,
        refused=refused,
        correlations=correlations,
        clusters=dict(zip(groups, clusters, strict=True)),
        channels={group.name: group.channels for group in table.groups},
        overall=cluster(names, mean, wish.clusters),
    )


def comparison_lines(found: Comparison, group: str | None = None) -> list[str]:
    """Clusters for the terminal, of all groups or of one.

    Raises:
        ConfigError: There is no such group.
    """
    found.check_group(group)
    lines = [f"{name} is left out: {reason}" for name, reason in found.refused.items()]
    told = {} if group else {"mean over groups": found.overall}
    for name in [group] if group else found.clusters:
        told[f"{name} ({found.channels[name]} channels)"] = found.clusters[name]
    for title, clusters in told.items():
        lines += [title, *(f"  {', '.join(members)}" for members in clusters)]
    return lines


def comparison_record(found: Comparison, group: str | None = None) -> dict[str, Any]:
    """The same as plain data, with all correlations.

    Raises:
        ConfigError: There is no such group.
    """
    found.check_group(group)
    return {
        "criteria": found.names,
        "left_out": dict(found.refused),
        "clusters": found.overall,
        "spearman": found.mean.round(6).tolist(),
        "groups": [
            {
                "name": name,
                "channels": found.channels[name],
                "clusters": found.clusters[name],
                "spearman": found.correlations[name].round(6).tolist(),
            }
            for name in ([group] if group else found.clusters)
        ],
    }


def write_heatmap(found: Comparison, file: Path, group: str | None = None) -> None:
    """Draws the mean correlations, and beside them those of a group.

    Raises:
        ConfigError: There is no such group.
        BackendError: It cannot be written.
    """
    found.check_group(group)
    from evosearch.results.plots import plot_correlations

    panels = {f"mean over {len(found.correlations)} groups": found.mean}
    if group is not None:
        panels[group] = found.correlations[group]
    # Clusters side by side show as blocks.
    order = [found.names.index(name) for members in found.overall for name in members]
    names = [found.names[i] for i in order]
    panels = {title: values[np.ix_(order, order)] for title, values in panels.items()}
    write_atomically(file, lambda scratch: plot_correlations(names, panels, scratch))
