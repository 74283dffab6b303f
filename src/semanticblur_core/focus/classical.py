"""Blur maps of three hand-crafted methods: no weights, no training data needed to run them.

======== =================================================== ==========================
name     cue                                                 source
======== =================================================== ==========================
``hifst`` small high-frequency DCT coefficients of gradients  Golestaneh and Karam 2017
``lbp``   non-edge-like local binary patterns                 Yi and Eramian 2016
``dbdf``  spectrum, gradient span and kurtosis                after Shi, Xu and Jia 2014
======== =================================================== ==========================

HiFST is relative: the sharpest place of any image gets 0 and its most blurred 1, so it tells where
an image is sharp and not whether it is. The other two are absolute. Images of more than four
megapixels are reduced to that for the analysis, so time and memory are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from semanticblur_core import io
from semanticblur_core.config import Method
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.planes import ALL, Channels, DetectUpdate, Planes, Region

Floats = NDArray[np.float32]

MAX_ANALYSIS_PIXELS = 4_000_000
_N_THREADS = 2
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_STRIP_ROWS = 64

HIFST_SCALES_PX = (7, 15, 31, 63)
HIFST_STRIDE_PX = 5
_HIFST_MAX_PATCHES = 100_000
# 14 blocks of 190 are the 2660 coefficients of a place.
_N_SORT_BLOCKS = 14
_SORT_HEAD = 48
_ENTROPY_WINDOW_PX = 7

LBP_THRESHOLD = 0.016
LBP_WINDOWS_PX = (11, 15, 21)

DBDF_WINDOWS_PX = (11, 21, 41)
_SPECTRUM_WINDOW_PX = 16
_SPECTRUM_STRIDE_PX = 4

# Logistic regressions on 40 pixels of each of the 544 CUHK training photographs outside cuhk-val.
_LBP_BIAS, _LBP_WEIGHT = 2.52, -8.15
_DBDF_BIAS = 0.369
_DBDF_WEIGHTS = (-1.026, 1.222, -0.952, 0.194, -0.351, -0.728, 0.074)


class ClassicalDetector:
    """One of the hand-crafted methods behind the interface of `semanticblur_core.Detector`.

    Parameters
    ----------
    method
        ``hifst``, ``lbp`` or ``dbdf``.

    Attributes
    ----------
    name, reason
        The method, and what it runs on (one line for people).

    Raises
    ------
    ConfigError
        If there is no such method.
    """

    def __init__(self, method: str) -> None:
        if method not in get_args(Method):
            raise ConfigError(
                f"method {method!r}: expected one of network, {', '.join(get_args(Method))}"
            )
        self.name = method
        self.reason = f"{method} on the CPU"

    def detect(
        self,
        image: NDArray[Any],
        *,
        size: int | Literal["native"] = "native",
        value_range: tuple[float, float] | None = None,
    ) -> Floats:
        """Blur map of one image.

        Parameters
        ----------
        image
            ``(H, W)`` or ``(H, W, 3)``, any real dtype; a fourth channel (alpha) is dropped.
        size
            Without effect, it is the network's: these methods work at the image's own size.
        value_range
            Intensities that count as black and white, see `semanticblur_core.io.to_unit_range`.

        Returns
        -------
        ndarray
            ``(H, W)`` float32 in 0..1, 1 = out of focus.

        Raises
        ------
        ImageError
            If the image is not one grey or RGB image.
        """
        image = io.without_alpha(image)
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ImageError(f"expected an image (H, W) or (H, W, 3), got shape {image.shape}")
        if 0 in image.shape:
            raise ImageError(f"the image has no pixels, shape {image.shape}")
        return self._map(grey(image, value_range=value_range))

    def iter_planes(
        self,
        array: Any,
        axes: str,
        *,
        indices: Sequence[Sequence[int]] | None = None,
        channels: Channels = "each",
        size: int | Literal["native"] = "native",
        value_range: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        visible: Region | None = None,
    ) -> Iterator[DetectUpdate]:
        """Detect an array of any axes plane by plane, as `semanticblur_core.Detector` does.

        ``size`` and ``visible`` are without effect: a plane is analysed in one piece.

        Yields
        ------
        DetectUpdate
            After every plane.

        Raises
        ------
        ImageError
            If axes or indices do not fit.
        """
        planes = Planes(array, axes, channels)
        limits = planes.estimate_range() if value_range is None else planes.as_limits(value_range)
        views = [planes.view(i) for i in (planes.indices() if indices is None else indices)]
        for n_done, view in enumerate(views, start=1):
            blur = self._map(as_grey(view.read_unit(limits=limits)))
            whole = np.broadcast_to(np.True_, blur.shape)
            yield DetectUpdate(view.index, n_done, len(views), blur, whole, ALL, True)

    def _map(self, image: Floats) -> Floats:
        methods: dict[str, Callable[[Floats], Floats]] = {"hifst": hifst, "lbp": lbp, "dbdf": dbdf}
        height, width = image.shape
        factor = math.sqrt(MAX_ANALYSIS_PIXELS / image.size)
        if factor >= 1:
            return methods[self.name](image)
        reduced = _resize(image, max(1, int(height * factor)), max(1, int(width * factor)))
        return _resize(methods[self.name](reduced), height, width)


def grey(image: NDArray[Any], *, value_range: tuple[float, float] | None = None) -> Floats:
    """Luma (Rec. 601) of an image ``(H, W)`` or ``(H, W, 3)``: ``(H, W)`` float32 in 0..1."""
    return as_grey(io.to_unit_range(image, limits=value_range))


def as_grey(unit: NDArray[Any]) -> Floats:
    """Luma of what `semanticblur_core.io.to_unit_range` gives: ``(H, W)`` float32 in 0..1."""
    scale = np.float32(255 if unit.dtype == np.uint8 else 1)
    if unit.ndim == 2:
        return np.asarray(unit / scale, np.float32)
    grey = np.empty(unit.shape[:2], np.float32)
    for top in range(0, len(unit), _STRIP_ROWS):  # one in the processor's cache
        strip = unit[top : top + _STRIP_ROWS]
        part = np.multiply(strip[..., 0], _LUMA[0] / scale, out=grey[top : top + len(strip)])
        for i in (1, 2):
            part += strip[..., i] * (_LUMA[i] / scale)
    return grey


def hifst(image: Floats, *, stride_px: int = HIFST_STRIDE_PX) -> Floats:
    """Blur map from sorted transform coefficients of gradient magnitudes.

    Around each pixel the high frequencies (v + u >= M - 1) of M x M cosine transforms of the
    gradient magnitude, M = 7, 15, 31 and 63, are sorted together; each of the 117 smallest makes a
    layer, each layer is brought to 0..1 over the image, and the largest of them counts. That is
    weighted with its local entropy and smoothed along the edges of the image.

    Parameters
    ----------
    image
        ``(H, W)`` float32 in 0..1.
    stride_px
        Patches are centred on every such pixel, and on fewer where that makes more than 100,000;
        1 is the paper's.

    Returns
    -------
    ndarray
        ``(H, W)`` float32 in 0..1, 1 = out of focus, relative to the image's own sharpest place. A
        constant image is all 1.

    References
    ----------
    Golestaneh and Karam, CVPR 2017, doi:10.1109/CVPR.2017.71.
    """
    height, width = image.shape
    stride = max(stride_px, math.ceil(math.sqrt(image.size / _HIFST_MAX_PATCHES)))
    smooth = ndimage.gaussian_filter(image, 0.5, mode="nearest")
    gradient = np.hypot(
        ndimage.sobel(smooth, 0, mode="nearest"), ndimage.sobel(smooth, 1, mode="nearest")
    )
    layers = _hifst_layers(gradient, stride)
    low, high = layers.min(axis=(0, 1)), layers.max(axis=(0, 1))
    layers -= low
    layers /= np.maximum(high - low, np.finfo(np.float32).tiny)
    pooled = _to_unit(_interpolate(layers.max(axis=2), height, width, stride))
    entropy = _local_entropy(pooled, stride)
    sharpness = pooled * _interpolate(entropy, height, width, stride)
    guide = ndimage.gaussian_filter(_to_unit(smooth), 1, truncate=1, mode="nearest")
    smoothed = domain_transform(sharpness, guide)
    largest = float(smoothed.max())
    return 1 - smoothed / np.float32(largest) if largest > 0 else np.ones_like(image)


def lbp(image: Floats) -> Floats:
    """Blur map from the share of local binary patterns that blur does not leave behind.

    The sharpness of a window is the share of its rotation-invariant uniform patterns (8 neighbours
    at radius 1, threshold 0.016) of the classes 6 to 9: the mean of windows of 11, 15 and 21 px.
    In place of the paper's matting and graph it is smoothed along the edges of the image, and two
    numbers fitted on photographs turn it into a probability.

    Parameters
    ----------
    image
        ``(H, W)`` float32 in 0..1.

    Returns
    -------
    ndarray
        ``(H, W)`` float32 in 0..1, 1 = out of focus.

    References
    ----------
    Yi and Eramian, IEEE Transactions on Image Processing 25 (2016), doi:10.1109/TIP.2016.2528042.
    """
    sharpness = domain_transform(lbp_sharpness(image), image)
    return _sigmoid(np.float32(_LBP_BIAS) + np.float32(_LBP_WEIGHT) * np.sqrt(sharpness))


def lbp_sharpness(image: Floats) -> Floats:
    """Share of patterns of the classes 6 to 9, mean of the three windows: ``(H, W)`` in 0..1."""
    padded = np.pad(image, 1, mode="edge")
    height, width = image.shape

    def shifted(dy: int, dx: int) -> Floats:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    away = np.float32(math.sqrt(0.5))
    n_set = np.zeros(image.shape, np.uint8)
    n_changes = np.zeros(image.shape, np.uint8)
    # Anticlockwise from the right.
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    first: NDArray[np.bool_] | None = None
    previous: NDArray[np.bool_] | None = None
    for dy, dx in around:
        if dy and dx:
            sides = shifted(dy, 0) + shifted(0, dx)
            value = (1 - away) ** 2 * image + (1 - away) * away * sides
            value += away**2 * shifted(dy, dx)
        else:
            value = shifted(dy, dx)
        bit = value - image >= LBP_THRESHOLD
        n_set += bit
        if previous is None:
            first = bit
        else:
            n_changes += bit != previous
        previous = bit
    assert first is not None
    n_changes += previous != first
    counted = ((n_set >= 6) | (n_changes > 2)).astype(np.float32)
    sharpness = np.zeros(image.shape, np.float32)
    for size in LBP_WINDOWS_PX:
        sharpness += ndimage.uniform_filter(counted, size, mode="nearest")
    return sharpness / np.float32(len(LBP_WINDOWS_PX))


def dbdf(image: Floats) -> Floats:
    """Blur map from spectrum, gradient span and kurtosis.

    In the spirit of Shi, Xu and Jia, not their method: local statistics of theirs in windows of
    11, 21 and 41 px, weighted by a logistic regression in place of their Bayes classifier, learned
    filters and multi-scale inference, and smoothed along the edges of the image.

    Parameters
    ----------
    image
        ``(H, W)`` float32 in 0..1.

    Returns
    -------
    ndarray
        ``(H, W)`` float32 in 0..1, 1 = out of focus.

    References
    ----------
    Shi, Xu and Jia, CVPR 2014, doi:10.1109/CVPR.2014.379.
    """
    evidence = np.full(image.shape, _DBDF_BIAS, np.float32)
    for weight, feature in zip(_DBDF_WEIGHTS, dbdf_features(image), strict=True):
        evidence += np.float32(weight) * feature
    return _sigmoid(domain_transform(evidence, image))


def dbdf_features(image: Floats) -> Iterator[Floats]:
    """Local statistics ``(H, W)``: one of the spectrum, then span and kurtosis of each window.

    * the mean over frequencies of the log of the rotationally averaged power spectrum,
    * the log of the scale of the gradients' heavy tail, ``sqrt(E g^4 / E g^2)``,
    * the log of their kurtosis, the smaller of the two directions.
    """
    yield _log_spectrum(image)
    smallest = np.float32(1e-8)
    gradients = [
        np.diff(image, axis=axis, append=np.take(image, [-1], axis=axis)) for axis in (0, 1)
    ]
    for size in DBDF_WINDOWS_PX:
        span = np.full(image.shape, -np.inf, np.float32)
        tail = np.full(image.shape, np.inf, np.float32)
        for gradient in gradients:
            second = ndimage.uniform_filter(gradient**2, size, mode="nearest")
            fourth = ndimage.uniform_filter(gradient**4, size, mode="nearest")
            second = np.maximum(second, smallest)
            fourth = np.maximum(fourth, second**2)
            span = np.maximum(span, np.log(fourth / second) / 2)
            tail = np.minimum(tail, np.log(fourth / second**2))
        yield span
        yield tail


def domain_transform(
    image: Floats,
    guide: Floats,
    *,
    spatial_sigma_px: float = 15,
    range_sigma: float = 0.25,
    n_iterations: int = 3,
) -> Floats:
    """Smooth along the edges of a guide: the recursive domain transform.

    Parameters
    ----------
    image, guide
        ``(H, W)`` float32, the guide in 0..1.
    spatial_sigma_px, range_sigma
        Standard deviations in pixels and in intensities of the guide.
    n_iterations
        Passes along rows and columns.

    Returns
    -------
    ndarray
        ``(H, W)`` float32.

    References
    ----------
    Gastal and Oliveira, ACM Transactions on Graphics 30 (2011), doi:10.1145/2010324.1964964.
    """
    # Columns first as rows of the transposed image: steps run over whole contiguous lines.
    lines = [guide.T, guide]
    distances = []
    for line in lines:
        distance = np.zeros(line.shape, np.float32)
        distance[1:] = np.abs(np.diff(line, axis=0))
        distances.append(1 + spatial_sigma_px / range_sigma * distance)
    out = image.astype(np.float32)
    for i in range(n_iterations):
        sigma = (
            spatial_sigma_px * math.sqrt(3 / (4**n_iterations - 1)) * 2 ** (n_iterations - 1 - i)
        )
        feedback = np.float32(math.exp(-math.sqrt(2) / sigma))
        for distance in distances:
            out = np.ascontiguousarray(out.T) if distance is distances[0] else out
            weights = feedback**distance
            for k in range(1, len(out)):
                out[k] += weights[k] * (out[k - 1] - out[k])
            for k in range(len(out) - 2, -1, -1):
                out[k] += weights[k + 1] * (out[k + 1] - out[k])
            out = np.ascontiguousarray(out.T) if distance is distances[0] else out
    return out


def _hifst_layers(gradient: Floats, stride: int) -> Floats:
    """The smallest high-frequency coefficients around every ``stride``-th pixel, sorted.

    Returns ``(ceil(H / stride), ceil(W / stride), 117)`` float32. The transform along columns is
    shared by all patches of a row of patches. The transforms are FFTs and not matrix products,
    because a BLAS with threads of its own would fight with the threads here.
    """
    half = HIFST_SCALES_PX[-1] // 2
    n_layers = sum(HIFST_SCALES_PX) + 1
    n_coefficients = sum(size * (size + 1) // 2 for size in HIFST_SCALES_PX)
    padded = np.pad(gradient.astype(np.float32), half)
    n_rows, n_columns = (-(-n // stride) for n in gradient.shape)
    layers = np.empty((n_rows, n_columns, n_layers), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view

    def fill(row: int) -> None:
        coefficients = np.empty((n_columns, n_coefficients), np.float32)
        filled = 0
        for size in HIFST_SCALES_PX:
            margin = half - size // 2
            top = row * stride + margin
            band = padded[top : top + size, margin : margin + (n_columns - 1) * stride + size]
            vertical = fft.dct(band, norm="ortho", axis=0)
            patches = windows(vertical, size, axis=1)[:, ::stride]
            both = fft.dct(np.ascontiguousarray(patches), norm="ortho", axis=2)
            for v in range(size):
                coefficients[:, filled : filled + v + 1] = both[v, :, size - 1 - v :]
                filled += v + 1
        np.abs(coefficients, out=coefficients)
        layers[row] = _smallest(coefficients, n_layers)

    with ThreadPoolExecutor(_N_THREADS) as pool:
        list(pool.map(fill, range(n_rows)))
    return layers


def _smallest(values: Floats, count: int) -> Floats:
    """The ``count`` smallest of each row, sorted: ``(N, count)``.

    Sorting blocks and then the heads of the blocks takes half the time of numpy's partition. Where
    the head of a block might not have been enough, the whole row is sorted.
    """
    blocks = np.sort(values.reshape(len(values), _N_SORT_BLOCKS, -1), axis=2)
    heads = np.ascontiguousarray(blocks[:, :, :_SORT_HEAD])
    smallest = np.sort(heads.reshape(len(values), -1), axis=1)[:, :count]
    uncertain = heads[:, :, -1].min(axis=1) < smallest[:, -1]
    smallest[uncertain] = np.sort(values[uncertain], axis=1)[:, :count]
    return smallest


def _local_entropy(image: Floats, stride: int) -> Floats:
    """Entropy in bits of the grey levels in 7 x 7 px around every ``stride``-th pixel."""
    levels = np.pad((image * 255 + 0.5).astype(np.uint8), _ENTROPY_WINDOW_PX // 2, mode="symmetric")
    window = (_ENTROPY_WINDOW_PX, _ENTROPY_WINDOW_PX)
    views = np.lib.stride_tricks.sliding_window_view(levels, window)[::stride, ::stride]
    n_pixels = _ENTROPY_WINDOW_PX**2
    # Runs of equal values in the sorted window are the histogram.
    ordered = np.sort(views.reshape(-1, n_pixels), axis=1)
    starts = np.ones(ordered.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = np.flatnonzero(starts)
    share = np.diff(places, append=starts.size) / n_pixels
    first_run = np.searchsorted(places, np.arange(len(ordered)) * n_pixels)
    entropy = np.add.reduceat(-share * np.log2(share), first_run)
    return entropy.reshape(views.shape[:2]).astype(np.float32)


def _log_spectrum(image: Floats) -> Floats:
    """Mean log power over the frequencies of 16 x 16 px windows, interpolated between them."""
    size, stride = _SPECTRUM_WINDOW_PX, _SPECTRUM_STRIDE_PX
    height, width = image.shape
    padded = np.pad(image, (size // 2, size // 2 - 1), mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))[::stride, ::stride]
    taper = np.hanning(size + 1)[:size].astype(np.float32)
    taper = taper[:, None] * taper[None]
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    ring = np.rint(frequency).astype(int).ravel()
    rings = [ring == radius for radius in range(1, size // 2 + 1)]
    average = np.stack([one / one.sum() for one in rings], axis=1).astype(np.float32)
    out = np.empty(windows.shape[:2], np.float32)
    for row, patches in enumerate(windows):
        centred = (patches - patches.mean(axis=(1, 2), keepdims=True)) * taper
        power = np.abs(fft.rfft2(centred)) ** 2
        out[row] = np.log(power.reshape(len(patches), -1) @ average + 1e-5).mean(axis=1)
    return _interpolate(out, height, width, stride)


def _interpolate(grid: Floats, height: int, width: int, stride: int) -> Floats:
    """Bilinear between values at every ``stride``-th pixel; beyond the last, the last."""
    for axis, length in ((0, height), (1, width)):
        place = np.minimum(np.arange(length) / stride, grid.shape[axis] - 1)
        before = place.astype(np.intp)
        after = np.minimum(before + 1, grid.shape[axis] - 1)
        share = (place - before).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        low = np.take(grid, before, axis=axis)
        grid = low + share * (np.take(grid, after, axis=axis) - low)
    return grid


def _resize(image: Floats, height: int, width: int) -> Floats:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)


def _to_unit(image: Floats) -> Floats:
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return np.zeros_like(image)
    return (image - np.float32(low)) / np.float32(high - low)


def _sigmoid(values: Floats) -> Floats:
    return np.float32(0.5) * (1 + np.tanh(values / 2))
