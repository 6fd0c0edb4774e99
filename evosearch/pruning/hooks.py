"""Hooks that see what layers are given and what they return, and are gone afterwards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["first_input", "hooked"]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks in the end, whatever happens meanwhile."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def first_input(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """What a layer reads, given by place or by keyword."""
    return next(iter((*inputs, *named.values())))
