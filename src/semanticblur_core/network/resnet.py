"""Stages of residual networks (He et al., CVPR 2016, doi:10.1109/CVPR.2016.90).

Blocks, names and initial values are torchvision's, so that its weights fit. They are here because
importing torchvision imports ``torch._dynamo`` and its detection operators, which takes as long as
importing torch, at the start of every command and worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, of ResNet-34.

    Parameters
    ----------
    n_in, width
        Channels before and in the block.
    stride
        Of its first convolution.
    """

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(n_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(n_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(N, C, H, W)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut, of ResNet-50; the 3x3 strides.

    Parameters
    ----------
    n_in, width
        Channels before the block and of its 3x3 convolution; it gives four times the width.
    stride
        Of its 3x3 convolution.
    """

    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        n_out = self.expansion * width
        self.conv1 = _convolution(n_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, n_out, 1)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(N, C, H, W)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


def _convolution(n_in: int, n_out: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, side, stride, padding=side // 2, bias=False)


def _projection(n_in: int, n_out: int, stride: int) -> nn.Sequential | None:
    """The shortcut where a block changes width or resolution."""
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(_convolution(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))


def resnet_stages(block: type[BasicBlock | Bottleneck], depths: Sequence[int]) -> list[nn.Module]:
    """Four stages of strides 4, 8, 16 and 32, randomly initialised.

    Parameters
    ----------
    block
        What they are made of.
    depths
        How many of it each stage has.

    Returns
    -------
    list of Module
        The first holds the 7x7 convolution, its normalisation, rectifier and pooling before its
        blocks.
    """
    n_channels, layers = 64, []
    for i, depth in enumerate(depths):
        blocks, width = [], 64 * 2**i
        for j in range(depth):
            blocks.append(block(n_channels, width, stride=2 if i and not j else 1))
            n_channels = width * block.expansion
        layers.append(nn.Sequential(*blocks))
    first = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    stem = nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(inplace=True), pool, layers[0])
    stages: list[nn.Module] = [stem, *layers[1:]]
    for module in nn.ModuleList(stages).modules():
        # For what holds no values torch would load its compiler.
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stages
