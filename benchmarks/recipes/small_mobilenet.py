"""MobileNet-v2 at half of its width, with strides for 32x32 images: depthwise convolutions."""

from torch import nn
from torchvision.models import MobileNetV2


def make(num_classes: int = 10) -> nn.Module:
    """As torchvision makes it; images lose a factor of 8 in size where ImageNet's lose 32."""
    network: nn.Module = MobileNetV2(
        num_classes=num_classes,
        width_mult=0.5,
        # Expansion, channels, blocks, stride of the first; the stem and one stage have 1 for 2.
        inverted_residual_setting=[
            [1, 16, 1, 1],
            [6, 24, 2, 2],
            [6, 32, 3, 1],
            [6, 64, 4, 2],
            [6, 96, 3, 1],
            [6, 160, 3, 2],
            [6, 320, 1, 1],
        ],
        dropout=0.0,
    )
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    first.stride = (1, 1)
    return network
