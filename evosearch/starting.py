"""What a search begins with: what another run found, and what rankings of channels give.

Both are worked out once, at launch, and are facts of the run from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import RANKING, SURROGATE, UNSEEDED, ranked_count
from evosearch.algorithms.seeding import ranked_genomes
from evosearch.assembly import Assembled
from evosearch.errors import ConfigError
from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.networks.threads import on_threads
from evosearch.pruning.criteria import channel_scores
from evosearch.pruning.ranking import importance, losses, savings, thresholds
from evosearch.recipe import RankingRecipe
from evosearch.scoring.workload import Workload, samples_of, settled_batch_size
from evosearch.strategy import Beginning, algorithm_settings, foresight_of

__all__ = ["Ranked", "begins_with_rankings", "rank_channels", "ranked_by_channels", "seeds_of_run"]

IntArray = NDArray[np.int64]

# So many calibration images rank channels; they are asked for gradients, three passes each.
_IMAGES = 256


def seeds_of_run(source: Path, assembled: Assembled) -> list[list[float]]:
    """Genomes of the last population of another run, best first.

    Raises:
        ConfigError: It has none, or pruned another network; or the algorithm has no use for them.
    """
    name = algorithm_settings(assembled.recipe, assembled.space).name
    if name in UNSEEDED:
        raise ConfigError(f"search.algorithm {name} takes no seeds; leave --seed-from out")
    with Ledger.open(source) as ledger:
        members = ledger.population()
        groups = read_facts(ledger).groups
    table = assembled.workload.plan.table
    if groups != tuple((group.name, group.channels) for group in table.groups):
        raise ConfigError(f"--seed-from {source}: that run pruned another network")
    if not members:
        raise ConfigError(f"--seed-from {source}: that run has no population yet")
    members.sort(key=lambda member: (member.rank, -member.crowding))
    found = []
    for member in members:
        # Blocks that were left out there, and may not go here, are narrow ones.
        keep = np.maximum(member.policy.keep, table.fewest).tolist()
        policy = replace(member.policy, keep=tuple(keep))
        found.append(assembled.space.encode(policy).tolist())
    return found


def begins_with_rankings(assembled: Assembled) -> bool:
    """Whether the algorithm makes use of rankings, and there are some.

    Raises:
        ConfigError: It asks for nothing else, and there are none.
    """
    settings = algorithm_settings(assembled.recipe, assembled.space)
    some = bool(assembled.recipe.search.rankings)
    if settings.name == RANKING and not some:
        raise ConfigError(
            "search.algorithm ranking asks for search.rankings, and there are none; name some"
        )
    return some and ranked_count(settings) != 0


def ranked_by_channels(assembled: Assembled) -> Beginning:
    """What the recipe's rankings give: as many genomes as its algorithm takes, and guessed losses.

    Raises:
        ConfigError: The algorithm asks for nothing else, and there are none.
        NetworkError: A criterion does not apply to the network.
    """
    rankings = assembled.recipe.search.rankings
    if not begins_with_rankings(assembled) or not rankings:
        return Beginning()
    settings = algorithm_settings(assembled.recipe, assembled.space)
    table = assembled.workload.plan.table
    foresight = foresight_of(assembled.goals, table)
    found = rank_channels(assembled.workload, rankings, assembled.spent)
    # The surrogate has a first population with both ends besides; to others these are the first.
    genomes = ranked_genomes(
        found.paths,
        assembled.space,
        foresight,
        ranked_count(settings),
        narrowest=settings.name != SURROGATE,
    )
    return Beginning(ranked=genomes.tolist(), losses=found.losses)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """What rankings of channels tell.

    Args:
        paths: Of each ranking what a rising threshold leaves, `(n_rungs, n_groups)` kept channels.
        losses: By group and kept channels, what the first has it lose, as `ranking.losses` says.
    """

    paths: list[IntArray]
    losses: list[list[float]]


def rank_channels(workload: Workload, rankings: Sequence[RankingRecipe], cost: str) -> Ranked:
    """Ranks all channels of a network.

    Args:
        workload: Network and calibration images, of which the first 256 are looked at.
        rankings: At least one.
        cost: What is to be saved: `macs`, `params` or `latency`.

    Raises:
        NetworkError: A criterion does not apply to the network.
    """
    network, table, settings = workload.network(), workload.plan.table, workload.settings
    names = list(dict.fromkeys(ranking.criterion for ranking in rankings))
    with on_threads(1):
        # Gradients need all maps of a batch at once, and batch norm stays as it is.
        some = workload.calibration.take(np.arange(min(_IMAGES, len(workload.calibration))))
        # A GPU's batches may be far too large for this CPU.
        size = min(settings.batch_size, settled_batch_size(None, network.input.shape))
        samples = samples_of(network, some, size, settings.labels)
        rows = channel_scores(
            network.module, workload.plan, names, samples, None, settings.coupling
        )
    scores = dict(zip(names, rows, strict=True))
    saved = savings(table, cost)
    worths = [importance(scores[one.criterion], table, one.scale) for one in rankings]
    guessed = losses(worths[0], table, saved, rankings[0].power)
    return Ranked(
        paths=[
            thresholds(worth, table, saved, one.power)
            for worth, one in zip(worths, rankings, strict=True)
        ],
        # Written down in a few digits: a search that is resumed elsewhere goes by the same ones.
        losses=[[float(f"{loss:.6g}") for loss in group] for group in guessed],
    )
