"""How many candidates a second, beside what one would write by hand?

The rival is Optuna's NSGA-II driving Torch-Pruning: copy the network, prune every group by L1 norm,
recalibrate batch norm on 500 images, measure top-1 on 1,000 images, count MACs; eager float32, two
processes. Ours are searches' own workers on Ray: once with the same images,
and with fewer, as the evidence on fidelity suggests (`fast`; `quick`, to be read by its
distortion). All score the policies of results/fidelity-NETWORK-policies.csv, which were fine-tuned
there, in blocks that take turns, so that a noisy machine is noisy for everybody. What they find is
compared with that truth: the taus are those of the very candidates that were timed, by every metric
that one could read. The rival gets a divergence, too, as its outputs have it for nothing. As a tau
is also luck with the images, all are compared again on other images, `--draws` times.

Then, in this process alone: where a candidate's time goes, and how near the forward passes come to
the machine's matrix multiplication.

    python benchmarks/throughput.py [--network resnet56] [--data FOLDER] [--blocks 3] [--draws 4]
"""

import copy
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import images, parser, policies_and_truth, published, show, write
from numpy.typing import NDArray
from torch import nn

from evosearch.data import Images, augment, balanced_subset
from evosearch.fidelity.statistics import correlate
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement
from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable
from evosearch.recipe import RunRecipe
from evosearch.scoring.pool import RayPool
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import (
    Workload,
    divergence,
    prepare_workload,
    settled_precision,
)

PROCESSES = 2
GOAL_RATIO, GOAL_PEAK, GOAL_OUTSIDE = 10.0, 0.6, 0.05
CALIBRATION, VALIDATION = 500, 1000
OURS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ours, compensated": (
        CALIBRATION,
        VALIDATION,
        {"name": "compensated", "criterion": "residual-energy"},
    ),
    "ours, compensated, fast": (
        CALIBRATION,
        256,
        {"name": "compensated", "criterion": "residual-energy", "recalibration_images": 128},
    ),
    "ours, compensated, quick": (
        CALIBRATION,
        64,
        {"name": "compensated", "criterion": "residual-energy", "recalibration_images": 64},
    ),
    "ours, reconstructed": (
        CALIBRATION,
        VALIDATION,
        {"name": "reconstructed", "criterion": "residual-energy"},
    ),
    "ours, reconstructed, fast": (
        CALIBRATION,
        256,
        {"name": "reconstructed", "criterion": "residual-energy", "reconstruction_images": 128},
    ),
    "ours, reconstructed, quick": (
        CALIBRATION,
        64,
        {
            "name": "reconstructed",
            "criterion": "residual-energy",
            "reconstruction_images": 64,
            "reconstruction_layers": "cut",
        },
    ),
}
RIVAL = "Optuna and Torch-Pruning"
READ_BY = ("error", "divergence", "distortion")
Found = dict[Policy, dict[str, float]]


# --- the rival

_rival: dict[str, Any] = {}


def start_rival(name: str, folder: Path, calibration: Images, validation: Images) -> None:
    """Loads what a hand-written worker would hold."""
    torch.set_num_threads(1)
    network = published(folder, name)
    model, shown = network.module.eval(), network.normalise(validation.pixels)
    with torch.no_grad():
        dense = torch.cat([model(batch) for batch in torch.split(shown, 128)])
    _rival.update(
        model=model,
        example=network.example(),
        calibration=network.normalise(calibration.pixels),
        validation=shown,
        labels=torch.from_numpy(validation.labels),
        dense=dense,
    )


def hand_written(ratios: list[float]) -> tuple[float, float, float]:
    """Error, divergence and MACs of one candidate, as a user's objective would get them."""
    import torch_pruning as tp

    model = copy.deepcopy(_rival["model"])
    blocks = [m for m in model.modules() if hasattr(m, "conv2")]
    pruner = tp.pruner.MagnitudePruner(
        model,
        _rival["example"],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict={b.conv1: r for b, r in zip(blocks, ratios, strict=True)},
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)]
        + [b.conv2 for b in blocks]
        + [model.conv1],
    )
    pruner.step()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
        model.train()
        for batch in _rival["calibration"].split(128):
            model(batch)
        model.eval()
        outputs = torch.cat([model(batch) for batch in _rival["validation"].split(128)])
    macs, _ = tp.utils.count_ops_and_params(model, _rival["example"])
    error = float((outputs.argmax(1) != _rival["labels"]).double().mean())
    return error, divergence(_rival["dense"], outputs), float(macs)


def rival_block(
    executor: ProcessPoolExecutor, study: Any, table: GroupTable, block: list[Policy]
) -> tuple[float, Found]:
    """Candidates per second of Optuna asking, two processes scoring; and what they found."""
    import optuna

    start = time.perf_counter()
    for policy in block:
        shares = {
            f"r{i}": 1 - keep / int(c)
            for i, (keep, c) in enumerate(zip(policy.keep, table.channels, strict=True))
        }
        study.enqueue_trial(shares)
    flying = []
    for _ in block:
        trial = study.ask()
        ratios = [trial.suggest_float(f"r{i}", 0.0, 0.9) for i in range(len(table.groups))]
        flying.append((trial, executor.submit(hand_written, ratios)))
    found: Found = {}
    for policy, (trial, future) in zip(block, flying, strict=True):
        error, moved, macs = future.result()
        study.tell(trial, [error, macs], state=optuna.trial.TrialState.COMPLETE)
        found[policy] = {"error": error, "divergence": moved}
    return len(block) / (time.perf_counter() - start), found


# --- ours


def ours_block(pool: RayPool, block: list[Policy]) -> tuple[float, Found]:
    """Candidates per second, and what came out."""
    start = time.perf_counter()
    landed: list[Measurement] = []
    pool.score(block, landed.append, lambda: False)
    if not all(m.ok for m in landed):
        raise SystemExit(f"failed: {[m.reason for m in landed if not m.ok]}")
    rate = len(block) / (time.perf_counter() - start)
    return rate, {m.policy: dict(m.metrics) for m in landed}


@contextmanager
def stopwatch(scorer: Scorer, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of each step of a scorer."""

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return step(*arguments)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return run

    names = ("cut", "compensate", "recalibrate", "reconstruct", "measure")
    for name in names:
        setattr(scorer, name, timed(name, getattr(scorer, name)))
    yield
    for name in names:
        delattr(scorer, name)


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on one core."""
    size, best = 2048, 0.0
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def forward_images(settings: ProxySettings, workload: Workload) -> dict[str, int]:
    """Images that each step shows to the network."""
    n = len(workload.calibration)
    return {
        "measure": len(workload.validation),
        "recalibrate": min(settings.recalibration_images or n, n),
        "reconstruct": min(settings.reconstruction_images, n),
    }


def where_time_goes(workload: Workload, policies: list[Policy]) -> dict[str, Any]:
    """Shares of a candidate's steps, dispatch and ledger; useful FLOP/s beside the peak."""
    scorer = Scorer(workload)
    scorer.score(policies[0])
    spent: dict[str, float] = {}
    start = time.perf_counter()
    with stopwatch(scorer, spent):
        for policy in policies:
            scorer.score(policy)
    whole = time.perf_counter() - start
    macs, params = workload.plan.table.costs_of(policies)
    shown = forward_images(workload.settings, workload)
    flops = {name: 2.0 * float(macs.sum()) * n for name, n in shown.items() if name in spent}
    with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder), {}) as ledger:
        costs = [(int(m), int(p)) for m, p in zip(macs, params, strict=True)]
        ledger.record_ask("search", 0, policies, costs)
        start = time.perf_counter()
        for policy in policies:
            ledger.record(_plain(policy), time.time())
        ledger_seconds = time.perf_counter() - start
    best = peak(torch.bfloat16 if workload.settings.precision == "bfloat16" else torch.float32)
    forward = sum(spent[name] for name in flops)
    return {
        "seconds": whole / len(policies),
        "shares": {name: value / whole for name, value in spent.items()},
        "ledger_share": ledger_seconds / whole,
        "flops_per_second": {name: flops[name] / spent[name] for name in flops},
        "peak_flops_per_second": best,
        "share_of_peak": sum(flops.values()) / forward / best,
        "outside_forward": 1 - forward / whole + ledger_seconds / whole,
    }


def _plain(policy: Policy) -> Measurement:
    from evosearch.measurement import METRICS, Status

    return Measurement(policy=policy, status=Status.OK, metrics=dict.fromkeys(METRICS, 0.5))


def the_images(folder: Path, draw: int = 0) -> tuple[Images, Images]:
    """Calibration and validation images, balanced, of different parts of the training images."""
    train = images(folder, "cifar10_train")
    first, last = np.arange(45_000), np.arange(45_000, 50_000)
    return (
        train.take(first[balanced_subset(train.labels[first], CALIBRATION, draw)]),
        train.take(last[balanced_subset(train.labels[last], VALIDATION, draw)]),
    )


def prepared(
    network: Network, plan: CuttingPlan, calibration: Images, validation: Images, draw: int = 0
) -> dict[str, Workload]:
    """What each of ours scores with."""
    rng = np.random.default_rng(draw)
    workloads = {}
    for name, (n_calibration, n_validation, proxy) in OURS.items():
        chosen = calibration.take(np.arange(n_calibration))
        workloads[name] = prepare_workload(
            network,
            plan,
            ProxySettings(**{**proxy, "precision": settled_precision("auto")}),
            Images(augment(chosen.pixels, 4, True, rng), chosen.labels),
            validation.take(np.arange(n_validation)),
        )
    return workloads


def in_turns(
    workloads: dict[str, Workload],
    table: GroupTable,
    blocks: list[list[Policy]],
    arguments: tuple[str, Path, Images, Images],
) -> tuple[dict[str, list[float]], dict[str, Found]]:
    """Candidates per second of everybody, block after block, and what everybody found.

    Args:
        workloads: Ours.
        table: Of the network.
        blocks: Policies that all of them score.
        arguments: What a worker of the rival starts with.
    """
    import optuna
    import ray

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=0)
    )
    rates: dict[str, list[float]] = {n: [] for n in (RIVAL, *workloads)}
    found: dict[str, Found] = {n: {} for n in rates}
    context = multiprocessing.get_context("spawn")
    # The workers of one pool are idle while others score: one cluster has room for all.
    ray.init(
        address="local",
        num_cpus=PROCESSES * len(workloads),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=1 << 30,
    )
    pools = {n: RayPool(w, RunRecipe(workers=PROCESSES)) for n, w in workloads.items()}
    with ProcessPoolExecutor(PROCESSES, context, start_rival, arguments) as executor:
        turns: dict[str, Callable[[list[Policy]], tuple[float, Found]]] = {
            RIVAL: functools.partial(rival_block, executor, study, table),
            **{name: functools.partial(ours_block, pool) for name, pool in pools.items()},
        }
        for turn in turns.values():
            turn(blocks[0][:PROCESSES])  # starts, warms up
        for block in blocks:
            for name, turn in turns.items():
                rate, landed = turn(block)
                rates[name].append(rate)
                found[name] |= landed
    for pool in pools.values():
        pool.close()
    ray.shutdown()
    return rates, found


def on_other_images(
    name: str, network: Network, plan: CuttingPlan, folder: Path, policies: list[Policy], draw: int
) -> dict[str, Found]:
    """What everybody finds with another draw of images."""
    calibration, validation = the_images(folder, draw)
    context = multiprocessing.get_context("spawn")
    started = (name, folder, calibration, validation)
    ratios = [
        [1 - k / int(c) for k, c in zip(policy.keep, plan.table.channels, strict=True)]
        for policy in policies
    ]
    with ProcessPoolExecutor(PROCESSES, context, start_rival, started) as executor:
        rival = dict(zip(policies, executor.map(hand_written, ratios), strict=True))
    found: dict[str, Found] = {
        RIVAL: {p: {"error": error, "divergence": moved} for p, (error, moved, _) in rival.items()}
    }
    for ours, workload in prepared(network, plan, calibration, validation, draw).items():
        scorer = Scorer(workload)
        found[ours] = {policy: dict(scorer.score(policy).metrics) for policy in policies}
    return found


def fidelity(found: Found, policies: list[Policy], truth: NDArray[np.float64]) -> dict[str, Any]:
    """Tau with its interval, by metric."""
    taus = {}
    for metric in READ_BY:
        if all(metric in found[policy] for policy in policies):
            values = np.array([found[policy][metric] for policy in policies])
            result = correlate(values, truth)
            keys = ("tau", "tau_low", "tau_high")
            taus[metric] = {key: float(getattr(result, key)) for key in keys}
    return taus


def show_rates(
    rates: dict[str, list[float]],
    ratios: dict[str, list[float]],
    taus: dict[str, dict[str, dict[str, float]]],
    title: str,
) -> None:
    show(
        title,
        ["", "candidates / s", "ratio", "range", *(f"tau by {metric}" for metric in READ_BY)],
        [
            [
                name,
                statistics.median(rate),
                statistics.median(ratios[name]),
                f"{min(ratios[name]):.1f} to {max(ratios[name]):.1f}",
                *(
                    "{tau:.2f} ({tau_low:.2f} to {tau_high:.2f})".format(**by[metric])
                    if metric in (by := taus[name])
                    else "-"
                    for metric in READ_BY
                ),
            ]
            for name, rate in rates.items()
        ],
    )


def show_draws(drawn: list[dict[str, dict[str, dict[str, float]]]]) -> None:
    """Taus over draws of images: mean and range."""

    def cell(name: str, metric: str) -> str:
        if metric not in drawn[0][name]:
            return "-"
        taus = [one[name][metric]["tau"] for one in drawn]
        return f"{statistics.mean(taus):.2f} ({min(taus):.2f} to {max(taus):.2f})"

    show(
        f"Tau over {len(drawn)} draws of images: mean (range)",
        ["", *READ_BY],
        [[name, *(cell(name, metric) for metric in READ_BY)] for name in drawn[0]],
    )


def show_parts(parts: dict[str, dict[str, Any]]) -> None:
    steps = ("cut", "compensate", "reconstruct", "recalibrate", "measure")
    show(
        "Where a candidate's time goes, one core",
        ["", "s", *(f"{s} %" for s in steps), "ledger %", "% of peak", "outside %"],
        [
            [
                name,
                part["seconds"],
                *(100 * part["shares"].get(step, 0.0) for step in steps),
                100 * part["ledger_share"],
                100 * part["share_of_peak"],
                100 * part["outside_forward"],
            ]
            for name, part in parts.items()
        ],
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--blocks", type=int, default=3)
    made.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet56")
    made.add_argument("--draws", type=int, default=4, help="of images, to compare orders once more")
    options = made.parse_args()
    torch.set_num_threads(1)
    network = published(options.data, options.network)
    plan = trace(network)
    calibration, validation = the_images(options.data)
    workloads = prepared(network, plan, calibration, validation)
    policies, truth = policies_and_truth(options.network)
    blocks = [policies[index :: options.blocks] for index in range(options.blocks)]
    arguments = (options.network, options.data, calibration, validation)
    rates, found = in_turns(workloads, plan.table, blocks, arguments)
    ratios = {
        name: [ours / theirs for ours, theirs in zip(r, rates[RIVAL], strict=True)]
        for name, r in rates.items()
    }
    taus = {name: fidelity(found[name], policies, truth) for name in rates}
    title = f"{PROCESSES} processes, {options.blocks} blocks of {len(blocks[0])} policies"
    show_rates(rates, ratios, taus, f"{options.network}, {title}")
    drawn = [taus]
    for draw in range(1, options.draws + 1):
        others = on_other_images(options.network, network, plan, options.data, policies, draw)
        drawn.append({name: fidelity(others[name], policies, truth) for name in rates})
    show_draws(drawn)
    parts = {name: where_time_goes(w, policies[:6]) for name, w in workloads.items()}
    show_parts(parts)
    print(f"goals: ratio {GOAL_RATIO:g}, {GOAL_PEAK:.0%} of peak, {GOAL_OUTSIDE:.0%} outside")
    write(
        "throughput" if options.network == "resnet56" else f"throughput-{options.network}",
        options.json,
        {
            "network": options.network,
            "images": {"calibration": CALIBRATION, "validation": VALIDATION},
            "settings": {n: {"validation": v, **p} for n, (_, v, p) in OURS.items()},
            "precision": settled_precision("auto"),
            "candidates_per_second": rates,
            "ratio": ratios,
            "fidelity": taus,
            "tau_by_draw": {
                name: {m: [one[name][m]["tau"] for one in drawn] for m in taus[name]}
                for name in rates
            },
            "time": parts,
            "goals": {"ratio": GOAL_RATIO, "peak": GOAL_PEAK, "outside": GOAL_OUTSIDE},
        },
    )


if __name__ == "__main__":
    main()
