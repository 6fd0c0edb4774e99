"""Files appear whole or not at all, and a wrong name is a sentence."""

from pathlib import Path

import pytest
from torch import nn

from evosearch.errors import BackendError, ConfigError
from evosearch.files import write_atomically
from evosearch.networks import save_weights
from evosearch.results.export import Records, export


def test_a_file_gets_its_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "c.txt", lambda scratch: scratch.write_text("x"))
    save_weights(tmp_path / "d" / "w.safetensors", nn.Linear(2, 2), {})
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"
    assert (tmp_path / "d" / "w.safetensors").stat().st_size > 0


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for name in ("x.csv", "deeper/x.csv"):
        with pytest.raises(
            ConfigError, match=r"cannot write .*x.csv: .* is not a folder"
        ) as caught:
            export(Records((), ()), tmp_path / "notes" / name)
        assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"notes is not a folder"):
        save_weights(tmp_path / "notes" / "w.safetensors", nn.Linear(2, 2), {})
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(ConfigError, match=r"x.csv is a folder; name a file"):
        export(Records((), ()), tmp_path / "x.csv")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    def fails(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "x.csv").write_text("whole")
    with pytest.raises(BackendError, match=r"cannot write .*x.csv: No space left on device"):
        write_atomically(tmp_path / "x.csv", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]
    assert (tmp_path / "x.csv").read_text() == "whole"
