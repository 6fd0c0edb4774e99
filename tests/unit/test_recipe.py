import tomllib
from pathlib import Path
from typing import Any

import pytest

from evosearch.errors import ConfigError
from evosearch.recipe import (
    Recipe,
    check_recipe,
    load_recipe,
    recipe_path,
    shipped_recipes,
)

MINIMAL = {"network": {"name": "resnet20"}}
FULL = """
title = "All of it"
[network]
name = "resnet20"
weights = "shipped:resnet20-cifar10"
num_classes = 7
arguments = {width = 3, deep = {er = [1, 2]}}
input_shape = [3, 32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[data]
name = "cifar10"
root = "/data"
download = true
test = "/data/test.npz"
held_out = 500
official_order = false
calibration = 10
validation = 20
seed = 1
[space]
name = "layer-sparsity"
sparsity = [0.1, 0.8]
project_onto = {macs = 0.5}
[search]
objectives = ["divergence"]
constraints = ["macs <= 0.5"]
algorithm = "de"
population = 8
evaluations = 30
seed = 2
seed_share = 1
baseline = 0
options = {f = 0.6}
[proxy]
name = "recalibrated"
criterion = "l1"
recalibrate = false
ridge = 0
batch_size = 4
[run]
workers = 0
timeout_s = 5
gpus_per_worker = 0.5
ray_address = "auto"
"""


def recipe(**changes: Any) -> Recipe:
    return check_recipe({**MINIMAL, **changes}, "recipe test")


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.toml"
    path.write_text('[network]\nname = "resnet20"\n')
    return str(path)


def test_defaults_need_a_network_only() -> None:
    found = recipe()
    assert (found.search.algorithm, found.search.population) == (None, None)  # settled at launch
    assert found.search.objectives == ["distortion", "macs"]
    assert (found.proxy.name, found.proxy.criterion) == ("reconstructed", "residual-energy")
    assert found.space == {"name": "layer-sparsity"}
    assert found.data.name == "cifar10-sample"


def test_recipe_without_a_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^recipe test: network: missing$"):
        check_recipe({}, "recipe test")


def test_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().search.population = 7


def test_recipes_do_not_share_their_defaults() -> None:
    recipe().search.objectives.append("params")
    recipe().space["sparsity"] = [0, 1]
    assert recipe().search.objectives == ["distortion", "macs"]
    assert recipe().space == {"name": "layer-sparsity"}


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("search", "population", "32"),
        ("search", "population", 32.0),
        ("search", "population", True),
        ("search", "population", 0),
        ("search", "evaluations", -1),
        ("search", "objectives", "error"),
        ("search", "objectives", []),
        ("search", "objectives", [1]),
        ("search", "seed_share", 1.01),
        ("search", "seed_share", float("nan")),
        ("search", "baseline", -1),
        ("data", "download", 1),
        ("data", "download", "yes"),
        ("data", "validation", 0),
        ("proxy", "recalibrate", 0),
        ("proxy", "ridge", -1e-9),
        ("proxy", "ridge", True),
        ("run", "timeout_s", 0),
        ("run", "workers", -1),
        ("network", "input_shape", [3, 32]),
        ("network", "input_shape", [3, 32, 0]),
        ("network", "std", [1.0, 0.0, 1.0]),
        ("network", "weights", 5),
    ],
)
def test_wrong_value_is_refused_by_its_name(table: str, key: str, value: Any) -> None:
    data = {**MINIMAL, table: {**MINIMAL.get(table, {}), key: value}}
    with pytest.raises(ConfigError, match=rf"^recipe test: {table}\.{key}"):
        check_recipe(data, "recipe test")


@pytest.mark.parametrize(("key", "value"), [("timeout_s", 5), ("gpus_per_worker", 1)])
def test_whole_number_is_good_enough_for_a_share(key: str, value: int) -> None:
    assert getattr(recipe(run={key: value}).run, key) == value


def test_refusal_shows_what_came() -> None:
    with pytest.raises(ConfigError, match=r"search\.population: .* valid integer, got '32'$"):
        recipe(search={"population": "32"})


def test_refusal_names_two_problems_and_counts_the_rest() -> None:
    bad = {"population": "a", "evaluations": "b", "seed": "c", "baseline": "d"}
    with pytest.raises(ConfigError, match=r"population.*; search\.evaluations.*; and 2 more$"):
        recipe(search=bad)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"serach": {}}, r"serach: unknown key; did you mean 'search'\?"),
        ({"search": {"populaton": 3}}, r"search\.populaton: .* did you mean 'population'\?"),
        ({"data": {"calibrations": 3}}, r"data\.calibrations: .* did you mean 'calibration'\?"),
        ({"proxy": {"criteria": ""}}, r"proxy\.criteria: .* did you mean 'criterion'\?"),
        ({"run": {"worker": 3}}, r"run\.worker: unknown key; did you mean 'workers'\?"),
        ({"network": {"name": "x", "wieghts": ""}}, r"network\.wieghts: .* 'weights'\?"),
        ({"run": {"zzz": 3}}, r"run\.zzz: unknown key; known are workers, timeout_s"),
        ({"zzz": 3}, r"zzz: unknown key; known are title, network, data"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_known(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        recipe(**data)


def test_space_is_layer_sparsity_unless_named() -> None:
    found = recipe(space={"sparsity": [0.0, 0.5]}).space
    assert found == {"name": "layer-sparsity", "sparsity": [0.0, 0.5]}


@pytest.mark.parametrize("name", [3, None, ["layer-sparsity"]])
def test_space_whose_name_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"space: name must be the name of a search space"):
        recipe(space={"name": name})


@pytest.mark.parametrize("table", ["network", "data", "search", "proxy", "run"])
def test_value_in_place_of_a_table_is_refused(table: str) -> None:
    with pytest.raises(ConfigError, match=rf"^recipe test: {table}: .*, got 5$"):
        check_recipe({**MINIMAL, table: 5}, "recipe test")


@pytest.mark.parametrize(
    ("setting", "table", "key", "value"),
    [
        ("search.population=48", "search", "population", 48),
        ("search.population = 48 ", "search", "population", 48),
        ("search.seed_share=0.25", "search", "seed_share", 0.25),
        ("proxy.ridge=1e-3", "proxy", "ridge", 1e-3),
        ("proxy.recalibrate=false", "proxy", "recalibrate", False),
        ("search.algorithm=gde3", "search", "algorithm", "gde3"),
        ('search.algorithm="gde3"', "search", "algorithm", "gde3"),
        ("proxy.criterion = residual-energy", "proxy", "criterion", "residual-energy"),
        ('search.objectives=["loss", "params"]', "search", "objectives", ["loss", "params"]),
        ('search.constraints=["macs <= 0.5"]', "search", "constraints", ["macs <= 0.5"]),
        ("search.options={f = 0.7}", "search", "options", {"f": 0.7}),
        ("search.options.f=0.7", "search", "options", {"f": 0.7}),
        ("proxy.criterion=", "proxy", "criterion", ""),
    ],
)
def test_setting_is_toml_or_a_bare_word(
    minimal: str, setting: str, table: str, key: str, value: Any
) -> None:
    assert getattr(getattr(load_recipe(minimal, [setting]), table), key) == value


def test_setting_reaches_the_options_of_a_space(minimal: str) -> None:
    found = load_recipe(minimal, ["space.name=mine", "space.project_onto.macs=0.5"])
    assert found.space == {"name": "mine", "project_onto": {"macs": 0.5}}


def test_bare_word_may_hold_an_equals_sign(minimal: str) -> None:
    assert load_recipe(minimal, ["title=a=b"]).title == "a=b"


def test_later_setting_wins(minimal: str) -> None:
    settings = ["search.seed=1", "search.seed=2"]
    assert load_recipe(minimal, settings).search.seed == 2


@pytest.mark.parametrize("setting", ["", "search.population", "=5", "  = 5", "population 5"])
def test_setting_that_is_no_pair_is_refused(minimal: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"must read key=value, such as search\.population=48"):
        load_recipe(minimal, [setting])


def test_setting_below_a_value_is_refused(minimal: str) -> None:
    with pytest.raises(ConfigError, match=r"--set network\.name\.x: network\.name is no table"):
        load_recipe(minimal, ["network.name.x=1"])


def test_setting_with_an_unknown_key_gets_a_hint(minimal: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.populaton: .* did you mean 'population'\?"):
        load_recipe(minimal, ["search.populaton=3"])


def test_overrides_beat_settings_and_none_is_no_override(minimal: str) -> None:
    overrides = {"search.seed": 3, "search.evaluations": None, "run.workers": 0}
    found = load_recipe(minimal, ["search.seed=2", "search.evaluations=9"], overrides)
    assert (found.search.seed, found.search.evaluations, found.run.workers) == (3, 9, 0)


def test_paths_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("w.safetensors", "net.py", "train.npz", "test.npz"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.py").touch()
    path = tmp_path / "r.toml"
    path.write_text(
        '[network]\nname = "net.py:make"\nweights = "w.safetensors"\n'
        '[data]\nname = "train.npz"\ntest = "test.npz"\nroot = "images"\n'
        '[search]\nrankings = [{ criterion = "mine.py:oddness" }, { criterion = "l1" }]\n'
    )
    found = load_recipe(str(path))
    assert found.network.name == f"{tmp_path / 'net.py'}:make"
    assert found.network.weights == str(tmp_path / "w.safetensors")
    assert found.data.name == str(tmp_path / "train.npz")
    assert (found.data.test, found.data.root) == (str(tmp_path / "test.npz"), f"{tmp_path}/images")
    named = [ranking.criterion for ranking in found.search.rankings or ()]
    assert named == [f"{tmp_path / 'mine.py'}:oddness", "l1"]


def test_a_colon_in_a_folder_s_name_divides_nothing(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "net.py").touch()
    path = tmp_path / "r.toml"
    path.write_text('[network]\nname = "a:b/net.py:make"\n[proxy]\ncriterion = "a:b/net.py:odd"\n')
    found = load_recipe(str(path))
    assert found.network.name == f"{tmp_path / 'a:b' / 'net.py'}:make"
    assert found.proxy.criterion == f"{tmp_path / 'a:b' / 'net.py'}:odd"


def test_paths_that_are_not_beside_the_recipe_start_where_the_command_runs(
    minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = load_recipe(minimal, ["network.weights=w.safetensors"])
    assert found.network.weights == str(elsewhere / "w.safetensors")


def test_absolute_and_shipped_and_plain_names_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "full.toml"
    path.write_text(FULL)
    found = load_recipe(str(path))
    assert found.network.weights == "shipped:resnet20-cifar10"
    assert (found.network.name, found.data.name) == ("resnet20", "cifar10")
    assert (found.data.root, found.data.test) == ("/data", "/data/test.npz")


IRRELEVANT = {"title", "run", "data.root", "data.download", "search.evaluations"}
RELEVANT = {
    "network.name": "resnet56",
    "network.weights": "w",
    "network.num_classes": 3,
    "network.arguments": {"a": 1},
    "network.input_shape": [1, 2, 3],
    "network.mean": [0.1],
    "network.std": [0.1],
    "network.crop_padding": 4,
    "network.flip": True,
    "data.name": "mnist",
    "data.test": "t.npz",
    "data.held_out": 3,
    "data.official_order": True,
    "data.calibration": 3,
    "data.validation": 3,
    "data.check": 7,
    "data.mirrored": True,
    "data.seed": 3,
    "space.name": "other",
    "space.sparsity": [0.0, 0.5],
    "latency.images": 8,
    "latency.threads": 2,
    "latency.measure": "mine:clock",
    "search.objectives": ["macs", "error"],
    "search.constraints": ["macs <= 0.5"],
    "search.algorithm": "gde3",
    "search.population": 3,
    "search.seed": 3,
    "search.seed_share": 0.3,
    "search.baseline": 3,
    "search.racing": 0.1,
    "search.rankings": [{"criterion": "l1", "scale": "none", "power": 0.0}],
    "search.overlap": True,
    "search.options": {"f": 1.0},
    "proxy.name": "raw",
    "proxy.criterion": "l1",
    "proxy.coupling": "max",
    "proxy.labels": "own",
    "proxy.recalibrate": False,
    "proxy.ridge": 0.3,
    "proxy.batch_size": 3,
    "proxy.calibration_batch": 3,
    "proxy.precision": "float32",
    "proxy.recalibration_images": 3,
    "proxy.reconstruction_images": 3,
    "proxy.reconstruction_ridge": 0.5,
    "proxy.distillation_steps": 3,
    "proxy.distillation_lr": 0.5,
    "proxy.reconstruction_layers": "cut",
}


def changed(dotted: str, value: Any) -> Recipe:
    table, _, key = dotted.partition(".")
    data: dict[str, Any] = {**MINIMAL}
    data[table] = {**data.get(table, {}), key: value} if key else value
    return check_recipe(data, "recipe test")


@pytest.mark.parametrize("dotted", RELEVANT)
def test_digest_sees_what_decides_results(dotted: str) -> None:
    assert changed(dotted, RELEVANT[dotted]).digest() != recipe().digest()


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("title", "other"),
        ("run", {"workers": 7, "timeout_s": 1.0, "ray_address": "x"}),
        ("search.evaluations", 7),
        ("data.root", "/elsewhere"),
        ("data.download", True),
    ],
)
def test_digest_overlooks_what_does_not(dotted: str, value: Any) -> None:
    assert changed(dotted, value).digest() == recipe().digest()


def test_every_field_is_known_to_decide_results_or_not() -> None:
    tables = recipe().model_dump()
    fields = {
        f"{table}.{key}" if isinstance(content, dict) and table not in ("run", "space") else table
        for table, content in tables.items()
        for key in (content if isinstance(content, dict) else [""])
    }
    known = IRRELEVANT | {key for key in RELEVANT if not key.startswith("space.")} | {"space"}
    assert fields == known


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = recipe(search={"seed": 1, "population": 8}, space={"name": "a", "x": 1})
    other = recipe(space={"x": 1, "name": "a"}, search={"population": 8, "seed": 1})
    assert one.digest() == other.digest()


@pytest.mark.parametrize("text", [FULL, '[network]\nname = "resnet20"\n'])
def test_toml_gives_the_recipe_back(text: str) -> None:
    first = check_recipe(tomllib.loads(text), "first")
    again = check_recipe(tomllib.loads(first.to_toml()), "again")
    assert again == first
    assert again.digest() == first.digest()


@pytest.mark.parametrize("title", ['say "hi"', "a\nb", "\\", "ümläut → \U0001f600", "tab\t"])
def test_toml_keeps_any_title(title: str) -> None:
    assert tomllib.loads(recipe(title=title).to_toml())["title"] == title


def test_toml_shows_every_default() -> None:
    shown = tomllib.loads(recipe().to_toml())
    assert shown["search"]["evaluations"] == 300
    assert shown["proxy"]["ridge"] == 1e-4
    assert shown["run"]["workers"] == 2


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).title


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no recipe 'quikstart': neither a file nor .*quickstart"
    ):
        load_recipe("quikstart")


def test_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        recipe_path(str(tmp_path))


def test_invalid_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[network]\nname = resnet20\n")
    with pytest.raises(ConfigError, match=r"recipe .*bad\.toml is not TOML: .*line 2"):
        load_recipe(str(path))


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe .*bad\.toml cannot be read: .*utf-8"):
        load_recipe(str(path))
