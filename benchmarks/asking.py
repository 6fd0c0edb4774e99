"""What does an algorithm take of the driver for each candidate, in each kind of space?

ResNet-20 and ResNet-56. Objectives are made up (a convex function of what each group loses, beside
MACs where the space leaves them free, but for `de`, which has one), so that nothing but the
algorithm, the space and costs are timed: asking, decoding, telling, in processor time. A candidate
takes 100 to 1,000 ms.

    OMP_NUM_THREADS=1 python benchmarks/asking.py [--networks resnet20 ...] [--evaluations 240]
        [--seeds 2]
"""

import itertools
import time
from typing import Any

import numpy as np
from common import parser, show, write
from numpy.typing import NDArray

from evosearch.algorithms import ALGORITHMS, Algorithm, AlgorithmSettings, make_algorithm
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.pruning.ranking import losses as losses_of
from evosearch.pruning.ranking import savings
from evosearch.pruning.table import GroupTable
from evosearch.scoring.objectives import Goals
from evosearch.strategy import foresight_of
from search_spaces.layer_sparsity import LayerSparsity

POPULATIONS = {"surrogate": 8, "level-switch": 32, "nsga2": 32, "gde3": 32, "nsde": 32, "de": 32}
SPACES: dict[str, dict[str, Any]] = {
    "free": {},
    "half of the MACs": {"project_onto": {"macs": 0.5}},
    "half, a gene per stage": {"project_onto": {"macs": 0.5}, "grouping": "stage"},
}


class Losses:
    """A made-up distortion: convex in what each group loses, more so for some groups."""

    def __init__(self, table: GroupTable, seed: int) -> None:
        self._channels = table.channels
        self._weights = np.random.default_rng(seed).lognormal(0, 1, len(table.groups))

    def __call__(self, policies: list[Policy]) -> NDArray[np.float64]:
        """`(n, 1)` losses."""
        lost = 1 - np.array([policy.keep for policy in policies]) / self._channels
        return np.asarray((lost**2 @ self._weights)[:, None] / self._weights.sum())


def guesses(table: GroupTable, seed: int) -> list[list[float]]:
    """What a ranking might have each group lose."""
    scores = np.random.default_rng(seed).random(int(table.channels.sum()))
    return [group.tolist() for group in losses_of(scores, table, savings(table), 1.0)]


def timed(name: str, table: GroupTable, options: dict[str, Any], seed: int, n: int) -> float:
    """Milliseconds of the driver for each candidate."""
    space = LayerSparsity(table, options)
    both = "project_onto" not in options and not ALGORITHMS[name].single_objective
    goals = Goals(objectives=("distortion", "macs") if both else ("distortion",), constraints=())
    algorithm: Algorithm = make_algorithm(
        AlgorithmSettings(name=name, population=POPULATIONS[name], seed=seed, options={}),
        space,
        len(goals.objectives),
        1,
        None,
        foresight_of(goals, table, guesses(table, seed)),
    )
    losses, asked, spent = Losses(table, seed), 0, 0.0
    while asked < n:
        start = time.process_time()
        genomes = algorithm.ask()
        if genomes is None:
            raise RuntimeError(f"{name} waits for what it was told already")
        policies = space.decode(genomes)
        costs = table.shares_of(policies)["macs"][:, None]
        spent += time.process_time() - start
        objectives = np.concatenate([losses(policies), costs][: len(goals.objectives)], axis=1)
        start = time.process_time()
        algorithm.tell(objectives, np.full((len(genomes), 1), -1.0))
        spent += time.process_time() - start
        asked += len(genomes)
    return 1e3 * spent / asked


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="*", default=("resnet20", "resnet56"))
    made.add_argument("--evaluations", type=int, default=240)
    made.add_argument("--seeds", type=int, default=2)
    options = made.parse_args()
    rows = []
    for network in options.networks:
        table = trace(load_network(NetworkSpec(name=network))).table
        timed("surrogate", table, {}, 0, 16)  # imports
        for name, (kind, space) in itertools.product(POPULATIONS, SPACES.items()):
            found = [
                timed(name, table, space, seed, options.evaluations)
                for seed in range(options.seeds)
            ]
            rows.append({"network": network, "algorithm": name, "space": kind, "ms": found})
    show(
        f"Milliseconds of the driver for a candidate, {options.evaluations} or more of them",
        ("network", "algorithm", *SPACES),
        [
            [
                network,
                name,
                *(
                    f"{np.mean(row['ms']):.1f}"
                    for row in rows
                    if (row["network"], row["algorithm"]) == (network, name)
                ),
            ]
            for network, name in itertools.product(options.networks, POPULATIONS)
        ],
    )
    write("asking", options.json, {"evaluations": options.evaluations, "rows": rows})


if __name__ == "__main__":
    main()
