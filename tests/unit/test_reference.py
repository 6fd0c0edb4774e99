"""What `evosearch list settings` says is what recipes accept."""

import json
from dataclasses import dataclass

import pytest

from evosearch.algorithms import ALGORITHMS
from evosearch.recipe import Recipe, load_recipe
from evosearch.reference import argument_texts, recipe_settings


def split(shown: str) -> tuple[str, str]:
    """A key, and its default as a recipe would say it."""
    key, _, default = shown.partition(" = ")
    return key.removesuffix("  (required)"), default


@pytest.mark.parametrize(("shown", "text"), recipe_settings().items())
def test_every_setting_has_a_meaning_and_a_default_that_is_accepted(shown: str, text: str) -> None:
    assert len(text.rpartition(") ")[2]) > 10
    key, default = split(shown)
    if default and key.partition(".")[0] != "space" and not key.startswith("search.options"):
        table, _, field = key.rpartition(".")
        recipe = load_recipe("quickstart", (f"{key}={default}",)).model_dump(mode="json")
        found = (recipe[table] if table else recipe)[field]
        assert found == json.loads(default) or (field == "root" and found.endswith("/data"))


def test_every_table_of_a_recipe_is_there() -> None:
    keys = [split(shown)[0] for shown in recipe_settings()]
    recipe = load_recipe("quickstart").model_dump(mode="json")
    for table, fields in recipe.items():
        for field in fields if isinstance(fields, dict) else ():
            assert f"{table}.{field}" in keys
    assert [key.partition(".")[0] for key in keys] == sorted(
        (key.partition(".")[0] for key in keys), key=list(Recipe.model_fields).index
    )


def test_options_of_all_algorithms_and_spaces_are_there() -> None:
    settings = recipe_settings()
    for name, entry in ALGORITHMS.items():
        known = [text for key, text in settings.items() if key.startswith("search.options.")]
        assert (entry.options is None) == (
            not any(name in text.partition(")")[0].strip("(").split(", ") for text in known)
        )
    assert "layer | stage" in settings['space.grouping = "layer"']
    assert settings['space.name = "layer-sparsity"'] == "See `evosearch list spaces`."


@dataclass
class Base:
    """A base.

    Args:
        one, other: Of
            both.
        third: Alone.

    Raises:
        Nothing: At all.
    """

    one: int = 1
    other: int = 2
    third: int = 3


@dataclass
class Derived(Base):
    """Another.

    Args:
        fourth: New.
        one: See `Base`.
        third: Different.
    """

    fourth: int = 4


def test_arguments_are_explained_by_the_class_that_knows_them() -> None:
    assert argument_texts(Derived) == {
        "one": "Of both.",
        "other": "Of both.",
        "third": "Different.",
        "fourth": "New.",
    }
