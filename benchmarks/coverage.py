"""Of which networks can how much be cut? Torchvision's families, ours beside Torch-Pruning's.

Each network is traced, every group of it cut to half, and checked to compute the same as the dense
network that ignores what was cut (which finding groups does). Torch-Pruning's `BasePruner` halves
the same network by the magnitude of weights, its output ignored; whether what is left computes
anything related is not asked of it. MACs of both by torch's own counter. Every row is a process of
its own with a limit of memory and time, which following channels through windows of attention
exceeds.

    python benchmarks/coverage.py [--networks resnet18 ...]
"""

import copy
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import parser, show, write
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.groups import trace

# Height and width where 64 is too small, or windows want another.
EDGES = {"alexnet": 224, "vit_b_16": 224, "swin_t": 224, "maxvit_t": 224, "googlenet": 96}
EDGES["inception_v3"] = 96
NETWORKS = (
    *("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "regnet_x_400mf"),
    *("regnet_y_400mf", "densenet121", "googlenet", "inception_v3", "squeezenet1_0", "alexnet"),
    *("vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0", "efficientnet_b0"),
    *("efficientnet_v2_s", "shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"),
)
SECONDS = 120
GIB = 12


def loaded(name: str) -> Network:
    edge = EDGES.get(name, 64)
    torch.manual_seed(0)
    network = load_network(NetworkSpec(name=name, num_classes=10, input_shape=(3, edge, edge)))
    for parameter in network.module.parameters():
        parameter.requires_grad_(True)
    return network


def macs(module: nn.Module, network: Network) -> int:
    math = sdpa_kernel(SDPBackend.MATH)  # attention in one operation is not counted
    with FlopCounterMode(display=False) as counter, math, torch.enable_grad():
        module(network.example(1))
    return int(counter.get_total_flops()) // 2


def ours(name: str) -> dict[str, Any]:
    network = loaded(name)
    start = time.perf_counter()
    plan = trace(network)
    seconds = time.perf_counter() - start
    table = plan.table
    half = table.whole((table.channels + 1) // 2)
    place = np.arange(len(table.group_of)) - table.offsets[table.group_of]
    cut = Cutter(plan, network.module).cut(np.append(place < half[table.group_of], True))
    dense = macs(network.module, network)
    return {
        "mmacs": dense / 1e6,
        "groups": len(table.groups),
        "seconds": seconds,
        "half": macs(cut, network) / dense,
        "least": float(table.share("macs", table.granularities[None])[0]),
    }


def rival(name: str) -> dict[str, Any]:
    import torch_pruning as tp

    network = loaded(name)
    module = copy.deepcopy(network.module)
    dense = macs(module, network)
    last = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruner = tp.pruner.BasePruner(
        module,
        network.example(1),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    return {"half": macs(module, network) / dense}


def _report(work: Callable[[], dict[str, Any]], told: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
    try:
        told.send(work())
    except Exception as exc:  # noqa: BLE001  whatever it is, it is the answer
        told.send({"error": (str(exc).splitlines() or [""])[0] or type(exc).__name__})


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns in a process of its own, or how it failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return {"error": f"not done after {SECONDS} s"}
        found: dict[str, Any] = ours.recv()
    except EOFError:
        return {"error": f"died, with a limit of {GIB} GiB"}
    finally:
        process.kill()
        process.join()
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", default=NETWORKS)
    options = made.parse_args()
    records: list[dict[str, Any]] = []
    for name in options.networks:
        records.append({"network": name, "edge": EDGES.get(name, 64)})
        records[-1]["ours"] = apart(partial(ours, name))
        records[-1]["torch-pruning"] = apart(partial(rival, name))
    rows: list[list[Any]] = []
    for record in records:
        mine, other = record["ours"], record["torch-pruning"]
        found = [mine.get(key, mine.get("error")) for key in ("groups", "half", "least", "seconds")]
        rows.append([record["network"], *found, other.get("half", other.get("error"))])
    show(
        "MACs left, as shares of the dense network's",
        ["network", "groups", "half", "least", "seconds", "Torch-Pruning, half"],
        rows,
    )
    write("coverage", options.json, {"networks": records})


if __name__ == "__main__":
    main()
