"""VGG with batch norm for 32x32 images: the convolutions of VGG, one linear classifier.

References:
    [Simonyan2015] K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks", ICLR 2015,
        table 1 (configurations D and E); the single classifier is the usual CIFAR form.
"""

import torch
from torch import Tensor, nn

__all__ = ["CifarVgg"]

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVgg(nn.Module):
    """VGG-16 or VGG-19 with batch norm for 32x32 images.

    Args:
        depth: 16 or 19.
        num_classes: Width of the classifier.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"a CIFAR VGG has depth 16 or 19, got {depth}")
        layers: list[nn.Module] = []
        in_channels = 3
        for stage, (width, count) in enumerate(zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [
                    nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `(n, 3, 32, 32)` to logits `(n, num_classes)`."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))  # type: ignore[no-any-return]
