"""What do recalibration, compensation and the order of channels bring, without any training?

The published ResNet-56, uniform cuts of each block's inner channels, top-1 without training.
Statistics from the first 500 training images, measured on the first 2,000 test images (this is a
report, nothing is chosen by it). `plain` calibration images are as they are: the table of
decision 4 in the design. `as trained` ones are cropped and mirrored as in training, which is our
default.

    python benchmarks/compensation.py [--data FOLDER]
"""

from typing import Any

import numpy as np
import torch
from common import images, parser, published, show, write

from evosearch.data import Images
from evosearch.materials import as_trained
from evosearch.networks import Network
from evosearch.policy import Policy
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload

# What decision 4 reports for plain calibration images: (cut, proxy, criterion, recalibrate).
DESIGN = {
    (0.5, "raw", "l1", False): 40.2,
    (0.5, "recalibrated", "l1", True): 80.9,
    (0.5, "compensated", "l1", True): 83.0,
    (0.5, "compensated", "residual-energy", True): 85.5,
    (0.3, "compensated", "l1", False): 91.2,
}
PROXIES = [
    ("raw", "l1", False),
    ("recalibrated", "l1", True),
    ("compensated", "l1", False),
    ("compensated", "l1", True),
    ("recalibrated", "residual-energy", True),
    ("compensated", "residual-energy", False),
    ("compensated", "residual-energy", True),
    ("patchwise", "l1", False),
    ("patchwise", "residual-energy", False),
    ("reconstructed", "residual-energy", False),
]


def measure(
    network: Network,
    plan: CuttingPlan,
    proxy: tuple[str, str, bool],
    policies: list[Policy],
    calibration: Images,
    validation: Images,
) -> list[tuple[float, float]]:
    name, criterion, recalibrate = proxy
    settings = ProxySettings(name=name, criterion=criterion, recalibrate=recalibrate)
    scorer = Scorer(prepare_workload(network, plan, settings, calibration, validation))
    found = [scorer.score(policy) for policy in policies]
    return [(100 * (1 - m.metrics["error"]), m.metrics["divergence"]) for m in found]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--calibration", type=int, default=500)
    options = made.parse_args()
    torch.set_num_threads(1)
    network = published(options.data, "resnet56")
    plan = trace(network)
    train, test = (images(options.data, f"cifar10_{part}") for part in ("train", "test"))
    plain = train.take(np.arange(options.calibration))
    validation = test.take(np.arange(2000))
    cuts = (0.1, 0.3, 0.5)
    policies = [
        Policy(tuple(int(c * (1 - cut) + 0.5) for c in plan.table.channels)) for cut in cuts
    ]
    rows: list[list[Any]] = []
    records: list[dict[str, Any]] = []
    for proxy in PROXIES:
        kinds = {"plain": plain, "as trained": as_trained(plain, network, 0)}
        for kind, calibration in kinds.items():
            found = measure(network, plan, proxy, policies, calibration, validation)
            expected = [DESIGN.get((cut, *proxy)) if kind == "plain" else None for cut in cuts]
            cells = [
                f"{top1:.2f}" + (f" ({want})" if want else "")
                for (top1, _), want in zip(found, expected, strict=True)
            ]
            divergences = [f"{divergence:.3f}" for _, divergence in found]
            name, criterion, recalibrate = proxy
            label = f"{name}, {criterion}" + ("" if recalibrate or name == "raw" else ", no BN")
            rows.append([label, kind, *cells, *divergences])
            for cut, (top1, divergence), want in zip(cuts, found, expected, strict=True):
                records.append(
                    {
                        "cut": cut,
                        "proxy": name,
                        "criterion": criterion,
                        "recalibrate": recalibrate,
                        "calibration": kind,
                        "top1": top1,
                        "divergence": divergence,
                        "design": want,
                    }
                )
            if name == "raw":
                break
    show(
        f"ResNet-56, {options.calibration} calibration images; top-1 (design) and divergence",
        ["proxy", "calibration", *(f"cut {c:.0%}" for c in cuts), *(f"KL {c:.0%}" for c in cuts)],
        rows,
    )
    gaps = [abs(r["top1"] - r["design"]) for r in records if r["design"] is not None]
    print(f"largest distance from the design's {len(gaps)} numbers: {max(gaps):.2f} points")
    write("compensation", options.json, {"calibration": options.calibration, "rows": records})


if __name__ == "__main__":
    main()
