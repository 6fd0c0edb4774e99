"""Squeeze-excitation importance: gates behind each producer, trained while the network is frozen.

The gates are those of UCP's MSEB [Chang2020]: the mean over positions goes through a narrow hidden
layer into one sigmoid per channel. With 16 channels or fewer the hidden layer has one unit and both
layers a bias; else it has C / 16 units and no bias. A channel's importance is its mean excitation
over the images.

Reconstructed: the paper trains gates and network together from scratch, with settings that are
not given. Here the trained network stays frozen and the gates alone are trained, by Adam for a few
dozen steps; they start at one (twice the sigmoid of zero), so that training starts from the dense
network.

References:
    [Chang2020] J. Chang, Y. Lu, P. Xue, "UCP: Uniform Channel Pruning", arXiv:2010.01251; code at
        github.com/JingfeiChang/UCP.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evosearch.pruning.criteria.view import GroupView

__all__ = ["excitation", "train_excitations"]

_STEPS, _BATCH = 24, 64
# A hidden layer of so few units is silent for good after a few steps that are too large.
_LR = {"squeeze": 5e-4, "excite": 2e-2}


def excitation(view: GroupView) -> Tensor:
    """Mean excitation of the channel by a trained squeeze-excitation gate [Chang2020].

    Reconstructed, see the head of this module. Needs labels, or takes classes drawn from the
    network's own outputs.
    """
    return view.combine(gate.mean(dim=0) for gate in view.seen("excitation"))


class _Gate(nn.Module):
    """Multiplies the output of a layer by twice its excitation."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        channels, self._linear = len(layer.weight), isinstance(layer, nn.Linear)
        small = channels <= 16
        hidden = 1 if small else channels // 16
        self.squeeze = nn.Linear(channels, hidden, bias=small)
        self.excite = nn.Linear(hidden, channels, bias=small)
        nn.init.zeros_(self.excite.weight)
        if small:
            nn.init.zeros_(self.squeeze.bias)
            nn.init.zeros_(self.excite.bias)
        self.started = False
        self.scale = 1.0
        self.last = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self._linear:  # the channels of tokens come last
            return self._gated(x.movedim(-1, 1)).movedim(1, -1)
        return self._gated(x)

    def _gated(self, x: Tensor) -> Tensor:
        pooled = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        if not self.started:
            # Unit variance, and no unit that ReLU keeps silent from the start.
            self.scale = 1 / max(float(pooled.detach().std()), 1e-12)
            with torch.no_grad():
                hidden = self.squeeze(pooled * self.scale).mean(dim=0)
                self.squeeze.weight *= torch.where(hidden < 0, -1.0, 1.0)[:, None]
            self.started = True
        self.last = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled * self.scale))))
        return x * (2 * self.last).reshape(*self.last.shape, *[1] * (x.ndim - 2))


def train_excitations(
    module: nn.Module, producers: Sequence[str], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Trains a gate behind every producer and lets it judge all images.

    Args:
        module: The dense network in evaluation mode; it is left as it was.
        producers: Names of its layers.
        images: `(n, channels, height, width)`, normalised.
        labels: `(n,)` int64 classes to train towards.

    Returns:
        Per producer `(n, out)` float64 excitations in (0, 1).
    """
    layers = dict(module.named_modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates = {name: _Gate(layers[name]) for name in producers}
    handles = [
        layers[name].register_forward_hook(lambda _m, _i, out, gate=gate: gate(out))
        for name, gate in gates.items()
    ]
    frozen = [p for p in module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    by_role = {
        role: [p for gate in gates.values() for p in getattr(gate, role).parameters()]
        for role in _LR
    }
    parameters = [parameter for role in by_role.values() for parameter in role]
    optimiser = torch.optim.Adam([{"params": by_role[r], "lr": lr} for r, lr in _LR.items()])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    try:
        for step in range(_STEPS):
            start = step * _BATCH % len(order)
            rows = order.roll(-start)[:_BATCH]
            with torch.enable_grad():
                loss = F.cross_entropy(module(images[rows]).float(), labels[rows])
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
        found: dict[str, list[Tensor]] = {name: [] for name in producers}
        with torch.no_grad():
            for part in torch.split(images, 2 * _BATCH):
                module(part)
                for name, gate in gates.items():
                    found[name].append(gate.last.double())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {name: torch.cat(parts) for name, parts in found.items()}
