"""What tests of groups and of cutting share."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg

from evosearch.networks import BUILT_IN, InputSpec, Network, NetworkSpec, load_network
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable

Keep = NDArray[np.bool_]
Traced = tuple[Network, CuttingPlan]

SMALL = {"input_shape": (3, 64, 64)}
SPECS: dict[str, NetworkSpec] = {name: NetworkSpec(name=name) for name in BUILT_IN} | {
    "resnet18": NetworkSpec(name="resnet18", **SMALL),
    "mobilenet_v2": NetworkSpec(name="mobilenet_v2", **SMALL),
    "mobilenet_v3_small": NetworkSpec(name="mobilenet_v3_small", **SMALL),
    "densenet121": NetworkSpec(name="densenet121", **SMALL),
    "regnet_y_400mf": NetworkSpec(name="regnet_y_400mf", **SMALL),
    "shufflenet_v2_x0_5": NetworkSpec(name="shufflenet_v2_x0_5", **SMALL),
    "own-norms": NetworkSpec(name=f"{__name__}:OwnNorms", input_shape=(3, 32, 32)),
    "thin-vgg": NetworkSpec(name=f"{__name__}:thin_vgg", input_shape=(3, 32, 32)),
}
FIXED_STREAM = "it covers 16 of the 32 output channels of layer2.0.conv2"


class OwnNorms(nn.Module):
    """Slopes for each channel, norms of instances with and without scales, a residual sum."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SyncBatchNorm(16), nn.PReLU(16))
        self.inner = nn.Sequential(
            *(nn.Conv2d(16, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12)),
            *(nn.Conv2d(12, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU()),
        )
        self.slope, self.fc = nn.PReLU(16), nn.Linear(16, num_classes)
        for part in self.modules():
            if isinstance(part, nn.PReLU):
                nn.init.uniform_(part.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.slope(x + self.inner(x)).mean((2, 3)))


def thin_vgg(num_classes: int = 10) -> nn.Module:
    """Torchvision's VGG, a hundredth of its weights: 49 places of a channel are flattened."""
    layers = vgg.make_layers([16, "M", 24, 32, "M", 48, "M", 48], batch_norm=True)
    module = vgg.VGG(nn.Sequential(), num_classes=num_classes, init_weights=False)
    module.features = layers
    sizes = zip((48 * 49, 96, 64), (96, 64, num_classes), strict=True)
    module.classifier[0], module.classifier[3], module.classifier[6] = (
        nn.Linear(*size) for size in sizes
    )
    return module


def shaken(module: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales that differ from channel to channel."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


def traced_anew(name: str) -> Traced:
    torch.manual_seed(0)
    network = load_network(SPECS[name])
    shaken(network.module)
    return network, trace(network)


# For those who leave network and plan as they are.
traced_once = cache(traced_anew)


def choose(table: GroupTable, counts: NDArray[np.int64], seed: int) -> Keep:
    """Keeps `counts` channels of each group, any of them that can go together."""
    rng = np.random.default_rng(seed)
    keep = np.ones(int(table.channels.sum()) + 1, dtype=np.bool_)
    for offset, group, count in zip(table.offsets, table.groups, counts, strict=True):
        parts = keep[offset : offset + group.channels].reshape(-1, group.granularity)
        parts[rng.permutation(len(parts))[count // group.granularity :]] = False
    return keep


def random_counts(table: GroupTable, seed: int) -> NDArray[np.int64]:
    return table.whole(np.random.default_rng(seed).integers(1, table.channels + 1))


def counted_macs(network: Network, module: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(network.example(1))
    return counter.get_total_flops() // 2


def ignoring(module: nn.Module, plan: CuttingPlan, keep: Keep) -> nn.Module:
    """The dense network in float64, its consumers blind to the removed channels."""
    blind = copy.deepcopy(module).double()
    layers = dict(blind.named_modules())

    def hook(seen: Tensor) -> Callable[..., tuple[Tensor]]:
        def apply(_layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            shape = (-1, 1, 1) if inputs[0].ndim == 4 else (-1,)
            return (inputs[0] * seen.view(shape),)

        return apply

    for entry in plan.cuts:
        if entry.in_axis is not None:
            seen = torch.from_numpy(keep[plan.table.axes[entry.in_axis].sources])
            layers[entry.name].register_forward_pre_hook(hook(seen))
    return blind


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics; the counters of batch norm have no part in what it computes."""
    return {k: v.clone() for k, v in module.state_dict().items() if v.is_floating_point()}


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module.parameters())
    yield from (b for b in module.buffers() if b.is_floating_point())


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def reasons(plan: CuttingPlan) -> dict[str, str]:
    return {group.name: group.reason for group in plan.table.fixed}


def names(plan: CuttingPlan) -> list[str]:
    return [group.name for group in plan.table.groups]


class Chain(nn.Module):
    """Convolution a, something between, convolution b, mean, classifier."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)
        for name, part in parts.items():
            setattr(self, name, part)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = self.b(F.relu(self.between(y) if self.between else y))
        logits = self.fc(F.relu(y).mean((2, 3)))
        return self.after(logits) if self.after else logits


def own(module: nn.Module, shape: tuple[int, int, int] = (3, 8, 8)) -> Network:
    return Network(
        spec=NetworkSpec(name="own"),
        module=module.eval(),
        input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
    )


def traced_own(module: nn.Module) -> CuttingPlan:
    torch.manual_seed(0)
    return trace(own(module))


def shuffled(x: Tensor) -> Tensor:
    """Channels of two halves in turns, by a reshape that the dependency graph cannot follow."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
