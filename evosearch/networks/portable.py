"""Networks as files that run without evosearch, and without the code of their architecture."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evosearch.errors import NetworkError
from evosearch.files import write_atomically
from evosearch.networks.loading import Network
from evosearch.networks.onnx_models import (
    exported_program,
    onnx_model,
    onnx_runner,
    serialized,
)

__all__ = ["write_portable"]

FACTS = "evosearch.json"
"""Where a program has what is metadata elsewhere, among torch.export.load's extra files."""

# Of outputs, where other kernels run another order of sums.
_TOLERANCE = 1e-3


def write_portable(network: Network, file: Path, facts: Mapping[str, Any]) -> None:
    """Writes a network, and runs what was written beside it.

    It takes any number of images, float32 and normalised, under the name `images` in ONNX.

    Args:
        network: In evaluation mode, on the CPU.
        file: Ends with one of `PORTABLE`.
        facts: For people; JSON values.

    Raises:
        ConfigError: The file cannot have that name, or the extra for ONNX is missing.
        NetworkError: The network cannot be written like that, or computes something else then.
        BackendError: The file cannot be written.
    """
    program = exported_program(network.module, network.example(2))
    write = _write_onnx if file.suffix == ".onnx" else _write_program

    def checked(scratch: Path) -> None:
        run = write(program, scratch, facts)
        for images in (network.example(1), network.example(3)):
            _compare(run(images), network, images, file)

    write_atomically(file, checked)


def _write_onnx(
    program: torch.export.ExportedProgram, file: Path, facts: Mapping[str, Any]
) -> Callable[[Tensor], Any]:
    said = {key: json.dumps(value) for key, value in facts.items()}
    file.write_bytes(serialized(onnx_model(program, said)))
    return onnx_runner(file.read_bytes())


def _write_program(
    program: torch.export.ExportedProgram, file: Path, facts: Mapping[str, Any]
) -> Callable[[Tensor], Any]:
    written = io.BytesIO()  # torch's own writing to disk fails in its own ways
    torch.export.save(program, written, extra_files={FACTS: json.dumps(facts)})
    file.write_bytes(written.getvalue())
    return torch.export.load(file).module()


@torch.no_grad()
def _compare(found: Any, network: Network, images: Tensor, file: Path) -> None:
    """Raises if outputs are not those of the network."""
    wanted = network.module(images).numpy()
    if not np.isfinite(wanted).all():
        raise NetworkError(f"{file}: outputs of the network are not finite")
    near = {"rtol": _TOLERANCE, "atol": _TOLERANCE * np.abs(wanted).max()}
    if np.shape(found) != wanted.shape or not np.allclose(found, wanted, **near):
        raise NetworkError(
            f"{file}: what was written computes something else than the network, and was removed"
        )
