"""What training minimises, what its checkpoint is of, and where it runs."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evosearch.data import Images, SourceOptions, open_source
from evosearch.errors import BackendError, ConfigError, DataError, NetworkError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.training import Checkpoint, TrainSettings, train
from evosearch.training.baseline import (
    _batches,
    _loss,
    check_trains,
    learning_rate,
    make_optimiser,
    top1,
    train_epoch,
    trainable,
)
from evosearch.training.command import augmented, image_size_for, train_baseline
from evosearch.training.devices import training_device
from evosearch.training.finetune import finetune

TINY = Path(__file__).parents[1] / "integration" / "tiny.py"
SETTINGS = TrainSettings(epochs=2, batch_size=64, lr=0.05, warmup_epochs=0.0, distillation=0.9)


@pytest.fixture
def small() -> Network:
    return load_network(NetworkSpec(name=f"{TINY}:Tiny"), (32, 32, 3))


@pytest.fixture(scope="module")
def images() -> Images:
    return open_source("cifar10-sample").training().take(np.arange(192))


@pytest.fixture
def teacher(small: Network) -> nn.Module:
    """Another network than the one that is trained."""
    module = copy.deepcopy(small.module).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    return module


def trained(network: Network, images: Images, **how: Any) -> dict[str, torch.Tensor]:
    mine = replace(network, module=copy.deepcopy(network.module))
    train(mine, images, images, how.pop("settings", SETTINGS), **how)
    return dict(mine.module.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_loss_is_hintons() -> None:
    generator = np.random.default_rng(0)
    found, wanted = generator.normal(size=(2, 8, 5))
    labels = generator.integers(0, 5, 8)

    def soft(logits: np.ndarray, heat: float) -> np.ndarray:
        raised = np.exp(logits / heat)
        return raised / raised.sum(1, keepdims=True)

    for share, heat in ((0.9, 4.0), (0.3, 1.0), (1.0, 2.0)):
        told = -np.log(soft(found, 1.0)[np.arange(8), labels]).mean()
        aim, is_now = soft(wanted, heat), soft(found, heat)
        apart = (aim * np.log(aim / is_now)).sum(1).mean()
        settings = replace(SETTINGS, distillation=share, temperature=heat)
        tensors = (torch.from_numpy(x) for x in (found, labels, wanted))
        loss = float(_loss(*tensors, settings))
        assert loss == pytest.approx((1 - share) * told + share * heat**2 * apart, rel=1e-9)


def test_whoever_agrees_with_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = replace(SETTINGS, distillation=1.0)
    loss = _loss(logits, torch.zeros(4, dtype=torch.int64), logits.detach(), settings)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_distillation_alone_needs_no_labels(
    small: Network, images: Images, teacher: nn.Module
) -> None:
    wrong = Images(images.pixels, (images.labels + 1) % 10)
    alone = replace(SETTINGS, distillation=1.0)
    states = [trained(small, part, teacher=teacher, settings=alone) for part in (images, wrong)]
    assert same(*states)
    # With labels in it, the loss does look at them.
    states = [trained(small, part, teacher=teacher) for part in (images, wrong)]
    assert not same(*states)


def test_a_teacher_counts_as_far_as_the_settings_say(
    small: Network, images: Images, teacher: nn.Module
) -> None:
    before = copy.deepcopy(teacher.state_dict())
    guided = trained(small, images, teacher=teacher)
    assert not same(guided, trained(small, images))
    plain = replace(SETTINGS, distillation=0.0)
    unguided = trained(small, images, teacher=teacher, settings=plain)
    assert same(unguided, trained(small, images, settings=plain))
    # It is looked at, never changed.
    assert same(before, dict(teacher.state_dict()))


def test_a_checkpoint_is_of_one_thing(small: Network, images: Images, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_line: object) -> None:
        raise Stop

    path = tmp_path / "c.pt"
    mine = Checkpoint(path=path, about={"policy": "a"})
    with pytest.raises(Stop):
        trained(small, images, checkpoint=mine, report=stop)
    with pytest.raises(ConfigError, match="was trained with policy = a, now it is b"):
        trained(small, images, checkpoint=Checkpoint(path=path, about={"policy": "b"}))
    with pytest.raises(ConfigError, match=r"with temperature = 4\.0, now it is 2\.0"):
        trained(small, images, checkpoint=mine, settings=replace(SETTINGS, temperature=2.0))
    assert same(trained(small, images, checkpoint=mine), trained(small, images))


def test_a_checkpoint_of_before_there_were_teachers_goes_on(
    small: Network, images: Images, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    plain = replace(SETTINGS, distillation=0.0)
    trained(small, images, checkpoint=Checkpoint(path=path), settings=plain)
    state = torch.load(path, weights_only=True)
    for key in ("distillation", "temperature"):
        del state["settings"][key]
    torch.save(state, path)
    trained(small, images, checkpoint=Checkpoint(path=path), settings=plain)
    with pytest.raises(ConfigError, match=r"with distillation = 0\.0, now it is 0\.9"):
        trained(small, images, checkpoint=Checkpoint(path=path))


def test_less_than_a_batch_is_refused(small: Network, images: Images) -> None:
    with pytest.raises(ConfigError, match="192 training images, less than one batch of 193"):
        trained(small, images, settings=replace(SETTINGS, batch_size=193))


def test_devices_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_device("auto") == "cuda"
    assert training_device("cuda:1") == "cuda:1"
    with pytest.raises(BackendError, match="--device cuda:2: torch finds 2 GPUs"):
        training_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("auto") == "cpu"
    with pytest.raises(BackendError, match="--device cuda: torch finds 0 GPUs"):
        training_device("cuda")
    with pytest.raises(ConfigError, match="--device is cpu, cuda"):
        training_device("gpu")


def test_what_is_frozen_stays_frozen(small: Network, images: Images) -> None:
    small.module.features[0].weight.requires_grad_(requires_grad=False)
    after = trained(small, images)
    assert torch.equal(after["features.0.weight"], small.module.features[0].weight)
    cut = copy.deepcopy(small.module).requires_grad_(requires_grad=False)
    found = dict(trainable(cut, like=small.module).named_parameters())
    frozen = [name for name, parameter in found.items() if not parameter.requires_grad]
    assert frozen == ["features.0.weight"]


def test_dropout_is_the_same_after_a_restart(
    small: Network, images: Images, tmp_path: Path
) -> None:
    small.module.classifier = nn.Sequential(nn.Dropout(0.5), small.module.classifier)
    whole = trained(small, images)
    lines: list[object] = []

    def stop(line: object) -> None:
        lines.append(line)
        if len(lines) == 1:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(path=tmp_path / "c.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(small, images, checkpoint=checkpoint, report=stop)
    torch.rand(7)  # whatever happened in between
    assert same(trained(small, images, checkpoint=checkpoint), whole)


def test_damaged_checkpoint_is_told(small: Network, images: Images, tmp_path: Path) -> None:
    (tmp_path / "c.pt").touch()
    with pytest.raises(ConfigError, match=r"c\.pt is damaged and cannot be continued"):
        trained(small, images, checkpoint=Checkpoint(path=tmp_path / "c.pt"))


class Helped(nn.Module):
    """Has a head that helps while it is trained, and is not there later."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)
        self.aux = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.conv(x).relu().mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


class Deep(nn.Module):
    """Convolutions of three dimensions, over pictures that are one deep."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 8, (1, 3, 3)), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x.unsqueeze(2)).relu().mean((2, 3, 4)))


def own(name: str) -> Network:
    return load_network(NetworkSpec(name=f"{__name__}:{name}"), (32, 32, 3))


@pytest.mark.parametrize("how", [train, finetune])
def test_a_head_for_training_alone_is_told(images: Images, how: Any) -> None:
    held_out = [images] if how is train else []
    with pytest.raises(NetworkError, match=r"returns tuple in training mode.*aux_logits = false"):
        how(own("Helped"), images, *held_out, SETTINGS)


def test_networks_of_three_dimensions_are_trained(images: Images) -> None:
    network = own("Deep")
    before = network.module.conv.weight.detach().clone()  # type: ignore[union-attr, operator]
    finetune(network, images, replace(SETTINGS, epochs=1))
    assert not torch.equal(network.module.conv.weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("lenet-5", (None, None), (0, False)),
        ("resnet20", (None, None), (4, True)),
        (f"{__name__}:Deep", (None, None), (4, True)),
        ("lenet-5", (2, True), (2, True)),
        ("resnet20", (0, False), (0, False)),
    ],
)
def test_images_are_cropped_and_mirrored_as_the_network_is_known_for(
    name: str, said: tuple[int | None, bool | None], wanted: tuple[int, bool]
) -> None:
    found = augmented(SETTINGS, NetworkSpec(name=name), *said)
    assert (found.crop_padding, found.flip) == wanted


def test_another_file_of_torch_is_no_checkpoint(
    small: Network, images: Images, tmp_path: Path
) -> None:
    file = tmp_path / "a.checkpoint.pt"
    torch.save({"weights": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match=r"a\.checkpoint\.pt is no checkpoint of a training"):
        train(small, images, images, SETTINGS, checkpoint=Checkpoint(path=file))


@pytest.mark.parametrize(
    ("name", "side", "wanted"),
    [
        ("resnet20", None, (32, 32)),
        ("resnet18", None, (224, 224)),
        (f"{__name__}:Deep", 48, (48, 48)),
    ],
)
def test_image_files_are_fitted_to_the_network(
    name: str, side: int | None, wanted: tuple[int, int]
) -> None:
    assert image_size_for(NetworkSpec(name=name), side) == wanted


def test_a_network_is_trained_on_image_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    spec = NetworkSpec(name=f"{__name__}:Deep", num_classes=2)
    options = SourceOptions(root=tmp_path, image_size=image_size_for(spec, 16))
    settings = replace(SETTINGS, epochs=1, batch_size=8)
    done = train_baseline(spec, "image-folder", options, settings, tmp_path / "w.safetensors")
    assert json.loads(done.record.read_text())["shape"] == [3, 16, 16]


def test_test_images_that_are_not_there_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    options = SourceOptions(test_path=tmp_path / "nowhere.npz")
    said: list[object] = []
    with pytest.raises(DataError, match=r"--test-data: .*nowhere\.npz does not exist"):
        train_baseline(
            NetworkSpec(name=f"{TINY}:Tiny"),
            "cifar10-sample",
            options,
            SETTINGS,
            tmp_path / "w.safetensors",
            report=said.append,
        )
    assert not said


PLAIN = replace(SETTINGS, distillation=0.0)


def test_the_learning_rate_warms_up_and_comes_down_to_nothing() -> None:
    settings = TrainSettings(epochs=10, lr=0.4, warmup_epochs=2.0)
    rates = [learning_rate(settings, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0], abs=1e-12)
    flat_start = replace(settings, warmup_epochs=0.0)
    assert learning_rate(flat_start, 0) == 0.4
    # A warm-up as long as the training never comes down.
    assert learning_rate(replace(settings, warmup_epochs=10), 9) == pytest.approx(0.36)


def test_the_last_step_of_a_training_is_as_good_as_none(small: Network, images: Images) -> None:
    rates: list[float] = []
    train(small, images, images, PLAIN, report=lambda line: rates.append(line.lr))
    assert rates == pytest.approx([0.025, 0], abs=1e-12)


def test_every_epoch_has_an_order_of_its_own_that_follows_from_the_seed(images: Images) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        numbered = Images(images.pixels, np.arange(len(images)))
        parts = _batches(numbered, replace(PLAIN, seed=seed), epoch)
        return np.concatenate([labels for _, labels in parts]).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(len(images)))
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_labels_belong_to_their_images(images: Images) -> None:
    plain = replace(PLAIN, crop_padding=0, flip=False)
    pairs = zip(images.pixels, images.labels, strict=True)
    known = {pixels.tobytes(): label for pixels, label in pairs}
    for pixels, labels in _batches(images, plain, 0):
        assert [known[p.tobytes()] for p in pixels] == labels.tolist()


def test_a_digit_is_not_mirrored(images: Images) -> None:
    one_sided = Images(np.zeros_like(images.pixels), images.labels)
    one_sided.pixels[:, :, :16] = 255
    plain = replace(PLAIN, crop_padding=0, flip=False)
    assert all((pixels[:, :, :16] == 255).all() for pixels, _ in _batches(one_sided, plain, 0))
    mirrored = [
        (p[:, 0, 0, 0] == 0).mean() for p, _ in _batches(one_sided, replace(plain, flip=True), 0)
    ]
    assert 0.3 < np.mean(mirrored) < 0.7


def test_settings_reach_the_optimiser(small: Network) -> None:
    settings = replace(PLAIN, weight_decay=0.03)
    (group,) = make_optimiser(small.module, settings).param_groups
    assert {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.05,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.03,
    }
    assert len(group["params"]) == len(list(small.module.parameters()))


def test_smoothed_labels_are_spread_over_all_classes() -> None:
    generator = np.random.default_rng(0)
    found, labels = generator.normal(size=(8, 5)), generator.integers(0, 5, 8)
    told = -np.log(np.exp(found) / np.exp(found).sum(1, keepdims=True))
    wanted = 0.8 * told[np.arange(8), labels].mean() + 0.2 * told.mean()
    settings = replace(PLAIN, label_smoothing=0.2)
    tensors = (torch.from_numpy(x) for x in (found, labels))
    assert float(_loss(*tensors, None, settings)) == pytest.approx(wanted, rel=1e-9)


def test_accuracy_is_that_of_the_network_as_it_is_used(small: Network, images: Images) -> None:
    before = copy.deepcopy(small.module.state_dict())
    small.module.eval()
    with torch.inference_mode():
        right = small.module(small.normalise(images.pixels)).argmax(1).numpy() == images.labels
    small.module.train()
    assert top1(small, images) == right.mean()
    # Batch norm has learnt nothing from images that are only to be measured.
    assert same(before, dict(small.module.state_dict()))


def test_a_check_before_training_leaves_statistics_alone(small: Network, images: Images) -> None:
    before = copy.deepcopy(small.module.state_dict())
    small.module.eval()
    check_trains(small)
    assert same(before, dict(small.module.state_dict()))
    assert not small.module.training


def test_momentum_goes_on_after_a_restart(small: Network, images: Images, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_line: object) -> None:
        raise Stop

    checkpoint = Checkpoint(path=tmp_path / "c.pt")
    with pytest.raises(Stop):
        trained(small, images, checkpoint=checkpoint, report=stop, settings=PLAIN)
    other = replace(PLAIN, threads=2)  # of no matter to what is trained
    again = trained(small, images, checkpoint=checkpoint, settings=other)
    whole = trained(small, images, settings=PLAIN)
    assert all(torch.allclose(again[k].double(), whole[k].double(), atol=1e-4) for k in whole)


def test_half_precision_is_used_where_it_is_asked_for(small: Network, images: Images) -> None:
    seen = set()
    small.module.features[0].register_forward_hook(
        lambda layer, _inputs, output: seen.add(output.dtype) if layer.training else None
    )
    train(small, images, images, replace(PLAIN, epochs=1, precision="bfloat16"))
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in small.module.parameters())


def test_the_rate_of_each_step_is_that_of_its_end(small: Network, images: Images) -> None:
    optimiser = make_optimiser(small.module, PLAIN)
    rates: list[float] = []
    optimiser.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for epoch in range(2):
        train_epoch(small, images, optimiser, PLAIN, epoch)
    wanted = [learning_rate(PLAIN, (step + 1) / 3) for step in range(6)]
    assert rates == pytest.approx(wanted)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_training_that_diverges_is_told(small: Network, images: Images) -> None:
    with pytest.raises(ConfigError, match=r"training diverged in epoch 1; lower lr \(1e\+30\)"):
        trained(small, images, settings=replace(PLAIN, lr=1e30))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    small: Network, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(path=tmp_path / "c.pt")
    whole = trained(small, images, checkpoint=checkpoint, settings=PLAIN)

    def killed(_state: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    optimiser = make_optimiser(small.module, PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(PLAIN, small.module, optimiser, [])
    assert same(trained(small, images, checkpoint=checkpoint, settings=PLAIN), whole)
