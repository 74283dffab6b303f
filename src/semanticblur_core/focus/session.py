"""Focus of the planes of one array that may grow while it is looked at."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.config import require_choice
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.check import FocusOptions, ImageFocus, Source, focus_report, judge
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER, MAP_SCORES
from semanticblur_core.focus.stack import TILE_SIZE_PX, FocusCurve, PlaneFocus, StackFocus
from semanticblur_core.inference.planes import QUICK_RANGE_PIXELS, RANGE_PLANES, Channels, Planes

if TYPE_CHECKING:
    from semanticblur_core.inference.map_maker import MapMaker

Heat = Literal["in_focus", "tenengrad"]
Limits = Sequence[tuple[float, float]]
Index = tuple[int, ...]
# A plane in memory is known again by about so many of its pixels.
_PRINT_SIDE_PX = 64


@dataclass(frozen=True)
class PlaneChecked:
    """One plane checked."""

    index: Index
    image: ImageFocus
    n_done: int
    n_total: int


class ArrayFocus:
    """What is known of the planes of an array: scores, verdicts, curves, heat maps.

    Nothing is measured twice: `check` leaves out the planes that are here, whatever the array has
    grown by, and gates are judged anew from the scores. Planes that failed are tried again.

    Parameters
    ----------
    name
        Of the array, for reports.
    path
        File that it came from, if any.

    Attributes
    ----------
    images
        Focus of each plane by its index along `walked_axes`.
    walked_axes, along
        Axes of an index, and the one that focus changes along, see `focus_axis`.
    channels
        As last adopted.
    tile_size_px
        Side of the tiles, as they were measured.
    """

    def __init__(self, name: str, *, path: str | Path | None = None) -> None:
        self.name, self.path = name, None if path is None else Path(path)
        self.images: dict[Index, ImageFocus] = {}
        self.walked_axes = self.along = ""
        self.channels: Channels = "each"
        self.tile_size_px = TILE_SIZE_PX
        self._made_with: Any = None
        self._array: Any = None
        self._lengths: tuple[int, ...] = ()
        self._limits: Limits | None = None
        self._has_limits = False
        self._prints: dict[Index, int] = {}

    def adopt(self, array: Any, axes: str, channels: Channels = "each", *key: Any) -> int:
        """Take an array in place of the last, and forget planes that are no longer those.

        Planes are kept if the new array has the same planes and more along some axis. In memory
        they are compared by a sample of their pixels; of a lazy array, which is not read for this,
        one that is longer is taken to have grown and any other to be another.

        Parameters
        ----------
        array, axes, channels
            See `semanticblur_core.inference.planes.Planes`.
        key
            What else the planes were measured with: other values forget all of them.

        Returns
        -------
        int
            How many planes are kept.

        Raises
        ------
        ImageError
            If axes do not fit.
        """
        planes = Planes(array, axes, channels)
        made_with = (planes.axes, channels, planes.plane_shape, str(array.dtype), key)
        grown = len(planes.lengths) == len(self._lengths) and all(
            new >= old for new, old in zip(planes.lengths, self._lengths, strict=True)
        )
        if made_with != self._made_with or not grown or not self._same_planes(planes):
            self.forget()
        self._made_with, self._lengths, self._array = made_with, planes.lengths, array
        self.walked_axes = planes.walked_axes
        self.along, self.channels = focus_axis(self.walked_axes), channels
        return len(self.images)

    def rename(self, name: str) -> None:
        """Take another name, and give it to the planes that are known."""
        for index, image in self.images.items():
            named = name + image.name.removeprefix(self.name)
            self.images[index] = replace(image, name=named)
        self.name = name

    def forget_planes(self, indices: Iterable[Index]) -> None:
        """Forget some planes, so that they are measured again."""
        for index in indices:
            self.images.pop(index, None)
            self._prints.pop(index, None)

    def forget(self) -> None:
        """Forget all planes, and the range of intensities."""
        self.images.clear()
        self._prints.clear()
        self._limits, self._has_limits = None, False

    def check(
        self,
        array: Any,
        axes: str,
        detector: MapMaker | None,
        options: FocusOptions | None = None,
        *,
        indices: Sequence[Index] | None = None,
        channels: Channels = "each",
    ) -> Generator[PlaneChecked]:
        """Measure planes that are not known yet, one after the other; close it to stop.

        Nothing is taken in but the range of intensities: give each update to `add`. So the planes
        can be measured in one thread and looked at in another.

        Parameters
        ----------
        array, axes, channels
            As given to `adopt`.
        detector, options
            See `semanticblur_core.focus_report`. Tiles are always measured. ``value_range`` is
            estimated at the first check and kept, so that all planes are on one scale.
        indices
            Planes wanted, in this order; all by default.

        Yields
        ------
        PlaneChecked
            After every plane.
        """
        options = options or FocusOptions()
        planes = Planes(array, axes, channels)
        wanted = [
            index
            for index in (planes.indices() if indices is None else indices)
            if not self.is_known(index)
        ]
        if not wanted:
            return
        limits = self._find_limits(planes, wanted, options)
        side = options.tile_size_px
        self.tile_size_px = side if isinstance(side, int) else TILE_SIZE_PX
        options = replace(
            options,
            value_range=unit_range(planes, limits),
            tile_size_px=self.tile_size_px,
            measure=options.measure or "tenengrad",
        )
        sources = plane_sources(planes, wanted, name=self.name, path=self.path, limits=limits)
        with closing(focus_report(sources, detector, options)) as running:
            for index, update in zip(wanted, running, strict=True):
                if isinstance(array, np.ndarray):
                    self._prints[index] = _print(planes, index)
                yield PlaneChecked(index, update.image, update.n_done, update.n_total)

    def add(self, update: PlaneChecked) -> None:
        """Take in a plane."""
        self.images[update.index] = update.image

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the walked axes of the array last adopted."""
        return self._lengths

    def beyond(self, lengths: Sequence[int]) -> list[Index]:
        """Planes not known yet that an array of these lengths did not have."""
        return [
            index
            for index in np.ndindex(self._lengths)
            if index not in self.images
            and any(i >= length for i, length in zip(index, lengths, strict=True))
        ]

    def is_known(self, index: Index) -> bool:
        """Whether a plane was measured; one that could not be read is tried again."""
        return index in self.images and self.images[index].error is None

    def missing(self, planes: Planes) -> list[Index]:
        """Planes that are not known yet."""
        return [index for index in planes.indices() if not self.is_known(index)]

    def judged(self, gates: Iterable[Gate]) -> list[tuple[Index, ImageFocus]]:
        """Planes by index, with the verdict of gates."""
        gates = tuple(gates)
        return [(index, judge(self.images[index], gates)) for index in sorted(self.images)]

    def values(self, score: str) -> list[float]:
        """A score of all planes that have it."""
        _require_score(score)
        return [value for _, value in self._values(score)]

    def stack(self, score: str) -> StackFocus:
        """The planes by one score; where low is sharp its sign is turned.

        Raises
        ------
        ConfigError
            If there is no such score.
        ImageError
            If the array is a single plane.
        """
        _require_score(score)
        result = StackFocus(self.walked_axes, along=self.along)
        sign = 1 if HIGHER_IS_SHARPER[score] else -1
        for index, value in self._values(score):
            tiles = self._tiles(index, "in_focus" if score in MAP_SCORES else "tenengrad")
            result.add(PlaneFocus(index, sign * value, tiles))
        return result

    def curve(self, score: str, at: Index = ()) -> FocusCurve | None:
        """Focus curve of a score at an index along the other axes; None where no plane has it.

        Raises
        ------
        ConfigError
            If there is no such score.
        """
        _require_score(score)
        if not self.walked_axes:
            return None
        stack = self.stack(score)
        if tuple(at) not in stack.series():
            return None
        curve = stack.curve(at)
        if HIGHER_IS_SHARPER[score]:
            return curve
        return replace(curve, scores=tuple(-value for value in curve.scores))

    def heat_map(self, heat: Heat) -> NDArray[np.float32]:
        """Tiles of all planes, walked axes first: float32, NaN where a plane is not known.

        Parameters
        ----------
        heat
            Share of each tile in focus, 0..1, or its mean squared gradient.

        Raises
        ------
        ConfigError
            If there are no such tiles.
        ImageError
            If no plane has them.
        """
        require_choice("heat", heat, Heat)
        known = {
            index: tiles for index in list(self.images) if (tiles := self._tiles(index, heat)).size
        }
        if not known:
            raise ImageError(f"{self.name}: no plane has been checked with a map yet")
        shape = next(iter(known.values())).shape
        heat_map = np.full((*self._lengths, *shape), np.nan, np.float32)
        for index, tiles in known.items():
            heat_map[index] = tiles
        return heat_map

    def _values(self, score: str) -> list[tuple[Index, float]]:
        values = [
            (index, image.scores.to_dict()[score])
            for index, image in list(self.images.items())
            if image.scores is not None
        ]
        return [(index, value) for index, value in values if math.isfinite(value)]

    def _tiles(self, index: Index, heat: Heat) -> NDArray[np.float32]:
        image = self.images[index]
        if heat == "tenengrad" and image.plane is not None:
            return image.plane.tiles
        if heat == "in_focus" and image.tiles is not None:
            return image.tiles
        return np.zeros((0, 0), np.float32)

    def _find_limits(
        self, planes: Planes, wanted: Sequence[Index], options: FocusOptions
    ) -> Limits | None:
        if options.value_range is not None:
            return planes.as_limits(options.value_range)
        kept = self._limits or []
        if not self._has_limits or 0 < len(kept) < planes.n_ranges:  # of channels that are new
            # Of a lazy array no other planes are read than those that are asked for.
            in_memory = isinstance(planes.array, np.ndarray)
            few = None if in_memory or len(wanted) > RANGE_PLANES else wanted
            found = planes.estimate_range(few, most_pixels=QUICK_RANGE_PIXELS) or []
            self._limits, self._has_limits = [*kept, *found[len(kept) :]] or None, True
        return self._limits

    def _same_planes(self, planes: Planes) -> bool:
        if isinstance(planes.array, np.ndarray) and self._prints:
            return all(_print(planes, index) == old for index, old in self._prints.items())
        return planes.array is self._array or planes.lengths != self._lengths


def _require_score(score: str) -> None:
    if score not in HIGHER_IS_SHARPER:
        raise ConfigError(f"score {score!r}: expected one of {', '.join(HIGHER_IS_SHARPER)}")


def focus_axis(walked_axes: str) -> str:
    """The axis that focus is taken to change along: Z, or else the last; none of a single plane."""
    return "Z" if "Z" in walked_axes else walked_axes[-1:]


def plane_sources(
    planes: Planes,
    indices: Iterable[Index],
    *,
    name: str,
    path: str | Path | None = None,
    limits: Limits | None = None,
) -> list[Source]:
    """Planes of an array for `semanticblur_core.focus_report`, read when their turn comes.

    Parameters
    ----------
    planes, indices
        The array, and which of its planes.
    name, path
        Of the array; a plane is ``name[Z=3]``.
    limits
        See `Planes.estimate_range`. Check the planes with `unit_range` of the same.
    """

    def source(index: Index) -> Source:
        places = zip(planes.walked_axes, index, strict=True)
        at = f"[{','.join(f'{axis}={i}' for axis, i in places)}]" if index else ""
        view = planes.view(index)
        return Source(
            f"{name}{at}",
            Path(path or name),
            lambda: view.read_unit(limits=limits, keep_nan=True),
            index,
        )

    return [source(index) for index in indices]


def unit_range(planes: Planes, limits: Limits | None) -> tuple[float, float] | None:
    """``value_range`` for planes that come from `plane_sources`.

    All but plain 8 bits come in 0..1, and must not be stretched plane by plane.
    """
    return None if limits is None and planes.channels != "mean" else (0.0, 1.0)


def _print(planes: Planes, index: Index) -> int:
    step = max(1, math.ceil(max(planes.plane_shape) / _PRINT_SIDE_PX))
    part = slice(None, None, step)
    return zlib.crc32(np.ascontiguousarray(planes.view(index).read(part, part)).tobytes())
