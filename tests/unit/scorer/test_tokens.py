"""Linear layers on tokens, as in ConvNeXt, are convolutions of one pixel in another layout."""

import numpy as np
import pytest
import torch
from torch import nn

from evosearch.data import Images
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.criteria import applicable_criteria, channel_scores
from evosearch.pruning.cutting import CuttingPlan
from evosearch.pruning.groups import trace
from evosearch.pruning.sampling import Sampler, places_of_output
from evosearch.scoring.proxies import PROXIES, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import prepare_workload
from tests.unit.small_networks import samples_of

FILE = """
import torch
from torch import nn
from torch.nn import functional as F

class Tokens(nn.Module):
    def __init__(self, num_classes, layout):
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)
        self.fc = nn.Linear(8, num_classes)
        if layout == "maps":
            for name in ("wide", "narrow"):
                layer = getattr(self, name)
                pointwise = nn.Conv2d(layer.in_features, layer.out_features, 1)
                pointwise.weight.data = layer.weight.data[:, :, None, None].clone()
                pointwise.bias.data = layer.bias.data.clone()
                setattr(self, name, pointwise)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = x
        if self.layout != "maps":
            y = y.permute(0, 2, 3, 1)
        if self.layout == "rows":
            y = y.flatten(1, 2)
        # Times one: no sum then belongs to a layer alone, whatever lies between.
        y = self.narrow(F.relu(self.wide(y))) * 1.0
        if self.layout == "rows":
            y = y.unflatten(1, x.shape[2:])
        if self.layout != "maps":
            y = y.permute(0, 3, 1, 2)
        return self.fc((x + y).mean((2, 3)))

def make(num_classes, layout):
    return Tokens(num_classes, layout)
"""
LAYOUTS = ("maps", "pixels", "rows")
NARROW = Policy((7, 9))
Traced = tuple[Network, CuttingPlan]


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, images: tuple[Images, Images]
) -> dict[str, Traced]:
    """The same network in `(n, c, h, w)`, `(n, h, w, c)` and `(n, h * w, c)`."""
    file = tmp_path_factory.mktemp("tokens") / "tokens_net.py"
    file.write_text(FILE)
    found = {}
    for layout in LAYOUTS:
        spec = NetworkSpec(
            name=f"{file}:make", arguments={"layout": layout}, input_shape=(3, 32, 32)
        )
        network = load_network(spec)
        network.module.norm.momentum = None
        network.module.train()(network.normalise(images[0].pixels))
        network.module.eval()
        found[layout] = network, trace(network)
        assert [g.name for g in found[layout][1].table.groups] == ["stem", "wide"]
    return found


@pytest.mark.parametrize("name", PROXIES)
def test_every_proxy_measures_tokens_as_it_measures_maps(
    traced: dict[str, Traced], images: tuple[Images, Images], name: str
) -> None:
    settings = ProxySettings(name=name, criterion="l1", batch_size=16, precision="float32")
    maps, *others = (
        Scorer(prepare_workload(*traced[layout], settings, *images)).score(NARROW)
        for layout in LAYOUTS
    )
    for found in others:
        assert found.reason is None
        assert dict(found.metrics) == pytest.approx(dict(maps.metrics), rel=2e-3, abs=1e-5)


def test_every_criterion_scores_tokens_as_it_scores_maps(traced: dict[str, Traced]) -> None:
    known, _ = applicable_criteria(traced["maps"][0].module, traced["maps"][1])
    scores = []
    for layout in LAYOUTS:
        network, plan = traced[layout]
        samples = samples_of(network, labels=torch.arange(40) % 10)
        scores.append(channel_scores(network.module, plan, known, samples))
    for name, maps, *others in zip(known, *scores, strict=True):
        for found in others:
            np.testing.assert_allclose(found, maps, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "shape", "wanted"),
    [
        (nn.Linear(5, 4), (2, 4), ()),
        (nn.Linear(5, 4), (2, 9, 4), (9,)),
        (nn.Linear(5, 4), (2, 3, 7, 4), (21,)),
        (nn.Conv2d(5, 4, 1), (2, 4, 3, 7), (3, 7)),
    ],
)
def test_places_of_an_output(
    layer: nn.Module, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert places_of_output(layer, torch.zeros(shape)) == wanted


def test_tokens_are_read_where_they_were_drawn() -> None:
    output = torch.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4).float()
    found = Sampler(np.array([[1], [4]])).outputs(output)
    wanted = output[[0, 0, 1, 1], [0, 2, 0, 2], [1, 0, 1, 0]]
    assert torch.equal(found, wanted)
    assert found.data_ptr() != output.data_ptr()
