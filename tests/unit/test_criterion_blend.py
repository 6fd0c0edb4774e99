"""The space criterion-blend: what genes mean, what is seeded, and how scorers follow."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from evosearch.algorithms.seeding import initial_population
from evosearch.assembly import Assembled, assemble
from evosearch.data import Images
from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.blending import Blends, comparable, places_of
from evosearch.pruning.criteria import channel_order
from evosearch.pruning.groups import trace
from evosearch.recipe import check_recipe
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload
from evosearch.space import CriteriaFacts, criteria_wish, known_spaces, make_space
from evosearch.testing import chain_table
from search_spaces.criterion_blend import CriterionBlend

TABLE = chain_table((8, 8, 16))
NAMES = ("l2", "apoz", "obd", "l1")
CLUSTERS = (("apoz",), ("l1", "l2"), ("obd",))
FACTS = CriteriaFacts(names=NAMES, default="obd", clusters=(CLUSTERS,) * 3)
HALF = (4, 4, 8)


def space(facts: CriteriaFacts = FACTS, **options: Any) -> CriterionBlend:
    return CriterionBlend(TABLE, options, facts)


def blend_of(*genes: float) -> Any:
    """The blend that the genes of the network mean: factor, choice, factor, factor."""
    (policy,) = space(blending="network").decode(np.array([genes]))
    assert policy.keep == HALF
    return policy.blend[0] if policy.blend else ()


def test_there_are_genes_for_choices_and_factors_only_where_there_is_a_choice() -> None:
    assert space().n_genes == 3 * 4
    assert space(blending="network").gene_names == (
        "factor:conv0:apoz",
        "choice:conv0:l1",
        "factor:conv0:l1",
        "factor:conv0:obd",
    )


@pytest.mark.parametrize(
    ("genes", "wanted"),
    [
        ((1.0, 0.0, 0.0, 0.0), (("apoz", 1),)),
        ((0.0, 0.49, 1.0, 0.0), (("l1", 1),)),
        ((0.1, 0.5, 1.0, 0.19), (("l2", 1),)),  # factors below 0.2 are off
        ((0.0, 1.0, 0.0, 0.7), ()),  # obd alone: the recipe's criterion
        ((0.6, 1.0, 0.6, 0.0), (("apoz", 1), ("l2", 1))),
        ((0.3, 0.0, 0.5, 0.2), (("apoz", 1), ("l1", 3))),
        # 15.2 and 4.8 twentieths: the one that is missing goes where more of it was cut off.
        ((1.0, 0.0, 0.45, 0.0), (("apoz", 3), ("l1", 1))),
        ((0.0, 0.0, 0.0, 0.0), (("apoz", 7), ("l1", 7), ("obd", 6))),  # none means all
    ],
)
def test_genes_mean(genes: tuple[float, ...], wanted: Any) -> None:
    assert blend_of(*genes) == wanted


def test_genes_of_a_group_move_that_group_alone() -> None:
    one, other = np.zeros((2, 12))
    one[[3, 7, 11]] = other[[3, 7, 11]] = 1
    other[4] = 1
    first, second = space().decode(np.array([one, other]))
    assert first == Policy(HALF)
    assert second == Policy(HALF, ((), (("apoz", 1), ("obd", 1)), ()))


def test_order_of_a_group_that_keeps_everything_is_no_matter() -> None:
    genomes = np.random.default_rng(0).random((50, space(sparsity=0.0).n_genes))
    assert set(space(sparsity=0.0).decode(genomes)) == {TABLE.dense}


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.5, "blending": "network"},
        {"sparsity": [0.0, 0.95], "grouping": "network", "project_onto": {"macs": 0.5}},
        {"sparsity": [0.0, 0.95], "project_onto": {"macs": 0.5}},
    ],
)
def test_all_pure_criteria_are_in_the_seeds_of_a_fixed_budget(options: dict[str, Any]) -> None:
    found = space(**options)
    population = initial_population(found, 8, 0, seeds=np.empty((0, found.n_genes)), seed_share=0.5)
    pure = found.decode(population)[:4]
    keep = pure[0].keep
    wanted = [((name, 1),) for name in NAMES if name != "obd"]
    assert pure[0] == Policy(keep)  # the recipe's criterion
    assert [p.blend for p in pure[1:]] == [(pairs,) * 3 for pairs in wanted]
    assert {p.keep for p in pure} == {keep}


def test_seeds_of_a_free_sparsity_take_turns() -> None:
    found = space(sparsity=[0.0, 0.9], grouping="network")
    policies = found.decode(found.ladder(8))
    assert policies[0] == TABLE.dense
    assert len({p.keep for p in policies}) == 8
    assert len({p.blend for p in policies}) == 4


def test_uniform_ratios_that_spend_one_budget_have_no_gene() -> None:
    options = {"sparsity": [0.0, 0.95], "project_onto": {"macs": 0.5}}
    assert space(**options, grouping="network").n_genes == 12
    assert space(**options, grouping="stage").n_genes == 12 + 2
    assert space(**options).n_genes == 12 + 3


def test_seed_of_a_space_without_blends_becomes_the_default_criterion() -> None:
    found = space(sparsity=[0.0, 0.9])
    genome = found.encode(Policy(HALF))
    assert found.decode(genome[None]) == [Policy(HALF)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.5}, "space.sparsty: unknown key; did you mean 'sparsity'"),
        ({"criteria": []}, "criteria: name at least one, each once"),
        ({"criteria": ["l1", "l1"]}, "criteria: name at least one, each once"),
        (
            {"clusters": 0},
            r"space.clusters: must be a whole number above 0, or 'silhouette', got 0$",
        ),
        ({"clusters": "many"}, r"space.clusters: must be [^,]*, or 'silhouette', got 'many'$"),
        ({"scores": "raw"}, "space.scores"),
        ({"sparsity": 1.5}, "space.sparsity"),
        ({"sparsity": [0.9, 0.1]}, "the lower bound 0.9 exceeds"),
        ({"project_onto": {"macs": 0.5}}, "project_onto needs bounds"),
    ],
)
def test_wrong_option_is_refused_by_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(**options)


def test_unreachable_budget_is_refused() -> None:
    told = r"project_onto\.macs = 0\.01 is out of reach: .* of dense$"
    with pytest.raises(BudgetUnreachable, match=told):
        space(sparsity=[0.0, 0.5], project_onto={"macs": 0.01})


def test_nothing_to_search_is_refused() -> None:
    facts = CriteriaFacts(names=("l1",), default="l1", clusters=((("l1",),),) * 3)
    with pytest.raises(ConfigError, match="leave nothing to search"):
        space(facts)


def test_wish_says_what_must_be_known() -> None:
    wish = criteria_wish("criterion-blend", {"criteria": ["l1", "obd"], "clusters": 2})
    assert wish is not None
    assert (wish.names, wish.clusters, wish.comparison) == (("l1", "obd"), 2, "rank")
    default = criteria_wish("criterion-blend", {})
    assert default is not None
    assert (default.names, default.clusters) == ((), None)
    assert criteria_wish("layer-sparsity", {}) is None


def test_space_is_registered() -> None:
    assert "criterion-blend" in known_spaces()
    assert make_space("criterion-blend", TABLE, {}, FACTS).n_genes == 12


# --- what scorers make of blends


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name="resnet20"))
    plan = trace(network)
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), np.arange(16) % 10)
    settings = ProxySettings(name="raw", criterion="l2", batch_size=16)
    return Scorer(prepare_workload(network, plan, settings, images, images, ("l1", "apoz", "fpgm")))


KEEP = (8, 8, 8, 16, 16, 16, 32, 32, 32)


@pytest.mark.parametrize("criterion", ["l1", "fpgm"])
def test_pure_blend_keeps_what_the_criterion_keeps(scorer: Scorer, criterion: str) -> None:
    found = scorer.keep(Policy(KEEP, (((criterion, 1),),) * 9))
    workload = scorer._workload
    places = channel_order(workload.network().module, workload.plan, criterion)
    counts = np.array(KEEP)[workload.plan.table.group_of]
    np.testing.assert_array_equal(found[:-1], places < counts)


def test_blend_of_one_group_changes_that_group_alone(scorer: Scorer) -> None:
    plain = scorer.keep(Policy(KEEP))
    blend = ((), ()) + ((("apoz", 3), ("fpgm", 1)),) + ((),) * 6
    found = scorer.keep(Policy(KEEP, blend))
    assert found.sum() == plain.sum()
    changed = np.flatnonzero(found != plain)
    assert len(changed) > 0
    assert ((changed >= 32) & (changed < 48)).all()


def test_blend_with_an_unknown_criterion_is_a_failed_measurement(scorer: Scorer) -> None:
    measurement = scorer.score(Policy(KEEP, ((("obd", 1),),) * 9))
    assert measurement.reason is not None
    assert "group layer1.0.conv1: no criterion 'obd' to blend; there are l1, apoz, fpgm" in (
        measurement.reason
    )


def test_ordering_by_a_blend_takes_less_than_a_millisecond() -> None:
    table = chain_table((16,) * 9 + (32,) * 9 + (64,) * 9)  # as large as ResNet-56
    rng = np.random.default_rng(0)
    names = tuple(f"criterion{i}" for i in range(15))
    blends = Blends(
        names=names, scores=comparable(rng.random((15, int(table.channels.sum()))), table)
    )
    blend = tuple(tuple((names[i], 1) for i in rng.permutation(15)[:3]) for _ in table.groups)
    default = places_of(rng.random(int(table.channels.sum())), table)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        blends.places(blend, table, default)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


# --- assembled from a recipe


def assembled(**tables: Any) -> Assembled:
    data = {
        "network": {"name": "resnet20", "weights": "shipped:resnet20-cifar10"},
        "data": {"calibration": 64, "validation": 64},
        "space": {"name": "criterion-blend", "criteria": ["l1", "apoz", "obd"], "clusters": 2},
        "search": {"population": 8},
        "proxy": {"name": "raw", "criterion": "l2", "precision": "float32"},
    }
    return assemble(check_recipe(data | tables, "test"))


def test_assembly_clusters_the_criteria_and_tells_the_ledger() -> None:
    found = assembled()
    assert found.criteria is not None
    told = found.facts()["criteria"]
    assert (told["names"], told["default"]) == (("l1", "apoz", "obd"), "l2")
    assert len(told["clusters"]) == 9
    for clusters in told["clusters"]:
        assert len(clusters) <= 2
        assert sorted(n for c in clusters for n in c) == ["apoz", "l1", "obd"]
    genomes = np.random.default_rng(0).random((3, found.space.n_genes))
    scorer = Scorer(found.workload)
    assert all(scorer.score(policy).ok for policy in found.space.decode(genomes))
    assert assembled().facts()["criteria"] == told


def test_a_space_in_which_nothing_goes_is_refused() -> None:
    space = {"name": "criterion-blend", "criteria": ["l1", "apoz", "obd"], "sparsity": 0.0}
    with pytest.raises(ConfigError, match="leaves every group a single width, and nothing to"):
        assembled(space=space)


def test_space_without_a_wish_costs_nothing() -> None:
    found = assembled(space={"name": "layer-sparsity"})
    assert found.criteria is None
    assert found.workload.blends is None
    assert found.facts()["criteria"] is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["l1", "frob"], "no criterion 'frob'; there are l1, l2"),
        (["no/file.py:f"], "criterion '.*no/file.py:f': file .* does not exist"),
    ],
)
def test_unknown_candidate_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assembled(space={"name": "criterion-blend", "criteria": names, "sparsity": [0.0, 0.5]})


def test_every_group_has_clusters_of_its_own() -> None:
    clusters = (
        (("apoz",), ("l1", "l2")),
        (("apoz", "l1", "l2"),),
        (("apoz",), ("l1",), ("l2",)),
    )
    found = space(CriteriaFacts(names=("apoz", "l1", "l2"), default="l2", clusters=clusters))
    assert found.gene_names == (
        "factor:conv0:apoz",
        "choice:conv0:l1",
        "factor:conv0:l1",
        "choice:conv1:apoz",
        "factor:conv2:apoz",
        "factor:conv2:l1",
        "factor:conv2:l2",
    )
    (policy,) = found.decode(np.array([[1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0]]))
    assert policy.blend == ((("apoz", 1),), (("l1", 1),), (("l1", 1), ("l2", 1)))


def test_of_several_criteria_of_a_cluster_the_weightiest_is_encoded() -> None:
    found = space()
    told = Policy(HALF, ((("l1", 1), ("l2", 5)), (("l1", 5), ("l2", 1)), ()))
    (policy,) = found.decode(found.encode(told)[None])
    assert policy.blend == ((("l2", 1),), (("l1", 1),), ())


def test_uneven_widths_are_encoded_by_their_mean() -> None:
    found = space(sparsity=[0.0, 1.0], grouping="network", blending="network")
    genes = [found.encode(Policy(keep))[0] for keep in ((8, 2, 16), (2, 8, 16))]
    assert genes == pytest.approx([0.25, 0.25])
