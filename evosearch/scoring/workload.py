"""All that a scorer needs, as plain data: made once, sent to every worker.

Everything heavy is a numpy array, which Ray's object store shares between workers without a copy.
Channel order, Gram matrices and the dense network's outputs are computed here, once, so that all
workers cut and compare alike, whatever machine they run on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.data import Images, check_classes
from evosearch.errors import NetworkError, first_line
from evosearch.networks import InputSpec, Network, NetworkSpec, build_module, plain, put_state
from evosearch.networks.threads import on_threads
from evosearch.pruning.blending import Blends, comparable, places_of
from evosearch.pruning.criteria import Samples, channel_scores, criterion_named
from evosearch.pruning.cutting import Cutter, CuttingPlan
from evosearch.pruning.folding import FastCopy, Layout, layout_of
from evosearch.pruning.patches import Moments, patch_moments
from evosearch.pruning.statistics import gram_matrices
from evosearch.pruning.targets import Target, targets_of
from evosearch.scoring.features import Features, FeatureTap, feature_layer
from evosearch.scoring.proxies import ProxySettings, proxy_named

__all__ = [
    "DTYPES",
    "Workload",
    "batches",
    "dense_error",
    "logits",
    "prepare_workload",
    "samples_of",
    "settled_batch_size",
    "settled_calibration_batch",
    "settled_precision",
    "with_validation",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Flags of processors that multiply in bfloat16 rather than pretend to.
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Batch norm that is recalibrated on 32 images at a time ends as with 128; on 8 it does not.
_LEAST_TOGETHER = 32
# Places of each feature map that are fitted: neighbours tell much the same.
TARGET_POSITIONS = 16
# Far more than rounding does to a sound network, far less than a cut does.
_MAX_ROUNDING = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A network, its images, and what was computed from them once.

    Args:
        spec: How to make the network; its weights are in `state`.
        input: Shape and normalisation of its images.
        state: The network's tensors by name.
        plan: How it is cut.
        settings: The proxy.
        calibration: Images for statistics.
        validation: Images that metrics are measured on.
        layout: Which norms can be folded, and which layer is the last.
        places: `(n_channels,)` place of each flat channel in its group's order, 0 = kept longest.
        blends: Criteria that policies may blend, if any.
        grams: Second moments by consumer; empty if the proxy does without.
        moments: Of the patches that consumers read; likewise.
        targets: What the dense layers return for the first calibration images; likewise.
        teacher: `(n_calibration, n_classes)` float32 outputs of the dense network; empty likewise.
        dense_logits: `(n_validation, n_classes)` float32 outputs of the dense network.
        features: Of the dense network, for the same images.
        rounding: Mean divergence that the precision alone brings to the dense network, in nats.
    """

    spec: NetworkSpec
    input: InputSpec
    state: Mapping[str, NDArray[np.generic]]
    plan: CuttingPlan
    settings: ProxySettings
    calibration: Images
    validation: Images
    layout: Layout
    places: NDArray[np.int64]
    blends: Blends | None = None
    grams: Mapping[str, NDArray[np.float64]]
    moments: Mapping[str, Moments]
    targets: Mapping[str, Target]
    teacher: NDArray[np.float32]
    dense_logits: NDArray[np.float32]
    features: Features
    rounding: float = 0.0

    def network(self) -> Network:
        """The dense network, made anew from its description and its tensors."""
        module = plain(build_module(self.spec)[0].eval())
        put_state(module, {k: torch.from_numpy(np.array(v)) for k, v in self.state.items()})
        return Network(spec=self.spec, module=module, input=self.input)


def batches(
    network: Network, images: Images, size: int, *, at_least: bool = False, device: str = "cpu"
) -> Iterator[Tensor]:
    """Normalised images in parts of equal size.

    Args:
        network: Says how to normalise.
        images: In their order.
        size: Images per part.
        at_least: Make fewer, larger parts rather than one that is smaller than `size`.
        device: Where they are wanted.

    Yields:
        `(n, channels, height, width)` float32 in channels-last order.
    """
    count = len(images) // size if at_least else -(-len(images) // size)
    for part in np.array_split(images.pixels, max(1, count)):
        yield network.normalise(part, device)


@torch.inference_mode()
def logits(
    module: nn.Module, inputs: Iterable[Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`(n, n_classes)` float32 outputs of a network in evaluation mode, on the CPU.

    Args:
        module: Says by its tensors on which device it runs.
        inputs: Normalised batches.
        dtype: What the network takes.
    """
    device = next(module.parameters()).device
    return torch.cat([module(batch.to(device, dtype)).float() for batch in inputs]).cpu()


def settled_precision(wish: str, *, gpu: bool = False) -> str:
    """`auto` becomes `bfloat16` where the hardware computes in it, `float32` elsewhere."""
    if wish != "auto":
        return wish
    if gpu:
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float32"
    # Older versions of torch do not tell.
    flags: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if any(flags.get(flag) for flag in _BFLOAT16_FLAGS) else "float32"


def settled_batch_size(wish: int | None, shape: tuple[int, ...], *, gpu: bool = False) -> int:
    """How many images run at once.

    With 128 of 32x32, maps of a CIFAR network still fit a core's caches; GPUs want work for
    thousands. Larger images come fewer at a time.

    Args:
        wish: What the recipe says, if anything.
        shape: Of an image: channels, height, width.
        gpu: Whether a GPU runs them.
    """
    most = 1024 if gpu else 128
    return wish or min(most, max(most // 16, most * 32 * 32 // (shape[1] * shape[2])))


def settled_calibration_batch(
    wish: int | None, batch_wish: int | None, batch_size: int
) -> int | None:
    """At least how many calibration images run at once; None for `batch_size`.

    Args:
        wish: What the recipe says, if anything.
        batch_wish: What it says of `batch_size`, which then holds for all images.
        batch_size: From `settled_batch_size`.
    """
    few = batch_wish is None and batch_size < _LEAST_TOGETHER
    return _LEAST_TOGETHER if wish is None and few else wish


def _dense_logits(
    network: Network, layout: Layout, precision: str, images: Iterable[Tensor]
) -> Tensor:
    fast = _dense_copy(network, layout, precision)
    return logits(fast.module, images, fast.dtype)


def _dense_answers(
    network: Network,
    layout: Layout,
    layer: str | None,
    images: Images,
    size: int,
    positions: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Features]:
    """Outputs and features of the dense network, in float32, of `size` images at a time."""
    fast = _dense_copy(network, layout, "float32")
    tap = FeatureTap(fast.module, layer, len(images), positions)
    outputs, features = [], []
    for batch in batches(network, images, size):
        outputs.append(logits(fast.module, [batch]))
        features.append(tap.take(outputs[-1]).cpu())
    values = torch.cat(features).numpy()
    return torch.cat(outputs), Features(layer=layer, positions=tap.positions, values=values)


def _feature_layer(network: Network, plan: CuttingPlan) -> str | None:
    """Where the features are: see `feature_layer`."""
    table = plan.table
    half = table.whole((table.channels + 1) // 2)
    narrow = Cutter(plan, network.module).cut(table.mask(half))
    producers = [group.producers for group in table.groups]
    return feature_layer(network.module, narrow, producers, network.example(2))


def _dense_copy(network: Network, layout: Layout, precision: str) -> FastCopy:
    fast = FastCopy(network.module, layout, DTYPES[precision])
    fast.update(network.module)
    return fast


def dense_error(workload: Workload) -> float:
    """Top-1 error of the dense network on the validation images."""
    return float((workload.dense_logits.argmax(axis=1) != workload.validation.labels).mean())


def with_validation(workload: Workload, validation: Images) -> Workload:
    """The same workload, measured on other images.

    Raises:
        NetworkError: The dense network's outputs for them are not finite, or a label is too large.
    """
    network = workload.network()
    with on_threads(1):
        known, size = workload.features, workload.settings.batch_size
        outputs, features = _dense_answers(
            network, workload.layout, known.layer, validation, size, known.positions
        )
    dense = outputs.numpy()
    _check_outputs(dense, validation)
    return replace(workload, validation=validation, dense_logits=dense, features=features)


def _check_outputs(dense: NDArray[np.float32], validation: Images) -> None:
    """Checks that the dense network's outputs are numbers, one for each class of the images.

    Raises:
        NetworkError: They are no numbers.
        DataError: There are fewer of them.
    """
    if not np.isfinite(dense).all():
        raise NetworkError("the dense network's outputs are not finite; check its weights")
    check_classes(validation.labels, dense.shape[1], "validation")


def _check_rounding(
    network: Network, layout: Layout, precision: str, images: Iterable[Tensor], exact: Tensor
) -> float:
    """Mean divergence that the precision alone brings to the dense network.

    Raises:
        NetworkError: The network does not bear it.
    """
    way_out = f"{network.spec.name} does not bear proxy.precision = {precision!r}"
    try:
        rounded = _dense_logits(network, layout, precision, images)
    except (RuntimeError, TypeError) as exc:
        raise NetworkError(f"{way_out} ({first_line(exc)}); set it to 'float32'") from exc
    found = divergence(exact, rounded)
    if not found <= _MAX_ROUNDING:
        raise NetworkError(f"{way_out} (divergence {found:.2g} uncut); set it to 'float32'")
    return found


def divergence(wanted: Tensor, outputs: Tensor) -> float:
    """Mean KL divergence of the classes' probabilities, in nats, from `(n, n_classes)` logits."""
    log_p, log_q = (F.log_softmax(t.double(), dim=1) for t in (wanted, outputs))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def samples_of(network: Network, calibration: Images, size: int, labels: str) -> Samples:
    """Calibration images as criteria want them.

    Args:
        network: Says how to normalise.
        calibration: The images.
        size: Images per batch, at least.
        labels: What a loss goes by: those `given`, or `own` for classes drawn from the outputs.
    """
    return Samples(
        batches=list(batches(network, calibration, size, at_least=True)),
        labels=torch.from_numpy(np.array(calibration.labels)),
        own_labels=labels == "own",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """What calibration images told about the dense network; see `Workload`."""

    samples: Samples | None
    grams: Mapping[str, NDArray[np.float64]]
    moments: Mapping[str, Moments]
    targets: Mapping[str, Target]
    teacher: NDArray[np.float32]


def _look_at(
    network: Network,
    plan: CuttingPlan,
    layout: Layout,
    settings: ProxySettings,
    calibration: Images,
    needs: Set[str],
) -> _Seen:
    """Collects what the proxy needs, and what criteria need, and nothing else."""
    proxy, size = proxy_named(settings.name), settings.together
    samples: Samples | None = None
    grams: Mapping[str, NDArray[np.float64]] = {}
    moments: Mapping[str, Moments] = {}
    targets: Mapping[str, Target] = {}
    teacher = np.empty((0, 0), dtype=np.float32)
    if proxy.needs_grams or proxy.needs_moments or needs:
        samples = samples_of(network, calibration, size, settings.labels)
        if proxy.needs_grams or "grams" in needs:
            grams = gram_matrices(network.module, plan, list(samples.batches))
        if proxy.needs_moments:
            moments = patch_moments(network.module, plan, list(samples.batches))
    if proxy.needs_targets:
        first = network.normalise(calibration.pixels[: settings.reconstruction_images])
        targets = targets_of(network.module, layout, first, TARGET_POSITIONS)
    if proxy.needs_teacher:
        shown = batches(network, calibration, size, at_least=True)
        teacher = _dense_logits(network, layout, "float32", shown).numpy()
    return _Seen(samples=samples, grams=grams, moments=moments, targets=targets, teacher=teacher)


def prepare_workload(
    network: Network,
    plan: CuttingPlan,
    settings: ProxySettings,
    calibration: Images,
    validation: Images,
    candidates: Sequence[str] = (),
    comparison: str = "rank",
) -> Workload:
    """Collects statistics and the dense network's outputs.

    Args:
        network: The dense network.
        plan: How it is cut.
        settings: The proxy.
        calibration: Images for statistics.
        validation: Images that metrics are measured on.
        candidates: Criteria that policies may blend.
        comparison: How their scores become comparable; see `comparable`.

    Raises:
        ConfigError: The proxy or the criterion is unknown.
        NetworkError: The criterion does not apply to the network, labels and classes disagree, the
            dense network gives infinite outputs, or does not bear the precision.
    """
    proxy = proxy_named(settings.name)
    with on_threads(1):
        layer = _feature_layer(network, plan)
        layout = replace(
            layout_of(network, watched=() if layer is None else (layer,)),
            blocks=tuple(block.name for block in plan.table.blocks),
        )
        size = settings.batch_size
        outputs, features = _dense_answers(network, layout, layer, validation, size)
        dense = outputs.numpy()
        _check_outputs(dense, validation)
        rounding = 0.0
        if settings.precision != "float32":
            shown = batches(network, validation, size)
            rounding = _check_rounding(network, layout, settings.precision, shown, outputs)
        names = list(dict.fromkeys([settings.criterion, *candidates]))
        needs = {need for name in names for need in criterion_named(name).needs} - {"norms"}
        seen = _look_at(network, plan, layout, settings, calibration, needs)
        scores = channel_scores(
            network.module, plan, names, seen.samples, seen.grams or None, settings.coupling
        )
    blends = None
    if candidates:
        rows = scores[[names.index(name) for name in candidates]]
        blends = Blends(names=tuple(candidates), scores=comparable(rows, plan.table, comparison))
    return Workload(
        spec=replace(network.spec, weights=None),
        input=network.input,
        state={k: v.detach().cpu().numpy().copy() for k, v in network.module.state_dict().items()},
        plan=plan,
        settings=settings,
        calibration=calibration,
        validation=validation,
        layout=layout,
        places=places_of(scores[0], plan.table),
        blends=blends,
        grams=seen.grams if proxy.needs_grams else {},
        moments=seen.moments,
        targets=seen.targets,
        teacher=seen.teacher,
        dense_logits=dense,
        features=features,
        rounding=rounding,
    )
