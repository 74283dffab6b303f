"""Wider measures of a blur map against a mask: curves, structure, alignment, boundary, calibration.

Every function takes ``blur``, ``(H, W)`` float in 0..1, and ``mask``, ``(H, W)`` bool, both with
the positive class True or towards 1 (blur, unless both were inverted), and returns floats in 0..1.
Curves go over the 256 grey levels of an 8-bit map: at level t a pixel is positive where
``floor(255 b) >= t``. Every measure has a value for masks that are wholly positive or negative,
given in its docstring. The tests compare S, weighted F, E, the F curve and the adaptive F at twice
the mean with pysodmetrics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

N_LEVELS = 256
N_CALIBRATION_BINS = 15
BOUNDARY_TOLERANCE_PX = 2
_EPS = float(np.spacing(1))

Floats = NDArray[np.float64]


class LevelCounts(NamedTuple):
    """True and false positives at every grey level, ``(256,)`` int64 each, and the mask's pixels.

    Index t holds the counts for ``floor(255 b) >= t``, so both fall with t.
    """

    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    n_positive: int
    n_negative: int


def level_counts(blur: NDArray[Any], mask: NDArray[np.bool_]) -> LevelCounts:
    """Counts behind every curve, from two histograms."""
    # The small term keeps k / 255 and 1 - k / 255 at their level whatever float32 rounded them to.
    grey = (blur.astype(np.float64) * 255 + 1e-4).astype(np.uint8)
    positive = np.bincount(grey[mask], minlength=N_LEVELS)
    negative = np.bincount(grey[~mask], minlength=N_LEVELS)
    return LevelCounts(
        np.cumsum(positive[::-1])[::-1],
        np.cumsum(negative[::-1])[::-1],
        int(positive.sum()),
        int(negative.sum()),
    )


def precision_recall(counts: LevelCounts) -> tuple[Floats, Floats]:
    """Precision and recall at every level, ``(256,)`` each.

    0 where nothing is predicted positive, and recall 0 throughout for a wholly negative mask.
    """
    predicted = counts.tp + counts.fp
    precision = counts.tp / np.maximum(predicted, 1)
    recall = counts.tp / max(counts.n_positive, 1)
    return precision, recall


def f_measure(precision: Floats, recall: Floats, beta_squared: float) -> Floats:
    """``(1 + b^2) P R / (b^2 P + R)``, 0 where P and R are 0."""
    below = beta_squared * precision + recall
    above = (1 + beta_squared) * precision * recall
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def adaptive_f(
    blur: NDArray[Any], mask: NDArray[np.bool_], factor: float, beta_squared: float
) -> float:
    """F at the threshold ``factor`` x the map's mean, at most 1: binary at ``b >= threshold``.

    Of the map in 8 bits, as the field keeps maps: whether a float is 1 or 1e-6 less says nothing.

    Achanta et al., Frequency-tuned salient region detection, CVPR 2009 (factor 2);
    doi:10.1109/CVPR.2009.5206596. The blur field uses 1.5 too. 0 for a wholly negative mask.
    """
    levels = np.round(blur.astype(np.float64) * 255) / 255
    binary = levels >= min(factor * float(levels.mean()), 1.0)
    tp = int(np.count_nonzero(binary & mask))
    precision = tp / max(int(np.count_nonzero(binary)), 1)
    recall = tp / max(int(np.count_nonzero(mask)), 1)
    return float(f_measure(np.array(precision), np.array(recall), beta_squared))


def structure_measure(blur: NDArray[Any], mask: NDArray[np.bool_], alpha: float = 0.5) -> float:
    """S-measure ``alpha S_object + (1 - alpha) S_region``, at least 0.

    ``S_object`` is the mean over both classes, weighted by their area, of ``2 m / (m^2 + 1 + s)``,
    m and s the mean and deviation of the map (inverted outside the mask) in the class. ``S_region``
    is the mean over the four blocks around the mask's centroid, weighted by area, of their SSIM.

    Fan et al., Structure-measure, ICCV 2017, doi:10.1109/ICCV.2017.487. For a wholly positive mask
    the mean of the map, for a wholly negative one 1 minus it.
    """
    b = blur.astype(np.float64)
    share = float(mask.mean())
    if share == 0:
        return 1 - float(b.mean())
    if share == 1:
        return float(b.mean())
    objects = share * _object_score(b[mask]) + (1 - share) * _object_score(1 - b[~mask])
    return max(0.0, alpha * objects + (1 - alpha) * _region_score(b, mask))


def _object_score(values: Floats) -> float:
    mean = values.mean()
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + deviation + _EPS))


def _region_score(b: Floats, mask: NDArray[np.bool_]) -> float:
    """Area-weighted SSIM of the four blocks around the mask's centroid."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    weights_y, weights_x = mask.sum(axis=1)[rows], mask.sum(axis=0)[columns]
    y = round(float((rows * weights_y).sum() / weights_y.sum())) + 1
    x = round(float((columns * weights_x).sum() / weights_x.sum())) + 1
    total = 0.0
    for vertical in (slice(0, y), slice(y, height)):
        for horizontal in (slice(0, x), slice(x, width)):
            block = b[vertical, horizontal]
            if block.size:
                score = _block_ssim(block, mask[vertical, horizontal].astype(np.float64))
                total += block.size / mask.size * score
    return total


def _block_ssim(b: Floats, g: Floats) -> float:
    n = b.size
    mean_b, mean_g = b.mean(), g.mean()
    below = n - 1 if n > 1 else 1
    variance_b = ((b - mean_b) ** 2).sum() / below
    variance_g = ((g - mean_g) ** 2).sum() / below
    covariance = ((b - mean_b) * (g - mean_g)).sum() / below
    above = 4 * mean_b * mean_g * covariance
    under = (mean_b**2 + mean_g**2) * (variance_b + variance_g)
    if above != 0:
        return float(above / (under + _EPS))
    return 1.0 if under == 0 else 0.0


def weighted_f(blur: NDArray[Any], mask: NDArray[np.bool_], beta_squared: float = 1.0) -> float:
    """Weighted F-measure: errors count by their distance from the truth and their neighbours.

    ``(1 + b^2) P R / (b^2 P + R)`` with ``TP = sum(g) - sum(w g)``, ``R = 1 - mean(w over g)``,
    ``P = TP / (TP + sum(w over not g))``; w is the error, inside the mask no more than its Gaussian
    mean, outside it times ``2 - 0.5^(d / 5)``, d the distance to the mask.

    Margolin, Zelnik-Manor, Tal, How to evaluate foreground maps, CVPR 2014,
    doi:10.1109/CVPR.2014.39 (Gaussian 7 x 7 of sigma 5; beta 1). 0 for a wholly negative mask.
    """
    from scipy import ndimage

    if not mask.any():
        return 0.0
    b = blur.astype(np.float64)
    error = np.abs(b - mask)
    if mask.all():
        importance, moved = np.ones_like(b), error
    else:
        distance, nearest = ndimage.distance_transform_edt(~mask, return_indices=True)
        moved = np.where(mask, error, error[nearest[0], nearest[1]])
        importance = np.where(mask, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    offsets = np.arange(-3, 4)
    window = np.exp(-(offsets**2) / (2 * 5.0**2))
    window /= window.sum()
    smooth = ndimage.correlate1d(moved, window, axis=0, mode="constant")
    smooth = ndimage.correlate1d(smooth, window, axis=1, mode="constant")
    weighted = np.where(mask & (smooth < error), smooth, error) * importance
    n_positive = int(np.count_nonzero(mask))
    missed = float(weighted[mask].sum())
    true = n_positive - missed
    recall = 1 - missed / n_positive
    precision = true / (true + float(weighted[~mask].sum()) + _EPS)
    return (1 + beta_squared) * recall * precision / (recall + beta_squared * precision + _EPS)


def e_measure_curve(counts: LevelCounts) -> Floats:
    """E-measure (enhanced alignment) at every level, ``(256,)``.

    The sum over pixels of ``(1 + 2 x y / (x^2 + y^2))^2 / 4``, divided by their number less one,
    where x and y are the binary map and the mask less their means.

    Fan et al., Enhanced-alignment measure for binary foreground map evaluation, IJCAI 2018,
    doi:10.24963/ijcai.2018/97. For a wholly positive mask the share of pixels predicted so, for a
    wholly negative one the share not.
    """
    n = counts.n_positive + counts.n_negative
    predicted = counts.tp + counts.fp
    if counts.n_positive == 0:
        total = (n - predicted).astype(np.float64)
    elif counts.n_negative == 0:
        total = predicted.astype(np.float64)
    else:
        mean_b, mean_g = predicted / n, counts.n_positive / n
        total = np.zeros(N_LEVELS)
        cells = (
            (counts.tp, 1, 1),
            (counts.fp, 1, 0),
            (counts.n_positive - counts.tp, 0, 1),
            (counts.n_negative - counts.fp, 0, 0),
        )
        for count, b, g in cells:
            db, dg = b - mean_b, g - mean_g
            alignment = 2 * db * dg / (db**2 + dg**2 + _EPS)
            total += count * (alignment + 1) ** 2 / 4
    result: Floats = np.minimum(total / (n - 1 + _EPS), 1.0) if n > 1 else np.minimum(total, 1.0)
    return result


def boundary_f(binary: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    """F-measure of the boundary between the classes, within 2 pixels.

    Precision is the share of the predicted boundary no further than 2 pixels from the true one,
    recall the reverse (Martin, Fowlkes, Malik, PAMI 2004, doi:10.1109/TPAMI.2004.1273918, without
    their one-to-one matching). 1 where neither has a boundary, 0 where one has none.
    """
    from scipy import ndimage

    edges = []
    for region in (binary, mask):
        edge = np.zeros_like(region)
        edge[:, 1:] |= region[:, 1:] != region[:, :-1]
        edge[1:] |= region[1:] != region[:-1]
        edges.append(edge)
    counts = [int(np.count_nonzero(edge)) for edge in edges]
    if 0 in counts:
        return float(counts[0] == counts[1])
    axis = np.arange(-BOUNDARY_TOLERANCE_PX, BOUNDARY_TOLERANCE_PX + 1)
    disc = axis[:, None] ** 2 + axis[None] ** 2 <= BOUNDARY_TOLERANCE_PX**2
    near = [ndimage.binary_dilation(edge, disc) for edge in edges]
    precision = np.count_nonzero(edges[0] & near[1]) / counts[0]
    recall = np.count_nonzero(edges[1] & near[0]) / counts[1]
    return float(2 * precision * recall / max(precision + recall, _EPS))


class CalibrationCounts(NamedTuple):
    """Pixels, sum of the map and positives of the mask in each of 15 equal bins of the map."""

    n: Floats
    map_sum: Floats
    positive: Floats


def calibration_counts(blur: NDArray[Any], mask: NDArray[np.bool_]) -> CalibrationCounts:
    """Sums behind the expected calibration error, to be added up over images."""
    b = blur.ravel().astype(np.float64)
    bins = np.minimum((b * N_CALIBRATION_BINS).astype(np.intp), N_CALIBRATION_BINS - 1)

    def sums(weights: NDArray[Any] | None) -> Floats:
        return np.bincount(bins, weights, N_CALIBRATION_BINS).astype(np.float64)

    return CalibrationCounts(sums(None), sums(b), sums(mask.ravel()))


def expected_calibration_error(counts: CalibrationCounts) -> float:
    """Mean over pixels of ``|mean map - share positive|`` of their bin.

    Guo et al., On calibration of modern neural networks, ICML 2017, arXiv:1706.04599, with the
    probability of the positive class instead of the confidence of the winning one.
    """
    total = counts.n.sum()
    return float(np.abs(counts.map_sum - counts.positive).sum() / total) if total else 0.0
