import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from evosearch.errors import BudgetUnreachable, ConfigError, PolicyError
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.space import make_space
from evosearch.testing import chain_table
from search_spaces.layer_sparsity import LayerSparsity
from tests.unit.latencies import timed

FloatArray = NDArray[np.float64]
KINDS = ("macs", "params", "latency")

genes = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
# Most networks have no grouped convolutions; where there are, so many channels go together.
granular = st.tuples(st.sampled_from([2, 3, 8]), st.integers(2, 6))
sizes = st.integers(2, 40).map(lambda width: (1, width)) | granular
tables = st.lists(sizes, min_size=1, max_size=5).map(
    lambda found: timed(chain_table([g * n for g, n in found], granularities=[g for g, _ in found]))
)
steps = st.sampled_from([1, 2, 3, 8, 64])
groupings = st.sampled_from(["layer", "stage"])
some = settings(max_examples=60, deadline=None)


@st.composite
def bounds(draw: st.DrawFn, lowest: float = 0.0) -> tuple[float, float]:
    few = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    low, high = sorted((draw(few), draw(few)))
    return max(low, lowest), max(high, lowest)


@st.composite
def projected(draw: st.DrawFn) -> tuple[GroupTable, dict[str, Any]]:
    """A network, and options with a budget between the cheapest and the dearest policy."""
    table = draw(tables)
    options: dict[str, Any] = {
        "sparsity": (0.0, draw(st.sampled_from([0.5, 0.9, 1.0]))),
        "round_to": draw(steps),
        "grouping": draw(groupings),
    }
    space = LayerSparsity(table, options)
    kind = draw(st.sampled_from(KINDS))
    lowest, highest = table.shares_of([space.cheapest(), space.dearest()])[kind]
    share = lowest + draw(st.floats(0, 1)) * (highest - lowest)
    assume(share <= 1)
    return table, {**options, "project_onto": {kind: float(share)}}


def genomes_of(space: LayerSparsity) -> st.SearchStrategy[FloatArray]:
    shape = st.tuples(st.integers(1, 4), st.just(space.n_genes))
    return arrays(np.float64, shape, elements=genes)


def keep_of(space: LayerSparsity, genomes: FloatArray) -> NDArray[np.int64]:
    return np.array([policy.keep for policy in space.decode(genomes)])


def steps_of(table: GroupTable, round_to: int) -> list[int]:
    """Of what the widths of each group are multiples."""
    found = []
    for group in table.groups:
        size = group.granularity
        both = [w for w in range(1, group.channels + 1) if not (w % round_to or w % size)]
        enough = len(both) > 1 or round_to % group.granularity == 0
        found.append(math.lcm(round_to, group.granularity) if enough else group.granularity)
    return found


def admissible(channels: int, low: float, high: float, step: int) -> list[int]:
    """Widths that the class docstring allows."""
    fewest, most = channels * (1 - high) - 1e-9, channels * (1 - low) + 1e-9
    widths = {w for w in range(step, channels + 1, step) if fewest <= w <= most}
    return sorted(widths | ({channels} if low == 0 else set()))


@cache
def traced(name: str) -> GroupTable:
    return timed(trace(load_network(NetworkSpec(name=name))).table)


@some
@given(tables, bounds(), steps, groupings, st.data())
def test_every_vector_gives_a_policy_of_the_network(
    table: GroupTable, sparsity: tuple[float, float], step: int, grouping: str, data: st.DataObject
) -> None:
    options = {"sparsity": sparsity, "round_to": step, "grouping": grouping}
    space = LayerSparsity(table, options)
    for policy in space.decode(data.draw(genomes_of(space))):
        table.check(policy)


@some
@given(tables, st.sampled_from([0.25, 0.9, 1.0]), steps, groupings, st.data())
def test_kept_channels_are_multiples_or_all(
    table: GroupTable, high: float, step: int, grouping: str, data: st.DataObject
) -> None:
    options = {"sparsity": (0.0, high), "round_to": step, "grouping": grouping}
    space = LayerSparsity(table, options)
    keep = keep_of(space, data.draw(genomes_of(space)))
    assert ((keep % steps_of(table, step) == 0) | (keep == table.channels)).all()


@pytest.mark.parametrize("sparsity", [(0.9, 0.95), (0.5, 0.9)])
def test_kept_channels_are_multiples_or_all_when_no_multiple_is_in_bounds(
    sparsity: tuple[float, float],
) -> None:
    space = LayerSparsity(chain_table([20, 50]), {"sparsity": sparsity, "round_to": 64})
    for policy in (space.cheapest(), space.dearest()):
        assert all(k % 64 == 0 or k == c for k, c in zip(policy.keep, (20, 50), strict=True))


@some
@given(tables, bounds(), steps, st.data())
def test_kept_channels_are_the_nearest_admissible_width(
    table: GroupTable, sparsity: tuple[float, float], step: int, data: st.DataObject
) -> None:
    space = LayerSparsity(table, {"sparsity": sparsity, "round_to": step})
    genome = data.draw(genomes_of(space))[:1]
    low, high = sparsity
    wanted = table.channels * (1 - (low + genome[0] * (high - low)))
    for width, wish, channels, own in zip(
        keep_of(space, genome)[0], wanted, table.channels, steps_of(table, step), strict=True
    ):
        widths = admissible(int(channels), low, high, own)
        assume(widths)
        assert width in widths
        assert abs(width - wish) <= min(abs(w - wish) for w in widths) + 1e-9


@some
@given(tables, bounds(), steps, groupings, st.data())
def test_larger_gene_never_keeps_more(
    table: GroupTable, sparsity: tuple[float, float], step: int, grouping: str, data: st.DataObject
) -> None:
    options = {"sparsity": sparsity, "round_to": step, "grouping": grouping}
    space = LayerSparsity(table, options)
    genomes = data.draw(genomes_of(space))
    larger = np.maximum(genomes, data.draw(genomes_of(space))[0])
    assert (keep_of(space, larger) <= keep_of(space, genomes)).all()


@some
@given(projected(), st.data())
def test_projected_policy_stays_within_the_budget(
    case: tuple[GroupTable, dict[str, Any]], data: st.DataObject
) -> None:
    table, options = case
    space = LayerSparsity(table, options)
    ((kind, share),) = options["project_onto"].items()
    spent = table.shares(keep_of(space, data.draw(genomes_of(space))))[kind]
    assert (spent <= share * (1 + 1e-8)).all()


@some
@given(projected(), st.data())
def test_no_gene_of_a_projected_policy_can_grow_by_one_step(
    case: tuple[GroupTable, dict[str, Any]], data: st.DataObject
) -> None:
    table, options = case
    space = LayerSparsity(table, options)
    ((kind, share),) = options["project_onto"].items()
    for keep in keep_of(space, data.draw(genomes_of(space))):
        wider = np.array(list(one_step_wider(table, options, keep)))
        if len(wider):
            assert (table.shares(wider)[kind] > share).all()


@some
@given(projected(), st.data())
def test_projection_is_that_of_single_rows_and_turns(
    case: tuple[GroupTable, dict[str, Any]], data: st.DataObject
) -> None:
    table, options = case
    space = LayerSparsity(table, options)
    genomes = data.draw(genomes_of(space))
    expected = [projected_plainly(table, options, genome) for genome in genomes]
    assert keep_of(space, genomes).tolist() == expected


def projected_plainly(table: GroupTable, options: dict[str, Any], genome: FloatArray) -> list[int]:
    """What a row is projected onto, group by group and turn by turn."""
    ((kind, share),) = options["project_onto"].items()
    low, high = options["sparsity"]
    channels = [int(c) for c in table.channels]
    members = (
        table.stages if options["grouping"] == "stage" else [(g,) for g in range(len(channels))]
    )
    gene_of = {group: gene for gene, groups in enumerate(members) for group in groups}
    own_steps = steps_of(table, options["round_to"])
    levels = [admissible(c, low, high, s) for c, s in zip(channels, own_steps, strict=True)]

    def affordable(keep: list[int]) -> bool:
        return bool(table.shares(np.array([keep]))[kind][0] <= share * (1 + 1e-9))

    wanted = [
        max(c * (1 - (low + genome[gene_of[g]] * (high - low))), 1e-3 * c)
        for g, c in enumerate(channels)
    ]

    def scaled(exponent: float) -> list[float]:
        return [min(w * float(np.exp(exponent)), c) for w, c in zip(wanted, channels, strict=True)]

    def rounded(widths: list[float]) -> list[int]:
        # Of two that are as near, the wider one.
        return [
            min(own, key=lambda level, w=w: (abs(level - w), -level))
            for own, w in zip(levels, widths, strict=True)
        ]

    fits, fails = float(np.log(1e-9)), float(np.log(1e3))
    for _ in range(40):
        middle = (fits + fails) / 2
        if affordable(rounded(scaled(middle))):
            fits = middle
        else:
            fails = middle
    keep = rounded(scaled(fits))
    missing = [w - k for w, k in zip(scaled(fails), keep, strict=True)]
    turns = sorted(range(len(members)), key=lambda gene: -sum(missing[g] for g in members[gene]))
    grown = True
    while grown:
        grown = False
        for gene in turns:
            wider = [
                next((w for w in levels[g] if w > k), k) if gene_of[g] == gene else k
                for g, k in enumerate(keep)
            ]
            if wider != keep and affordable(wider):
                keep, grown = wider, True
    return keep


def one_step_wider(
    table: GroupTable, options: dict[str, Any], keep: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """The policy with one gene a level up, for every gene that has such a level."""
    low, high = options["sparsity"]
    layers = [(group,) for group in range(len(keep))]
    found, own_steps = [], steps_of(table, options["round_to"])
    for members in table.stages if options["grouping"] == "stage" else layers:
        wider = keep.copy()
        for group in members:
            widths = admissible(int(table.channels[group]), low, high, own_steps[group])
            wider[group] = next((w for w in widths if w > keep[group]), keep[group])
        if (wider > keep).any():
            found.append(wider)
    return found


def test_wide_groups_stay_within_a_tiny_budget() -> None:
    table = chain_table([4096, 4096])
    space = LayerSparsity(table, {"sparsity": [0.0, 1.0], "project_onto": {"params": 1e-6}})
    (params,) = table.costs(keep_of(space, np.zeros((1, 2))))[1]
    assert params <= 1e-6 * table.dense_costs[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["resnet20", "lenet-5"])
def test_projected_policies_of_a_real_network_spend_the_budget(network: str, kind: str) -> None:
    table = traced(network)
    space = LayerSparsity(table, {"project_onto": {kind: 0.4}})
    genomes = np.random.default_rng(0).random((32, space.n_genes))
    shares = table.shares(keep_of(space, genomes))[kind]
    assert (shares <= 0.4).all()
    assert (shares > 0.38).all()  # one channel of 20 is more than a hundredth


def test_projection_keeps_the_proportions_of_the_genes() -> None:
    table = traced("resnet20")
    space = LayerSparsity(table, {"project_onto": {"macs": 0.5}})
    genome = np.full((1, 9), 0.5)
    genome[0, 4] = 0.9
    kept = keep_of(space, genome)[0] / table.channels
    assert kept[4] == kept.min()
    assert np.ptp(np.delete(kept, 4)) <= 1 / 16 + 1e-9


def test_genes_at_zero_keep_everything_and_at_one_the_least() -> None:
    space = LayerSparsity(traced("resnet20"), {})
    dense, least = space.decode(np.array([[0.0] * 9, [1.0] * 9]))
    assert dense == traced("resnet20").dense == space.dearest()
    assert least == space.cheapest()
    assert least.keep == (2, 2, 2, 4, 4, 4, 7, 7, 7)


def test_no_sparsity_empties_a_group() -> None:
    space = LayerSparsity(traced("lenet-5"), {"sparsity": [1.0, 1.0]})
    assert space.decode(np.ones((1, 3))) == [Policy((1, 1, 1))]


def test_stage_has_one_gene_for_all_groups_of_a_resolution() -> None:
    space = LayerSparsity(traced("resnet20"), {"grouping": "stage"})
    assert space.n_genes == 3
    assert space.gene_names[0] == "layer1.0.conv1..layer1.2.conv1"
    (policy,) = space.decode(np.array([[0.0, 0.5, 1.0]]))
    assert policy.keep == (16, 16, 16, 18, 18, 18, 7, 7, 7)


def test_ladder_starts_with_the_ends_and_the_middle() -> None:
    space = LayerSparsity(traced("resnet20"), {})
    assert space.ladder(5)[:, 0].tolist() == [0.0, 1.0, 0.5, 0.25, 0.75]


def test_ladder_finds_every_uniform_policy() -> None:
    space = LayerSparsity(chain_table([7, 7]), {"sparsity": [0.0, 1.0]})
    policies = space.decode(space.ladder(10**6))
    assert {policy.keep for policy in policies} == {(k, k) for k in range(1, 8)}


def test_policy_of_another_network_is_not_encoded() -> None:
    space = LayerSparsity(chain_table([8, 8]), {})
    with pytest.raises(PolicyError, match="has 2 counts, got 3"):
        space.encode(Policy((1, 1, 1)))
    with pytest.raises(PolicyError, match="group conv1 has 8 channels, not 9"):
        space.encode(Policy((8, 9)))


def test_policy_beyond_the_bounds_is_encoded_as_the_nearest() -> None:
    space = LayerSparsity(chain_table([10, 10]), {"sparsity": [0.2, 0.5]})
    assert space.encode(Policy((10, 1))).tolist() == [0.0, 1.0]


def test_space_registers_by_name() -> None:
    assert isinstance(make_space("layer-sparsity", chain_table(), {}), LayerSparsity)


def test_unknown_space_is_refused_with_the_known_ones() -> None:
    known = "criterion-blend, layer-sparsity"
    with pytest.raises(ConfigError, match=f"no search space 'layers'; there are {known}"):
        make_space("layers", chain_table(), {})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rond_to": 8}, r"space\.rond_to: unknown key; did you mean 'round_to'\?"),
        ({"colour": 8}, r"space\.colour: unknown key; known are sparsity, round_to"),
        ({"sparsity": [0.9, 0.1]}, r"the lower bound 0\.9 exceeds the upper bound 0\.1"),
        ({"sparsity": [-0.1, 0.5]}, r"space\.sparsity\.0: .*greater than or equal to 0, got -0\.1"),
        ({"sparsity": [0.1, 1.5]}, r"space\.sparsity\.1: .*less than or equal to 1, got 1\.5"),
        ({"sparsity": [float("nan"), 0.5]}, r"space\.sparsity\.0: .*got nan"),
        ({"sparsity": [0.1]}, r"space\.sparsity: must be two shares, .*got \[0\.1\]"),
        (
            {"sparsity": [0.1, 0.2, 0.3]},
            r"space\.sparsity: must be two shares, .*got \[0\.1, 0\.2, 0\.3\]",
        ),
        ({"sparsity": 0.5}, r"space\.sparsity: must be two shares, smallest and largest, got 0\.5"),
        ({"round_to": 0}, r"space\.round_to: .*greater than or equal to 1, got 0"),
        ({"round_to": 1.5}, r"space\.round_to: .*integer.*got 1\.5"),
        ({"grouping": "block"}, r"space\.grouping: .*'layer' or 'stage', got 'block'"),
        ({"project_onto": 0.5}, r"space\.project_onto: .*got 0\.5"),
        (
            {"project_onto": {}},
            r"space\.project_onto: name exactly one of macs, params and latency",
        ),
        (
            {"project_onto": {"macs": 0.5, "params": 0.5}},
            r"space\.project_onto: name exactly one of macs, params and latency",
        ),
        ({"project_onto": {"macs": 1.5}}, r"space\.project_onto\.macs: .*equal to 1, got 1\.5"),
    ],
)
def test_wrong_option_is_refused_by_its_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LayerSparsity(chain_table(), options)


def test_unknown_budget_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'macs'|known are macs, params, latency"):
        LayerSparsity(chain_table(), {"project_onto": {"mac": 0.5}})


@pytest.mark.parametrize("options", [{"round_to": "8"}, {"round_to": True}, {"round_to": 8.0}])
def test_number_given_as_something_else_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"space\.round_to"):
        LayerSparsity(chain_table(), options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"project_onto": {"macs": 0.001}},
            r"macs = 0\.001 is out of reach: .* can be 0\.1296 to 1\.0000 of dense",
        ),
        (
            {"project_onto": {"params": 0.001}},
            r"params = 0\.001 is out of reach: .* can be 0\.1190 to 1\.0000",
        ),
        (
            {"sparsity": [0.2, 0.9], "project_onto": {"macs": 0.95}},
            r"macs = 0\.95 is out of reach: within .* it can be 0\.1296 to 0\.7777",
        ),
    ],
)
def test_budget_out_of_reach_names_the_reachable_range(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BudgetUnreachable, match=rf"space\.project_onto\.{sentence}"):
        LayerSparsity(traced("resnet20"), options)


@pytest.mark.parametrize("options", [{}, {"round_to": 8}, {"grouping": "stage"}])
def test_levels_give_every_width_in_order(options: dict[str, Any]) -> None:
    space = LayerSparsity(chain_table(), options)
    everything = space.decode(np.random.default_rng(0).random((3000, space.n_genes)))
    for gene, values in enumerate(space.levels()):
        genomes = np.zeros((len(values), space.n_genes))
        genomes[:, gene] = values
        keep = np.array([policy.keep for policy in space.decode(genomes)])
        assert (np.diff(keep, axis=0) >= 0).all()
        assert (np.diff(keep, axis=0) > 0).any(axis=1).all()
        touched = np.flatnonzero(np.ptp(keep, axis=0) > 0)
        reachable = {tuple(np.array(policy.keep)[touched]) for policy in everything}
        assert reachable <= {tuple(row[touched]) for row in keep}


def test_a_budget_without_its_cost_says_how_to_write_it() -> None:
    table = trace(load_network(NetworkSpec(name="resnet20"))).table
    with pytest.raises(ConfigError, match=r"such as \{ macs = 0\.5 \}, got 0\.5$"):
        LayerSparsity(table, {"project_onto": 0.5})


def test_the_rest_of_a_budget_goes_where_rounding_took_most() -> None:
    options = {"round_to": 8, "project_onto": {"params": 0.4}}
    space = LayerSparsity(chain_table((64, 64, 64)), options)
    # The common factor leaves about 36, 39.6 and 36 channels, which are rounded to 32, 40 and 32:
    # the first group misses four, and the second has more than it asked for.
    assert space.decode(np.array([[0.1, 0.0, 0.1]])) == [Policy((40, 40, 32))]


def test_where_no_multiple_lies_within_the_bounds_the_nearest_width_is_kept() -> None:
    options = {"sparsity": [0.35, 0.35], "round_to": 8}
    space = LayerSparsity(chain_table((20, 27)), options)
    # 13 and 17.55 channels are asked for, and 16 lies next to both.
    assert space.decode(np.array([[0.5, 0.5]])) == [Policy((16, 16))]


@cache
def with_blocks() -> GroupTable:
    return timed(trace(load_network(NetworkSpec(name="resnet20")), blocks=True).table)


def blocks_out(table: GroupTable, policies: list[Policy]) -> NDArray[np.bool_]:
    return table.left_out(np.array([policy.keep for policy in policies]))


def test_blocks_are_left_out_above_three_quarters() -> None:
    table = with_blocks()
    space = LayerSparsity(table, {"blocks": True})
    n = len(table.groups)
    assert space.n_genes == n + len(table.blocks)
    assert space.gene_names[n:] == tuple(f"block:{block.name}" for block in table.blocks)
    genomes = np.full((4, space.n_genes), 0.5)
    genomes[1:, n + 2] = 0.75, 0.7501, 1.0
    policies = space.decode(genomes)
    assert policies[0] == policies[1]
    assert policies[2] == policies[3]
    (group,) = table.blocks[2].groups
    expected = list(policies[0].keep)
    expected[group] = 0
    assert policies[2].keep == tuple(expected)


def test_blocks_stay_unless_they_may_go() -> None:
    table = with_blocks()
    plain, same = LayerSparsity(table, {}), LayerSparsity(timed_plain(), {})
    assert plain.n_genes == same.n_genes == len(table.groups)
    assert min(plain.cheapest().keep) > 0
    genomes = np.random.default_rng(0).random((20, plain.n_genes))
    assert plain.decode(genomes) == same.decode(genomes)


def timed_plain() -> GroupTable:
    return traced("resnet20")


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"space\.blocks: no block of this network can be"):
        LayerSparsity(chain_table(), {"blocks": True})


def test_uniform_ratios_keep_all_blocks_and_the_cheapest_none() -> None:
    table = with_blocks()
    space = LayerSparsity(table, {"blocks": True})
    assert not blocks_out(table, space.decode(space.ladder(30))).any()
    assert blocks_out(table, [space.cheapest()]).all()
    assert not blocks_out(table, [space.dearest()]).any()


@some
@given(st.sampled_from(["macs", "params", "latency"]), st.floats(0.0, 1.0), st.data())
def test_budgets_are_spent_whatever_blocks_a_genome_leaves_out(
    name: str, place: float, data: st.DataObject
) -> None:
    table = with_blocks()
    free = LayerSparsity(table, {"blocks": True})
    ends = table.shares_of([free.cheapest(), free.dearest()])[name]
    share = float(ends[0] + place * (ends[1] - ends[0]))
    space = LayerSparsity(table, {"blocks": True, "project_onto": {name: share}})
    policies = space.decode(data.draw(genomes_of(space)))
    keep = np.array([policy.keep for policy in policies])
    spent = table.share(name, keep)
    assert (spent <= share * (1 + 1e-8)).all()
    # Not a level more fits, in any group that is there.
    for row, cost in zip(keep, spent, strict=True):
        for group in np.flatnonzero((row > 0) & (row < table.channels)):
            wider = row.copy()
            wider[group] = min(w for w in space._levels[group] if w > row[group])
            assert table.share(name, wider[None])[0] > share or cost == pytest.approx(share)


def test_blocks_come_back_where_widths_cannot_spend_the_budget() -> None:
    table = with_blocks()
    space = LayerSparsity(table, {"blocks": True, "project_onto": {"macs": 0.6}})
    n = len(table.groups)
    genomes = np.zeros((1, space.n_genes))
    genomes[0, n:] = 0.8 + 0.02 * np.arange(len(table.blocks))
    (out,) = blocks_out(table, space.decode(genomes))
    # The lowest genes have come back, and no more of them than must.
    assert 0 < out.sum() < len(out)
    assert (np.diff(out.astype(int)) >= 0).all()
    one_more = table.channels.copy()
    one_more[table.in_block[np.arange(len(out)) >= len(out) - out.sum() - 1].any(axis=0)] = 0
    assert table.share("macs", one_more[None])[0] < 0.6


def test_blocks_go_where_widths_cannot_keep_to_the_budget() -> None:
    table = with_blocks()
    options = {"blocks": True, "sparsity": (0.0, 0.25), "project_onto": {"macs": 0.3}}
    space = LayerSparsity(table, options)
    n = len(table.groups)
    genomes = np.zeros((1, space.n_genes))
    genomes[0, n:] = 0.1 * np.arange(len(table.blocks))
    (policy,) = space.decode(genomes)
    (out,) = blocks_out(table, [policy])
    assert out.any()
    # The highest genes went.
    assert (np.diff(out.astype(int)) >= 0).all()
    assert table.shares_of([policy])["macs"][0] <= 0.3


def test_levels_of_blocks_are_out_and_in() -> None:
    table = with_blocks()
    space = LayerSparsity(table, {"blocks": True})
    levels = space.levels()
    assert [len(values) for values in levels[len(table.groups) :]] == [2] * len(table.blocks)
    narrow, wide = (np.array([[values[end] for values in levels]]) for end in (0, -1))
    assert space.decode(narrow) == [space.cheapest()]
    assert space.decode(wide) == [space.dearest()]


def test_a_budget_below_all_widths_says_what_goes_lower() -> None:
    table = with_blocks()
    narrow = {"sparsity": (0.0, 0.25), "project_onto": {"macs": 0.3}}
    with pytest.raises(BudgetUnreachable, match=r"of dense; space\.blocks = true may go lower$"):
        LayerSparsity(table, narrow)
    LayerSparsity(table, {**narrow, "blocks": True})
    with pytest.raises(BudgetUnreachable, match=r"of dense$"):
        LayerSparsity(table, {**narrow, "blocks": True, "project_onto": {"macs": 0.001}})
    with pytest.raises(BudgetUnreachable, match=r"of dense$"):
        LayerSparsity(table, {"sparsity": (0.5, 0.75), "project_onto": {"macs": 0.9}})
