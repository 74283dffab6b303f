"""Helps for labelling by hand: labels from a blur map, superpixels, and where to label next."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.data.store import BLURRED, SHARP, UNLABELLED
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


def most_uncertain(
    blur: NDArray[Any], labels: NDArray[np.uint8], *, window_px: int = 64
) -> tuple[tuple[int, ...], float] | None:
    """Place where labels would tell the model most: where it is unsure and nothing is labelled.

    Parameters
    ----------
    blur
        Map ``(..., H, W)`` in 0..1; NaN where it was not computed.
    labels
        Labels of the same shape.
    window_px
        Side of the windows that are compared.

    Returns
    -------
    index, uncertainty
        Index of the window's middle, and the mean over it of ``1 - |2 b - 1|`` in 0..1, labelled
        pixels counting as 0. None where everything is labelled or nothing was computed.
    """
    best: tuple[tuple[int, ...], float] | None = None
    height, width = blur.shape[-2:]
    window_height, window_width = min(window_px, height), min(window_px, width)
    for plane in np.ndindex(blur.shape[:-2]):
        unsure = 1 - np.abs(2 * np.asarray(blur[plane], np.float32) - 1)
        unsure[(labels[plane] != UNLABELLED) | np.isnan(unsure)] = 0
        n_rows, n_columns = height // window_height, width // window_width
        whole = unsure[: n_rows * window_height, : n_columns * window_width]
        means = whole.reshape(n_rows, window_height, n_columns, window_width).mean(axis=(1, 3))
        row, column = np.unravel_index(int(means.argmax()), means.shape)
        score = float(means[row, column])
        if score > (best[1] if best else 0):
            middle = (
                int(row) * window_height + window_height // 2,
                int(column) * window_width + window_width // 2,
            )
            best = ((*plane, *middle), score)
    return best
