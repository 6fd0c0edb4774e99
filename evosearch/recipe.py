"""A search as a file: TOML in, a checked and frozen Recipe out.

Everything after this module trusts what it finds in a Recipe. The digest covers all that decides
results; budget, workers, title and the place of the data may change between launch and resume (the
ledger knows the images by their digest).
"""

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from evosearch.errors import ConfigError

__all__ = [
    "RANKINGS",
    "DataRecipe",
    "LatencyRecipe",
    "NetworkRecipe",
    "ProxyRecipe",
    "RankingRecipe",
    "Recipe",
    "RunRecipe",
    "SearchRecipe",
    "Table",
    "change_recipe",
    "check_recipe",
    "explain",
    "load_recipe",
    "parse_setting",
    "recipe_of",
    "recipe_path",
    "shipped_recipes",
]

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Table(BaseModel):
    """A table of a recipe: what every one of them, a space's options too, is checked by."""

    # Strict: a number given as text or a 1 given for true is a mistake, not a wish.
    # The sentence under a key is what `evosearch list settings` shows.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class NetworkRecipe(Table):
    """`[network]`: what is pruned."""

    name: str
    """Built-in name, torchvision model, `module:factory` or `path/to/file.py:factory`."""
    weights: str | None = None
    """Path to safetensors or a state dict, or `shipped:NAME`."""
    num_classes: Count = 10
    """Width of the classifier."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a torchvision model or of your factory."""
    input_shape: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    """Channels, height, width; from the network's description if left out."""
    mean: list[float] | None = None
    """Per channel, subtracted from pixels / 255; from the weights file if left out."""
    std: list[Positive] | None = None
    """Per channel, what the difference is divided by; likewise."""
    crop_padding: Annotated[int, Field(ge=0)] | None = None
    """Padding of the random crops it was trained on; calibration images are cropped alike."""
    flip: bool | None = None
    """Whether it was trained on mirrored images, too; likewise."""


class DataRecipe(Table):
    """`[data]`: on which images."""

    name: str = "cifar10-sample"
    """A data set, or a path to an `.npz` with images (n, h, w, c) uint8 and labels."""
    root: str = "data"
    """Folder of torchvision's files or of an image folder."""
    download: bool = False
    """Let torchvision fetch what is missing."""
    test: str | None = None
    """Test images of an `.npz` source; a search never opens them."""
    held_out: Count | None = None
    """Images never trained on; a tenth of the training part if left out."""
    official_order: bool | None = None
    """Whether the order is already random: then the last images are held out."""
    calibration: Count | None = None
    """Images for batch norm and Gram matrices, from the training part; 1000, or all there are."""
    validation: Count | None = None
    """Images that metrics are measured on, from the held-out part; 2000, or all there are."""
    check: Annotated[int, Field(ge=0)] | None = None
    """More of the held-out part, on which the front is measured once more; as many if left out."""
    mirrored: bool = False
    """Measure on each held-out image and on its mirror image: less noise where images are few."""
    seed: Seed = 0
    """Seed of these choices."""


class RankingRecipe(Table):
    """One of `search.rankings`: a score for all channels, and one threshold on it."""

    criterion: str
    """See `evosearch list criteria`, or your own as `module:function`."""
    scale: Literal["none", "mean", "max"] = "max"
    """What each group's scores are divided by: nothing, their mean, or the largest of them."""
    power: Annotated[float, Field(ge=0)] = 1.0
    """Scores are then divided by this power of what a channel saves; 0 ignores that."""


RANKINGS = (
    RankingRecipe(criterion="bn-taylor", scale="none"),
    RankingRecipe(criterion="weight-taylor", scale="none"),
    RankingRecipe(criterion="fermat", power=0.0),
    RankingRecipe(criterion="activation-mean", scale="mean", power=0.5),
    RankingRecipe(criterion="obd", scale="mean"),
    RankingRecipe(criterion="l2", power=0.0),
    RankingRecipe(criterion="bn-scale", scale="none", power=0.5),
)
"""What a search begins with where a recipe names none, the best first (docs/searching.md)."""


class SearchRecipe(Table):
    """`[search]`: what is minimised, how, and for how long."""

    objectives: Annotated[list[str], Field(min_length=1)] = ["distortion", "macs"]
    """Any of distortion, error, loss, margin, divergence, macs, params, latency."""
    constraints: list[str] = []
    """NAME <= NUMBER, with the same names, such as "macs <= 0.5"; all must hold."""
    algorithm: str | None = None
    """surrogate, de, nsga2, gde3, nsde, level-switch, random, uniform, ranking or sensitivity; if
    left out, surrogate where genes have levels, nsga2 elsewhere, and settled at launch."""
    population: Count | None = None
    """Genomes per generation; if left out, 8 for surrogate, or one per worker if those are more; 32
    for all others."""
    evaluations: Count = 300
    """Distinct policies to measure; duplicates and unaffordable ones are free."""
    seed: Seed = 0
    """Seed of the search."""
    seed_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the first population that rankings and uniform ratios may fill."""
    rankings: list[RankingRecipe] | None = None
    """What policies that are known without a search are asked first: those that one threshold on a
    score of all channels leaves. Tables of `criterion`, `scale` (none, mean or max: what a group's
    scores are divided by; max if left out) and `power` (of what a channel saves, by which they are
    divided then; 1). A front begins along the first, a budget with one policy of each; [] for none.
    If left out, those that benchmarks found best, none where criteria are blended."""
    baseline: Annotated[int, Field(ge=0)] = 32
    """Uniform ratios measured beside the search, for comparison; 0 for none."""
    racing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Chance that a candidate which nothing dominates is dropped early; 0 shows it all images."""
    overlap: bool = False
    """Ask for the next generation while the last candidates of one are measured; for clusters."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the algorithm, as below."""


class ProxyRecipe(Table):
    """`[proxy]`: how a policy is scored."""

    name: str = "reconstructed"
    """See `evosearch list proxies`."""
    criterion: str = "residual-energy"
    """Which channels go first: `evosearch list criteria`, or your own as `module:function`."""
    coupling: Literal["mean", "max", "sum"] = "mean"
    """What a group with several producers, norms or consumers gets of their scores."""
    labels: Literal["given", "own"] = "given"
    """What criteria with a loss go by: labels given, or classes drawn from the dense outputs."""
    recalibrate: bool = True
    """Whether `compensated` re-estimates batch norm after folding."""
    ridge: Annotated[float, Field(ge=0)] = 1e-4
    """Load on the Gram matrix, as a share of its mean diagonal."""
    recalibration_images: Count | None = None
    """The first so many calibration images recalibrate; all of them if left out."""
    reconstruction_images: Count = 256
    """The first so many calibration images fit the layers (`reconstructed`)."""
    reconstruction_layers: Literal["cut", "all"] = "all"
    """Fit every layer, or those that lost inputs; the others are left alone."""
    reconstruction_ridge: Annotated[float, Field(ge=0)] = 0.1
    """How strongly fitted weights are held where they were, as a share of the Gram matrix."""
    distillation_steps: Count = 20
    """Steps of `distilled`, each on one batch of calibration images."""
    distillation_lr: Positive = 0.01
    """Learning rate of the first of them; it falls to zero."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes; auto is bfloat16 where the hardware has it, and settled at launch."""
    batch_size: Count | None = None
    """Images per forward pass; 128 if left out, 1024 on a GPU, and down to a 16th of that where
    images are larger than 32x32; settled at launch."""
    calibration_batch: Count | None = None
    """At least so many calibration images per forward pass: batch norm is recalibrated on batches,
    and steps of distillation are taken on them. `batch_size` if left out, but 32 where neither is
    named and that is less."""


class LatencyRecipe(Table):
    """`[latency]`: what is timed at launch, where a latency is to be minimised or held."""

    images: Count = 1
    """Images per forward pass."""
    threads: Count = 1
    """CPU threads of a forward pass."""
    measure: str | None = None
    """`pytorch`, float32 on this CPU, if left out; `onnxruntime`, likewise; or your own stopwatch,
    `module:function` or `path/to/file.py:function`: from a network and images to seconds."""


class RunRecipe(Table):
    """`[run]`: where and how patiently.

    Nothing of it decides results, but that GPUs settle a precision and a batch size left open.
    """

    workers: Annotated[int, Field(ge=0)] = 2
    """Scorers on Ray, one thread each; 0 scores in the process."""
    timeout_s: Positive = 600.0
    """Longest that one candidate may take, with workers; then it is recorded as failed."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """Share of a GPU for each scorer."""
    ray_address: str | None = None
    """Join this cluster instead of starting one."""


class Recipe(Table):
    """A whole recipe."""

    title: str = ""
    """One line for people."""
    network: NetworkRecipe
    data: DataRecipe = DataRecipe()
    space: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """`name` of a search space, and its options."""
    search: SearchRecipe = SearchRecipe()
    proxy: ProxyRecipe = ProxyRecipe()
    latency: LatencyRecipe = LatencyRecipe()
    run: RunRecipe = RunRecipe()

    @field_validator("space")
    @classmethod
    def _named(cls, space: dict[str, Any]) -> dict[str, Any]:
        space = {"name": "layer-sparsity", **space}
        if not isinstance(space["name"], str):
            raise ValueError(  # noqa: TRY004  pydantic collects ValueErrors
                "name must be the name of a search space"
            )
        return space

    def results_key(self) -> dict[str, Any]:
        """All that decides results, as plain data."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude={"title", "run"})
        del data["search"]["evaluations"], data["data"]["root"], data["data"]["download"]
        return data

    def digest(self) -> str:
        """SHA-256 of `results_key`."""
        text = json.dumps(self.results_key(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_toml(self) -> str:
        """The recipe with every default written out."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _known_keys(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Keys of the table in which an error happened."""
    for part in location:
        field = model.model_fields.get(str(part))
        options = [field.annotation, *get_args(field.annotation)] if field else []
        tables = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not tables:
            break
        model = tables[0]
    return list(model.model_fields)


def _sentence(error: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    location = error["loc"]
    where = ".".join([*([prefix] if prefix else []), *(str(part) for part in location)])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = error["input"]
    shown = "" if isinstance(given, dict | list) else f", got {given!r}"
    return f"{where}: {message}{shown}" if where else message


def explain(exc: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for people: the first two problems, each with its field and the way out."""
    errors = exc.errors(include_url=False, include_context=False)
    sentences = [_sentence(error, model, prefix) for error in errors[:2]]
    if len(errors) > 2:
        sentences.append(f"and {len(errors) - 2} more")
    return "; ".join(sentences)


def _shipped() -> Path:
    return Path(str(resources.files("search_spaces") / "recipes"))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with evosearch."""
    return sorted(path.stem for path in _shipped().glob("*.toml"))


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe: a shipped name, or a path.

    Raises:
        ConfigError: There is neither.
    """
    if name_or_path in shipped_recipes():
        return _shipped() / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no recipe {name_or_path!r}: neither a file nor one of {', '.join(shipped_recipes())}"
        )
    return path


def parse_setting(setting: str, option: str = "--set") -> tuple[str, Any]:
    """Reads `key=value`: a dotted key, and a TOML value or a bare word.

    Raises:
        ConfigError: The text has another form; names the option it came with.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{option} {setting!r} must read key=value, such as search.population=48")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    return key.strip(), value


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for depth, key in enumerate(keys[:-1]):
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {dotted}: {'.'.join(keys[: depth + 1])} is no table")
        data = inner
    data[keys[-1]] = value


def _absolute_paths(data: dict[str, Any], folder: Path) -> None:
    """Resolves relative paths against the recipe's folder, so that a run can move."""
    network, images = data.get("network"), data.setdefault("data", {})
    if isinstance(network, dict):
        for key in ("weights", "name"):
            value = network.get(key)
            if not isinstance(value, str) or value.startswith("shipped:"):
                continue
            if key == "weights" or _is_own_file(value):
                network[key] = _from(folder, value)
    if isinstance(images, dict):
        images.setdefault("root", "data")
        for key in ("root", "test", "name"):
            value = images.get(key)
            if isinstance(value, str) and (key != "name" or value.endswith(".npz")):
                images[key] = _from(folder, value)
    _absolute_own_files(data, folder)


def _absolute_own_files(data: dict[str, Any], folder: Path) -> None:
    """Resolves the files of a user's own functions likewise."""
    search = data.get("search")
    rankings = search.get("rankings") if isinstance(search, dict) else None
    tables = [(data.get("proxy"), "criterion"), (data.get("latency"), "measure")]
    if isinstance(rankings, list):
        tables += [(ranking, "criterion") for ranking in rankings]
    for table, key in tables:
        if isinstance(table, dict) and _is_own_file(table.get(key)):
            table[key] = _from(folder, table[key])
    space = data.get("space")
    if isinstance(space, dict) and isinstance(space.get("criteria"), list):
        space["criteria"] = [_from(folder, v) if _is_own_file(v) else v for v in space["criteria"]]


def _is_own_file(value: object) -> bool:
    return isinstance(value, str) and value.rpartition(":")[0].endswith(".py")


def _from(folder: Path, value: str) -> str:
    path = Path(value).expanduser()
    file = Path(value.rpartition(":")[0]) if _is_own_file(value) else path
    beside = (folder.absolute() / file.expanduser()).exists()
    # What is not beside the recipe was typed on the command line: relative to where that runs.
    return str((folder.absolute() if beside else Path.cwd()) / path)


def load_recipe(
    name_or_path: str,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: A shipped name or a TOML file. Relative paths in it are looked for beside
            it, then in the working directory.
        settings: `key=value` with dotted keys; values are TOML, bare words are strings.
        overrides: Dotted keys to values; None is skipped.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong; names the field.
    """
    path = recipe_path(name_or_path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"recipe {path} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"recipe {path} is not TOML: {exc}") from exc
    for dotted, value in map(parse_setting, settings):
        _assign(data, dotted, value)
    return _checked(data, overrides, path.parent, f"recipe {name_or_path}")


def recipe_of(data: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Checks what a recipe's file would say.

    Args:
        data: Nested tables. Relative paths in it are looked for in the working directory.
        overrides: Dotted keys to values; None is skipped.

    Raises:
        ConfigError: Something in it is wrong; names the field.
    """
    return _checked(copy.deepcopy(dict(data)), overrides, Path.cwd(), "recipe")


def _checked(
    data: dict[str, Any], overrides: Mapping[str, Any] | None, folder: Path, origin: str
) -> Recipe:
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _assign(data, dotted, value)
    _absolute_paths(data, folder)
    return check_recipe(data, origin)


def check_recipe(data: Mapping[str, Any], origin: str) -> Recipe:
    """Checks plain data.

    Raises:
        ConfigError: Something is wrong; names the origin and the field.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        raise ConfigError(f"{origin}: {explain(exc, Recipe)}") from exc


def change_recipe(recipe: Recipe, changes: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe with other values under some dotted keys.

    Raises:
        ConfigError: A key or a value is wrong; names the origin and the field.
    """
    data: dict[str, Any] = recipe.model_dump(mode="json")
    for dotted, value in changes.items():
        _assign(data, dotted, value)
    return check_recipe(data, origin)
