"""How long does cutting a candidate take, beside Torch-Pruning for the same cut?

ResNet-56, one core, random widths, channels in L1 order. Ours narrows a working copy along the
plan made once. Torch-Pruning, as its documentation shows it: copy the network, build the
dependency graph, prune group after group; its time without copy and graph is given, too. Both
networks must give the same outputs. Interleaved, medians; goal: at most 5 ms.

    python benchmarks/cutting.py
"""

import copy
import time

import numpy as np
import torch
import torch_pruning as tp
from common import parser, show, write
from numpy.typing import NDArray
from torch import nn

from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.criteria import channel_order
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable

GOAL_MS = 5.0


def torch_pruning(
    network: Network, table: GroupTable, keep: NDArray[np.bool_]
) -> tuple[nn.Module, float, float]:
    """The same cut by Torch-Pruning; milliseconds in all, and without copy and graph."""
    start = time.perf_counter()
    copied = copy.deepcopy(network.module)
    graph = tp.DependencyGraph().build_dependency(copied, (network.example(),), verbose=False)
    graphed = time.perf_counter()
    layers = dict(copied.named_modules())
    for index, group in enumerate(table.groups):
        first = int(table.offsets[index])
        gone = np.flatnonzero(~keep[first : first + group.channels]).tolist()
        if gone:
            graph.get_pruning_group(layers[group.name], tp.prune_conv_out_channels, gone).prune()
    end = time.perf_counter()
    return copied, 1e3 * (end - start), 1e3 * (end - graphed)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--cuts", type=int, default=20)
    made.add_argument("--network", default="resnet56")
    options = made.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name=options.network))
    start = time.perf_counter()
    plan = trace(network)
    plan_ms = 1e3 * (time.perf_counter() - start)
    table = plan.table
    places = channel_order(network.module, plan, "l1")
    cutter = Cutter(plan, network.module)
    rng = np.random.default_rng(0)
    milliseconds, difference = [], 0.0
    for _ in range(options.cuts):
        counts = (table.channels * rng.uniform(0.2, 0.8, len(table.groups))).astype(int).clip(1)
        start = time.perf_counter()
        keep = np.ones(len(places) + 1, dtype=np.bool_)
        keep[:-1] = places < counts[table.group_of]
        ours = cutter.cut(keep)
        ours_ms = 1e3 * (time.perf_counter() - start)
        theirs, whole_ms, prune_ms = torch_pruning(network, table, keep)
        milliseconds.append((ours_ms, whole_ms, prune_ms))
        with torch.inference_mode():
            outputs = ours(network.example()), theirs(network.example())
        difference = max(difference, float((outputs[0] - outputs[1]).abs().max()))
    medians = [float(m) for m in np.median(milliseconds, axis=0)]
    worst = np.max(milliseconds, axis=0)
    names = ("ours, along the plan", "Torch-Pruning: copy, graph, prune", "Torch-Pruning: prune")
    show(
        f"Cutting {options.network}, {options.cuts} random cuts, one core",
        ["", "median ms", "worst ms", "ratio to ours"],
        [[n, m, w, m / medians[0]] for n, m, w in zip(names, medians, worst, strict=True)],
    )
    verdict = "met" if medians[0] <= GOAL_MS else "missed"
    print(f"goal of {GOAL_MS} ms {verdict}; plan made once in {plan_ms:.0f} ms")
    print(f"largest difference of outputs {difference:.2e}")
    write(
        "cutting",
        options.json,
        {
            "network": options.network,
            "cuts": options.cuts,
            "ours_ms": medians[0],
            "torch_pruning_ms": medians[1],
            "torch_pruning_prune_only_ms": medians[2],
            "plan_ms": plan_ms,
            "goal_ms": GOAL_MS,
            "largest_output_difference": difference,
        },
    )
    if difference > 1e-4:
        raise SystemExit("the two cuts are not the same network")


if __name__ == "__main__":
    main()
