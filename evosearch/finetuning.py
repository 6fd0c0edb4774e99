"""The work behind `evosearch finetune`: a network of a run, trained on the run's own images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evosearch.data import Images, whole
from evosearch.errors import DataError
from evosearch.files import make_parent
from evosearch.ledger import Ledger
from evosearch.materials import source_of
from evosearch.networks import Network, on_cpu
from evosearch.recipe import Recipe
from evosearch.results.front import Row, read_results
from evosearch.results.networks import NetworkWriter, chosen_row
from evosearch.results.preparation import AS_SEARCHED, Preparation
from evosearch.scoring.workload import settled_precision
from evosearch.training import Checkpoint, TrainSettings, top1, train
from evosearch.training.devices import on_device, training_device
from evosearch.training.records import CHECKPOINT, check_result, how_trained, write_records

__all__ = ["FineTuned", "FineTuning", "fine_tune"]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How to fine-tune.

    Args:
        training: Settings of the trainer; crops, flips and precision are settled later.
        start: How the network is prepared that training starts from.
        precision: As in a recipe: `auto` is bfloat16 where the hardware computes in it.
        device: `cpu`, `cuda`, or `auto`.
    """

    training: TrainSettings
    start: Preparation = AS_SEARCHED
    precision: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What fine-tuning left behind. Accuracies are fractions of all images of that part.

    Args:
        network: In words: the dense one's name, and what is left of its costs.
        weights, log, record: The files.
        before: Held-out top-1 of the cut network before training.
        after: Top-1 of the trained one by part: `held out` and, if there are such images, `test`.
        dense: The same of the dense network.
    """

    network: str
    weights: Path
    log: Path
    record: Path
    before: float
    after: Mapping[str, float]
    dense: Mapping[str, float]

    @property
    def in_vain(self) -> bool:
        """Whether the network was no worse before."""
        return self.after["held out"] <= self.before


def fine_tune(
    run: Path,
    file: Path,
    digits: str | None,
    wanted: FineTuning,
    told: Callable[[object], object] = id,
) -> FineTuned:
    """Trains a network of a run and writes `file`, which `load_pruned` reads.

    The images are the run's: the whole training part is trained on, crops and flips are those of
    the recipe; the held-out part is measured after every epoch, for the log alone; on the test
    part, if there is one, the trained network is measured once, after the last. A log and a record,
    `.log.csv` and `.json`, lie beside the weights. A call that was stopped continues, where it is
    made again, after the last epoch.

    Args:
        run: Directory of the run.
        file: Ends with `.safetensors`, and does not exist.
        digits: The first digits of the policy's digest; None for a front of one.
        wanted: How.
        told: Hears what is going on, and of every epoch.

    Raises:
        ConfigError: There is no such policy, a setting is impossible, or the file is there.
        ConfigMismatch: Network or images are not the ones that were measured.
        BackendError: There is no such device, or a file cannot be written.
    """
    check_result(file, "FILE")
    device = training_device(wanted.device)
    with Ledger.open(run) as ledger:
        row = chosen_row(read_results(ledger), digits, run)
        writer = NetworkWriter(run, ledger, wanted.start)
    make_parent(file)
    training, parts = _images(writer.recipe, told)
    network, dense = _networks(writer, row, device)
    settings = _settled(wanted, network, device)
    reference, before = _measured(dense, parts), top1(network, parts["held out"])
    told(
        f"{row.policy.digest}: {writer.described(row)}; held out {before:.2%} before training, "
        f"{len(training)} images on {device} in {settings.precision}"
    )
    checkpoint = Checkpoint(
        path=file.with_suffix(CHECKPOINT), about=_subject(writer, row, training)
    )
    log = train(
        network,
        training,
        parts["held out"],
        settings,
        teacher=dense.module,
        checkpoint=checkpoint,
        report=told,
    )
    after = _measured(network, parts)
    facts = {
        "run": str(run),
        **_described(writer, row),
        "training_images": len(training),
        "held_out_top1": {"before": before, "after": after["held out"]},
        "test_top1": after.get("test"),
        "dense_top1": reference,
        **how_trained(settings),
    }
    log_path, record = write_records(file, log, facts)
    writer.save(row, replace(network, module=on_cpu(network.module)), file, {"finetuned": facts})
    checkpoint.path.unlink(missing_ok=True)
    return FineTuned(
        network=writer.described(row),
        weights=file,
        log=log_path,
        record=record,
        before=before,
        after=after,
        dense=reference,
    )


def _settled(wanted: FineTuning, network: Network, device: str) -> TrainSettings:
    """How it is trained, once network and device are known."""
    return replace(
        wanted.training,
        precision=settled_precision(wanted.precision, gpu=device != "cpu"),
        crop_padding=network.input.crop_padding,
        flip=network.input.flip,
    )


def _described(writer: NetworkWriter, row: Row) -> dict[str, Any]:
    """What was trained, for the record."""
    return {
        "network": writer.dense.spec.name,
        "policy": row.policy.digest,
        "macs": row.macs,
        "params": row.params,
        "start": writer.prepared,
    }


def _networks(writer: NetworkWriter, row: Row, device: str) -> tuple[Network, Network]:
    """The network of a policy, to be trained, and the dense one that guides it."""
    return on_device(writer.trainable(row), device), on_device(writer.dense, device)


def _subject(writer: NetworkWriter, row: Row, training: Images) -> dict[str, str]:
    """What is trained, and on what: what a checkpoint of another training differs in."""
    return {
        "policy": row.policy.digest,
        "start": writer.prepared,
        "proxy": writer.recipe.proxy.model_dump_json(),
        "dense network": writer.weights,
        "images": training.digest(),
    }


def _images(recipe: Recipe, told: Callable[[object], object]) -> tuple[Images, dict[str, Images]]:
    """What is trained on, and what is measured on, by name.

    Many sources have no test images, but those that a recipe names are wanted.

    Raises:
        DataError: Images cannot be read, or those of one part cannot be shown to the network.
    """
    source = source_of(recipe)
    training, parts = whole(source.training()), {"held out": whole(source.held_out())}
    try:
        parts["test"] = whole(source.test())
    except DataError as exc:
        if recipe.data.test:
            raise
        told(f"held-out images alone will be measured: {exc}")
    for part, images in parts.items():
        if images.pixels.shape[1:] != training.pixels.shape[1:] or not len(images):
            raise DataError(
                f"{part} images: {len(images)} of shape {images.pixels.shape[1:]}, wanted some of "
                f"shape {training.pixels.shape[1:]} (height, width, channels)"
            )
    return training, parts


def _measured(network: Network, parts: Mapping[str, Images]) -> dict[str, float]:
    return {name: top1(network, images) for name, images in parts.items()}
