"""Criteria by name: built in, registered by packages as `evosearch.criteria`, or a user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from torch import Tensor

from evosearch.errors import ConfigError
from evosearch.networks.own import import_own, importing
from evosearch.pruning.criteria import excitation, gradients, maps, residual, weights
from evosearch.pruning.criteria.evidence import NEEDS
from evosearch.pruning.criteria.view import GroupView

__all__ = ["CRITERIA", "Criterion", "criterion_named", "known_criteria"]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A named criterion.

    Args:
        title: One line for people.
        score: Maps a view to `(n_channels,)`, larger = more important.
        needs: What it reads beside weights: `grams`, kinds of evidence, `norms` for a batch norm
            with a scale in every group.
        control: Whether it is a control, left out where all criteria are meant.
    """

    title: str
    score: Callable[[GroupView], Tensor]
    needs: tuple[str, ...] = ()
    control: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.needs) - NEEDS - {"norms"}
        if unknown:
            raise ConfigError(
                f"a criterion cannot need {sorted(unknown)[0]!r}; there are "
                f"{', '.join(sorted({*NEEDS, 'norms'}))}"
            )


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(title="L1 norm of the filter", score=weights.l1),
    "l2": Criterion(title="L2 norm of the filter", score=weights.l2),
    "consumer-l2": Criterion(
        title="L2 norm of the weights that read the channel (FastNAS)", score=weights.consumer_l2
    ),
    "fpgm": Criterion(title="distance to the other filters of the layer", score=weights.fpgm),
    "fermat": Criterion(title="distance to the filters' geometric median", score=weights.fermat),
    "bn-scale": Criterion(
        title="absolute batch-norm scale", score=weights.bn_scale, needs=("norms",)
    ),
    "bn-taylor": Criterion(
        title="first-order change of the loss, of the batch norm's output",
        score=gradients.bn_taylor,
        needs=("norms", "norm-product"),
    ),
    "weight-taylor": Criterion(
        title="first-order change of the loss, of the filter",
        score=gradients.weight_taylor,
        needs=("weight-product",),
    ),
    "obd": Criterion(
        title="second-order change of the loss, by the Fisher information's diagonal",
        score=gradients.obd,
        needs=("weight-curvature",),
    ),
    "activation-mean": Criterion(
        title="mean absolute activation", score=maps.activation_mean, needs=("size",)
    ),
    "apoz": Criterion(
        title="share of activations that are not zero", score=maps.apoz, needs=("active",)
    ),
    "activation-entropy": Criterion(
        title="entropy of the mean activation over images",
        score=maps.activation_entropy,
        needs=("pooled",),
    ),
    "feature-rank": Criterion(
        title="rank of the feature map (HRank)", score=maps.feature_rank, needs=("rank",)
    ),
    "channel-independence": Criterion(
        title="fall of the maps' nuclear norm without the channel (CHIP)",
        score=maps.channel_independence,
        needs=("independence",),
    ),
    "residual-energy": Criterion(
        title="greedy removal by compensated residual energy of the consumers",
        score=residual.residual_energy,
        needs=("grams",),
    ),
    "output-variance": Criterion(
        title="greedy removal by the variance that the consumers' outputs lose",
        score=residual.output_variance,
        needs=("grams", "pooled"),
    ),
    "excitation": Criterion(
        title="squeeze-excitation gates trained on the frozen network (UCP, reconstructed)",
        score=excitation.excitation,
        needs=("excitation",),
    ),
    "random": Criterion(title="random numbers (a control)", score=weights.coin, control=True),
}


@cache
def known_criteria() -> Mapping[str, EntryPoint]:
    """Criteria that packages register, by name.

    Raises:
        ConfigError: Two packages register one name, or one that is built in.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="evosearch.criteria"):
        other = found.get(point.name)
        if point.name in CRITERIA or (other is not None and other.value != point.value):
            origin = "evosearch itself" if other is None else other.value
            raise ConfigError(
                f"criterion {point.name!r} of {point.value} is registered by {origin}, too; "
                "uninstall one"
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def _loaded(name: str) -> object:
    if name in known_criteria():
        return known_criteria()[name].load()
    return import_own(name)


def criterion_named(name: str) -> Criterion:
    """Looks a criterion up: built in, registered, `module:function` or `path/to/file.py:function`.

    What is found may be a function of a GroupView, or a Criterion, which can say what it needs.

    Raises:
        ConfigError: There is none of that name, or importing it failed.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if name not in known_criteria() and ":" not in name:
        raise ConfigError(
            f"no criterion {name!r}; there are {', '.join([*CRITERIA, *known_criteria()])}, or "
            "your own as module:function or path/to/file.py:function"
        )
    with importing(f"criterion {name!r}"):
        found = _loaded(name)
    if isinstance(found, Criterion):
        return found
    if not callable(found):
        raise ConfigError(f"criterion {name!r} is no function, but a {type(found).__name__}")
    title = (found.__doc__ or name).strip().splitlines()[0]
    return Criterion(title=title, score=found)
