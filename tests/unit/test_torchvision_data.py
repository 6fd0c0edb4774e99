"""torchvision's own readers, on files in their formats (the official checksums left out)."""

import pickle
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class _Interrupted(BaseHTTPRequestHandler):
    """Announces more than it sends, as a connection does that breaks."""

    chunked = False

    def do_HEAD(self) -> None:
        self.send_response(200)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", "100000")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"3e8\r\n" if self.chunked else b"\x1f\x8b")
        self.wfile.write(bytes(500))

    def log_message(self, *_: object) -> None:
        pass


class _InterruptedChunks(_Interrupted):
    protocol_version = "HTTP/1.1"
    chunked = True

    def do_GET(self) -> None:
        super().do_GET()
        self.close_connection = True


@pytest.mark.parametrize("handler", [_Interrupted, _InterruptedChunks])
def test_an_interrupted_download_names_the_folder_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: type[_Interrupted]
) -> None:
    # Half an archive is here already: torchvision compares it with the official checksum, fetches
    # it again, and the connection breaks.
    (tmp_path / datasets.CIFAR10.filename).write_bytes(b"\x1f\x8b" + bytes(100))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(datasets.CIFAR10, "url", url)
        source = open_source("cifar10", SourceOptions(root=tmp_path, download=True))
        with pytest.raises(DataError, match=r"CIFAR10 in .*; remove what is there and try again"):
            source.training()
        server.shutdown()


def test_a_truncated_archive_that_is_not_to_be_fetched_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / datasets.CIFAR10.filename).write_bytes(b"\x1f\x8b" + bytes(500))
    with pytest.raises(DataError, match=r"CIFAR10 in .*; set download = true to fetch it"):
        open_source("cifar10", SourceOptions(root=tmp_path)).training()


def test_a_connection_that_breaks_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(DataError, match=r"CIFAR10 in .*; remove what is there and try again"):
        open_source("cifar10", SourceOptions(root=tmp_path, download=True)).training()
