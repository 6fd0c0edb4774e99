"""How long a forward pass takes: PyTorch as it is, ONNX Runtime, or as a user measures."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evosearch.errors import ConfigError, NetworkError
from evosearch.networks import import_own, importing
from evosearch.networks.onnx_models import (
    exported_program,
    onnx_model,
    onnx_runner,
    optimized,
    serialized,
    with_weights_of,
)

__all__ = ["STOPWATCHES", "Stopwatch", "eager_seconds", "stopwatch_named"]

Stopwatch = Callable[[nn.Module, Tensor], float]
"""From a network and `(n, c, h, w)` float32 images to the seconds that a forward pass takes."""

# Passes of one network at a time, after the first, which prepares its kernels: what is new to the
# caches, a session that was just made above all, is slower for the first ten.
_PASSES, _LEAST_SECONDS, _MOST_SECONDS = 3, 0.02, 0.1
# Of models that are kept to be timed again; the oldest are made anew.
_MOST_BYTES = 500_000_000
# Two are enough for one network and the reference that each one is timed beside.
_SESSIONS = 2
# Of networks with other blocks left out, which have other tensors.
_GRAPHS = 8
# Of the largest output, between a runtime and PyTorch.
_TOLERANCE = 1e-2


def _fastest(run: Callable[[Tensor], object], images: Tensor) -> float:
    """The fastest of some passes, after one to warm up."""
    run(images)
    found: list[float] = []
    spent = 0.0
    while spent < _MOST_SECONDS and (len(found) < _PASSES or spent < _LEAST_SECONDS):
        start = time.perf_counter()
        run(images)
        found.append(time.perf_counter() - start)
        spent += found[-1]
    return min(found)


@torch.inference_mode()
def eager_seconds(module: nn.Module, images: Tensor) -> float:
    """Of PyTorch as it is, on the CPU."""
    return _fastest(module, images)


class OnnxRuntimeSeconds:
    """Of ONNX Runtime on the CPU, with as many threads as torch has.

    Exporting takes seconds, so it is done once for networks with the same blocks; narrower ones
    borrow that graph, if it computes what they do then, and get one of their own else.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, Any] = {}
        self._models: dict[str, bytes] = {}
        self._runners: dict[str, Callable[[Tensor], Any]] = {}

    def __call__(self, module: nn.Module, images: Tensor) -> float:
        """As `Stopwatch`.

        Raises:
            ConfigError: ONNX Runtime is not installed, or cannot run the network.
        """
        key = str({name: tuple(value.shape) for name, value in module.state_dict().items()})
        if key not in self._runners:
            if len(self._runners) >= _SESSIONS:
                del self._runners[_second(self._runners)]
            self._runners[key] = self._runner(key, module, images)
        return _fastest(self._runners[key], images)

    def _runner(self, key: str, module: nn.Module, images: Tensor) -> Callable[[Tensor], Any]:
        threads = torch.get_num_threads()
        if key in self._models:
            return onnx_runner(self._models[key], threads)
        with torch.inference_mode():
            wanted = module(images).numpy()
        try:
            model, run = self._borrowed(module, images, wanted, threads) or self._own(
                module, images, threads
            )
        except NetworkError as exc:
            raise ConfigError(f"latency.measure = 'onnxruntime': {exc}") from exc
        self._models[key] = model
        while len(self._models) > 1 and sum(map(len, self._models.values())) > _MOST_BYTES:
            del self._models[_second(self._models)]
        return run

    def _borrowed(
        self, module: nn.Module, images: Tensor, wanted: Any, threads: int
    ) -> tuple[bytes, Callable[[Tensor], Any]] | None:
        """The graph of the first network with the same blocks, with these weights, if that does."""
        graph = self._graphs.get(_tensor_names(module))
        if graph is None:
            return None
        try:
            model = serialized(optimized(with_weights_of(graph, module)))
            run = onnx_runner(model, threads)
            found = run(images)
        except ConfigError:
            raise
        except Exception:  # noqa: BLE001 -- widths that the graph does not allow, refused in many ways
            return None
        near = {"rtol": 0, "atol": _TOLERANCE * np.nanmax(np.abs(wanted)), "equal_nan": True}
        if found.shape != wanted.shape or not np.allclose(found, wanted, **near):
            return None
        return model, run

    def _own(
        self, module: nn.Module, images: Tensor, threads: int
    ) -> tuple[bytes, Callable[[Tensor], Any]]:
        try:
            two = images if len(images) > 1 else torch.cat([images, images])
            program = exported_program(module, two)
        except NetworkError:
            # What fixes the number of images cannot lend its graph, but can be timed.
            program = exported_program(module, images, fixed=True)
        found = onnx_model(program, {}, folded=False)
        if _tensor_names(module) not in self._graphs:
            while len(self._graphs) >= _GRAPHS:
                del self._graphs[_second(self._graphs)]
            self._graphs[_tensor_names(module)] = found
        model = serialized(optimized(found))
        return model, onnx_runner(model, threads)


def _tensor_names(module: nn.Module) -> str:
    return " ".join(module.state_dict())


def _second(kept: dict[str, Any]) -> str:
    """The oldest but the first: that is the reference, which each network is timed beside."""
    return list(kept)[1]


STOPWATCHES: dict[str, tuple[str, Callable[[], Stopwatch]]] = {
    "pytorch": ("float32 as PyTorch runs it, on the CPU", lambda: eager_seconds),
    "onnxruntime": ("float32 as ONNX Runtime runs it, on the CPU", OnnxRuntimeSeconds),
}
"""Those that come with evosearch, with a line on each."""


def stopwatch_named(name: str | None) -> Stopwatch:
    """One of ours, or a user's function; PyTorch as it is, if there is no name.

    Raises:
        ConfigError: It cannot be imported or is no function.
    """
    if name is None or name in STOPWATCHES:
        return STOPWATCHES[name or "pytorch"][1]()
    if ":" not in name:
        raise ConfigError(
            f"latency.measure = {name!r}: there are {', '.join(STOPWATCHES)}, or name your own "
            "function as module:function or path/to/file.py:function"
        )
    with importing(f"latency.measure = {name!r}"):
        found = import_own(name)
    if not callable(found):
        raise ConfigError(
            f"latency.measure = {name!r} is no function, but a {type(found).__name__}"
        )
    return found
