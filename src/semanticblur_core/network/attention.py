"""Semantic-aware attention (equations 4-11 of the paper).

Everything that follows the attention is linear up to the head's first batch normalisation, so
these modules hold the parameters and compute the attention *weights*; the decoder applies them
inside its matrix products instead of writing attended copies of the feature maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Weights per channel from the mean and maximum over pixels by a shared MLP (equations 4-6).

    Parameters
    ----------
    channels
        Width C of the features.
    reduction
        The hidden layer has ``max(1, C // reduction)`` units; no biases.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, mean: Tensor, maximum: Tensor) -> Tensor:
        """Weights ``(N, C)`` in 0..1 for ``(N, C)`` means and maxima over the pixels."""
        return torch.sigmoid(self.mlp(torch.stack([mean, maximum])).sum(dim=0))


class SpatialAttention(nn.Module):
    """Weights per pixel from the mean and maximum over channels (equations 7-8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, mean: Tensor, maximum: Tensor) -> Tensor:
        """Weights ``(N, H, W)`` in 0..1 for two ``(N, H, W)`` maps."""
        return torch.sigmoid(self.conv(torch.stack([mean, maximum], dim=1)))[:, 0]


class SemanticEnhancement(nn.Module):
    """Semantic map from the two deepest levels, added to each level (equations 10-11).

    Parameters
    ----------
    channels
        Widths of the four levels.
    semantic_channels
        Width s of the semantic map.
    """

    def __init__(self, channels: tuple[int, ...], semantic_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels[2] + channels[3], semantic_channels, kernel_size=1)
        self.project = nn.ModuleList(
            nn.Conv2d(semantic_channels, width, kernel_size=1) for width in channels
        )
        self.alpha = nn.Parameter(torch.tensor(0.1))
