"""What a user wrote, by `module:attribute` or `path/to/file.py:attribute`."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from evosearch.errors import ConfigError

__all__ = ["import_file", "import_named", "import_own", "importing"]


def import_file(path: Path) -> ModuleType:
    """Imports a Python file of a user; raises whatever it raises."""
    # Registered under a name, as classes defined in the file expect to find their module.
    module_name = f"evosearch_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    # As for a script, what lies beside the file can be imported; other modules come first.
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    spec.loader.exec_module(module)
    return module


def import_named(name: str) -> ModuleType:
    """Imports a module of a user by name; raises whatever it raises."""
    # A console script, unlike `python -m`, does not look for modules where it runs.
    here = str(Path.cwd())
    if not {here, ""} & set(sys.path):
        sys.path.insert(0, here)
    return importlib.import_module(name)


def import_own(name: str) -> object:
    """What a user means by `module:attribute` or `path/to/file.py:attribute`.

    Raises:
        ConfigError: The file does not exist.
        Exception: Whatever importing it, or looking for the attribute, raises.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"file {place} does not exist")
    module = import_file(Path(place)) if place.endswith(".py") else import_named(place)
    if not hasattr(module, attribute):
        raise ConfigError(f"{place} has no function or class {attribute!r}")
    return getattr(module, attribute)


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Around an import of what a user wrote, or names: a sentence if it fails.

    Args:
        what: Stands in front of the sentence.

    Raises:
        ConfigError: Whatever is raised inside.
    """
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{what}: {exc}") from exc
    except (Exception, SystemExit) as exc:  # a user's file may do anything while it is imported
        raise ConfigError(f"{what}: importing it failed with {exc!r}") from exc
