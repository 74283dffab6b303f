"""Training loss: binary cross-entropy plus structural similarity (equation 16 of the paper)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core.errors import DataError
from semanticblur_core.io import ROUNDING

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


class BlurLoss(NamedTuple):
    """Scalars: ``total = bce + ssim_weight * ssim``, where ``ssim`` is 1 - SSIM."""

    total: Tensor
    bce: Tensor
    ssim: Tensor


class LabelCounts(NamedTuple):
    """What the two terms of the loss are means over: labelled pixels, wholly labelled windows.

    Float scalars, so that they can be summed over parts of a batch and over processes.
    """

    pixels: Tensor
    windows: Tensor


def label_counts(target: Tensor, labelled: Tensor | None = None) -> LabelCounts:
    """Counts of a batch ``(N, 1, H, W)``; None labels every pixel."""
    if labelled is None:
        margin = SSIM_WINDOW_PX - 1
        n, _, height, width = target.shape
        n_windows = n * max(0, height - margin) * max(0, width - margin)
        # Written on the device: a copy of a number would wait for a GPU.
        return LabelCounts(target.new_full((), target.numel()), target.new_full((), n_windows))
    labelled = labelled.bool()
    return LabelCounts(labelled.sum().float(), _whole_windows(labelled).sum().float())


def blur_loss(
    logits: Tensor,
    target: Tensor,
    *,
    labelled: Tensor | None = None,
    ssim_weight: float = 0.1,
    counts: LabelCounts | None = None,
) -> BlurLoss:
    """Loss of predicted logits against a mask.

    Parameters
    ----------
    logits
        ``(N, 1, H, W)``, any float type; computed in float32.
    target
        ``(N, 1, H, W)`` bool or of any number type, in 0..1, 1 = blurred; its values where not
        labelled do not matter.
    labelled
        ``(N, 1, H, W)`` bool, or numbers of which 0 = ignore. None counts every pixel.
    ssim_weight
        lambda of equation 16; 0 leaves the SSIM term out.
    counts
        What to divide by instead of this batch's own counts: with those of the whole batch, the
        losses of its parts add up to its own.

    Returns
    -------
    BlurLoss
        0 where nothing is labelled (with a gradient of 0, so that ``backward`` works); the SSIM
        term also where no window of 11 x 11 is labelled throughout, as in smaller images.

    Raises
    ------
    DataError
        If targets that count leave 0..1; floats on a GPU, which would wait, are not looked at.
    """
    if target.dtype != torch.bool and (
        target.device.type == "cpu" or not target.is_floating_point()
    ):
        counted = target if labelled is None else torch.where(labelled.bool(), target, 0)
        _require_unit_range(counted)
    return unchecked_blur_loss(
        logits, target, labelled=labelled, ssim_weight=ssim_weight, counts=counts
    )


def unchecked_blur_loss(
    logits: Tensor,
    target: Tensor,
    *,
    labelled: Tensor | None = None,
    ssim_weight: float = 0.1,
    counts: LabelCounts | None = None,
) -> BlurLoss:
    """As `blur_loss`, of targets that are known to lie in 0..1."""
    logits, target = logits.float(), target.float()
    if labelled is not None:
        labelled = labelled.bool()
        target = torch.where(labelled, target, torch.zeros_like(target))
    bce_map = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    pixels, windows = (None, None) if counts is None else counts
    bce = _masked_mean(bce_map, labelled, pixels)
    if ssim_weight == 0:
        return BlurLoss(bce, bce, torch.zeros_like(bce))
    ssim = _ssim_loss(torch.sigmoid(logits), target, labelled, windows)
    return BlurLoss(bce + ssim_weight * ssim, bce, ssim)


def ssim_loss(probability: Tensor, target: Tensor, *, labelled: Tensor | None = None) -> Tensor:
    """1 - mean SSIM over the windows that are labelled throughout.

    Parameters
    ----------
    probability, target
        ``(N, 1, H, W)`` float32 in 0..1.
    labelled
        ``(N, 1, H, W)`` bool or None, as in `blur_loss`.

    Returns
    -------
    Tensor
        Scalar in 0..2; 0 where no window is wholly labelled, or the image is smaller than one.

    References
    ----------
    Wang, Bovik, Sheikh, Simoncelli, Image quality assessment: from error visibility to structural
    similarity, IEEE TIP 2004, doi:10.1109/TIP.2003.819861 (Gaussian window 11 x 11, sigma 1.5,
    K1 = 0.01, K2 = 0.03; windows wholly inside the image).
    """
    return _ssim_loss(probability, target, labelled, None)


def _ssim_loss(
    probability: Tensor, target: Tensor, labelled: Tensor | None, n_windows: Tensor | None
) -> Tensor:
    if min(probability.shape[-2:]) < SSIM_WINDOW_PX:
        return 0 * probability.sum()  # with a gradient of 0
    ssim = _ssim_map(probability, target)
    whole = None if labelled is None else _whole_windows(labelled.bool())
    return _masked_mean(1 - ssim, whole, n_windows)


def _require_unit_range(target: Tensor) -> None:
    if target.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (float(value) for value in torch.aminmax(target))
    if not -ROUNDING <= low <= high <= 1 + ROUNDING:
        raise DataError(
            f"target: expected 0..1, 1 = blurred, got {low:.7g}..{high:.7g}; a mask of 0 and 255 "
            "is to be divided by 255"
        )


def _whole_windows(labelled: Tensor) -> Tensor:
    """Which windows are labelled throughout: ``(N, 1, H - 10, W - 10)`` bool."""
    pad = SSIM_WINDOW_PX // 2
    unlabelled = (~labelled).float()
    whole = F.max_pool2d(unlabelled, SSIM_WINDOW_PX, stride=1, padding=pad)
    return whole[..., pad:-pad, pad:-pad] == 0


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each window wholly inside the image: ``(N, 1, H - 10, W - 10)``."""
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    # In mixed precision variances would be differences of rounded numbers.
    with torch.autocast(x.device.type, enabled=False):
        rows = torch.matmul(_window_matrix(x.shape[-2], x.device), stacked)
        local = torch.matmul(rows, _window_matrix(x.shape[-1], x.device).t())
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = local.chunk(5)
    var_x = mean_xx - mean_x**2
    var_y = mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return luminance * (2 * covariance + _C2) / (var_x + var_y + _C2)


@lru_cache(maxsize=16)
def _window_matrix(size: int, device: torch.device) -> Tensor:
    """Gaussian window at each place of an axis, ``(size - 10, size)``.

    A product with a banded matrix: convolutions of one channel are slow on CPUs, above all
    backwards.
    """
    # A cached tensor must also serve training, whichever mode it was first asked for in.
    with torch.inference_mode(False):
        offsets = torch.arange(size)[None, :] - torch.arange(size - SSIM_WINDOW_PX + 1)[:, None]
        distance = (offsets - SSIM_WINDOW_PX // 2).float()  # whatever the default type is
        window = torch.exp(-(distance**2) / (2 * SSIM_SIGMA_PX**2))
        window[distance.abs() > SSIM_WINDOW_PX // 2] = 0
        return (window / window.sum(dim=1, keepdim=True)).to(device)


def _masked_mean(values: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    """Mean of what the mask leaves, or its sum over ``count``."""
    if mask is None:
        return values.mean() if count is None else values.sum() / count.clamp(min=1)
    # where, not a product: an ignored infinity must not become NaN.
    total = torch.where(mask, values, torch.zeros_like(values)).sum()
    return total / (mask.sum() if count is None else count).clamp(min=1)
