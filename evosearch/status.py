"""How a run stands, read from outside, also while it is being searched."""

from pathlib import Path
from typing import Any

from evosearch.ledger import Ledger, lock_holder
from evosearch.results.front import read_results
from evosearch.search import SEARCH

__all__ = ["read_status"]


def read_status(run: Path) -> dict[str, Any]:
    """State, counts, pace and hypervolume of a run, as plain data.

    Raises:
        LedgerError: There is no usable run.
    """
    with Ledger.open(run) as ledger:
        holder = lock_holder(run)
        progress = ledger.progress(SEARCH)
        state = ledger.meta("state")
        if holder is None and state == "running":
            state = "killed"  # nobody holds the lock, and nobody wrote how it ended
        results = read_results(ledger)
        budget = ledger.meta("evaluations")
        first, last = progress.pop("first_at"), progress.pop("last_at")
        elapsed = (last - first) if first is not None else 0.0
        done = progress["evaluations"]
        return {
            "run": str(run),
            "state": state,
            "held_by": holder,
            "algorithm": ledger.meta("recipe")["search"]["algorithm"],
            "budget": budget,
            **progress,
            "elapsed_seconds": elapsed,
            "seconds_left": elapsed / (done - 1) * (budget - done) if done > 1 else None,
            "front": sum(row.on_front for row in results.rows),
            "hypervolume": results.hypervolume(),
            "baseline_hypervolume": results.baseline_hypervolume(),
        }
