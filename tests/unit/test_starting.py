"""What a search begins with: rankings of the channels of a real network."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evosearch import run
from evosearch.assembly import Assembled, assemble
from evosearch.errors import ConfigError, NetworkError
from evosearch.facts import read_facts
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.policy import Policy
from evosearch.pruning.criteria import channel_scores
from evosearch.pruning.ranking import importance, savings
from evosearch.recipe import RANKINGS, change_recipe, load_recipe
from evosearch.scoring.workload import samples_of
from evosearch.starting import ranked_by_channels
from evosearch.strategy import Beginning, algorithm_of, foresight_of

L1 = [{"criterion": "l1", "scale": "mean", "power": 0.0}]
FEW = {
    "data.calibration": 64,
    "data.validation": 64,
    "data.check": 0,
    "proxy.name": "raw",
    "proxy.criterion": "l1",
    "run.workers": 0,
}


class Bare(nn.Module):
    """Two convolutions and no batch norm."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 12, 3, 4), nn.Conv2d(12, 16, 3, 2)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def made(**changes: Any) -> Assembled:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return assemble(change_recipe(load_recipe("quickstart"), {**FEW, **dotted}, "a test"))


@cache
def default() -> Assembled:
    return made()


def policies(assembled: Assembled) -> list[Policy]:
    return assembled.space.decode(np.array(ranked_by_channels(assembled).ranked))


def shares(assembled: Assembled, found: list[Policy]) -> list[float]:
    shown: list[float] = assembled.workload.plan.table.shares_of(found)["macs"].tolist()
    return shown


def test_rankings_left_open_are_settled_and_written_down() -> None:
    assert default().recipe.search.rankings == list(RANKINGS)
    assert 'criterion = "bn-taylor"' in default().recipe.to_toml()


def test_a_front_begins_along_the_first_ranking() -> None:
    found = policies(default())
    assert len(found) == 16
    spent = sorted(shares(default(), found))
    assert spent[0] < 0.2
    assert spent[-1] > 0.8
    first = [RANKINGS[0].model_dump()]
    assert policies(made(search__rankings=first)) == found


def test_a_budget_begins_with_one_policy_of_each_ranking() -> None:
    assembled = made(space__project_onto={"macs": 0.5}, search__objectives=["error"])
    found = policies(assembled)
    assert len(set(found)) == len(found) == len(RANKINGS)
    assert all(0.48 < share <= 0.5 for share in shares(assembled, found))


def test_a_policy_keeps_the_channels_above_one_threshold() -> None:
    assembled = made(search__rankings=L1)
    workload = assembled.workload
    table = workload.plan.table
    scores = channel_scores(workload.network().module, workload.plan, ["l1"])[0]
    parts = np.split(scores, table.offsets[1:])
    told = 0
    for policy in policies(assembled):
        gone, stay = [], []
        for part, k, group in zip(parts, policy.keep, table.groups, strict=True):
            order = np.sort(part / part.mean())
            # What a bound takes or leaves tells nothing.
            if 0.2 * group.channels < k < group.channels:
                gone.append(order[: len(order) - k].max())
                stay.append(order[len(order) - k :].min())
        assert not gone or max(gone) <= min(stay)
        told += len(gone)
    assert told > 40


@pytest.mark.parametrize(
    ("algorithm", "count"), [("nsga2", 4), ("random", 4), ("uniform", 0), ("sensitivity", 0)]
)
def test_algorithms_take_as_many_as_they_use(algorithm: str, count: int) -> None:
    assembled = made(search__algorithm=algorithm, search__population=8)
    assert len(ranked_by_channels(assembled).ranked) == count


def test_losses_are_guessed_by_the_first_ranking() -> None:
    assembled = made(search__rankings=[*L1, RANKINGS[0].model_dump()])
    table, lost = assembled.workload.plan.table, ranked_by_channels(assembled).losses
    scores = channel_scores(assembled.workload.network().module, assembled.workload.plan, ["l1"])
    parts = np.split(importance(scores[0], table, "mean"), table.offsets[1:])
    worths = [part * saved for part, saved in zip(parts, savings(table), strict=True)]
    foresee = foresight_of(assembled.goals, table, lost)
    found = assembled.space.decode(np.random.default_rng(0).random((5, assembled.space.n_genes)))
    guessed = foresee([assembled.space.dearest(), *found]).loss
    assert guessed is not None
    by_hand = [
        sum(np.sort(w)[: len(w) - k].sum() for w, k in zip(worths, policy.keep, strict=True))
        for policy in found
    ]
    most = sum(w.sum() - w.max() for w in worths)
    assert guessed[0] == 0
    assert np.allclose(guessed[1:], np.array(by_hand) / most, rtol=1e-4)
    assert foresee([]).loss is not None
    assert foresight_of(assembled.goals, table)(found).loss is None


def test_guesses_of_a_run_reach_its_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins: list[Beginning] = []

    def heard(*arguments: Any) -> Any:
        begins.append(arguments[-1])
        return algorithm_of(*arguments)

    monkeypatch.setattr(run, "algorithm_of", heard)
    few = {**FEW, "search.evaluations": 2, "search.baseline": 0}
    recipe = change_recipe(load_recipe("quickstart"), few, "a test")
    run.launch(recipe, tmp_path / "run", Heard())
    run.resume(tmp_path / "run", Heard(), evaluations=4)
    with Ledger.open(tmp_path / "run") as ledger:
        facts = read_facts(ledger)
    known = Beginning(seeds=facts.seeds, ranked=facts.ranked, losses=facts.losses)
    assert begins == [known, known]
    assert len(known.losses) == len(facts.groups)


def test_what_a_search_asks_for_depends_on_guesses() -> None:
    assembled = default()
    begins = ranked_by_channels(assembled)
    asked = []
    for known in (begins, replace(begins, losses=())):
        table = assembled.workload.plan.table
        algorithm = algorithm_of(assembled.recipe, assembled.space, assembled.goals, table, known)
        for _ in range(4):
            genomes = algorithm.ask()
            assert genomes is not None
            shares = table.shares_of(assembled.space.decode(genomes))["macs"]
            told = np.stack([1 - shares**2, shares], axis=1)
            algorithm.tell(told, np.zeros((len(told), 1)))
        asked.append(genomes)
    assert not np.array_equal(*asked)


def test_a_run_from_another_one_guesses_losses_and_begins_with_no_rankings(tmp_path: Path) -> None:
    few = {**FEW, "search.evaluations": 8, "search.baseline": 0}
    recipe = change_recipe(load_recipe("quickstart"), few, "a test")
    run.launch(recipe, tmp_path / "first", Heard())
    run.launch(recipe, tmp_path / "second", Heard(), seed_from=tmp_path / "first")
    facts = []
    for name in ("first", "second"):
        with Ledger.open(tmp_path / name) as ledger:
            facts.append(read_facts(ledger))
    assert facts[0].losses == facts[1].losses
    assert len(facts[0].losses) == len(facts[0].groups)
    assert facts[0].ranked
    assert not facts[0].seeds
    assert facts[1].seeds
    assert not facts[1].ranked


def test_a_run_from_another_one_never_fails_for_rankings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NetworkError("no gradients")

    few = {**FEW, "search.evaluations": 8, "search.baseline": 0}
    recipe = change_recipe(load_recipe("quickstart"), few, "a test")
    run.launch(recipe, tmp_path / "first", Heard())
    monkeypatch.setattr(run, "ranked_by_channels", fail)
    named = change_recipe(recipe, {"search.rankings": L1}, "a test")
    for number, (algorithm, said) in enumerate([("surrogate", True), ("nsga2", False)]):
        heard, out = Heard(), tmp_path / f"next-{number}"
        changed = change_recipe(named, {"search.algorithm": algorithm}, "a test")
        assert run.launch(changed, out, heard, seed_from=tmp_path / "first").outcome.finished
        told = "the search begins without rankings of channels: no gradients"
        assert (told in heard.said) == said
        assert ("ranking channels" in heard.said) == said


def test_ranking_alone_asks_for_all_rungs() -> None:
    assembled = made(search__algorithm="ranking", search__rankings=L1)
    found = policies(assembled)
    assert len(set(found)) == len(found) > 100


@pytest.mark.parametrize("algorithm", ["surrogate", "ranking"])
def test_no_rankings_are_none(algorithm: str) -> None:
    assembled = made(search__algorithm=algorithm, search__rankings=[])
    if algorithm == "ranking":
        with pytest.raises(ConfigError, match=r"ranking asks for search\.rankings, and there are"):
            ranked_by_channels(assembled)
    else:
        assert ranked_by_channels(assembled) == Beginning()


@pytest.mark.parametrize("algorithm", ["uniform", "ranking", "sensitivity"])
def test_what_has_no_first_population_takes_no_seeds(algorithm: str, tmp_path: Path) -> None:
    few = {**FEW, "search.algorithm": algorithm}
    recipe = change_recipe(load_recipe("quickstart"), few, "a test")
    with pytest.raises(ConfigError, match=f"{algorithm} takes no seeds; leave --seed-from out"):
        run.launch(recipe, tmp_path / "run", Heard(), seed_from=tmp_path / "other")
    assert not (tmp_path / "run").exists()


def test_blends_begin_with_pure_criteria_instead() -> None:
    space = {"name": "criterion-blend", "criteria": ["l1", "l2", "apoz"], "sparsity": [0.0, 0.9]}
    assembled = made(space=space, search__algorithm="nsga2")
    assert assembled.recipe.search.rankings == []


def test_networks_without_batch_norm_are_ranked_by_their_weights() -> None:
    assembled = made(network={"name": f"{__name__}:Bare"})
    names = [ranking.criterion for ranking in assembled.recipe.search.rankings or ()]
    assert names[0] == "weight-taylor"
    assert not any(name.startswith("bn-") for name in names)
    assert ranked_by_channels(assembled).ranked


def test_wrong_rankings_are_told_by_field() -> None:
    wrong = {"criterion": "beauty"}
    with pytest.raises(ConfigError, match=r"search\.rankings: no criterion 'beauty'; there are"):
        made(search__rankings=[wrong])
    with pytest.raises(ConfigError, match=r"search\.rankings: input should be a valid list"):
        load_recipe("quickstart", ["search.rankings=3"])
    sentence = "search.rankings.0.scale: input should be 'none', 'mean' or 'max', got 'sum'"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        made(search__rankings=[{"criterion": "l1", "scale": "sum"}])


def test_a_criterion_that_does_not_apply_is_named_with_the_group() -> None:
    named = [{"criterion": "bn-scale"}]
    assembled = made(network={"name": f"{__name__}:Bare"}, search__rankings=named)
    with pytest.raises(NetworkError, match=r"bn-scale needs a batch norm, and group \w+ has none"):
        ranked_by_channels(assembled)


def test_a_network_without_gradients_is_told() -> None:
    workload = default().workload
    module = workload.network().module
    module.register_forward_hook(lambda _module, _inputs, outputs: outputs.detach())
    samples = samples_of(workload.network(), workload.calibration, 64, "given")
    with pytest.raises(NetworkError, match="criteria that need gradients do not apply, as the net"):
        channel_scores(module, workload.plan, ["obd"], samples)


class Heard:
    """Watches a run, and remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, text: str) -> None:
        """A new phase has begun."""
        self.said.append(text)

    def landed(self, track: str, measurement: Measurement, count: int, budget: int) -> None:
        """A measurement landed."""


@pytest.mark.parametrize("error", [NetworkError, RuntimeError])
def test_rankings_that_nobody_named_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    said = {
        NetworkError: "no gradients",
        RuntimeError: "DefaultCPUAllocator: can't allocate memory",
    }[error]

    def fail(*_: object) -> None:
        raise error(said)

    monkeypatch.setattr(run, "ranked_by_channels", fail)
    heard = Heard()
    few = {"search.evaluations": 2, "search.baseline": 0}
    recipe = change_recipe(load_recipe("quickstart"), {**FEW, **few}, "a test")
    assert run.launch(recipe, tmp_path / "open", heard).outcome.finished
    assert f"the search begins without rankings of channels: {said}" in heard.said
    named = change_recipe(recipe, {"search.rankings": L1}, "a test")
    with pytest.raises(error, match=said):
        run.launch(named, tmp_path / "named", heard)
