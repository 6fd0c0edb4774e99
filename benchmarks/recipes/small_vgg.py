"""A plain network without shortcuts, small enough to be trained and fine-tuned on a few cores."""

from torch import Tensor, nn

__all__ = ["small_vgg"]

# Widths of the convolutions, by stage; each stage but the last ends with a pooling by two.
_STAGES = ((32, 32), (64, 64), (128, 128), (128, 128))


class SmallVgg(nn.Module):
    """VGG with batch norm and one linear layer, for images of 32 by 32."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        into = 3
        for number, stage in enumerate(_STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [
                    nn.Conv2d(into, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                into = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(into, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, num_classes)` logits of `(n, 3, h, w)`."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def small_vgg(num_classes: int = 10) -> nn.Module:
    """The network, untrained."""
    return SmallVgg(num_classes)
