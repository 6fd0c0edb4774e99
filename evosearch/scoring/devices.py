"""Whether this machine has the devices that a recipe's `[run]` table asks for."""

import torch

from evosearch.errors import BackendError, ConfigError

__all__ = ["check_devices", "gpus_here", "keep_to_share", "local_device", "use_gpu_of"]

# The rest is for what a process takes of a GPU before it makes a tensor.
_OF_ITS_SHARE = 0.9


def check_devices(workers: int, gpus_per_worker: float, ray_address: str | None) -> None:
    """Checks what can be known before anything is made; an existing cluster knows for itself.

    Args:
        workers: Scorers on Ray; 0 scores in this process.
        gpus_per_worker: Share of a GPU for each.
        ray_address: The cluster to join, if any.

    Raises:
        ConfigError: The settings contradict each other.
        BackendError: There are fewer GPUs than are asked for.
    """
    if ray_address is not None and workers == 0:
        raise ConfigError(
            f"run.ray_address = {ray_address!r} is of no use with run.workers = 0; "
            "set --workers, or leave the address out"
        )
    if gpus_per_worker == 0 or ray_address is not None:
        return
    if gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
        raise ConfigError(
            f"run.gpus_per_worker = {gpus_per_worker:g} must be a whole number or less than 1"
        )
    count = gpus_here()
    if count == 0:
        raise BackendError(
            f"run.gpus_per_worker = {gpus_per_worker:g}, but torch finds no GPU on this machine; "
            "set it to 0 (resume: --gpus-per-worker 0), or join a cluster with --ray-address"
        )
    # A share of a GPU lies on one of them.
    room = (
        count * int(1 / gpus_per_worker) if gpus_per_worker < 1 else count // int(gpus_per_worker)
    )
    if max(workers, 1) > room:
        raise BackendError(
            f"run.workers = {workers} with run.gpus_per_worker = {gpus_per_worker:g} want more "
            f"than the {count} GPUs here, which have room for {room}; ask for fewer"
        )


def gpus_here() -> int:
    """How many GPUs torch can use on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def use_gpu_of(worker: int, share: float) -> None:
    """Has this process compute on the GPU of one of several workers of this machine.

    Args:
        worker: Its number, from 0 on.
        share: Of a GPU, for each; several whole ones are one.

    Raises:
        BackendError: There is no GPU here.
    """
    count = gpus_here()
    if count == 0:
        raise BackendError(
            f"run.gpus_per_worker = {share:g}, but torch finds no GPU on this machine, where "
            "fine-tuning runs; set it to 0"
        )
    place = worker // int(1 / share) if share < 1 else worker * int(share)
    torch.cuda.set_device(place % count)
    keep_to_share(share)


def keep_to_share(share: float) -> None:
    """Has this process take no more memory than its share of a GPU.

    What one process has cached there is free memory to none of the others.
    """
    if 0 < share < 1 and gpus_here():
        torch.cuda.set_per_process_memory_fraction(_OF_ITS_SHARE * share)


def local_device(gpus_per_worker: float) -> str:
    """Where this process scores, `cuda` or `cpu`."""
    return "cuda" if gpus_per_worker > 0 and gpus_here() else "cpu"
