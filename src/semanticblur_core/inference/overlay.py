"""A photograph with its blurred part marked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io

BLURRED_COLOR = (0xE6, 0x9F, 0x00)
BOUNDARY_COLOR = (0xFF, 0xFF, 0xFF)
_STRENGTH = 0.55


def draw_overlay(
    image: NDArray[Any],
    blur: NDArray[np.float32],
    *,
    threshold: float = 0.5,
    value_range: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Tint what is blurred and draw the boundary.

    Parameters
    ----------
    image
        ``(H, W)`` or ``(H, W, 3)``, any real dtype; a fourth channel (alpha) is dropped.
    blur
        ``(H, W)`` in 0..1, 1 = out of focus.
    threshold
        Pixels above it are tinted; the boundary runs around them.
    value_range
        As in `semanticblur_core.io.to_unit_range`.

    Returns
    -------
    ndarray
        ``(H, W, 3)`` uint8.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    rgb = io.as_rgb(io.to_unit_range(io.without_alpha(image), limits=value_range))
    photo = rgb.astype(np.float32) if rgb.dtype == np.uint8 else rgb * np.float32(255)
    blurred = blur > threshold
    # Grey before the tint, so that the tint shows on any colour.
    grey = photo.mean(axis=2, keepdims=True)
    tinted = (1 - _STRENGTH) * grey + _STRENGTH * np.array(BLURRED_COLOR, np.float32)
    out = np.where(blurred[..., None], tinted, photo)
    width = max(2, round(min(blurred.shape) / 200))
    edge = maximum_filter(blurred, size=width) != minimum_filter(blurred, size=width)
    out[edge] = BOUNDARY_COLOR
    return np.clip(np.round(out), 0, 255).astype(np.uint8)
