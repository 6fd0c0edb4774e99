"""What a genome means: how many channels of which group are kept."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from evosearch.errors import PolicyError

__all__ = ["Policy"]


@dataclass(frozen=True)
class Policy:
    """Channels kept per group. Equal policies are the same network under the same proxy.

    Args:
        keep: One count per prunable group, in the order of the group table, each at least 1.

    Raises:
        PolicyError: A group would lose every channel, or a count is not an integer.
    """

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not set(map(type, self.keep)) <= {int}:  # True is an int, but no count
            raise PolicyError(f"a policy keeps whole channels, got {self.keep}")
        if min(self.keep, default=1) < 1:
            empty = [group for group, count in enumerate(self.keep) if count < 1]
            raise PolicyError(f"groups {empty} would lose every channel; keep at least 1")

    def to_json(self) -> str:
        """The one JSON text of this policy."""
        return f'{{"keep":[{",".join(map(str, self.keep))}]}}'

    @classmethod
    def from_json(cls, text: str) -> "Policy":
        """Reads what `to_json` wrote.

        Raises:
            PolicyError: The text is not a policy.
        """
        try:
            return cls(keep=tuple(json.loads(text)["keep"]))
        except (ValueError, KeyError, TypeError) as exc:
            if isinstance(exc, PolicyError):
                raise
            raise PolicyError(f"not a policy: {text[:80]!r}") from exc

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: the policy's name."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
