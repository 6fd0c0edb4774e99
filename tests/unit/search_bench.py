"""A search over a real ledger whose scoring is a formula: scorers have tests of their own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evosearch.algorithms import ALGORITHMS, AlgorithmSettings, make_algorithm
from evosearch.ledger import Entry, Ledger, Member
from evosearch.measurement import METRICS, Measurement, Status, Terms
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.scoring.objectives import Constraint, Goals
from evosearch.scoring.racing import Race, Races, block_means
from evosearch.search import SEARCH, Outcome, Scoring, Search
from evosearch.testing import chain_table
from search_spaces.layer_sparsity import LayerSparsity

WORST = {"error": 0.9, "loss": 2.3, "margin": 1.0, "divergence": 2.0, "distortion": 1.0}
TABLE = chain_table((16, 24, 32))
BUDGET = 40
N_IMAGES = 640

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
either_way = pytest.mark.parametrize("snapshots", [False, True], ids=["replayed", "restored"])


def formula(policy: Policy, table: GroupTable = TABLE) -> Measurement:
    """The first group matters most; every seventh policy cannot be scored."""
    if sum(policy.keep) % 7 == 0:
        return Measurement(policy=policy, status=Status.FAILED, reason="divisible by seven")
    removed = 1 - np.array(policy.keep) / table.channels
    error = float((removed**2 / np.arange(1, len(removed) + 1)).mean())
    metrics = dict.fromkeys(METRICS, error)
    return Measurement(policy=policy, status=Status.OK, metrics=metrics, seconds=0.25)


def raced(policy: Policy, race: Race, table: GroupTable = TABLE) -> Measurement:
    """As `formula`, but of images that differ, and looked at after 64, 128 and 256 of them."""
    whole = formula(policy, table)
    if whole.failed:
        return whole
    rng = np.random.default_rng(sum(policy.keep))
    noise = rng.lognormal(sigma=0.3, size=(N_IMAGES, 4))
    noise = np.concatenate([noise, noise[:, : len(METRICS) - 4]], axis=1)
    difficulty = np.random.default_rng(0).lognormal(size=(N_IMAGES, 1))
    values = whole.metrics["error"] * noise * difficulty
    for seen in (64, 128, 256):
        estimate = race.verdict(values[:seen], N_IMAGES, 3)
        if estimate:
            return Measurement(
                policy=policy,
                status=Status.DROPPED,
                metrics=estimate.metrics,
                images=seen,
                reason=f"worse than {estimate.rival}",
            )
    return Measurement(
        policy=policy,
        status=Status.OK,
        metrics=dict(zip(METRICS, values.mean(axis=0).tolist(), strict=True)),
        images=N_IMAGES,
        blocks=block_means(values, N_IMAGES).tobytes(),
    )


@dataclass
class Bench:
    """A search that can be started again and again over one ledger.

    Args:
        run: Directory of the ledger.
        algorithm: Name.
        constraints: Texts.
        table: The network.
        scored: Every policy in the order in which it was scored.
        interrupt_at: Counts of measurements at which `stop` becomes true, once each.
        racing: Error rate of races; those are run on numbers like those of images.
        overlap: Whether generations overlap.
        snapshots: Whether each generation leaves one.
    """

    run: Path
    algorithm: str = "nsga2"
    constraints: Sequence[str] = ()
    table: GroupTable = field(default_factory=lambda: TABLE)
    track: str = SEARCH
    population: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    score: Callable[[Policy], Measurement] = formula
    scored: list[Policy] = field(default_factory=list)
    interrupt_at: list[int] = field(default_factory=list)
    racing: float = 0.0
    overlap: bool = False
    snapshots: bool = True
    _stopping: bool = False

    def _stop(self) -> bool:
        if self.interrupt_at and len(self.scored) >= self.interrupt_at[0]:
            self.interrupt_at.pop(0)
            self._stopping = True
        return self._stopping

    def _score(
        self,
        policies: Sequence[Policy],
        record: Callable[[Measurement], None],
        stop: Callable[[], bool],
        races: Races,
        ahead: Sequence[Policy],
    ) -> None:
        assert set(races) >= (set(policies) if self.racing else set())
        assert bool(races) == (self.racing > 0)
        # What is ahead lands among the others, as it may on a cluster.
        others = list(ahead)
        for number, policy in enumerate(policies):
            if stop():
                return
            chosen = [policy, others.pop(0)] if others and number % 3 == 1 else [policy]
            for each in chosen:
                self.scored.append(each)
                record(raced(each, races[each]) if races else self.score(each))

    def search(
        self,
        evaluations: int = BUDGET,
        on_landing: Callable[[Measurement, int], None] | None = None,
    ) -> Outcome:
        """A new Search over the same ledger, as a launch or a resume makes it."""
        self._stopping = False
        space = LayerSparsity(self.table, self.options)
        single = ALGORITHMS[self.algorithm].single_objective
        goals = Goals(
            objectives=("error",) if single else ("error", "macs"),
            constraints=tuple(map(Constraint.parse, self.constraints)),
        )
        sequence = np.random.default_rng(3).random((2 * BUDGET, space.n_genes))
        algorithm = make_algorithm(
            AlgorithmSettings(name=self.algorithm, population=self.population, seed=3, options={}),
            space,
            len(goals.objectives),
            len(goals.constraints) + 1,
            ranked=sequence if self.algorithm == "ranking" else None,
        )
        scoring = Scoring(
            table=self.table,
            goals=goals,
            worst=WORST,
            score=self._score,
            stop=self._stop,
            clock=lambda: 0.0,
            racing=self.racing,
            overlap=self.overlap,
            snapshots=f"of {self.algorithm}" if self.snapshots else "",
            snapshot_every_s=0.0,
        )
        with self.ledger(write=True) as ledger:
            search = Search(space, algorithm, scoring, ledger, self.track)
            return search.run(evaluations, on_landing)

    def ledger(self, *, write: bool = False) -> Ledger:
        """The ledger, made at first use."""
        self.run.mkdir(exist_ok=True)
        if write and not (self.run / "ledger.sqlite").exists():
            return Ledger.create(self.run, {})
        return Ledger.open(self.run, write=write)

    def entries(self, track: str | None = None) -> list[Entry]:
        with self.ledger() as ledger:
            track = track or self.track
            raced = self.racing > 0 and track == SEARCH
            return ledger.entries(track, terms=Terms.RACED if raced else Terms.FULL)

    def asks(self) -> list[list[str]]:
        with self.ledger() as ledger:
            return list(_until_empty(lambda generation: ledger.asked(self.track, generation)))

    def populations(self) -> list[list[Member]]:
        with self.ledger() as ledger:
            return list(_until_empty(ledger.population))

    def measured(self) -> list[Policy]:
        return [entry.policy for entry in self.entries() if entry.measurement]

    def failures(self) -> dict[Policy, Measurement]:
        return {
            entry.policy: entry.measurement
            for entry in self.entries()
            if entry.measurement and entry.measurement.failed
        }

    def dropped(self) -> list[Entry]:
        return [
            entry
            for entry in self.entries()
            if entry.measurement and entry.measurement.status is Status.DROPPED
        ]

    def story(self) -> tuple[list[Entry], list[list[str]], list[list[Member]]]:
        """All that a search leaves behind, except for the order of landing."""
        return self.entries(), self.asks(), self.populations()


def _until_empty(read: Callable[[int], list[Any]]) -> Iterator[list[Any]]:
    generation = 0
    while found := read(generation):
        yield found
        generation += 1
