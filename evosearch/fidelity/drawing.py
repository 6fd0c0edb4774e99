"""Policies to compare at matched costs: drawn at random, or taken from a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.results.front import read_results
from evosearch.space import SearchSpace

__all__ = ["Band", "draw", "elite"]

_ATTEMPTS_PER_POLICY = 200
_CENTRES = 65
# A set from a run that has fewer policies in the band is filled up with the nearest ones.
_FEWEST_ELITE = 8


@dataclass(frozen=True, kw_only=True)
class Band:
    """A range of MACs, as shares of the dense network's; both ends belong to it."""

    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `0.46,0.54`.

        Raises:
            ConfigError: The text has another form, or the range is empty or not within 0 to 1.
        """
        try:
            low, high = (float(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(f"--macs {text!r} must read like 0.46,0.54") from None
        if not 0 < low <= high <= 1:
            raise ConfigError(f"--macs {text!r}: wanted 0 < lowest <= highest <= 1")
        return cls(low=low, high=high)

    def distance(self, share: float) -> float:
        """How far a share is outside; 0 within."""
        return max(self.low - share, share - self.high, 0.0)

    def __str__(self) -> str:
        return f"{self.low:g},{self.high:g}"


def _share(table: GroupTable, policies: Sequence[Policy]) -> list[float]:
    macs, _ = table.costs_of(policies)
    return [int(count) / table.dense_costs[0] for count in macs]


def _candidates(
    space: SearchSpace, table: GroupTable, band: Band, seed: int
) -> Iterator[Policy | None]:
    """One attempt after another; None where no shift of the drawn pattern lies in the band.

    A pattern is uniform noise per gene, times a spread that is drawn as well: from nearly uniform
    ratios to ratios that differ as much as they can. The pattern is shifted as a whole, and one of
    the shifts that end in the band is taken at random.
    """
    rng = np.random.default_rng((seed, 0xF1DE))
    while True:
        spread = rng.uniform(0.05, 1.0)
        pattern = spread * rng.uniform(-1, 1, space.n_genes)
        centres = np.linspace(-spread, 1 + spread, _CENTRES) + rng.uniform(-1, 1) / _CENTRES
        choice = rng.random()
        genomes = np.clip(centres[:, None] + pattern, 0, 1)
        policies = space.decode(genomes)
        inside = [
            policy
            for policy, share in zip(policies, _share(table, policies), strict=True)
            if band.low <= share <= band.high
        ]
        yield inside[int(choice * len(inside))] if inside else None


def draw(
    space: SearchSpace, table: GroupTable, band: Band, n: int, seed: int
) -> tuple[Policy, ...]:
    """Draws distinct policies within a band of MACs.

    What is drawn for a smaller `n` is a prefix of what is drawn for a larger one.

    Args:
        space: Whose genomes are drawn.
        table: Knows the costs.
        band: Where all of them lie.
        n: How many.
        seed: Of the draw.

    Raises:
        BudgetUnreachable: The space has nothing in the band; names the reachable range.
        ConfigError: It has fewer distinct policies there than wanted.
    """
    low, high = _share(table, [space.cheapest(), space.dearest()])
    if high < band.low or low > band.high:
        raise BudgetUnreachable(
            f"--macs {band} is out of reach; within the bounds of the space MACs can be {low:.4f} "
            f"to {high:.4f} of dense"
        )
    found: dict[Policy, None] = {}
    attempts = _candidates(space, table, band, seed)
    for _ in range(_ATTEMPTS_PER_POLICY * n):
        policy = next(attempts)
        if policy is not None:
            found[policy] = None
        if len(found) == n:
            return tuple(found)
    raise ConfigError(
        f"--policies {n}: only {len(found)} distinct ones were found with --macs {band}; ask for "
        "fewer, or widen the band"
    )


def _members(ledger: Ledger) -> Iterator[Policy]:
    """The front of a run, then its populations, the last one first; some come twice."""
    yield from (row.policy for row in read_results(ledger).front)
    generation = max(ledger.generations() - 1, 0)
    while generation >= 0:
        yield from (member.policy for member in ledger.population(generation))
        generation -= 1


def elite(ledger: Ledger, table: GroupTable, band: Band, n: int) -> tuple[Policy, ...]:
    """Policies that a search kept: of its front and its populations, those within the band.

    Where there are few, the nearest ones outside join them.

    Raises:
        ConfigError: The run is of another network, or has kept nothing yet.
    """
    groups = tuple((group.name, group.channels) for group in table.groups)
    if groups != read_facts(ledger).groups:
        raise ConfigError(f"{ledger.path}: that run pruned another network")
    kept = list(dict.fromkeys(_members(ledger)))
    if not kept:
        raise ConfigError(f"{ledger.path}: that run has no population yet")
    distances = [band.distance(share) for share in _share(table, kept)]
    inside = sum(distance == 0 for distance in distances)
    # Stable: the front comes first, then the youngest population.
    order = sorted(range(len(kept)), key=lambda index: distances[index])
    return tuple(kept[index] for index in order[: min(n, max(inside, _FEWEST_ELITE))])
