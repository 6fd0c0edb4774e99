"""Blocks that can be left out: all they do is add to their input.

Without what it adds, a residual block returns its input, so a network without the block is one in
which that is the identity [Veit2016]. Which modules are such blocks is not guessed from their
names: with all of its parameters zero, a block returns its very input. A block with an activation
behind its sum does that where its input has been through that activation.

References:
    [Veit2016] A. Veit, M. Wilber, S. Belongie, "Residual Networks Behave Like Ensembles of
        Relatively Shallow Networks", NeurIPS 2016.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from evosearch.pruning.hooks import hooked

__all__ = ["find_blocks", "inside", "put_blocks"]


def inside(name: str, block: str) -> bool:
    """Whether a module is a block or part of it, by their names."""
    return f"{name}.".startswith(f"{block}.")


def put_blocks(module: nn.Module, blocks: Mapping[str, nn.Module], gone: Iterable[str]) -> None:
    """Puts blocks into a network, an identity for those that are gone.

    Args:
        module: The network; changed in place.
        blocks: By name.
        gone: Names of those that it is to be without.
    """
    absent = set(gone)
    for name, block in blocks.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity() if name in absent else block)


@torch.inference_mode()
def find_blocks(module: nn.Module, example: Tensor) -> list[str]:
    """The innermost modules that add to their input and do nothing else.

    Args:
        module: The network, in evaluation mode.
        example: A batch that it takes.

    Returns:
        Their names, in the order of `named_modules`. Without any of them, and without all, the
        network computes what it does with their parameters zero.
    """
    zeroed = copy.deepcopy(module)
    for parameter in zeroed.parameters():
        parameter.zero_()
    shared = _shared_parameters(module)
    candidates = {
        name: child
        for name, child in module.named_modules()
        if name and any(child.children()) and _tensors(child) and not shared & _tensors(child)
    }
    found = _returning_input(module, zeroed, candidates, example)
    inner = [
        name for name in found if not any(inside(other, name) for other in found if other != name)
    ]
    if not _goes(module, inner, example):
        inner = [name for name in inner if _goes(module, [name], example)]
    return inner if _goes(module, inner, example) else []


def _tensors(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _shared_parameters(module: nn.Module) -> set[int]:
    """Parameters of several modules."""
    owned = Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))
    return {key for key, count in owned.items() if count > 1}


def _returning_input(
    module: nn.Module, zeroed: nn.Module, candidates: Mapping[str, nn.Module], example: Tensor
) -> list[str]:
    """Names of the candidates that run once and, with zeroes, return the input that they get."""
    names = {child: name for name, child in candidates.items()}
    given: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()
    found: set[str] = set()

    def before(child: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        given.pop(names[child], None)
        if len(inputs) == 1 and not named and isinstance(inputs[0], Tensor):
            # A copy: what follows may work in place.
            given[names[child]] = inputs[0].clone()

    def after(child: nn.Module, _inputs: object, output: object) -> None:
        name = names[child]
        runs[name] += 1
        x = given.pop(name, None)
        if x is None or not isinstance(output, Tensor) or output.shape != x.shape or not x.any():
            return
        try:
            returned = zeroed.get_submodule(name)(x.clone())
        except Exception:  # noqa: BLE001  a user's forward may raise anything
            return
        if isinstance(returned, Tensor) and torch.equal(returned, x):
            found.add(name)

    handles = [child.register_forward_pre_hook(before, with_kwargs=True) for child in names]
    handles += [child.register_forward_hook(after) for child in names]
    with hooked(handles):
        module(example)
    return [name for name in candidates if name in found and runs[name] == 1]


def _goes(module: nn.Module, names: Sequence[str], example: Tensor) -> bool:
    """Whether the network without these modules computes what it does with zeroes in them."""
    without, zeroed = copy.deepcopy(module), copy.deepcopy(module)
    for name in names:
        for parameter in zeroed.get_submodule(name).parameters():
            parameter.zero_()
    put_blocks(without, {name: without.get_submodule(name) for name in names}, names)
    try:
        return torch.equal(without(example), zeroed(example))
    except Exception:  # noqa: BLE001  somebody may ask the block for more than its output
        return False
