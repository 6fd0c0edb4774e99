"""Criteria that come from a file, a module or an entry point."""

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from evosearch.errors import ConfigError, NetworkError
from evosearch.pruning.criteria import CRITERIA, Criterion, criterion_named, registry
from tests.unit.small_networks import Small, Traced, own, part, scores_of, uneven

OWN = """
from evosearch.pruning.criteria import Criterion

def loudest(view):
    "Largest weight of the filter."
    return view.producers[0].abs().amax(dim=1)

def short(view):
    return [1.0]

def broken(view):
    raise KeyError("lost")

def hungry(view):
    return view.seen("pooled")[0].mean(dim=0)

fed = Criterion(title="fed", score=hungry, needs=("pooled",))
number = 3
"""


@pytest.fixture
def small() -> Traced:
    torch.manual_seed(0)
    return own(uneven(Small()))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_own_criterion_by_file(small: Traced, file: str) -> None:
    found = scores_of(small, f"{file}:loudest")
    wanted = small[0].module.a.weight.abs().amax((1, 2, 3)).detach()
    np.testing.assert_allclose(part(small, "a", found), wanted)
    assert criterion_named(f"{file}:loudest").title == "Largest weight of the filter."


def test_own_criterion_may_say_what_it_needs(small: Traced, file: str) -> None:
    assert scores_of(small, f"{file}:fed").shape == (6 + 5 + 20,)
    with pytest.raises(ConfigError, match=r"group a: there is no 'pooled'.* name it in its needs"):
        scores_of(small, f"{file}:hungry")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "criterion .*:short, group a: it must give 6 scores, got shape"),
        ("broken", r"criterion .*:broken, group a: computing it failed with KeyError\('lost'\)"),
    ],
)
def test_own_criterion_that_fails_is_named_with_its_group(
    small: Traced, file: str, name: str, message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        scores_of(small, f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:nothing", "has no function or class .nothing"),
        ("{file}:number", "is no function, but a int"),
        ("no/such.py:f", "file no/such.py does not exist"),
        ("no_such_module:f", "importing it failed with ModuleNotFoundError"),
    ],
)
def test_own_criterion_that_cannot_be_had_is_refused(file: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        criterion_named(name.format(file=file))


def test_criterion_cannot_need_what_nobody_collects() -> None:
    with pytest.raises(ConfigError, match="cannot need 'luck'; there are active, excitation"):
        Criterion(title="lucky", score=CRITERIA["l1"].score, needs=("luck",))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def points(**values: str) -> None:
        found = [
            EntryPoint(n.replace("_", "-"), v, "evosearch.criteria") for n, v in values.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry.known_criteria.cache_clear()

    yield points
    registry.known_criteria.cache_clear()


def test_criterion_by_entry_point(small: Traced, register: Callable[..., None]) -> None:
    register(theirs="evosearch.pruning.criteria.weights:l2")
    np.testing.assert_array_equal(scores_of(small, "theirs"), scores_of(small, "l2"))


def test_criterion_registered_under_a_name_of_ours_is_refused(
    register: Callable[..., None],
) -> None:
    register(l1="somewhere:else")
    with pytest.raises(ConfigError, match="'l1' of somewhere:else is registered by evosearch"):
        criterion_named("theirs")
