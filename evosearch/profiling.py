"""What a recipe would do, before it is launched: groups, costs, one timed candidate."""

from dataclasses import dataclass

from evosearch.assembly import assemble
from evosearch.measurement import Measurement
from evosearch.pruning.table import FixedGroup, Group
from evosearch.recipe import Recipe
from evosearch.scoring.scorer import Scorer

__all__ = ["Profile", "profile", "profile_lines"]

# Seconds until Ray's workers have imported torch.
_RAY_START_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a recipe would do.

    Args:
        groups: What can be cut, with the name of its gene.
        fixed: What cannot, and why.
        n_genes: Length of a genome.
        dense: MACs and parameters of the dense network.
        lowest, highest: Shares of MACs and parameters that the space reaches.
        candidate: One measured policy, in the middle of the space.
        macs: That policy's share of MACs.
        predicted_seconds: Of the whole search.
        precision: Of forward passes, as settled for this machine.
        rounding: Divergence that it brings to the dense network, in nats.
    """

    groups: tuple[Group, ...]
    fixed: tuple[FixedGroup, ...]
    n_genes: int
    dense: tuple[int, int]
    lowest: tuple[float, float]
    highest: tuple[float, float]
    candidate: Measurement
    macs: float
    predicted_seconds: float
    precision: str
    rounding: float


def profile(recipe: Recipe) -> Profile:
    """Makes everything a search would need and scores one candidate.

    Raises:
        EvosearchError: The recipe cannot be carried out, budgets included.
    """
    assembled = assemble(recipe)
    table, space = assembled.workload.plan.table, assembled.space
    ladder = space.decode(space.ladder(3))
    middle = ladder[-1]
    candidate = Scorer(assembled.workload).score(middle)
    macs, params = table.costs_of([space.cheapest(), space.dearest(), middle])
    shares = [
        (int(m) / table.dense_costs[0], int(p) / table.dense_costs[1])
        for m, p in zip(macs, params, strict=True)
    ]
    workers = recipe.run.workers
    count = recipe.search.evaluations + recipe.search.baseline
    seconds = count * candidate.seconds / max(workers, 1) + (_RAY_START_S if workers else 0)
    return Profile(
        groups=table.groups,
        fixed=table.fixed,
        n_genes=space.n_genes,
        dense=table.dense_costs,
        lowest=shares[0],
        highest=shares[1],
        candidate=candidate,
        macs=shares[2][0],
        predicted_seconds=seconds,
        precision=assembled.recipe.proxy.precision,
        rounding=assembled.workload.rounding,
    )


def profile_lines(recipe: Recipe, found: Profile) -> list[str]:
    """A profile for the terminal."""
    dense_macs, dense_params = found.dense
    lines = [
        f"network     {recipe.network.name}: {dense_macs / 1e6:.2f} M MACs, "
        f"{dense_params / 1e6:.3f} M parameters",
        f"genes       {found.n_genes} for {len(found.groups)} groups",
    ]
    lines += [
        f"  {group.name:32s} {group.channels:5d} channels at {group.resolution[0]}x"
        f"{group.resolution[1]}"
        for group in found.groups
    ]
    lines += [
        f"  {group.name:32s} {group.channels:5d} channels fixed: {group.reason}"
        for group in found.fixed
    ]
    names = ("MACs", "parameters")
    lines += [
        f"{name:11s} {low:.1%} to {high:.1%} of dense"
        for name, low, high in zip(names, found.lowest, found.highest, strict=True)
    ]
    constraints = ", ".join(recipe.search.constraints) or "none"
    lines.append(f"constraints {constraints} (satisfiable)")
    lines.append(
        f"precision   {found.precision} (divergence by rounding alone {found.rounding:.5f})"
    )
    candidate = found.candidate
    told = f"{candidate.status}: {candidate.reason}"
    if candidate.ok:
        error, divergence = candidate.metrics["error"], candidate.metrics["divergence"]
        told = f"top-1 {1 - error:.2%}, divergence {divergence:.4f}"
    lines.append(
        f"candidate   uniform, {found.macs:.1%} of MACs: {told}, "
        f"{candidate.seconds:.2f} s on one core"
    )
    count = recipe.search.evaluations + recipe.search.baseline
    lines.append(
        f"prediction  {count} measurements with {recipe.run.workers} workers: about "
        f"{found.predicted_seconds / 60:.1f} min"
    )
    return lines
