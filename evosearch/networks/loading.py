"""From the name of a network to the network: built in, torchvision's, or a user's own."""

import functools
import inspect
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from evosearch.errors import ConfigError, NetworkError
from evosearch.networks.catalogue import BUILT_IN, IMAGENET, InputSpec
from evosearch.networks.gpus import sent
from evosearch.networks.own import import_own
from evosearch.networks.weights import load_into, read_weights, weights_path

__all__ = [
    "Network",
    "NetworkSpec",
    "build_module",
    "check_repeatable",
    "is_own",
    "load_network",
    "plain",
    "trusted_factory",
]


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """How to make a network again, in this process or another.

    Args:
        name: A built-in name, a torchvision model, `module:factory` or `path/to/file.py:factory`.
        num_classes: Width of the classifier, for built-in and torchvision networks.
        arguments: Keyword arguments of a torchvision model or of a user's factory.
        weights: A file, `shipped:NAME`, or None for random weights.
        input_shape, mean, std, crop_padding, flip: Override what the weights file or the
            catalogue says.
    """

    name: str
    num_classes: int = 10
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_padding: int | None = None
    flip: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A dense network with what belongs to it.

    Args:
        spec: How it was made.
        module: The network, in evaluation mode.
        input: Shape and normalisation of its images.
    """

    spec: NetworkSpec
    module: nn.Module
    input: InputSpec

    def example(self, batch: int = 1) -> Tensor:
        """A random input `(batch, channels, height, width)`, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.input.shape, generator=generator)

    def normalise(self, pixels: NDArray[np.uint8], device: str | torch.device = "cpu") -> Tensor:
        """Turns `(n, height, width, channels)` uint8 into the network's `(n, c, h, w)` float32.

        The result is in channels-last memory order, on that device: bytes go there.
        """
        centre = 255 * torch.tensor(self.input.mean).view(-1, 1, 1)
        scale = 1 / (255 * torch.tensor(self.input.std).view(-1, 1, 1))
        # A copy: pixels may be a read-only view into shared memory.
        images = sent(torch.from_numpy(np.array(pixels)), device).permute(0, 3, 1, 2).float()
        return (images - sent(centre, device)) * sent(scale, device)


# Packages whose functions make networks.
_OF_NETWORKS = ("timm.models", "torchvision.models")


def _torchvision_factory(name: str) -> Callable[..., nn.Module] | None:
    from torchvision import models

    known = models.list_models(module=models)
    return models.get_model_builder(name) if name in known else None


def _own_factory(name: str) -> Callable[..., nn.Module]:
    place, _, attribute = name.rpartition(":")
    try:
        factory = import_own(name)
    except ConfigError as exc:
        raise NetworkError(f"network {name!r}: {exc}") from exc
    except (Exception, SystemExit) as exc:  # a user's file may do anything while it is imported
        raise NetworkError(f"network {name!r}: importing {place} failed with {exc!r}") from exc
    if not callable(factory):
        raise NetworkError(f"network {name!r}: {place} has no function or class {attribute!r}")
    return factory


def trusted_factory(name: str) -> Callable[..., nn.Module]:
    """What a file names as the maker of its network, if it is one that may be called.

    A file may come from anywhere, and a name in it may be that of any function there is. Classes of
    networks make networks; so do the functions of libraries that hold nothing else, and those that
    a user wrote. What came with Python, or was installed, is left alone.

    Args:
        name: `module:factory` or `path/to/file.py:factory`.

    Raises:
        NetworkError: It is not, or cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        foreign = _installed(Path(place))
    else:
        foreign = place.partition(".")[0] in sys.stdlib_module_names
    if not foreign and _makes_networks(factory := _own_factory(name)):
        return factory
    raise NetworkError(
        f"it says that {attribute} of {place} makes its network; that is neither your own code nor "
        "a class of networks, so it is not called"
    )


def _makes_networks(factory: Callable[..., Any]) -> bool:
    """Whether it is a class of networks, of a library of them, or a user's own."""
    made = factory.func if isinstance(factory, functools.partial) else factory
    kind = made if isinstance(made, type) or inspect.isroutine(made) else type(made)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return True
    if getattr(kind, "__module__", "").startswith(_OF_NETWORKS):
        return True
    try:
        return not _installed(Path(inspect.getfile(kind)))
    except TypeError:  # of C
        return False


def _installed(path: Path) -> bool:
    """Whether a file came with Python or was installed, rather than written here."""
    path = path.resolve()
    places = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    of_python = any(path.is_relative_to(Path(place).resolve()) for place in places if place)
    return of_python or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def _call(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        module = factory(**arguments)
    except Exception as exc:  # a user's factory may raise anything
        raise NetworkError(f"network {name!r}: making it failed with {exc!r}") from exc
    if not isinstance(module, nn.Module):
        raise NetworkError(
            f"network {name!r} must return a torch.nn.Module, got {type(module).__name__}"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError(
            f"network {name!r} is TorchScript, whose layers cannot be cut; return the module that "
            "was scripted or traced"
        )
    lazy = [n for n, layer in module.named_modules() if isinstance(layer, LazyModuleMixin)]
    if lazy:
        raise NetworkError(
            f"network {name!r}: {lazy[0]} has seen no input yet, and so has no width; have "
            "what makes the network run it once"
        )
    numbers = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return module if all(t.dtype == torch.float32 for t in numbers) else module.float()


def plain(module: nn.Module) -> nn.Module:
    """A network of plain tensors: weights that are computed anew at each call become what they are.

    `weight_norm` and `spectral_norm` of `torch.nn.utils`, old and new, and other parametrizations:
    a layer that is cut has the weights that it was given.

    Args:
        module: In evaluation mode; changed.
    """
    for layer in module.modules():
        with torch.no_grad():
            for hook in list(layer._forward_pre_hooks.values()):
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(layer, hook.name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(layer, hook.name)
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):  # type: ignore[arg-type]
                _fix(layer, name)
    return module


def _fix(layer: nn.Module, name: str) -> None:
    """Makes what a parametrization computes a tensor, a parameter if it was made of some."""
    originals = layer.parametrizations[name].parameters(recurse=False)  # type: ignore[index,union-attr]
    learned = [original.requires_grad for original in originals]
    with torch.no_grad():
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    found = getattr(layer, name)
    # torch leaves a buffer where a weight was made of several.
    if learned and not isinstance(found, nn.Parameter):
        delattr(layer, name)
        layer.register_parameter(name, nn.Parameter(found.detach(), requires_grad=any(learned)))


def is_own(name: str) -> bool:
    """Whether a name is a user's `module:factory` or `path/to/file.py:factory`."""
    return ":" in name and not name.startswith("torchvision:")


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        return "num_classes" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        return False


def build_module(
    spec: NetworkSpec, factory: Callable[..., nn.Module] | None = None
) -> tuple[nn.Module, InputSpec]:
    """Makes the network with random weights, and says what input it has by default.

    Args:
        spec: What to make.
        factory: Makes it instead of what the name stands for.

    Raises:
        NetworkError: The name is unknown, or making it failed.
    """
    if factory is None and spec.name in BUILT_IN:
        entry = BUILT_IN[spec.name]
        if spec.arguments:
            raise NetworkError(
                f"network.arguments: built-in {spec.name!r} takes none, got "
                f"{', '.join(spec.arguments)}"
            )
        return _call(spec.name, entry.make, {"num_classes": spec.num_classes}), entry.input
    if factory is not None or is_own(spec.name):
        factory = factory or _own_factory(spec.name)
        arguments = dict(spec.arguments)
        if _takes_num_classes(factory):
            arguments.setdefault("num_classes", spec.num_classes)
        # What its images were mirrored for is not known; a digit or a letter must not be.
        return _call(spec.name, factory, arguments), replace(IMAGENET, flip=False)
    found = _torchvision_factory(spec.name.removeprefix("torchvision:"))
    if found is None:
        raise NetworkError(
            f"no network {spec.name!r}; there are {', '.join(BUILT_IN)}, torchvision's "
            "classification models, or your own as module:factory or path/to/file.py:factory"
        )
    arguments = {"weights": None, "num_classes": spec.num_classes, **spec.arguments}
    return _call(spec.name, found, arguments), IMAGENET


_INPUT_FIELDS = ("shape", "mean", "std", "crop_padding", "flip")


def _told_by_metadata(metadata: Mapping[str, str], origin: str) -> dict[str, Any]:
    """What a weights file says about the input, checked for its form."""
    told: dict[str, Any] = {}
    for key in _INPUT_FIELDS:
        if key not in metadata:
            continue
        try:
            value = json.loads(metadata[key])
        except ValueError:
            value = None
        numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
        wanted = {
            "shape": numbers and len(value) == 3 and all(type(v) is int and v > 0 for v in value),
            "mean": numbers,
            "std": numbers,
            "crop_padding": type(value) is int and value >= 0,
            "flip": type(value) is bool,
        }
        if not wanted[key]:
            raise NetworkError(
                f"{origin}: its metadata says {key} = {metadata[key][:40]!r}, which is invalid; "
                f"set network.{'input_shape' if key == 'shape' else key} in the recipe and remove "
                "the metadata"
            )
        told[key] = tuple(value) if isinstance(value, list) else value
    return told


def _told_by_spec(spec: NetworkSpec) -> dict[str, Any]:
    told = {
        "shape": spec.input_shape,
        "mean": spec.mean,
        "std": spec.std,
        "crop_padding": spec.crop_padding,
        "flip": spec.flip,
    }
    return {key: value for key, value in told.items() if value is not None}


def _check_parameters(module: nn.Module, spec: NetworkSpec) -> None:
    origin = f"weights {spec.weights}" if spec.weights else f"network {spec.name!r}"
    if next(module.parameters(), None) is None:
        raise NetworkError(f"network {spec.name!r} has no parameters, and so nothing to prune")
    buffers = {name for name, _ in module.named_buffers()}
    for name, tensor in module.state_dict().items():
        # A mask may hold infinities on purpose; statistics and parameters may not.
        mask = name in buffers and not name.endswith(("running_mean", "running_var"))
        bad = tensor.isnan() if mask else ~tensor.isfinite()
        if bad.any():
            raise NetworkError(
                f"{origin}: {name} holds {int(bad.sum())} values that are not finite; train again, "
                "or name an earlier checkpoint"
            )


def check_repeatable(network: Network) -> None:
    """Checks that a network whose weights no file holds is made the same again.

    Raises:
        NetworkError: It is not, and nobody could resume or export what is found with it.
    """
    spec = replace(network.spec, input_shape=network.input.shape)
    first, again = network.module.state_dict(), load_network(spec).module.state_dict()
    if any(not torch.equal(first[name], again[name]) for name in first):
        raise NetworkError(
            f"network {spec.name!r} gets different weights each time it is made: name a file "
            "of its trained ones (network.weights), or load them where it is made"
        )


def load_network(spec: NetworkSpec, image_shape: tuple[int, int, int] | None = None) -> Network:
    """Makes a network, loads its weights, and settles its input.

    Normalisation, input shape and augmentation come from the spec, else from the metadata of a
    safetensors file, else from the catalogue. A user's own network is in no catalogue: it is
    assumed to take the images at hand, normalised like ImageNet, neither cropped nor mirrored.

    Args:
        spec: How to make it.
        image_shape: Height, width and channels of the images at hand.

    Raises:
        NetworkError: The network cannot be made, its weights do not fit, or its input is
            contradictory.
    """
    module, default = build_module(spec)
    module.eval()
    if image_shape is not None and is_own(spec.name):
        height, width, channels = image_shape
        default = replace(default, shape=(channels, height, width))
    told: dict[str, Any] = {}
    if spec.weights is not None:
        path = weights_path(spec.weights)
        state, metadata = read_weights(path)
        load_into(module, state, str(path))
        told = _told_by_metadata(metadata, str(path))
    plain(module)
    _check_parameters(module, spec)
    said = {**told, **_told_by_spec(spec)}
    input_spec = replace(default, **said)
    channels = input_spec.shape[0]
    for key, values in (("mean", input_spec.mean), ("std", input_spec.std)):
        if len(values) != channels:
            if key not in said and image_shape is not None:
                raise NetworkError(
                    f"the images have {channels} channels, and network.{key} is not set, so "
                    f"ImageNet's is used, of {len(values)}; give images with the {len(values)} "
                    "channels that the network takes, or name network.mean and network.std"
                )
            left = "" if key in said else ", as it is not set and ImageNet's is used"
            raise NetworkError(
                f"network.{key} needs one number per input channel ({channels}), got "
                f"{len(values)}{left}"
            )
    if not all(0 < value < math.inf for value in input_spec.std):
        raise NetworkError(f"network.std must be positive, got {input_spec.std}")
    return Network(spec=spec, module=module, input=input_spec)
