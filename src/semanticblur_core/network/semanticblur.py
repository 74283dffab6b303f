"""The SemanticBlur network (Haider, Gazis, Zahoor 2026, doi:10.62762/TIS.2025.879161).

Between the backbone and the first batch normalisation of the head, equations 9-15 are linear in
the features once the attention weights are known. The semantic projections (11), the lateral
convolutions (12-13) and the head's first convolution (15) are therefore multiplied together once
per call, and each level is read once, by one matrix product to 64 channels; resizing (13-14) then
happens on 64 channels instead of up to 2048. The function is the same (see
``tests/core/reference_network.py`` for the equation-by-equation form), at a fraction of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from semanticblur_core.config import MIN_SIZE_PX, ModelConfig
from semanticblur_core.network.attention import (
    ChannelAttention,
    SemanticEnhancement,
    SpatialAttention,
)
from semanticblur_core.network.backbones import Backbone, build_backbone
from semanticblur_core.network.decoder import HEAD_CHANNELS, FeaturePyramidDecoder
from semanticblur_core.network.fused import fuse
from semanticblur_core.network.resize import resize, resize_columns, resize_matrix

# Sides of matrices are multiples of it, which matrix units ask for.
_ALIGNMENT = 8


class _Composite(NamedTuple):
    """Products of consecutive 1x1 convolutions, see ``SemanticBlur._compose``.

    ``level[i]`` is ``(64 [+ s], C_i)``: features to head channels and, on levels 3 and 4, to the
    semantic map; ``offset[i]`` ``(64,)`` its constant; ``semantic`` ``(4 * 64, s)`` semantic map to
    head channels of all levels; ``semantic_bias`` ``(s,)``; ``head_bias`` ``(64,)``.
    """

    level: list[Tensor]
    offset: list[Tensor]
    semantic: Tensor | None
    semantic_bias: Tensor | None
    head_bias: Tensor


class SemanticBlur(nn.Module):
    """Dilated backbone, semantic-aware attention, feature-pyramid decoder.

    Parameters
    ----------
    config
        Architecture; the default is the paper's, 25.28 million parameters.

    Notes
    -----
    Input is ``(N, 3, H, W)`` float, ImageNet-normalised, H and W at least 33. Output is the logits
    ``(N, 1, H, W)``; their sigmoid is the blur map, 1 = out of focus.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config or ModelConfig()
        self.backbone: Backbone = build_backbone(self.config)
        channels = self.backbone.channels
        self.channel_attention = nn.ModuleList(
            ChannelAttention(width, self.config.attention_reduction)
            for width in channels
            if self.config.channel_attention
        )
        self.spatial_attention = nn.ModuleList(
            SpatialAttention() for _ in channels if self.config.spatial_attention
        )
        self.semantic = (
            SemanticEnhancement(channels, self.config.semantic_channels)
            if self.config.semantic_enhancement
            else None
        )
        self.decoder = FeaturePyramidDecoder(channels, self.config.decoder_channels)
        self.fixed: _FixedComposite | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 1, H, W)`` of images ``(N, 3, H, W)``.

        Raises
        ------
        ValueError
            If the input is not ``(N, 3, H, W)`` or smaller than 33 px.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (N, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if min(height, width) < MIN_SIZE_PX:
            raise ValueError(
                f"expected at least {MIN_SIZE_PX} x {MIN_SIZE_PX} px, got {height} x {width}"
            )
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return self.head(features, height, width)

    def for_inference(self, dtype: torch.dtype = torch.float32) -> SemanticBlur:
        """Copy for inference: batch normalisations folded, constant products done once.

        The copy computes the same function (to rounding) and can no longer be trained.

        Raises
        ------
        ValueError
            If this is such a copy already.
        """
        if self.fixed is not None:
            raise ValueError("this network was made for inference already")
        model = copy.deepcopy(self).eval()
        _fold_batch_norms(model.backbone)
        fuse(model.backbone)
        decoder = model.decoder
        with torch.no_grad():
            composite = model._compose()
            scale, shift = _batch_norm_affine(decoder.norm1)
            # Rows beyond the first 64 feed the semantic map and are not normalised here.
            head = HEAD_CHANNELS[0]
            level = [torch.cat([scale[:, None] * w[:head], w[head:]]) for w in composite.level]
            semantic = composite.semantic
            if semantic is not None:
                semantic = semantic * scale.repeat(len(level))[:, None]
            composite = _Composite(
                level,
                [scale * offset for offset in composite.offset],
                semantic,
                composite.semantic_bias,
                scale * composite.head_bias + shift,
            )
            decoder.norm1 = nn.Identity()  # type: ignore[assignment]
            decoder.conv2 = fuse_conv_bn_eval(decoder.conv2, decoder.norm2)
            decoder.norm2 = nn.Identity()  # type: ignore[assignment]
            model.fixed = _FixedComposite(composite)
        model.requires_grad_(False)
        return model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _compose(self) -> _Composite:
        """Multiply consecutive 1x1 convolutions, in float32."""
        decoder = self.decoder
        head = _matrix(decoder.conv1)
        level, offset, semantic_parts = [], [], []
        for i, lateral in enumerate(decoder.lateral):
            weight = _matrix(lateral)
            constant: Tensor = lateral.get_parameter("bias")
            if self.semantic is not None:
                project = self.semantic.project[i]
                alpha = self.semantic.alpha
                semantic_parts.append(alpha * (head @ (weight @ _matrix(project))))
                constant = constant + alpha * (weight @ project.get_parameter("bias"))
            level.append(head @ weight)
            offset.append(head @ constant)
        head_bias = decoder.conv1.get_parameter("bias")
        if self.semantic is None:
            return _Composite(level, offset, None, None, head_bias)
        reduce = _matrix(self.semantic.reduce)
        third = self.backbone.channels[2]
        level[2] = torch.cat([level[2], reduce[:, :third]])
        level[3] = torch.cat([level[3], reduce[:, third:]])
        semantic_bias = self.semantic.reduce.get_parameter("bias")
        return _Composite(level, offset, torch.cat(semantic_parts), semantic_bias, head_bias)

    def head(
        self,
        features: list[Tensor],
        height: int,
        width: int,
        *,
        windows: Sequence[tuple[slice, slice]] | None = None,
    ) -> Tensor:
        """Everything after the backbone.

        Parameters
        ----------
        features
            F1..F4 of the backbone.
        height, width
            Size of the images they are of.
        windows
            Rows and columns of each image that are wanted, all of one size; most of the time goes
            into the full resolution. Two pixels along a window's sides differ from the whole.

        Returns
        -------
        Tensor
            Logits ``(N, 1, height, width)``, or of the windows' size.
        """
        if self.fixed is not None:
            composite = self.fixed()
        else:
            with torch.autocast(features[0].device.type, enabled=False):
                composite = self._compose()
        head = HEAD_CHANNELS[0]
        pyramid = [self._attend(i, f, composite.level[i]) for i, f in enumerate(features)]
        if composite.semantic is not None:
            pyramid = _add_semantic(pyramid, composite)
        # Equations 12-13, in head channels: each level plus everything coarser.
        for i, constant in enumerate(composite.offset):
            pyramid[i] = pyramid[i][..., :head] + constant.to(pyramid[i].dtype)
        for i in (2, 1, 0):
            pyramid[i] = pyramid[i] + resize(pyramid[i + 1], *pyramid[i].shape[1:3])
        fused = self._fuse(pyramid, composite.head_bias, height, width, windows)
        return self.decoder.predict(fused.permute(0, 3, 1, 2))

    def _attend(self, index: int, features: Tensor, weight: Tensor) -> Tensor:
        """Attended features (equations 4-9) times ``weight``: ``(N, H_i, W_i, K)``."""
        nhwc = features.permute(0, 2, 3, 1)
        n, h, w, c = nhwc.shape
        pixels = nhwc.reshape(n, h * w, c)
        if self.channel_attention:
            of_channels = self.channel_attention[index](pixels.mean(dim=1), pixels.amax(dim=1))
            weight = weight * of_channels[:, None, :]
        if not self.spatial_attention:
            return torch.matmul(pixels, weight.transpose(-1, -2).to(pixels.dtype)).view(n, h, w, -1)
        # One more row of the product gives the mean over channels (equation 7), others fill it up.
        width = weight.shape[-2]
        average = weight.new_full((*weight.shape[:-2], _to_align(width + 1) + 1, c), 1 / c)
        weight = torch.cat([weight, average], dim=-2).transpose(-1, -2).to(pixels.dtype)
        product = torch.matmul(pixels, weight).view(n, h, w, -1)
        maximum = pixels.amax(dim=2).view(n, h, w)
        mean = product[..., width]
        attention: Tensor = self.spatial_attention[index](mean, maximum)
        return product[..., :width] * attention[..., None].to(product.dtype)

    def _fuse(
        self,
        pyramid: list[Tensor],
        bias: Tensor,
        height: int,
        width: int,
        windows: Sequence[tuple[slice, slice]] | None,
    ) -> Tensor:
        """Equation 14 and the head's bias: ``(N, height, width, 64)``, or of the windows' size.

        Columns are resized level by level; rows of all levels together, by one product with the
        row weights side by side, scaled by beta, and a column of ones for the bias.
        """
        beta = self.decoder.beta
        device = pyramid[0].device
        rows = [
            beta[i] * resize_matrix(level.shape[1], height, device)
            for i, level in enumerate(pyramid)
        ]
        n, _, _, c = pyramid[0].shape
        wide = [resize_columns(level, width) for level in pyramid]
        spare = _to_align(1 + sum(level.shape[1] for level in wide))
        last = torch.ones(height, 1, device=device)
        matrix = torch.cat([*rows, last, last.new_zeros(height, spare)], dim=1)
        dtype = wide[0].dtype
        wide.append(bias.to(dtype).expand(n, 1 + spare, width, c))
        stacked = torch.cat(wide, dim=1)
        if windows is not None:
            stacked = torch.stack([s[:, w[1]] for s, w in zip(stacked, windows, strict=True)])
            matrix = torch.stack([matrix[rows] for rows, _ in windows])
            height, width = matrix.shape[1], stacked.shape[2]
        return torch.matmul(matrix.to(dtype), stacked.flatten(2)).view(n, height, width, c)


def _add_semantic(pyramid: list[Tensor], composite: _Composite) -> list[Tensor]:
    """Equations 10-11 in head channels; the semantic rows of levels 3 and 4 are consumed."""
    head = HEAD_CHANNELS[0]
    assert composite.semantic is not None
    assert composite.semantic_bias is not None
    third, fourth = pyramid[2], pyramid[3]
    semantic = third[..., head:] + resize(fourth[..., head:].contiguous(), *third.shape[1:3])
    semantic = semantic + composite.semantic_bias.to(semantic.dtype)
    added = torch.matmul(semantic, composite.semantic.t().to(semantic.dtype))
    return [
        level[..., :head] + resize(part, *level.shape[1:3])
        for level, part in zip(pyramid, torch.split(added, head, dim=-1), strict=True)
    ]


def _to_align(size: int) -> int:
    """How much a side of a matrix lacks to the next multiple of `_ALIGNMENT`."""
    return -size % _ALIGNMENT


def _matrix(convolution: nn.Module) -> Tensor:
    """Weights ``(out, in)`` of a 1x1 convolution."""
    return convolution.get_parameter("weight").flatten(1)


def _batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - scale * norm.running_mean


class _FixedComposite(nn.Module):
    """A composite computed once, as buffers, so that it follows the model's device and dtype."""

    def __init__(self, composite: _Composite) -> None:
        super().__init__()
        for i, (level, offset) in enumerate(zip(composite.level, composite.offset, strict=True)):
            self.register_buffer(f"level{i}", level)
            self.register_buffer(f"offset{i}", offset)
        self.register_buffer("semantic", composite.semantic)
        self.register_buffer("semantic_bias", composite.semantic_bias)
        self.register_buffer("head_bias", composite.head_bias)

    def forward(self) -> _Composite:
        return _Composite(
            [self.get_buffer(f"level{i}") for i in range(4)],
            [self.get_buffer(f"offset{i}") for i in range(4)],
            self._buffers["semantic"],
            self._buffers["semantic_bias"],
            self.get_buffer("head_bias"),
        )


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch normalisation into the convolution registered just before it."""
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        # Of several GPUs they are SyncBatchNorm, which is no BatchNorm2d.
        if (
            isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm)
            and previous
            and isinstance(previous[1], nn.Conv2d)
        ):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            setattr(module, name, nn.Identity())
        else:
            _fold_batch_norms(child)
        previous = (name, child)
