"""The commands. Thin: each turns words into one call and its answer into text.

Nothing heavy is imported before it is needed. Results go to stdout, progress and errors to
stderr. Exit codes: 0 done, 2 bad input, 1 the environment failed, 130 interrupted.
"""

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from evosearch.errors import ConfigError, EvosearchError, first_line
from evosearch.progress import Progress

if TYPE_CHECKING:
    from evosearch.fidelity.study import Finished as Fidelity
    from evosearch.run import Finished

INTERRUPTED = 130
# Torch is seeded with a million times this, plus the epoch, which must fit into 64 bits.
_SEEDS = 10**12

app = typer.Typer(
    name="evosearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a .toml")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: search.population=48"),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Scorers on Ray; 0: in this process")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads [as many as torch finds good here]")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one")]
Evaluations = Annotated[int | None, typer.Option(min=1, help="Distinct policies to measure")]


def _loading() -> Progress:
    """Says what takes seconds, and minutes where gigabytes were installed just before."""
    progress = Progress()
    progress.phase("loading torch")
    return progress


def _recipe(
    name: str,
    settings: list[str] | None,
    **overrides: Any,
) -> Any:
    from evosearch.recipe import load_recipe

    return load_recipe(
        name, settings or (), {k.replace("__", "."): v for k, v in overrides.items()}
    )


def _changes(settings: list[str] | None) -> dict[str, Any]:
    """Dotted keys of a recipe to values."""
    from evosearch.recipe import parse_setting

    return dict(map(parse_setting, settings or ()))


def _conclude(finished: "Finished") -> None:
    """Prints what a search found, and ends with its exit code."""
    from rich.console import Console

    from evosearch.results.report import front_table, hypervolume_lines

    if finished.results.rows:
        Console().print(front_table(finished.results))
        for line in hypervolume_lines(finished.results):
            typer.echo(line)
        for path in finished.files:
            typer.echo(f"{path.suffix[1:]:18s} {path}")
    typer.echo(f"{'run':18s} {finished.directory} ({finished.outcome.reason})")
    if finished.interrupted:
        again = f"evosearch resume {quote(str(finished.directory))}"
        typer.echo(f"interrupted; continue with: {again}", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def launch(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Directory of the run [runs/RECIPE]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the search")] = None,
    workers: Workers = None,
    evaluations: Evaluations = None,
    algorithm: Annotated[str | None, typer.Option(help="See `evosearch list algorithms`")] = None,
    settings: Settings = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster")] = None,
    seed_from: Annotated[
        Path | None, typer.Option(help="Start from the last population of this run")
    ] = None,
) -> None:
    """Search for pruning policies and print their Pareto front.

    Example: evosearch launch quickstart --workers 2 --set search.population=32
    """
    checked = _recipe(
        recipe,
        settings,
        search__seed=seed,
        search__evaluations=evaluations,
        search__algorithm=algorithm,
        run__workers=workers,
        run__ray_address=ray_address,
    )
    progress = _loading()
    from evosearch.run import launch as start
    from evosearch.run import new_run_directory

    _conclude(start(checked, out or new_run_directory(recipe), progress, seed_from=seed_from))


@app.command()
def resume(
    run: RunPath,
    evaluations: Evaluations = None,
    workers: Workers = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Share of a GPU for each scorer; 0: none")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster")] = None,
) -> None:
    """Continue a run that was interrupted, or a finished one with a larger budget.

    Example: evosearch resume runs/quickstart --evaluations 500
    """
    progress = _loading()
    from evosearch.run import resume as proceed

    options = {
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "ray_address": ray_address,
    }
    given = {key: value for key, value in options.items() if value is not None}
    _conclude(proceed(run, progress, evaluations=evaluations, run_options=given))


@app.command()
def status(
    run: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
) -> None:
    """Tell how a run stands, also while it is searching.

    Example: evosearch status runs/quickstart --json
    """
    import json

    from evosearch.status import read_status

    facts = read_status(run)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if value is not None:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            typer.echo(f"{key.replace('_', ' '):22s} {shown}")


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Directory of a run, or a .safetensors to write as .onnx or .pt2"
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Ends with .csv .json .parquet .png, or .safetensors .onnx .pt2 for a network; a "
            "folder gets all networks",
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every measurement, not the front alone")
    ] = False,
    generation: Annotated[
        int | None, typer.Option(min=0, help="The population after this generation")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="First digits of the network to write")] = None,
    kind: Annotated[
        str | None, typer.Option("--as", help="onnx or pt2: what a folder gets [safetensors]")
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option(min=1, help="Training images to prepare networks with [as in the search]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Prepare networks otherwise: proxy.criterion=l1"
        ),
    ] = None,
) -> None:
    """Write the front of a run as a table, a picture or networks, or one network of the run.

    Example: evosearch export runs/quickstart front.csv
    """
    from evosearch.exporting import Choice, export_file
    from evosearch.results.preparation import Preparation

    choice = Choice(everything=everything, generation=generation, policy=policy, kind=kind)
    preparation = Preparation(calibration=calibration, settings=_changes(settings))
    said = export_file(run, file, choice, preparation, typer.echo)
    typer.echo(said)


@app.command()
def profile(recipe: RecipeName, settings: Settings = None, workers: Workers = None) -> None:
    """Show groups, genes and cost range of a recipe, time one candidate, predict the search.

    Example: evosearch profile quickstart --set space.round_to=8
    """
    checked = _recipe(recipe, settings, run__workers=workers)
    from evosearch.profiling import profile as measure
    from evosearch.profiling import profile_lines

    for line in profile_lines(checked, measure(checked)):
        typer.echo(line)


@app.command()
def fidelity(
    subject: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="What is pruned")],
    policies: Annotated[
        int, typer.Option(min=1, help="Policies to draw, and to take from a run")
    ] = 40,
    truth: Annotated[
        str,
        typer.Option(
            help="epochs, lr, batch, seeds, fraction, distillation, precision (auto, bf16, fp32), "
            "start=VARIANT"
        ),
    ] = "finetune:epochs=1",
    out: Annotated[
        Path | None, typer.Option(help="Directory [runs/RECIPE-fidelity, RUN/fidelity]")
    ] = None,
    proxies: Annotated[str, typer.Option(help="`evosearch list variants`, or all")] = "all",
    proxy_variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            help="Your own variant: other values of proxy.* and data.*",
        ),
    ] = None,
    macs: Annotated[str, typer.Option(help="Band of MACs, shares of dense")] = "0.46,0.54",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn policies")] = 0,
    workers: Workers = None,
    truth_on: Annotated[
        str | None, typer.Option(help="test or held-out [test if there are such images]")
    ] = None,
    settings: Settings = None,
) -> None:
    """Compare proxies with fine-tuning, at matched MACs; run again after a kill, it continues.

    Example: evosearch fidelity quickstart --policies 12 --truth finetune:epochs=2
    """
    from evosearch.fidelity.drawing import Band
    from evosearch.fidelity.study import Options, study
    from evosearch.fidelity.study import subject as read_subject
    from evosearch.fidelity.truth import Truth
    from evosearch.fidelity.variants import choose

    if truth_on not in (None, "test", "held-out"):
        raise ConfigError(f"--truth-on is test or held-out, got {truth_on!r}")
    options = Options(
        policies=policies,
        band=Band.parse(macs),
        truth=Truth.parse(truth),
        variants=choose(proxies, proxy_variant or ()),
        seed=seed,
        test=None if truth_on is None else truth_on == "test",
    )
    recipe, run = read_subject(subject, settings, {"run.workers": workers})
    default = Path("runs") / f"{Path(subject).stem}-fidelity" if run is None else run / "fidelity"
    finished = study(recipe, run, out or default, options, Progress())
    _tell_fidelity(finished)


def _tell_fidelity(finished: "Fidelity") -> None:
    """Prints what a study found, and ends with its exit code."""
    from rich.console import Console

    from evosearch.results.report import fidelity_table

    comparison = finished.comparison
    console = Console(width=None if sys.stdout.isatty() else 110)
    for name in comparison.sets:
        findings = comparison.of(name)
        if findings:
            console.print(fidelity_table(comparison.title(name), findings))
            for line in comparison.remarks(name):
                typer.echo(line)
    if comparison.failures:
        typer.echo(f"failed             {len(comparison.failures)}: {comparison.failures[0]}")
    for path in finished.files:
        typer.echo(f"{path.suffix[1:]:18s} {path}")
    if finished.interrupted:
        typer.echo("interrupted; the same command continues", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def criteria(
    recipe: RecipeName,
    settings: Settings = None,
    png: Annotated[Path | None, typer.Option(help="Draw the correlations into this file")] = None,
    group: Annotated[
        str | None, typer.Option(help="Show one group alone: its clusters, its part of the picture")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
) -> None:
    """Show which criteria rank the channels of a network alike, group by group.

    Example: evosearch criteria quickstart --png criteria.png --group layer3.0.conv1
    """
    import json

    from evosearch.comparing import compare, comparison_lines, comparison_record, write_heatmap

    if png is not None and png.suffix != ".png":
        raise ConfigError(f"--png {png} must end with .png")
    found = compare(_recipe(recipe, settings))
    if as_json:
        typer.echo(json.dumps(comparison_record(found, group), indent=2))
    else:
        for line in comparison_lines(found, group):
            typer.echo(line)
    if png is not None:
        write_heatmap(found, png, group)
        typer.echo(f"wrote {png}", err=True)


@app.command()
def train(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A name, module:factory or file.py:factory")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Name of a data set, or an .npz file")
    ],
    out: Annotated[Path, typer.Option(help="Where the weights go (.safetensors)")],
    num_classes: Annotated[int, typer.Option(min=1, help="Width of the classifier")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images")] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate, above 0")] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, help="L2 penalty")] = 5e-4,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side that image files are fitted to [the network's; 224]"),
    ] = None,
    crop_padding: Annotated[
        int | None,
        typer.Option(min=0, help="Padding before random crops [the catalogue's; 4 for your own]"),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option(help="Mirror half of the images [the catalogue's; else yes]")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[
        int, typer.Option(min=0, max=_SEEDS, help="Seed of weights, order and crops")
    ] = 0,
    threads: Threads = None,
    device: Device = "auto",
    data_root: Annotated[Path, typer.Option(help="Folder of the data set")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set")] = False,
    test_data: Annotated[Path | None, typer.Option(help="Test images of an .npz")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Images never trained on")] = None,
    official_order: Annotated[
        bool, typer.Option("--official-order", help="The .npz is in random order already")
    ] = False,
) -> None:
    """Train a dense network: seeded, with a log; run again after a kill, it continues.

    Example: evosearch train resnet20 cifar10 --download --out resnet20.safetensors
    """
    from evosearch.data import SourceOptions
    from evosearch.networks import NetworkSpec
    from evosearch.training import TrainSettings
    from evosearch.training.command import augmented, image_size_for, train_baseline

    spec = NetworkSpec(name=network, num_classes=num_classes)
    plain = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        threads=threads,
    )
    try:
        trained = train_baseline(
            spec,
            data,
            SourceOptions(
                root=data_root,
                download=download,
                test_path=test_data,
                held_out=held_out,
                official_order=official_order or None,
                image_size=image_size_for(spec, image_size),
            ),
            augmented(plain, spec, crop_padding, flip),
            out,
            device=device,
            report=_stderr,
        )
    except KeyboardInterrupt:
        _end_training()
    test = "" if trained.test_top1 is None else f", test {trained.test_top1:.2%}"
    typer.echo(f"{trained.weights}: held out {trained.held_out_top1:.2%}{test}; log {trained.log}")


def _end_training() -> NoReturn:
    typer.echo("interrupted; the same command continues after the last whole epoch", err=True)
    raise typer.Exit(INTERRUPTED) from None


def _stderr(line: object) -> None:
    typer.echo(str(line), err=True)


@app.command()
def finetune(
    run: RunPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where it goes (.safetensors)")],
    policy: Annotated[
        str | None, typer.Option(help="First digits of the network [the front's, if it has one]")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images")] = 20,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate; one cosine to zero")] = 0.01,
    weight_decay: Annotated[float, typer.Option(min=0, help="L2 penalty")] = 5e-4,
    distillation: Annotated[
        float, typer.Option(help="Share of the loss that follows the dense network; 1: no labels")
    ] = 0.9,
    temperature: Annotated[float, typer.Option(help="Softmax temperature in that part")] = 4.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Start from a network prepared otherwise than in the search: proxy.criterion=l1",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or auto")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=_SEEDS, help="Seed of order and crops")] = 0,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train a network of a run, guided by the dense one; run again after a kill, it continues.

    Example: evosearch finetune runs/quickstart small.safetensors --policy 5bf75d96 --epochs 40
    """
    from evosearch.finetuning import FineTuning, fine_tune
    from evosearch.results.preparation import Preparation
    from evosearch.training import TrainSettings

    training = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warmup_epochs=0.0,
        weight_decay=weight_decay,
        distillation=distillation,
        temperature=temperature,
        seed=seed,
        threads=threads,
    )
    start = Preparation(settings=_changes(settings))
    wanted = FineTuning(training=training, start=start, precision=precision, device=device)
    try:
        done = fine_tune(run, file, policy, wanted, _stderr)
    except KeyboardInterrupt:
        _end_training()
    parts = ", ".join(
        f"{part} {after:.2%} (dense {done.dense[part]:.2%})" for part, after in done.after.items()
    )
    typer.echo(f"{done.weights}: {done.network}, {parts}; log {done.log}")
    if done.in_vain:
        _stderr(
            f"the training left it no better than it was ({done.before:.2%} held out); try more "
            "--epochs, or a lower --lr"
        )


@app.command("list")
def list_names(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="settings, recipes, spaces, algorithms, criteria, proxies, variants, networks, "
            "datasets, stopwatches",
        ),
    ],
) -> None:
    """List what a recipe can say (settings), and all that it can name.

    Example: evosearch list algorithms
    """
    from evosearch.listing import LISTS

    if what not in LISTS:
        raise ConfigError(f"nothing to list under {what!r}; there are {', '.join(LISTS)}")
    for name, title in LISTS[what]().items():
        apart = len(name) >= 24 or what == "settings"
        typer.echo(f"{name}\n{_indented(title)}" if apart else f"{name:24s} {title}")


def _indented(text: str) -> str:
    """Paragraphs of a list, in a terminal as wide as it is."""
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")


@app.callback()
def _root() -> None:
    """Evolutionary search of pruning policies for convolutional networks."""


def _details(exc: Exception) -> str:
    """Writes down all that a report of a defect needs, and says where."""
    import tempfile
    import traceback

    text = "\n".join([*sys.argv, sys.version, "".join(traceback.format_exception(exc))])
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="evosearch-", suffix=".log", delete=False
        ) as stream:
            stream.write(text)
    except OSError as failure:
        return f"and its details cannot be written: {failure.strerror}"
    return f"please report it with {stream.name}"


def main() -> None:
    """Entry point of the console script: errors become a sentence and an exit code."""
    try:
        app()
    except EvosearchError as exc:
        typer.echo(f"evosearch: {exc}", err=True)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        typer.echo("evosearch: stopped; what was measured is recorded", err=True)
        sys.exit(INTERRUPTED)
    except Exception as exc:  # noqa: BLE001  the last resort: nobody is shown a traceback
        first = first_line(exc)
        typer.echo(
            f"evosearch: unexpected {type(exc).__name__}: {first}; this should not happen, "
            f"{_details(exc)}",
            err=True,
        )
        sys.exit(1)
