"""How a run stands, read from outside, also while it is being searched."""

from collections import Counter
from pathlib import Path
from typing import Any

from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.locks import lock_holder
from evosearch.results.front import read_results

__all__ = ["read_status"]


def read_status(run: Path) -> dict[str, Any]:
    """State, counts, pace and hypervolume of a run, as plain data.

    Seconds are those of scoring, shared among as many workers as there are now: time in which
    nobody searched, and what the uniform ladder took, do not count.

    Raises:
        LedgerError: There is no usable run.
    """
    with Ledger.open(run) as ledger:
        holder = lock_holder(run)
        facts = read_facts(ledger)
        state: str = facts.state
        if holder is None and state == "running":
            state = "killed"  # nobody holds the lock, and nobody wrote how it ended
        results = read_results(ledger)
        generations = ledger.generations()
    done = len(results.rows)
    scoring = sum(row.seconds for row in results.rows)
    workers = facts.resumed_with_workers
    elapsed = scoring / max(facts.recipe.run.workers if workers is None else workers, 1)
    left = facts.evaluations - done if state != "finished" else 0
    return {
        "run": str(run),
        "state": state,
        "held_by": holder,
        "algorithm": facts.recipe.search.algorithm,
        "budget": facts.evaluations,
        "evaluations": done,
        "by_status": dict(Counter(row.status.value for row in results.rows)),
        "generations": generations,
        "scoring_seconds": scoring,
        "elapsed_seconds": elapsed,
        "seconds_left": elapsed / done * left if done else None,
        "front": sum(row.on_front for row in results.rows),
        "feasible": results.feasible,
        "hypervolume": results.hypervolume(),
        "baseline_hypervolume": results.baseline_hypervolume(),
    }
