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

from semanticblur_core.device import is_out_of_memory
from semanticblur_core.network.resnet import Bottleneck

# Kinds of numbers that cuDNN turned out to have no such convolution for.
_REFUSED: set[torch.dtype] = set()
_ZEROS: dict[tuple[torch.device, torch.dtype], Tensor] = {}
# Larger ones are made anew each time.
_MOST_KEPT_BYTES = 2**28


def infers_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a CUDA GPU and no gradient is to come."""
    return x.is_cuda and not torch.is_grad_enabled()


def conv_relu(x: Tensor, convolution: nn.Conv2d, shortcut: Tensor | None = None) -> Tensor:
    """``relu(convolution(x) + shortcut)`` of ``(N, C, H, W)``, for inference."""
    if _has_fused(x):
        try:
            return _fused(x, convolution, shortcut)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _REFUSED.add(x.dtype)
    y: Tensor = convolution(x)
    return torch.relu_(y if shortcut is None else y.add_(shortcut))


def _has_fused(x: Tensor) -> bool:
    return (
        infers_on_gpu(x)
        and x.dtype not in _REFUSED
        and torch.backends.cudnn.enabled
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _fused(x: Tensor, convolution: nn.Conv2d, shortcut: Tensor | None) -> Tensor:
    weight, factor = convolution.weight, 1.0
    strides: Any = convolution.stride
    paddings: Any = convolution.padding
    dilations: Any = convolution.dilation
    if shortcut is None:
        # Without one torch gives cuDNN memory that was never written, times zero.
        sides = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(
                x.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True
            )
        )
        shortcut, factor = _zeros(len(x), len(weight), *sides, like=x), 0.0
    return torch.cudnn_convolution_add_relu(
        *(x, weight, shortcut, factor, convolution.bias),
        *(strides, paddings, dilations, convolution.groups),
    )


def _zeros(n: int, c: int, h: int, w: int, *, like: Tensor) -> Tensor:
    """Zeros ``(N, C, H, W)``, channels last, of which one piece of memory is kept."""
    n_values = n * c * h * w
    if n_values * like.element_size() > _MOST_KEPT_BYTES:
        return like.new_zeros(n, h, w, c).permute(0, 3, 1, 2)
    key, stream = (like.device, like.dtype), torch.cuda.current_stream(like.device)
    found = _ZEROS.get(key)
    if found is None or len(found) < n_values:
        found = like.new_zeros(n_values)
        stream.synchronize()  # before other streams can find it
        _ZEROS[key] = found
    # The allocator is to know, for when a larger one takes its place.
    found.record_stream(stream)
    return found[:n_values].view(n, h, w, c).permute(0, 3, 1, 2)


def release(device: torch.device) -> None:
    """Let go of the memory that is kept for a GPU; without an index, for each."""
    for key in list(_ZEROS):
        if key[0].type == device.type and device.index in (None, key[0].index):
            _ZEROS.pop(key, None)


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
        assert isinstance(block.bn3, nn.Identity)
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
