"""The networks that have a name, and what belongs to each: input shape and normalisation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from evosearch.networks.cifar_resnet import CifarResNet
from evosearch.networks.cifar_vgg import CifarVgg
from evosearch.networks.lenet import LeNet5, LeNet300100

__all__ = ["BUILT_IN", "IMAGENET", "BuiltIn", "InputSpec"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a network expects of an image.

    Args:
        shape: Channels, height, width.
        mean: Per channel, subtracted from pixels / 255.
        std: Per channel, what the difference is divided by.
        crop_padding: Padding of the random crops it was trained on; 0 for none.
        flip: Whether it was trained on mirrored images, too.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False


CIFAR = InputSpec(
    shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    crop_padding=4,
    flip=True,
)
IMAGENET = InputSpec(
    shape=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=True
)
# The LeNets of the pruning papers take pixels / 256 without a mean.
MNIST = InputSpec(shape=(1, 28, 28), mean=(0.0,), std=(256 / 255,))


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A named architecture: how to make it for `num_classes`, and what it takes."""

    title: str
    make: Callable[..., nn.Module]
    input: InputSpec


def _resnet(depth: int) -> BuiltIn:
    return BuiltIn(
        title=f"ResNet-{depth} for 32x32 images, basic blocks, parameter-free shortcuts",
        make=partial(CifarResNet, depth),
        input=CIFAR,
    )


def _vgg(depth: int) -> BuiltIn:
    return BuiltIn(
        title=f"VGG-{depth} with batch norm for 32x32 images",
        make=partial(CifarVgg, depth),
        input=CIFAR,
    )


BUILT_IN: dict[str, BuiltIn] = {
    **{f"resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}-cifar": _vgg(depth) for depth in (16, 19)},
    "lenet-300-100": BuiltIn(title="LeNet-300-100 for MNIST", make=LeNet300100, input=MNIST),
    "lenet-5": BuiltIn(title="LeNet-5 (Caffe form) for MNIST", make=LeNet5, input=MNIST),
}
