"""Feature-pyramid decoder with learnable fusion (equations 12-15)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semanticblur_core.network.fused import conv_relu, conv_to_one, infers_on_gpu

HEAD_CHANNELS = (64, 32)


class FeaturePyramidDecoder(nn.Module):
    """Parameters of the pyramid and of the prediction head.

    Parameters
    ----------
    channels
        Widths of the four levels.
    decoder_channels
        Width d of the pyramid.
    """

    def __init__(self, channels: tuple[int, ...], decoder_channels: int) -> None:
        super().__init__()
        first, second = HEAD_CHANNELS
        self.lateral = nn.ModuleList(
            nn.Conv2d(width, decoder_channels, kernel_size=1) for width in channels
        )
        self.beta = nn.Parameter(torch.full((len(channels),), 1 / len(channels)))
        self.conv1 = nn.Conv2d(decoder_channels, first, kernel_size=1)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, 1, kernel_size=3, padding=1)

    def predict(self, fused: Tensor) -> Tensor:
        """Logits ``(N, 1, H, W)`` from the output ``(N, 64, H, W)`` of the first convolution."""
        x = torch.relu(self.norm1(fused))
        if isinstance(self.norm2, nn.Identity):  # folded into the convolution
            x = conv_relu(x, self.conv2)
        else:
            x = torch.relu(self.norm2(self.conv2(x)))
        logits: Tensor = conv_to_one(x, self.conv3) if infers_on_gpu(x) else self.conv3(x)
        return logits
