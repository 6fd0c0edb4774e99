"""The import graph is the architecture: holds the picture in ARCHITECTURE.md to the code."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top down. A unit may import from the rows below its own, and from itself.
LAYERS = (
    ("evosearch", "evosearch.__main__"),  # the package itself only loads on demand
    ("evosearch.api", "evosearch.cli"),
    ("evosearch.listing",),
    ("evosearch.reference",),
    ("evosearch.fidelity",),
    (
        "evosearch.comparing",
        "evosearch.exporting",
        "evosearch.finetuning",
        "evosearch.profiling",
        "evosearch.run",
        "evosearch.status",
    ),
    ("evosearch.checking", "evosearch.starting"),
    ("evosearch.results",),
    ("evosearch.assembly", "evosearch.testing"),
    ("evosearch.search", "evosearch.strategy"),
    ("evosearch.doubts", "evosearch.materials", "evosearch.snapshots"),
    ("evosearch.algorithms", "evosearch.scoring"),
    ("evosearch.pruning", "evosearch.training"),
    ("evosearch.data", "evosearch.networks", "search_spaces"),
    ("evosearch.facts", "evosearch.progress", "evosearch.reach"),
    ("evosearch.ledger", "evosearch.scoring.objectives", "evosearch.space"),
    ("evosearch.measurement", "evosearch.pruning.table"),
    ("evosearch.latency", "evosearch.pareto", "evosearch.policy", "evosearch.recipe"),
    ("evosearch.checks", "evosearch.fidelity.statistics", "evosearch.files", "evosearch.locks"),
    ("evosearch.errors",),
)
OWNERS = {
    "matplotlib": {"evosearch.results.plots"},
    "moocore": {"evosearch.pareto"},
    "onnx": {"evosearch.networks.onnx_models"},
    "onnxruntime": {"evosearch.networks.onnx_models"},
    "pandas": {"evosearch.api", "evosearch.results.export"},  # the former names its table's type
    "pyarrow": set(),
    "pymoo": {"evosearch.algorithms.evolution"},
    "ray": {"evosearch.scoring.pool"},
    "safetensors": {"evosearch.networks.weights"},
    "sqlite3": {"evosearch.ledger"},
    "torch_pruning": {"evosearch.pruning.dependencies"},
    "typer": {"evosearch.cli"},
}
TORCH_FOLDERS = ("networks", "pruning", "scoring", "training")
HEAVY = ("torch", "torchvision", "torch_pruning", "ray", "pymoo", "pandas", "matplotlib", "scipy")
LIGHT = (
    "evosearch.checks",
    "evosearch.errors",
    "evosearch.facts",
    "evosearch.files",
    "evosearch.latency",
    "evosearch.ledger",
    "evosearch.locks",
    "evosearch.measurement",
    "evosearch.pareto",
    "evosearch.policy",
    "evosearch.pruning.table",
    "evosearch.reach",
    "evosearch.recipe",
    "evosearch.results.front",
    "evosearch.results.report",
    "evosearch.scoring.dispatch",
    "evosearch.scoring.objectives",
    "evosearch.scoring.simulation",
    "evosearch.search",
    "evosearch.space",
    "evosearch.status",
    "evosearch.pruning.blending",
    "evosearch.pruning.ranking",
    "search_spaces.criterion_blend",
    "search_spaces.layer_sparsity",
)


@cache
def sources() -> dict[str, ast.Module]:
    """Syntax trees by module name."""
    found = {}
    for package in ("evosearch", "search_spaces"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """All modules that a module names in imports, also those inside functions."""
    found: set[str] = set()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & sources().keys()) or {node.module}
    return frozenset(found)


def inside(module: str) -> Iterator[str]:
    """What a module imports of this project."""
    return (name for name in imports(module) if name in sources())


def layer_of(module: str) -> tuple[int, str]:
    """Row and unit, by the longest name that fits."""
    places = [
        (len(unit), row, unit)
        for row, units in enumerate(LAYERS)
        for unit in units
        if module == unit or (module.startswith(f"{unit}.") and unit != "evosearch")
    ]
    assert places, f"{module} has no place in LAYERS"
    _, row, unit = max(places)
    return row, unit


@pytest.mark.parametrize("module", sources())
def test_imports_point_down_only(module: str) -> None:
    row, unit = layer_of(module)
    for name in inside(module):
        other_row, other_unit = layer_of(name)
        assert other_row > row or other_unit == unit, f"{module} imports {name}, which is not below"


def test_every_unit_of_the_picture_exists() -> None:
    assert {unit for units in LAYERS for unit in units} <= sources().keys()


def test_modules_form_no_cycle() -> None:
    graph = {module: set(inside(module)) - {module} for module in sources()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_scoring_and_algorithms_meet_in_search_only() -> None:
    for one, other in (("scoring", "algorithms"), ("algorithms", "scoring")):
        for module in sources():
            if module.startswith(f"evosearch.{one}"):
                assert not any(n.startswith(f"evosearch.{other}") for n in imports(module))


def test_nothing_names_a_search_space() -> None:
    for module in sources():
        if module.startswith("evosearch"):
            assert not any(name.startswith("search_spaces") for name in imports(module)), module


def test_search_spaces_see_the_group_table_of_pruning_only() -> None:
    allowed = {"checks", "errors", "policy", "pruning.table", "recipe", "space"}
    for module in sources():
        if module.startswith("search_spaces"):
            seen = {name for name in inside(module) if name.startswith("evosearch")}
            assert seen <= {f"evosearch.{name}" for name in allowed}


@pytest.mark.parametrize("library", OWNERS)
def test_library_has_one_owner(library: str) -> None:
    users = {m for m in sources() if any(n.split(".")[0] == library for n in imports(m))}
    assert users == OWNERS[library]


def test_torch_stays_where_networks_are() -> None:
    users = {m for m in sources() if any(n.split(".")[0] == "torch" for n in imports(m))}
    folders = {m for m in users if m.split(".")[1] in TORCH_FOLDERS}
    # What returns networks names their type.
    assert users - folders == {"evosearch.api", "evosearch.results.models"}


def loaded_after(statements: str) -> list[str]:
    """Heavy libraries that a fresh interpreter has loaded after some statements."""
    code = f"import sys\n{statements}\nprint(*(n for n in {HEAVY!r} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()


def test_help_is_instant_because_nothing_heavy_is_loaded() -> None:
    assert loaded_after("import evosearch; import evosearch.cli") == []


def test_command_line_shows_its_help_without_anything_heavy() -> None:
    statements = (
        "from typer.testing import CliRunner\n"
        "from evosearch.cli import app\n"
        "for word in ('', 'launch', 'resume', 'status', 'criteria', 'fidelity', 'list'):\n"
        "    assert CliRunner().invoke(app, [*word.split(), '--help']).exit_code == 0, word"
    )
    assert loaded_after(statements) == []


def test_policies_costs_ledger_and_loop_work_without_anything_heavy() -> None:
    assert loaded_after("".join(f"import {module}\n" for module in LIGHT)) == []


def test_fronts_and_hypervolumes_work_without_torch_and_pymoo() -> None:
    statements = (
        "import numpy as np\n"
        "from evosearch.pareto import front_mask, hypervolume\n"
        "front_mask(np.ones((2, 2))), hypervolume(np.ones((2, 2)) / 2, np.ones(2))"
    )
    assert not set(loaded_after(statements)) & {"torch", "pymoo", "ray", "pandas"}


def exported(module: str) -> list[str] | None:
    for node in sources()[module].body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


with_exports = pytest.mark.parametrize(
    "module", [module for module in sources() if exported(module) is not None]
)


def kind_and_name(name: str) -> tuple[int, list[str]]:
    """Constants, then classes, then functions, numbers by value: the order of ruff's RUF022."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@with_exports
def test_exports_are_sorted(module: str) -> None:
    names = exported(module)
    assert names == sorted(set(names or []), key=kind_and_name)


@with_exports
def test_exports_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in exported(module) or [] if not hasattr(loaded, name)] == []


def test_module_without_exports_is_a_command_or_empty() -> None:
    for module, tree in sources().items():
        public = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        commands = ("evosearch.cli", "evosearch.data.make_sample")
        assert exported(module) is not None or not public or module in commands, module


def test_names_that_others_import_are_exported() -> None:
    hidden = set()
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in sources():
                listed = exported(node.module) or ["main"]
                names = {alias.name for alias in node.names}
                inner = {n for n in names if f"{node.module}.{n}" in sources()}
                hidden |= {f"{node.module}.{n} ({module})" for n in names - inner - set(listed)}
    assert sorted(hidden) == []
