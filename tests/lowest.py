"""Prints pip constraints: of every library the lowest version that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def main() -> None:
    """One line per library that names a bound."""
    extras = PROJECT["optional-dependencies"]
    for wanted in [*PROJECT["dependencies"], *extras["onnx"], *extras["dev"]]:
        bound = re.match(r"([\w-]+)>=([\d.]+)", wanted)
        if bound:
            name, version = bound.groups()
            exact = version.count(".") > 1
            print(f"{name}=={version}" if exact else f"{name}=={version}.*")  # noqa: T201


if __name__ == "__main__":
    main()
