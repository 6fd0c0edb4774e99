"""A ResNeXt of 25 MMACs for 32x32 images: convolutions whose groups have eight channels."""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pointwise, grouped and pointwise convolution beside a shortcut."""

    def __init__(self, reads: int, writes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(reads, writes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(writes)
        self.conv2 = nn.Conv2d(writes, writes, 3, stride, 1, groups=writes // 8, bias=False)
        self.bn2 = nn.BatchNorm2d(writes)
        self.conv3 = nn.Conv2d(writes, writes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(writes)
        self.shortcut = nn.Sequential()
        if stride != 1 or reads != writes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(reads, writes, 1, stride, bias=False), nn.BatchNorm2d(writes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(n, reads, h, w)` to `(n, writes, h / stride, w / stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def make(num_classes: int = 10) -> nn.Module:
    """Three stages of two blocks, of 32, 64 and 128 channels."""
    widths = (32, 64, 128)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    reads = 32
    for width in widths:
        layers += [Block(reads, width, 1 if width == 32 else 2), Block(width, width, 1)]
        reads = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)
    )
