"""The role of a search space: what a genome means. Spaces register as entry points.

A space is anything with the members of `SearchSpace`, made by a factory that is registered under
the entry-point group `evosearch.spaces` and called with a group table and the options of the
recipe's `[space]` table. Searching knows no space by name; a recipe that names none gets
`layer-sparsity`, and the options `project_onto`, `round_to` and `blocks` mean the same in every
space: blocks are looked for where that is true.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import ConfigError
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable

__all__ = [
    "CriteriaFacts",
    "CriteriaWish",
    "LevelledSpace",
    "SearchSpace",
    "SpaceFactory",
    "criteria_wish",
    "known_spaces",
    "make_space",
    "unique_rows",
]

FloatArray = NDArray[np.float64]


class SearchSpace(Protocol):
    """Knows what the genes mean.

    An implementation must guarantee:

    **Totality.** `decode` gives a policy that `GroupTable.check` accepts for every vector in
    [0, 1]^n_genes: some groups keep multiples of a number of channels only.
    **Determinism.** Equal genomes give equal policies, in any process.
    **Inverse.** `decode(encode(policy))` is the policy, for every policy that `decode` can give
    and that one genome can express exactly; otherwise a near one.
    """

    @property
    def n_genes(self) -> int:
        """Length of a genome."""

    @property
    def gene_names(self) -> tuple[str, ...]:
        """One name per gene, for people."""

    def decode(self, genomes: FloatArray) -> list[Policy]:
        """Policies of `(n, n_genes)` genomes in [0, 1]."""

    def encode(self, policy: Policy) -> FloatArray:
        """A genome `(n_genes,)` that decodes to the nearest policy of this space."""

    def ladder(self, n: int) -> FloatArray:
        """Up to `n` genomes `(m, n_genes)` of uniform ratios, distinct as policies.

        The ladder of a smaller n is a prefix of that of a larger n; it spans the space early.
        """

    def cheapest(self) -> Policy:
        """The policy with the fewest channels in every group."""

    def dearest(self) -> Policy:
        """The policy with the most channels in every group."""


@runtime_checkable
class LevelledSpace(SearchSpace, Protocol):
    """A space whose genes have levels. Algorithms that move by levels refuse any other.

    An implementation must guarantee:

    **Order.** A higher level of a gene asks for no fewer channels of any group.
    **Completeness.** What `decode` can give, it gives for gene values that are levels; except
    where it scales policies to spend a budget.
    """

    def levels(self) -> tuple[FloatArray, ...]:
        """For each gene its distinct values, at least one, from the narrowest to the widest."""


@dataclass(frozen=True, kw_only=True)
class CriteriaWish:
    """What a space whose genes choose among criteria asks for.

    Args:
        names: Criteria; all that apply to the network if empty.
        clusters: How many clusters per group at most; by silhouette if None.
        comparison: How scores become comparable: `rank` or `min-max`.
        sharing: Which groups have the same clusters: `layer` (each its own), `stage`, `network`.
    """

    names: tuple[str, ...] = ()
    clusters: int | None = None
    comparison: str = "rank"
    sharing: str = "layer"


@dataclass(frozen=True, kw_only=True)
class CriteriaFacts:
    """What it is told before it is made.

    Args:
        names: The criteria, in the order of the wish.
        default: The recipe's criterion, which goes by where a policy has no blend.
        clusters: Per group the names that rank alike.
    """

    names: tuple[str, ...]
    default: str
    clusters: tuple[tuple[tuple[str, ...], ...], ...]


class SpaceFactory(Protocol):
    """Makes a space for a network.

    A factory with a method `criteria_wish`, from options to a CriteriaWish, gets the CriteriaFacts
    as its third argument. The pydantic model of a factory's options, if it has one and names it
    `options_model`, is listed by `evosearch list settings`.
    """

    def __call__(self, table: GroupTable, options: Mapping[str, Any]) -> SearchSpace:
        """Raises ConfigError for options it does not understand."""


@cache
def known_spaces() -> dict[str, EntryPoint]:
    """Entry points of all installed spaces by name.

    Raises:
        ConfigError: Two packages register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="evosearch.spaces"):
        if point.name in found and found[point.name].value != point.value:
            raise ConfigError(
                f"two packages register a search space {point.name!r}: "
                f"{found[point.name].value} and {point.value}; uninstall one"
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def _factory(name: str) -> SpaceFactory:
    points = known_spaces()
    if name not in points:
        raise ConfigError(f"space.name: no search space {name!r}; there are {', '.join(points)}")
    try:
        factory: SpaceFactory = points[name].load()
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"search space {name!r} cannot be loaded: {exc}") from exc
    return factory


def criteria_wish(name: str, options: Mapping[str, Any]) -> CriteriaWish | None:
    """What a registered space wants to know about criteria; None if nothing.

    Raises:
        ConfigError: No such space, it cannot be imported, or it refuses the options.
    """
    wish: Callable[[Mapping[str, Any]], CriteriaWish] | None
    wish = getattr(_factory(name), "criteria_wish", None)
    return None if wish is None else wish(options)


def make_space(
    name: str,
    table: GroupTable,
    options: Mapping[str, Any],
    facts: CriteriaFacts | None = None,
) -> SearchSpace:
    """Makes a registered space.

    Args:
        name: Of the space.
        table: Groups and costs.
        options: Of the recipe's `[space]` table, without the name.
        facts: For a space with a wish; others are not given any.

    Raises:
        ConfigError: No such space, it cannot be imported, or it refuses the options.
    """
    factory: Callable[..., SearchSpace] = _factory(name)
    return factory(table, options) if facts is None else factory(table, options, facts)


def unique_rows(policies: Sequence[Policy]) -> list[int]:
    """Indices of the first occurrence of each policy, in order."""
    first: dict[Policy, int] = {}
    for index, policy in enumerate(policies):
        first.setdefault(policy, index)
    return sorted(first.values())
