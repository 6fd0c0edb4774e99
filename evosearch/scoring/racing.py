"""Races: a candidate that is surely dominated need not see all validation images.

A candidate is measured on 1, 2, 4, ... batches, and after each of these rungs, once there are eight
blocks of images, compared, block by block, with a policy that was measured on all images and costs
no more: its rival. Images are the same for both, so most of their differences in difficulty cancel.
If the candidate is worse in everything that is measured, beyond doubt, it is dropped, and what it
would have had on all images is told by the difference to the rival so far.

Doubt is a one-sided t test on differences of block means, with the correction for a finite
population: what matters is the mean over these validation images, of which some have been seen, and
their order is random. The error rate of a race is shared equally among its tests (Bonferroni): it
stands for the chance that a candidate which its rivals do not dominate on all images is dropped by
any of them, at any rung. "Worse in everything" is an intersection of claims: it needs no further
correction [Berger1982]. The rate is nominal: where few images make up most of a mean, block means
are not normal, and it can be exceeded. `benchmarks/racing.py` counts what happens on a network.

Rivals are of earlier generations alone: who was first within a generation decides nothing, and a
resumed search drops what the first one dropped. Knows nothing of torch.

References:
    [Maron1994] O. Maron, A. Moore, "Hoeffding Races", NeurIPS 1994.
    [Berger1982] R. Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling",
        Technometrics 24(4), 1982.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from evosearch.measurement import METRICS, Measurement
from evosearch.pareto import front_mask
from evosearch.policy import Policy
from evosearch.scoring.objectives import COSTS, Goals

__all__ = ["NO_RACES", "Bar", "Estimate", "Race", "Races", "Rival", "block_means", "rungs"]

FloatArray = NDArray[np.float64]

# Images per block: enough for their mean to be nearly normal, few enough for many blocks.
_BLOCK = 32
# Fewer say too little about how much they vary, above all where differences are skewed.
_FEWEST_BLOCKS = 8
# Standard deviation of block means that is assumed at least: counts of few errors may by chance be
# the same in all blocks. That of two classifiers which differ on one image in a hundred.
_LEAST_SPREAD = np.array([0.1 / np.sqrt(_BLOCK) if name == "error" else 0.0 for name in METRICS])
# With several measured objectives no single policy need be the hardest to beat.
_MOST_RIVALS = 4


def _bounds(n_images: int) -> NDArray[np.int64]:
    """`(n_blocks + 1,)` where blocks of nearly equal size begin and end."""
    n_blocks = max(1, n_images // _BLOCK)
    return np.linspace(0, n_images, n_blocks + 1).round().astype(np.int64)


def block_means(values: FloatArray, n_images: int) -> NDArray[np.float32]:
    """Means over the blocks of validation images that have been seen completely.

    Args:
        values: `(n_seen, n_metrics)` per image, in the order of the validation images.
        n_images: How many there are in all.

    Returns:
        `(n_complete_blocks, n_metrics)` float32: what is compared, sent and recorded.
    """
    bounds = _bounds(n_images)
    complete = int(np.searchsorted(bounds, len(values), side="right")) - 1
    if complete < 1:
        return np.empty((0, values.shape[1]), dtype=np.float32)
    sums = np.add.reduceat(values[: bounds[complete]], bounds[:complete], axis=0)
    means: NDArray[np.float32] = (sums / np.diff(bounds[: complete + 1])[:, None]).astype("f4")
    return means


def rungs(n_images: int, n_batches: int) -> tuple[int, ...]:
    """After how many batches a candidate is looked at: 1, 2, 4, ...

    Args:
        n_images: How many there are in all.
        n_batches: Of nearly equal sizes.

    Returns:
        Those after which there are blocks enough to judge by; never the last batch.
    """
    doubling = (1 << power for power in range(n_batches.bit_length()))
    enough = _FEWEST_BLOCKS * n_images / (len(_bounds(n_images)) - 1)
    return tuple(n for n in doubling if n < n_batches and n * (n_images // n_batches) >= enough)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A policy measured on all images, which costs no more than the candidate.

    Args:
        name: Digest of the policy.
        metrics: On all images.
        blocks: `(n_blocks, len(METRICS))` float32 block means, as bytes.
    """

    name: str
    metrics: Mapping[str, float]
    blocks: bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Why a candidate was dropped, and what it would have had.

    Args:
        metrics: Estimates for all images.
        images: How many it has seen.
        rival: Digest of the policy that dominates it.
    """

    metrics: dict[str, float]
    images: int
    rival: str


@dataclass(frozen=True, kw_only=True)
class Race:
    """Against whom a candidate is measured.

    Args:
        measured: Objectives that are metrics.
        rivals: None if nothing comparable is known: then all images are seen.
        error_rate: Chance that a candidate is dropped which no rival dominates.
    """

    measured: tuple[str, ...]
    rivals: tuple[Rival, ...]
    error_rate: float

    def verdict(self, values: FloatArray, n_images: int, looks: int) -> Estimate | None:
        """Whether a candidate can be dropped after what it has seen.

        Args:
            values: `(n_seen, len(METRICS))` per image.
            n_images: How many there are in all.
            looks: How often it is asked in the whole race.

        Returns:
            None if it must go on.
        """
        mine = block_means(values, n_images).astype(np.float64)
        n_blocks = len(_bounds(n_images)) - 1
        if len(mine) < _FEWEST_BLOCKS or len(mine) >= n_blocks:
            return None
        columns = [list(METRICS).index(name) for name in self.measured]
        threshold = _quantile(1 - self.error_rate / (looks * max(1, len(self.rivals))), len(mine))
        for rival in self.rivals:
            theirs = np.frombuffer(rival.blocks, dtype=np.float32).reshape(-1, len(METRICS))
            differences = mine - theirs[: len(mine)]
            mean = differences.mean(axis=0)
            spread = np.maximum(differences.std(axis=0, ddof=1), _LEAST_SPREAD)
            error = spread * np.sqrt((1 / len(mine)) * (1 - len(mine) / n_blocks))
            if (mean[columns] > threshold * error[columns]).all():
                told = {
                    name: max(0.0, rival.metrics[name] + float(mean[i]))
                    for i, name in enumerate(METRICS)
                }
                return Estimate(metrics=told, images=len(values), rival=rival.name)
        return None


Races = Mapping[Policy, Race]
NO_RACES: Races = MappingProxyType({})


def _quantile(probability: float, n: int) -> float:
    """Of Student's t with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, probability))


class Bar:
    """The feasible front of what a search was told so far: what new candidates have to beat.

    Args:
        goals: Objectives and constraints.
        error_rate: See `Race`.
    """

    def __init__(self, goals: Goals, error_rate: float) -> None:
        self._goals = goals
        self._error_rate = error_rate
        self._measured = tuple(name for name in goals.objectives if name not in COSTS)
        self._is_cost = np.array([name in COSTS for name in goals.objectives])
        self._rivals: list[Rival] = []
        self._objectives = np.empty((0, len(goals.objectives)))

    def raise_by(
        self, measurements: Sequence[Measurement], objectives: FloatArray, violations: FloatArray
    ) -> None:
        """Takes in what was told of a generation: `(n, n_objectives)`, `(n, n_constraints)`."""
        rows = [
            row
            for row, measurement in enumerate(measurements)
            if measurement.ok and measurement.blocks and (violations[row] <= 0).all()
        ]
        # What is asked for again is no other rival.
        known = {rival.name for rival in self._rivals}
        new = {measurements[row].policy.digest: row for row in rows}
        rows = [row for name, row in new.items() if name not in known]
        rivals = [*self._rivals]
        for row in rows:
            found = measurements[row]
            rivals.append(
                Rival(name=found.policy.digest, metrics=found.metrics, blocks=found.blocks)
            )
        vectors = np.concatenate([self._objectives, objectives[rows]])
        on_front = front_mask(vectors)
        self._rivals = [rival for rival, good in zip(rivals, on_front, strict=True) if good]
        self._objectives = vectors[on_front]

    def race(self, costs: Mapping[str, float]) -> Race:
        """The race of a candidate, given its shares of the dense costs."""
        mine = np.array([costs.get(name, np.inf) for name in self._goals.objectives])
        rows = np.flatnonzero((self._objectives <= mine).all(axis=1))
        if not self._measured:
            rows = rows[:0]  # costs alone are known without a race
        return Race(
            measured=self._measured,
            rivals=tuple(self._rivals[row] for row in self._hardest(rows)),
            error_rate=self._error_rate,
        )

    def _hardest(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The best in what is measured: one where that is a single objective."""
        metrics = self._objectives[rows][:, ~self._is_cost]
        places = metrics.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable").sum(axis=1)
        most = 1 if len(self._measured) == 1 else _MOST_RIVALS
        return rows[np.argsort(places, kind="stable")[:most]]
