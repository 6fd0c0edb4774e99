"""Reading a layer at some positions of its output: what it returns there, and from what."""

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "Sampler",
    "drawn_positions",
    "flat_weight",
    "output_size",
    "pads_with_zeros",
    "shaped_weight",
]


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether it is a two-dimensional convolution that does so by numbers, not by a name."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def output_size(layer: Any, x: Tensor) -> tuple[int, ...]:
    """Height and width of what a convolution as in `pads_with_zeros` returns for `x`."""
    return tuple(
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:],
            layer.padding,
            layer.dilation,
            layer.kernel_size,
            layer.stride,
            strict=True,
        )
    )


def drawn_positions(name: str, size: tuple[int, int], count: int) -> NDArray[np.int64]:
    """`(count or all, 2)` rows and columns of a map, drawn by the layer's name, in order."""
    height, width = size
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    flat = rng.choice(height * width, size=min(count, height * width), replace=False)
    return np.stack(np.divmod(np.sort(flat), width), axis=1)


class Sampler:
    """Reads one layer at fixed positions.

    Maps are read as rows of channels, which is how they lie in memory in channels-last order: one
    selection of rows per layer, along indices that are made once and stay on the device.

    Args:
        positions: `(n_positions, 2)` row and column in the output; None for a linear layer, of
            which everything is read.
    """

    def __init__(self, positions: NDArray[np.int64] | None) -> None:
        self._positions = positions
        self._output_rows: tuple[Any, Tensor] | None = None
        self._patch_rows: tuple[Any, Tensor, Tensor | None] | None = None

    def outputs(self, output: Tensor) -> Tensor:
        """`(n * n_positions, channels)` float32 of `(n, channels, h, w)` or `(n, channels)`.

        A copy: later operations may work in place.
        """
        if self._positions is None:
            return output.to(torch.float32, copy=True)
        n, channels, height, width = output.shape
        key = (n, height, width, output.device)
        if self._output_rows is None or self._output_rows[0] != key:
            places = self._positions @ np.array([width, 1])
            rows = np.arange(n)[:, None] * (height * width) + places
            self._output_rows = key, torch.from_numpy(rows.ravel()).to(output.device)
        flat = output.permute(0, 2, 3, 1).reshape(-1, channels)
        return flat.index_select(0, self._output_rows[1]).float()

    def patches(self, x: Tensor, layer: Any) -> Tensor:
        """What the layer reads for those outputs, as `flat_weight` orders it.

        Args:
            x: `(n, channels, h, w)`, or `(n, features)` for a linear layer.
            layer: A linear layer, or a convolution as in `pads_with_zeros`, not grouped.

        Returns:
            `(n * n_positions, fan_in)` in the precision of `x`.
        """
        if self._positions is None:
            return x
        n, channels, height, width = x.shape
        key = (n, height, width, x.device)
        if self._patch_rows is None or self._patch_rows[0] != key:
            rows, inside = self._patch_indices(n, height, width, layer)
            border = np.flatnonzero(~inside)
            self._patch_rows = (
                key,
                torch.from_numpy(rows).to(x.device),
                torch.from_numpy(border).to(x.device) if len(border) else None,
            )
        _, read, outside = self._patch_rows
        flat = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, read)
        if outside is not None:
            flat = flat.index_fill_(0, outside, 0)
        area = layer.kernel_size[0] * layer.kernel_size[1]
        return flat.view(-1, area * channels)

    def _patch_indices(
        self, n: int, height: int, width: int, layer: Any
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """`(n * n_positions * kernel,)` rows of the input, and which of them lie inside it."""
        assert self._positions is not None  # noqa: S101  of a convolution
        places = []
        for axis, size in enumerate((height, width)):
            steps = np.arange(layer.kernel_size[axis]) * layer.dilation[axis]
            start = self._positions[:, axis] * layer.stride[axis] - layer.padding[axis]
            at = start[:, None] + steps
            places.append((at, (at >= 0) & (at < size)))
        (down, down_inside), (right, right_inside) = places
        inside = down_inside[:, :, None] & right_inside[:, None, :]
        flat = np.where(inside, down[:, :, None] * width + right[:, None, :], 0)
        rows = np.arange(n)[:, None] * (height * width) + flat.ravel()
        return rows.ravel(), np.tile(inside.ravel(), n)


def flat_weight(weight: Tensor) -> Tensor:
    """`(out, fan_in)` of a weight, in the order of patches: a view in channels-last order."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def shaped_weight(flat: Tensor, like: Tensor) -> Tensor:
    """Undoes `flat_weight`."""
    if like.ndim == 2:
        return flat
    out, into, tall, wide = like.shape
    return flat.view(out, tall, wide, into).permute(0, 3, 1, 2)
