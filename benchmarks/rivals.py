"""What other tools that find widths have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evosearch.policy import Policy
from evosearch.scoring.workload import Workload

__all__ = ["Pruned", "Rival"]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a tool found.

    Args:
        policy: Widths.
        evaluations: Networks that were scored, for this budget and all others with the same map.
        seconds: That it took.
    """

    policy: Policy
    evaluations: int
    seconds: float


class Rival(Protocol):
    """A tool that finds widths for a budget without us."""

    def search(self, workload: Workload, share: float, folder: Path, threads: int) -> Pruned:
        """Widths for a budget.

        Args:
            workload: Network and images.
            share: Of the MACs.
            folder: What is kept there is found again for a second budget.
            threads: Of torch.
        """
