"""Names become objects that fit together, or a sentence says which field does not."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evosearch.assembly import Assembled, assemble
from evosearch.errors import BudgetUnreachable, ConfigError, DataError, NetworkError
from evosearch.networks import NetworkSpec, load_network, save_weights
from evosearch.profiling import profile, profile_lines
from evosearch.recipe import check_recipe

Made = Callable[..., Assembled]


class Net(nn.Module):
    """One convolution with a bias that can be made to favour a class."""

    def __init__(self, num_classes: int = 10, favour: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, 4, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, num_classes)
        with torch.no_grad():
            self.head.bias[0] += favour

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def recipe(**tables: dict[str, Any]) -> Any:
    data: dict[str, Any] = {
        "network": {"name": f"{__name__}:Net"},
        "data": {"calibration": 64, "validation": 64},
        "proxy": {"name": "raw", "criterion": "l1"},
        "run": {"workers": 0},
    }
    for name, table in tables.items():
        data[name] = {**data.get(name, {}), **table}
    return check_recipe(data, "a test")


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "few.npz"
    pixels = rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(300) % 10)
    return path


def test_sizes_left_open_are_what_there_is_and_are_written_down(few_images: Path) -> None:
    unsaid = {"name": str(few_images), "calibration": None, "validation": None}
    assembled = assemble(recipe(data=unsaid))
    data = assembled.recipe.data
    assert (data.calibration, data.validation) == (270, 30)
    assert len(assembled.workload.calibration) == 270
    assert check_recipe(assembled.facts()["recipe"], "the ledger").data == data


@pytest.mark.parametrize(
    ("search", "space", "workers", "settled"),
    [
        ({}, {}, 0, ("surrogate", 8)),
        ({}, {}, 12, ("surrogate", 12)),
        ({"population": 5}, {}, 12, ("surrogate", 5)),
        ({"algorithm": "nsga2"}, {}, 12, ("nsga2", 32)),
        # Genes of blends have no levels to move by.
        ({}, {"name": "criterion-blend", "criteria": ["l1", "l2"]}, 0, ("nsga2", 32)),
    ],
)
def test_how_to_search_is_settled_by_the_space_and_written_down(
    search: dict[str, Any], space: dict[str, Any], workers: int, settled: tuple[str, int]
) -> None:
    found = assemble(recipe(search=search, space=space, run={"workers": workers})).recipe.search
    assert (found.algorithm, found.population) == settled


def test_a_size_that_was_named_is_meant(few_images: Path) -> None:
    with pytest.raises(DataError, match=r"data.validation = 31: wanted 31 images of the 30"):
        assemble(recipe(data={"name": str(few_images), "validation": 31}))


def test_a_part_without_images_is_named(tmp_path: Path) -> None:
    path = tmp_path / "five.npz"
    np.savez(path, images=np.zeros((5, 8, 8, 3), np.uint8), labels=np.arange(5))
    with pytest.raises(DataError, match=r"data.validation: .*five.npz has no image for it"):
        assemble(recipe(data={"name": str(path), "calibration": None, "validation": None}))


@pytest.mark.parametrize(
    ("space", "constraint", "reach"),
    [
        ({"project_onto": {"macs": 0.5}}, "macs <= 0.4", r"macs can be 0.\d+ to 0.5000"),
        ({"project_onto": {"params": 0.6}}, "params <= 0.3", r"params can be 0.\d+ to 0.\d+"),
        ({"sparsity": [0.0, 0.5]}, "macs <= 0.3", r"macs can be 0.5\d* to 1.0000"),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(
    space: dict[str, Any], constraint: str, reach: str
) -> None:
    with pytest.raises(BudgetUnreachable, match=rf"{constraint} is out of reach; .*{reach}"):
        assemble(recipe(space=space, search={"constraints": [constraint]}))


def test_a_projection_below_a_constraint_is_fine() -> None:
    space, search = {"project_onto": {"macs": 0.5}}, {"constraints": ["macs <= 0.6"]}
    assembled = assemble(recipe(space=space, search=search))
    assert [str(c) for c in assembled.goals.constraints] == ["macs <= 0.6"]


@pytest.mark.parametrize("space", [{"round_to": 1000}, {"sparsity": [0.5, 0.5]}])
def test_a_space_of_one_policy_is_refused(space: dict[str, Any]) -> None:
    ((option, value),) = space.items()
    with pytest.raises(ConfigError, match=re.escape(f"space: {option} = {value} leaves every")):
        assemble(recipe(space=space))


@pytest.mark.parametrize(("field", "value"), [("name", "oracle"), ("criterion", "beauty")])
def test_a_wrong_name_says_in_which_field_it_is(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"proxy.{field}: no .*'{value}'; there are"):
        assemble(recipe(proxy={field: value}))


def test_a_network_that_guesses_is_doubted() -> None:
    guessing = assemble(recipe(network={"arguments": {"favour": 100.0}}))
    doubt, *_ = guessing.doubts()
    assert "is right on 10.9% of the validation images, and guessing on 10.0%" in doubt


def test_a_network_that_knows_its_images_is_not_doubted() -> None:
    trained = {"name": "resnet20", "weights": "shipped:resnet20-cifar10"}
    assert assemble(recipe(network=trained)).doubts() == []


@pytest.mark.parametrize("able", [False, True])
def test_a_precision_that_the_machine_only_emulates_is_doubted(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run is resumed on another machine."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": able}, raising=False)
    trained = {"name": "resnet20", "weights": "shipped:resnet20-cifar10"}
    for precision, doubted in (("bfloat16", not able), ("float32", False)):
        doubts = assemble(recipe(network=trained, proxy={"precision": precision})).doubts()
        assert [doubt.split(",")[0] for doubt in doubts] == (
            ["proxy.precision is bfloat16"] if doubted else []
        )


def test_few_images_are_doubted_where_distortion_is_that_of_outputs() -> None:
    *_, said = assemble(recipe()).doubts()
    assert said.startswith("64 validation images are few for distortion, which")
    assert len(assemble(recipe(data={"validation": 256})).doubts()) == 1
    assert len(assemble(recipe(search={"objectives": ["error", "macs"]})).doubts()) == 1
    trained = {"name": "resnet20", "weights": "shipped:resnet20-cifar10"}
    assert assemble(recipe(network=trained)).doubts() == []


def test_bounds_that_always_hold_are_doubted() -> None:
    bounds = ["macs <= 50", "params <= 0.5", "error <= 2"]
    doubts = assemble(recipe(search={"constraints": bounds})).doubts()
    said = [doubt for doubt in doubts if "search.constraints" in doubt]
    assert said == [
        "warning: search.constraints: macs <= 50 always holds, as macs is a share of the dense "
        "network's"
    ]


def test_profile_shows_what_is_done_to_images() -> None:
    plain = recipe(
        network={"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.24, 0.26]},
        latency={"measure": f"{__name__}:seconds_by_weights"},
    )
    lines = "\n".join(profile_lines(plain, profile(plain)))
    assert "images      64 for calibration, 64 for validation, of cifar10-sample" in lines
    assert "mean 0.5, 0.4, 0.3; std 0.25, 0.24, 0.26" in lines
    assert "search      minimises distortion and macs: surrogate, 8 at a time" in lines
    assert "images were neither cropped nor mirrored" in lines
    assert "warning: the dense network is right on" in lines


def test_profile_shows_the_costs_that_a_projection_leaves() -> None:
    by_weights = {"measure": f"{__name__}:seconds_by_weights"}
    found = profile(recipe(space={"project_onto": {"macs": 0.5}}, latency=by_weights))
    assert 0.4 < found.lowest["macs"] <= found.highest["macs"] <= 0.5


def test_profile_of_a_long_search_tells_what_would_be_quicker() -> None:
    by_weights = {"measure": f"{__name__}:seconds_by_weights"}

    def told(objectives: Sequence[str], evaluations: int, **data: int) -> str | None:
        wanted = {"objectives": list(objectives), "evaluations": evaluations}
        proxy = {"name": "reconstructed"}
        asked = recipe(search=wanted, latency=by_weights, data=data, proxy=proxy)
        return profile(asked).quicker

    layers = "--set proxy.reconstruction_images=64 --set proxy.reconstruction_layers=cut"
    distortion = ("distortion", "macs")
    # Outputs stand for the last maps of this network, which takes more images.
    assert told(distortion, 10**7, validation=300) == f"--set data.validation=256 {layers}"
    assert told(distortion, 10**7, validation=64) == layers
    assert told(distortion, 20) is None
    assert told(("error", "macs"), 10**7) is None


def test_profile_tells_how_fast_the_network_can_become() -> None:
    found = profile(recipe())
    assert 0 < found.lowest["latency"] < found.highest["latency"] == 1
    lines = "\n".join(profile_lines(recipe(), found))
    assert "timed       1 image at a time: the dense network takes" in lines


def seconds_by_weights(module: nn.Module, images: torch.Tensor) -> float:
    return 1e-6 * len(images) * sum(p.numel() for p in module.parameters() if p.ndim > 1)


def forgetful(_module: nn.Module, _images: torch.Tensor) -> None:
    """Prints what it measured."""


def never(_module: nn.Module, _images: torch.Tensor) -> float:
    raise RuntimeError("no device")


def timed(name: str, **tables: dict[str, Any]) -> Any:
    search = {"objectives": ["error", "latency"], **tables.pop("search", {})}
    return recipe(latency={"measure": f"{__name__}:{name}", "images": 2}, search=search, **tables)


def test_an_own_stopwatch_decides_latency() -> None:
    table = assemble(timed("seconds_by_weights")).workload.plan.table
    assert table.latency is not None
    keep = np.arange(1, 17)[:, None]
    weights = 27 * keep + 10 * keep  # of the convolution, of the head
    np.testing.assert_allclose(table.latency.shares(keep), weights[:, 0] / (37 * 16), atol=1e-6)
    assert table.latency.dense_seconds == pytest.approx(2e-6 * 37 * 16)
    # It was written down, and is not measured again.
    again = assemble(timed("never"), latency=table.latency).workload.plan.table
    assert again.latency == table.latency


def test_latency_is_timed_only_where_it_is_wanted() -> None:
    unwanted = recipe(latency={"measure": f"{__name__}:never"})
    assert assemble(unwanted).workload.plan.table.latency is None
    for wanted in (
        timed("never"),
        timed("never", search={"objectives": ["error"], "constraints": ["latency <= 0.9"]}),
        timed("never", search={"objectives": ["error"]}, space={"project_onto": {"latency": 0.5}}),
    ):
        with pytest.raises(ConfigError, match=r"latency\.measure failed with .*no device"):
            assemble(wanted)


def test_a_budget_of_time_is_spent() -> None:
    budget = {"project_onto": {"latency": 0.5}}
    found = assemble(timed("seconds_by_weights", space=budget))
    policies = found.space.decode(np.random.default_rng(0).random((8, found.space.n_genes)))
    assert {policy.keep for policy in policies} == {(8,)}
    with pytest.raises(BudgetUnreachable, match=r"latency = 0\.01 is out of reach: .* 0\.1250 to"):
        assemble(timed("seconds_by_weights", space={"project_onto": {"latency": 0.01}}))


@pytest.mark.parametrize(
    ("measure", "sentence"),
    [
        ("nobody", "name your own function as module:function"),
        ("evosearch:nobody", "evosearch has no function or class .nobody"),
        ("nowhere.py:clock", r"latency\.measure = .* file .*nowhere\.py does not exist"),
        (f"{__name__}:Made", r"latency\.measure failed with TypeError"),
        (f"{__name__}:recipe_text", "is no function, but a str"),
        (f"{__name__}:instant", r"must return seconds above 0, got 0\.0"),
        (f"{__name__}:forgetful", r"must return seconds above 0, got None"),
    ],
)
def test_a_wrong_stopwatch_is_refused_by_its_field(measure: str, sentence: str) -> None:
    search = {"objectives": ["error", "latency"]}
    with pytest.raises(ConfigError, match=sentence):
        assemble(recipe(latency={"measure": measure}, search=search))


def moody(module: nn.Module, images: torch.Tensor) -> float:
    generator = np.random.default_rng(module.conv.out_channels)
    return seconds_by_weights(module, images) * float(generator.uniform(0.5, 1.5))


def test_a_latency_that_is_badly_foreseen_is_told() -> None:
    (said,) = (text for text in assemble(timed("moody")).doubts() if "latency" in text)
    assert "if the machine was busy while passes were timed" in said
    assert not [
        text for text in assemble(timed("seconds_by_weights")).doubts() if "latency" in text
    ]


def liking_eights(module: nn.Module, images: torch.Tensor) -> float:
    return seconds_by_weights(module, images) * (1 + module.conv.out_channels % 8)


@pytest.mark.parametrize("given", [{}, {"round_to": 1}, {"round_to": 8}])
def test_widths_suit_the_clock_where_the_recipe_leaves_them_open(given: dict[str, int]) -> None:
    recipe = timed("liking_eights")
    changed = recipe.model_copy(update={"space": {**recipe.space, **given}})
    made = assemble(changed, settles_widths=True)
    said = [text for text in made.doubts() if "multiples of 8" in text]
    assert made.recipe.space["round_to"] == given.get("round_to", 8)
    keep = made.space.decode(np.random.default_rng(0).random((20, made.space.n_genes)))
    kept_to = all(width % 8 == 0 for policy in keep for width in policy.keep)
    assert kept_to == (made.recipe.space["round_to"] == 8)
    if given == {}:
        assert said[0].startswith("widths are kept to multiples of 8 (space.round_to): with one")
        assert made.workload.plan.table.latency is not None
        assert made.workload.plan.table.latency.error < 0.05
    elif given == {"round_to": 1}:
        assert said[0].startswith("warning: with one channel less in each group, a network of")
        assert said[0].endswith("within its bounds, set space.round_to to 8")
    else:
        assert said == []


def test_widths_stay_free_where_the_clock_does_not_mind() -> None:
    assert assemble(timed("seconds_by_weights"), settles_widths=True).recipe.space["round_to"] == 1
    # A study of proxies is bound to its settings, and must not hang on a clock.
    assert "round_to" not in assemble(timed("liking_eights")).recipe.space


FREE_ALONE: list[dict[str, Any]] = [
    {"space": {"sparsity": [0.55, 0.7]}},  # in eights, a single width
    {"search": {"objectives": ["error", "latency"], "constraints": ["macs <= 0.3"]}},
    {"space": {"project_onto": {"macs": 0.3}}},
    {"space": {"project_onto": {"latency": 0.3}}},
    {"search": {"objectives": ["error"], "constraints": ["latency <= 0.3"]}},
]


@pytest.mark.parametrize("changes", FREE_ALONE, ids=str)
def test_what_multiples_of_eight_cannot_reach_is_searched_all_the_same(
    changes: dict[str, Any],
) -> None:
    made = assemble(timed("liking_eights", **changes), settles_widths=True)
    assert "round_to" not in made.recipe.space
    (said,) = (text for text in made.doubts() if "multiples of 8" in text)
    assert said.endswith(
        "has policies in multiples of 8 within its bounds, set space.round_to to 8"
    )
    found = made.space.decode(np.random.default_rng(0).random((8, made.space.n_genes)))
    assert any(policy.keep[0] % 8 for policy in found)


recipe_text = "no function"


def instant(_module: nn.Module, _images: torch.Tensor) -> float:
    return 0.0


def test_own_networks_are_not_mirrored_unless_they_say_so() -> None:
    spec = NetworkSpec(name=f"{__name__}:Net")
    assert load_network(spec, (16, 16, 3)).input.flip is False
    asked = NetworkSpec(name=f"{__name__}:Net", flip=True)
    assert load_network(asked, (16, 16, 3)).input.flip is True


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["conv.weight", "norm.running_var"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, tensor: str, value: float) -> None:
    net = Net()
    net.state_dict()[tensor].view(-1)[3] = value
    path = tmp_path / "burst.safetensors"
    save_weights(path, net, {})
    with pytest.raises(NetworkError, match=rf"burst.safetensors: {tensor} holds 1 values .*finite"):
        load_network(NetworkSpec(name=f"{__name__}:Net", weights=str(path)))


class Masked(Net):
    """Has a mask, which holds infinities on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))


def test_a_mask_may_be_infinite() -> None:
    assert load_network(NetworkSpec(name=f"{__name__}:Masked")).module.mask.isinf().all()


def test_a_network_without_parameters_has_nothing_to_prune() -> None:
    with pytest.raises(NetworkError, match=r"'torch.nn:Flatten' has no parameters.*to prune"):
        load_network(NetworkSpec(name="torch.nn:Flatten"))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"space": {"project_onto": {"latency": 0.5}, "sparsty": 0.5}}, "sparsty"),
        ({"search": {"algorithm": "nsga3"}}, "nsga3"),
        ({"search": {"algorithm": "de"}}, "de"),
        ({"proxy": {"criterion": "nonsense"}}, "nonsense"),
        ({"search": {"constraints": ["macs <= 0.0001"]}}, "macs"),
    ],
)
def test_a_wrong_word_is_told_before_anything_is_timed(tables: dict[str, Any], said: str) -> None:
    # The stopwatch fails at its first use.
    with pytest.raises((ConfigError, BudgetUnreachable), match=said) as refused:
        assemble(timed("never", **tables))
    assert "no device" not in str(refused.value)
