"""Which criteria say what goes first: per group one candidate and one factor of every cluster.

After [He2021], of which only the idea is published: cluster criteria that rank alike, pick a
candidate of each cluster, weigh the candidates by calibration factors, search both. Encoding and
ranges are ours.

References:
    [He2021] W. He et al., "Blending Pruning Criteria for Convolutional Neural Networks",
        arXiv:2107.05033.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from evosearch.checks import check_unit_interval
from evosearch.errors import ConfigError
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.recipe import Table, explain
from evosearch.space import CriteriaFacts, CriteriaWish
from search_spaces.layer_sparsity import LayerSparsity, ProjectOnto

__all__ = ["CriterionBlend", "CriterionBlendOptions"]

FloatArray = NDArray[np.float64]
Share = Annotated[float, Field(ge=0, le=1)]
Pairs = tuple[tuple[str, int], ...]

# Factors are told in twentieths of their sum: finer ones hardly change an order.
_PARTS = 20
# A factor gene below this switches its cluster off, so that few of many criteria can be chosen.
_OFF = 0.2


class CriterionBlendOptions(Table):
    """The `[space]` table of a recipe."""

    criteria: tuple[str, ...] | None = Field(default=None, strict=False)
    """What to blend; all built-in criteria that apply to the network if left out."""
    clusters: Annotated[int, Field(ge=1)] | Literal["silhouette"] = "silhouette"
    """Clusters per group at most, or as many as the silhouette prefers."""
    scores: Literal["rank", "min-max"] = "rank"
    """How scores of different criteria become comparable."""
    blending: Literal["layer", "stage", "network"] = "layer"
    """A blend per group, or one for all groups of a stage or of the network."""
    sparsity: Share | Annotated[tuple[Share, Share], Field(strict=False)] = 0.5
    """Share of every group's channels that goes; or the bounds within which it is searched."""
    grouping: Literal["layer", "stage", "network"] = "layer"
    """Whose searched sparsity it is: each group's, a stage's or that of all."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Kept channels are multiples of this (or all channels of the group); as in layer-sparsity."""
    project_onto: ProjectOnto | None = None
    """Scale every policy so that it spends this budget: one of macs, params, latency; needs bounds
    of the sparsity."""

    @field_validator("clusters", mode="before")
    @classmethod
    def _number_or_word(cls, given: Any) -> Any:
        if given != "silhouette" and (type(given) is not int or given < 1):
            raise ValueError("must be a whole number above 0, or 'silhouette'")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.criteria is not None and len(set(self.criteria)) < max(1, len(self.criteria)):
            raise ValueError("criteria: name at least one, each once")
        if self.project_onto is not None and isinstance(self.sparsity, float):
            raise ValueError("project_onto needs bounds, such as sparsity = [0.0, 0.95]")
        return self


class CriterionBlend:
    """The space `criterion-blend`.

    For each group (or stage, or the network) and each cluster of criteria that rank alike there, a
    choice gene picks one of the cluster's m candidates, the floor(m x)-th, and a factor gene says
    how much it counts: max(0, x - 0.2), as a share of the sum, rounded to twentieths. If all
    factors are zero, they count alike. A cluster of one candidate has no choice gene, and where
    there is one cluster there is no factor gene.

    Sparsities come first: none if `sparsity` is a number, one gene for all, or genes as in
    `layer-sparsity`, whose rounding and budget they share. A single gene that a budget leaves no
    choice is left out.

    Args:
        table: Groups and costs.
        options: See `CriterionBlendOptions`.
        facts: The criteria and their clusters.

    Raises:
        ConfigError: An option is wrong, or nothing is left to search.
        BudgetUnreachable: No policy within the bounds spends the budget.
    """

    options_model: ClassVar[type[BaseModel]] = CriterionBlendOptions

    def __init__(self, table: GroupTable, options: Mapping[str, Any], facts: CriteriaFacts) -> None:
        self.options = _checked(options)
        self._table = table
        self._facts = facts
        self._widths = LayerSparsity(table, self._inner_options())
        self._units = table.units(self.options.blending)
        self._clusters = tuple(facts.clusters[unit[0]] for unit in self._units)
        if self.n_genes == 0:
            raise ConfigError(
                "space: one criterion and a fixed sparsity leave nothing to search; name more "
                "criteria, or bounds such as sparsity = [0.0, 0.9]"
            )

    @staticmethod
    def criteria_wish(options: Mapping[str, Any]) -> CriteriaWish:
        """What must be known before such a space is made.

        Raises:
            ConfigError: An option is wrong.
        """
        checked = _checked(options)
        return CriteriaWish(
            names=checked.criteria or (),
            clusters=None if checked.clusters == "silhouette" else checked.clusters,
            comparison=checked.scores,
            sharing=checked.blending,
        )

    def _inner_options(self) -> dict[str, Any]:
        options, sparsity = self.options, self.options.sparsity
        bounds = (sparsity, sparsity) if isinstance(sparsity, float) else sparsity
        target = options.project_onto
        return {
            "sparsity": list(bounds),
            "round_to": options.round_to,
            "grouping": "stage" if options.grouping == "stage" else "layer",
            "blocks": False,
            "project_onto": None if target is None else target.model_dump(),
        }

    @cached_property
    def _n_widths(self) -> int:
        """Genes of sparsities."""
        if isinstance(self.options.sparsity, float):
            return 0
        if self.options.grouping == "network":
            # Uniform ratios that spend one budget are one policy.
            return 0 if self.options.project_onto else 1
        return self._widths.n_genes

    @cached_property
    def _layout(self) -> tuple[tuple[tuple[int | None, int | None], ...], ...]:
        """Per unit and cluster the columns of the choice and of the factor gene, or None."""
        column = self._n_widths
        found = []
        for clusters in self._clusters:
            places = []
            for members in clusters:
                choice = column if len(members) > 1 else None
                column += choice is not None
                factor = column if len(clusters) > 1 else None
                column += factor is not None
                places.append((choice, factor))
            found.append(tuple(places))
        return tuple(found)

    @property
    def n_genes(self) -> int:
        """Genes of sparsities, then two or fewer per unit and cluster."""
        pairs = [gene for unit in self._layout for pair in unit for gene in pair]
        return self._n_widths + sum(gene is not None for gene in pairs)

    @property
    def gene_names(self) -> tuple[str, ...]:
        """`sparsity:GROUP`, `choice:GROUP:CRITERION` and `factor:GROUP:CRITERION`.

        The criterion is the first of the cluster.
        """
        inner = self._widths.gene_names if self._n_widths > 1 else ("all",) * self._n_widths
        names = [f"sparsity:{name}" for name in inner]
        for unit, clusters, places in zip(self._units, self._clusters, self._layout, strict=True):
            group = self._table.groups[unit[0]].name
            for members, (choice, factor) in zip(clusters, places, strict=True):
                names += [f"choice:{group}:{members[0]}"] * (choice is not None)
                names += [f"factor:{group}:{members[0]}"] * (factor is not None)
        return tuple(names)

    def decode(self, genomes: FloatArray) -> list[Policy]:
        """Policies of `(n, n_genes)` genomes in [0, 1].

        Raises:
            SpaceError: The genomes have another shape or leave [0, 1].
        """
        genomes = check_unit_interval(genomes, self.n_genes)
        widths = self._widths.decode(self._width_genes(genomes))
        return [
            self._with_blend(policy.keep, genome)
            for policy, genome in zip(widths, genomes, strict=True)
        ]

    def _width_genes(self, genomes: FloatArray) -> FloatArray:
        own = genomes[:, : self._n_widths]
        if self._n_widths == self._widths.n_genes:
            return own
        shared = own if self._n_widths else np.full((len(genomes), 1), 0.5)
        return np.repeat(shared, self._widths.n_genes, axis=1)

    def _with_blend(self, keep: tuple[int, ...], genome: FloatArray) -> Policy:
        blend: list[Pairs] = [()] * len(keep)
        for index, unit in enumerate(self._units):
            pairs = self._pairs(index, genome)
            if pairs == ((self._facts.default, 1),):
                continue
            for group in unit:
                # Where everything is kept, no order matters.
                if keep[group] < self._table.channels[group]:
                    blend[group] = pairs
        return Policy(keep, tuple(blend))

    def _pairs(self, unit: int, genome: FloatArray) -> Pairs:
        clusters, places = self._clusters[unit], self._layout[unit]
        chosen = [
            members[
                0 if choice is None else min(int(genome[choice] * len(members)), len(members) - 1)
            ]
            for members, (choice, _) in zip(clusters, places, strict=True)
        ]
        genes = [1.0 if factor is None else float(genome[factor]) for _, factor in places]
        parts = _in_parts([max(0.0, gene - _OFF) for gene in genes])
        divisor = math.gcd(*parts)
        found = zip(chosen, parts, strict=True)
        return tuple(sorted((name, part // divisor) for name, part in found if part))

    def encode(self, policy: Policy) -> FloatArray:
        """A genome that decodes to the policy, or near it if the space cannot express it."""
        self._table.check(policy)
        genome = np.full(self.n_genes, 0.5)
        genes = self._widths.encode(policy)
        if self._n_widths:
            shared = self._n_widths < len(genes)
            genome[: self._n_widths] = genes.mean() if shared else genes
        blend = policy.blend or ((),) * len(policy.keep)
        for index, unit in enumerate(self._units):
            told = [blend[group] for group in unit if blend[group]]
            self._write(index, told[0] if told else ((self._facts.default, 1),), genome)
        return genome

    def _write(self, unit: int, pairs: Pairs, genome: FloatArray) -> None:
        """Sets the genes of a unit so that they mean these criteria, where they can."""
        weights = dict(pairs)
        most = max(weights.values())
        for members, (choice, factor) in zip(self._clusters[unit], self._layout[unit], strict=True):
            known = [name for name in members if name in weights]
            best = max(known, key=lambda name: weights[name], default=members[0])
            if choice is not None:
                genome[choice] = (members.index(best) + 0.5) / len(members)
            if factor is not None:
                scaled = min(1.0, _OFF + (1 - _OFF) * weights.get(best, 0) / most)
                genome[factor] = scaled if known else 0.0

    def ladder(self, n: int) -> FloatArray:
        """Pure criteria at uniform ratios.

        The first rungs are the uniform ratios of `layer-sparsity`, each with the next criterion:
        the recipe's first, then as the space names them; then each ratio with the criterion after
        that, and so on. With a fixed sparsity or a budget there is one ratio, and a population
        whose seed share holds all criteria starts no worse than the best of them.
        """
        rungs = self._ratios(n)
        names = sorted(self._facts.names, key=lambda name: name != self._facts.default)
        found: dict[Policy, FloatArray] = {}
        for turn in range(len(names)):
            if len(found) >= n:
                break
            pure = [
                self._pure(rung, names[(place + turn) % len(names)])
                for place, rung in enumerate(rungs)
            ]
            for policy, genome in zip(self.decode(np.array(pure)), pure, strict=True):
                found.setdefault(policy, genome)
        return np.array(list(found.values())[:n]).reshape(-1, self.n_genes)

    def _ratios(self, n: int) -> FloatArray:
        """`(m, n_widths)` genes of uniform ratios."""
        ladder = self._widths.ladder(max(n, 1))
        if self._n_widths == 0:
            return np.empty((1, 0))
        return ladder[:, : self._n_widths]

    def _pure(self, rung: FloatArray, name: str) -> FloatArray:
        genome = np.zeros(self.n_genes)
        genome[: self._n_widths] = rung
        for unit in range(len(self._units)):
            self._write(unit, ((name, 1),), genome)
        return genome

    def cheapest(self) -> Policy:
        """The fewest channels that the bounds allow."""
        return self._widths.cheapest()

    def dearest(self) -> Policy:
        """The most channels that the bounds allow."""
        return self._widths.dearest()


def _checked(options: Mapping[str, Any]) -> CriterionBlendOptions:
    try:
        return CriterionBlendOptions.model_validate(dict(options))
    except ValidationError as exc:
        raise ConfigError(explain(exc, CriterionBlendOptions, "space")) from exc


def _in_parts(factors: Sequence[float]) -> list[int]:
    """Shares of the sum in twentieths, by largest remainders; as if all were 1 if the sum is 0."""
    total = math.fsum(factors)
    if total <= 0:
        factors, total = [1.0] * len(factors), float(len(factors))
    # Rounding errors must not decide between two remainders.
    exact = [round(factor / total * _PARTS, 9) for factor in factors]
    parts = [math.floor(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in order[: _PARTS - sum(parts)]:
        parts[i] += 1
    return parts
