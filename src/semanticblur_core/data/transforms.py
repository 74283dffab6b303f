"""Training augmentation.

Two resizes exist on purpose. `semanticblur_core.data.squash` is the evaluation protocol's
(antialiased bilinear as Pillow does it). Training resizes on tensors, whose antialiased bilinear
filter agrees with Pillow's to one grey level.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.squash import IMAGENET_MEAN, IMAGENET_STD


def normalise(images: Tensor) -> Tensor:
    """ImageNet-normalise ``(N, 3, H, W)`` float images in 0..1."""
    mean = images.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (images - mean) / std


def augment(
    image: Tensor,
    mask: Tensor,
    config: TrainConfig,
    rng: np.random.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """One training example of a photograph and its mask.

    Parameters
    ----------
    image
        ``(3, H, W)`` uint8.
    mask
        ``(1, H, W)`` uint8, 255 = blurred; or ``(2, H, W)``, then also 255 = labelled.
    config
        Size and kind of augmentation.
    rng
        Source of randomness.
    device
        Where the example is to lie; what is cut out is resized on the CPU.

    Returns
    -------
    tuple of Tensor
        ``(3, S, S)`` float32 in 0..1 and, like ``mask``, ``(1, S, S)`` or ``(2, S, S)`` float32 of
        0 and 1. A pixel is labelled where a fifth of what it covers is, so that strokes survive.

    Notes
    -----
    A resize changes how large a circle of confusion looks. Labels stay true under reduction and
    under the squash that inference applies too; they would not under enlargement, which makes sharp
    areas soft, so crops never fall below the size they are resized to (unless the photograph itself
    does).
    """
    if config.augmentation in ("crop", "colour"):
        top, left, height, width = _crop_box(image.shape[-2:], config, rng)
        image = image[:, top : top + height, left : left + width]
        mask = mask[:, top : top + height, left : left + width]
    if config.augmentation != "none" and rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    size = (config.image_size_px, config.image_size_px)
    image = resize_bytes(image, size).to(device).float() / 255
    resized = resize_bytes(mask, size).to(device)
    target = (resized > 127).float()
    if len(mask) == 2:
        share, labelled = resized.float()
        target = torch.stack([2 * share > labelled, labelled >= 51]).float()
    if config.augmentation == "colour":
        image = _recolour(image, rng)
    return image, target


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


def _recolour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Random gain, gamma and saturation; none of them changes what is blurred."""
    grey = image.mean(dim=0, keepdim=True)
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.3)
    image = grey + (image - grey) * saturation
    image = (image * rng.uniform(0.75, 1.25)).clamp(0, 1)
    return image ** rng.uniform(0.8, 1.25)
