"""LeNet-300-100 and LeNet-5, the two networks of the early pruning papers.

References:
    [LeCun1998] Y. LeCun et al., "Gradient-based learning applied to document recognition", 1998.
        LeNet-5 is the Caffe form that the pruning papers use: 20 and 50 convolutions, 500 units,
        and a ReLU after the first linear layer only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LeNet5", "LeNet300100"]


class LeNet300100(nn.Module):
    """Three linear layers, 784-300-100-classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.ip1 = nn.Linear(784, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `(n, 1, 28, 28)` to logits `(n, num_classes)`."""
        x = F.relu(self.ip1(torch.flatten(x, 1)))
        return self.ip3(F.relu(self.ip2(x)))  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max pooling, two linear layers."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `(n, 1, 28, 28)` to logits `(n, num_classes)`."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.ip2(F.relu(self.ip1(torch.flatten(x, 1))))  # type: ignore[no-any-return]
