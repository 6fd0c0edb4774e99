"""torchvision's own readers, on files in their formats (the official checksums left out)."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from evosearch.data import SourceOptions, open_source
from evosearch.errors import DataError


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST: magic number, sizes, bytes."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


def test_mnist_is_held_out_from_its_end(mnist: Path) -> None:
    source = open_source("mnist", SourceOptions(root=mnist))
    assert source.training().labels.tolist() == [i % 10 for i in range(54)]
    held_out = source.held_out().take(np.arange(6))
    assert held_out.pixels.shape == (6, 28, 28, 1)
    assert held_out.labels.tolist() == [4, 5, 6, 7, 8, 9]
    assert len(source.test().labels) == 20


def test_fashion_mnist_is_read_from_its_own_folder(mnist: Path) -> None:
    (mnist / "MNIST").rename(mnist / "FashionMNIST")
    assert len(open_source("fashion-mnist", SourceOptions(root=mnist)).training().labels) == 54


def test_a_damaged_file_names_the_folder_and_the_way_out(mnist: Path) -> None:
    images = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"MNIST in .*; set download = true"):
        open_source("mnist", SourceOptions(root=mnist)).training()


@pytest.mark.parametrize(
    ("name", "reader", "folder", "files", "key"),
    [
        ("cifar10", datasets.CIFAR10, "cifar-10-batches-py", ["data_batch_1"], "labels"),
        ("cifar100", datasets.CIFAR100, "cifar-100-python", ["train"], "fine_labels"),
    ],
)
def test_cifar_is_read_as_height_width_channels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reader: type,
    folder: str,
    files: list[str],
    key: str,
) -> None:
    # torchvision compares with the official checksums, which only the official files have.
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    labels = list(range(10)) * 5
    place = tmp_path / folder
    place.mkdir()
    (place / files[0]).write_bytes(pickle.dumps({"data": pixels.reshape(50, -1), key: labels}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [], "fine_label_names": []}))
    monkeypatch.setattr(reader, "train_list", [[files[0], None]])
    monkeypatch.setattr(reader, "test_list", [[files[0], None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(reader, "meta", meta)
    source = open_source(name, SourceOptions(root=tmp_path))
    first = source.training().take(np.array([0]))
    assert np.array_equal(first.pixels[0], pixels[0].transpose(1, 2, 0))
    assert source.held_out().labels.tolist() == labels[-5:]
