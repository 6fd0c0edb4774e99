"""Makes the CIFAR-10 sample that ships with the package.

    python -m evosearch.data.make_sample TRAIN.npz TEST.npz FOLDER

TRAIN and TEST hold all images of CIFAR-10 in official order. Written to FOLDER: one lossless WebP
sheet per part, and index.json with labels and the indices that the images were taken from.
"""

import json
import sys
from pathlib import Path

import numpy as np

from evosearch.data.arrays import Images, balanced_subset

PARTS = {"calibration": 1000, "validation": 2000, "test": 2000}
SEED = 0
SIDE = 32
ROWS = 40


def make_sample(train: Images, test: Images, folder: Path) -> None:
    """Chooses, tiles and writes.

    Args:
        train: All 50,000 training images in official order.
        test: All 10,000 test images.
        folder: Made if missing.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pools = {
        "calibration": (train, np.arange(45_000)),
        "validation": (train, np.arange(45_000, 50_000)),
        "test": (test, np.arange(10_000)),
    }
    index = {}
    for part, size in PARTS.items():
        images, candidates = pools[part]
        indices = candidates[balanced_subset(images.labels[candidates], size, SEED)]
        tiles = images.pixels[indices].reshape(ROWS, -1, SIDE, SIDE, 3)
        sheet = tiles.swapaxes(1, 2).reshape(ROWS * SIDE, -1, 3)
        Image.fromarray(sheet).save(folder / f"{part}.webp", lossless=True, quality=100, method=6)
        index[part] = {
            "rows": ROWS,
            "side": SIDE,
            "labels": images.labels[indices].tolist(),
            "indices": indices.tolist(),
        }
    (folder / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")


def _read(path: str) -> Images:
    with np.load(path, allow_pickle=False) as archive:
        return Images(archive["images"], archive["labels"].astype(np.int64))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    make_sample(_read(sys.argv[1]), _read(sys.argv[2]), Path(sys.argv[3]))
