"""Images and labels as plain arrays, and the deterministic ways to choose some of them."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import DataError

__all__ = [
    "ImagePool",
    "Images",
    "Subpool",
    "balanced_subset",
    "check_classes",
    "held_out_mask",
    "whole",
]

ImageArray = NDArray[np.uint8]
LabelArray = NDArray[np.int64]
IndexArray = NDArray[np.int64]


class ImagePool(Protocol):
    """Labelled images of which some can be read: all labels are known, pixels cost a read."""

    @property
    def labels(self) -> LabelArray:
        """`(n,)` class of every image."""

    def take(self, indices: IndexArray) -> "Images":
        """Reads the images at `indices`."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one size.

    Args:
        pixels: `(n, height, width, channels)` uint8.
        labels: `(n,)` int64, each >= 0.

    Raises:
        DataError: The arrays have another shape or type, or their lengths differ.
    """

    pixels: ImageArray
    labels: LabelArray

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != np.uint8:
            raise DataError(
                "images must be uint8 of shape (n, height, width, channels), "
                f"got {self.pixels.dtype} of shape {self.pixels.shape}"
            )
        if self.labels.shape != (len(self.pixels),) or self.labels.dtype != np.int64:
            raise DataError(
                f"labels must be int64 of shape ({len(self.pixels)},), "
                f"got {self.labels.dtype} of shape {self.labels.shape}"
            )
        if len(self.labels) and self.labels.min() < 0:
            raise DataError(f"labels must be >= 0, found {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: IndexArray) -> "Images":
        """The images at `indices`, as a copy."""
        return Images(self.pixels[indices], self.labels[indices])

    def with_mirrored(self) -> "Images":
        """Each image followed by its mirror image, left and right exchanged."""
        pixels = np.stack([self.pixels, self.pixels[:, :, ::-1]], axis=1)
        return Images(pixels.reshape(-1, *self.pixels.shape[1:]), np.repeat(self.labels, 2))

    def digest(self) -> str:
        """SHA-256 of shape, pixels and labels: equal digests are equal images in equal order."""
        state = hashlib.sha256(repr(self.pixels.shape).encode())
        state.update(np.ascontiguousarray(self.pixels).data)
        state.update(np.ascontiguousarray(self.labels).data)
        return state.hexdigest()


@dataclass(frozen=True, eq=False)
class Subpool:
    """Some images of a pool, still unread."""

    pool: ImagePool
    indices: IndexArray

    @property
    def labels(self) -> LabelArray:
        """`(n,)` class of every image."""
        return self.pool.labels[self.indices]

    def take(self, indices: IndexArray) -> Images:
        """Reads the images at `indices` (positions within this subpool)."""
        return self.pool.take(self.indices[indices])


def balanced_subset(labels: LabelArray, size: int, seed: int) -> IndexArray:
    """Chooses `size` indices with classes as equal as they can be, in a fixed random order.

    The choice for a smaller size is not a prefix of the choice for a larger one; the same
    arguments always give the same indices.

    Args:
        labels: `(n,)` class of every image.
        size: How many to choose, 1 <= size <= n.
        seed: Seed of the choice.

    Returns:
        `(size,)` distinct indices into `labels`.

    Raises:
        DataError: More images are wanted than there are.
    """
    if not 1 <= size <= len(labels):
        raise DataError(f"wanted {size} images of the {len(labels)} there are")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    # Rank of each image within its class, in shuffled order: taking the smallest ranks first
    # deals the classes out in turn until `size` is reached.
    order = np.argsort(labels[shuffled], kind="stable")
    _, starts, counts = np.unique(labels[shuffled][order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    chosen = shuffled[np.argsort(rank, kind="stable")[:size]]
    return rng.permutation(chosen)


def held_out_mask(
    labels: LabelArray, size: int, *, official_order: bool, seed: int
) -> NDArray[np.bool_]:
    """Marks the images that are never trained on.

    Args:
        labels: `(n,)` class of every training image.
        size: How many to hold out, 0 <= size < n.
        official_order: The order is the official, already random one (CIFAR, MNIST): hold out the
            last `size`, as papers do. Otherwise a class-balanced choice by `seed`.
        seed: Seed of the choice; unused for an official order.

    Returns:
        `(n,)` boolean, True where held out.

    Raises:
        DataError: Nothing would be left to train on.
    """
    if not 0 <= size < len(labels):
        raise DataError(f"cannot hold out {size} of {len(labels)} training images")
    mask = np.zeros(len(labels), dtype=np.bool_)
    if size == 0:
        return mask
    if official_order:
        mask[-size:] = True
    else:
        mask[balanced_subset(labels, size, seed)] = True
    return mask


def check_classes(labels: LabelArray, classes: int, part: str) -> None:
    """Checks that a network has a class for each label.

    Args:
        labels: `(n,)`.
        classes: The network's.
        part: What the images are for, in a message.

    Raises:
        DataError: It has not.
    """
    most = int(labels.max(initial=0))
    if most < classes:
        return
    hint = "set network.num_classes, or name the network of these labels"
    if classes == 1 and most == 1:
        hint = (
            "wrap a network with one output for two classes in one with two, such as "
            "torch.cat([torch.zeros_like(x), x], 1) of its output x"
        )
    if most == classes and labels.min() > 0:
        hint = "labels count from 0, and these seem to count from 1: subtract it"
    raise DataError(
        f"the network has {classes} classes, but a {part} image has the label {most}; {hint}"
    )


def whole(pool: ImagePool) -> Images:
    """All images of a pool."""
    return pool.take(np.arange(len(pool.labels)))
