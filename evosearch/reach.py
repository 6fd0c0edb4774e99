"""What the policies of a space can cost, and which they are where they are few."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.space import LevelledSpace, SearchSpace

__all__ = ["policies_by_levels", "reachable_costs"]

FloatArray = NDArray[np.float64]

# So many random genomes show what a space can cost, where its extremes are not policies of it.
_PROBES = 32
# So often one more gene is changed, to one of at least three values, of so many for all genes.
_ROUNDS = 6
_MOVES = 64
# Decoded in a tenth of a second.
_FEW_GENOMES = 4096


def reachable_costs(
    space: SearchSpace, table: GroupTable
) -> tuple[dict[str, float], dict[str, float]]:
    """Lowest and highest shares of the dense network's costs that genomes of a space reach.

    A space that projects onto a budget asks for neither the cheapest nor the dearest policy: what
    is spent in one place is taken from another, and each cost has policies of its own that are low
    or high. They are looked for from the corners of the space on, so the range may be a little
    wider than what is found.
    """
    extremes = [space.cheapest(), space.dearest()]
    ends = np.stack([space.encode(policy) for policy in extremes])
    if list(space.decode(ends)) == extremes:
        shares = table.shares_of(extremes)
        return (
            {name: float(share.min()) for name, share in shares.items()},
            {name: float(share.max()) for name, share in shares.items()},
        )
    random = np.random.default_rng(0).random((_PROBES, space.n_genes))
    probes = np.concatenate([ends, space.ladder(4), random])
    names = table.shares_of(extremes)
    return (
        {name: _driven(space, table, name, 1.0, probes) for name in names},
        {name: -_driven(space, table, name, -1.0, probes) for name in names},
    )


def _driven(
    space: SearchSpace, table: GroupTable, name: str, sign: float, probes: FloatArray
) -> float:
    """The smallest `sign` times a cost's share that is found.

    Corners are tried where those genes are at one end that alone lower it most, then single genes.
    """

    def told(genomes: FloatArray) -> FloatArray:
        shares: Mapping[str, FloatArray] = table.shares_of(space.decode(genomes))
        return sign * shares[name]

    low, high = (np.full((space.n_genes, space.n_genes), end) for end in (0.0, 1.0))
    one_up, one_down = low + np.eye(space.n_genes), high - np.eye(space.n_genes)
    worth = told(one_up) - told(one_down)
    order = np.argsort(worth, kind="stable")
    corners = np.zeros((space.n_genes + 1, space.n_genes))
    for count in range(space.n_genes + 1):
        corners[count, order[:count]] = 1.0
    found = np.concatenate([probes, corners])
    values = told(found)
    best, least = found[values.argmin()], float(values.min())
    levels = np.linspace(0, 1, max(3, _MOVES // space.n_genes))
    genes = np.repeat(np.arange(space.n_genes), len(levels))
    for _ in range(_ROUNDS):
        moves = np.repeat(best[None], len(genes), axis=0)
        moves[np.arange(len(genes)), genes] = np.tile(levels, space.n_genes)
        values = told(moves)
        if values.min() >= least:
            break
        best, least = moves[values.argmin()], float(values.min())
    return least


def policies_by_levels(space: SearchSpace) -> list[Policy] | None:
    """All policies that the levels of a space give; None if it has none, or too many to look at."""
    if not isinstance(space, LevelledSpace):
        return None
    levels = space.levels()
    if math.prod(map(len, levels)) > _FEW_GENOMES:
        return None
    return list(dict.fromkeys(space.decode(np.array(list(itertools.product(*levels))))))
