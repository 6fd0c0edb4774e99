"""Evolutionary search of pruning policies for convolutional networks.

    evosearch launch quickstart                   # from the shell
    run = evosearch.launch("quickstart")          # or from Python
    run.network(run.front.policy[0])              # a network that a search found
    evosearch.load_pruned("small.safetensors")    # one that was exported

Heavy libraries are imported when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evosearch.api import Run, launch
    from evosearch.results.models import load_pruned

__all__ = ["Run", "launch", "load_pruned"]

_PLACES = {"Run": "api", "launch": "api", "load_pruned": "results.models"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'evosearch' has no attribute {name!r}")
    return getattr(import_module(f"evosearch.{_PLACES[name]}"), name)
