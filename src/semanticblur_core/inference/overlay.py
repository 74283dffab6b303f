"""A photograph with its blurred part marked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io

BLURRED_COLOR = (0xE6, 0x9F, 0x00)
BOUNDARY_COLOR = (0xFF, 0xFF, 0xFF)
_STRENGTH = 0.55
_BAND_ROWS = 256


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
    pixels = io.without_alpha(image)
    if value_range is None and pixels.dtype not in (np.uint8, np.bool_):
        value_range = _limits(pixels)
    height = len(blur)
    width = max(2, round(min(blur.shape) / 200))
    drawn = np.empty((*blur.shape, 3), np.uint8)
    # Some rows at a time: as float32 colours all of a large photograph would take gigabytes.
    for top in range(0, height, _BAND_ROWS):
        end = min(top + _BAND_ROWS, height)
        first, last = max(0, top - width), min(height, end + width)
        edge = _boundary(blur[first:last] > threshold, width)[top - first : end - first]
        unit = io.to_unit_range(pixels[top:end], limits=value_range)
        drawn[top:end] = _tinted(io.as_rgb(unit), blur[top:end] > threshold)
        drawn[top:end][edge] = BOUNDARY_COLOR
    return drawn


def _limits(pixels: NDArray[Any]) -> tuple[float, float] | None:
    """Those of the whole image, above a constant one; None where no value is finite."""
    found = io.robust_limits(io.unmasked(pixels))
    return None if found is None else io.increasing(found)


def _boundary(blurred: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    from scipy.ndimage import maximum_filter, minimum_filter

    edge: NDArray[np.bool_] = maximum_filter(blurred, width) != minimum_filter(blurred, width)
    return edge


def _tinted(rgb: NDArray[Any], blurred: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``(h, W, 3)`` uint8 of an image as `semanticblur_core.io.to_unit_range` gives it."""
    photo = rgb.astype(np.float32) if rgb.dtype == np.uint8 else rgb * np.float32(255)
    # Grey before the tint, so that the tint shows on any colour.
    grey = photo.mean(axis=2, keepdims=True)
    tinted = (1 - _STRENGTH) * grey + _STRENGTH * np.array(BLURRED_COLOR, np.float32)
    out = np.where(blurred[..., None], tinted, photo)
    return np.clip(np.round(out), 0, 255).astype(np.uint8)
