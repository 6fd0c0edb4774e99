"""Everything that evosearch raises on purpose.

EvosearchError
├─ ConfigError(ValueError)            exit 2   a recipe, an option or an argument is wrong
│  └─ ConfigMismatch                           a run, or what it measured, is another by now
├─ DataError(ValueError)              exit 2   images or labels are missing or unusable
├─ NetworkError(ValueError)           exit 2   a network or its weights cannot be used
├─ SpaceError(ValueError)             exit 2   a genome or a policy cannot be what it claims
│  ├─ PolicyError                              a group emptied, a width out of range
│  └─ BudgetUnreachable                        no policy satisfies a constraint
├─ LedgerError(OSError)               exit 2   a run directory cannot be used
│  ├─ RunExists                                launching where a run already is
│  ├─ LedgerLocked                             another process writes to it
│  ├─ LedgerVersionError                       written by another schema
│  ├─ LedgerCorrupt                            not a ledger, or damaged
│  └─ ReplayMismatch                           the algorithm no longer asks what it asked before
├─ BackendError(RuntimeError)         exit 1   no worker can be started, nothing can be written
└─ CandidateError(RuntimeError)                never leaves `scoring`; becomes Measurement.status
   ├─ CandidateOutOfMemory
   └─ WorkerLost

A message says what was wanted, what came instead, and what to do. The command line prints it and
exits with `exit_code`; nothing else turns these errors into text.
"""

from typing import ClassVar

__all__ = [
    "BackendError",
    "BudgetUnreachable",
    "CandidateError",
    "CandidateOutOfMemory",
    "ConfigError",
    "ConfigMismatch",
    "DataError",
    "EvosearchError",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerLocked",
    "LedgerVersionError",
    "NetworkError",
    "PolicyError",
    "ReplayMismatch",
    "RunExists",
    "SpaceError",
    "WorkerLost",
    "first_line",
    "out_of_memory",
]

# A CPU, and the libraries of a GPU, say so in words only.
_SHORT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


class EvosearchError(Exception):
    """Base of all errors that carry a sentence for the user."""

    exit_code: ClassVar[int] = 1


class ConfigError(EvosearchError, ValueError):
    """A recipe, an option or an argument is wrong."""

    exit_code = 2


class ConfigMismatch(ConfigError):
    """What a run or a study was made with has changed: recipe, settings, network or images."""


class DataError(EvosearchError, ValueError):
    """Images or labels are missing or unusable."""

    exit_code = 2


class NetworkError(EvosearchError, ValueError):
    """A network or its weights cannot be used."""

    exit_code = 2


class SpaceError(EvosearchError, ValueError):
    """A genome, a policy or a search space is not what it claims to be."""

    exit_code = 2


class PolicyError(SpaceError):
    """A policy would empty a group or keep more channels than there are."""


class BudgetUnreachable(SpaceError):
    """No policy of the search space satisfies a constraint; names the reachable range."""


class LedgerError(EvosearchError, OSError):
    """A run directory cannot be used."""

    exit_code = 2


class RunExists(LedgerError):
    """A launch was pointed at a directory that already holds something."""


class LedgerLocked(LedgerError):
    """Another process is writing to the run."""


class LedgerVersionError(LedgerError):
    """The ledger was written by another schema version."""


class LedgerCorrupt(LedgerError):
    """The ledger is damaged, or is not a ledger."""


class ReplayMismatch(LedgerError):
    """A resumed algorithm asked for other policies than the ledger recorded."""


class BackendError(EvosearchError, RuntimeError):
    """The environment failed: no worker can be started, nothing can be written."""


class CandidateError(EvosearchError, RuntimeError):
    """One candidate could not be scored. Recorded as a measurement, never raised to a user."""


class CandidateOutOfMemory(CandidateError):
    """Scoring ran out of memory."""


class WorkerLost(CandidateError):
    """The worker process that scored the candidate died."""


def first_line(exc: BaseException) -> str:
    """What an exception of somebody else's says first, or what it is if it says nothing."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else repr(exc)


def out_of_memory(exc: BaseException) -> bool:
    """Whether that is what went wrong."""
    said = isinstance(exc, RuntimeError) and any(words in str(exc) for words in _SHORT_OF_MEMORY)
    # torch's own is not imported here.
    return said or isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
