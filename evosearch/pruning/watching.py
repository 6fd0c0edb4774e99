"""Seeing what a network does between its layers: sums of two tensors, and activations.

These are plain function calls in a user's `forward`, so no module stands for them. A function mode
sees them while the network runs, and may do them in its own way.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["IN_PLACE", "RELU", "Activated", "Activation", "Watch"]


@dataclass(frozen=True)
class Activation:
    """A function of each number by itself.

    Args:
        name: As oneDNN's operators in torch call it.
        numbers: Its parameters.
        form: Which formula, where there are several.
    """

    name: str
    numbers: tuple[float, ...] = ()
    form: str = ""


RELU = Activation("relu")

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
}
IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}
_RELU6 = Activation("hardtanh", (0.0, 6.0))
_HARDTANH = Activation("hardtanh", (-1.0, 1.0))
_LEAKY_RELU = Activation("leaky_relu", (0.01,))
# With what they take by default.
_ACTIVATIONS: Mapping[Any, Activation] = {
    F.relu: RELU,
    F.relu_: RELU,
    torch.relu: RELU,
    torch.relu_: RELU,
    torch.Tensor.relu: RELU,
    torch.Tensor.relu_: RELU,
    F.relu6: _RELU6,
    F.hardtanh: _HARDTANH,
    F.hardtanh_: _HARDTANH,
    F.leaky_relu: _LEAKY_RELU,
    F.leaky_relu_: _LEAKY_RELU,
    F.silu: Activation("swish"),
    F.hardswish: Activation("hardswish"),
    F.gelu: Activation("gelu", form="none"),
}
# Their first arguments behind the operand.
_NUMBERS = {_HARDTANH: ("min_val", "max_val"), _LEAKY_RELU: ("negative_slope",)}


def _called(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Activation:
    """The activation with the parameters of one call."""
    default = _ACTIVATIONS[func]
    given = dict(zip(_NUMBERS.get(default, ()), args[1:], strict=False)) | dict(named)
    numbers = [
        float(given.get(name, number))
        for name, number in zip(_NUMBERS.get(default, ()), default.numbers, strict=False)
    ]
    form = named.get("approximate", default.form)
    return replace(default, numbers=tuple(numbers) or default.numbers, form=form)


# Looking at a tensor's form is not reading it.
_HARMLESS = {"__get__", "size", "dim", "numel"}

Activated = Callable[[Activation, Callable[[], Tensor], Tensor], Tensor | None]
"""From an activation, the call and its operand to the result, or None."""


class Watch(TorchFunctionMode):
    """Calls back for every sum of two tensors of one shape, every activation, and for all else.

    A callback may do the operation itself: what it returns is the result, None leaves it to torch.

    Args:
        added: Gets function and operands.
        activated: Gets the activation, the call and its operand.
        read: Gets every tensor that anything else is done to.
    """

    def __init__(
        self,
        added: Callable[[Any, Tensor, Tensor], Tensor | None],
        activated: Activated | None = None,
        read: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._added = added
        self._activated = activated
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        done: Tensor | None = None
        if func in _ADDITIONS and not named and len(args) == 2 and _alike(*args):
            done = self._added(func, *args)
        elif func in _ACTIVATIONS and args and self._activated is not None:
            activation = _called(func, args, named)
            done = self._activated(activation, lambda: func(*args, **named), args[0])
        elif self._read is not None and getattr(func, "__name__", "") not in _HARMLESS:
            for tensor in _tensors((*args, *named.values())):
                self._read(tensor)
        return func(*args, **named) if done is None else done


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _alike(left: object, right: object) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape
