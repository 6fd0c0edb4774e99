"""GPUs that are not there are a sentence before anything is made."""

import pytest
import torch

from evosearch.errors import BackendError, ConfigError
from evosearch.scoring.devices import check_devices, local_device, use_gpu_of


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(BackendError, match=r"run.gpus_per_worker = 0.5, but torch finds no GPU"):
        check_devices(workers, 0.5, None)
    assert local_device(0.5) == "cpu"


@pytest.mark.parametrize(
    ("workers", "share", "count"), [(3, 0.5, 1), (3, 0.6, 2), (2, 1.0, 1), (2, 2.0, 2)]
)
def test_more_workers_than_gpus_have_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, workers: int, share: float, count: int
) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(BackendError, match=rf"run.workers = {workers} .* room for {workers - 1}"):
        check_devices(workers, share, None)
    check_devices(workers - 1, share, None)
    assert local_device(share) == "cuda"


def test_a_cluster_knows_its_gpus_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    check_devices(2, 1.0, "10.0.0.1:6379")


def test_an_address_without_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.ray_address = 'auto' .* run.workers = 0"):
        check_devices(0, 0.0, "auto")


def test_one_and_a_half_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    with pytest.raises(ConfigError, match=r"run.gpus_per_worker = 1.5 must be a whole number"):
        check_devices(1, 1.5, None)


def test_without_gpus_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    check_devices(8, 0.0, None)
    assert local_device(0.0) == "cpu"


@pytest.mark.parametrize(
    ("share", "count", "places"),
    [
        (1.0, 4, [0, 1, 2, 3]),
        (0.5, 2, [0, 0, 1, 1]),
        (0.3, 2, [0, 0, 0, 1]),
        (2.0, 4, [0, 2, 0, 2]),
        (0.25, 1, [0, 0, 0, 0]),
    ],
)
def test_workers_without_ray_are_spread_over_the_gpus(
    monkeypatch: pytest.MonkeyPatch, share: float, count: int, places: list[int]
) -> None:
    gpus(monkeypatch, count)
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    most: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", most.append)
    for worker in range(4):
        use_gpu_of(worker, share)
    assert found == places
    assert most == ([pytest.approx(0.9 * share)] * 4 if share < 1 else [])


def test_fine_tuning_on_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(BackendError, match="no GPU on this machine, where fine-tuning runs"):
        use_gpu_of(0, 0.5)
