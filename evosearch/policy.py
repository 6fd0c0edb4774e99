"""What a genome means: how many channels of which group are kept, and by which criteria."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evosearch.errors import PolicyError

__all__ = ["Blend", "Policy", "widths_of"]

# Per group, criteria with their weights.
Blend = tuple[tuple[tuple[str, int], ...], ...]


def _canonical(blend: Sequence[Sequence[tuple[str, int]]], n_groups: int) -> Blend:
    """Criteria by name, weights in lowest terms; nothing at all if no group has a blend."""
    if not any(blend):
        return ()
    if len(blend) != n_groups:
        raise PolicyError(f"a policy of {n_groups} groups has {len(blend)} blends")
    for group, pairs in enumerate(blend):
        names = [name for name, _ in pairs]
        weights = [weight for _, weight in pairs]
        if len(set(names)) < len(names) or not all(type(w) is int and w > 0 for w in weights):
            raise PolicyError(
                f"group {group}: a blend names each criterion once, with a whole weight above 0, "
                f"got {dict(pairs)}"
            )
    return tuple(
        tuple(
            sorted(
                (str(name), weight // math.gcd(*(w for _, w in pairs))) for name, weight in pairs
            )
        )
        for pairs in blend
    )


@dataclass(frozen=True)
class Policy:
    """Channels kept per group. Equal policies are the same network under the same proxy.

    Args:
        keep: One count per prunable group, in the order of the group table; 0 in all groups of a
            block that is left out.
        blend: Per group the criteria that say which channels, with whole weights; an empty one
            means the recipe's criterion. Weights are reduced to lowest terms and criteria sorted
            by name, so that equal blends are equal; if all are empty there is none.

    Raises:
        PolicyError: A count is no whole number from 0 on, or a blend is not what it should be.
    """

    keep: tuple[int, ...]
    blend: Blend = ()

    def __post_init__(self) -> None:
        if not set(map(type, self.keep)) <= {int}:  # True is an int, but no count
            raise PolicyError(f"a policy keeps whole channels, got {self.keep}")
        if min(self.keep, default=0) < 0:
            less = [group for group, count in enumerate(self.keep) if count < 0]
            raise PolicyError(f"groups {less} would keep fewer channels than none")
        if self.blend:
            object.__setattr__(self, "blend", _canonical(self.blend, len(self.keep)))

    def to_json(self) -> str:
        """The one JSON text of this policy; without a blend it does not mention any."""
        keep = f'"keep":[{",".join(map(str, self.keep))}]'
        if not self.blend:
            return f"{{{keep}}}"
        blend = json.dumps([dict(pairs) for pairs in self.blend], separators=(",", ":"))
        return f'{{{keep},"blend":{blend}}}'

    @classmethod
    def from_json(cls, text: str) -> "Policy":
        """Reads what `to_json` wrote.

        Raises:
            PolicyError: The text is not a policy.
        """
        try:
            content = json.loads(text)
            blend = tuple(tuple(pairs.items()) for pairs in content.get("blend", ()))
            return cls(keep=tuple(content["keep"]), blend=blend)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            if isinstance(exc, PolicyError):
                raise
            raise PolicyError(f"not a policy: {text[:80]!r}") from exc

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: the policy's name."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def widths_of(policies: Sequence[Policy], n_groups: int) -> NDArray[np.int64]:
    """`(n, n_groups)` kept channels of n policies, which may be none."""
    keep = np.array([policy.keep for policy in policies], dtype=np.int64)
    return keep.reshape(len(policies), n_groups)
