"""Layers of a network for inference in the form that a GPU runs fastest; elsewhere as they are.

Run one by one, a convolution's bias, the sum with a shortcut and the rectifier are passes of their
own over feature maps of tens of megabytes; cuDNN does them as it writes the convolution's result.
``torch.compile`` fuses such passes by itself.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck


def runs_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is of an inference on a CUDA GPU."""
    return x.is_cuda and not torch.is_grad_enabled()


def conv_relu(x: Tensor, convolution: nn.Conv2d, shortcut: Tensor | None = None) -> Tensor:
    """``relu(convolution(x) + shortcut)`` of ``(N, C, H, W)``, without groups; for inference."""
    if not runs_on_gpu(x) or torch.compiler.is_compiling() or not torch.backends.cudnn.enabled:
        y: Tensor = convolution(x)
        return torch.relu_(y if shortcut is None else y + shortcut)
    weight, bias = convolution.weight, convolution.bias
    geometry: Any = (convolution.stride, convolution.padding, convolution.dilation, 1)
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)


def conv_to_one(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of ``(N, C, H, W)``, channels last, to one channel.

    One matrix product gives what each pixel adds to its nine neighbours, then nine shifted maps are
    summed. cuDNN pads the one channel to eight, and takes several times as long.
    """
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    weight = convolution.weight[0].flatten(1).t().to(x.dtype)  # (9, C)
    parts = F.pad(torch.matmul(weight, pixels.transpose(1, 2)).view(n, 9, h, w), (1, 1, 1, 1))
    total = sum(
        parts[:, 3 * i + j, i : i + h, j : j + w].float() for i, j in product(range(3), range(3))
    )
    bias = convolution.get_parameter("bias").float()
    return (total + bias).to(x.dtype)[:, None]


class FusedBottleneck(nn.Module):
    """A bottleneck of a ResNet whose batch normalisations are folded."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(N, C, H, W)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = conv_relu(conv_relu(x, self.conv1), self.conv2)
        return conv_relu(y, self.conv3, shortcut)


class FusedConvReLU(nn.Module):
    """A convolution and its rectifier."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(N, C, H, W)``."""
        return conv_relu(x, self.convolution)


def fuse(module: nn.Module) -> None:
    """Put fused layers in the place of bottlenecks, and of a sequence's rectified convolutions.

    Batch normalisations must have been folded into the convolutions before them.
    """
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, Bottleneck):
            setattr(module, name, FusedBottleneck(child))
        elif (
            isinstance(module, nn.Sequential)  # elsewhere children need not follow one another
            and isinstance(child, nn.ReLU)
            and previous
            and isinstance(previous[1], nn.Conv2d)
        ):
            setattr(module, previous[0], FusedConvReLU(previous[1]))
            setattr(module, name, nn.Identity())
        else:
            fuse(child)
        if not isinstance(child, nn.Identity):
            previous = (name, child)
