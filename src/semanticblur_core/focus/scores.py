"""Numbers that say how much of an image is in focus.

Two families. Those of a **blur map** (``blur``, ``(H, W)`` float in 0..1, 1 = out of focus) are
regional: a region of interest, ``(H, W)`` bool, says where to look. A pixel is in focus where the
map is not above the threshold. The **classical** ones need no map: one number of a grey image
``(H, W)`` float in 0..1, to be compared between images of one scene or kind only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from semanticblur_core.errors import ImageError
from semanticblur_core.focus.sharpness import (
    blur_effect,
    normalised_variance,
    spectrum_slope,
    tenengrad,
    variance_of_laplacian,
)

Bools = NDArray[np.bool_]
Subject = Literal["centre", "saliency"]

THRESHOLD = 0.5
# A content mask is made on an image of about this many pixels along its longer side.
_CONTENT_SIDE_PX = 256
# Where fewer of its pixels have a value, a place has none.
_LEAST_KNOWN = 0.05
_SALIENCY_SIDE_PX = 64
_SALIENCY_SIGMA_PX = 3
_COUNTED_PIXELS = 2**20


@dataclass(frozen=True)
class FocusScores:
    """Scores of one image.

    Attributes
    ----------
    in_focus_fraction
        Share of the region that is in focus.
    mean_blur
        Mean of the blur map over the region, 0..1.
    largest_in_focus_fraction
        Largest connected part in focus, as a share of the region.
    subject_in_focus
        Share in focus, weighted towards the centre or the salient part of the image.
    region_fraction
        The region's share of the image; where it is 0, the four above are NaN.
    variance_of_laplacian, tenengrad, normalised_variance, spectrum_slope, blur_effect
        The classical scores of the whole image, see the functions of these names.
    """

    in_focus_fraction: float
    mean_blur: float
    largest_in_focus_fraction: float
    subject_in_focus: float
    region_fraction: float
    variance_of_laplacian: float
    tenengrad: float
    normalised_variance: float
    spectrum_slope: float
    blur_effect: float

    def to_dict(self) -> dict[str, float]:
        """Plain values by name."""
        return asdict(self)


# Which end of each score is the sharp one.
HIGHER_IS_SHARPER = {
    "in_focus_fraction": True,
    "mean_blur": False,
    "largest_in_focus_fraction": True,
    "subject_in_focus": True,
    "variance_of_laplacian": True,
    "tenengrad": True,
    "normalised_variance": True,
    "spectrum_slope": True,
    "blur_effect": False,
}

MAP_SCORES = ("in_focus_fraction", "mean_blur", "largest_in_focus_fraction", "subject_in_focus")


def score_image(
    grey: NDArray[np.float32],
    blur: NDArray[np.float32] | None,
    *,
    region: Bools | None = None,
    threshold: float = THRESHOLD,
    subject: Subject = "centre",
) -> FocusScores:
    """All scores of one image.

    Parameters
    ----------
    grey
        ``(H, W)`` float32 in 0..1, see `semanticblur_core.focus.classical.grey`.
    blur
        ``(H, W)`` float32 in 0..1, 1 = out of focus; without it the scores of the map are NaN.
    region
        ``(H, W)`` bool, where to look; None is everywhere.
    threshold
        A pixel is in focus where the map is not above it.
    subject
        What the subject is: the centre of the image, or what is salient.

    Raises
    ------
    ImageError
        If the shapes differ or the region is not bool.
    """
    _require_same_shape(grey, blur, region=region)
    of_map = dict.fromkeys(MAP_SCORES, math.nan)
    if blur is not None:
        weights = centre_weights(*blur.shape) if subject == "centre" else saliency(grey)
        of_map = {
            "in_focus_fraction": in_focus_fraction(blur, region=region, threshold=threshold),
            "mean_blur": mean_blur(blur, region=region),
            "largest_in_focus_fraction": largest_in_focus(blur, region=region, threshold=threshold)[
                0
            ],
            "subject_in_focus": in_focus_fraction(
                blur, region=region, threshold=threshold, weights=weights
            ),
        }
    return FocusScores(
        **of_map,
        region_fraction=1.0 if region is None else float(region.mean()),
        variance_of_laplacian=variance_of_laplacian(grey),
        tenengrad=tenengrad(grey),
        normalised_variance=normalised_variance(grey),
        spectrum_slope=spectrum_slope(grey),
        blur_effect=blur_effect(grey),
    )


def in_focus_fraction(
    blur: NDArray[np.float32],
    *,
    region: Bools | None = None,
    threshold: float = THRESHOLD,
    weights: NDArray[np.float32] | None = None,
) -> float:
    """Share of the region, or of its weights ``(H, W)``, that is in focus; NaN of no region."""
    _require_same_shape(blur, weights, region=region)
    sharp = blur <= threshold
    if weights is None:
        chosen = sharp if region is None else sharp[region]
        return float(chosen.mean()) if chosen.size else math.nan
    weights = weights if region is None else np.where(region, weights, 0)
    total = float(weights.sum(dtype=np.float64))
    return float(weights.sum(dtype=np.float64, where=sharp)) / total if total > 0 else math.nan


def mean_blur(blur: NDArray[np.float32], *, region: Bools | None = None) -> float:
    """Mean of the blur map over the region, 0..1; NaN of no region."""
    _require_same_shape(blur, region=region)
    chosen = blur if region is None else blur[region]
    return float(chosen.mean(dtype=np.float64)) if chosen.size else math.nan


def largest_in_focus(
    blur: NDArray[np.float32], *, region: Bools | None = None, threshold: float = THRESHOLD
) -> tuple[float, tuple[slice, slice] | None]:
    """Largest connected part in focus: its share of the region, and its bounding box.

    Returns
    -------
    tuple
        Share in 0..1 (NaN of no region), and slices of rows and columns, None if nothing is in
        focus.
    """
    _require_same_shape(blur, region=region)
    sharp = blur <= threshold
    n_pixels = sharp.size
    if region is not None:
        sharp &= region
        n_pixels = int(np.count_nonzero(region))
    if n_pixels == 0:
        return math.nan, None
    parts, n_parts = ndimage.label(sharp)
    if n_parts == 0:
        return 0.0, None
    # Some rows at a time, for they are counted as numbers of eight bytes; many of many parts.
    sizes = np.zeros(n_parts + 1, np.intp)
    for rows in np.array_split(parts, math.ceil(parts.size / max(_COUNTED_PIXELS, 4 * n_parts))):
        sizes += np.bincount(rows.ravel(), minlength=n_parts + 1)
    sizes = sizes[1:]
    largest = int(sizes.argmax())
    return float(sizes[largest]) / n_pixels, ndimage.find_objects(parts)[largest]


def label_scores(
    blur: NDArray[np.float32], labels: NDArray[Any], *, threshold: float = THRESHOLD
) -> dict[int, dict[str, float]]:
    """In-focus fraction, mean blur and size in pixels of each labelled region; 0 is no region.

    Parameters
    ----------
    blur
        ``(H, W)`` float32 in 0..1.
    labels
        ``(H, W)`` of whole numbers.

    Raises
    ------
    ImageError
        If the shapes differ or the labels are not whole numbers.
    """
    _require_same_shape(blur, labels)
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != np.bool_:
        raise ImageError(f"labels: expected whole numbers, got {labels.dtype}")
    values, inverse = np.unique(labels, return_inverse=True)
    inverse = inverse.ravel()
    n_pixels = np.bincount(inverse)
    sharp = np.bincount(inverse, weights=(blur <= threshold).ravel())
    total = np.bincount(inverse, weights=blur.ravel())
    return {
        int(value): {
            "in_focus_fraction": float(sharp[i] / n_pixels[i]),
            "mean_blur": float(total[i] / n_pixels[i]),
            "n_pixels": int(n_pixels[i]),
        }
        for i, value in enumerate(values)
        if value != 0
    }


def content_mask(grey: NDArray[np.float32], *, side_px: int = _CONTENT_SIDE_PX) -> Bools:
    """Tissue, cells or whatever is not empty background, in focus or not.

    The background is the most frequent intensity of the image, coarsely smoothed so that blur and
    noise matter little; what differs from it by more than Otsu's threshold is content, and what
    lies between such parts within six pixels of that small image. An image of one intensity has
    none, and neither have pixels without a value.

    Parameters
    ----------
    grey
        ``(H, W)`` float32 in 0..1, or NaN.
    side_px
        It is made on an image of about so many pixels along the longer side.

    Returns
    -------
    ndarray
        ``(H, W)`` bool.

    References
    ----------
    Otsu, IEEE Transactions on Systems, Man, and Cybernetics 9 (1979),
    doi:10.1109/TSMC.1979.4310076.
    """
    from skimage.filters import threshold_otsu

    known: Bools = np.isfinite(grey)
    step = max(1, math.ceil(max(grey.shape) / side_px))
    smooth = _made_small(np.where(known, grey, 0), step)
    seen = np.ones(smooth.shape, np.bool_)
    if not known.all():
        weight = _made_small(known.astype(np.float32), step)
        seen = weight > _LEAST_KNOWN
        smooth = np.divide(smooth, weight, out=np.zeros_like(smooth), where=seen)
    if not seen.any() or float(np.ptp(smooth[seen])) < 1e-3:
        return np.zeros(grey.shape, np.bool_)
    counts, edges = np.histogram(smooth[seen], bins=64)
    background = float(edges[counts.argmax() : counts.argmax() + 2].mean())
    distance = np.where(seen, np.abs(smooth - background), 0)
    coarse = distance > threshold_otsu(distance[seen])
    coarse = ndimage.binary_closing(np.pad(coarse, 3, mode="edge"), iterations=3)[3:-3, 3:-3]
    rows, columns = (
        np.minimum(np.arange(length) // step, n - 1)
        for length, n in zip(grey.shape, coarse.shape, strict=True)
    )
    known &= coarse[rows[:, None], columns[None]]
    return known


def _made_small(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Every ``step``-th pixel, smoothed before and after."""
    top, left = (min(step // 2, n - 1) for n in values.shape)
    smooth = ndimage.uniform_filter(values, step, mode="nearest")[top::step, left::step]
    small: NDArray[np.float32] = ndimage.gaussian_filter(smooth, 1, mode="nearest")
    return small


def centre_weights(height: int, width: int) -> NDArray[np.float32]:
    """Gaussian about the centre whose standard deviation is a quarter of each side."""
    rows, columns = (
        np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 4)) ** 2).astype(np.float32)
        for n in (height, width)
    )
    weights: NDArray[np.float32] = np.outer(rows, columns)
    return weights


def saliency(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """What stands out, by the image signature: ``(H, W)`` float32 at least 0.

    References
    ----------
    Hou, Harel and Koch, IEEE Transactions on Pattern Analysis and Machine Intelligence 34 (2012),
    doi:10.1109/TPAMI.2011.146.
    """
    from PIL import Image

    height, width = grey.shape
    factor = _SALIENCY_SIDE_PX / max(height, width)
    small_size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.asarray(Image.fromarray(grey).resize(small_size, Image.Resampling.BOX))
    signature = np.sign(fft.dctn(small - small.mean(), norm="ortho"))
    salient = ndimage.gaussian_filter(
        np.square(fft.idctn(signature, norm="ortho")), _SALIENCY_SIGMA_PX, mode="nearest"
    )
    enlarged = Image.fromarray(salient.astype(np.float32))
    return np.asarray(enlarged.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def tile_means(
    values: NDArray[Any], tile_size_px: float, *, region: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Heat map: means of ``(H, W)`` values over square tiles.

    Parameters
    ----------
    values
        ``(H, W)``: a blur map, or any other.
    tile_size_px
        Side of a tile; see `tile_size_in_px` for micrometres. Where it is no whole number, tiles
        differ by a pixel, so that the i-th one begins where i sides end. Tiles at the far edges are
        smaller.
    region
        ``(H, W)`` bool: means are over these pixels alone, NaN where a tile has none.

    Returns
    -------
    ndarray
        ``(ceil(H / tile_size_px), ceil(W / tile_size_px))`` float32.

    Raises
    ------
    ImageError
        If the size is below one pixel.
    """
    if not 1 <= tile_size_px < math.inf:
        raise ImageError(f"tile size: expected at least 1 px, got {tile_size_px}")
    starts = [_tile_starts(n, tile_size_px) for n in values.shape]
    if region is None:
        lengths = [np.diff(start, append=n) for start, n in zip(starts, values.shape, strict=True)]
        counts: NDArray[Any] = np.outer(*lengths)
    else:
        counts = _tile_sums(region, starts)
        values = np.where(region, values, 0)
    means = np.full(counts.shape, np.nan, np.float32)
    np.divide(_tile_sums(values, starts), counts, out=means, where=counts > 0, casting="same_kind")
    return means


def _tile_starts(n: int, tile_size_px: float) -> NDArray[np.intp]:
    starts: NDArray[np.intp] = np.rint(np.arange(math.ceil(n / tile_size_px)) * tile_size_px)
    starts = starts.astype(np.intp)
    return starts[starts < n]


def _tile_sums(values: NDArray[Any], starts: list[NDArray[np.intp]]) -> NDArray[np.float64]:
    sums = np.add.reduceat(values.astype(np.float64), starts[0], axis=0)
    return np.add.reduceat(sums, starts[1], axis=1)


def tile_size_in_px(tile_size_um: float, pixel_size_um: float | None) -> float:
    """Pixels, at least one and seldom a whole number, of a tile's side in micrometres.

    Raises
    ------
    ImageError
        If a size is not above 0, or the pixel size is unknown.
    """
    if pixel_size_um is None:
        raise ImageError(
            f"a side of {tile_size_um:g} um: the file names no pixel size; give it in pixels"
        )
    if not (tile_size_um > 0 and pixel_size_um > 0):
        raise ImageError(
            f"expected sizes above 0, got tiles of {tile_size_um:g} um and pixels of "
            f"{pixel_size_um:g} um"
        )
    return max(1.0, tile_size_um / pixel_size_um)


def _require_same_shape(*arrays: NDArray[Any] | None, region: NDArray[Any] | None = None) -> None:
    shapes = {array.shape for array in (*arrays, region) if array is not None}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        listed = " and ".join(str(shape) for shape in sorted(shapes))
        raise ImageError(f"expected images, maps and regions of one (H, W), got {listed}")
    # As indices, whole numbers would pick rows.
    if region is not None and region.dtype != np.bool_:
        raise ImageError(f"region: expected bool, got {region.dtype}; give region != 0")
