"""How far the features of a cut network are from those of the dense one.

One image gives a network's classifier a handful of numbers, most of which say "surely that class";
its last feature maps are thousands of numbers, and all of them move when channels go. So a few
dozen images order policies by their features about as well as thousands do by their classes
(docs/fidelity.md). No labels are used.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.pruning.hooks import hooked
from evosearch.pruning.statistics import shared_tensor

__all__ = ["Distortion", "FeatureTap", "Features", "feature_layer"]

# Of the dense features; positions are sampled where maps are larger.
_MAX_BYTES = 1 << 26
_LEAST_ENERGY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the dense network makes of the validation images.

    Args:
        layer: The module that returns the maps; None if outputs are compared.
        positions: `(n_positions,)` flat places in a map; empty for outputs.
        values: `(n_images, n_features)` float32.
    """

    layer: str | None
    positions: NDArray[np.int64]
    values: NDArray[np.float32]

    @property
    def energy(self) -> float:
        """Mean squared length of an image's features, positive."""
        squares = np.einsum("ij,ij->i", self.values, self.values, dtype=np.float64)
        return max(float(squares.mean()), _LEAST_ENERGY)


def _maps(module: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Shapes of the feature maps, by the module that returned them, in their order.

    Modules that run twice are left out: their name would not say which map is meant.
    """
    names = {child: name for name, child in module.named_modules() if name}
    shapes: dict[str, torch.Size] = {}
    runs = dict.fromkeys(names.values(), 0)

    def after(child: nn.Module, _inputs: object, output: object) -> None:
        name = names[child]
        runs[name] += 1
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            shapes[name] = output.shape

    handles = [child.register_forward_hook(after) for child in names]
    with hooked(handles), torch.inference_mode():
        module(example)
    return {name: shape for name, shape in shapes.items() if runs[name] == 1}


def feature_layer(
    dense: nn.Module, narrow: nn.Module, groups: Sequence[Sequence[str]], example: Tensor
) -> str | None:
    """The module of the last feature maps, if every cut moves these and none narrows them.

    Args:
        dense: The network.
        narrow: The same, with channels cut wherever they can be.
        groups: For each group of channels the layers that produce them.
        example: A batch that both take.

    Returns:
        Its name; None where there are no maps, the last ones lose channels, or something that can
        be cut comes after them.
    """
    maps = _maps(dense, example)
    last = next(reversed(maps), None)
    if last is None or _maps(narrow, example).get(last) != maps[last]:
        return None
    return last if _moved_by_all(dense, last, groups, example) else None


def _moved_by_all(
    dense: nn.Module, layer: str, groups: Sequence[Sequence[str]], example: Tensor
) -> bool:
    """Whether the maps of a layer depend on the weights of every group."""
    module = copy.deepcopy(dense).requires_grad_(True)
    read: list[Tensor] = []
    module.get_submodule(layer).register_forward_hook(lambda *args: read.append(args[2].clone()))
    with torch.inference_mode(False), torch.enable_grad():
        module(example.clone())
        generator = torch.Generator().manual_seed(0)
        mixed = (read[0] * torch.randn(read[0].shape, generator=generator)).sum()
        if mixed.requires_grad:
            mixed.backward()  # type: ignore[no-untyped-call]

    def moves(name: str) -> bool:
        slope = cast("Tensor", module.get_submodule(name).weight).grad
        return slope is not None and bool(slope.any())

    return all(any(map(moves, producers)) for producers in groups)


def _centred(outputs: Tensor) -> Tensor:
    """A shift of all classes changes no probability, so it is no error either."""
    outputs = outputs.float()
    return outputs - outputs.mean(dim=1, keepdim=True)


class FeatureTap:
    """Reads the features of a network whenever it runs.

    Args:
        module: The network; it keeps a hook.
        layer: As in `Features`.
        n_images: How many will be shown: larger sets get fewer positions of each map.
        positions: To read in place of those.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str | None,
        n_images: int,
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        self._layer = layer
        self._n_images = n_images
        self._read: Tensor | None = None
        self.positions: NDArray[np.int64] = (
            np.empty(0, dtype=np.int64) if positions is None else positions
        )
        """`(n_positions,)` that are read, known after the first run; empty for outputs."""
        if layer is not None:
            module.get_submodule(layer).register_forward_hook(self._after)

    def _after(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        flat = output.flatten(2)
        n, channels, count = flat.shape
        if not len(self.positions):
            most = max(1, _MAX_BYTES // (4 * channels * self._n_images))
            # At random: a regular pattern could meet the same columns in every row.
            order = np.random.default_rng(0).permutation(count)
            self.positions = np.sort(order[:most]).astype(np.int64)
        if len(self.positions) < count:
            flat = flat[:, :, torch.from_numpy(self.positions).to(flat.device)]
        # A copy: later operations may work in place.
        self._read = flat.reshape(n, -1).to(torch.float32, copy=True)

    def take(self, outputs: Tensor) -> Tensor:
        """`(n, n_features)` float32 of the batch that has just run.

        Args:
            outputs: `(n, n_classes)` that it returned.
        """
        if self._layer is None:
            return _centred(outputs)
        read, self._read = self._read, None
        if read is None:
            raise RuntimeError(f"{self._layer} did not run")
        return read


class Distortion:
    """Squared distance from the dense features, as a share of their mean squared length.

    Args:
        module: The network whose features are read; it keeps a hook.
        features: Of the dense network.
        device: Where the module runs.
    """

    def __init__(self, module: nn.Module, features: Features, device: str) -> None:
        self._tap = FeatureTap(module, features.layer, len(features.values), features.positions)
        self._wanted = shared_tensor(features.values).to(device)
        self._energy = features.energy

    def of(self, outputs: Tensor, start: int) -> Tensor:
        """`(n,)` float64, on the CPU, of the batch that has just run.

        Args:
            outputs: `(n, n_classes)` that it returned.
            start: Which validation image was its first.
        """
        found = self._tap.take(outputs).to(self._wanted.device)
        wanted = self._wanted[start : start + len(found)]
        return ((found - wanted).square().sum(dim=1).double() / self._energy).cpu()
