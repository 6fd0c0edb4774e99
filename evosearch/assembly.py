"""Names in a recipe become objects here; those of network and images in `materials`."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evosearch.data import Images
from evosearch.doubts import doubts_about
from evosearch.errors import (
    BudgetUnreachable,
    ConfigError,
    DataError,
    EvosearchError,
    NetworkError,
)
from evosearch.facts import RunFacts, check_same
from evosearch.latency import BLOCK, LatencyModel, minds_odd_widths
from evosearch.materials import ImageSets, network_and_images
from evosearch.networks import Network
from evosearch.pruning.blending import Blends, cluster_groups
from evosearch.pruning.criteria import applicable_criteria, criterion_named
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.reach import reachable_costs
from evosearch.recipe import RANKINGS, ProxyRecipe, RankingRecipe, Recipe
from evosearch.scoring.devices import check_devices, gpus_here
from evosearch.scoring.objectives import COSTS, Goals, worst_metrics
from evosearch.scoring.proxies import ProxySettings, proxy_named
from evosearch.scoring.timing import stand_in, time_passes
from evosearch.scoring.workload import (
    Workload,
    dense_error,
    prepare_workload,
    settled_batch_size,
    settled_calibration_batch,
    settled_precision,
)
from evosearch.snapshots import versions
from evosearch.space import CriteriaFacts, CriteriaWish, SearchSpace, criteria_wish, make_space
from evosearch.strategy import algorithm_of, algorithm_settings, goals_of, wants_latency

# So many random genomes show whether widths that are not multiples are asked for at all.
_PROBES = 32
# Of so many images and classes the ledger keeps what the dense network puts out.
_SHOWN = 16

__all__ = [
    "Assembled",
    "assemble",
    "assemble_again",
    "width_multiple",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Assembled:
    """The objects of a recipe.

    Args:
        recipe: What they were made from, nothing left to be settled.
        space: What genomes mean.
        goals: What is minimised.
        workload: What scorers need.
        check: Images that the search does not see, perhaps none.
        criteria: What the space was told about criteria, if it asked.
    """

    recipe: Recipe
    space: SearchSpace
    goals: Goals
    workload: Workload
    check: Images
    criteria: CriteriaFacts | None = None

    @property
    def dense_error(self) -> float:
        """Top-1 error of the dense network on the validation images."""
        return dense_error(self.workload)

    @property
    def spent(self) -> str:
        """Which cost is to be saved: the budget's, or that of the goals; MACs if there is none."""
        budget = self.recipe.space.get("project_onto")
        named = [name for name in COSTS if isinstance(budget, dict) and budget.get(name)]
        goals = [name for name in ("latency", "macs", "params") if name in self.goals.names]
        return [*named, *goals, "macs"][0]

    def doubts(self) -> list[str]:
        """What is possible but hardly meant or expected, in sentences."""
        return doubts_about(self.recipe, self.goals, self.workload, self.dense_error)

    def _order_digest(self) -> str:
        """Digest of what decides the order in which channels go."""
        blends = self.workload.blends
        scores = {} if blends is None else {"scores": blends.scores}
        return _digest({"places": self.workload.places, **scores})

    def facts(self) -> dict[str, Any]:
        """What the ledger keeps about the run, as plain data."""
        table = self.workload.plan.table
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "groups": [[group.name, group.channels] for group in table.groups],
            "dense_macs": table.dense_costs[0],
            "dense_params": table.dense_costs[1],
            "dense_error": self.dense_error,
            "outputs": self.workload.dense_logits[:_SHOWN, :_SHOWN].astype(float).tolist(),
            "worst": worst_metrics(self.workload.dense_logits),
            "images": {
                "calibration": self.workload.calibration.digest(),
                "validation": self.workload.validation.digest(),
                "check": self.check.digest(),
            },
            "weights": _digest(self.workload.state),
            "channel_order": self._order_digest(),
            "criteria": None if self.criteria is None else asdict(self.criteria),
            "latency": None if table.latency is None else table.latency.model_dump(mode="json"),
            "versions": versions(),
        }


def _digest(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def assemble(
    recipe: Recipe,
    criteria: Sequence[str] = (),
    latency: LatencyModel | None = None,
    *,
    settles_widths: bool = False,
) -> Assembled:
    """Makes everything that a recipe names, and checks that it fits together.

    Args:
        recipe: What is wanted.
        criteria: What "all criteria" meant when a run was launched; later versions have more.
        latency: What was timed then. If that is None and the recipe wants it, it is timed now.
        settles_widths: Where it is timed, widths become multiples of `BLOCK` if others are slow and
            the recipe leaves that open.

    Raises:
        EvosearchError: Something does not; names the field, group or file.
    """
    goals = goals_of(recipe)
    _check_names(recipe)
    _check_where(recipe)
    network, image_sets = network_and_images(recipe)
    options: Mapping[str, Any] = {k: v for k, v in recipe.space.items() if k != "name"}
    plan = trace(network, blocks=options.get("blocks") is True)
    wish = criteria_wish(recipe.space["name"], options)
    if wish is not None and not wish.names:
        named = tuple(criteria) or applicable_criteria(network.module, plan)[0]
        wish = replace(wish, names=named)
    facts = None if wish is None else _unclustered(wish, plan, recipe.proxy.criterion)
    maker = _Maker(recipe, goals, facts)
    if latency is None and wants_latency(recipe, goals):
        latency, options = maker.timed(network, plan, options, settles_widths=settles_widths)
        space_table = {"name": recipe.space["name"], **options}
        recipe = recipe.model_copy(update={"space": space_table})
    plan = _knowing(plan, latency)
    space = maker.space(plan.table, options)
    # A blend chooses among criteria, and begins with pure ones.
    rankings = [] if facts else _applicable_rankings(network, plan)
    recipe = _settled(recipe, image_sets, space, network.input.shape, rankings)
    with _naming("proxy.criterion"):
        workload = prepare_workload(
            network,
            plan,
            _proxy_settings(recipe.proxy),
            image_sets.calibration,
            image_sets.validation,
            facts.names if facts else (),
            wish.comparison if wish else "rank",
        )
    if wish is not None and facts is not None and workload.blends is not None:
        facts = _clustered(facts, wish, workload.blends, plan.table)
        space = make_space(recipe.space["name"], plan.table, options, facts)
    return Assembled(
        recipe=recipe,
        space=space,
        goals=goals,
        workload=workload,
        check=image_sets.check,
        criteria=facts,
    )


def _check_names(recipe: Recipe) -> None:
    """Refuses names of proxies and criteria that there are not, before anything is loaded."""
    with _naming("proxy.name"):
        proxy_named(recipe.proxy.name)
    with _naming("proxy.criterion"):
        criterion_named(recipe.proxy.criterion)
    with _naming("search.rankings"):
        for ranking in recipe.search.rankings or ():
            criterion_named(ranking.criterion)


def _check_where(recipe: Recipe) -> None:
    """Refuses workers and GPUs that there are not."""
    run = recipe.run
    check_devices(run.workers, run.gpus_per_worker, run.ray_address)
    if run.gpus_per_worker > 0 and recipe.proxy.precision == "auto" and not gpus_here():
        raise ConfigError(
            "proxy.precision: what the GPUs of the cluster compute in cannot be seen from here; "
            "set it to bfloat16, which those of since 2020 do, or to float32"
        )


def assemble_again(recorded: RunFacts, recipe: Recipe, run: Path) -> Assembled:
    """The objects of a run, which are those that it was launched with.

    Args:
        recorded: The run's facts.
        recipe: The run's recipe; its `[run]` table, where to score, may have changed.
        run: The run's directory, for messages.

    Raises:
        ConfigMismatch: Network or images are not the ones that were measured.
        EvosearchError: Something does not fit together any more.
    """
    try:
        assembled = assemble(recipe, recorded.criteria_names, recorded.latency)
    except (DataError, NetworkError) as exc:
        if "does not exist" not in str(exc):
            raise
        told = f"{exc}; if it was moved, say where to in {run / 'recipe.toml'}"
        raise type(exc)(told) from exc
    check_same(recorded, assembled.facts(), run)
    return assembled


def _knowing(plan: CuttingPlan, latency: LatencyModel | None) -> CuttingPlan:
    """The plan with what foretells latency."""
    return replace(plan, table=replace(plan.table, latency=latency))


@dataclass(frozen=True)
class _Maker:
    """Makes the space that a recipe names.

    Args:
        recipe: Names the space and its options.
        goals: Its objectives and constraints.
        facts: What the space is told about criteria, if it asks.
    """

    recipe: Recipe
    goals: Goals
    facts: CriteriaFacts | None

    def space(self, table: GroupTable, options: Mapping[str, Any]) -> SearchSpace:
        """The space, in which there is something to search, by its algorithm, in its bounds.

        Raises:
            ConfigError: There is not.
            SpaceError: No policy of it is within the bounds.
        """
        space = make_space(self.recipe.space["name"], table, options, self.facts)
        widest = space.dearest()
        # A blend of criteria may be searched at one width, unless nothing goes at all.
        fixed = self.facts is None or widest.keep == tuple(table.channels.tolist())
        if fixed and space.cheapest().keep == widest.keep:
            raise ConfigError(
                f"space: {', '.join(f'{k} = {v}' for k, v in options.items()) or 'this network'} "
                "leaves every group a single width, and nothing to search; lower space.round_to or "
                "widen space.sparsity"
            )
        self.goals.check_reachable(*reachable_costs(space, table))
        # Made here once to refuse a wrong algorithm before anything is measured.
        algorithm_of(self.recipe, space, self.goals, table)
        return space

    def check_untimed(self, table: GroupTable, options: Mapping[str, Any]) -> None:
        """Refuses a wrong word now, not after half a minute of timing; an unreachable time then."""
        try:
            self.space(replace(table, latency=stand_in(table)), options)
        except BudgetUnreachable as exc:
            if "latency" not in str(exc):
                raise

    def may_round(self, table: GroupTable, options: Mapping[str, Any]) -> bool:
        """Whether the recipe leaves open of what widths are multiples, and blocks would do."""
        if "round_to" in options:
            return False
        name, blocks = self.recipe.space["name"], {**options, "round_to": BLOCK}
        guess = replace(table, latency=stand_in(table))
        try:
            self.check_untimed(table, blocks)
            free, rounded = (make_space(name, guess, o, self.facts) for o in (options, blocks))
        except EvosearchError:
            return False
        genomes = np.random.default_rng(0).random((_PROBES, free.n_genes))
        return free.n_genes == rounded.n_genes and free.decode(genomes) != rounded.decode(genomes)

    def timed(
        self,
        network: Network,
        plan: CuttingPlan,
        options: Mapping[str, Any],
        *,
        settles_widths: bool,
    ) -> tuple[LatencyModel, Mapping[str, Any]]:
        """What foretells latency, and the space's options with widths that suit the clock."""
        self.check_untimed(plan.table, options)
        time = functools.partial(time_passes, network, plan, self.recipe.latency)
        if not settles_widths or not self.may_round(plan.table, options):
            return time(width_multiple(options)), options
        latency = time(None)
        if not minds_odd_widths(latency.odd):
            return latency, {**options, "round_to": 1}
        suited = {**options, "round_to": BLOCK}
        try:
            self.space(_knowing(plan, latency).table, suited)
        except BudgetUnreachable:  # perhaps narrower groups reach it
            return time(1), options
        return latency, suited


def width_multiple(options: Mapping[str, Any]) -> int:
    """The number that all widths of a space are multiples of, 1 if it does not say."""
    wish = options.get("round_to")
    return wish if isinstance(wish, int) and wish > 0 else 1


def _proxy_settings(proxy: ProxyRecipe) -> ProxySettings:
    """What scorers are told of a settled recipe's proxy, whose batch size is settled, too."""
    return ProxySettings(
        name=proxy.name,
        criterion=proxy.criterion,
        coupling=proxy.coupling,
        labels=proxy.labels,
        recalibrate=proxy.recalibrate,
        ridge=proxy.ridge,
        recalibration_images=proxy.recalibration_images,
        reconstruction_images=proxy.reconstruction_images,
        reconstruction_layers=proxy.reconstruction_layers,
        reconstruction_ridge=proxy.reconstruction_ridge,
        distillation_steps=proxy.distillation_steps,
        distillation_lr=proxy.distillation_lr,
        precision=proxy.precision,
        batch_size=cast(int, proxy.batch_size),
        calibration_batch=proxy.calibration_batch,
    )


def _unclustered(wish: CriteriaWish, plan: CuttingPlan, default: str) -> CriteriaFacts:
    """Facts before anything is computed: enough to check options and budgets."""
    for field, named in (("proxy.criterion", (default,)), ("space.criteria", wish.names)):
        with _naming(field):
            for name in named:
                criterion_named(name)
    return CriteriaFacts(
        names=wish.names, default=default, clusters=((wish.names,),) * len(plan.table.groups)
    )


def _clustered(
    facts: CriteriaFacts, wish: CriteriaWish, blends: Blends, table: GroupTable
) -> CriteriaFacts:
    """Facts with the clusters that the criteria's scores form."""
    clusters = cluster_groups(
        facts.names, blends.scores, table, wish.clusters, table.units(wish.sharing)
    )
    return replace(facts, clusters=clusters)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Puts the name of a field in front of what is wrong with it."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{field}: {exc}") from exc


def _settled(
    recipe: Recipe,
    images: ImageSets,
    space: SearchSpace,
    shape: tuple[int, ...],
    rankings: list[RankingRecipe],
) -> Recipe:
    """The recipe with all that it left open written down, so that a run never changes."""
    gpu, wish = recipe.run.gpus_per_worker > 0, recipe.proxy
    size = settled_batch_size(wish.batch_size, shape, gpu=gpu)
    how = {
        "precision": settled_precision(wish.precision, gpu=gpu),
        "batch_size": size,
        "calibration_batch": settled_calibration_batch(
            wish.calibration_batch, wish.batch_size, size
        ),
    }
    proxy = wish.model_copy(update=how)
    views = 2 if recipe.data.mirrored else 1
    sizes = {
        "calibration": len(images.calibration),
        "validation": len(images.validation) // views,
        "check": len(images.check) // views,
    }
    data = recipe.data.model_copy(update=sizes)
    begin = rankings if recipe.search.rankings is None else recipe.search.rankings
    chosen = algorithm_settings(recipe, space)
    search = recipe.search.model_copy(
        update={"algorithm": chosen.name, "population": chosen.population, "rankings": begin}
    )
    return recipe.model_copy(update={"proxy": proxy, "data": data, "search": search})


def _applicable_rankings(network: Network, plan: CuttingPlan) -> list[RankingRecipe]:
    """Rankings that suit a network."""
    names, _ = applicable_criteria(network.module, plan)
    return [ranking for ranking in RANKINGS if ranking.criterion in names]
