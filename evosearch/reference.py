"""Every key of a recipe, its default and its meaning, read from the models that check them."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evosearch.recipe import Recipe

__all__ = ["argument_texts", "recipe_settings"]

# A text that begins so leaves it to the base class to say more.
_SEE = "See `"


def recipe_settings() -> dict[str, str]:
    """Meanings by keys with their defaults, such as `search.evaluations = 300`."""
    found = {**dict(_of_model(Recipe, "")), **_of_spaces(), **_of_algorithms()}
    tables = list(Recipe.model_fields)
    return {key: found[key] for key in sorted(found, key=lambda k: tables.index(_table_in(k)))}


def _table_in(key: str) -> str:
    return re.split(r"[. ]", key)[0]


def argument_texts(cls: type) -> dict[str, str]:
    """What the `Args:` of a class and of its bases say, by argument; one text may be for several.

    A class that says "See `Base`." leaves it to the base.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        for entry in re.findall(r"^ {4}(\w.*(?:\n {8}.*)*)", section.partition("\n\n")[0], re.M):
            names, _, text = " ".join(entry.split()).partition(": ")
            for name in names.split(", "):
                if name not in found or not text.startswith(_SEE):
                    found[name] = text
    return found


def _of_model(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        table = _table_of(field)
        if table is not None and table.model_fields and not field.description:
            yield from _of_model(table, f"{prefix}{name}.")
        elif prefix + name != "space":
            yield prefix + name + _default(field), _choices(field) + (field.description or "")


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a field is, if it is one."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _choices(field: FieldInfo) -> str:
    """Words that a field may be, if it may not be any."""
    kinds = (field.annotation, *get_args(field.annotation))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return f"{' | '.join(words)}: " if len(words) > 1 else ""


def _default(field: FieldInfo) -> str:
    """As a recipe would say it; nothing where leaving the key out is the default."""
    if field.is_required():
        return "  (required)"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value == {} else f" = {json.dumps(value)}"


def _of_spaces() -> dict[str, str]:
    from evosearch.space import known_spaces

    default = Recipe.model_validate({"network": {"name": "any"}}).space["name"]
    found = {f"space.name = {json.dumps(default)}": "See `evosearch list spaces`."}
    users: dict[tuple[str, str], list[str]] = {}
    for name, point in known_spaces().items():
        model: type[BaseModel] | None = getattr(point.load(), "options_model", None)
        for key, text in _of_model(model, "space.") if model else ():
            users.setdefault((key, text), []).append(name)
    return {**found, **_with_users(users)}


def _of_algorithms() -> dict[str, str]:
    from evosearch.algorithms import ALGORITHMS

    users: dict[tuple[str, str], list[str]] = {}
    for name, entry in ALGORITHMS.items():
        texts = argument_texts(entry.options) if entry.options else {}
        for option in fields(entry.options) if entry.options else ():
            default: Any = option.default
            shown = "" if default is MISSING else f" = {json.dumps(default)}"
            key = f"search.options.{option.name}{shown}"
            users.setdefault((key, texts[option.name]), []).append(name)
    return _with_users(users)


def _with_users(users: dict[tuple[str, str], list[str]]) -> dict[str, str]:
    """Meanings by keys, after the names of those that know them; keys of several meanings once."""
    found: dict[str, list[str]] = {}
    for (key, text), names in users.items():
        found.setdefault(key, []).append(f"({', '.join(names)}) {text}")
    return {key: " ".join(texts) for key, texts in found.items()}
