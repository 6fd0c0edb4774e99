"""The standard augmentation of small images: random crops of padded images, mirrored or not."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["augment"]


def augment(
    pixels: NDArray[np.uint8], padding: int, flip: bool, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random crops of zero-padded images, half of them mirrored.

    Args:
        pixels: `(n, height, width, channels)` uint8.
        padding: Zeros added on each side before cropping back to the size; 0 for no crop.
        flip: Whether to mirror.
        rng: Source of the choices.

    Returns:
        Array like `pixels`.
    """
    n, height, width, _ = pixels.shape
    if padding:
        around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = np.pad(pixels, around)
        top, left = rng.integers(0, 2 * padding + 1, (2, n))
        rows = top[:, None, None] + np.arange(height)[None, :, None]
        columns = left[:, None, None] + np.arange(width)[None, None, :]
        pixels = padded[np.arange(n)[:, None, None], rows, columns]
    if flip:
        mirrored = rng.random((n, 1, 1, 1)) < 0.5
        pixels = np.where(mirrored, pixels[:, :, ::-1], pixels)
    return pixels
