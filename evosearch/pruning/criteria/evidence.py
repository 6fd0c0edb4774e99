"""Collects what criteria need to know from calibration images, in one pass for all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.data import check_classes
from evosearch.errors import NetworkError, first_line, out_of_memory
from evosearch.pruning.criteria.excitation import train_excitations
from evosearch.pruning.criteria.gradients import NORM_GRADIENTS, WEIGHT_GRADIENTS
from evosearch.pruning.criteria.maps import LOOKS
from evosearch.pruning.criteria.view import Evidence
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.hooks import first_input
from evosearch.pruning.layers import Norm
from evosearch.pruning.statistics import Units, units_of

__all__ = ["LABELLED", "NEEDS", "Samples", "collect"]

LABELLED = frozenset({*WEIGHT_GRADIENTS, *NORM_GRADIENTS, "excitation"})
"""Kinds of evidence that need a loss."""
NEEDS = frozenset({"grams", *LOOKS}) | LABELLED
"""All kinds of evidence."""

# Gradients are taken of small batches: more of them, and nearer to those of single images.
_BATCH = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Images to learn from.

    Args:
        batches: Normalised images, each `(n, channels, height, width)`.
        labels: `(total,)` int64, in the order of the batches; None if there are none.
        own_labels: Take classes drawn from the network's own outputs in place of labels.
    """

    batches: Sequence[Tensor]
    labels: Tensor | None = None
    own_labels: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether a loss can be computed."""
        return self.own_labels or self.labels is not None


def _as_maps(module: nn.Module, units: Units, x: Tensor) -> Tensor:
    """The input of a consumer as `(n, n_units, height, width)`.

    Maps that were flattened into features are taken to be as square as their size allows.
    """
    if isinstance(module, nn.Linear):
        x = x.movedim(-1, 1)
    if units.order.shape[1] == 1 and x.ndim == 4:
        return x
    flat = units.gather(x)
    height = next(h for h in range(int(flat.shape[2] ** 0.5), 0, -1) if flat.shape[2] % h == 0)
    return flat.reshape(*flat.shape[:2], height, -1)


class _Watch:
    """Summarises what one consumer reads."""

    def __init__(self, units: Units, kinds: Sequence[str]) -> None:
        self._units = units
        self.found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        maps = _as_maps(module, self._units, first_input(inputs, named).detach())
        # Decompositions raise on what is not finite; here it marks the channel.
        lost = ~torch.isfinite(maps).all(dim=3).all(dim=2)
        maps = maps.nan_to_num()
        for kind, rows in self.found.items():
            look = LOOKS[kind]
            left = len(maps) if look.images is None else look.images - sum(map(len, rows))
            if left > 0:
                told = look.summarise(maps[:left]).double()
                rows.append(told.masked_fill(lost[:left], torch.nan).cpu())


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets gradients reach parameters that a user has frozen."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row, drawn from the softmax."""
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


class _Gradients:
    """Adds up what gradients of batches say about producers and norms."""

    def __init__(self, module: nn.Module, plan: CuttingPlan, kinds: Set[str]) -> None:
        layers = dict(module.named_modules())
        producers = sorted({name for group in plan.table.groups for name in group.producers})
        norms = [
            entry.name
            for entry in plan.cuts
            if isinstance(layers[entry.name], Norm) and layers[entry.name].affine
        ]
        self._tensors: dict[str, list[nn.Parameter]] = {}
        if kinds & WEIGHT_GRADIENTS.keys():
            self._tensors |= {name: [layers[name].weight] for name in producers}
        if kinds & NORM_GRADIENTS.keys():
            self._tensors |= {name: [layers[name].weight, layers[name].bias] for name in norms}
        self.parameters = [tensor for tensors in self._tensors.values() for tensor in tensors]
        self._functions: dict[str, tuple[list[str], Callable[..., Tensor]]] = {}
        for names, functions in ((producers, WEIGHT_GRADIENTS), (norms, NORM_GRADIENTS)):
            self._functions |= {k: (names, f) for k, f in functions.items() if k in kinds}
        self.found: dict[str, dict[str, list[Tensor]]] = {
            kind: {name: [] for name in names} for kind, (names, _) in self._functions.items()
        }

    def add(self, loss: Tensor) -> None:
        """Takes the gradients of one batch.

        Raises:
            NetworkError: There are none.
        """
        try:
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        except RuntimeError as exc:
            if out_of_memory(exc):
                raise
            raise NetworkError(
                "criteria that need gradients do not apply, as the network gives none "
                f"({first_line(exc)})"
            ) from exc
        told = iter(
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(self.parameters, gradients, strict=True)
        )
        by_layer = {
            name: [*(t.detach().double() for t in tensors), *(next(told).double() for _ in tensors)]
            for name, tensors in self._tensors.items()
        }
        for kind, (names, function) in self._functions.items():
            for name in names:
                self.found[kind][name].append(function(*by_layer[name]).cpu())


def _stacked(found: Mapping[str, Mapping[str, list[Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {
        kind: {name: torch.stack(rows) for name, rows in by_layer.items()}
        for kind, by_layer in found.items()
    }


def collect(module: nn.Module, plan: CuttingPlan, kinds: Set[str], samples: Samples) -> Evidence:
    """Collects evidence of some kinds: one pass over the images, and training for excitations.

    Args:
        module: The dense network in evaluation mode; it is left as it was.
        plan: Its groups.
        kinds: Some of NEEDS; Gram matrices are collected elsewhere.
        samples: The images. Kinds of LABELLED need `samples.has_targets`.

    Raises:
        DataError: A label has no class.
    """
    generator = torch.Generator().manual_seed(0)
    gradients = _Gradients(module, plan, kinds) if kinds & LABELLED else None
    looks = [kind for kind in LOOKS if kind in kinds]
    watches: dict[str, _Watch] = {}
    targets: list[Tensor] = []
    labels = None if samples.labels is None or samples.own_labels else samples.labels
    layers = dict(module.named_modules())
    with ExitStack() as stack:
        for entry in plan.cuts:
            if looks and entry.in_axis is not None:
                watches[entry.name] = _Watch(units_of(plan.table.axes[entry.in_axis]), looks)
                handle = layers[entry.name].register_forward_pre_hook(
                    watches[entry.name], with_kwargs=True
                )
                stack.callback(handle.remove)
        wanted = gradients is not None and bool(gradients.parameters)
        if gradients is not None:
            stack.enter_context(_trainable(gradients.parameters))
        stack.enter_context(torch.set_grad_enabled(wanted))
        done = 0
        for batch in samples.batches if looks or gradients is not None else ():
            for part in torch.split(batch, _BATCH):
                outputs = module(part).float()
                if gradients is None:
                    continue
                if labels is None:
                    targets.append(_drawn(outputs.detach(), generator))
                else:
                    check_classes(labels.numpy(), outputs.shape[1], "calibration")
                    targets.append(labels[done : done + len(part)])
                done += len(part)
                if wanted:
                    gradients.add(F.cross_entropy(outputs, targets[-1]))
    read = {
        kind: {name: torch.cat(watch.found[kind]) for name, watch in watches.items()}
        for kind in looks
    }
    written = _stacked(gradients.found) if gradients is not None else {}
    if "excitation" in kinds:
        producers = sorted({name for group in plan.table.groups for name in group.producers})
        images = torch.cat(list(samples.batches))
        written["excitation"] = train_excitations(module, producers, images, torch.cat(targets))
    return Evidence(read=read, written=written)
