"""Candidates without some of their blocks: scored in every way, alike in any order, loadable."""

from functools import cache
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch

from evosearch.data import Images, open_source
from evosearch.errors import NetworkError
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.cutting import Cutter
from evosearch.pruning.folding import FastCopy, Layout
from evosearch.pruning.groups import trace
from evosearch.results.models import load_pruned, save_pruned
from evosearch.scoring.proxies import PROXIES, ProxySettings
from evosearch.scoring.scorer import Scorer
from evosearch.scoring.workload import Workload, logits, prepare_workload
from tests.unit.scorer.bench import DENSE, HALF, same
from tests.unit.small_networks import own
from tests.unit.test_blocks import Adds, Chain

# Without blocks 1.1 and 2.1 in whole widths, and without the last one, too, in half widths.
WITHOUT = Policy((16, 0, 16, 32, 0, 32, 64, 64, 64))
HALF_WITHOUT = Policy((8, 0, 8, 16, 0, 16, 32, 32, 0))
NONE = Policy((0, 0, 0, 32, 0, 0, 64, 0, 0))


@cache
def parts() -> tuple[Images, Images]:
    source = open_source("cifar10-sample")
    return source.training().take(np.arange(128)), source.held_out().take(np.arange(64))


@cache
def shipped(name: str, layers: str = "all") -> Workload:
    network = load_network(NetworkSpec(name="resnet20", weights="shipped:resnet20-cifar10"))
    criterion = "residual-energy" if name in ("compensated", "reconstructed") else "l1"
    settings = ProxySettings(
        name=name, criterion=criterion, batch_size=64, reconstruction_layers=layers
    )
    return prepare_workload(network, trace(network, blocks=True), settings, *parts())


@pytest.mark.parametrize("name", PROXIES)
def test_every_proxy_scores_what_is_left(name: str) -> None:
    workload = shipped(name)
    scorer = Scorer(workload)
    for policy in (HALF_WITHOUT, NONE):
        measured = scorer.score(policy)
        assert measured.ok, measured.reason
        small = scorer.network_of(policy)
        names = dict(small.named_modules())
        assert "layer1.1.conv1" not in names
        assert "layer1.2.conv1" in names or policy == NONE
        images = workload.network().normalise(workload.validation.pixels)
        wrong = logits(small, [images]).argmax(1).numpy() != workload.validation.labels
        assert measured.metrics["error"] == pytest.approx(wrong.mean(), abs=0.02)


@pytest.mark.parametrize("name", PROXIES)
def test_what_was_left_out_before_leaves_no_trace(name: str) -> None:
    order = (DENSE, HALF_WITHOUT, HALF, NONE)
    scorer = Scorer(shipped(name))
    first = [scorer.score(policy) for policy in order]
    again = [scorer.score(policy) for policy in reversed(order)]
    assert all(map(same, first, reversed(again)))
    assert same(first[1], Scorer(shipped(name)).score(HALF_WITHOUT))


@pytest.mark.parametrize("layers", ["all", "cut"])
def test_layers_that_are_left_make_up_for_a_block(layers: str) -> None:
    raw = Scorer(shipped("raw")).score(WITHOUT).metrics["distortion"]
    fitted = Scorer(shipped("reconstructed", layers)).score(WITHOUT).metrics["distortion"]
    assert fitted < 0.6 * raw, (fitted, raw)


def test_a_network_without_blocks_is_written_and_loaded(tmp_path: Path) -> None:
    workload = shipped("reconstructed")
    table, network = workload.plan.table, workload.network()
    groups = [(group.name, group.channels) for group in table.groups]
    scorer = Scorer(workload)
    for policy in (HALF_WITHOUT, NONE):
        small = scorer.network_of(policy)
        file = tmp_path / f"{policy.digest}.safetensors"
        written = type(network)(spec=network.spec, module=small, input=network.input)
        save_pruned(file, written, groups, policy, {})
        loaded = load_pruned(file)
        images = network.example(2)
        with torch.inference_mode():
            assert torch.equal(loaded(images), small(images))
        assert "layer1.1.conv1.weight" not in loaded.state_dict()


def test_a_file_that_lacks_half_a_block_is_refused(tmp_path: Path) -> None:
    workload = shipped("raw")
    table, network = workload.plan.table, workload.network()
    groups = [(group.name, group.channels) for group in table.groups]
    file = tmp_path / "small.safetensors"
    # The group outside of blocks, of a network that is whole.
    save_pruned(file, network, groups, Policy((16, 16, 16, 0, 32, 32, 64, 64, 64)), {})
    with pytest.raises(NetworkError, match=r"layer2\.0\.conv1 would lose every channel"):
        load_pruned(file)


def test_a_block_with_a_forward_of_its_instance_keeps_it() -> None:
    network, _ = own(Chain(Adds(), Adds()))
    block = network.module.body[0]  # type: ignore[index,union-attr]
    block.forward = MethodType(lambda self, x: x + 2 * self.branch(x), block)
    plan = trace(network, blocks=True)
    assert [b.name for b in plan.table.blocks] == ["body.0", "body.1"]
    layout = Layout(blocks=("body.0", "body.1"))
    fast, cutter = FastCopy(network.module, layout, torch.float32), Cutter(plan, network.module)
    images = network.example(2)
    for keep in ([8, 6, 6], [8, 0, 6], [5, 0, 3], [8, 6, 6]):
        small = cutter.cut(plan.table.mask(np.array(keep))).eval()
        fast.update(small)
        with torch.inference_mode():
            torch.testing.assert_close(fast.module(images), small(images))
    with torch.inference_mode():
        torch.testing.assert_close(fast.module(images), network.module(images))
