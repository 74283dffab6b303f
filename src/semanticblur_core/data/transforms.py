"""Training augmentation.

Two resizes exist on purpose. `semanticblur_core.data.squash` is the evaluation protocol's
(antialiased bilinear as Pillow does it). Training resizes on tensors, whose antialiased bilinear
filter agrees with Pillow's to one grey level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.squash import IMAGENET_MEAN, IMAGENET_STD


def normalise(images: Tensor) -> Tensor:
    """ImageNet-normalise ``(N, 3, H, W)`` float images in 0..1."""
    # What is made while torch traces an export is no tensor to keep.
    traced = torch.compiler.is_compiling()
    make = _mean_and_std.__wrapped__ if traced else _mean_and_std
    mean, std = make(images.device, images.dtype)
    return (images - mean) / std


@lru_cache(maxsize=16)
def _mean_and_std(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of ImageNet, ``(1, 3, 1, 1)``; kept, for a GPU waits for each copy."""
    # A cached tensor must also serve training, whichever mode it was first asked for in.
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return mean, std


def augment(
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: TrainConfig,
    rngs: Sequence[np.random.Generator],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Training examples of photographs and their masks.

    Parameters
    ----------
    pairs
        N images ``(3, H, W)`` uint8 of any sizes, each with its mask ``(1, H, W)`` uint8, 255 =
        blurred; or ``(2, H, W)``, then also 255 = labelled.
    config
        Size and kind of augmentation.
    rngs
        Source of randomness of each.
    device
        Where the examples are to lie; what is cut out is resized on the CPU.

    Returns
    -------
    tuple of Tensor
        ``(N, 3, S, S)`` float32 in 0..1 and ``(N, 1, S, S)`` or, where any mask says what is
        labelled, ``(N, 2, S, S)`` float32 of 0 and 1. A pixel is labelled where a fifth of what it
        covers is, so that strokes survive.

    Notes
    -----
    A resize changes how large a circle of confusion looks. Labels stay true under reduction and
    under the squash that inference applies too; they would not under enlargement, which makes sharp
    areas soft, so crops never fall below the size they are resized to (unless the photograph itself
    does).
    """
    cut = [_cut(*pair, config, rng) for pair, rng in zip(pairs, rngs, strict=True)]
    images = torch.stack([image for image, _ in cut]).to(device).float() / 255
    if config.augmentation == "colour":
        images = _recolour(images, rngs)
    masks = [mask for _, mask in cut]
    if all(len(mask) == 1 for mask in masks):
        return images, (torch.stack(masks).to(device) > 127).float()
    masks = [
        mask if len(mask) == 2 else F.pad(mask, (0, 0, 0, 0, 0, 1), value=255) for mask in masks
    ]
    share, labelled = torch.stack(masks, dim=1).to(device).float()
    return images, torch.stack([2 * share > labelled, labelled >= 51], dim=1).float()


def _cut(
    image: Tensor, mask: Tensor, config: TrainConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A part of an image and its mask, perhaps mirrored, at the size trained at; uint8."""
    if config.augmentation in ("crop", "colour"):
        top, left, height, width = _crop_box(image.shape[-2:], config, rng)
        image = image[:, top : top + height, left : left + width]
        mask = mask[:, top : top + height, left : left + width]
    if config.augmentation != "none" and rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    size = (config.image_size_px, config.image_size_px)
    return resize_bytes(image, size), resize_bytes(mask, size)


def cutmix(
    images: Tensor, targets: Tensor, *, share: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of each next image into a share of them, target and all.

    Parameters
    ----------
    images, targets
        ``(N, C, H, W)`` and ``(N, K, H, W)``.
    share
        Probability, 0..1, that an image receives one.
    rng
        Source of randomness.

    Returns
    -------
    tuple of Tensor
        Like ``images`` and ``targets``; new tensors.

    References
    ----------
    Yun et al., CutMix, ICCV 2019, https://doi.org/10.1109/ICCV.2019.00612. There the label is mixed
    by area; here it is per pixel and stays exact.
    """
    mixed, mixed_targets = images.clone(), targets.clone()
    height, width = images.shape[-2:]
    for i in range(len(images)):
        if rng.random() >= share:
            continue
        area, aspect = rng.uniform(0.1, 0.6), np.exp(rng.uniform(-0.7, 0.7))
        sides = [
            min(full, max(1, round(full * float(np.sqrt(area * ratio)))))
            for full, ratio in ((height, aspect), (width, 1 / aspect))
        ]
        top = int(rng.integers(0, height - sides[0] + 1))
        left = int(rng.integers(0, width - sides[1] + 1))
        box = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
        other = (i + 1) % len(images)
        mixed[i][box] = images[other][box]
        mixed_targets[i][box] = targets[other][box]
    return mixed, mixed_targets


def resize_bytes(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of ``(C, H, W)`` uint8 on the CPU."""
    channels_last = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(channels_last, size=size, mode="bilinear", antialias=True)[0]


def _crop_box(
    shape: torch.Size | tuple[int, ...], config: TrainConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of about the photograph's aspect ratio."""
    scale = rng.uniform(config.crop_min_side, 1)
    sides = []
    for full in shape:
        side = round(full * min(1, scale * rng.uniform(0.9, 1.1)))
        sides.append(min(full, max(side, config.image_size_px)))
    top = int(rng.integers(0, shape[0] - sides[0] + 1))
    left = int(rng.integers(0, shape[1] - sides[1] + 1))
    return top, left, sides[0], sides[1]


def _recolour(images: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Random gain, gamma and saturation; none of them changes what is blurred."""
    drawn = [
        (
            0.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.3),
            rng.uniform(0.75, 1.25),
            rng.uniform(0.8, 1.25),
        )
        for rng in rngs
    ]
    saturation, gain, exponent = images.new_tensor(drawn).t()[:, :, None, None, None]
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * saturation
    images = (images * gain).clamp(0, 1)
    return torch.pow(images, exponent)
