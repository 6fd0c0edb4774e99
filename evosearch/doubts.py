"""What a recipe makes possible but hardly means, told before anything is measured."""

from evosearch.latency import BLOCK, LatencyModel, minds_odd_widths
from evosearch.recipe import Recipe
from evosearch.scoring.objectives import Goals, worst_metrics
from evosearch.scoring.workload import Workload, settled_precision

__all__ = ["doubts_about", "few_images"]

# Share of the way from guessing to certainty below which a network seems not to know its images.
_CLEARLY_ABOVE = 0.1
# So few images order policies by distortion about as well as a thousand; by outputs it takes more
# than by feature maps (docs/fidelity.md).
_FEW_FOR_MAPS, _FEW_FOR_OUTPUTS = 64, 256
# Relative errors of foreseen latencies beyond this are told.
_UNSURE = 0.1


def doubts_about(recipe: Recipe, goals: Goals, workload: Workload, dense_error: float) -> list[str]:
    """What is possible but hardly meant or expected, in sentences.

    Args:
        recipe: Settled.
        goals: What is minimised.
        workload: What was made of the recipe.
        dense_error: Top-1 error of the dense network on the validation images.
    """
    latency = workload.plan.table.latency
    return [
        *_about_network(workload, dense_error),
        *_about_constraints(goals),
        *_about_distortion(goals, workload),
        *([] if latency is None else _about_latency(recipe, latency)),
        *_about_precision(recipe),
    ]


def few_images(workload: Workload) -> int:
    """How many validation images tell policies apart by distortion."""
    return _FEW_FOR_OUTPUTS if workload.features.layer is None else _FEW_FOR_MAPS


def _about_network(workload: Workload, dense_error: float) -> list[str]:
    chance = 1 - worst_metrics(workload.dense_logits)["error"]
    right = 1 - dense_error
    if right > chance + _CLEARLY_ABOVE * (1 - chance):
        return []
    return [
        f"warning: the dense network is right on {right:.1%} of the validation images, and "
        f"guessing on {chance:.1%}; check network.weights, network.mean and network.std, "
        "and the order of the classes"
    ]


def _about_constraints(goals: Goals) -> list[str]:
    return [
        f"warning: search.constraints: {constraint} always holds, as {constraint.name} is a share "
        "of the dense network's"
        for constraint in goals.cost_constraints
        if constraint.name != "latency" and constraint.bound >= 1
    ]


def _about_distortion(goals: Goals, workload: Workload) -> list[str]:
    count = len(workload.validation)
    compares_outputs = "distortion" in goals.objectives and workload.features.layer is None
    if not compares_outputs or count >= few_images(workload):
        return []
    return [
        f"{count} validation images are few for distortion, which compares outputs here: "
        "there are no last feature maps that keep all channels and that every cut moves; "
        f"set data.validation to {_FEW_FOR_OUTPUTS} or more"
    ]


def _about_latency(recipe: Recipe, latency: LatencyModel) -> list[str]:
    found = []
    minds = minds_odd_widths(latency.odd)
    rounded = recipe.space.get("round_to") == BLOCK
    if minds:
        told = (
            f"with one channel less in each group, a network of multiples of {BLOCK} takes "
            f"{latency.odd:.2f} times as long here"
        )
        found.append(
            f"widths are kept to multiples of {BLOCK} (space.round_to): {told}"
            if rounded
            else f"warning: {told}; if the space has policies in multiples of {BLOCK} within "
            f"its bounds, set space.round_to to {BLOCK}"
        )
    if latency.error > _UNSURE and (rounded or not minds):
        found.append(
            f"warning: latency is foreseen within {latency.error:.0%} only; if the machine was "
            "busy while passes were timed, launch again when it is not"
        )
    if recipe.run.gpus_per_worker > 0 and recipe.latency.measure is None:
        found.append(
            "latency is that of this machine's CPU; name a stopwatch for another device as "
            "latency.measure"
        )
    return found


def _about_precision(recipe: Recipe) -> list[str]:
    run = recipe.run
    if run.gpus_per_worker > 0 and run.ray_address is not None:
        return []  # of GPUs elsewhere nothing is known here
    good = settled_precision("auto", gpu=run.gpus_per_worker > 0)
    if (recipe.proxy.precision, good) != ("bfloat16", "float32"):
        return []
    return [
        "proxy.precision is bfloat16, which this machine does not compute in: candidates "
        "may take ten times as long as in float32, which a new run would choose here"
    ]
