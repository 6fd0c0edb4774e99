"""What holds for every test run: two workers on two cores, beside processes that tests start."""

import os
import signal

# Threads that wait for each other while another process has their core make tests several times
# slower. Said before anything imports numpy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Who runs tests in the background may have them ignore Ctrl-C, which processes inherit that tests
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

# Seconds on the clock tell what the neighbour does, not how slow a test is.
settings.register_profile("neighbours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("neighbours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file goes first: begun last, it would keep one worker waiting for the other."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
