"""What holds for every test run: one thread per process, and Ray first.

Two workers share two cores, and so do processes that tests start. Threads that wait for each other
while another process has their core make tests several times slower.
"""

import os

# Before anything imports numpy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file goes first: begun last, it would keep one worker waiting for the other."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
