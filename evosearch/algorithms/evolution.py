"""Differential evolution and NSGA-II. The only module that imports pymoo.

Textbook settings are the defaults, which are not always pymoo's. Only the jitter of F that its GDE3
and NSDE have, a ten-thousandth of it, is left as it is.

- `de`: DE/rand/1/bin, F = 0.5, CR = 0.9, no mutation besides [Storn1997]. pymoo's default is
  DE/best/1/bin with CR = 0.2 and polynomial mutation.
- `nsga2`: simulated binary crossover (eta 15, probability 0.9), polynomial mutation (eta 20,
  probability 1/n per gene, of nine in ten offspring as pymoo has it), binary tournament [Deb2002].
- `gde3`: DE/rand/1/bin, F = 0.5, CR = 0.9; parent against trial, then rank and crowding
  [Kukkonen2005]. pymoo's default CR is 0.5.
- `nsde`: NSGA-II with the offspring of DE/rand/1/bin, F = 0.5, CR = 0.9.

References:
    [Storn1997] R. Storn, K. Price, "Differential Evolution", J. Global Optimization 11, 1997.
    [Deb2002] K. Deb et al., "NSGA-II", IEEE TEVC 6(2), 2002.
    [Kukkonen2005] S. Kukkonen, J. Lampinen, "GDE3", IEEE CEC 2005.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosearch.algorithms.base import (
    AskTellGuard,
    Population,
    State,
    generator_in,
    generator_state,
    numbered,
)
from evosearch.algorithms.options import check_range

__all__ = [
    "AdaptiveOptions",
    "DifferentialOptions",
    "Evolution",
    "GeneticOptions",
    "de",
    "gde3",
    "nsde",
    "nsga2",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DifferentialOptions:
    """Options of `nsde`.

    Args:
        f: Scale factor of the difference vector, in (0, 2].
        cr: Crossover rate, in [0, 1].
    """

    f: float = 0.5
    cr: float = 0.9

    def __post_init__(self) -> None:
        check_range("f", self.f, 0, 2, open_below=True)
        check_range("cr", self.cr, 0, 1)


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions(DifferentialOptions):
    """Options of `de` and `gde3`.

    Args:
        f, cr: See `DifferentialOptions`.
        adaptive: Whether every member adapts its own F and CR, from those on.
    """

    adaptive: bool = False


@dataclass(frozen=True, kw_only=True)
class GeneticOptions:
    """Options of `nsga2`.

    Args:
        crossover_eta, mutation_eta: Distribution indices; larger = children nearer to parents.
        crossover_probability: Share of pairs that are crossed.
    """

    crossover_eta: float = 15.0
    crossover_probability: float = 0.9
    mutation_eta: float = 20.0

    def __post_init__(self) -> None:
        check_range("crossover_eta", self.crossover_eta, 0, 1000)
        check_range("crossover_probability", self.crossover_probability, 0, 1)
        check_range("mutation_eta", self.mutation_eta, 0, 1000)


def de(initial: FloatArray, options: DifferentialOptions) -> Any:
    """Differential evolution for one objective [Storn1997]."""
    from pymoo.algorithms.soo.nonconvex.de import DE, Variant
    from pymoo.operators.control import NoParameterControl

    variant = Variant(
        selection="rand",
        n_diffs=1,
        crossover="bin",
        F=options.f,
        CR=options.cr,
        prob_mut=0.0,
        control=NoParameterControl,
    )
    return DE(pop_size=len(initial), sampling=initial, variant=variant)


def _distinct() -> Any:
    """Drops offspring that are equal to others, as pymoo does, without all pairwise distances."""
    from pymoo.core.duplicate import DuplicateElimination

    class Distinct(DuplicateElimination):  # type: ignore[misc]
        """Marks genomes that are in another population, or earlier in their own."""

        def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
            def names(members: Any) -> list[bytes]:
                genomes = np.array([individual.X for individual in members], dtype=np.float64)
                return [row.tobytes() for row in genomes + 0.0]  # -0.0 equals 0.0

            seen = set() if other is None else set(names(other))
            for row, genome in enumerate(names(pop)):
                is_duplicate[row] = genome in seen
                if other is None:
                    seen.add(genome)
            return is_duplicate

    return Distinct()


def nsga2(initial: FloatArray, options: GeneticOptions) -> Any:
    """NSGA-II [Deb2002]."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM

    return NSGA2(
        pop_size=len(initial),
        sampling=initial,
        crossover=SBX(eta=options.crossover_eta, prob=options.crossover_probability),
        mutation=PM(eta=options.mutation_eta),
        eliminate_duplicates=_distinct(),
    )


def gde3(initial: FloatArray, options: DifferentialOptions) -> Any:
    """GDE3 [Kukkonen2005]."""
    from pymoo.algorithms.moo.gde3 import GDE3

    return GDE3(pop_size=len(initial), sampling=initial, CR=options.cr, F=options.f)


def nsde(initial: FloatArray, options: DifferentialOptions) -> Any:
    """NSGA-II with differential offspring."""
    from pymoo.algorithms.moo.nsde import NSDE

    return NSDE(pop_size=len(initial), sampling=initial, CR=options.cr, F=options.f)


# How pymoo's survival left each member; tournaments read it.
_STANDING: dict[str, Callable[[float], float]] = {"rank": int, "crowding": float}


def _numbers(values: Any) -> FloatArray:
    """As floats, NaN for None: the infeasible are given no standing."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _evaluate(members: Any, objectives: FloatArray, violations: FloatArray) -> None:
    """Sets what a population of pymoo was worth."""
    members.set("F", objectives)
    members.set("G", violations)
    for individual in members:
        individual.evaluated.update(("F", "G", "H"))


class Evolution:
    """An algorithm of pymoo behind ask and tell.

    Args:
        make: Makes the pymoo algorithm for a first population.
        initial: `(n, n_genes)` first population.
        n_objectives, n_constraints: What it will be told.
        seed: Of everything random.
    """

    def __init__(
        self,
        make: Callable[[FloatArray], Any],
        initial: FloatArray,
        n_objectives: int,
        n_constraints: int,
        seed: int,
    ) -> None:
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        n_genes = initial.shape[1]
        problem = Problem(
            n_var=n_genes, n_obj=n_objectives, n_ieq_constr=n_constraints, xl=0.0, xu=1.0
        )
        self._algorithm = make(initial)
        self._algorithm.termination = NoTermination()
        self._algorithm.setup(problem, seed=seed, termination=NoTermination())
        self._guard = AskTellGuard(n_objectives, n_constraints)
        self._open: deque[Any] = deque()

    def ask(self) -> FloatArray | None:
        """The next genomes; None when the algorithm finds no new ones."""
        self._guard.before_ask()
        asked = self._algorithm.ask()
        if asked is None or not len(asked):
            return None
        self._open.append(asked)
        genomes = np.asarray(asked.get("X"), dtype=np.float64)
        # Donors may leave the box by a rounding error.
        return self._guard.ask(np.clip(genomes, 0.0, 1.0))

    def tell(self, objectives: FloatArray, violations: FloatArray) -> None:
        """Results of all genomes of the oldest open ask, in its order."""
        self._guard.tell(objectives, violations)
        asked = self._open.popleft()
        _evaluate(asked, objectives, violations)
        self._algorithm.tell(infills=asked)

    def state(self) -> State:
        """What later asks depend on."""
        members = self._algorithm.pop
        standing = {name: _numbers(members.get(name)) for name in _STANDING}
        return {
            **self._guard.state(),
            # Not clipped: distances to them decide later.
            **{f"asked.{i}": np.array(asked.get("X"), float) for i, asked in enumerate(self._open)},
            **Population(*(np.array(members.get(k), float) for k in "XFG")).state("members"),
            **{f"members.{name}": values for name, values in standing.items()},
            "n_iter": np.array(self._algorithm.n_iter),
            "rng": generator_state(self._algorithm.random_state),
        }

    def restore(self, state: State) -> list[FloatArray]:
        """Goes on from a state; returns the open asks."""
        from pymoo.core.population import Population as Members

        written = Population.of_state(state, "members")
        members = Members.new("X", written.genomes)
        _evaluate(members, written.objectives, written.violations)
        for name, convert in _STANDING.items():
            for member, value in zip(members, state[f"members.{name}"], strict=True):
                if not np.isnan(value):
                    member.set(name, convert(value))
        algorithm = self._algorithm
        algorithm.pop = members
        algorithm.n_iter = int(state["n_iter"])
        algorithm.is_initialized = True
        algorithm.start_time = 0.0  # it subtracts from it when it finds nothing more to ask
        algorithm.random_state = generator_in(state["rng"])
        for genomes in numbered(state, "asked"):
            asked = Members.new("X", genomes)
            asked.set("index", np.arange(len(genomes)))  # DE: whose trial each one is
            self._open.append(asked)
        return self._guard.restore(state)

    @property
    def population(self) -> Population:
        """The survivors."""
        members = self._algorithm.pop
        if members is None:
            raise RuntimeError("there is no population before the first tell()")
        return Population(
            np.clip(np.asarray(members.get("X"), dtype=np.float64), 0.0, 1.0),
            np.asarray(members.get("F"), dtype=np.float64),
            np.asarray(members.get("G"), dtype=np.float64),
        )
