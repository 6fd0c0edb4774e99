"""How many threads torch computes on: sums on one do not depend on the machine's cores."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["on_threads"]


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Runs torch on so many CPU threads meanwhile; on as many as it has if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
