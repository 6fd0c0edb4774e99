"""Is a searched network still the better one after training?

A published ResNet at half of its MACs, or with `--cost latency` of its time: policies found in
several ways, prepared as each way does, then all fine-tuned alike (SGD, cosine from 0.01, 45,000
training images; with --distillation guided by the dense network, as `evosearch finetune` does it).
Test top-1 before and after; test images are opened once, for the chosen policies. The policy of
search seed i is fine-tuned with seed i; methods without seeds have one policy, which is fine-tuned
with every seed.

    python benchmarks/fine_tuned.py [--data FOLDER] [--network resnet20] [--epochs 5] [--seeds 3]
        [--evaluations 72] [--share 0.5] [--methods "searched, distortion" ...]
        [--distillation 0.9] [--chosen JSON ...] [--cost latency --images 1]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from at_budget import (
    METHODS,
    Chosen,
    Key,
    Setting,
    by_final,
    choose,
    chosen_before,
    final_workload,
    mean_and_range,
    setting,
    that_prepares,
)
from common import parser, show, write

from evosearch.fidelity.truth import FineTuned, Truth, fine_tune_all
from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.scoring.scorer import Scorer
from evosearch.training.finetune import evaluate

SHOWN = (
    "uniform, L1, recalibrated",
    "uniform, reconstructed",
    "random best, L1, recalibrated",
    "searched, distortion",
)


def trained(
    where: Setting,
    proxy: Mapping[str, Any],
    chosen: Mapping[Key, Chosen],
    truth: Truth,
    options: Any,
) -> list[dict[str, Any]]:
    """Records of chosen policies before and after fine-tuning."""
    assembled = where.assembled(that_prepares(proxy, chosen))
    workload = final_workload(where, assembled, options.final, where.test)
    scorer, table = Scorer(workload), workload.plan.table
    # Methods may have found the same policy.
    keys: dict[tuple[Policy, int], list[Key]] = {}
    for key, found in chosen.items():
        for run in range(options.seeds) if not METHODS[key[0]].seeded else (key[2],):
            keys.setdefault((found.policy, run), []).append(key)
    records: list[dict[str, Any]] = []

    def record(result: FineTuned) -> None:
        if result.reason is not None:
            raise SystemExit(f"{result.policy.digest}: {result.reason}")
        module = scorer.network_of(result.policy)
        before = Network(spec=workload.spec, module=module, input=workload.input)
        top1 = 100 * (1 - evaluate(before, where.test)["error"])
        records.extend(
            {
                "share": key[1],
                "method": key[0],
                "seed": result.seed,
                "macs": int(table.costs_of([result.policy])[0][0]) / table.dense_costs[0],
                "before": top1,
                "after": 100 * (1 - result.numbers["test.error"]),
                "seconds": result.seconds,
                **chosen[key].record(),
            }
            for key in keys[result.policy, result.seed]
        )
        print(
            {name: records[-1][name] for name in ("method", "seed", "before", "after")}, flush=True
        )

    recipe = assembled.recipe
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 2})})
    fine_tune_all(workload, recipe, truth, ("test",), list(keys), record, lambda: False)
    return records


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--evaluations", type=int, default=72)
    made.add_argument("--final", type=int, default=1024, help="images that prepare networks")
    made.add_argument("--share", type=float, default=0.5)
    made.add_argument("--cost", choices=("macs", "latency"), default="macs")
    made.add_argument("--images", type=int, default=1, help="of a pass that is timed")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(SHOWN))
    made.add_argument("--distillation", type=float, default=0.0)
    made.add_argument(
        "--chosen", type=Path, nargs="+", default=[], help="JSONs of before: take their policies"
    )
    options = made.parse_args()
    torch.set_num_threads(1)
    truth = Truth(epochs=options.epochs, distillation=options.distillation).settled(gpu=False)
    records: list[dict[str, Any]] = []
    with setting(options.data, options.network, 2, options.cost, options.images) as where:
        before = {
            key: found
            for file in options.chosen
            for key, found in chosen_before(file).items()
            if key[0] in options.methods and key[1] == options.share
            if key[2] < (options.seeds if METHODS[key[0]].seeded else 1)
        }
        shares = (options.share,)
        chosen = before | choose(
            where, options.methods, shares, options.seeds, options.evaluations, before
        )
        for proxy, mine in by_final(chosen):
            records += trained(where, proxy, mine, truth, options)
    rows: list[list[Any]] = []
    for method in METHODS:
        same = [r for r in records if r["method"] == method]
        if same:
            cells = [mean_and_range([r[when] for r in same], 2) for when in ("before", "after")]
            rows.append([method, len(same), same[0]["macs"], *cells])
    title = f"{options.network} at {options.share:.0%}, {options.epochs} epochs"
    show(
        f"{title}: test top-1, mean (range)",
        ["method", "runs", "MACs", "before", "after"],
        rows,
    )
    write(
        "fine_tuned",
        options.json,
        {
            "network": options.network,
            "share": options.share,
            "cost": options.cost,
            "truth": truth.settings(),
            "evaluations": options.evaluations,
            "final_calibration": options.final,
            "rows": sorted(records, key=lambda r: (r["method"], r["seed"])),
        },
    )


if __name__ == "__main__":
    main()
