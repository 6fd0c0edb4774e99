"""Whether a front holds: on images that its search has not seen, and by the clock.

A search that compares hundreds of policies on the same images finds, among others, those that these
images flatter. The front is therefore measured once more on other held-out images; how much worse
it does there, beyond what the dense network does, is the optimism of the search. Latencies are
foreseen, and whatever a model foresees too low is found, too: so the front's networks are timed.
"""

import time
from collections.abc import Callable

import numpy as np

from evosearch.assembly import Assembled
from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement, Terms
from evosearch.results.front import read_results
from evosearch.scoring.devices import local_device
from evosearch.scoring.pool import InProcessPool
from evosearch.scoring.timing import shares_of
from evosearch.scoring.workload import dense_error, with_validation

__all__ = ["check_front", "time_front"]


def check_front(
    assembled: Assembled,
    ledger: Ledger,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Measures the front on the check images; what the ledger knows is not measured again.

    It is scored in this process, on a GPU if the search uses them and there is one here: these
    policies have been measured without harm before, and a front is small.

    Returns:
        Whether all of it is known now; true where there are no such images, or no front.
    """
    results = read_results(ledger)
    policies = [row.policy for row in results.front] if results.feasible else []
    known = ledger.known(policies, terms=Terms.CHECK)
    missing = [policy for policy in policies if policy.digest not in known]
    if not len(assembled.check) or not missing:
        return True
    if stop():
        return False
    workload = with_validation(assembled.workload, assembled.check)
    ledger.set_meta("check_dense_error", dense_error(workload))
    landed = 0

    def record(measurement: Measurement) -> None:
        nonlocal landed
        ledger.record(measurement, clock(), terms=Terms.CHECK)
        landed += 1

    device = local_device(assembled.recipe.run.gpus_per_worker)
    InProcessPool(workload, device).score(missing, record, stop)
    return landed == len(missing)


def time_front(
    assembled: Assembled, ledger: Ledger, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Times the front's networks where latencies are foreseen; what is known is not timed again.

    Returns:
        Whether all of it is known now, or cannot be.

    Raises:
        ConfigError: There is no stopwatch any more, or it does not return seconds.
    """
    plan, results = assembled.workload.plan, read_results(ledger)
    if plan.table.latency is None or not results.feasible:
        return True
    timed = dict(read_facts(ledger).timed)
    missing = [row.policy for row in results.front if row.policy.digest not in timed]
    if not missing:
        return True
    keep = np.array([policy.keep for policy in missing])
    network = assembled.workload.network()
    for row, share in shares_of(network, plan, assembled.recipe.latency, keep, stop):
        timed[missing[row].digest] = share
        ledger.set_meta("timed", timed)
    return not stop()
