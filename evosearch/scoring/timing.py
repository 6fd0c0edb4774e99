"""Times forward passes of networks of many widths, for a model of latency."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evosearch.errors import ConfigError
from evosearch.latency import BLOCK, LatencyModel, fit_latency, minds_odd_widths
from evosearch.networks import Network
from evosearch.networks.threads import on_threads
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.table import GroupTable
from evosearch.recipe import LatencyRecipe
from evosearch.scoring.stopwatches import STOPWATCHES, Stopwatch, stopwatch_named

__all__ = ["draw_widths", "even_and_odd", "seconds_of", "shares_of", "stand_in", "time_passes"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Policies that are timed, the dense network among them; fewer than the least foretell nothing.
_POLICIES, _LEAST = 64, 16
# Chances of a block to be left out, by turns.
_LEFT_OUT = (0.0, 0.2, 0.6, 0.4, 0.0, 0.8, 0.3, 1.0)
# Policies are timed in turns, until so much time is spent.
_SECONDS, _LEAST_TURNS, _MOST_TURNS = 30.0, 2, 5
# So many of those that a search chose; between, it can be stopped.
_TOGETHER = 8


@dataclass(frozen=True)
class _Clock:
    """What a pass is, and who measures it."""

    stopwatch: Stopwatch
    own: bool
    """Whether it is a user's."""
    images: Tensor
    threads: int


def _clock(network: Network, recipe: LatencyRecipe) -> _Clock:
    return _Clock(
        stopwatch_named(recipe.measure),
        recipe.measure is not None and recipe.measure not in STOPWATCHES,
        network.example(recipe.images),
        recipe.threads,
    )


def time_passes(
    network: Network, plan: CuttingPlan, recipe: LatencyRecipe, round_to: int | None = 1
) -> LatencyModel:
    """Times networks of random widths, some seconds altogether, and fits a model to them.

    Which channels go decides nothing about time: the first ones stay.

    Args:
        network: Dense.
        plan: How it is cut.
        recipe: What a pass is.
        round_to: Widths are multiples of this; None leaves that open: then of `BLOCK`, where
            others turn out to be slow.

    Raises:
        ConfigError: There is no such stopwatch, or it does not return seconds.
    """
    clock = _clock(network, recipe)
    odd = None
    if round_to is None or round_to % BLOCK:
        pair = even_and_odd(plan.table)
        even, less = _in_turns(network, plan, clock, pair, _SECONDS, least=_MOST_TURNS)
        odd = float(less / even) if math.isfinite(less) and math.isfinite(even) else None
    if round_to is None:
        round_to = BLOCK if minds_odd_widths(odd) else 1
    keep = draw_widths(plan.table, _POLICIES, 0, round_to)
    seconds = _in_turns(network, plan, clock, keep, _SECONDS)
    timed = np.isfinite(seconds)
    if not timed[0] or timed.sum() < _LEAST:
        raise ConfigError(
            f"latency: of {len(keep)} networks of random widths only {timed.sum()} could be run; "
            "leave latency out of search and space"
        )
    channels = plan.table.channels.tolist()
    model = fit_latency(plan.table.shapes(), channels, keep[timed], seconds[timed])
    return model.model_copy(update={"odd": odd})


def even_and_odd(table: GroupTable) -> IntArray:
    """`(2, n_groups)`: three quarters of all channels, in multiples of `BLOCK`; and one less."""
    blocks = np.ceil(table.channels * 0.75 / BLOCK).astype(np.int64)
    even = np.minimum(blocks * BLOCK, table.channels)
    return table.whole(np.stack([even, np.maximum(even - 1, 1)]))


def stand_in(table: GroupTable) -> LatencyModel:
    """A model before anything is timed, as if MACs were seconds: for checks of spelling alone."""
    keep = draw_widths(table, _POLICIES, 0)
    seconds = np.asarray(table.costs(keep)[0], dtype=np.float64)
    return fit_latency(table.shapes(), table.channels.tolist(), keep, seconds)


def shares_of(
    network: Network,
    plan: CuttingPlan,
    recipe: LatencyRecipe,
    keep: IntArray,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, float]]:
    """The time that networks take, as shares of the dense network's; not foreseen, but timed.

    Args:
        network: Dense.
        plan: How it is cut.
        recipe: What a pass is.
        keep: `(n, n_groups)` kept channels.
        stop: Asked now and then; once true, no more are timed.

    Yields:
        Row of `keep`, and its share; rows whose network cannot be run are left out.

    Raises:
        ConfigError: There is no such stopwatch, or it does not return seconds.
    """
    clock = _clock(network, recipe)
    for start in range(0, len(keep), _TOGETHER):
        if stop():
            return
        part = keep[start : start + _TOGETHER]
        seconds = _SECONDS * (len(part) + 1) / _POLICIES
        rows = np.stack([plan.table.channels, *part])
        found = _in_turns(network, plan, clock, rows, seconds)
        if not math.isfinite(found[0]):
            raise ConfigError("latency: the dense network cannot be run here")
        for row, share in enumerate(found[1:] / found[0], start):
            if math.isfinite(share):
                yield row, float(share)


def seconds_of(
    network: Network, plan: CuttingPlan, recipe: LatencyRecipe, keep: IntArray
) -> FloatArray:
    """`(n,)` seconds of `(n, n_groups)` kept channels; infinite where a network cannot be run.

    A shared machine is now fast and now slow, by half as much again. So each policy is timed beside
    a reference that keeps half of all channels; the median of their ratios counts. They take turns
    until half a minute is over, twice at least; no longer if the stopwatch, which may as well
    compute times, says the same twice.

    Raises:
        ConfigError: There is no such stopwatch, it does not return seconds, or the reference cannot
            be run.
    """
    return _in_turns(network, plan, _clock(network, recipe), keep, _SECONDS)


def _in_turns(
    network: Network,
    plan: CuttingPlan,
    clock: _Clock,
    keep: IntArray,
    most_seconds: float,
    least: int = _LEAST_TURNS,
) -> FloatArray:
    cutter, reference = Cutter(plan, network.module), Cutter(plan, network.module)
    half = plan.table.whole(-(-plan.table.channels // 2))
    ratios: list[list[float]] = []
    beside: list[float] = []
    with on_threads(clock.threads):
        start = time.perf_counter()
        while len(ratios) < least or (
            len(ratios) < _MOST_TURNS and time.perf_counter() - start < most_seconds
        ):
            turn = []
            for row in keep:
                beside.append(_seconds(clock, reference, half))
                turn.append(_seconds(clock, cutter, row) / beside[-1])
            ratios.append(turn)
            if len(ratios) >= _LEAST_TURNS and ratios[-1] == ratios[-2]:
                break
    if not math.isfinite(min(beside)):
        raise ConfigError(
            "latency: with half of all channels the network cannot be run; leave latency out of "
            "search and space"
        )
    return np.asarray(np.median(ratios, axis=0) * min(beside))


def draw_widths(table: GroupTable, n: int, seed: int, round_to: int = 1) -> IntArray:
    """`(n, n_groups)` kept channels: dense, then random ones.

    Half of them lie about random levels, so that all costs are seen; half are random in each group,
    as a search narrows some groups far and others not at all. Where blocks can be left out, one
    policy in four has all of them; the others lack one of six random choices of them, few as some
    stopwatches need long for each.

    Args:
        table: Knows the groups, and the blocks if any may go.
        n: How many policies.
        seed: Of what is random.
        round_to: Widths are multiples of this, or all channels; of grouped convolutions, whole
            groups.
    """
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0.1, 1.0, size=(n, 1))
    shares = levels + rng.uniform(-0.3, 0.3, size=(n, len(table.groups)))
    shares[n // 2 :] = rng.uniform(0.05, 1.0, size=(n - n // 2, len(table.groups)))
    wanted = np.ceil(table.channels * shares.clip(0.05, 1.0) / round_to) * round_to
    keep = table.whole(np.minimum(wanted.astype(np.int64), table.channels))
    if table.blocks:
        chance = np.array(_LEFT_OUT)[:, None]
        out = rng.random((len(_LEFT_OUT), len(table.blocks))) < chance
        keep[(out @ table.in_block)[np.arange(n) % len(_LEFT_OUT)]] = 0
    keep[0] = table.channels
    return np.asarray(keep)


def _seconds(clock: _Clock, cutter: Cutter, keep: IntArray) -> float:
    """Of one policy; infinite if its network cannot be run."""
    module = cutter.cut(cutter.plan.table.mask(keep)).eval()
    if clock.own:
        module = copy.deepcopy(module)  # a user may move it to another device
    try:
        found = clock.stopwatch(module, clock.images)
    except ConfigError:
        raise
    except Exception as exc:
        if clock.own:
            raise ConfigError(f"latency.measure failed with {exc!r}") from exc
        return math.inf
    # A number of numpy or torch is as good; what a user's function returns may be anything.
    try:
        seconds = float(found)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"latency.measure must return seconds above 0, got {found!r}")
    return seconds
