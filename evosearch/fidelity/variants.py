"""Ways to score a policy, as changes to a recipe. Every (variant, metric) is one predictor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evosearch.errors import ConfigError
from evosearch.recipe import parse_setting
from evosearch.scoring.proxies import PROXIES

__all__ = ["FREE", "RECIPE", "VARIANTS", "Variant", "choose", "known_variants", "parse_variant"]

_TABLES = ("proxy", "data")
FREE = "free"
"""Under this name, what weights alone foretell stands beside the variants."""
RECIPE = "recipe"
"""The variant that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to score.

    Args:
        title: One line for people.
        changes: Dotted keys of the recipe, within `proxy` and `data`, to their values.
    """

    title: str
    changes: Mapping[str, Any]


def _proxy(title: str, name: str, criterion: str | None = None, **more: Any) -> Variant:
    changes = {"proxy.name": name, **{f"proxy.{key}": value for key, value in more.items()}}
    if criterion is not None:
        changes["proxy.criterion"] = criterion
    return Variant(title=title, changes=changes)


VARIANTS: dict[str, Variant] = {
    RECIPE: Variant(title="as the recipe says", changes={}),
    "raw-l1": _proxy("cut by L1 norm (a control)", "raw", "l1"),
    "recalibrated-l1": _proxy("cut by L1 norm, recalibrate", "recalibrated", "l1"),
    "recalibrated-l1-128": _proxy(
        "cut by L1 norm, recalibrate on 128 images", "recalibrated", "l1", recalibration_images=128
    ),
    "compensated-l1": _proxy("cut by L1 norm, compensate, recalibrate", "compensated", "l1"),
    "compensated-128": _proxy(
        "cut, compensate, recalibrate on 128 images", "compensated", recalibration_images=128
    ),
    "compensated-float32": _proxy(
        "cut, compensate, recalibrate, all in float32", "compensated", precision="float32"
    ),
    "compensated-only": _proxy(
        "cut, compensate, leave batch norm alone", "compensated", recalibrate=False
    ),
    "compensated-fast": Variant(
        title="cut, compensate, recalibrate on 128 images, measure on 256",
        changes={
            "proxy.name": "compensated",
            "proxy.recalibration_images": 128,
            "data.validation": 256,
        },
    ),
    "compensated-quick": Variant(
        title="cut, compensate, recalibrate on 64 images, measure on 64 (read its distortion)",
        changes={
            "proxy.name": "compensated",
            "proxy.recalibration_images": 64,
            "data.validation": 64,
        },
    ),
    "patchwise-l1": _proxy("cut by L1 norm, refit by patch", "patchwise", "l1"),
    "patchwise-fast": Variant(
        title="cut, refit by patch, measure on 256 images",
        changes={"proxy.name": "patchwise", "data.validation": 256},
    ),
    "patchwise-quick": Variant(
        title="cut, refit by patch, measure on 64 images (read its distortion)",
        changes={"proxy.name": "patchwise", "data.validation": 64},
    ),
    "reconstructed-cut": _proxy(
        "cut, compensate, fit the layers that lost inputs",
        "reconstructed",
        reconstruction_layers="cut",
    ),
    "reconstructed-fast": Variant(
        title="cut, compensate, fit layers on 128 images, measure on 256",
        changes={
            "proxy.name": "reconstructed",
            "proxy.reconstruction_images": 128,
            "data.validation": 256,
        },
    ),
    "reconstructed-quick": Variant(
        title="cut, compensate, fit what lost inputs on 64 images, measure on 64 "
        "(read its distortion)",
        changes={
            "proxy.name": "reconstructed",
            "proxy.reconstruction_layers": "cut",
            "proxy.reconstruction_images": 64,
            "data.validation": 64,
        },
    ),
}


def known_variants() -> dict[str, Variant]:
    """All variants by name: those above, and each proxy with the recipe's other settings."""
    plain = {name: _proxy(proxy.title, name) for name, proxy in PROXIES.items()}
    return {**VARIANTS, **{name: v for name, v in plain.items() if name not in VARIANTS}}


def parse_variant(text: str) -> tuple[str, Variant]:
    """Reads `name:proxy.name=compensated,proxy.recalibrate=false`.

    Raises:
        ConfigError: The text has another form, the name is taken, or a key is not within `proxy`
            or `data`.
    """
    name, separator, rest = text.partition(":")
    name = name.strip()
    if not separator or not name or not rest.strip():
        raise ConfigError(
            f"--proxy-variant {text!r} must read like mine:proxy.name=raw,proxy.criterion=l1"
        )
    if name in known_variants() or name in ("all", FREE):
        raise ConfigError(f"--proxy-variant {text!r}: there is a variant {name!r} already")
    changes = {}
    for setting in rest.split(","):
        key, value = parse_setting(setting, "--proxy-variant")
        if key.partition(".")[0] not in _TABLES or key.count(".") != 1:
            raise ConfigError(
                f"--proxy-variant {text!r}: {key} is no key of proxy or data, such as "
                "proxy.criterion"
            )
        changes[key] = value
    return name, Variant(title=rest.strip(), changes=changes)


def choose(names: str, own: Sequence[str]) -> dict[str, Variant]:
    """The variants of a study by name.

    Args:
        names: Names separated by commas, or `all`.
        own: Texts for `parse_variant`; these always take part.

    Raises:
        ConfigError: An unknown name, or a wrong text.
    """
    known = known_variants()
    mine: dict[str, Variant] = {}
    for text in own:
        name, variant = parse_variant(text)
        if name in mine:
            raise ConfigError(f"--proxy-variant {name}: named twice")
        mine[name] = variant
    wanted = list(known) if names == "all" else [name.strip() for name in names.split(",")]
    wanted = [name for name in wanted if name]
    for name in wanted:
        if name not in known and name not in mine:
            raise ConfigError(
                f"--proxies: no proxy variant {name!r}; there are {', '.join((*known, *mine))}, "
                "or all"
            )
    chosen = {name: known[name] for name in wanted if name in known} | mine
    if not chosen:
        raise ConfigError("--proxies names no variant; leave it out for all of them")
    return chosen
