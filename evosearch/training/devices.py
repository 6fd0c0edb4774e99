"""Where a network is trained."""

import re
from dataclasses import replace

import torch

from evosearch.errors import BackendError, ConfigError
from evosearch.networks import Network

__all__ = ["on_device", "training_device"]

_NAMES = re.compile(r"cpu|cuda(:\d+)?")


def training_device(wish: str) -> str:
    """The device that is meant; `auto` is a GPU where torch finds one.

    Raises:
        ConfigError: There is no such name.
        BackendError: There is no such device.
    """
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not _NAMES.fullmatch(wish):
        raise ConfigError(f"--device is cpu, cuda, cuda:1 and so on, or auto, got {wish!r}")
    if wish == "cpu":
        return wish
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(wish).index or 0) >= there:
        raise BackendError(f"--device {wish}: torch finds {there} GPUs on this machine")
    return wish


def on_device(network: Network, device: str) -> Network:
    """The same network there; its module is moved."""
    return replace(network, module=network.module.to(device))
