"""When what a search remembered may be used again."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evosearch.snapshots import snapshot_stamp


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A space of a user's, with half of what it does in a file of its own."""
    folder = tmp_path / "spaces_of_mine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "widths.py").write_text("FACTOR = 1\n")
    (folder / "space.py").write_text(
        "from search_spaces.layer_sparsity import LayerSparsity\n"
        "from spaces_of_mine.widths import FACTOR\n"
        "class Mine(LayerSparsity):\n"
        "    def __init__(self): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("spaces_of_mine")]:
        del sys.modules[name]


def test_a_snapshot_is_of_all_the_code_of_a_space(package: Path) -> None:
    space = importlib.import_module("spaces_of_mine.space").Mine()
    before = snapshot_stamp(space)
    assert snapshot_stamp(space) == before
    (package / "widths.py").write_text("FACTOR = 2\n")
    assert snapshot_stamp(space) != before


def test_a_snapshot_is_of_the_code_that_a_space_is_derived_from(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = importlib.import_module("spaces_of_mine.space").Mine()
    read: list[Path] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or plain(path))
    snapshot_stamp(space)
    names = {path.name for path in read}
    assert {"widths.py", "layer_sparsity.py", "surrogate.py", "__init__.py"} <= names
