"""Times forward passes of networks of many widths, for a model of latency."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import ConfigError
from evosearch.latency import LatencyModel, fit_latency
from evosearch.networks import Network, import_own
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.table import GroupTable
from evosearch.recipe import LatencyRecipe

__all__ = ["Stopwatch", "stopwatch_named", "time_passes"]

IntArray = NDArray[np.int64]
Stopwatch = Callable[[nn.Module, Tensor], float]
"""From a network and `(n, c, h, w)` float32 images to the seconds that a forward pass takes."""

# Policies that are timed, the dense network among them; fewer than the least foretell nothing.
_POLICIES, _LEAST = 64, 16
# Other processes come and go: all policies are timed in turns, for about so long.
_SECONDS, _MOST_TURNS = 15.0, 5
_PASSES = 3


@torch.inference_mode()
def eager_seconds(module: nn.Module, images: Tensor) -> float:
    """The fastest of a few forward passes, after one to warm up."""
    module(images)
    found = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        module(images)
        found.append(time.perf_counter() - start)
    return min(found)


def stopwatch_named(name: str | None) -> Stopwatch:
    """A user's function; PyTorch as it is, if there is no name.

    Raises:
        ConfigError: It cannot be imported or is no function.
    """
    if name is None:
        return eager_seconds
    if ":" not in name:
        raise ConfigError(
            f"latency.measure = {name!r}: name your own function as module:function or "
            "path/to/file.py:function"
        )
    try:
        found = import_own(name)
    except ConfigError as exc:
        raise ConfigError(f"latency.measure = {name!r}: {exc}") from exc
    except (Exception, SystemExit) as exc:  # a user's file may do anything while it is imported
        raise ConfigError(f"latency.measure = {name!r}: importing it failed with {exc!r}") from exc
    if not callable(found):
        raise ConfigError(
            f"latency.measure = {name!r} is no function, but a {type(found).__name__}"
        )
    return found


def time_passes(
    network: Network, plan: CuttingPlan, recipe: LatencyRecipe, round_to: int = 1
) -> LatencyModel:
    """Times networks of random widths, some seconds altogether, and fits a model to them.

    Which channels go decides nothing about time: the first ones stay.

    Args:
        network: Dense.
        plan: How it is cut.
        recipe: What a pass is.
        round_to: Widths are multiples of this.

    Raises:
        ConfigError: There is no such stopwatch, or it does not return seconds.
    """
    stopwatch = stopwatch_named(recipe.measure)
    images = network.example(recipe.images)
    keep = _draw(plan.table, round_to)
    cutter = Cutter(plan, network.module)
    turns: list[list[float]] = []
    with _threads(recipe.threads):
        start = time.perf_counter()
        while len(turns) < _MOST_TURNS:
            turns.append([_seconds(stopwatch, cutter, row, images) for row in keep])
            if time.perf_counter() - start > _SECONDS * len(turns) / (len(turns) + 1):
                break
    seconds = np.median(np.array(turns), axis=0)
    timed = np.isfinite(seconds)
    if not timed[0] or timed.sum() < _LEAST:
        raise ConfigError(
            f"latency: of {len(keep)} networks of random widths only {timed.sum()} could be run; "
            "leave latency out of search and space"
        )
    axes, layers = plan.table.shapes()
    return fit_latency(axes, layers, plan.table.channels.tolist(), keep[timed], seconds[timed])


def _draw(table: GroupTable, round_to: int) -> IntArray:
    """`(n, n_groups)` kept channels: dense, and random ones about random levels."""
    rng = np.random.default_rng(0)
    levels = rng.uniform(0.1, 1.0, size=(_POLICIES, 1))
    shares = levels + rng.uniform(-0.3, 0.3, size=(_POLICIES, len(table.groups)))
    wanted = np.ceil(table.channels * shares.clip(0.05, 1.0) / round_to) * round_to
    keep = np.minimum(wanted.astype(np.int64), table.channels)
    keep[0] = table.channels
    return np.asarray(keep)


def _seconds(stopwatch: Stopwatch, cutter: Cutter, keep: IntArray, images: Tensor) -> float:
    """Of one policy; infinite if its network cannot be run."""
    table = cutter.plan.table
    place = np.arange(len(table.group_of)) - table.offsets[table.group_of]
    kept = np.append(place < keep[table.group_of], True)
    try:
        found = float(stopwatch(cutter.cut(kept).eval(), images))
    except Exception as exc:
        if stopwatch is not eager_seconds:
            raise ConfigError(f"latency.measure failed with {exc!r}") from exc
        return math.inf
    if not 0 < found < math.inf:
        raise ConfigError(f"latency.measure must return seconds above 0, got {found}")
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
