"""What a run was made from: read from its ledger in one checked piece, and compared with today.

A ledger keeps measurements of one network on certain images. Whoever scores more for it, or writes
a network by it, first makes sure that these are still the ones at hand.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evosearch.errors import ConfigError, ConfigMismatch, LedgerCorrupt
from evosearch.latency import LatencyModel
from evosearch.ledger import Ledger
from evosearch.measurement import METRICS
from evosearch.recipe import Recipe, explain, load_recipe

__all__ = ["RunFacts", "check_same", "read_facts"]

# Far more than another processor's rounding does, far less than another network does; relative to
# the largest output.
_TOLERANCE = 1e-4

Count = Annotated[int, Field(ge=1)]


class RunFacts(BaseModel):
    """What the ledger of a run says about it, measurements apart."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    recipe: Recipe
    """Nothing in it is left to be settled."""
    groups: tuple[tuple[str, Count], ...]
    """Name and channels of each group."""
    dense_macs: Count
    """Multiply-accumulates of the dense network."""
    dense_params: Count
    """Its parameters."""
    dense_error: float
    """Its top-1 error on the validation images."""
    check_dense_error: float | None = None
    """Its error on the check images; None until the front is measured there."""
    worst: dict[str, float]
    """Per metric, the value for outputs that say nothing."""
    outputs: tuple[tuple[float, ...], ...]
    """Some of the dense network's outputs, to tell it from others with the same tensors."""
    images: dict[str, str]
    """Digests of calibration, validation and check images."""
    weights: str
    """Digest of the dense network's tensors."""
    channel_order: str
    """Digest of the order in which channels of each group go."""
    criteria: dict[str, Any] | None = None
    """What a space of blends was told about criteria: names and clusters."""
    latency: LatencyModel | None = None
    """What foretells the time of a forward pass, if the recipe asked for that."""
    timed: dict[str, float] = {}
    """Shares of the dense network's time that the front's networks took, by policy's digest."""
    versions: dict[str, str]
    """Of the libraries at launch."""
    seeds: tuple[tuple[float, ...], ...]
    """Genomes that the first population was to hold."""
    ranked: tuple[tuple[float, ...], ...] = ()
    """Genomes that rankings of channels gave; none in runs from before there were any."""
    losses: tuple[tuple[float, ...], ...] = ()
    """By group and kept channels, what the first ranking has it lose; none in older runs."""
    resumed_on_gpus: float = 0.0
    """Share of one for each scorer, where the run was resumed on GPUs."""
    resumed_with_workers: int | None = None
    """As many scored since the run was last resumed; None if it never was."""
    evaluations: Count
    """The budget: distinct policies to measure."""
    state: Literal["running", "interrupted", "finished"]
    """As its process left it."""
    reason: str = ""
    """Why the search ended."""

    @property
    def gpus_per_worker(self) -> float:
        """Share of a GPU for each scorer, of those that measured what was measured on one."""
        return self.recipe.run.gpus_per_worker or self.resumed_on_gpus

    @property
    def criteria_names(self) -> tuple[str, ...]:
        """Criteria that blends choose from; none in other spaces."""
        return tuple((self.criteria or {}).get("names", ()))

    @field_validator("worst")
    @classmethod
    def _all_metrics(cls, worst: dict[str, float]) -> dict[str, float]:
        if missing := sorted(METRICS.keys() - worst.keys()):
            raise ValueError(f"{', '.join(missing)} missing")
        return worst


def read_facts(ledger: Ledger) -> RunFacts:
    """Reads the facts of a run, also while it is being searched.

    Where a file of the recipe is gone, the run's recipe.toml may say where it is now.

    Raises:
        LedgerCorrupt: One is missing or cannot be; names the file and the fact.
    """
    found = {}
    for name in RunFacts.model_fields:
        try:
            found[name] = ledger.meta(name)
        except KeyError:
            continue  # what is missing and needed is named below
    try:
        facts = RunFacts.model_validate_json(json.dumps(found))
        return facts.model_copy(update={"recipe": _moved(facts.recipe, ledger.path.parent)})
    except ValidationError as exc:
        raise LedgerCorrupt(
            f"{ledger.path} is damaged or from another version of evosearch "
            f"({explain(exc, RunFacts)}); restore it from a copy, or launch anew with another --out"
        ) from exc


def _moved(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with files where the run's recipe.toml says that they were moved to.

    That they are the same files is checked by what is in them.
    """
    try:
        written = load_recipe(str(run / "recipe.toml")).model_dump(mode="json")
    except ConfigError:  # of which resuming tells
        return recipe
    before = recipe.model_dump(mode="json")
    after = _followed(before, written)
    return recipe if after == before else Recipe.model_validate(after)


def _followed(then: Any, now: Any) -> Any:
    """Plain data with paths that are gone replaced by those of the same name that are there."""
    if isinstance(then, dict) and isinstance(now, dict):
        return {key: _followed(value, now.get(key)) for key, value in then.items()}
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [_followed(*pair) for pair in zip(then, now, strict=True)]
    if not isinstance(then, str) or not isinstance(now, str) or Path(then).name != Path(now).name:
        return then
    return now if _there(now) and not _there(then) else then


def _there(path: str) -> bool:
    """Whether a file, perhaps with a name in it, or a folder is there."""
    file, python, _ = path.rpartition(".py:")
    place = Path(f"{file}.py" if python else path)
    return place.is_absolute() and place.exists()


def check_same(recorded: RunFacts, now: Mapping[str, Any], run: Path) -> None:
    """Checks that network and images are the ones that were measured.

    Outputs are compared, too: the code that makes a network may change while its tensors do not.

    Args:
        recorded: From the ledger.
        now: The same facts of what is at hand.
        run: Directory of the run, for the message.

    Raises:
        ConfigMismatch: They are not; names what changed and the libraries then and now.
    """
    then = recorded.model_dump(mode="json")
    here = json.loads(json.dumps(dict(now)))
    for key, what, tolerance in (
        ("weights", "the network's weights", 0.0),
        ("images", "the images", 0.0),
        ("groups", "the network's groups", 0.0),
        ("dense_macs", "how the network's MACs are counted", 0.0),
        # On another processor a tie may fall the other way, for an image or so.
        ("dense_error", "the dense network's error", max(_TOLERANCE, _one_image(recorded))),
        ("outputs", "what the dense network puts out", _TOLERANCE),
        ("worst", "how sure the dense network is", _TOLERANCE),
        ("criteria", "clusters of criteria", 0.0),
        ("channel_order", "the order in which channels go", 0.0),
    ):
        if not _equal(then[key], here[key], tolerance):
            raise ConfigMismatch(
                f"{what} changed since {run} was launched ({key}: {_short(then[key])} then, "
                f"{_short(here[key])} now; {_libraries(recorded.versions, now['versions'])}); put "
                "back what it was launched with, or launch a new run"
            )


def _one_image(recorded: RunFacts) -> float:
    images = recorded.recipe.data.validation
    return 1.5 / images if images else 0.0


def _equal(then: Any, now: Any, tolerance: float) -> bool:
    if not tolerance:
        return bool(then == now)
    first, second = _numbers(then), _numbers(now)
    # Outputs have any scale, metrics have theirs.
    scale = max(map(abs, first), default=0.0) if isinstance(then, list) else 1.0
    bound = tolerance * scale
    return len(first) == len(second) and all(
        abs(a - b) <= bound for a, b in zip(first, second, strict=True)
    )


def _numbers(value: Any) -> list[float]:
    """All numbers of a fact, in order."""
    if isinstance(value, dict):
        return [value[key] for key in sorted(value)]
    return [number for row in value for number in row] if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _libraries(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Versions that differ, then and now; or which all are the same."""
    changed = [
        f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    same = ", ".join(f"{name} {version}" for name, version in sorted(then.items()))
    return f"libraries: {'; '.join(changed) or f'{same} then and now'}"
