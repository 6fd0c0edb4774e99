"""The work behind `evosearch train`: data in, weights, log and record out."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from evosearch.data import ImagePool, Images, SourceOptions, open_source
from evosearch.errors import ConfigError
from evosearch.files import make_parent, write_atomically
from evosearch.networks import NetworkSpec, build_module, load_network, save_weights
from evosearch.training.baseline import EpochLog, TrainSettings, top1, train, write_log

__all__ = ["Trained", "train_baseline"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run left behind. Accuracies are fractions of all images of that part."""

    weights: Path
    log: Path
    record: Path
    epochs: int
    held_out_top1: float
    test_top1: float | None


def _all(pool: ImagePool) -> Images:
    return pool.take(np.arange(len(pool.labels)))


def train_baseline(
    spec: NetworkSpec,
    data: str,
    options: SourceOptions,
    settings: TrainSettings,
    out: Path,
    *,
    test: bool = True,
    report: Callable[[EpochLog], object] = id,
) -> Trained:
    """Trains on a source's training part and writes `out`, `.log.csv` and `.json` beside it.

    The test part is opened once, after the last epoch, if `test` is set.

    Raises:
        ConfigError: `out` does not end with `.safetensors`, or exists already.
        NetworkError: The network cannot be made.
        DataError: The data cannot be read, or a label has no class.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out must end with .safetensors, got {out}")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; remove it or name another file")
    # The network first: images may have to be fetched.
    build_module(spec)
    source = open_source(data, options)
    images, held_out = _all(source.training()), _all(source.held_out())
    if images.labels.max() >= spec.num_classes:
        raise ConfigError(
            f"--num-classes is {spec.num_classes}, but {data} has a label {images.labels.max()}"
        )
    make_parent(out)
    torch.manual_seed(settings.seed)
    height, width, channels = images.pixels.shape[1:]
    network = load_network(spec, (height, width, channels))
    if images.pixels.shape[1:] != (*network.input.shape[1:], network.input.shape[0]):
        raise ConfigError(
            f"{spec.name} takes images of shape {network.input.shape}, {data} has "
            f"{images.pixels.shape[1:]} (height, width, channels)"
        )
    checkpoint = out.with_suffix(".checkpoint.pt")
    log = train(network, images, held_out, settings, checkpoint=checkpoint, report=report)
    test_top1 = top1(network, _all(source.test())) if test else None
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
        "settings": asdict(settings),
        "command": shlex.join(["evosearch", *sys.argv[1:]]),
        "torch": torch.__version__,
    }
    record, log_path = out.with_suffix(".json"), out.with_suffix(".log.csv")
    write_log(log_path, log)
    text = json.dumps(facts, indent=2) + "\n"
    write_atomically(record, lambda scratch: scratch.write_text(text))
    save_weights(out, network.module, facts)
    checkpoint.unlink(missing_ok=True)
    return Trained(
        weights=out,
        log=log_path,
        record=record,
        epochs=len(log),
        held_out_top1=log[-1].held_out_top1,
        test_top1=test_top1,
    )
