"""Arrays of any number of axes, walked plane by plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.errors import ImageError
from semanticblur_core.scale import Channels as Channels

Region = tuple[slice, slice]
ALL: Region = (slice(None), slice(None))

# What an estimate of the intensity range reads at most.
RANGE_PLANES = 16
RANGE_SAMPLES_PER_PLANE = 250_000
# Of planes in chunks: pieces of a plane, of whole chunks that have about that side at least; in all
# about so many pixels, or so many pieces where they are large. Reading them takes a second or two,
# the network minutes; where somebody waits for a first tile, a sixteenth of it has to do.
RANGE_PIXELS = 2**28
QUICK_RANGE_PIXELS = 2**24
RANGE_PIECES = 16
RANGE_PIECE_PX = 256
# What the images or planes of one batch hold at most, so that large ones do not fill the memory.
BATCH_PIXELS = 32_000_000


@dataclass(frozen=True)
class DetectUpdate:
    """State of a detection after a tile, or after a plane that is analysed in one piece.

    Attributes
    ----------
    index
        Index of the plane along the walked axes.
    n_done, n_total
        Pieces done of all planes asked for.
    blur
        ``(H, W)`` float32 in 0..1, 1 = out of focus: the map of the plane where it is finished.
        The array is written to until `plane_done`.
    finished
        ``(H, W)`` bool: elsewhere tiles are still to come.
    region
        Rows and columns in which something has just been finished.
    plane_done
        Whether the map of this plane is finished.
    """

    index: tuple[int, ...]
    n_done: int
    n_total: int
    blur: NDArray[np.float32]
    finished: NDArray[np.bool_]
    region: Region
    plane_done: bool


@dataclass(frozen=True)
class Planes:
    """An array seen as a sequence of grey or RGB planes.

    Parameters
    ----------
    array
        Anything with ``shape``, ``dtype`` and slicing: numpy, dask, zarr, a memory map. Nothing is
        read until a plane is asked for, and then only that plane.
    axes
        One capital letter an axis. ``Y`` and ``X`` once each; ``S`` are the samples of RGB (3 or 4
        of them, the fourth is dropped), ``C`` are channels; any other letter is walked.
    channels
        What happens along ``C``: ``"each"`` walks it like any other axis, a number picks one
        channel, ``"mean"`` takes the mean of the channels, each brought to 0..1 before.

    Raises
    ------
    ImageError
        If axes and array do not fit.

    Examples
    --------
    >>> planes = Planes(np.zeros((5, 2, 64, 64), np.uint16), "ZCYX", channels=1)
    >>> planes.walked_axes, planes.lengths, len(planes)
    ('Z', (5,), 5)
    """

    array: Any
    axes: str
    channels: Channels = "each"

    def __post_init__(self) -> None:
        if not (hasattr(self.array, "shape") and hasattr(self.array, "dtype")):
            raise ImageError(f"expected an array, got {type(self.array).__name__}")
        if any(kind.__module__.partition(".")[0] == "torch" for kind in type(self.array).__mro__):
            try:
                object.__setattr__(self, "array", np.asarray(self.array))
            except (TypeError, RuntimeError) as error:  # on a GPU, or with gradients
                reason = str(error).splitlines()[0]
                raise ImageError(f"expected an array, got a tensor: {reason}") from error
        shape, axes = tuple(self.array.shape), self.axes
        if not isinstance(axes, str):
            raise ImageError(f"axes {axes!r}: expected a letter for each axis of {shape}")
        if np.dtype(self.array.dtype).kind not in "buif":
            raise ImageError(f"expected real numbers, got {self.array.dtype}")
        channels: Any = self.channels
        if isinstance(channels, np.integer):
            channels = int(channels)
            object.__setattr__(self, "channels", channels)
        if channels not in ("each", "mean") and type(channels) is not int:
            raise ImageError(f"channels={channels!r}: expected 'each', 'mean' or a number from 0")
        if len(axes) != len(shape) or len(set(axes)) != len(axes):
            raise ImageError(f"axes {axes!r}: expected {len(shape)} different letters for {shape}")
        if not {"Y", "X"} <= set(axes):
            raise ImageError(f"axes {axes!r}: expected Y and X, in capitals, among them")
        if 0 in shape:
            raise ImageError(f"the image has no pixels, shape {shape}")
        if "S" in axes and shape[axes.index("S")] not in (3, 4):
            raise ImageError(f"axes {axes!r}: expected 3 or 4 samples along S, shape {shape}")
        if self.channels != "each":
            if "C" not in axes:
                raise ImageError(f"channels={self.channels}: axes {axes!r} name no channels (C)")
            count = shape[axes.index("C")]
            if self.channels != "mean" and not 0 <= self.channels < count:
                raise ImageError(f"channels={self.channels}: expected 0 to {count - 1}")
        if self.channels == "mean" and "S" in axes:
            raise ImageError(f"axes {axes!r}: RGB has no channels to take the mean of")

    @property
    def walked_axes(self) -> str:
        """Axes that a plane has an index along, in the array's order."""
        inside = "YXS" if self.channels == "each" else "YXSC"
        return "".join(axis for axis in self.axes if axis not in inside)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the walked axes."""
        return tuple(self.array.shape[self.axes.index(axis)] for axis in self.walked_axes)

    def box(self, wanted: Sequence[slice] | None) -> list[range]:
        """Indices along each walked axis that are chosen.

        Parameters
        ----------
        wanted
            A slice for each axis, for the last ones where there are fewer; None takes all, and so
            do slices of everything where there are more of them.

        Raises
        ------
        ImageError
            If a slice is of no axis or names no plane.
        """
        chosen = tuple(wanted or ())
        while len(chosen) > len(self.lengths) and takes_all(chosen[:1]):
            chosen = chosen[1:]
        if len(chosen) > len(self.lengths):
            raise ImageError(
                f"planes: {len(chosen)} ranges for {len(self.lengths)} axes "
                f"({self.walked_axes or 'none'})"
            )
        slices = [slice(None)] * (len(self.lengths) - len(chosen)) + list(chosen)
        box = [range(length)[part] for length, part in zip(self.lengths, slices, strict=True)]
        for axis, indices, length in zip(self.walked_axes, box, self.lengths, strict=True):
            if not len(indices):
                raise ImageError(
                    f"planes: none is chosen along {axis}, which has {length}, counted from 0; the "
                    f"ranges are of {self.walked_axes}, of the last ones where there are fewer"
                )
        return box

    @property
    def plane_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        shape = self.array.shape
        return shape[self.axes.index("Y")], shape[self.axes.index("X")]

    def __len__(self) -> int:
        return math.prod(self.lengths)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Every index along the walked axes, the last axis fastest."""
        return itertools.product(*(range(length) for length in self.lengths))

    def view(self, index: Sequence[int]) -> PlaneView:
        """One plane, not read yet."""
        if len(index) != len(self.lengths) or any(
            not 0 <= i < length for i, length in zip(index, self.lengths, strict=True)
        ):
            raise ImageError(
                f"plane {tuple(index)}: expected an index within {self.lengths} along "
                f"{self.walked_axes or 'no axis'}"
            )
        return PlaneView(self, tuple(index))

    def as_limits(
        self, value_range: tuple[float, float] | Sequence[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        """A range, or one a channel, in the form that `PlaneView.read_unit` takes.

        Raises
        ------
        ImageError
            If there are more or fewer than channels, or they are none.
        """
        try:
            pairs = np.asarray(value_range, dtype=np.float64)
        except (TypeError, ValueError):
            pairs = np.empty(0)
        if pairs.shape == (2,):
            pairs = np.tile(pairs, (self.n_ranges, 1))
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ImageError(f"range {value_range}: expected LOW and HIGH, or a pair a channel")
        if len(pairs) != self.n_ranges:
            raise ImageError(f"expected {self.n_ranges} intensity ranges, got {len(pairs)}")
        return [(low, high) for low, high in pairs.tolist()]

    @property
    def n_ranges(self) -> int:
        """Ranges of intensity: one a channel unless a single one is picked."""
        if "C" not in self.axes or isinstance(self.channels, int):
            return 1
        return int(self.array.shape[self.axes.index("C")])

    def channel(self, index: Sequence[int]) -> int:
        """Which of the ranges is that of a plane."""
        place = self.walked_axes.find("C")
        return 0 if place < 0 else index[place]

    def estimate_range(
        self,
        indices: Sequence[Sequence[int]] | None = None,
        *,
        most_pixels: int = RANGE_PIXELS,
    ) -> list[tuple[float, float]] | None:
        """0.1 and 99.9 percentiles of the intensities, from some pixels of some planes.

        Parameters
        ----------
        indices
            Planes to read; by default at most 16 of each channel, spread over the whole array.
        most_pixels
            Of an array in chunks about so many are read, see `iter_range`.

        Returns
        -------
        list of (low, high), or None
            One pair, or one a channel: what channels show differs, and so does how bright it is.
            A channel of which no plane is read gets the pair of all. None for 8-bit and bool,
            which have a range of their own.
        """
        estimate = self.iter_range(indices, most_pixels=most_pixels)
        while True:
            try:
                next(estimate)
            except StopIteration as end:
                limits: list[tuple[float, float]] | None = end.value
                return limits

    def iter_range(
        self,
        indices: Sequence[Sequence[int]] | None = None,
        *,
        most_pixels: int = RANGE_PIXELS,
    ) -> Generator[int, None, list[tuple[float, float]] | None]:
        """`estimate_range` that can be closed before each of the pieces that it reads.

        An array in chunks (dask, Zarr) is read in pieces of whole chunks, and of planes of more
        than 16 such pieces some are read, spread over the plane, of about ``most_pixels`` in all.

        Yields
        ------
        int
            How many planes have been read.
        """
        if self.array.dtype in (np.uint8, np.bool_):
            return None
        spread, step = self.range_samples()
        chosen = spread if indices is None else indices
        if not len(chosen):
            raise ImageError("no planes to take the range of intensities from")
        some, others = self._range_pieces(step, len(chosen), most_pixels)
        samples, sampled, failure = [], [], None
        for n_read, index in enumerate(chosen):
            pixels = []
            for rows, columns in some:
                yield n_read
                try:
                    pixels.append(self._flat(self.view(index).read(rows, columns)))
                except ImageError as error:
                    # What cannot be read is reported where it is asked for, and spoils no other.
                    failure = error
            if pixels:
                samples.append(np.concatenate(pixels, axis=-1))
                sampled.append(index)
        yield len(chosen)
        if not any(np.isfinite(sample).any() for sample in samples):
            more: Iterator[tuple[Sequence[int], Region]]
            more = itertools.product(sampled or chosen, others)
            if indices is None and not samples:  # any other plane is better than none
                left = (index for index in self.indices() if index not in chosen)
                more = itertools.chain(more, itertools.product(left, some))
            for index, (rows, columns) in more:
                yield len(chosen)
                try:
                    sample = self._flat(self.view(index).read(rows, columns))
                except ImageError as error:
                    failure = error
                    continue
                if np.isfinite(sample).any():
                    samples, sampled = [sample], [index]
                    break
        if failure is not None and not samples:
            raise failure
        channels = [self.channel(index) for index in sampled]
        return range_of_samples(
            samples, channels, n_ranges=self.n_ranges, is_mean=self.channels == "mean"
        )

    def _flat(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Pixels in a row, of each channel where their mean is taken."""
        return pixels.reshape(len(pixels), -1) if self.channels == "mean" else pixels.ravel()

    def _range_pieces(
        self, step: int, n_planes: int, most_pixels: int
    ) -> tuple[list[Region], list[Region]]:
        """Pieces of a plane that an estimate of the range reads, and those that it leaves out."""
        chunks = getattr(self.array, "chunks", None)
        if not chunks:
            part = slice(None, None, step)
            return [(part, part)], []
        sides = []
        for axis in "YX":
            side = int(np.max(chunks[self.axes.index(axis)]))
            sides.append(side * math.ceil(RANGE_PIECE_PX / side))
        rows, columns = map(_pieces, self.plane_shape, sides, (step, step))
        axis = "C" if self.channels == "mean" else "S"  # of which a piece holds all
        n_values = self.array.shape[self.axes.index(axis)] if axis in self.axes else 1
        n = most_pixels // (math.prod(sides) * n_planes * n_values)
        n = max(4, RANGE_PIECES // n_planes, n)
        if len(rows) * len(columns) <= max(n, RANGE_PIECES):
            return list(itertools.product(rows, columns)), []
        step = sampling_step(n * math.prod(sides))
        rows, columns = map(_pieces, self.plane_shape, sides, (step, step))
        # Even over the rows, and over the columns by steps of the golden ratio.
        places = [
            (int((i + 0.5) / n * len(rows)), int(i * 0.618034 % 1 * len(columns))) for i in range(n)
        ]
        some = dict.fromkeys(places)
        others = (at for at in np.ndindex(len(rows), len(columns)) if at not in some)
        first, rest = ([(rows[i], columns[j]) for i, j in each] for each in (some, others))
        return first, rest

    def range_samples(self) -> tuple[list[tuple[int, ...]], int]:
        """Planes that an estimate of the range reads, and the step between rows and columns."""
        place = self.walked_axes.find("C")
        lengths = [n for axis, n in enumerate(self.lengths) if axis != place]
        spread = np.unique(np.linspace(0, math.prod(lengths) - 1, RANGE_PLANES).round().astype(int))
        places = np.stack(np.unravel_index(spread, lengths or (1,)), axis=-1)
        indices = [tuple(place) if lengths else () for place in places.tolist()]
        if place >= 0:
            indices = [
                (*index[:place], channel, *index[place:])
                for channel in range(self.n_ranges)
                for index in indices
            ]
        height, width = self.plane_shape
        return indices, sampling_step(height * width)


def takes_all(wanted: Sequence[slice] | None) -> bool:
    """Whether these slices of planes are of all planes, whatever they are of."""
    return all(part in (slice(None), slice(0, None)) for part in wanted or ())


def why_unreadable(axes: str, index: Sequence[int], error: Exception) -> str:
    """For people: ``plane T=0, Z=3: cannot be read: reason``; of what has one plane, without it."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    at = ", ".join(f"{axis}={i}" for axis, i in zip(axes, index, strict=True))
    return f"plane {at}: cannot be read: {reason}" if at else f"cannot be read: {reason}"


@dataclass(frozen=True)
class PlaneView:
    """One plane of `Planes`: ``(H, W)``, ``(H, W, 3)``, or ``(C, H, W)`` where a mean is taken."""

    planes: Planes
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.planes.plane_shape

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[Any]:
        """Pixels as they are stored, channels first where their mean is taken.

        Raises
        ------
        ImageError
            If the array fails to give them.
        """
        planes = self.planes
        walked = dict(zip(planes.walked_axes, self.index, strict=True))
        inside: dict[str, Any] = {"Y": rows, "X": columns}
        if isinstance(planes.channels, int):
            inside["C"] = planes.channels
        key = tuple(walked.get(axis, inside.get(axis, slice(None))) for axis in planes.axes)
        try:
            part = planes.array[key]
            # Of dask arrays numpy would drop the mask.
            pixels = io.unmasked(part.compute() if hasattr(part, "compute") else part)
        except MemoryError:
            raise
        except Exception as error:  # whatever reads lazily: codecs, networks, a user's function
            raise ImageError(why_unreadable(planes.walked_axes, self.index, error)) from error
        left = [
            axis
            for axis, part in zip(planes.axes, key, strict=True)
            if not isinstance(part, int | np.integer)
        ]
        wanted = [axis for axis in "CYXS" if axis in left]
        pixels = pixels.transpose([left.index(axis) for axis in wanted])
        return pixels[..., :3] if "S" in wanted else pixels

    def read_unit(
        self,
        rows: slice = slice(None),
        columns: slice = slice(None),
        *,
        limits: Sequence[tuple[float, float]] | None,
        keep_nan: bool = False,
    ) -> NDArray[Any]:
        """Pixels as ``(h, w)`` or ``(h, w, 3)``, uint8 as stored, or float32 in 0..1.

        With ``keep_nan`` those without a value are NaN, otherwise black.
        """
        return self.to_unit(self.read(rows, columns), limits=limits, keep_nan=keep_nan)

    def finite(self, pixels: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Which pixels of what `read` gave have values, ``(h, w)``; None where all have."""
        return io.finite_pixels(pixels, channel_axis=0 if self.planes.channels == "mean" else -1)

    def to_unit(
        self,
        pixels: NDArray[Any],
        *,
        limits: Sequence[tuple[float, float]] | None,
        keep_nan: bool = False,
    ) -> NDArray[Any]:
        """What `read_unit` gives, of what `read` gave."""
        unit = self._in_range(pixels, limits)
        if keep_nan and (known := self.finite(pixels)) is not None:
            unit[~known] = np.nan
        return unit

    def _in_range(
        self, pixels: NDArray[Any], limits: Sequence[tuple[float, float]] | None
    ) -> NDArray[Any]:
        if self.planes.channels != "mean":
            own = limits[self.planes.channel(self.index)] if limits else None
            return io.to_unit_range(pixels, limits=own)
        each = [
            io.to_unit_range(channel, limits=limits[i] if limits else None)
            for i, channel in enumerate(pixels)
        ]
        mean: NDArray[np.float32] = np.asarray(np.mean(each, axis=0, dtype=np.float32))
        return mean / np.float32(255) if each[0].dtype == np.uint8 else mean


def sampling_step(n_pixels: int) -> int:
    """Step between rows and columns of a sample; odd, to meet every colour of a Bayer mosaic."""
    return max(1, math.ceil(math.sqrt(n_pixels / RANGE_SAMPLES_PER_PLANE))) | 1


def _pieces(length: int, side: int, step: int) -> list[slice]:
    """Slices of every ``step``-th index, which together take what one slice of all takes."""
    starts = range(0, length, side)
    slices = [slice(s + -s % step, min(s + side, length), step) for s in starts]
    return [each for each in slices if each.start < each.stop]


def range_of_samples(
    samples: Sequence[NDArray[Any]], channels: Sequence[int], *, n_ranges: int, is_mean: bool
) -> list[tuple[float, float]]:
    """One pair of limits a range, of sampled planes.

    Parameters
    ----------
    samples
        Pixels of planes, with all channels along the first axis where their mean is taken.
    channels
        The range that each sample belongs to, unless the mean is taken.
    n_ranges, is_mean
        How many there are, and whether the mean is taken.
    """
    if is_mean:
        flat = [sample.reshape(len(sample), -1) for sample in samples]
        return [_percentiles(channel) for channel in np.concatenate(flat, axis=-1)]
    groups: list[list[NDArray[Any]]] = [[] for _ in range(n_ranges)]
    for sample, channel in zip(samples, channels, strict=True):
        groups[channel].append(sample)
    # Of planes that are damaged in part there are fewer pixels.
    return [
        _percentiles(np.concatenate([sample.ravel() for sample in chosen]))
        for own in groups
        for chosen in [own if any(np.isfinite(s).any() for s in own) else samples]
    ]


def _percentiles(values: NDArray[Any]) -> tuple[float, float]:
    """Limits as `semanticblur_core.io.to_unit_range` takes them by itself; above a constant one."""
    found = io.robust_limits(values)
    if found is None:
        raise ImageError("no finite value (all NaN or infinite)")
    return io.increasing(found)
