"""Fixtures of several files."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.unit.search_bench import Bench


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system can: durability is what test_ledger tests."""
    shared = Path("/dev/shm")
    where = shared if os.access(shared, os.W_OK) else tmp_path
    with TemporaryDirectory(dir=where) as path:
        yield Path(path)


@pytest.fixture
def bench(folder: Path) -> Bench:
    return Bench(folder / "run")
