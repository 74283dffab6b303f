"""Videos, frame by frame in constant memory: a row of a table each, and a video of maps."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk, io
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.jobs import DetectOptions, Job, is_done, result_paths
from semanticblur_core.inference.map_maker import MapMaker, batched, images_at_once
from semanticblur_core.inference.results import FileResult
from semanticblur_core.inference.rows import result_key
from semanticblur_core.maps import KeepClock, kept

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

FORMATS = ("csv", "json", "mp4")
_NO_MAP = np.zeros((0, 0), np.float32)
_COLUMNS = ("frame", "time_s", "mean_blur", "blurred_fraction")
# A last frame may end this much before the length that the file states.
_SLACK_S, _SLACK_SHARE, _SLACK_FRAMES = 0.1, 0.01, 2


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes
    ----------
    number
        From 0, of all frames.
    time_s
        When it is shown, in seconds from the start of the file's clock.
    pixels
        ``(H, W, 3)`` uint8, turned upright where the file says so.
    """

    number: int
    time_s: float
    pixels: NDArray[np.uint8]


def iter_frames(
    path: Path, *, every: int = 1, first: int = 0, max_pixels: int = io.MAX_PIXELS
) -> Iterator[tuple[Frame, Fraction]]:
    """Frames of a video's first picture track, each with the frame rate; none is kept.

    Parameters
    ----------
    path
        Any container and codec that FFmpeg reads.
    every
        Step between frames: 10 gives frames 0, 10, 20 ...
    first
        Frames before it are decoded, and not given.
    max_pixels
        Rows times columns above which it is refused.

    Raises
    ------
    ImageError
        If it is missing, no video, damaged, or ends before the length that it states.
    """
    av = _import_av(path)
    disk.require_file(path)
    try:
        # Titles and the like need not be UTF-8.
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ImageError(f"{path}: holds no pictures (no video track)")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ImageError(f"{path}: its pictures are of a codec that FFmpeg does not know")
            stream.thread_type = "AUTO"
            disk.refuse_bomb(
                path, stream.codec_context.width * stream.codec_context.height, max_pixels
            )
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            number, time_s = -1, 0.0
            for number, frame in enumerate(container.decode(stream)):
                time_s = float(number / rate) if frame.time is None else float(frame.time)
                if number % every == 0 and number >= first:
                    disk.refuse_bomb(path, frame.width * frame.height, max_pixels)
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    yield Frame(number, time_s, np.ascontiguousarray(pixels)), rate
            if number < 0:
                raise ImageError(f"{path}: no frame of it can be read")
            _refuse_truncated(path, stream, number + 1, time_s + float(1 / rate))
    except ImageError:
        raise
    except Exception as error:  # FFmpeg's own kinds, and what PyAV stumbles over in damaged files
        raise disk.unreadable(path, error) from error


def count_frames(path: Path) -> tuple[int, tuple[int, int]]:
    """How many frames a video states, or its length and rate give; and their height and width.

    Raises
    ------
    ImageError
        If it is no video.
    """
    av = _import_av(path)
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or 25
            n_frames = stream.frames or round(_stated_length_s(stream) * rate)
            return int(n_frames), (stream.codec_context.height, stream.codec_context.width)
    except Exception as error:  # as in `iter_frames`
        raise disk.unreadable(path, error) from error


def detect_video(
    job: Job,
    detector: MapMaker,
    options: DetectOptions,
    on_part: Callable[[int, int], None] | None = None,
    *,
    fresh: bool = True,
) -> FileResult:
    """Table of a video's frames, and where asked for a grey video of their maps.

    ``on_part`` is called with the frames that are done, and how many there should be. ``fresh``
    forgets what was kept of a run that was stopped.

    Raises
    ------
    ImageError
        If it cannot be read to its end, or the results cannot be written; then there are none.
    """
    path = Path(job.source)
    targets = result_paths(job, options, "csv", FORMATS)
    if options.overlay:
        raise ImageError(f"{path}: --overlay is for photographs; --format=mp4 gives the maps")
    if is_done(list(targets.values()), options):
        return FileResult(job.source, list(targets.values()), skipped=True)
    _import_av(path)
    disk.require_file(path)
    n_stated = 0
    with suppress(ImageError):  # of which its reader tells
        n_stated = count_frames(path)[0] // options.every if on_part is not None else 0
    with ExitStack() as resources:
        folder = None
        if "mp4" not in targets:  # which cannot go on where it was stopped
            target, key = next(iter(targets.values())), result_key(job, detector, options)
            folder = resources.enter_context(kept(target, key, fresh=fresh))
        rows = _Rows(folder)
        writers = [
            resources.enter_context(_WRITERS[name](target)) for name, target in targets.items()
        ]
        for row in rows.before():
            for writer in writers:
                writer.add(row, _NO_MAP, Fraction(1))
        for frame, rate, blur in _iter_maps(path, detector, options, rows.n_made):
            mean = float(blur.mean(dtype=np.float64))
            fraction = float((blur > options.threshold).mean())
            values = (frame.number, round(frame.time_s, 6), mean, fraction)
            row = dict(zip(_COLUMNS, values, strict=True))
            for writer in writers:
                writer.add(row, blur, rate / options.every)
            rows.add(row, blur.shape)
            if on_part is not None:
                on_part(rows.n_made, max(rows.n_made, n_stated))
    return FileResult(
        source=job.source,
        outputs=list(targets.values()),
        height=rows.shape[0],
        width=rows.shape[1],
        blurred_fraction=rows.blurred / rows.n_made,
        mean_blur=rows.total / rows.n_made,
        n_frames=rows.n_made,
    )


class _Rows:
    """Counts rows of a table, and keeps them now and then, so that a run that is stopped goes on.

    Attributes
    ----------
    n_made
        How many there are.
    blurred, total
        Sums of the shares and of the means.
    shape
        Of the latest frame.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.n_made, self.blurred, self.total = 0, 0.0, 0.0
        self.shape: tuple[int, ...] = (0, 0)
        self._unkept: list[dict[str, Any]] = []
        self._clock = KeepClock()

    def before(self) -> Iterator[dict[str, Any]]:
        """Rows of a run that was stopped, which count as added."""
        while self._folder is not None:
            # More than one where two runs go on beside each other: either does.
            following = sorted(self._folder.glob(f"{self.n_made}-*.json"))
            try:
                piece = json.loads(following[0].read_text(encoding="utf-8"))
                rows = [{name: row[name] for name in _COLUMNS} for row in piece["rows"]]
                shape = tuple(piece["shape"])
            except (OSError, ValueError, LookupError, TypeError):
                return
            for row in rows:
                self._count(row, shape)
                yield row

    def add(self, row: dict[str, Any], shape: tuple[int, ...]) -> None:
        """Add a row, of a frame of a certain shape."""
        self._count(row, shape)
        if self._folder is None:
            return
        self._unkept.append(row)
        if self._clock.is_due:
            piece = {"shape": shape, "rows": self._unkept}
            path = self._folder / f"{self.n_made - len(self._unkept)}-{self.n_made}.json"
            disk.write_text(path, json.dumps(piece), durable=True)
            self._unkept = []
            self._clock.restart()

    def _count(self, row: dict[str, Any], shape: tuple[int, ...]) -> None:
        self.n_made += 1
        self.blurred += row["blurred_fraction"]
        self.total += row["mean_blur"]
        self.shape = shape


def _iter_maps(
    path: Path, detector: MapMaker, options: DetectOptions, n_before: int
) -> Iterator[tuple[Frame, Fraction, NDArray[np.float32]]]:
    """Frames with their rate and map, as many at once as the detector takes."""
    how: Any = {"size": options.size, "value_range": options.value_range}
    first = n_before * options.every
    frames = iter_frames(path, every=options.every, first=first, max_pixels=options.max_pixels)
    for some in batched(frames, images_at_once(detector, options), _frame_pixels):
        pixels = [frame.pixels for frame, _ in some]
        try:
            if len(some) == 1:
                maps = [detector.detect(pixels[0], **how)]
            else:
                maps = cast("Detector", detector).detect_batch(pixels, **how)
        except SemanticBlurError as error:
            raise ImageError(f"{path}: frame {some[0][0].number}: {error}") from error
        for (frame, rate), blur in zip(some, maps, strict=True):
            yield frame, rate, blur


def _frame_pixels(item: tuple[Frame, Fraction]) -> float:
    return float(item[0].pixels[..., 0].size)


class _Writer(Protocol):
    def add(self, row: dict[str, Any], blur: NDArray[np.float32], rate: Fraction) -> None: ...


class _CsvWriter:
    def __init__(self, stream: Any) -> None:
        self._rows = csv.DictWriter(stream, _COLUMNS)
        self._rows.writeheader()

    def add(self, row: dict[str, Any], blur: NDArray[np.float32], rate: Fraction) -> None:
        self._rows.writerow(row)


class _JsonWriter:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._separator = "[\n"

    def add(self, row: dict[str, Any], blur: NDArray[np.float32], rate: Fraction) -> None:
        self._stream.write(self._separator + json.dumps(row))
        self._separator = ",\n"


class _VideoWriter:
    def __init__(self, container: Any, path: Path) -> None:
        self._container, self._path = container, path
        self._stream: Any = None
        self._shape: tuple[int, ...] = ()

    def add(self, row: dict[str, Any], blur: NDArray[np.float32], rate: Fraction) -> None:
        import av

        # Half-resolution colour needs an even number of rows and columns.
        grey = np.round(blur * 255).astype(np.uint8)
        grey = np.pad(grey, [(0, n % 2) for n in grey.shape], mode="edge")
        if self._stream is None:
            self._shape = grey.shape
            # As a multiple of 1/1000: MP4 has no room for long fractions.
            self._stream = self._container.add_stream(_encoder(), rate=rate.limit_denominator(1001))
            self._stream.height, self._stream.width = grey.shape
            self._stream.pix_fmt = "yuv420p"
        if grey.shape != self._shape:
            raise ImageError(
                f"{self._path}: the frames change their size at frame {row['frame']}; a map video "
                "needs one size"
            )
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(grey, format="gray")):
            self._container.mux(packet)

    def finish(self) -> None:
        for packet in self._stream.encode() if self._stream is not None else ():
            self._container.mux(packet)


@contextmanager
def _csv_file(path: Path) -> Iterator[_Writer]:
    with (
        disk.replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        yield _CsvWriter(file)


@contextmanager
def _json_file(path: Path) -> Iterator[_Writer]:
    with disk.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield _JsonWriter(file)
        file.write("\n]\n")


@contextmanager
def _video_file(path: Path) -> Iterator[_Writer]:
    av = _import_av(path)
    with disk.replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        writer = _VideoWriter(container, path)
        yield writer
        writer.finish()


_WRITERS = {"csv": _csv_file, "json": _json_file, "mp4": _video_file}


def _encoder() -> str:
    import av

    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _refuse_truncated(path: Path, stream: Any, n_frames: int, end_s: float) -> None:
    """Compare what was read with the length that the file states, if it states one."""
    stated_s = _stated_length_s(stream)
    if end_s + _SLACK_S + _SLACK_SHARE * stated_s < stated_s:
        raise ImageError(
            f"{path}: truncated: ends after {n_frames} frames, {end_s:.2f} of {stated_s:.2f} s"
        )
    # AVI: FFmpeg takes the length from the size of the file, but not this number.
    if n_frames + _SLACK_FRAMES + _SLACK_SHARE * stream.frames < stream.frames:
        raise ImageError(f"{path}: truncated: ends after {n_frames} of {stream.frames} frames")


def _stated_length_s(stream: Any) -> float:
    """When the file says that the last frame ends; 0 if it does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska, 00:01:02.5
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return 0.0


def _import_av(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise ImageError(
            f"{path}: videos need PyAV: pip install 'napari-semanticblur[video]'"
        ) from None
    return av
