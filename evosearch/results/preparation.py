"""How exported networks are prepared, where that is not as in the search."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evosearch.errors import ConfigError

__all__ = ["AS_SEARCHED", "Preparation"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How networks are prepared, where that is not as in the search.

    Args:
        calibration: Training images; with them all layers are fitted where any are. None for those
            of the search.
        settings: Dotted keys of the recipe, within `proxy`, to other values.

    Raises:
        ConfigError: A key is not within `proxy`.
    """

    calibration: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.settings:
            if not key.startswith("proxy."):
                raise ConfigError(
                    f"--set {key}: networks of a run can be prepared by another proxy, and by "
                    "nothing else: its keys begin with proxy., as in proxy.criterion=l1"
                )

    def __bool__(self) -> bool:
        """Whether it is not as in the search."""
        return self.calibration is not None or bool(self.settings)

    def __str__(self) -> str:
        """The options that ask for it."""
        parts = [f"--set {key}={value}" for key, value in self.settings.items()]
        if self.calibration is not None:
            parts.append(f"--calibration {self.calibration}")
        return " ".join(parts)

    def changes(self) -> dict[str, Any]:
        """Dotted keys of the recipe to other values.

        A search is frugal: hundreds of candidates are prepared, and only their order matters. The
        one that is kept can have all layers fitted, on as many images as one likes.
        """
        if self.calibration is None:
            return dict(self.settings)
        images = dict.fromkeys(
            (
                "data.calibration",
                "proxy.recalibration_images",
                "proxy.reconstruction_images",
            ),
            self.calibration,
        )
        return {**images, "proxy.reconstruction_layers": "all", **self.settings}


AS_SEARCHED = Preparation()
