"""From the network's small map to the image's size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Chosen on cuhk-val (docs/detect.md): radius of the window at the map's resolution, and the
# variance of intensity (0..1) below which a window counts as flat.
_RADIUS = 3
_EPSILON = 1e-4
# Maps are kept this far from 0 and 1, where their logits are infinite.
_MARGIN = 1e-4
_CHUNK_PIXELS = 400_000


def upsample_bilinear(blur: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``(h, w)`` to ``(H, W)``, pixel centres aligned, as torch's ``interpolate`` does it."""
    if blur.shape == shape:
        return blur
    resized = np.empty(shape, np.float32)
    wide = _Rows(blur, shape)
    for rows in _chunks(shape):
        np.clip(wide.rows(rows), 0, 1, out=resized[rows])
    return resized


def upsample_nearest(blur: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``(h, w)`` to ``(H, W)``, as torch's ``nearest-exact`` does it on CPUs with AVX2."""
    rows, columns = (_nearest(*lengths) for lengths in zip(blur.shape, shape, strict=True))
    nearest: NDArray[np.float32] = blur[np.ix_(rows, columns)]
    return nearest


def upsample_guided(
    blur: NDArray[np.float32], small: NDArray[np.float32], image: NDArray[Any]
) -> NDArray[np.float32]:
    """``(h, w)`` to ``(H, W)`` along the image's own edges, by the fast guided filter.

    In windows of the small image the map's logits are fitted by a line in the grey value. The
    line's coefficients, which are smooth, are brought to full size and applied to the full image.

    Parameters
    ----------
    blur
        Map ``(h, w)`` in 0..1.
    small
        The image it was made from, ``(h, w, 3)`` in 0..1.
    image
        The image at full size, ``(H, W)`` or ``(H, W, 3)``, uint8 or float32 in 0..1.

    Returns
    -------
    ndarray
        ``(H, W)`` float32 in 0..1; float32 temporaries are of some rows only.

    References
    ----------
    He and Sun, Fast Guided Filter, arXiv:1505.00996.
    """
    logits = to_logits(blur)
    grey = _grey(small)
    mean_grey, mean_logits = _window_mean(grey), _window_mean(logits)
    covariance = _window_mean(grey * logits) - mean_grey * mean_logits
    variance = (_window_mean(grey * grey) - mean_grey * mean_grey).clip(0)
    slope = covariance / (variance + np.float32(_EPSILON))
    offset = mean_logits - slope * mean_grey
    shape = image.shape[:2]
    slopes, offsets = (_Rows(_window_mean(x), shape) for x in (slope, offset))
    result = np.empty(shape, np.float32)
    for rows in _chunks(shape):
        part = slopes.rows(rows)
        part *= _grey(image[rows])
        part += offsets.rows(rows)
        np.negative(part, out=part)
        np.exp(part.clip(-80, 80, out=part), out=part)
        part += 1
        np.reciprocal(part, out=result[rows])
    return result


def to_logits(blur: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of a map, kept finite."""
    inside = np.clip(blur, _MARGIN, 1 - _MARGIN)
    logits: NDArray[np.float32] = np.log(inside) - np.log1p(-inside)
    return logits


def _nearest(n_in: int, n_out: int) -> NDArray[np.intp]:
    """Source index of each pixel."""
    scale = np.float32(n_in) / np.float32(n_out)
    # Torch multiplies and subtracts in one step there, which rounds once, to float32.
    position = ((np.arange(n_out) + 0.5) * scale - 0.5).astype(np.float32).clip(0)
    return np.minimum((position + 0.5).astype(np.intp), n_in - 1)


class _Rows:
    """Rows of a small map brought to full size, made when they are due."""

    def __init__(self, values: NDArray[np.float32], shape: tuple[int, ...]) -> None:
        height, width = shape
        self._wide = values @ _bilinear_matrix(values.shape[1], width).T
        n = values.shape[0]
        position = ((np.arange(height) + 0.5) * (n / height) - 0.5).clip(0, n - 1)
        self._first = np.minimum(position.astype(int), max(n - 2, 0))
        self._second = np.minimum(self._first + 1, n - 1)
        self._share = (position - self._first).astype(np.float32)[:, None]

    def rows(self, rows: slice) -> NDArray[np.float32]:
        part: NDArray[np.float32] = self._wide[self._second[rows]]
        first = self._wide[self._first[rows]]
        part -= first
        part *= self._share[rows]
        part += first
        return part


def _bilinear_matrix(n_in: int, n_out: int) -> NDArray[np.float32]:
    """Weights ``(n_out, n_in)`` of two taps a row, edges repeated."""
    position = ((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5).clip(0, n_in - 1)
    taps: NDArray[np.float64] = np.maximum(1 - np.abs(position[:, None] - np.arange(n_in)), 0)
    return taps.astype(np.float32)


def _window_mean(values: NDArray[Any]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = ndimage.uniform_filter(values, 2 * _RADIUS + 1, mode="nearest")
    return mean


def _grey(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Mean of the channels in 0..1."""
    if pixels.ndim == 2:
        grey = pixels.astype(np.float32)
    else:
        grey = pixels[..., 0].astype(np.float32)
        grey += pixels[..., 1]
        grey += pixels[..., 2]
        grey *= np.float32(1 / 3)
    if pixels.dtype == np.uint8:
        grey *= np.float32(1 / 255)
    return grey


def _chunks(shape: tuple[int, ...]) -> list[slice]:
    n = max(1, _CHUNK_PIXELS // max(1, shape[1]))
    return [slice(start, min(start + n, shape[0])) for start in range(0, shape[0], n)]
