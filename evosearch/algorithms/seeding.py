"""The first population: known good genomes first, then an even spread of random ones.

Good ones are those of paths from wide to narrow, such as a rising threshold on scores leaves, and
the ladder of uniform ratios.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.foresight import Foresight
from evosearch.policy import Policy
from evosearch.space import SearchSpace, unique_rows

__all__ = ["evenly", "halves", "initial_population", "ranked_genomes"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_TRIES = 20
# So many rungs of a path are looked at, spread over what they cost.
_RUNGS = 256


def _latin_hypercube(n: int, n_genes: int, rng: np.random.Generator) -> FloatArray:
    """`(n, n_genes)`: each gene has one value in each of n equal slices of [0, 1]."""
    slices = np.stack([rng.permutation(n) for _ in range(n_genes)], axis=1)
    return np.asarray((slices + rng.random((n, n_genes))) / n)


def initial_population(
    space: SearchSpace,
    size: int,
    seed: int,
    *,
    seeds: FloatArray,
    ranked: FloatArray | None = None,
    seed_share: float = 0.5,
) -> FloatArray:
    """Genomes to start from, distinct as policies as far as the space allows.

    Args:
        space: Says which genomes are the same policy.
        size: How many.
        seed: Of the random part.
        seeds: `(m, n_genes)` taken first, at most `size` of them.
        ranked: `(m, n_genes)` taken next, and then the ladder of uniform ratios.
        seed_share: Up to this share of the population.

    Returns:
        `(size, n_genes)` in [0, 1].
    """
    rng = np.random.default_rng(seed)
    open_places = max(0, int(size * seed_share) - len(seeds))
    known = np.empty((0, space.n_genes)) if ranked is None else ranked[:open_places]
    ladder = space.ladder(open_places - len(known))
    chosen = np.concatenate([seeds[:size], known, ladder])
    chosen = chosen[unique_rows(space.decode(chosen))] if len(chosen) else chosen
    for _ in range(_TRIES):
        missing = size - len(chosen)
        if missing <= 0:
            break
        chosen = np.concatenate([chosen, _latin_hypercube(missing, space.n_genes, rng)])
        chosen = chosen[unique_rows(space.decode(chosen))]
    # A space smaller than the population: repeat policies rather than fall short, since
    # differential evolution needs a full population.
    missing = size - len(chosen)
    if missing > 0:
        chosen = np.concatenate([chosen, rng.random((missing, space.n_genes))])
    return chosen[:size]


def ranked_genomes(
    paths: Sequence[IntArray],
    space: SearchSpace,
    foresight: Foresight,
    n: int | None = None,
    *,
    narrowest: bool = False,
) -> FloatArray:
    """Genomes of paths, to begin with.

    Where cheapness is an objective they are of the first path, spread evenly over what policies
    cost. Elsewhere they are one of each path: the widest within the constraints, or, in a space
    that spends a budget, the one that the space changes least.

    Args:
        paths: Each `(n_rungs, n_groups)` kept channels, from wide to narrow; the best first.
        space: What genomes mean.
        foresight: Knows costs and constraints.
        n: At most so many; all that there are if None.
        narrowest: Whether the cheapest of a front is wanted beside such steps, which stop short of
            it.

    Returns:
        `(m, n_genes)`, distinct as policies, in an order whose every beginning is spread about
        evenly.
    """
    front = _a_front(space, foresight)
    found = [np.empty((0, space.n_genes))]
    for path in paths[:1] if front else paths:
        genomes, cost = _rungs(path, space, foresight)
        if len(genomes):
            found.append(genomes[_spread(cost, n, narrowest) if front else [0]])
    chosen = np.concatenate(found)
    distinct = chosen[unique_rows(space.decode(chosen))] if len(chosen) else chosen
    return distinct[:n]


def _spread(cost: FloatArray, n: int | None, narrowest: bool) -> list[int]:
    """Rows of about n even steps from the highest to the lowest cost, or all; by halves."""
    if n is None:
        return halves(len(cost))
    ends = [int(cost.argmin())] if narrowest and n > 1 else []
    steps = n - len(ends)
    nearest: list[int] = evenly(cost, steps)[halves(steps)].tolist()
    return ends + nearest


def evenly(cost: FloatArray, n: int) -> IntArray:
    """`(n,)` rows whose costs are nearest to n even steps between the highest and the lowest."""
    wanted = np.linspace(cost.max(), cost.min(), n + 2)[1:-1]
    return np.asarray(np.abs(cost - wanted[:, None]).argmin(axis=1))


def _spends(space: SearchSpace) -> bool:
    """Whether all policies spend one budget: neither the widest nor the narrowest is one."""
    ends = [space.cheapest(), space.dearest()]
    decoded = space.decode(np.array([space.encode(end) for end in ends]))
    return not any(one.keep == end.keep for one, end in zip(decoded, ends, strict=True))


def _a_front(space: SearchSpace, foresight: Foresight) -> bool:
    """Whether policies of different costs are wanted."""
    known = foresight([space.dearest()])
    return not (_spends(space) or bool(np.isnan(known.objectives).all()))


def _rungs(
    path: IntArray, space: SearchSpace, foresight: Foresight
) -> tuple[FloatArray, FloatArray]:
    """Genomes along a path within bounds and constraints, from wide to narrow, and their costs.

    In a space that spends a budget the first is the one that it changes least.
    """
    low, high = (np.array(end.keep) for end in (space.cheapest(), space.dearest()))
    policies = list(dict.fromkeys(Policy(tuple(row)) for row in np.clip(path, low, high).tolist()))
    own = foresight(policies).cost
    wanted = np.linspace(own.max(), own.min(), _RUNGS)
    policies = [
        policies[row] for row in dict.fromkeys(np.abs(own - wanted[:, None]).argmin(axis=1))
    ]
    genomes = np.array([space.encode(policy) for policy in policies])
    decoded = space.decode(genomes)
    if _spends(space):
        kept, wished = (np.array([p.keep for p in some]) for some in (decoded, policies))
        order = np.argsort((np.abs(kept - wished) / high).sum(axis=1), kind="stable")
        genomes, decoded = genomes[order], [decoded[row] for row in order]
    known = foresight(decoded)
    return genomes[known.affordable], known.cost[known.affordable]


def halves(n: int) -> list[int]:
    """0 to n - 1 in such an order that every beginning of it is spread about evenly."""
    order, parts = [0, n - 1], [(0, n - 1)]
    while parts:
        low, high = parts.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            parts += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))[:n]
