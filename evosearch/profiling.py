"""What a recipe would do, before it is launched: groups, costs, one timed candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from evosearch.assembly import Assembled, assemble, width_multiple
from evosearch.doubts import few_images
from evosearch.errors import ConfigError
from evosearch.latency import LatencyModel
from evosearch.measurement import Measurement
from evosearch.networks import InputSpec
from evosearch.pruning.groups import trace
from evosearch.pruning.table import FixedGroup, Group
from evosearch.reach import reachable_costs
from evosearch.recipe import Recipe
from evosearch.scoring.devices import local_device
from evosearch.scoring.objectives import COSTS
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.timing import time_passes

__all__ = ["Profile", "profile", "profile_lines"]

# Seconds until Ray's workers have imported torch.
_RAY_START_S = 10.0
# Whoever waits longer may want to know what would do.
_LONG_S = 600.0
_FEW_NAMES = 6
# So many images fit layers about as well, where only those are fitted that lost inputs.
_FEW_TO_FIT = 64


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a recipe would do.

    Args:
        groups: What can be cut, with the name of its gene.
        fixed: What cannot, and why.
        blocks: Names of what can be left out.
        left_out: Whether the space does so.
        n_genes: Length of a genome.
        dense: MACs and parameters of the dense network.
        lowest, highest: Shares of costs that the space reaches, by name.
        latency: What was timed, in words; None if networks of some widths cannot be run.
        candidate: One measured policy, in the middle of the space.
        device: Where that was.
        macs: That policy's share of MACs.
        predicted_seconds: Of the whole search.
        precision: Of forward passes, as settled for this machine.
        rounding: Divergence that it brings to the dense network, in nats.
        images: For calibration and for validation.
        dense_top1: Of the dense network on the validation images.
        algorithm: Name and genomes at a time, as settled for this space.
        input: What the network takes, and how it is said to have been trained.
        doubts: What is possible but hardly meant.
        quicker: Settings that make a long search much shorter; None if it is short, or cannot be.
    """

    groups: tuple[Group, ...]
    fixed: tuple[FixedGroup, ...]
    blocks: tuple[str, ...]
    left_out: bool
    n_genes: int
    dense: tuple[int, int]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]
    latency: str | None
    candidate: Measurement
    device: str
    macs: float
    predicted_seconds: float
    precision: str
    rounding: float
    images: tuple[int, int]
    dense_top1: float
    algorithm: tuple[str, int]
    input: InputSpec
    doubts: tuple[str, ...]
    quicker: str | None


def profile(recipe: Recipe) -> Profile:
    """Makes everything a search would need and scores one candidate.

    Raises:
        EvosearchError: The recipe cannot be carried out, budgets included.
    """
    assembled = assemble(recipe, settles_widths=True)
    table, space = assembled.workload.plan.table, assembled.space
    ladder = space.decode(space.ladder(3))
    middle = ladder[-1]
    device = local_device(recipe.run.gpus_per_worker)
    scorer = Scorer(assembled.workload, device)
    if device != "cpu":
        scorer.score(middle)  # a GPU's libraries take seconds to start
    candidate = scorer.score(middle)
    latency = _timed(assembled)
    lowest, highest = reachable_costs(space, replace(table, latency=latency))
    blocks = table.blocks or trace(assembled.workload.network(), blocks=True).table.blocks
    workers, settled = recipe.run.workers, assembled.recipe.search
    count = recipe.search.evaluations + recipe.search.baseline
    seconds = count * candidate.seconds / max(workers, 1) + (_RAY_START_S if workers else 0)
    return Profile(
        groups=table.groups,
        fixed=table.fixed,
        blocks=tuple(block.name for block in blocks),
        left_out=bool(table.blocks),
        n_genes=space.n_genes,
        dense=table.dense_costs,
        lowest=lowest,
        highest=highest,
        latency=None if latency is None else latency.told(table.fewest),
        candidate=candidate,
        device=device,
        macs=int(table.costs_of([middle])[0][0]) / table.dense_costs[0],
        predicted_seconds=seconds,
        precision=assembled.recipe.proxy.precision,
        rounding=assembled.workload.rounding,
        images=(len(assembled.workload.calibration), len(assembled.workload.validation)),
        dense_top1=1 - assembled.dense_error,
        algorithm=(settled.algorithm or "", settled.population or 0),
        input=assembled.workload.input,
        doubts=tuple(assembled.doubts()),
        quicker=_quicker(assembled, seconds),
    )


def _quicker(assembled: Assembled, seconds: float) -> str | None:
    """Settings with which a search takes a fraction of these seconds and finds much the same.

    Nothing but distortion can be read from so few images, and fewer were tried with one proxy.
    """
    workload, proxy = assembled.workload, assembled.recipe.proxy
    measured = assembled.goals.names.difference(COSTS)
    if seconds < _LONG_S or measured != {"distortion"} or proxy.name != "reconstructed":
        return None
    few = few_images(workload)
    settings = [
        f"--set data.validation={few}" if len(workload.validation) > few else "",
        f"--set proxy.reconstruction_images={_FEW_TO_FIT}"
        if proxy.reconstruction_images > _FEW_TO_FIT
        else "",
        "--set proxy.reconstruction_layers=cut" if proxy.reconstruction_layers == "all" else "",
    ]
    return " ".join(filter(None, settings)) or None


def _timed(assembled: Assembled) -> LatencyModel | None:
    """What foretells latency, also where the recipe does not ask for it."""
    plan, recipe = assembled.workload.plan, assembled.recipe
    if plan.table.latency is not None:
        return plan.table.latency
    try:
        network = assembled.workload.network()
        return time_passes(network, plan, recipe.latency, width_multiple(recipe.space))
    except ConfigError:
        if recipe.latency.measure is not None:
            raise
        return None


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
        + (f", {group.granularity} at a time" if group.granularity > 1 else "")
        for group in found.groups
    ]
    lines += [
        f"  {group.name:32s} {group.channels:5d} channels fixed: {group.reason}"
        for group in found.fixed
    ]
    lines += _block_lines(found)
    titles = {"macs": "MACs", "params": "parameters", "latency": "latency"}
    lines += [
        f"{title:11s} {found.lowest[name]:.1%} to {found.highest[name]:.1%} of dense"
        for name, title in titles.items()
        if name in found.lowest
    ]
    passes = f"{recipe.latency.images} image{'s' if recipe.latency.images > 1 else ''}"
    if found.latency is not None:
        lines.append(f"timed       {passes} at a time: {found.latency}")
    lines += _input_lines(recipe, found)
    name, at_a_time = found.algorithm
    minimised = " and ".join(recipe.search.objectives)
    lines.append(f"search      minimises {minimised}: {name}, {at_a_time} at a time")
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
    where = "on one core" if found.device == "cpu" else f"on {found.device}"
    lines.append(
        f"candidate   uniform, {found.macs:.1%} of MACs: {told}, {candidate.seconds:.2f} s {where}"
    )
    count = recipe.search.evaluations + recipe.search.baseline
    lines.append(
        f"prediction  {count} measurements with {recipe.run.workers} workers: about "
        f"{found.predicted_seconds / 60:.1f} min"
    )
    if found.quicker is not None:
        lines.append(
            f"quicker     {found.quicker}: several times as fast, and orders policies by "
            "distortion about as well"
        )
    return [*lines, *found.doubts]


def _block_lines(found: Profile) -> list[str]:
    """What can be left out, if anything."""
    if not found.blocks:
        return []
    may = "may be left out" if found.left_out else "stay; with space.blocks = true they may go"
    names = ", ".join(found.blocks[:_FEW_NAMES])
    more = ", ..." if len(found.blocks) > _FEW_NAMES else ""
    return [f"blocks      {len(found.blocks)} {may}: {names}{more}"]


def _input_lines(recipe: Recipe, found: Profile) -> list[str]:
    """Images, and what is done to them: a wrong normalisation spoils everything after it."""
    shown, seen = found.input, []
    if shown.crop_padding:
        seen.append(f"cropped after padding by {shown.crop_padding}")
    if shown.flip:
        seen.append("mirrored")
    height, width = shown.shape[1:]
    fitted = f", fitted to {height}x{width}" if recipe.data.name == "image-folder" else ""
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (shown.mean, shown.std))
    return [
        f"images      {found.images[0]} for calibration, {found.images[1]} for validation, of "
        f"{recipe.data.name}{fitted}; dense top-1 {found.dense_top1:.2%}",
        f"normalised  (pixel / 255 - mean) / std; mean {mean}; std {std}",
        f"training    images were {' and '.join(seen) or 'neither cropped nor mirrored'}; so are "
        "those for calibration",
    ]
