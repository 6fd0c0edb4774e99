"""Evolutionary search of pruning policies for convolutional networks.

    evosearch launch quickstart          # from the shell
    evosearch.load_pruned("small.safetensors")   # a network that a search found

Heavy libraries are imported when something needs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evosearch.results.models import load_pruned

__all__ = ["load_pruned"]


def __getattr__(name: str) -> Any:
    if name == "load_pruned":
        from evosearch.results.models import load_pruned

        return load_pruned
    raise AttributeError(f"module 'evosearch' has no attribute {name!r}")
