"""The commands. Names become objects here; nothing heavy is imported before it is needed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from evosearch.errors import EvosearchError

app = typer.Typer(
    name="evosearch",
    help="Evolutionary search of pruning policies for convolutional networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command()
def train(
    network: Annotated[str, typer.Argument(help="Name of a network, module:factory or file.py:factory")],
    data: Annotated[str, typer.Argument(help="Name of a data set, or an .npz file")],
    out: Annotated[Path, typer.Option(help="Where the weights go (.safetensors)")],
    num_classes: Annotated[int, typer.Option(help="Width of the classifier")] = 10,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate")] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    data_root: Annotated[Path, typer.Option(help="Folder of the data set")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set")] = False,
    test_data: Annotated[Path | None, typer.Option(help="Test images of an .npz")] = None,
    held_out: Annotated[int | None, typer.Option(help="Images never trained on")] = None,
    official_order: Annotated[
        bool, typer.Option("--official-order", help="The .npz keeps a random order")
    ] = False,
) -> None:
    """Train a dense baseline: seeded, resumable, with a log.

    Example: `evosearch train resnet20 cifar10 --download --out resnet20.safetensors`
    """
    from evosearch.data import SourceOptions
    from evosearch.networks import NetworkSpec
    from evosearch.training import EpochLog, TrainSettings
    from evosearch.training.command import train_baseline

    def report(line: EpochLog) -> None:
        typer.echo(
            f"epoch {line.epoch:3d}  loss {line.train_loss:.4f}  train {line.train_top1:.2%}  "
            f"held out {line.held_out_top1:.2%}  {line.seconds:.0f} s",
            err=True,
        )

    trained = train_baseline(
        NetworkSpec(name=network, num_classes=num_classes),
        data,
        SourceOptions(
            root=data_root,
            download=download,
            test_path=test_data,
            held_out=held_out,
            official_order=official_order or None,
        ),
        TrainSettings(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            precision=precision,
            seed=seed,
            threads=threads,
        ),
        out,
        test=not (data.endswith(".npz") and test_data is None),
        report=report,
    )
    test = "" if trained.test_top1 is None else f", test {trained.test_top1:.2%}"
    typer.echo(f"{trained.weights}: held out {trained.held_out_top1:.2%}{test}; log {trained.log}")


@app.callback()
def _root() -> None:
    """Evolutionary search of pruning policies for convolutional networks."""


def main() -> None:
    """Entry point of the console script: errors become a sentence and an exit code."""
    try:
        app()
    except EvosearchError as exc:
        typer.echo(f"evosearch: {exc}", err=True)
        sys.exit(exc.exit_code)
