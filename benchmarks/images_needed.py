"""How many images does a metric need to order policies?

The policies and truths of results/fidelity-NETWORK-policies.csv, each prepared once by
`reconstructed` (cut layers, `--fitting` images) and shown `--images` validation images. Then, many
times, a few of these images are drawn, and the order by each metric's mean over them is compared
with the order after fine-tuning: mean tau, by number of images. Beside our metrics: squared errors
of the logits, and of the feature maps after each stage.

    python benchmarks/images_needed.py [--network resnet20] [--fitting 128] [--data FOLDER]
"""

from typing import Any

import numpy as np
import torch
from common import images, parser, policies_and_truth, published, show, write
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from evosearch.data import balanced_subset
from evosearch.materials import as_trained
from evosearch.pruning.groups import trace
from evosearch.scoring.proxies import ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload, batches, prepare_workload, settled_precision

FloatArray = NDArray[np.float64]
STAGES = ("layer1", "layer2", "layer3")
COUNTS = (8, 16, 32, 64, 128, 256, 512)


def workload_of(options: Any) -> Workload:
    """As the study's, but for the numbers of images."""
    network = published(options.data, options.network)
    train = images(options.data, "cifar10_train")
    first, last = np.arange(45_000), np.arange(45_000, 50_000)
    calibration = train.take(first[balanced_subset(train.labels[first], 500, 0)])
    return prepare_workload(
        network,
        trace(network),
        ProxySettings(
            name="reconstructed",
            criterion="residual-energy",
            reconstruction_layers="cut",
            reconstruction_images=options.fitting,
            precision=settled_precision("auto"),
        ),
        as_trained(calibration, network, 0),
        train.take(last[balanced_subset(train.labels[last], options.images, 0)]),
    )


class Looks:
    """Shows networks the validation images, and notes what stages and outputs are."""

    def __init__(self, workload: Workload) -> None:
        network = workload.network()
        self._batches = list(batches(network, workload.validation, 128))
        self._dense = self.at(network.module)

    @torch.inference_mode()
    def at(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """`(n_images, n_features)` by name."""
        found: dict[str, list[Tensor]] = {name: [] for name in (*STAGES, "logits")}

        def note(name: str) -> Any:
            return lambda _module, _inputs, output: found[name].append(output.flatten(1).clone())

        layers = module.eval()
        handles = [layers.get_submodule(s).register_forward_hook(note(s)) for s in STAGES]
        for batch in self._batches:
            found["logits"].append(layers(batch))
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}

    def errors(self, module: torch.nn.Module) -> dict[str, FloatArray]:
        """`(n_images,)` squared errors by name."""
        return {
            f"squared error, {name}": (found - self._dense[name]).square().sum(1).double().numpy()
            for name, found in self.at(module).items()
        }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    made.add_argument("--fitting", type=int, default=128)
    made.add_argument("--images", type=int, default=1000)
    made.add_argument("--draws", type=int, default=50)
    options = made.parse_args()
    torch.set_num_threads(1)
    policies, truth = policies_and_truth(options.network)
    workload = workload_of(options)
    scorer, looks = Scorer(workload), Looks(workload)
    values: dict[str, list[FloatArray]] = {}
    for policy in policies:
        module = scorer.network_of(policy)
        for name, column in scorer.per_image().items():
            values.setdefault(name, []).append(column)
        for name, column in looks.errors(module).items():
            values.setdefault(name, []).append(column)
    rng = np.random.default_rng(0)
    counts = [n for n in COUNTS if n <= options.images]
    draws = {
        n: [rng.choice(options.images, n, replace=False) for _ in range(options.draws)]
        for n in counts
    }
    taus: dict[str, dict[str, float]] = {}
    for name, rows in values.items():
        table = np.array(rows)
        taus[name] = {
            str(n): float(np.mean([tau(table[:, chosen].mean(1), truth) for chosen in draws[n]]))
            for n in counts
        }
        taus[name]["all"] = tau(table.mean(1), truth)
    show(
        f"{options.network}, {len(policies)} policies: mean tau over {options.draws} draws",
        ["images", *map(str, counts), f"all {options.images}"],
        [[name, *found.values()] for name, found in taus.items()],
    )
    write(
        f"images_needed-{options.network}",
        options.json,
        {"network": options.network, "fitting": options.fitting, "tau": taus},
    )


def tau(values: FloatArray, truth: FloatArray) -> float:
    """Kendall's tau-b; 0 where all values are equal."""
    return 0.0 if np.ptp(values) == 0 else float(kendalltau(values, truth).statistic)


if __name__ == "__main__":
    main()
