"""From an image to the network's square, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def squash(rgb: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Resize without keeping the aspect ratio, antialiased bilinear as Pillow does it.

    Parameters
    ----------
    rgb
        ``(H, W, 3)`` uint8, or float32 in 0..1.
    height, width
        Size of the result in pixels.

    Returns
    -------
    ndarray
        ``(height, width, 3)`` float32 in 0..1.
    """
    size = (width, height)
    if rgb.dtype == np.uint8:
        resized = Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR)
        return np.asarray(resized, dtype=np.float32) / np.float32(255)
    channels = [
        np.asarray(Image.fromarray(rgb[..., c]).resize(size, Image.Resampling.BILINEAR))
        for c in range(rgb.shape[2])
    ]
    return np.stack(channels, axis=2)
