"""What the policies of a space can cost."""

from typing import Any

import numpy as np
import pytest

from evosearch.networks import NetworkSpec, load_network
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.reach import policies_by_levels, reachable_costs
from evosearch.space import make_space
from evosearch.testing import chain_table


@pytest.fixture(scope="module")
def table() -> GroupTable:
    return trace(load_network(NetworkSpec(name="resnet20"))).table


@pytest.mark.parametrize("options", [{}, {"grouping": "stage"}, {"round_to": 8}])
def test_without_a_budget_the_range_is_that_of_the_extremes(
    table: GroupTable, options: dict[str, Any]
) -> None:
    space = make_space("layer-sparsity", table, options)
    lowest, highest = reachable_costs(space, table)
    shares = table.shares_of([space.cheapest(), space.dearest()])
    assert (lowest["macs"], highest["macs"]) == pytest.approx(tuple(shares["macs"]), rel=1e-9)
    assert (lowest["params"], highest["params"]) == pytest.approx(tuple(shares["params"]), rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"grouping": "stage"}, {"sparsity": [0.1, 0.8]}])
def test_on_a_budget_the_range_holds_what_thousands_of_genomes_cost(
    table: GroupTable, options: dict[str, Any]
) -> None:
    space = make_space("layer-sparsity", table, {"project_onto": {"macs": 0.5}, **options})
    lowest, highest = reachable_costs(space, table)
    rng = np.random.default_rng(1)
    genomes = np.concatenate(
        [rng.random((2000, space.n_genes)), rng.beta(0.2, 0.2, (2000, space.n_genes))]
    )
    shares = table.shares_of(space.decode(genomes))
    assert lowest["params"] <= shares["params"].min() + 0.005 < 0.4
    assert 0.6 < shares["params"].max() <= highest["params"] + 0.005
    assert 0.49 < lowest["macs"] <= highest["macs"] <= 0.5


def test_policies_by_levels_are_all_that_genomes_give() -> None:
    table = chain_table([2, 3, 5])
    space = make_space("layer-sparsity", table, {"sparsity": [0.0, 1.0]})
    found = policies_by_levels(space)
    assert found is not None
    assert len(found) == len(set(found)) == 2 * 3 * 5
    assert set(space.decode(np.random.default_rng(0).random((2000, 3)))) == set(found)


def test_policies_are_not_listed_where_they_are_many_or_have_no_levels(table: GroupTable) -> None:
    assert policies_by_levels(make_space("layer-sparsity", table, {})) is None
    assert policies_by_levels(AnyWidth(table)) is None


class AnyWidth:
    """A space whose genes have no levels."""

    def __init__(self, table: GroupTable) -> None:
        self._space = make_space("layer-sparsity", table, {})
        self.n_genes = self._space.n_genes

    def __getattr__(self, name: str) -> Any:
        if name == "levels":
            raise AttributeError(name)
        return getattr(self._space, name)
