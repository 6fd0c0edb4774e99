from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.fidelity.drawing import Band, draw, elite
from evosearch.ledger import Ledger, Member
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy
from evosearch.pruning.table import GroupTable
from evosearch.recipe import Recipe
from evosearch.testing import chain_table
from search_spaces.layer_sparsity import LayerSparsity

TABLE = chain_table([16, 24, 32, 40])
SPACE = LayerSparsity(TABLE, {"sparsity": (0.0, 0.9)})
HALF = Band(low=0.46, high=0.54)


def shares(policies: tuple[Policy, ...], table: GroupTable = TABLE) -> list[float]:
    return [int(macs) / table.dense_costs[0] for macs in table.costs_of(policies)[0]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(20, 40), min_size=3, max_size=5),
    st.floats(0.2, 0.7),
    st.floats(0.1, 0.2),
    st.integers(0, 2**32 - 1),
)
def test_drawn_policies_are_distinct_and_lie_in_the_band(
    channels: list[int], low: float, width: float, seed: int
) -> None:
    table, band = chain_table(channels), Band(low=low, high=low + width)
    space = LayerSparsity(table, {"sparsity": (0.0, 0.9)})
    policies = draw(space, table, band, 8, seed)
    assert len(set(policies)) == 8
    assert all(band.low <= share <= band.high for share in shares(policies, table))
    assert draw(space, table, band, 8, seed) == policies


def test_fewer_policies_are_the_first_of_more() -> None:
    assert draw(SPACE, TABLE, HALF, 20, 1)[:7] == draw(SPACE, TABLE, HALF, 7, 1)
    assert draw(SPACE, TABLE, HALF, 7, 1) != draw(SPACE, TABLE, HALF, 7, 2)


def test_some_policies_are_nearly_uniform_and_some_are_not() -> None:
    policies = draw(SPACE, TABLE, HALF, 40, 0)
    ratios = np.array([policy.keep for policy in policies]) / TABLE.channels
    spreads = np.ptp(ratios, axis=1)
    assert spreads.min() < 0.15
    assert spreads.max() > 0.6


@pytest.mark.parametrize("band", ["0.001,0.002", "0.995,1"])
def test_a_band_out_of_reach_names_what_can_be_reached(band: str) -> None:
    space = LayerSparsity(TABLE, {"sparsity": (0.1, 0.5)})
    low, high = shares((space.cheapest(), space.dearest()))
    with pytest.raises(BudgetUnreachable, match=f"{low:.4f} to {high:.4f} of dense"):
        draw(space, TABLE, Band.parse(band), 5, 0)


def test_a_band_with_too_few_policies_says_how_many_there_are() -> None:
    table = chain_table([4])
    space = LayerSparsity(table, {})
    with pytest.raises(ConfigError, match="--policies 5: only 1 distinct"):
        draw(space, table, Band(low=0.4, high=0.6), 5, 0)


@pytest.mark.parametrize("text", ["", "0.5", "a,b", "0.6,0.5", "0,0.5", "0.5,1.1", "0.1,0.2,0.3"])
def test_a_wrong_band_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--macs"):
        Band.parse(text)


def run_with(folder: Path, populations: list[list[Policy]]) -> Ledger:
    """A run whose last population is also its front."""
    facts = {
        "recipe": Recipe.model_validate({"network": {"name": "lenet-5"}}).model_dump(mode="json"),
        "groups": [[group.name, group.channels] for group in TABLE.groups],
        "dense_macs": TABLE.dense_costs[0],
        "dense_params": TABLE.dense_costs[1],
        "dense_error": 0.1,
        "worst": {"error": 0.9, "loss": 2.3, "margin": 1.0, "divergence": 2.0, "distortion": 1.0},
        "outputs": [],
        "images": {},
        "weights": "",
        "channel_order": "",
        "versions": {},
        "seeds": [],
        "evaluations": 1000,
        "state": "finished",
    }
    ledger = Ledger.create(folder, facts)
    known: set[Policy] = set()
    for generation, policies in enumerate(populations):
        macs, params = TABLE.costs_of(policies)
        costs = [(int(m), int(p)) for m, p in zip(macs, params, strict=True)]
        ledger.record_ask("search", generation, policies, costs)
        for policy in policies:
            if policy not in known:
                # The more MACs the better, so that every policy is on the front.
                metrics = {**dict.fromkeys(METRICS, 1.0), "error": 1 / sum(policy.keep)}
                ledger.record(Measurement(policy=policy, status=Status.OK, metrics=metrics), 0.0)
        known |= set(policies)
        members = [Member(policy=policy, rank=0, crowding=1.0) for policy in policies]
        ledger.record_population(generation, members)
    return ledger


def test_elite_is_what_a_run_kept_within_the_band(tmp_path: Path) -> None:
    inside = draw(SPACE, TABLE, HALF, 12, 0)
    outside = draw(SPACE, TABLE, Band(low=0.7, high=0.9), 12, 0)
    with run_with(tmp_path, [[*inside[:6], *outside], list(inside[6:])]) as ledger:
        assert set(elite(ledger, TABLE, HALF, 40)) == set(inside)
        assert len(elite(ledger, TABLE, HALF, 5)) == 5


def test_elite_is_filled_up_with_the_nearest(tmp_path: Path) -> None:
    inside = draw(SPACE, TABLE, HALF, 3, 0)
    outside = draw(SPACE, TABLE, Band(low=0.6, high=0.9), 20, 0)
    with run_with(tmp_path, [[*outside, *inside]]) as ledger:
        found = elite(ledger, TABLE, HALF, 40)
    assert len(found) == 8
    assert set(found[:3]) == set(inside)
    assert sorted(shares(found[3:])) == sorted(shares(outside))[:5]


def test_elite_of_another_network_is_refused(tmp_path: Path) -> None:
    with (
        run_with(tmp_path, [[TABLE.dense]]) as ledger,
        pytest.raises(ConfigError, match="another network"),
    ):
        elite(ledger, chain_table([3, 4]), HALF, 5)
