"""Helps for labelling by hand: labels from a blur map, superpixels, and where to label next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.data.labels import BLURRED, SHARP, UNLABELLED
from semanticblur_core.errors import ConfigError


def labels_of_map(blur: NDArray[Any], *, confidence: float = 0.5) -> NDArray[np.uint8]:
    """Labels of the pixels of a blur map that is sure enough.

    Parameters
    ----------
    blur
        0..1, 1 = out of focus; NaN where it was not computed.
    confidence
        0.5..1: blurred above it, sharp below one minus it. 0.5 labels every pixel.

    Returns
    -------
    ndarray
        uint8 of the same shape: 0 = unlabelled, 1 = sharp, 2 = blurred.

    Raises
    ------
    ConfigError
        If the confidence is out of range.
    """
    if not 0.5 <= confidence <= 1:
        raise ConfigError(f"confidence {confidence:g}: expected 0.5 to 1")
    labels = np.zeros(blur.shape, np.uint8)
    # Exactly 0.5 is sharp, as everywhere.
    labels[blur <= 1 - confidence] = SHARP
    labels[(blur > 0.5) & (blur >= confidence)] = BLURRED
    return labels


def superpixel(
    image: NDArray[Any], row: int, column: int, *, size_px: int = 32
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Region of alike pixels around a point: SLIC in a window around it.

    Parameters
    ----------
    image
        ``(H, W)`` or ``(H, W, 3)``, any real dtype. Only the window is read, so it may be lazy.
    row, column
        The point, inside the image.
    size_px
        Side that a region has about.

    Returns
    -------
    box, mask
        Rows and columns, and which pixels of them belong to it.

    References
    ----------
    Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", TPAMI
    2012, doi:10.1109/TPAMI.2012.120, as in `skimage.segmentation.slic`.
    """
    from skimage.segmentation import slic

    reach = 3 * size_px
    top, left = max(0, row - reach), max(0, column - reach)
    part = np.asarray(image[top : row + reach + 1, left : column + reach + 1])
    part = io.to_unit_range(io.without_alpha(part))
    if part.dtype == np.uint8:
        part = part.astype(np.float32) / 255
    n_segments = max(1, round(part.shape[0] * part.shape[1] / size_px**2))
    segments = slic(
        part,
        n_segments=n_segments,
        compactness=10 if part.ndim == 3 else 0.1,
        channel_axis=-1 if part.ndim == 3 else None,
        sigma=1,
        start_label=1,
    )
    whole = segments == segments[row - top, column - left]
    rows, columns = np.flatnonzero(whole.any(axis=1)), np.flatnonzero(whole.any(axis=0))
    inner = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    box = (
        slice(int(rows[0]) + top, int(rows[-1]) + 1 + top),
        slice(int(columns[0]) + left, int(columns[-1]) + 1 + left),
    )
    return box, whole[inner]


@dataclass(frozen=True)
class UncertainPlace:
    """A window of a plane: its middle ``(row, column)``, and how unsure the model is in it.

    ``uncertainty`` is the mean of ``1 - |2 b - 1|`` in 0..1, labelled pixels counting as 0.
    """

    row: int
    column: int
    uncertainty: float


def uncertain_places(
    blur: NDArray[Any], labels: NDArray[np.uint8], *, window_px: int = 64
) -> list[UncertainPlace]:
    """Places of a plane by how much labels there would tell the model, most first.

    Parameters
    ----------
    blur
        Map ``(H, W)`` in 0..1; NaN where it was not computed.
    labels
        Labels of the same shape.
    window_px
        Side of the windows that the plane is divided into; those at the edges are smaller.

    Returns
    -------
    list
        Windows in which the model is unsure of anything that is not labelled.
    """
    unsure = 1 - np.abs(2 * np.asarray(blur, np.float32) - 1)
    unsure[(labels != UNLABELLED) | np.isnan(unsure)] = 0
    rows, columns = (np.arange(0, n, window_px) for n in unsure.shape)
    sums = np.add.reduceat(np.add.reduceat(unsure, rows, axis=0), columns, axis=1)
    heights, widths = (
        np.minimum(window_px, n - starts)
        for n, starts in zip(unsure.shape, (rows, columns), strict=True)
    )
    # A sliver at the edge counts as if it were half a window: it holds little to label.
    least = min(window_px**2, unsure.size) / 2
    means = sums / np.maximum(heights[:, None] * widths, least)
    order = np.argsort(-means, axis=None, kind="stable")
    return [
        UncertainPlace(
            int(rows[i] + heights[i] // 2), int(columns[k] + widths[k] // 2), float(means[i, k])
        )
        for i, k in zip(*np.unravel_index(order, means.shape), strict=True)
        if means[i, k] > 0
    ]
