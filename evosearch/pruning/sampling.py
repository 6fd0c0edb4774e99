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
    "is_linear",
    "output_size",
    "pads_with_zeros",
    "places_of_output",
    "shaped_weight",
]


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer that computes what torch's does."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether it is a two-dimensional convolution that does so by numbers, not by a name.

    A class of its own that pads or scales in its forward is none: from its weight and its input
    nobody could say what it returns.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer).forward is nn.Conv2d.forward
        and type(layer)._conv_forward is nn.Conv2d._conv_forward
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


def places_of_output(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Height and width of a map; how many tokens a linear layer returns for each image, if it does.

    Args:
        layer: Linear, or a convolution.
        output: `(n, channels, h, w)`; of a linear layer `(n, features)`, or `(n, ..., features)`,
            as transformers and ConvNeXt have it.
    """
    if isinstance(layer, nn.Linear):
        return (output.shape[1:-1].numel(),) if output.ndim > 2 else ()
    return tuple(output.shape[2:])


def drawn_positions(name: str, size: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """Of a map of that size, drawn by the layer's name, in order.

    Returns:
        `(count or all, 2)` rows and columns, or `(count or all, 1)` tokens.
    """
    places = int(np.prod(size))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    flat = np.sort(rng.choice(places, size=min(count, places), replace=False))
    return np.stack(np.unravel_index(flat, size), axis=1)


class Sampler:
    """Reads one layer at fixed positions.

    Maps are read as rows of channels, which is how they lie in memory in channels-last order: one
    selection of rows per layer, along indices that are made once and stay on the device.

    Args:
        positions: `(n_positions, 2)` row and column in the output; `(n_positions, 1)` tokens of a
            linear layer; None where that has one row per image.
    """

    def __init__(self, positions: NDArray[np.int64] | None) -> None:
        self._positions = positions
        self._output_rows: tuple[Any, Tensor] | None = None
        self._patch_rows: tuple[Any, Tensor, Tensor | None] | None = None

    def outputs(self, output: Tensor) -> Tensor:
        """`(n * n_positions, channels)` float32 of `(n, channels, h, w)` or `(n, ..., channels)`.

        A copy: later operations may work in place.
        """
        if self._positions is None:
            return output.to(torch.float32, copy=True)
        if self._positions.shape[1] == 1:
            return self._tokens(output).float()
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
            x: `(n, channels, h, w)`, or `(n, ..., features)` for a linear layer.
            layer: A linear layer, or a convolution as in `pads_with_zeros`, not grouped.

        Returns:
            `(n * n_positions, fan_in)` in the precision of `x`.
        """
        if self._positions is None:
            return x
        if self._positions.shape[1] == 1:
            return self._tokens(x)
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

    def _tokens(self, x: Tensor) -> Tensor:
        """`(n * n_positions, features)` of `(n, ..., features)`."""
        assert self._positions is not None  # noqa: S101  callers checked
        n, count = len(x), x.shape[1:-1].numel()
        key = (n, count, x.device)
        if self._output_rows is None or self._output_rows[0] != key:
            rows = np.arange(n)[:, None] * count + self._positions[:, 0]
            self._output_rows = key, torch.from_numpy(rows.ravel()).to(x.device)
        return x.reshape(-1, x.shape[-1]).index_select(0, self._output_rows[1])

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
