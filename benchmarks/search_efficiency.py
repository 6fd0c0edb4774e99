"""How many evaluations does a search need for the front that another one has after 2,000?

Hypervolume against evaluations and against seconds, several seeds: our algorithms, Optuna's NSGA-II
and TPE, pymoo's NSGA-II cold (no uniform ratios in its first population), random, uniform ratios,
and the sensitivity sweep. All search the same space of the same network through the same proxy;
only who asks differs. Goal: what Optuna's NSGA-II has after 2,000 evaluations, in at most 200 of
ours.

An evaluation is a distinct policy that was measured. Policies are scored for real, once: scores and
their seconds are kept in a table (--cache), so that methods which meet the same policy do not
pay twice in wall time, yet are charged the seconds it took. Two scorers work at a time, so a
generation is charged half of its candidates' seconds, plus the seconds that the method took to
ask and to be told. Optuna is asked for a population at a time, too.

Scores are made cheap, for the benchmark to finish: Gram matrices of 256 calibration images,
compensation without recalibration, 256 validation images. The hypervolume's reference is fixed:
the dense network's MACs, and outputs that say nothing.

    pip install -e '.[bench]'
    python benchmarks/search_efficiency.py [--quick] [--networks resnet20 resnet56] [--seeds 5]
        [--methods surrogate nsga2 ...] [--evaluations 300] [--cache FILE]
"""

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, images, parser, published, show, write
from numpy.typing import NDArray

from evosearch.algorithms import AlgorithmSettings, make_algorithm
from evosearch.assembly import as_trained, foresight_of
from evosearch.data import Images, open_source
from evosearch.measurement import Measurement
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pareto import hypervolume
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.scoring.objectives import Goals, reference_point, worst_metrics
from evosearch.scoring.pool import Pool, PoolSettings, make_pool
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.workload import Workload, prepare_workload
from evosearch.space import SearchSpace, make_space

FloatArray = NDArray[np.float64]

NETWORKS = ("resnet20", "resnet56")
CALIBRATION, VALIDATION = 256, 256


def network_and_images(name: str, data: Path) -> tuple[Network, Images, Images]:
    """A trained network, calibration and validation images; no test images."""
    if name == "resnet20":
        # Ships with the package, and was not trained on the images held out here.
        network = load_network(NetworkSpec(name=name, weights="shipped:resnet20-cifar10"))
        source = open_source("cifar10-sample")
        calibration = source.training().take(np.arange(CALIBRATION))
        return network, calibration, source.held_out().take(np.arange(VALIDATION))
    # The published weights saw all training images. Methods are compared here, not networks.
    train = images(data, "cifar10_train")
    calibration = train.take(np.arange(CALIBRATION))
    validation = train.take(np.arange(CALIBRATION, CALIBRATION + VALIDATION))
    return published(data, name), calibration, validation


class Scores:
    """Measured values of policies of one workload, in a table on disk; scores what is missing.

    Args:
        workload: What to score with.
        path: The table; made if there is none.
        workers: Scorers on Ray; 0 scores in this process.
    """

    def __init__(self, workload: Workload, path: Path, workers: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table = workload.plan.table
        self.worst = worst_metrics(workload.dense_logits)
        self._workload = workload
        self._workers = workers
        self._pool: Pool | None = None
        self._file = sqlite3.connect(path)
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS scores (workload TEXT, policy TEXT, metrics TEXT, "
            "seconds REAL, PRIMARY KEY (workload, policy))"
        )
        key = sha256(repr(workload.settings).encode())
        for part in (workload.calibration.digest(), workload.validation.digest()):
            key.update(part.encode())
        key.update(workload.dense_logits.tobytes())
        self._key = key.hexdigest()[:16]
        rows = self._file.execute(
            "SELECT policy, metrics, seconds FROM scores WHERE workload = ?", (self._key,)
        )
        self._known: dict[str, tuple[dict[str, float], float]] = {
            policy: (json.loads(metrics), seconds) for policy, metrics, seconds in rows
        }
        self.fresh = 0

    def of(self, policies: Sequence[Policy]) -> list[tuple[dict[str, float], float]]:
        """Metrics and seconds of each policy; the worst metrics for one that failed."""
        missing = [p for p in dict.fromkeys(policies) if p.digest not in self._known]
        if missing:
            costs = self.table.costs_of(missing)[0]
            order = sorted(range(len(missing)), key=lambda i: -int(costs[i]))
            if self._pool is None:
                self._pool = make_pool(self._workload, PoolSettings(workers=self._workers))
            self._pool.score([missing[i] for i in order], self._record, lambda: False)
            self._file.commit()
        return [self._known[policy.digest] for policy in policies]

    def _record(self, measurement: Measurement) -> None:
        metrics = dict(measurement.metrics) if measurement.ok else self.worst
        digest = measurement.policy.digest
        self._known[digest] = metrics, measurement.seconds
        self._file.execute(
            "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)",
            (self._key, digest, json.dumps(metrics), measurement.seconds),
        )
        self.fresh += 1

    def close(self) -> None:
        """Ends scorers and closes the table."""
        if self._pool is not None:
            self._pool.close()
        self._file.commit()
        self._file.close()


def scores_of(name: str, data: Path, cache: Path, workers: int) -> Scores:
    network, plain, validation = network_and_images(name, data)
    settings = ProxySettings(name="compensated", criterion="residual-energy", recalibrate=False)
    calibration = as_trained(plain, network, 0)
    workload = prepare_workload(network, trace(network), settings, calibration, validation)
    return Scores(workload, cache, workers)
