from pathlib import Path

import numpy as np
import pytest

from evosearch.data import open_source
from evosearch.errors import ConfigError
from evosearch.fidelity.study import Options, _distinct
from evosearch.fidelity.truth import Truth
from evosearch.fidelity.variants import VARIANTS, choose, known_variants, parse_variant
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.recipe import Recipe, change_recipe, load_recipe
from evosearch.scoring.proxies import PROXIES
from evosearch.training import TrainSettings, top1, train
from evosearch.training.finetune import evaluate, finetune


def test_a_truth_without_keys_is_one_epoch() -> None:
    assert Truth.parse("finetune") == Truth.parse("finetune:epochs=1") == Truth()


def test_a_truth_may_set_everything() -> None:
    text = "finetune: epochs=3, lr=0.02,batch=64,seeds=2,fraction=0.5,precision=fp32"
    told = {"epochs": 3, "lr": 0.02, "batch": 64, "fraction": 0.5, "precision": "fp32"}
    assert Truth.parse(text) == Truth(**told, seeds=2)
    # More repetitions of the same truth continue a study; anything else is another truth.
    assert Truth.parse(text).settings() == told
    guided = Truth.parse(f"{text},distillation=0.9")
    assert guided.settings() == {**told, "distillation": 0.9}


@pytest.mark.parametrize("good", ["bfloat16", "float32"])
def test_fine_tuning_is_in_bfloat16_only_where_the_hardware_is(
    good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"amx_bf16": good == "bfloat16"}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: flags, raising=False)
    settled = Truth().settled(gpu=False)
    assert settled.settings()["precision"] == {"bfloat16": "bf16", "float32": "fp32"}[good]
    # What was asked for is what is done, wherever.
    for name in ("bf16", "fp32"):
        assert Truth(precision=name).settled(gpu=False).precision == name


def test_fine_tuning_starts_from_the_recipe_or_from_a_variant_that_is_named() -> None:
    own = "mine:proxy.name=compensated,proxy.recalibrate=false"
    variants = choose("raw", (own,))
    for text, changes in (
        ("finetune", {}),
        ("finetune:start=recalibrated-l1", {"proxy.name": "recalibrated", "proxy.criterion": "l1"}),
        ("finetune:start=mine", {"proxy.name": "compensated", "proxy.recalibrate": False}),
    ):
        assert Options(truth=Truth.parse(text), variants=variants).start().changes == changes
    with pytest.raises(ConfigError, match=r"--truth: start=l1 names no .* raw-l1.*, mine"):
        Options(truth=Truth(start="l1"), variants=variants)


def test_variants_that_want_more_images_than_there_are_are_named_before_anything_is_scored() -> (
    None
):
    recipe = load_recipe("quickstart")
    many = parse_variant("many:data.validation=3000,proxy.name=raw")
    with pytest.raises(
        ConfigError, match=r"many wants data\.validation = 3000, .* --proxies raw-l1"
    ):
        _distinct({"raw-l1": VARIANTS["raw-l1"], "many": many[1]}, recipe)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("finetune:epochs=1,epochs=2", "epochs is given twice"),
        ("", "must read like"),
        ("train:epochs=1", "must read like"),
        ("finetune:epoch=1", "unknown key 'epoch'; there are epochs, lr"),
        ("finetune:epochs", "epochs is a whole number, got 'epochs'"),
        ("finetune:epochs=1.5", "epochs is a whole number, got 'epochs=1.5'"),
        ("finetune:epochs=0", "epochs is at least 1, got 0"),
        ("finetune:lr=0", "lr is more than 0"),
        ("finetune:lr=nan", "lr is more than 0"),
        ("finetune:fraction=1.5", "fraction is more than 0, at most 1"),
        ("finetune:precision=fp8", "precision is bf16, fp32 or auto"),
        ("finetune:batch=1", "batch is at least 2"),
        ("finetune:seeds=0", "seeds is at least 1"),
    ],
)
def test_a_wrong_truth_is_refused_with_a_sentence(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"--truth.*{told}"):
        Truth.parse(text)


@pytest.mark.parametrize("name", known_variants())
def test_every_variant_is_a_possible_recipe(name: str) -> None:
    variant = known_variants()[name]
    recipe = change_recipe(
        Recipe.model_validate({"network": {"name": "resnet20"}}), variant.changes, name
    )
    assert recipe.proxy.name in PROXIES
    assert variant.title


def test_every_proxy_takes_part_without_being_named() -> None:
    assert PROXIES.keys() | VARIANTS.keys() == choose("all", ()).keys()


def test_variants_are_chosen_by_name_in_order() -> None:
    assert list(choose("raw-l1, recalibrated", ())) == ["raw-l1", "recalibrated"]


def test_a_variant_of_ones_own_joins_those_that_are_named() -> None:
    own = "mine:proxy.name=compensated,proxy.recalibrate=false,data.calibration=50"
    chosen = choose("raw", (own,))
    assert list(chosen) == ["raw", "mine"]
    assert chosen["mine"].changes == {
        "proxy.name": "compensated",
        "proxy.recalibrate": False,
        "data.calibration": 50,
    }


@pytest.mark.parametrize("text", ["", "mine", "mine:", ":proxy.name=raw"])
def test_a_variant_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must read like"):
        parse_variant(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raw:proxy.name=raw", "there is a variant 'raw' already"),
        ("all:proxy.name=raw", "there is a variant 'all' already"),
        ("mine:search.population=3", "search.population is no key of proxy or data"),
        ("mine:proxy=raw", "proxy is no key of proxy or data"),
        ("mine:proxy.name", "must read key=value"),
    ],
)
def test_an_impossible_variant_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_variant(text)


def test_an_unknown_variant_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no proxy variant 'nwot'; there are recipe, raw-l1"):
        choose("raw,nwot", ())
    with pytest.raises(ConfigError, match="names no variant"):
        choose(",", ())


def test_too_few_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="--policies 4: at least 5"):
        Options(policies=4)


@pytest.fixture
def small() -> Network:
    path = Path(__file__).parents[1] / "integration" / "tiny.py"
    return load_network(NetworkSpec(name=f"{path}:Tiny"), (32, 32, 3))


def test_fine_tuning_learns_and_repeats(small: Network) -> None:
    images = open_source("cifar10-sample").training().take(np.arange(256))
    settings = TrainSettings(epochs=2, batch_size=64, lr=0.05, warmup_epochs=0.0)
    before = {key: value.clone() for key, value in small.module.state_dict().items()}
    start = evaluate(small, images)["loss"]
    numbers = []
    for _ in range(2):
        small.module.load_state_dict(before)
        finetune(small, images, settings)
        assert not small.module.training
        numbers.append(evaluate(small, images))
    assert numbers[0] == numbers[1]
    assert numbers[0]["loss"] < start


def test_fine_tuning_without_a_warm_up_is_training_without_a_warm_up(small: Network) -> None:
    images = open_source("cifar10-sample").training().take(np.arange(128))
    settings = TrainSettings(epochs=2, batch_size=64, warmup_epochs=0.0)
    before = {key: value.clone() for key, value in small.module.state_dict().items()}
    train(small, images, images, settings)
    trained = {key: value.clone() for key, value in small.module.state_dict().items()}
    small.module.load_state_dict(before)
    # Frozen parameters, as a scorer's network may have, are trained all the same.
    small.module.requires_grad_(requires_grad=False)
    finetune(small, images, settings)
    assert all((trained[k] == v).all() for k, v in small.module.state_dict().items())
    assert evaluate(small, images)["error"] == pytest.approx(1 - top1(small, images))
