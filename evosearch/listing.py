"""What a recipe can say and name, with a line on each."""

import tomllib
from collections.abc import Callable

from evosearch.recipe import recipe_path, shipped_recipes

__all__ = ["LISTS"]


def _recipes() -> dict[str, str]:
    return {
        name: tomllib.loads(recipe_path(name).read_text()).get("title", "")
        for name in shipped_recipes()
    }


def _spaces() -> dict[str, str]:
    from evosearch.space import known_spaces

    return {name: point.value for name, point in known_spaces().items()}


def _algorithms() -> dict[str, str]:
    from evosearch.algorithms import ALGORITHMS

    return {name: entry.title for name, entry in ALGORITHMS.items()}


def _criteria() -> dict[str, str]:
    from evosearch.pruning.criteria import CRITERIA, known_criteria

    return {
        **{name: criterion.title for name, criterion in CRITERIA.items()},
        **{name: point.value for name, point in known_criteria().items()},
        "module:function": "your own; also path/to/file.py:function",
    }


def _proxies() -> dict[str, str]:
    from evosearch.scoring.proxies import PROXIES

    return {name: proxy.title for name, proxy in PROXIES.items()}


def _variants() -> dict[str, str]:
    from evosearch.fidelity.variants import known_variants

    return {name: variant.title for name, variant in known_variants().items()}


def _networks() -> dict[str, str]:
    from evosearch.networks import BUILT_IN

    return {
        **{name: entry.title for name, entry in BUILT_IN.items()},
        "torchvision:NAME": "any classification model of torchvision",
        "module:factory": "your own; also path/to/file.py:factory",
    }


def _stopwatches() -> dict[str, str]:
    from evosearch.scoring.stopwatches import STOPWATCHES

    return {
        **{name: title for name, (title, _) in STOPWATCHES.items()},
        "module:function": "your own; also path/to/file.py:function",
    }


def _datasets() -> dict[str, str]:
    from evosearch.data import DATASETS

    return {
        **{name: title for name, (title, _) in DATASETS.items()},
        "FILE.npz": "your own: images (n, h, w, c) uint8 and labels (n,)",
    }


def _settings() -> dict[str, str]:
    from evosearch.reference import recipe_settings

    return recipe_settings()


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _recipes,
    "spaces": _spaces,
    "algorithms": _algorithms,
    "criteria": _criteria,
    "proxies": _proxies,
    "variants": _variants,
    "networks": _networks,
    "datasets": _datasets,
    "stopwatches": _stopwatches,
    "settings": _settings,
}
