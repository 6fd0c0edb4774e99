"""Reading and writing weights: safetensors, or a state dict that needs no unpickling of code."""

import argparse
import json
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evosearch.errors import BackendError, NetworkError
from evosearch.files import write_atomically

__all__ = ["load_into", "put_state", "read_weights", "save_weights", "weights_path"]

_SHIPPED = "shipped:"
_COUNTER = "num_batches_tracked"
# Where trainers put the network's state among other things, the most usual first.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "params")
# Settings and numbers that trainers keep beside it; making one runs no code of the file's. What
# makes those of numpy has moved about, and goes by both names.
_MAKERS = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)),
    *(
        (maker, f"numpy.{core}.multiarray.{name}")
        for name, maker in _MAKERS.items()
        for core in ("core", "_core")
    ),
]


def weights_path(weights: str) -> Path:
    """The file that `weights` names: a path, or `shipped:NAME` for weights in the package.

    Raises:
        NetworkError: There is no such file.
    """
    if weights.startswith(_SHIPPED):
        folder = Path(str(resources.files("evosearch.networks") / "shipped"))
        path = folder / f"{weights.removeprefix(_SHIPPED)}.safetensors"
        if not path.is_file():
            names = sorted(p.stem for p in folder.glob("*.safetensors"))
            known = ", ".join(names) or "none"
            raise NetworkError(f"no shipped weights {weights!r}; there are {known}")
        return path
    path = Path(weights)
    if not path.is_file():
        raise NetworkError(f"weights file {path} does not exist")
    return path


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a state dict and the metadata that came with it.

    A checkpoint may hold it beside other things: under the key `state_dict`, `model` or one of a
    few more, or as the only dict of tensors in it.

    Returns:
        The tensors by name, and the metadata (empty unless the file is safetensors).

    Raises:
        NetworkError: The file is not a state dict that can be read without running its code.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as archive:
                return {k: archive.get_tensor(k) for k in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as exc:
            raise NetworkError(f"{path} is not a readable safetensors file: {exc}") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols in damaged files
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # garbage makes the unpickler raise almost anything
        if isinstance(exc, pickle.UnpicklingError) and "GLOBAL" in str(exc):
            named = re.search(r"GLOBAL ([\w.]+)", str(exc))
            raise NetworkError(
                f"{path} holds {named[1] if named else 'objects'}, and loading that would run its "
                "code; save network.state_dict() rather than the network, alone or beside numbers "
                "and text"
            ) from exc
        # What torch says is about its own options, and would have the user turn off a safeguard.
        raise NetworkError(
            f"{path} is not a readable state dict: damaged, or a file of another kind; wanted "
            "safetensors or what torch.save(network.state_dict(), ...) wrote"
        ) from exc
    return _unwrapped(content, path), {}


def _unwrapped(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds.

    Raises:
        NetworkError: There is none, or which is meant cannot be told.
    """
    if _is_state(content):
        return {str(name): tensor for name, tensor in content.items()}
    inner = content if isinstance(content, Mapping) else {}
    # As some trainers do: {"model": {"state_dict": ...}}.
    deeper = [name for name in _WRAPPERS if isinstance(inner.get(name), Mapping)]
    states = [name for name, value in inner.items() if _is_state(value)]
    chosen = [*deeper, *(states if len(states) == 1 else [])][:1]
    if chosen:
        return _unwrapped(inner[chosen[0]], path)
    found = f", found {', '.join(map(str, list(inner)[:6]))}" if inner else ""
    raise NetworkError(
        f"{path} is not a state dict: wanted tensors by name, or a dict of them under "
        f"{' or '.join(_WRAPPERS[:2])}{found}"
    )


def _is_state(content: object) -> TypeGuard[Mapping[object, Tensor]]:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _without_prefix(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Removes what wrappers put in front of all names, where that helps.

    `module.` is of data-parallel training, `_orig_mod.` of `torch.compile`; a trainer has the
    network's name in it. What a trainer has beside the network is left out, where the network is
    whole under one name.
    """
    needed = {name for name in expected if not name.endswith(_COUNTER)}
    if not needed <= state.keys():
        whole = [
            inner
            for prefix in dict.fromkeys(_prefixes(state))
            if needed <= (inner := _under(prefix, state)).keys()
        ]
        if len(whole) == 1:
            return whole[0]

    def fitting(names: Iterable[str]) -> int:
        return sum(name in expected for name in names)

    best, bare = dict(state), dict(state)
    while len({name.partition(".")[0] for name in bare}) == 1 and all("." in n for n in bare):
        bare = {name.partition(".")[2]: value for name, value in bare.items()}
        if fitting(bare) > fitting(best):
            best = bare
    return best


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """All beginnings of names that end with a dot."""
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:count]) + "." for count in range(1, len(parts)))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies a state dict into a network whose tensors must have the same names and shapes.

    Raises:
        NetworkError: Names or shapes differ; names the first few and the origin.
    """
    expected = module.state_dict()
    state = _without_prefix(expected, state)
    # Counters of batch norm are absent from old files and mean nothing for inference.
    missing = [k for k in expected if k not in state and not k.endswith(_COUNTER)]
    surplus = [k for k in state if k not in expected]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("not in the network", surplus), ("shape", shapes))
        if keys
    ]
    if problems:
        raise NetworkError(f"weights {origin} do not fit the network; {'; '.join(problems)}")
    put_state(module, {**expected, **state})


def put_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a complete state dict into a network, whose layers all take it for their version's.

    Files of tensors do not say of which version they are, and MNASNet, for one, insists on knowing.
    """
    stated = OrderedDict(state)
    metadata = getattr(module.state_dict(), "_metadata", None)  # a user's own may have none
    if metadata is not None:
        stated._metadata = metadata  # type: ignore[attr-defined]
    module.load_state_dict(stated)


def _ordered(content: bytes) -> bytes:
    """The same file with its metadata by name: the library has it in another order each time.

    A file begins with the length of a header in JSON, which ends on a multiple of eight bytes and
    says where tensors are behind it.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def save_weights(path: Path, module: nn.Module, metadata: Mapping[str, object]) -> None:
    """Writes a network's tensors as safetensors, atomically.

    Args:
        path: Ends with `.safetensors`; its folder is made if need be.
        module: Its state dict is written.
        metadata: Values are stored as JSON text.

    Raises:
        ConfigError: The file cannot have that name.
        BackendError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        # A weight that goes by two names is written twice: the format has none that are shared.
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in places else tensor
        places.add(place)
    try:
        # Not by safetensors' own writer, which ignores the user's umask.
        content = _ordered(save(tensors, {k: json.dumps(v) for k, v in metadata.items()}))
    except (SafetensorError, RuntimeError) as exc:
        raise BackendError(f"cannot write {path}: {exc}") from exc
    write_atomically(path, lambda scratch: scratch.write_bytes(content))
