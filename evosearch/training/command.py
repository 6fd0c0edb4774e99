"""The work behind `evosearch train`: data in, weights, log and record out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evosearch.data import DataSource, Images, SourceOptions, open_source, whole
from evosearch.errors import ConfigError, DataError
from evosearch.files import make_parent
from evosearch.networks import (
    Network,
    NetworkSpec,
    build_module,
    is_own,
    load_network,
    save_weights,
)
from evosearch.training.baseline import Checkpoint, EpochLog, TrainSettings, top1, train
from evosearch.training.devices import on_device, training_device
from evosearch.training.records import CHECKPOINT, check_result, how_trained, write_records

__all__ = [
    "Trained",
    "augmented",
    "image_size_for",
    "train_baseline",
]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run left behind. Accuracies are fractions of all images of that part."""

    weights: Path
    log: Path
    record: Path
    held_out_top1: float
    test_top1: float | None


def augmented(
    settings: TrainSettings, spec: NetworkSpec, crop_padding: int | None, flip: bool | None
) -> TrainSettings:
    """Settings that crop and mirror as is said, else as the catalogue has it of the network.

    Of a user's own network nothing is known: then it is as the settings say.

    Raises:
        NetworkError: The network cannot be made.
    """
    usual = settings if is_own(spec.name) else build_module(spec)[1]
    return replace(
        settings,
        crop_padding=usual.crop_padding if crop_padding is None else crop_padding,
        flip=usual.flip if flip is None else flip,
    )


def image_size_for(spec: NetworkSpec, side: int | None) -> tuple[int, int]:
    """Height and width that image files are fitted to: as is said, else what the network takes.

    A user's own network is in no catalogue: it is taken for one of ImageNet, as in a search.

    Raises:
        NetworkError: The network cannot be made.
    """
    _, height, width = build_module(spec)[1].shape
    return (height, width) if side is None else (side, side)


def _has_test(data: str, options: SourceOptions) -> bool:
    """Whether there are test images: arrays and folders may come without."""
    if data == "image-folder":
        return (options.root / "test").is_dir()
    return options.test_path is not None or not data.endswith(".npz")


def _opened(data: str, options: SourceOptions) -> DataSource:
    """The source.

    Raises:
        DataError: Its test images, if they are named, are not there: told before it is trained.
    """
    if options.test_path is not None and not options.test_path.is_file():
        raise DataError(f"--test-data: {options.test_path} does not exist")
    return open_source(data, options)


def _made_for(images: Images, spec: NetworkSpec, data: str) -> Network:
    """The network, with new weights, that takes such images.

    Raises:
        ConfigError: It takes others.
    """
    height, width, channels = images.pixels.shape[1:]
    network = load_network(spec, (height, width, channels))
    if (channels, height, width) != network.input.shape:
        raise ConfigError(
            f"{spec.name} takes images of shape {network.input.shape}, {data} has "
            f"{images.pixels.shape[1:]} (height, width, channels)"
        )
    return network


def train_baseline(
    spec: NetworkSpec,
    data: str,
    options: SourceOptions,
    settings: TrainSettings,
    out: Path,
    *,
    device: str = "cpu",
    report: Callable[[EpochLog], object] = id,
) -> Trained:
    """Trains on a source's training part and writes `out`, `.log.csv` and `.json` beside it.

    The test part, if there is one, is opened once, after the last epoch.

    Raises:
        ConfigError: `out` does not end with `.safetensors`, or exists already; or there is no
            device of that name.
        BackendError: There is no such device, or a file cannot be written.
        NetworkError: The network cannot be made.
        DataError: The data cannot be read, or a label has no class.
    """
    check_result(out, "--out")
    device = training_device(device)
    # The network first: images may have to be fetched.
    build_module(spec)
    source = _opened(data, options)
    images, held_out = whole(source.training()), whole(source.held_out())
    if images.labels.max() >= spec.num_classes:
        raise ConfigError(
            f"--num-classes is {spec.num_classes}, but {data} has a label {images.labels.max()}"
        )
    make_parent(out)
    torch.manual_seed(settings.seed)
    network = on_device(_made_for(images, spec, data), device)
    about = {"network": str(spec), "images": images.digest()}
    checkpoint = Checkpoint(path=out.with_suffix(CHECKPOINT), about=about)
    log = train(network, images, held_out, settings, checkpoint=checkpoint, report=report)
    test_top1 = top1(network, whole(source.test())) if _has_test(data, options) else None
    facts = {
        "network": spec.name,
        "num_classes": spec.num_classes,
        "shape": network.input.shape,
        "mean": network.input.mean,
        "std": network.input.std,
        "crop_padding": settings.crop_padding,
        "flip": settings.flip,
        "training_images": len(images),
        "held_out_images": len(held_out),
        "held_out_top1": log[-1].held_out_top1,
        "test_top1": test_top1,
        **how_trained(settings),
    }
    log_path, record = write_records(out, log, facts)
    save_weights(out, network.module, facts)
    checkpoint.path.unlink(missing_ok=True)
    return Trained(
        weights=out,
        log=log_path,
        record=record,
        held_out_top1=log[-1].held_out_top1,
        test_top1=test_top1,
    )
