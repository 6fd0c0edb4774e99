"""Reading and writing weights: safetensors, or a state dict that needs no unpickling of code."""

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evosearch.errors import BackendError, NetworkError
from evosearch.files import write_atomically

__all__ = ["load_into", "put_state", "read_weights", "save_weights", "weights_path"]

_SHIPPED = "shipped:"


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

    A dict under the key `state_dict` or `model` is unwrapped.

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
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # garbage makes the unpickler raise almost anything
        if isinstance(exc, pickle.UnpicklingError) and "GLOBAL" in str(exc):
            raise NetworkError(
                f"{path} holds more than tensors, and loading it would run its code; "
                "save network.state_dict() alone, not the network, and nothing beside it"
            ) from exc
        # What torch says is about its own options, and would have the user turn off a safeguard.
        raise NetworkError(
            f"{path} is not a readable state dict: damaged, or a file of another kind; wanted "
            "safetensors or what torch.save(network.state_dict(), ...) wrote"
        ) from exc
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise NetworkError(f"{path} is not a state dict: wanted tensors by name")
    return {str(k): v for k, v in content.items()}, {}


def _without_prefix(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Removes what wrappers put in front of all names, where that helps.

    `module.` is of data-parallel training, `_orig_mod.` of `torch.compile`; a trainer has the
    network's name in it.
    """

    def fitting(names: Iterable[str]) -> int:
        return sum(name in expected for name in names)

    best, bare = dict(state), dict(state)
    while len({name.partition(".")[0] for name in bare}) == 1 and all("." in n for n in bare):
        bare = {name.partition(".")[2]: value for name, value in bare.items()}
        if fitting(bare) > fitting(best):
            best = bare
    return best


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies a state dict into a network whose tensors must have the same names and shapes.

    Raises:
        NetworkError: Names or shapes differ; names the first few and the origin.
    """
    expected = module.state_dict()
    state = _without_prefix(expected, state)
    # Counters of batch norm are absent from old files and mean nothing for inference.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
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
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    try:
        # Not by safetensors' own writer, which ignores the user's umask.
        content = save(tensors, {k: json.dumps(v) for k, v in metadata.items()})
    except (SafetensorError, RuntimeError) as exc:
        raise BackendError(f"cannot write {path}: {exc}") from exc
    write_atomically(path, lambda scratch: scratch.write_bytes(content))
