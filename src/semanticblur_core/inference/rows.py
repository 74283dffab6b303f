"""Rows of the map of a stack or a slide: made where they are missing, kept as they are made.

A map that takes long is written in pieces which outlive the process, so that ``--resume`` goes on
where a run was stopped, and several workers can each make a part of one map.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.jobs import DetectOptions, Job
from semanticblur_core.inference.map_maker import MapMaker, iter_readable
from semanticblur_core.inference.planes import DetectUpdate, Planes
from semanticblur_core.inference.results import PlaneResult
from semanticblur_core.inference.tiling import TileGrid
from semanticblur_core.maps import KeepClock, MapFile
from semanticblur_core.version import __version__

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

Limits = list[tuple[float, float]] | None
OnPart = Callable[[int, int], None]

# The least that a worker is given of a map. A row of tiles is computed twice a part.
FEWEST_PLANES = 8
FEWEST_TILE_ROWS = 4
_USUAL_TILE_ROWS = 16
_NAN_ROWS = 256
# What a map depends on. Of a detector not the back end nor its precision: maps differ little by
# them, and machines of one cluster may differ in them.
_OF_OPTIONS = (
    "size", "threshold", "value_range", "channel_ranges", "axes", "channels", "planes", "level",
    "series", "every",
)  # fmt: skip
_OF_DETECTOR = ("name", "identity", "scales", "upsampling", "flip")


def result_key(job: Job, detector: MapMaker, options: DetectOptions, *more: object) -> str:
    """Eight digits that are others for another source, other settings or models, or ``more``.

    Raises
    ------
    OSError
        If the source is not there.
    """
    path = Path(job.source).absolute()
    found = path.stat()
    asked = {name: getattr(options, name) for name in _OF_OPTIONS}
    model = [getattr(detector, name, None) for name in _OF_DETECTOR]
    what = [__version__, str(path), found.st_size, found.st_mtime_ns, asked, model, *more]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of the map of some planes, in ``box``; rows are counted over all of them."""

    planes: Planes
    box: list[range]
    options: DetectOptions

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map: walked axes, then rows and columns."""
        return (*(len(axis) for axis in self.box), *self.planes.plane_shape)

    def key(self, job: Job, detector: MapMaker) -> str:
        """As `result_key`."""
        array, axes = self.planes.array, self.planes.axes
        what = (axes, tuple(array.shape), str(array.dtype), self.box)
        return result_key(job, detector, self.options, *what)

    def limits(self) -> Limits:
        """Intensities that count as black and white, by channel."""
        if self.options.channel_ranges is not None:
            return self.planes.as_limits(self.options.channel_ranges)
        if self.options.value_range is not None:
            return self.planes.as_limits(self.options.value_range)
        return self.planes.estimate_range()

    def divide(self, n_workers: int) -> list[range]:
        """Parts of its rows for several workers; none where it is too small for two."""
        height = self.planes.plane_shape[0]
        n_planes = math.prod(self.shape[:-2])
        n_parts = min(2 * n_workers, n_planes // FEWEST_PLANES)
        if n_parts < n_workers and self._is_native:
            starts = self._grid.row_starts
            n_strips = n_planes * len(starts)
            # Twice as many as workers, to end at one time, where that costs little.
            usual = min(2 * n_workers, max(n_workers, n_strips // _USUAL_TILE_ROWS))
            n_parts = min(usual, n_strips // FEWEST_TILE_ROWS)
            places = [divmod(i * n_strips // n_parts, len(starts)) for i in range(n_parts)]
            ends = [plane * height + starts[strip] for plane, strip in places]
        else:
            ends = [i * n_planes // n_parts * height for i in range(n_parts)]
        parts = [range(*pair) for pair in itertools.pairwise([*ends, n_planes * height])]
        return parts if len(parts) > 1 else []

    def make(
        self,
        maps: MapFile,
        limits: Limits,
        detector: MapMaker,
        *,
        wanted: range | None = None,
        on_part: OnPart | None = None,
    ) -> list[PlaneResult]:
        """Make the rows that are missing; what of the planes cannot be read is NaN.

        At native size that is single tiles, otherwise whole planes.

        Parameters
        ----------
        maps
            Of `shape`.
        limits
            As of `limits`.
        detector
            What finds blur.
        wanted
            Rows to make, which are kept all; None makes all.
        on_part
            Called with how many of the wanted rows are there, and of how many, as they are made.

        Returns
        -------
        list
            What is measured on each plane so far.

        Raises
        ------
        ImageError
            If nothing can be read, or planes are too large to be squashed.
        SemanticBlurError
            If a map is NaN all over.
        """
        n_pixels = math.prod(self.planes.plane_shape)
        if not self._is_native and n_pixels > self.options.max_pixels:
            raise ImageError(
                f"planes of {n_pixels / 1e6:.0f} million pixels are too large to be squashed; "
                "--size=native streams them, --level takes a coarser one of a pyramid, "
                "--max-pixels raises the limit"
            )
        n_wanted = maps.n_rows if wanted is None else len(wanted)
        n_before = n_wanted - sum(map(len, maps.missing(wanted)))

        def on_rows(n_added: int) -> None:
            if on_part is not None:
                on_part(n_before + n_added, n_wanted)

        on_rows(0)
        rows = _Rows(maps, self.options.threshold, on_rows)
        make = self._make_native if self._is_native else self._make_squashed
        for missing in maps.missing(wanted):
            maps.begin(missing.start)
            make(rows, missing, limits, detector)
            rows.end(keep=wanted is not None or rows.is_due)
        measured = self._measured(maps)
        if wanted is None and not any(plane.n_pixels for plane in measured):
            raise ImageError(measured[-1].error)
        return measured

    @property
    def _is_native(self) -> bool:
        return self.options.size == "native"

    @property
    def _grid(self) -> TileGrid:
        return TileGrid(*self.planes.plane_shape)

    @functools.cached_property
    def _indices(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*self.box))

    def _make_native(self, rows: _Rows, missing: range, limits: Limits, detector: MapMaker) -> None:
        # Only the network has a native size: other methods always work at the image's own.
        network = cast("Detector", detector)
        grid, height = self._grid, self.planes.plane_shape[0]
        starts = [*grid.row_starts, height]
        for plane in range(missing.start // height, math.ceil(missing.stop / height)):
            top = max(0, missing.start - plane * height)
            bottom = min(height, missing.stop - plane * height)
            wanted = range(starts.index(top), starts.index(bottom))
            view = self.planes.view(self._indices[plane])
            # In strips, so that a plane is never held whole. Where its first rows are made, that it
            # can be read at all is known.
            read = functools.partial(view.read_unit, limits=limits)
            tiles = _Tiles(read, is_any_read=top > 0)
            n_pixels = n_lost = 0
            try:
                for place, strip in network.iter_strips(tiles.read, grid, wanted=wanted):
                    n_pixels += rows.add(plane, tiles.without_lost(place, strip))
                    if tiles.error is not None and len(tiles.lost) > n_lost:
                        rows.lose(plane, tiles.error, tiles.lost[n_lost:])
                        n_lost = len(tiles.lost)
                    rows.keep_if_due()
            except ImageError as error:
                self._leave_out(rows, plane, bottom - top, error)
            else:
                if not n_pixels and tiles.error is None:  # of the network, not of what is read
                    raise SemanticBlurError("the map that was made has no numbers")

    def _make_squashed(
        self, rows: _Rows, missing: range, limits: Limits, detector: MapMaker
    ) -> None:
        planes, height = self.planes, self.planes.plane_shape[0]
        plane = missing.start // height

        def detect(some: list[tuple[int, ...]]) -> Iterator[DetectUpdate]:
            return detector.iter_planes(
                planes.array, planes.axes, indices=some, channels=planes.channels,
                size=self.options.size, value_range=limits,
            )  # fmt: skip

        def leave_out(index: tuple[int, ...], error: ImageError) -> None:
            nonlocal plane
            self._leave_out(rows, plane, height, error)
            plane += 1

        chosen = self._indices[plane : missing.stop // height]
        for update in iter_readable(detect, chosen, leave_out, need_one=False):
            if not rows.add(plane, update.blur):
                raise SemanticBlurError("the map that was made has no numbers")
            plane += 1
            rows.keep_if_due()

    def _leave_out(self, rows: _Rows, plane: int, n_rows: int, error: ImageError) -> None:
        # An OSError is not the file's contents: a disk, a network.
        if len(self._indices) == 1 or isinstance(error.__cause__, OSError):
            raise error
        rows.leave_out(plane, n_rows, error)

    def _measured(self, maps: MapFile) -> list[PlaneResult]:
        found = [_Note() for _ in self._indices]
        for notes in maps.notes():
            for note in notes:
                found[note["plane"]].add(note)
        n_tiles = len(self._grid) if self._is_native else 0
        return [
            note.result(index, n_tiles) for index, note in zip(self._indices, found, strict=True)
        ]


@dataclass
class _Note:
    """What is known of some rows of a plane's map."""

    plane: int = 0
    n_blurred: int = 0
    total: float = 0.0
    n_pixels: int = 0
    error: str | None = None
    lost: list[list[int]] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        self.n_blurred += other["n_blurred"]
        self.total += other["total"]
        self.n_pixels += other["n_pixels"]
        self.error = self.error or other["error"]
        self.lost += other["lost"]

    def result(self, index: tuple[int, ...], n_tiles: int) -> PlaneResult:
        error = self.error
        if error is not None and self.lost:
            top, bottom, left, right = self.lost[0]
            n_lost = len(set(map(tuple, self.lost)))  # some are met again where a run goes on
            error += (
                f" ({n_lost} of {n_tiles} tiles, the first in rows {top}:{bottom}, columns "
                f"{left}:{right})"
            )
        if not self.n_pixels:
            return PlaneResult(index, error=error)
        n = self.n_pixels
        return PlaneResult(index, self.n_blurred / n, self.total / n, n, error)


class _Rows:
    """Adds rows to a map, notes what is in them, and keeps them now and then."""

    def __init__(self, maps: MapFile, threshold: float, on_rows: Callable[[int], None]) -> None:
        self._maps, self._threshold, self._on_rows = maps, threshold, on_rows
        self._n_added = 0
        self._notes: list[_Note] = []
        self._clock = KeepClock()

    def add(self, plane: int, strip: NDArray[np.float32]) -> int:
        """Add rows of a plane; how many of their pixels have a number."""
        self._append(strip)
        note = self._note(plane)
        n_pixels = strip.size - int(np.count_nonzero(np.isnan(strip)))
        note.n_blurred += int(np.count_nonzero(strip > self._threshold))
        note.total += float(np.nansum(strip, dtype=np.float64))
        note.n_pixels += n_pixels
        return n_pixels

    def lose(self, plane: int, error: ImageError, tiles: list[tuple[slice, slice]]) -> None:
        """Note tiles of the rows just added that cannot be read."""
        note = self._note(plane)
        note.error = str(error)
        note.lost += [[r.start, r.stop, c.start, c.stop] for r, c in tiles]

    def leave_out(self, plane: int, n_rows: int, error: ImageError) -> None:
        """Add rows of NaN."""
        strip = np.full((min(n_rows, _NAN_ROWS), self._maps.shape[-1]), np.nan, np.float32)
        for top in range(0, n_rows, _NAN_ROWS):
            self._append(strip[: n_rows - top])
        self._note(plane).error = str(error)

    @property
    def is_due(self) -> bool:
        """Whether it is time to keep what was added."""
        return self._clock.is_due

    def keep_if_due(self) -> None:
        """Keep what was added, if it took long enough to make."""
        if self.is_due:
            row = self._maps.next_row
            self.end(keep=True)
            self._maps.begin(row)

    def end(self, *, keep: bool) -> None:
        """End a piece of the map."""
        self._maps.end([asdict(note) for note in self._notes], keep=keep)
        self._notes = []
        if keep:
            self._clock.restart()

    def _append(self, strip: NDArray[np.float32]) -> None:
        self._maps.append(strip)
        self._n_added += len(strip)
        self._on_rows(self._n_added)

    def _note(self, plane: int) -> _Note:
        if not self._notes or self._notes[-1].plane != plane:
            self._notes.append(_Note(plane))
        return self._notes[-1]


class _Tiles:
    """Tiles of one plane; those that cannot be read are black, and NaN in the map.

    Whole rows are read once and the tiles of a row cut from them: files are often kept in rows.
    """

    def __init__(
        self, read: Callable[[slice, slice], NDArray[Any]], *, is_any_read: bool = False
    ) -> None:
        self._read = read
        self._rows: slice | None = None
        self._band: NDArray[Any] | None = None
        self._is_any_read = is_any_read
        self.lost: list[tuple[slice, slice]] = []
        self.error: ImageError | None = None

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Pixels of one tile; those of a row come one after the other.

        Raises
        ------
        ImageError
            If it is not the file's contents that are damaged, or no tile of the first row was read.
        """
        if self._rows != rows:
            if self.error is not None and not self._is_any_read:
                raise self.error
            self._rows, self._band = rows, None
            with suppress(ImageError):
                self._band = self._read(rows, slice(None))
        try:
            tile = self._read(rows, columns) if self._band is None else self._band[:, columns]
        except ImageError as error:
            if isinstance(error.__cause__, OSError):
                raise
            self.error = self.error or error
            self.lost.append((rows, columns))
            return np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        self._is_any_read = True
        return tile

    def without_lost(self, rows: slice, strip: NDArray[np.float32]) -> NDArray[np.float32]:
        """Finished rows of the map, NaN where a tile was lost."""
        if not self._is_any_read and self.error is not None:
            raise self.error
        for lost_rows, columns in self.lost:
            start, stop = max(rows.start, lost_rows.start), min(rows.stop, lost_rows.stop)
            if start < stop:
                strip[start - rows.start : stop - rows.start, columns] = np.nan
        return strip
