"""Contract suites: what every search space and every algorithm must do, as tests to inherit.

    from evosearch.testing import SpaceContract

    class TestMySpace(SpaceContract):
        def make(self, table):
            return MySpace(table, {"depth": 3})

pytest collects the inherited tests. `chain_table` is a small network to prune when a real one
would only cost time.
"""

# ruff: noqa: S101  an assertion is what a test is made of

import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms import Algorithm, Population, Resumable, State
from evosearch.errors import SpaceError
from evosearch.policy import Policy
from evosearch.pruning.table import Axis, Group, GroupTable, LayerCost
from evosearch.space import SearchSpace

__all__ = ["AlgorithmContract", "SpaceContract", "chain_table"]

FloatArray = NDArray[np.float64]
Answer = Callable[[FloatArray], tuple[FloatArray, FloatArray]]


def chain_table(
    widths: Sequence[int] = (16, 24, 32),
    classes: int = 10,
    granularities: Sequence[int] | None = None,
) -> GroupTable:
    """Groups and costs of 3x3 convolutions in a row, each with a bias; the last gives classes.

    Args:
        widths: Channels of each group. The resolution starts at 32 and halves after every second
            convolution, so that two groups form a stage.
        classes: Outputs of the last convolution, which nothing cuts.
        granularities: How many channels of each group go together; 1 if left out.
    """
    ends = np.cumsum(widths)
    axes = [np.full(3, -1), *np.split(np.arange(ends[-1]), ends[:-1]), np.full(classes, -1)]
    sizes = [max(1, 32 >> (i // 2)) for i in range(len(widths) + 1)]
    groups = tuple(
        Group(
            name=f"conv{i}",
            channels=width,
            resolution=(sizes[i], sizes[i]),
            producers=(f"conv{i}",),
            consumers=(f"conv{i + 1}",),
            granularity=granularity,
        )
        for i, (width, granularity) in enumerate(
            zip(widths, granularities or [1] * len(widths), strict=True)
        )
    )
    layers = tuple(
        LayerCost(
            name=f"conv{i}",
            in_axis=i,
            out_axis=i + 1,
            macs=9 * size * size,
            weights=9,
            per_output=1,
        )
        for i, size in enumerate(sizes)
    )
    return GroupTable(groups=groups, fixed=(), axes=tuple(map(Axis, axes)), layers=layers)


class SpaceContract(ABC):
    """What `evosearch.space.SearchSpace` promises.

    Inherit, implement `make`, and override `table` to try another network.
    """

    exact_inverse: ClassVar[bool] = True
    """Whether one genome can express every policy that `decode` gives."""

    @abstractmethod
    def make(self, table: GroupTable) -> SearchSpace:
        """The space under test; called several times, and must give equal spaces."""

    def table(self) -> GroupTable:
        """The network to prune."""
        return chain_table()

    def _space(self) -> SearchSpace:
        return self.make(self.table())

    def _corners(self, n_genes: int) -> FloatArray:
        """All low, all high, halfway, one rounding error inside, one gene high, alternating."""
        levels = [0.0, 1.0, 0.5, np.nextafter(0.0, 1.0), np.nextafter(1.0, 0.0)]
        alternating = np.arange(n_genes) % 2
        return np.concatenate(
            [np.full((1, n_genes), level) for level in levels]
            + [np.eye(n_genes), 1 - np.eye(n_genes), [alternating, 1 - alternating]]
        )

    def _genomes(self, n_genes: int, n: int = 64) -> FloatArray:
        """Corners, then random vectors of which some have genes at the very ends."""
        rng = np.random.default_rng(20)
        random = np.clip(rng.uniform(-0.2, 1.2, (n, n_genes)), 0, 1)
        return np.concatenate([self._corners(n_genes), random])

    def test_there_is_one_distinct_name_per_gene(self) -> None:
        """People tell genes apart by their names."""
        space = self._space()
        names = space.gene_names
        assert space.n_genes >= 1
        assert len(names) == space.n_genes, f"{space.n_genes} genes have {len(names)} names"
        assert len(set(names)) == len(names), f"gene names repeat: {names}"

    def test_every_corner_decodes_to_a_policy_of_the_network(self) -> None:
        """Totality where rounding goes wrong first."""
        self._check_totality(self._corners(self._space().n_genes))

    def test_every_random_vector_decodes_to_a_policy_of_the_network(self) -> None:
        """Totality."""
        n_genes = self._space().n_genes
        self._check_totality(np.random.default_rng(0).random((200, n_genes)))

    def _check_totality(self, genomes: FloatArray) -> None:
        table, policies = self.table(), self._space().decode(genomes)
        assert len(policies) == len(genomes), "one policy per genome"
        for policy in policies:
            table.check(policy)

    def test_no_genomes_decode_to_no_policies(self) -> None:
        """An empty batch is a batch."""
        space = self._space()
        assert space.decode(np.empty((0, space.n_genes))) == []

    def test_equal_genomes_decode_to_equal_policies(self) -> None:
        """Determinism: again, and in a space made anew."""
        one, other = self._space(), self._space()
        genomes = self._genomes(one.n_genes)
        first = one.decode(genomes)
        assert one.decode(genomes) == first, "the same space decodes differently a second time"
        assert other.decode(genomes) == first, "an equal space decodes differently"

    def test_a_genome_means_the_same_in_any_company(self) -> None:
        """A resumed search may decode in other batches."""
        space = self._space()
        genomes = self._genomes(space.n_genes, 16)
        alone = [space.decode(genome[None])[0] for genome in genomes]
        assert space.decode(genomes) == alone, "a policy depends on the rest of its batch"

    def test_decode_leaves_genomes_as_they_were(self) -> None:
        """The algorithm still needs them."""
        space = self._space()
        genomes = self._genomes(space.n_genes)
        before = genomes.copy()
        space.decode(genomes)
        assert np.array_equal(genomes, before), "decode changed its argument"

    def test_encode_gives_a_genome_for_any_policy_of_the_network(self) -> None:
        """Also for policies that the space cannot express: seeds come from anywhere."""
        space, table = self._space(), self.table()
        least = Policy(tuple(table.granularities.tolist()))
        for policy in (table.dense, least, space.cheapest(), space.dearest()):
            genome = space.encode(policy)
            assert genome.shape == (space.n_genes,), f"got a genome of shape {genome.shape}"
            table.check(space.decode(genome[None])[0])  # refuses NaN and what leaves [0, 1]

    def test_a_decoded_policy_comes_back_from_its_genome(self) -> None:
        """Inverse, where one genome can express the policy."""
        if not self.exact_inverse:
            return
        space = self._space()
        for policy in space.decode(self._genomes(space.n_genes)):
            again = space.decode(space.encode(policy)[None])[0]
            assert again == policy, f"{policy.keep} came back as {again.keep}"

    def test_every_policy_lies_between_the_cheapest_and_the_dearest(self) -> None:
        """What budgets are checked against bounds everything."""
        space = self._space()
        low, high = np.array(space.cheapest().keep), np.array(space.dearest().keep)
        keep = np.array([policy.keep for policy in space.decode(self._genomes(space.n_genes))])
        assert (keep >= low).all(), f"{keep.min(axis=0)} is below the cheapest {low}"
        assert (keep <= high).all(), f"{keep.max(axis=0)} is above the dearest {high}"

    def test_the_cheapest_and_the_dearest_are_policies_of_the_network(self) -> None:
        """They are costed before anything is decoded."""
        space, table = self._space(), self.table()
        table.check(space.cheapest())
        table.check(space.dearest())

    def test_the_ladder_holds_genomes_of_distinct_policies(self) -> None:
        """Nobody pays for a rung twice."""
        space = self._space()
        ladder = space.ladder(24)
        assert ladder.ndim == 2
        assert 1 <= len(ladder) <= 24
        policies = space.decode(ladder)
        assert len(set(policies)) == len(policies), "two rungs are one policy"

    def test_a_shorter_ladder_is_the_beginning_of_a_longer_one(self) -> None:
        """A larger budget adds rungs and moves none; more rungs than there are is no error."""
        space = self._space()
        ladder = space.ladder(10**6)
        for n in (0, 1, 7):
            assert np.array_equal(space.ladder(n), ladder[:n]), f"ladder({n}) is no prefix"

    def test_genomes_of_another_width_are_refused(self) -> None:
        """A gene more, a gene less, one genome that is not in a batch."""
        import pytest

        space = self._space()
        for shape in ((3, space.n_genes + 1), (3, space.n_genes - 1), (space.n_genes,)):
            with pytest.raises(SpaceError, match="genomes"):
                space.decode(np.full(shape, 0.5))

    def test_genomes_outside_the_unit_interval_are_refused(self) -> None:
        """Also by a rounding error, as NaN and as infinity."""
        import pytest

        space = self._space()
        for value in (-1e-12, np.nextafter(1.0, 2.0), 2.0, np.nan, np.inf, -np.inf):
            genomes = np.full((2, space.n_genes), 0.5)
            genomes[1, -1] = value
            with pytest.raises(SpaceError, match="genomes"):
                space.decode(genomes)


@dataclass(frozen=True, eq=False)
class _Exchange:
    """One ask, what it was answered, and the population afterwards."""

    genomes: FloatArray
    objectives: FloatArray
    violations: FloatArray
    population: Population


class AlgorithmContract(ABC):
    """What `evosearch.algorithms.Algorithm` promises.

    Inherit and implement `make`. An algorithm may run out of genomes after the sixth ask.
    """

    n_genes: int = 9
    """Width of the genomes that the algorithm asks for."""
    n_objectives: int = 2
    """Objectives that it was made for."""
    n_constraints: int = 2
    """Constraints that it was made for."""
    seeded: bool = True
    """Whether another seed leads to other genomes."""

    _GENERATIONS = 7

    @abstractmethod
    def make(self, seed: int) -> Algorithm:
        """The algorithm under test, not asked yet."""

    def _answer(self, genomes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A smooth trade-off, in which about half of all genomes are feasible."""
        targets = np.linspace(0, 1, self.n_objectives)
        objectives = ((genomes[:, None] - targets[:, None]) ** 2).mean(axis=2)
        bounds = np.linspace(0.5, 0.7, self.n_constraints)
        return objectives, genomes.mean(axis=1)[:, None] / bounds - 1

    def _constant(self, objective: float, violation: float) -> Answer:
        def answer(genomes: FloatArray) -> tuple[FloatArray, FloatArray]:
            n = len(genomes)
            objectives = np.full((n, self.n_objectives), objective)
            return objectives, np.full((n, self.n_constraints), violation)

        return answer

    def _converse(self, algorithm: Algorithm, answer: Answer | None = None) -> list[_Exchange]:
        """Asks and tells for seven generations, or until there is nothing left to ask."""
        told = []
        for _ in range(self._GENERATIONS):
            genomes = algorithm.ask()
            if genomes is None:
                break
            genomes = genomes.copy()
            objectives, violations = (answer or self._answer)(genomes)
            algorithm.tell(objectives.copy(), violations.copy())
            told.append(_Exchange(genomes, objectives, violations, algorithm.population))
        return told

    def _check_conversation(self, answer: Answer) -> None:
        told = self._converse(self.make(1), answer)
        assert len(told) >= 6, f"it stopped asking after {len(told)} generations"
        for exchange in told:
            self._check_genomes(exchange.genomes)
            self._check_genomes(exchange.population.genomes)

    def _check_genomes(self, genomes: FloatArray) -> None:
        assert genomes.dtype == np.float64
        assert genomes.ndim == 2, f"genomes have shape {genomes.shape}"
        assert genomes.shape[1] == self.n_genes, f"genomes are {genomes.shape[1]} wide"
        assert len(genomes) >= 1, "an empty ask; None says that there is nothing left"
        assert (genomes >= 0).all(), f"the smallest gene is {genomes.min()}"
        assert (genomes <= 1).all(), f"the largest gene is {genomes.max()}"

    def _same(self, one: Sequence[_Exchange], other: Sequence[_Exchange]) -> bool:
        return len(one) == len(other) and all(
            np.array_equal(a.genomes, b.genomes)
            and np.array_equal(a.population.genomes, b.population.genomes)
            and np.array_equal(a.population.objectives, b.population.objectives)
            and np.array_equal(a.population.violations, b.population.violations)
            for a, b in zip(one, other, strict=True)
        )

    def test_it_asks_for_genomes_in_the_unit_cube(self) -> None:
        """Right width, right type, nothing outside."""
        self._check_conversation(self._answer)

    def test_told_the_same_it_asks_the_same(self) -> None:
        """Determinism: what resuming a search rests on."""
        one, other = self._converse(self.make(7)), self._converse(self.make(7))
        assert len(one) >= 6
        assert self._same(one, other), "equal seeds and answers led to different genomes"

    def test_two_of_them_do_not_disturb_each_other(self) -> None:
        """Nothing is shared: no global generator, no default objects."""
        alone = self._converse(self.make(7))
        one, other = self.make(7), self.make(8)
        for exchange in alone:
            genomes, foreign = one.ask(), other.ask()
            assert genomes is not None
            assert np.array_equal(genomes, exchange.genomes), "the neighbour changed what it asks"
            one.tell(exchange.objectives, exchange.violations)
            if foreign is not None:
                other.tell(*self._answer(foreign))

    @staticmethod
    def _written(state: State) -> State:
        """What is left of a state after it was on disk."""
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **state)
        stream.seek(0)
        with np.load(stream) as arrays:
            return dict(arrays)

    def _troubled(self, genomes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Ties, candidates that fail, and hardly any that is feasible."""
        objectives, violations = self._answer(genomes)
        failed = (genomes[:, :1] > 0.8) * 1e9
        return np.round(objectives, 1), np.round(violations + 0.3, 1) + failed

    def _turns(
        self,
        algorithm: Algorithm,
        answer: Answer,
        asked: list[FloatArray],
        turns: int,
        *,
        ahead: bool,
        ask_last: bool = False,
    ) -> list[FloatArray]:
        """All genomes of some turns of asks and tells, those of open asks first."""
        seen = list(asked)

        def ask() -> None:
            while len(asked) <= ahead and (genomes := algorithm.ask()) is not None:
                asked.append(genomes.copy())
                seen.append(asked[-1])

        for _ in range(turns):
            ask()
            if not asked:
                break
            algorithm.tell(*answer(asked.pop(0)))
        if ask_last:
            ask()
        return [*seen, algorithm.population.genomes]

    def test_put_into_a_state_it_goes_on_the_same(self) -> None:
        """Sameness: what resuming without a replay rests on; for a `Resumable`."""
        for ahead, ask_last, answer in itertools.product(
            (False, True), (False, True), (self._answer, self._troubled)
        ):
            for told in (1, 2, self._GENERATIONS - 2):
                one, other, asked = self.make(7), self.make(7), list[FloatArray]()
                if not isinstance(one, Resumable) or not isinstance(other, Resumable):
                    return
                self._turns(one, answer, asked, 1, ahead=False)
                self._turns(one, answer, asked, told - 1, ahead=ahead, ask_last=ask_last)
                restored = other.restore(self._written(one.state()))
                assert len(restored) == len(asked), "another number of asks is open"
                left = self._GENERATIONS - told
                expected = self._turns(one, answer, asked, left, ahead=ahead)
                found = self._turns(other, answer, restored, left, ahead=ahead)
                assert len(found) == len(expected), f"after {told} turns it stops elsewhere"
                for a, b in zip(found, expected, strict=True):
                    assert np.array_equal(a, b), f"restored after {told} turns, it asks otherwise"

    def test_another_seed_asks_for_other_genomes(self) -> None:
        """A seed has a meaning."""
        if self.seeded:
            one, other = self._converse(self.make(1)), self._converse(self.make(2))
            assert not self._same(one, other), "two seeds gave the same search"

    def test_asking_twice_at_first_is_an_error(self) -> None:
        """Order: nothing was told that a second ask could rest on."""
        import pytest

        algorithm = self.make(1)
        algorithm.ask()
        with pytest.raises(RuntimeError, match="ask"):
            algorithm.ask()

    def test_asking_two_ahead_is_an_error(self) -> None:
        """Order: one ask ahead, no more."""
        import pytest

        algorithm = self.make(1)
        genomes = algorithm.ask()
        assert genomes is not None
        algorithm.tell(*self._answer(genomes))
        assert algorithm.ask() is not None
        if algorithm.ask() is not None:
            with pytest.raises(RuntimeError, match="ask"):
                algorithm.ask()

    def test_it_can_be_asked_one_ahead(self) -> None:
        """Answers go to the oldest open ask; told the same, it asks the same."""
        told = [self._converse_ahead(self.make(7)) for _ in range(2)]
        assert len(told[0]) >= 6
        assert all(map(np.array_equal, *told))

    def _converse_ahead(self, algorithm: Algorithm) -> list[FloatArray]:
        """Genomes of all asks, each made before the one before it was told."""
        asked: list[FloatArray] = []
        waiting: list[FloatArray] = []
        while len(asked) < self._GENERATIONS:
            genomes = algorithm.ask()
            if genomes is None and not waiting:
                break
            if genomes is not None:
                self._check_genomes(genomes)
                asked.append(genomes.copy())
                waiting.append(genomes)
            # The very first is told at once.
            while waiting and (len(waiting) == 2 or len(asked) == 1 or genomes is None):
                oldest = waiting.pop(0)
                objectives, violations = self._answer(oldest)
                algorithm.tell(objectives, violations)
                self._check_genomes(algorithm.population.genomes)
        return asked

    def test_telling_without_asking_is_an_error(self) -> None:
        """Order, before the first ask and after an answered one."""
        import pytest

        algorithm = self.make(1)
        answer = self._constant(0.5, 0.0)(np.zeros((8, self.n_genes)))
        with pytest.raises(RuntimeError, match="tell"):
            algorithm.tell(*answer)
        genomes = algorithm.ask()
        assert genomes is not None
        algorithm.tell(*self._answer(genomes))
        with pytest.raises(RuntimeError, match="tell"):
            algorithm.tell(*self._answer(genomes))

    def test_a_refused_answer_can_be_given_again(self) -> None:
        """A row too few and a NaN are refused; the ask stays open."""
        import pytest

        algorithm = self.make(1)
        genomes = algorithm.ask()
        assert genomes is not None
        objectives, violations = self._answer(genomes)
        with pytest.raises(SpaceError, match="objectives"):
            algorithm.tell(objectives[:-1], violations[:-1])
        with pytest.raises(SpaceError, match="violations"):
            algorithm.tell(objectives, np.full_like(violations, np.nan))
        algorithm.tell(objectives, violations)

    def test_it_leaves_what_it_was_told_as_it_was(self) -> None:
        """Read-only arrays are good enough."""
        algorithm = self.make(1)
        for _ in range(3):
            genomes = algorithm.ask()
            assert genomes is not None
            told = self._answer(genomes)
            before = [array.copy() for array in told]
            for array in told:
                array.setflags(write=False)
            algorithm.tell(*told)
            assert all(map(np.array_equal, told, before)), "tell changed its arguments"

    def test_it_keeps_copies_of_what_it_was_told(self) -> None:
        """The caller's arrays are the caller's, before and after."""
        algorithm = self.make(1)
        genomes = algorithm.ask()
        assert genomes is not None
        objectives, violations = self._answer(genomes)
        algorithm.tell(objectives, violations)
        before = algorithm.population.objectives.copy()
        objectives[:] = 99
        assert np.array_equal(algorithm.population.objectives, before), "it kept a reference"

    def test_it_goes_on_when_nothing_is_feasible(self) -> None:
        """Every candidate violates every constraint, by different amounts."""

        def infeasible(genomes: FloatArray) -> tuple[FloatArray, FloatArray]:
            objectives, violations = self._answer(genomes)
            return objectives, np.abs(violations) + 1

        self._check_conversation(infeasible)

    def test_it_goes_on_when_all_answers_are_equal(self) -> None:
        """No candidate is better than any other."""
        self._check_conversation(self._constant(0.5, -0.5))

    def test_it_goes_on_when_many_answers_are_ties(self) -> None:
        """Objectives of a few levels: a count of few images."""

        def coarse(genomes: FloatArray) -> tuple[FloatArray, FloatArray]:
            objectives, violations = self._answer(genomes)
            return np.round(4 * objectives) / 4, np.round(violations)

        self._check_conversation(coarse)

    def test_it_goes_on_when_every_candidate_fails(self) -> None:
        """The worst values, and a violation beyond all others."""
        self._check_conversation(self._constant(2.3, 1e3))

    def test_its_population_is_made_of_answers(self) -> None:
        """Each member was asked for, and has the values that were told for it."""
        told: set[bytes] = set()
        for exchange in self._converse(self.make(3)):
            told |= set(_rows(exchange.genomes, exchange.objectives, exchange.violations))
            members = exchange.population
            kept = _rows(members.genomes, members.objectives, members.violations)
            assert set(kept) <= told, "a member has values that nobody told"

    def test_its_population_can_be_ranked(self) -> None:
        """Somebody is on the front, and everybody has a place."""
        for exchange in self._converse(self.make(3)):
            rank, crowding = exchange.population.ranks_and_crowding()
            assert len(rank) == len(crowding) == len(exchange.population.genomes)
            assert rank.min() == 0
            assert not np.isnan(crowding).any()


def _rows(*columns: FloatArray) -> list[bytes]:
    """Rows of several arrays as comparable values."""
    return [row.tobytes() for row in np.concatenate(columns, axis=1) + 0.0]
