"""The first population: known good genomes first, then an even spread of random ones."""

import numpy as np
from numpy.typing import NDArray

from evosearch.space import SearchSpace, unique_rows

__all__ = ["initial_population"]

FloatArray = NDArray[np.float64]
_TRIES = 20


def _latin_hypercube(n: int, n_genes: int, rng: np.random.Generator) -> FloatArray:
    """`(n, n_genes)`: each gene has one value in each of n equal slices of [0, 1]."""
    slices = np.stack([rng.permutation(n) for _ in range(n_genes)], axis=1)
    return np.asarray((slices + rng.random((n, n_genes))) / n)


def initial_population(
    space: SearchSpace, size: int, seed: int, *, seeds: FloatArray, seed_share: float = 0.5
) -> FloatArray:
    """Genomes to start from, distinct as policies as far as the space allows.

    Args:
        space: Says which genomes are the same policy.
        size: How many.
        seed: Of the random part.
        seeds: `(m, n_genes)` taken first, at most `size` of them.
        seed_share: The ladder of uniform ratios may fill the population up to this share.

    Returns:
        `(size, n_genes)` in [0, 1].
    """
    rng = np.random.default_rng(seed)
    ladder = space.ladder(max(0, int(size * seed_share) - len(seeds)))
    chosen = np.concatenate([seeds[:size], ladder])
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
