"""Feature extractors of Table 1, each with four taps of strides 4, 8, 16 and 32.

* ``resnet50``: taps after layer1, 2, 3, 4, widths 256, 512, 1024, 2048; the 3x3 convolutions of the
  three bottlenecks of layer4 take dilation 2, 4, 8.
* ``resnet34``: taps after layer1, 2, 3, 4, widths 64, 128, 256, 512; both 3x3 convolutions of the
  three blocks of layer4 take dilation 2, 4, 8.
* ``vgg16``: taps after the second to fifth pooling, widths 128, 256, 512, 512; conv5_1, conv5_2 and
  conv5_3 take dilation 2, 4, 8.
* ``efficientnet_b4``: taps after ``features`` 2, 3, 5 and 7, widths 32, 56, 160, 448; the depthwise
  convolutions of the last three blocks take dilation 2, 4, 8.

Dilation (equations 2-3) adds no parameters and, at an output stride of 32, changes no resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from semanticblur_core.config import ModelConfig
from semanticblur_core.network.resnet import BasicBlock, Bottleneck, resnet_stages

DILATION_RATES = (2, 4, 8)


class Backbone(nn.Module):
    """Runs stages one after the other and returns what each produced.

    Parameters
    ----------
    stages
        Four modules; the first takes the image.
    channels
        Widths of their outputs.
    """

    def __init__(self, stages: Iterable[nn.Module], channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels = channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features F1..F4 of ``(N, 3, H, W)`` images (equation 1)."""
        features = []
        x = images
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def build_backbone(config: ModelConfig) -> Backbone:
    """Backbone named by the configuration, randomly initialised, dilation applied."""
    builders = {
        "resnet50": _resnet50,
        "resnet34": _resnet34,
        "vgg16": _vgg16,
        "efficientnet_b4": _efficientnet_b4,
    }
    return builders[config.backbone](config)


def _dilate(convolution: nn.Conv2d, rate: int) -> None:
    """Set the rate of a convolution and the padding that keeps its output size."""
    padding = rate * (convolution.kernel_size[0] // 2)
    convolution.dilation = (rate, rate)
    convolution.padding = (padding, padding)


def _resnet50(config: ModelConfig) -> Backbone:
    stages = resnet_stages(Bottleneck, (3, 4, 6, 3))
    third, fourth = cast(Any, stages[2]), cast(Any, stages[3])
    rates: tuple[int, ...] = DILATION_RATES
    if config.output_stride <= 16:
        _unstride(fourth)
    if config.output_stride == 8:
        _unstride(third)
        for block in third:
            _dilate(block.conv2, 2)
        # The last stage sees twice the resolution, so its rates double to cover the same scene.
        rates = tuple(2 * rate for rate in rates)
    for block, rate in zip(fourth, rates, strict=True):
        _dilate(block.conv2, rate)
    return Backbone(stages, (256, 512, 1024, 2048))


def _unstride(stage: Any) -> None:
    """Let the first bottleneck of a stage keep the resolution it is given."""
    stage[0].conv2.stride = (1, 1)
    stage[0].downsample[0].stride = (1, 1)


def _resnet34(config: ModelConfig) -> Backbone:
    stages = resnet_stages(BasicBlock, (3, 4, 6, 3))
    for block, rate in zip(cast(Any, stages[3]), DILATION_RATES, strict=True):
        _dilate(block.conv1, rate)
        _dilate(block.conv2, rate)
    return Backbone(stages, (64, 128, 256, 512))


def _vgg16(config: ModelConfig) -> Backbone:
    from torchvision import models  # takes seconds

    layers = models.vgg16().features
    fifth = [layer for layer in layers[24:] if isinstance(layer, nn.Conv2d)]
    for convolution, rate in zip(fifth, DILATION_RATES, strict=True):
        _dilate(convolution, rate)
    # torchvision's pools floor; odd sizes are kept whole so that any size from 33 px up works.
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    ends = (0, 10, 17, 24, 31)
    stages = [layers[a:b] for a, b in itertools.pairwise(ends)]
    return Backbone(stages, (128, 256, 512, 512))


def _efficientnet_b4(config: ModelConfig) -> Backbone:
    from torchvision import models

    layers = models.efficientnet_b4().features
    last_blocks = [*layers[6], *layers[7]][-3:]
    for block, rate in zip(last_blocks, DILATION_RATES, strict=True):
        _dilate(block.block[1][0], rate)
    stages = [layers[0:3], layers[3:4], layers[4:6], layers[6:8]]
    return Backbone(stages, (32, 56, 160, 448))


def load_imagenet_resnet50(backbone: Backbone, tensors: dict[str, Tensor]) -> int:
    """Copy ImageNet weights under torchvision's names into a ResNet-50 backbone.

    Parameters
    ----------
    backbone
        A ``resnet50`` backbone.
    tensors
        Any subset of torchvision's ``resnet50`` state; what is missing keeps its random start.

    Returns
    -------
    int
        Number of parameters (not running statistics) that were set.

    Raises
    ------
    ValueError
        If no tensor fits, or one has another shape.
    """
    renamed = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        places = {"conv1": "0.0", "bn1": "0.1", "layer1": "0.4"}
        places |= {"layer2": "1", "layer3": "2", "layer4": "3"}
        if head in places:
            renamed[f"stages.{places[head]}.{rest}"] = tensor.to(torch.float32)
    state = backbone.state_dict()
    wrong = sorted(k for k, t in renamed.items() if k not in state or state[k].shape != t.shape)
    if wrong or not renamed:
        raise ValueError(f"tensors do not fit a ResNet-50, first {(wrong or sorted(tensors))[:1]}")
    backbone.load_state_dict(renamed, strict=False)
    parameters = dict(backbone.named_parameters())
    return sum(parameters[name].numel() for name in renamed if name in parameters)
