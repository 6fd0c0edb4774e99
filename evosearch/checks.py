"""Checks of arrays that cross a border: one form of message for all of them."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evosearch.errors import SpaceError

__all__ = ["check_finite", "check_shape", "check_unit_interval"]

FloatArray = NDArray[np.float64]


def check_shape(array: NDArray[Any], name: str, shape: tuple[int | str, ...]) -> None:
    """Checks a shape; a string stands for a size that may be anything.

    Raises:
        SpaceError: The shape differs; names the argument, the wanted and the actual shape.
    """
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise SpaceError(f"{name} must have shape ({wanted}), got {array.shape}")


def check_finite(array: NDArray[Any], name: str) -> None:
    """Checks that no entry is NaN or infinite.

    Raises:
        SpaceError: Some are; names the first.
    """
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise SpaceError(f"{name} must be finite, found {array[where]} at {where}")


def check_unit_interval(genomes: ArrayLike, n_genes: int) -> FloatArray:
    """Returns genomes as `(n, n_genes)` float64 after checking that they lie in [0, 1].

    Raises:
        SpaceError: Another shape, a NaN, or an entry outside [0, 1].
    """
    array = np.asarray(genomes, dtype=np.float64)
    check_shape(array, "genomes", ("n", n_genes))
    check_finite(array, "genomes")
    if array.size and (array.min() < 0 or array.max() > 1):
        raise SpaceError(f"genomes must lie in [0, 1], found {array.min()} to {array.max()}")
    return array
