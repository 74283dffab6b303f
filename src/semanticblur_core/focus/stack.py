"""Focus through a stack: best plane, focus curve, all-in-focus composite, depth and drift.

Planes are looked at one after the other and never held together: `StackFocus` keeps a number a
tile of each, `all_in_focus` a few images whatever the number of planes. Axes go by name, see
`semanticblur_core.inference.planes.Planes`; "along" is the axis that focus changes along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from semanticblur_core import io
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus.classical import as_grey
from semanticblur_core.focus.scores import tile_means
from semanticblur_core.focus.sharpness import tenengrad_map
from semanticblur_core.inference.planes import (
    RANGE_PLANES,
    Channels,
    Planes,
    range_of_samples,
    sampling_step,
)

if TYPE_CHECKING:
    from semanticblur_core.inference.map_maker import MapMaker

TILE_SIZE_PX = 64
MEASURES = ("tenengrad", "laplacian", "network")
# Of the composite: scale of the detail that decides, the window it is summed over, the median that
# takes single wrong pixels out of the depth, and where low frequencies hand over to high ones.
_DETAIL_SIGMA_PX = 1.0
_WINDOW_SIGMA_PX = 6.0
_MEDIAN_PX = 9
_BAND_SIGMA_PX = 4.0
_EDGE_SIGMA_PX = 0.5
# Where the sharpest plane has less than this many times the mean detail of all, depth is unknown.
_CLEAR_PEAK = 1.4


@dataclass(frozen=True)
class PlaneFocus:
    """Focus of one plane: the mean of the measure, and its means over tiles, higher is sharper."""

    index: tuple[int, ...]
    score: float
    tiles: NDArray[np.float32]


@dataclass(frozen=True)
class FocusCurve:
    """Focus along an axis.

    Attributes
    ----------
    positions
        Indices of the planes looked at, rising.
    scores
        One a position, higher is sharper.
    best
        Index of the plane of the highest score, the first of equals.
    peak
        Its place between planes, from a parabola through the logarithms of three scores; at the
        ends of the stack the end, for then the true one may lie beyond.
    """

    positions: tuple[int, ...]
    scores: tuple[float, ...]
    best: int
    peak: float


@dataclass(frozen=True)
class Drift:
    """Movement of best focus in time.

    Attributes
    ----------
    times, peaks
        Index along T, and the peak there in planes.
    planes_per_step
        Slope by Theil and Sen, which a few wrong peaks do not move.
    um_per_step
        The same in micrometres, where the distance of planes is known.
    """

    times: tuple[int, ...]
    peaks: tuple[float, ...]
    planes_per_step: float
    um_per_step: float | None = None


@dataclass(frozen=True)
class StackUpdate:
    """One plane measured."""

    plane: PlaneFocus
    n_done: int
    n_total: int


@dataclass(frozen=True)
class CompositeUpdate:
    """A step of a composite; the last has the pictures.

    Attributes
    ----------
    n_done, n_total
        Planes read; each is read twice.
    composite
        ``(H, W)`` or ``(H, W, 3)`` of the stack's dtype.
    depth
        ``(H, W)`` int16, index of the plane that is sharpest there; int32 above 32767.
    """

    n_done: int
    n_total: int
    composite: NDArray[Any] | None = None
    depth: NDArray[np.signedinteger[Any]] | None = None


class FileStack:
    """Image files as one array, read where it is sliced along the first axis.

    Parameters
    ----------
    paths
        One plane each.
    max_pixels
        Larger files are not read.

    Attributes
    ----------
    shape, dtype, axes
        Of the array: ``ZYX``, or ``ZYXS`` of colour; rows and columns are those of the first file
        that can be read.

    Raises
    ------
    ImageError
        If none can be read.
    """

    def __init__(self, paths: Sequence[str | Path], *, max_pixels: int = io.MAX_PIXELS) -> None:
        self.paths = [Path(path) for path in paths]
        self._max_pixels = max_pixels
        self._first, first = _first_readable(self.paths, max_pixels)
        self.shape = (len(paths), *first.shape)
        self.dtype = first.dtype.newbyteorder("=")
        self.axes = "ZYX" if first.ndim == 2 else "ZYXS"

    def __getitem__(self, key: Any) -> NDArray[Any]:
        z, *rest = key if isinstance(key, tuple) else (key,)
        image = self.read(z)
        if image.shape != self.shape[1:]:
            raise self._unlike(z, image)
        part: NDArray[Any] = image[tuple(rest)]
        return part

    def read(self, z: int) -> NDArray[Any]:
        """One file, of any size but of the stack's type, so that intensities mean the same.

        Raises
        ------
        ImageError
            If it cannot be read or is of another type.
        """
        image = io.read_image(self.paths[z], max_pixels=self._max_pixels)
        if image.dtype.newbyteorder("=") != self.dtype:
            raise self._unlike(z, image)
        return image

    def _unlike(self, z: int, image: NDArray[Any]) -> ImageError:
        return ImageError(
            f"{self.paths[z]}: {image.dtype} {image.shape}, but {self._first.name} is "
            f"{self.dtype} {self.shape[1:]}; planes of one stack must be alike"
        )

    def estimate_range(self) -> tuple[float, float] | None:
        """Limits of all planes together, as `Planes.estimate_range`, whatever their sizes.

        Files that cannot be read are left out.
        """
        if self.dtype in (np.uint8, np.bool_):
            return None
        spread = np.unique(np.linspace(0, len(self.paths) - 1, RANGE_PLANES).round().astype(int))
        samples = []
        for i in dict.fromkeys([*spread, self.paths.index(self._first)]):
            try:
                image = self.read(i)
            except ImageError:  # told where the plane is looked at
                continue
            step = sampling_step(image.size)
            samples.append(image[::step, ::step].ravel())
        [limits] = range_of_samples([np.concatenate(samples)], [0], n_ranges=1, is_mean=False)
        return limits


def _first_readable(paths: Sequence[Path], max_pixels: int) -> tuple[Path, NDArray[Any]]:
    failure: ImageError | None = None
    for path in paths:
        try:
            return path, io.read_image(path, max_pixels=max_pixels)
        except ImageError as error:
            failure = failure or error
    raise failure or ImageError("a stack of no files")


def in_stack_order(paths: Sequence[str | Path]) -> list[Path]:
    """Paths by the numbers in their names; a + or - counts as a sign if any name has a plus."""
    found = [Path(path) for path in paths]
    signed = any(re.search(r"\+\d", path.stem) for path in found)
    pattern = r"([+-]?\d+)" if signed else r"(\d+)"

    def key(path: Path) -> list[tuple[int, int, str]]:
        parts = re.split(pattern, path.stem)
        return [
            (1, int(part), "") if i % 2 else (0, 0, part.lower()) for i, part in enumerate(parts)
        ]

    return sorted(found, key=lambda path: (key(path), path.name))


class StackFocus:
    """Collects the focus of planes, in any order; planes can come while others are still made.

    Parameters
    ----------
    walked_axes
        Letters of a plane's index, see `Planes.walked_axes`.
    along
        The one that focus changes along.

    Attributes
    ----------
    planes
        What was added, by index.

    Raises
    ------
    ImageError
        If ``along`` is not one of the axes.
    """

    def __init__(self, walked_axes: str = "Z", *, along: str = "Z") -> None:
        if along not in walked_axes:
            raise ImageError(
                f"no axis {along} to look along: the planes have {walked_axes or 'no axis'}"
            )
        self.walked_axes = walked_axes
        self.along = along
        self.planes: dict[tuple[int, ...], PlaneFocus] = {}
        self._place = walked_axes.index(along)
        self._limits: list[tuple[float, float]] | None = None
        self._has_limits = False

    def add(self, plane: PlaneFocus) -> None:
        """Take in a plane; one of the same index is replaced."""
        if len(plane.index) != len(self.walked_axes):
            raise ImageError(f"plane {plane.index}: expected an index along {self.walked_axes}")
        self.planes[plane.index] = plane

    def series(self) -> list[tuple[int, ...]]:
        """Indices along the other axes that have planes, such as times and channels."""
        return sorted({self.others(index) for index in self.planes})

    def curve(self, at: tuple[int, ...] = ()) -> FocusCurve:
        """Focus curve at an index along the other axes.

        Raises
        ------
        ImageError
            If no plane there was added.
        """
        planes = self._along(at)
        positions = tuple(plane.index[self._place] for plane in planes)
        scores = tuple(plane.score for plane in planes)
        best, peak = _peak(positions, np.array(scores))
        return FocusCurve(positions, scores, best, peak)

    def best_tiles(self, at: tuple[int, ...] = ()) -> NDArray[np.intp]:
        """Index of the sharpest plane in each tile, ``(rows, columns)``.

        Raises
        ------
        ImageError
            If no plane there was added, or planes are of different sizes.
        """
        planes = self._along(at)
        shapes = {plane.tiles.shape for plane in planes}
        if len(shapes) > 1:
            raise ImageError("planes of different sizes have no tiles in common")
        positions = np.array([plane.index[self._place] for plane in planes], np.intp)
        best: NDArray[np.intp] = positions[np.stack([p.tiles for p in planes]).argmax(axis=0)]
        return best

    def drift(
        self, *, time: str = "T", at: tuple[int, ...] = (), step_um: float | None = None
    ) -> Drift:
        """Movement of the peak along an axis of time.

        Parameters
        ----------
        time
            Letter of that axis.
        at
            Index along the axes that are neither time nor `along`.
        step_um
            Distance of planes in micrometres.

        Raises
        ------
        ImageError
            If there is no such axis, or fewer than two times were added.
        """
        others = self.walked_axes.replace(self.along, "")
        if time not in others:
            raise ImageError(f"no axis {time} to look for drift along: {self.walked_axes}")
        place = others.index(time)
        chosen = [s for s in self.series() if s[:place] + s[place + 1 :] == tuple(at)]
        if len(chosen) < 2:
            raise ImageError(f"drift needs two times at least, got {len(chosen)}")
        times = tuple(one[place] for one in chosen)
        peaks = tuple(self.curve(one).peak for one in chosen)
        slope = float(stats.theilslopes(peaks, times).slope)
        return Drift(times, peaks, slope, None if step_um is None else slope * step_um)

    def others(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """A plane's index along the other axes."""
        return index[: self._place] + index[self._place + 1 :]

    def _keep_limits(self, planes: Planes, value_range: Any) -> list[tuple[float, float]] | None:
        """Intensities that become 0 and 1: after the first call those of the first call."""
        kept = self._limits or []
        if value_range is not None:
            given = planes.as_limits(value_range)
            is_other = not kept or given[: len(kept)] != kept
            if self._has_limits and self.planes and is_other:
                raise ImageError(
                    f"value_range {value_range}: the other planes were measured with "
                    f"{kept or 'that of their type'}; leave it out, or take a new StackFocus"
                )
            kept = given
        elif len(kept) < planes.n_ranges:  # before the first, or of channels that are new
            kept = [*kept, *(planes.estimate_range() or [])[len(kept) :]]
        self._limits, self._has_limits = kept or None, True
        return self._limits

    def _along(self, at: tuple[int, ...]) -> list[PlaneFocus]:
        chosen = [plane for index, plane in self.planes.items() if self.others(index) == tuple(at)]
        if not chosen:
            raise ImageError(f"no plane at {tuple(at)}")
        return sorted(chosen, key=lambda plane: plane.index[self._place])


def focus_measure(
    measure: str = "tenengrad",
    *,
    detector: MapMaker | None = None,
    blur: NDArray[np.float32] | None = None,
) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """Function from a plane to its sharpness at each pixel, ``(H, W)`` float32, higher is sharper.

    Parameters
    ----------
    measure
        ``tenengrad`` or ``laplacian`` (squares of the Sobel gradient and of the Laplacian; fine
        for planes of one stack), or ``network``: 1 - blur map of a detector. They take planes of
        uint8 or bool, or of floats in 0..1, where NaN may be among them.
    detector
        For ``network``: `semanticblur_core.Detector` or a hand-crafted method.
    blur
        For ``network``, the plane's blur map where it is there already.

    Raises
    ------
    ConfigError
        If there is no such measure, or no detector for it.
    ImageError
        From the function, if a plane is of another type or range.
    """
    if measure == "network" and blur is not None:
        known = blur
        return lambda _: 1 - known
    if measure == "network":
        if detector is None:
            raise ConfigError("measure network: needs a detector")
        maker = detector

        def sharpness(plane: NDArray[Any]) -> NDArray[np.float32]:
            _require_unit(plane)
            # Planes of floats are in the unit range already and must not be stretched again.
            limits = None if plane.dtype == np.uint8 else (0.0, 1.0)
            return 1 - maker.detect(plane, size=320, value_range=limits)

        return sharpness
    if measure == "tenengrad":
        return lambda plane: tenengrad_map(_unit_grey(plane))
    if measure == "laplacian":
        return lambda plane: np.square(ndimage.laplace(_unit_grey(plane), mode="nearest"))
    raise ConfigError(f"measure {measure!r}: expected one of {', '.join(MEASURES)}")


def _unit_grey(plane: NDArray[Any]) -> NDArray[np.float32]:
    _require_unit(plane)
    return as_grey(plane)


def _require_unit(plane: NDArray[Any]) -> None:
    """Refuse what is not in 0..1, nor of a type with a range of its own: it would look flat."""
    if plane.dtype in (np.uint8, np.bool_):
        return
    if plane.dtype.kind != "f":
        found = str(plane.dtype)
    elif ((plane < -io.ROUNDING) | (plane > 1 + io.ROUNDING)).any():  # NaN is neither
        found = f"{plane.dtype} of {np.nanmin(plane):g}..{np.nanmax(plane):g}"
    else:
        return
    raise ImageError(
        f"plane: expected uint8, bool or floats in 0..1, got {found}; `io.to_unit_range` makes "
        "these, with the same limits for all planes of a stack"
    )


def plane_focus(
    index: tuple[int, ...],
    plane: NDArray[Any],
    measure: Callable[[NDArray[Any]], NDArray[np.float32]],
    *,
    tile_size_px: int = TILE_SIZE_PX,
) -> PlaneFocus:
    """Focus of one plane.

    Parameters
    ----------
    index
        Along the walked axes, see `StackFocus`.
    plane
        ``(H, W)`` or ``(H, W, 3)``, uint8 or bool, or floats in 0..1: other intensities are brought
        there first, by the same limits for all planes of a stack.
    measure
        See `focus_measure`.
    tile_size_px
        Side of the tiles.

    Raises
    ------
    ImageError
        If the plane is of another type or range.
    """
    sharpness = measure(plane)
    return PlaneFocus(
        index, float(sharpness.mean(dtype=np.float64)), tile_means(sharpness, tile_size_px)
    )


def iter_focus(
    array: Any,
    axes: str,
    result: StackFocus,
    *,
    measure: Callable[[NDArray[Any]], NDArray[np.float32]] | None = None,
    tile_size_px: int = TILE_SIZE_PX,
    channels: Channels = "each",
    value_range: Any = None,
) -> Generator[StackUpdate]:
    """Measure the planes of an array that ``result`` does not have yet; close it to stop.

    Call it again with the same result when the stack has grown: only the new planes are read, and
    measured on the scale of the first call, which the result keeps.

    Parameters
    ----------
    array, axes, channels
        See `semanticblur_core.inference.planes.Planes`: numpy, dask, zarr; read plane by plane.
    result
        Takes in each plane; its axes are `Planes.walked_axes`.
    measure
        See `focus_measure`; Tenengrad by default.
    tile_size_px
        Side of the tiles.
    value_range
        Intensities that become 0 and 1, LOW and HIGH or a pair a channel. By default those of the
        first call with this result; and of that, unless the type is 8-bit, percentiles of planes
        spread over what is there of the stack. What is brighter later counts as 1: give the range
        of the camera where the first planes do not tell it.

    Yields
    ------
    StackUpdate
        After every plane.

    Raises
    ------
    ImageError
        If axes do not fit, or the ``value_range`` is not that which planes were measured with.
    """
    planes = Planes(array, axes, channels)
    if planes.walked_axes != result.walked_axes:
        raise ImageError(f"axes {planes.walked_axes}: the result has {result.walked_axes}")
    measure = measure or focus_measure()
    wanted = [index for index in planes.indices() if index not in result.planes]
    if not wanted:
        return
    limits = result._keep_limits(planes, value_range)
    for n_done, index in enumerate(wanted, start=1):
        pixels = planes.view(index).read_unit(limits=limits)
        plane = plane_focus(index, pixels, measure, tile_size_px=tile_size_px)
        result.add(plane)
        yield StackUpdate(plane, n_done, len(wanted))


def all_in_focus(
    array: Any,
    axes: str,
    *,
    along: str = "Z",
    at: tuple[int, ...] = (),
    channels: Channels = "each",
    positions: Sequence[int] | None = None,
) -> Generator[CompositeUpdate]:
    """All-in-focus composite and depth of one stack; close the generator to stop.

    Where detail is finest, the depth is that plane. Where no plane stands out, the depth is that of
    the surroundings; a median takes out single wrong pixels. The composite has the detail of the
    plane at each place, on low frequencies that change smoothly from plane to plane (two bands of
    Burt and Adelson's spline), so that no seam shows where depth jumps. The planes must be aligned.
    NaN and infinite pixels count as the plane's lowest and are never the sharpest; where no plane
    has a number, a composite of floats is NaN.

    Parameters
    ----------
    array, axes, channels
        See `semanticblur_core.inference.planes.Planes`; ``"mean"`` is the mean of the channels'
        own values. Each plane is read twice.
    along
        Axis of focus.
    at
        Index along the other axes.
    positions
        Planes along `along` to take, rising; all by default.

    Yields
    ------
    CompositeUpdate
        After every plane; the last has the results.

    Raises
    ------
    ImageError
        If axes do not fit.

    References
    ----------
    Burt and Adelson, ACM Transactions on Graphics 2 (1983), doi:10.1145/245.247.
    """
    planes = Planes(array, axes, channels)
    if along not in planes.walked_axes:
        raise ImageError(f"no axis {along} to look along: the planes have {planes.walked_axes}")
    place = planes.walked_axes.index(along)
    if len(at) != len(planes.lengths) - 1:
        raise ImageError(
            f"expected an index along {planes.walked_axes.replace(along, '') or 'no axis'}, "
            f"got {at}"
        )
    taken = range(planes.lengths[place]) if positions is None else positions
    n_planes = len(taken)
    last = planes.lengths[place] - 1
    if not n_planes or any(b <= a for a, b in pairwise((-1, *taken, last + 1))):
        raise ImageError(
            f"positions: expected rising indices along {along}, from 0 to {last}, got {list(taken)}"
        )

    lost = np.ones(planes.plane_shape, bool)
    # float32 holds whole numbers up to 2^24 only.
    kind: Any = np.float32 if np.can_cast(planes.array.dtype, np.float32) else np.float64
    # Detail is measured in float32 always; what is beyond it counts as infinite.
    largest = np.finfo(np.float32).max

    def read() -> Iterator[tuple[int, NDArray[Any], NDArray[np.bool_]]]:
        for z in taken:
            pixels = planes.view((*at[:place], z, *at[place:])).read()
            if channels == "mean":
                pixels = pixels.mean(axis=0)
            pixels = pixels.astype(kind)
            finite: Any = (pixels >= -largest) & (pixels <= largest)
            if not finite.all():
                # Filters would spread them; they count as the lowest value.
                pixels[~finite] = pixels[finite].min() if finite.any() else 0
            yield z, pixels, finite if finite.ndim == 2 else finite.all(axis=2)

    n_done = 0
    best = np.full(planes.plane_shape, -1, np.float32)
    total = np.zeros(planes.plane_shape, np.float32)
    fits = taken[-1] <= np.iinfo(np.int16).max
    depth = np.full(planes.plane_shape, taken[0], np.int16 if fits else np.int32)
    for z, pixels, finite in read():
        lost &= ~finite
        detail = np.abs(ndimage.gaussian_laplace(as_grey(pixels), _DETAIL_SIGMA_PX, mode="nearest"))
        detail = ndimage.gaussian_filter(detail, _WINDOW_SIGMA_PX, mode="nearest")
        sharper = (detail > best) & finite
        depth[sharper] = z
        best[sharper] = detail[sharper]
        total += detail
        n_done += 1
        yield CompositeUpdate(n_done, 2 * n_planes)
    depth = _consistent(depth, best > _CLEAR_PEAK * total / n_planes)

    low = high = np.zeros(0, kind)
    low_weights, high_weights = np.zeros((2, *planes.plane_shape), np.float32)
    for z, pixels, _ in read():
        if z == taken[0]:
            low, high = np.zeros((2, *pixels.shape), kind)
        here = (depth == z).astype(np.float32)
        if here.any():
            sigmas = (_BAND_SIGMA_PX, _BAND_SIGMA_PX, 0)[: pixels.ndim]
            smooth = ndimage.gaussian_filter(pixels, sigmas, mode="nearest")
            wide = ndimage.gaussian_filter(here, _BAND_SIGMA_PX, mode="nearest")
            narrow = ndimage.gaussian_filter(here, _EDGE_SIGMA_PX, mode="nearest")
            low += _like(wide, pixels) * smooth
            high += _like(narrow, pixels) * (pixels - smooth)
            low_weights += wide
            high_weights += narrow
        n_done += 1
        if z != taken[-1]:
            yield CompositeUpdate(n_done, 2 * n_planes)
    low /= _like(low_weights, low)
    low += high / _like(high_weights, high)
    if np.issubdtype(planes.array.dtype, np.floating):
        low[lost] = np.nan
    yield CompositeUpdate(n_done, 2 * n_planes, _as_type(low, planes.array.dtype), depth)


def _consistent(
    depth: NDArray[np.signedinteger[Any]], clear: NDArray[np.bool_]
) -> NDArray[np.signedinteger[Any]]:
    """Depth of the nearest clear place where it is unclear, without single wrong pixels."""
    if clear.any():
        nearest = ndimage.distance_transform_edt(
            ~clear, return_distances=False, return_indices=True
        )
        depth = depth[tuple(nearest)]
    else:
        depth = np.full_like(depth, np.bincount(depth.ravel()).argmax())
    filtered: NDArray[np.signedinteger[Any]] = ndimage.median_filter(
        depth, _MEDIAN_PX, mode="nearest"
    )
    return filtered


def _peak(positions: tuple[int, ...], scores: NDArray[np.float64]) -> tuple[int, float]:
    """Position of the highest score, and of the vertex of the parabola through its neighbours."""
    i = int(np.nanargmax(scores)) if np.isfinite(scores).any() else 0
    best = positions[i]
    if not 0 < i < len(scores) - 1:
        return best, float(best)
    below, top, above = scores[i - 1 : i + 2]
    if below > 0 and above > 0:
        below, top, above = np.log([below, top, above])
    # Unequal steps, where planes are missing, need the general form.
    left, right = best - positions[i - 1], positions[i + 1] - best
    curvature = (top - below) / left + (top - above) / right
    if not curvature > 0:
        return best, float(best)
    slopes = (top - below) / left * right - (top - above) / right * left
    return best, best + float(slopes / curvature) / 2


def _like(weights: NDArray[np.float32], pixels: NDArray[Any]) -> NDArray[np.float32]:
    return weights if pixels.ndim == 2 else weights[..., None]


def _as_type(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Rounded to integers where those are wanted, and cut off where the type ends."""
    wide = values.astype(np.float64)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        # The largest of 64 bits is none of the doubles.
        top = float(limits.max)
        top = top if int(top) <= limits.max else math.nextafter(top, 0)
        wide = np.rint(wide).clip(limits.min, top)
    elif np.issubdtype(dtype, np.floating):
        wide = wide.clip(float(np.finfo(dtype).min), float(np.finfo(dtype).max))
    return wide.astype(dtype)
