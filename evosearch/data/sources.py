"""Where images come from: torchvision's data sets, folders, `.npz` files, the shipped sample.

A source has three parts that never overlap: `training` (may be trained on), `held_out` (never
trained on; what a search validates with) and `test` (opened by a final report only).
"""

import functools
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evosearch.data.arrays import ImagePool, Images, Subpool, held_out_mask
from evosearch.errors import DataError

__all__ = ["DATASETS", "DataSource", "SourceOptions", "open_source"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to open a source.

    Args:
        root: Folder of torchvision's files, or of an image folder (with `train/` and `test/`).
        download: Let torchvision fetch what is missing.
        test_path: The `.npz` with the test images, for an `.npz` source.
        held_out: Images taken from the end of the training part (official orders) or class by
            class; a tenth if None.
        official_order: Whether the order of the images is already random; None lets the source
            say (CIFAR and MNIST: yes, folders and `.npz`: no).
        image_size: Height and width that an image folder is resized to.
        seed: Seed of the class-balanced choice of held-out images.
    """

    root: Path = Path("data")
    download: bool = False
    test_path: Path | None = None
    held_out: int | None = None
    official_order: bool | None = None
    image_size: tuple[int, int] = (32, 32)
    seed: int = 0


class DataSource(Protocol):
    """Three disjoint pools of labelled images."""

    def training(self) -> ImagePool:
        """Images that a network may be trained on."""

    def held_out(self) -> ImagePool:
        """Images that no network was trained on, for validation."""

    def test(self) -> ImagePool:
        """Images for a final report only."""


@dataclass(frozen=True, eq=False)
class _Partitioned:
    """A training set cut in two, and a test set; each is opened when first asked for."""

    open_training: Callable[[], ImagePool]
    open_test: Callable[[], ImagePool]
    official_order: bool
    options: SourceOptions

    @functools.cached_property
    def _parts(self) -> tuple[ImagePool, ImagePool]:
        pool = self.open_training()
        wanted = self.options.held_out
        official = self.options.official_order
        mask = held_out_mask(
            pool.labels,
            len(pool.labels) // 10 if wanted is None else wanted,
            official_order=self.official_order if official is None else official,
            seed=self.options.seed,
        )
        return Subpool(pool, np.flatnonzero(~mask)), Subpool(pool, np.flatnonzero(mask))

    def training(self) -> ImagePool:
        return self._parts[0]

    def held_out(self) -> ImagePool:
        return self._parts[1]

    def test(self) -> ImagePool:
        return self.open_test()


@dataclass(frozen=True)
class _Sample:
    """The CIFAR-10 images that ship with the package.

    1,000 of the first 45,000 training images, 2,000 of the last 5,000, 2,000 test images, classes
    balanced; `index.json` beside them says which.
    """

    folder: str

    def _read(self, part: str) -> Images:
        from PIL import Image

        root = resources.files("evosearch.data") / "samples" / self.folder
        index = json.loads((root / "index.json").read_text())[part]
        with (root / f"{part}.webp").open("rb") as stream:
            sheet = np.asarray(Image.open(stream).convert("RGB"))
        rows, side = index["rows"], index["side"]
        tiles = sheet.reshape(rows, side, -1, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return Images(np.ascontiguousarray(tiles), np.array(index["labels"], dtype=np.int64))

    def training(self) -> Images:
        return self._read("calibration")

    def held_out(self) -> Images:
        return self._read("validation")

    def test(self) -> Images:
        return self._read("test")


@dataclass(frozen=True, eq=False)
class _Files:
    """Image files, decoded when taken: cropped to the wanted aspect, then resized."""

    paths: list[str]
    labels: NDArray[np.int64]
    size: tuple[int, int]

    def take(self, indices: NDArray[np.int64]) -> Images:
        from PIL import Image, ImageOps

        height, width = self.size
        pixels = np.empty((len(indices), height, width, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            try:
                with Image.open(self.paths[index]) as image:
                    pixels[row] = np.asarray(
                        ImageOps.fit(
                            image.convert("RGB"), (width, height), Image.Resampling.BILINEAR
                        )
                    )
            # Pillow raises the first two for broken files, the last for enormous ones.
            except (OSError, SyntaxError, Image.DecompressionBombError) as exc:
                raise DataError(f"{self.paths[index]} is not a readable image: {exc}") from exc
        return Images(pixels, self.labels[indices])


# Of grey images, of coloured ones, and with an alpha channel.
_CHANNELS = (1, 3, 4)


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels as an .npz file has them."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"images", "labels"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{path} has no array {' and no '.join(sorted(missing))}; wanted images "
                    f"(n, height, width, channels) uint8 and labels (n,), found "
                    f"{', '.join(archive.files) or 'nothing'}"
                )
            return archive["images"], archive["labels"]
    except FileNotFoundError as exc:
        raise DataError(f"data file {path} does not exist") from exc
    except (OSError, ValueError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as exc:
        if isinstance(exc, DataError):
            raise
        # What numpy says of pickles would have the user turn off a safeguard.
        if "Object arrays" in str(exc):
            raise DataError(f"{path}: an array holds objects; wanted numbers") from exc
        raise DataError(
            f"{path} is not a readable .npz file: damaged, or a file of another kind; wanted what "
            "numpy.savez(FILE, images=..., labels=...) writes"
        ) from exc


def _read_npz(path: Path) -> Images:
    pixels, labels = _arrays(path)
    if not np.issubdtype(labels.dtype, np.integer):
        hint = "; labels.astype(int)" if np.issubdtype(labels.dtype, np.floating) else ""
        raise DataError(f"{path}: labels must be integers, got {labels.dtype}{hint}")
    if pixels.ndim == 3:
        pixels = pixels[..., np.newaxis]
    if pixels.ndim == 4 and pixels.shape[1] in _CHANNELS and pixels.shape[3] not in _CHANNELS:
        raise DataError(
            f"{path}: images of shape {pixels.shape} look like (n, channels, height, width), "
            "wanted (n, height, width, channels): images.transpose(0, 2, 3, 1)"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    try:
        return Images(pixels, labels.astype(np.int64))
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from exc


def _npz(path: Path, options: SourceOptions) -> DataSource:
    def read_test() -> ImagePool:
        if options.test_path is None:
            raise DataError(f"{path} has no test images; name their file (data.test)")
        return _read_npz(options.test_path)

    return _Partitioned(lambda: _read_npz(path), read_test, False, options)


# What torchvision lets through when files are damaged, or a download breaks off.
_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, zlib.error, HTTPException)


def _torchvision(class_name: str, options: SourceOptions) -> DataSource:
    def reader(train: bool) -> Callable[[], ImagePool]:
        def read() -> ImagePool:
            from torchvision import datasets

            try:
                data = getattr(datasets, class_name)(
                    options.root, train=train, download=options.download
                )
            except _UNREADABLE as exc:
                hint = (
                    "remove what is there and try again"
                    if options.download
                    else "set download = true to fetch it, or name another root"
                )
                raise DataError(f"{class_name} in {options.root}: {exc}; {hint}") from exc
            pixels = np.asarray(data.data)
            if pixels.ndim == 3:
                pixels = pixels[..., np.newaxis]
            return Images(pixels, np.asarray(data.targets, dtype=np.int64))

        return read

    return _Partitioned(reader(True), reader(False), True, options)


def _image_folder(options: SourceOptions) -> DataSource:
    def read(part: str) -> ImagePool:
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import find_classes

        folder = options.root / part
        for wanted in (folder, options.root / "train"):
            if not wanted.is_dir():
                raise DataError(
                    f"image folder {wanted} does not exist; wanted {options.root}/train/CLASS/* "
                    f"and {options.root}/test/CLASS/*"
                )
        try:
            # Classes are numbered by the training part, also where the test part lacks some.
            classes, _ = find_classes(str(options.root / "train"))
            found = ImageFolder(str(folder), allow_empty=part == "test")
        except FileNotFoundError as exc:
            raise DataError(f"image folder {folder}: {exc}") from exc
        unknown = sorted(set(found.classes) - set(classes))
        if unknown:
            raise DataError(f"image folder {folder} has classes that train has not: {unknown[0]}")
        labels = [classes.index(found.classes[label]) for _, label in found.samples]
        paths = [path for path, _ in found.samples]
        return _Files(paths, np.array(labels, dtype=np.int64), options.image_size)

    return _Partitioned(lambda: read("train"), lambda: read("test"), False, options)


DATASETS: dict[str, tuple[str, Callable[[SourceOptions], DataSource]]] = {
    "cifar10-sample": (
        "5,000 CIFAR-10 images that ship with evosearch",
        lambda _options: _Sample("cifar10"),
    ),
    "cifar10": ("CIFAR-10 (torchvision)", lambda options: _torchvision("CIFAR10", options)),
    "cifar100": ("CIFAR-100 (torchvision)", lambda options: _torchvision("CIFAR100", options)),
    "mnist": ("MNIST (torchvision)", lambda options: _torchvision("MNIST", options)),
    "fashion-mnist": (
        "Fashion-MNIST (torchvision)",
        lambda options: _torchvision("FashionMNIST", options),
    ),
    "image-folder": ("ROOT/train/CLASS/* and ROOT/test/CLASS/*", _image_folder),
}


def open_source(name: str, options: SourceOptions | None = None) -> DataSource:
    """Opens a data source by name, or an `.npz` file by path. Reads nothing yet.

    Raises:
        DataError: There is no such source.
    """
    options = options or SourceOptions()
    if name.endswith(".npz"):
        return _npz(Path(name), options)
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; there are {', '.join(DATASETS)}, or a path to .npz")
    return DATASETS[name][1](options)
