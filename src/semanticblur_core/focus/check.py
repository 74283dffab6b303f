"""Focus of many images: scores, gates, thumbnails and masks, one image after the other."""

from __future__ import annotations

import base64
import io as streams
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semanticblur_core import io, stacks
from semanticblur_core.config import require_choice, require_share
from semanticblur_core.errors import ConfigError, ImageError, SemanticBlurError
from semanticblur_core.focus import scores
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.classical import as_grey
from semanticblur_core.focus.stack import TILE_SIZE_PX, PlaneFocus, focus_measure, plane_focus
from semanticblur_core.machine import count_cores

if TYPE_CHECKING:
    from semanticblur_core.inference.map_maker import MapMaker

RegionKind = Literal["image", "content"]

THUMBNAIL_PX = 160
_MAP_PX = 40
_MAX_THREADS = 6
# Of the images that are read ahead, and of those that are being scored, in all.
_PIXELS_AHEAD = 60_000_000
# Levels of blur in a thumbnail's overlay; few, for small files.
_OVERLAY_LEVELS = 8
_OVERLAY_COLOR = (0xE6, 0x9F, 0x00)
_OVERLAY_ALPHA = 170


@dataclass(frozen=True)
class Field:
    """Where a field of view lies: the name of its plane, its first row and column, its size."""

    plane: str
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Source:
    """An image to check: where to read it, and its name in reports (with its extension).

    ``read`` gives ``(H, W)`` or ``(H, W, 3)`` of any real dtype; None reads the file ``path``.
    ``index`` is a plane's place in its stack, ``field_of_view`` that of a part of a plane.
    ``value_range`` and ``region`` (where to look, ``(H, W)`` bool) go before those of the options,
    ``pixel_side_um`` before what the file says of its pixels. ``of_file`` says that ``read`` gives
    the same while the file ``path`` does not change.
    """

    name: str
    path: Path
    read: Callable[[], NDArray[Any]] | None = None
    index: tuple[int, ...] = ()
    value_range: tuple[float, float] | None = None
    pixel_side_um: float | None = None
    field_of_view: Field | None = None
    region: Callable[[], NDArray[np.bool_]] | None = None
    of_file: bool = False

    @property
    def stamp(self) -> tuple[int, int] | None:
        """Bytes and time of change (ns) of the file that it is of, by which it is known again."""
        return file_stamp(self.path) if self.read is None or self.of_file else None


@dataclass(frozen=True)
class FocusOptions:
    """How images are judged, and what is made beside the scores.

    Parameters
    ----------
    gates
        An image passes if it keeps them all.
    size, value_range
        As in `semanticblur_core.Detector.detect`.
    threshold
        A pixel is in focus where the map is not above it.
    region
        Where to look: the whole image, or its content without empty background. A function gives
        the region ``(H, W)`` bool of a source, or None for the whole.
    subject
        What `subject_in_focus` is weighted by.
    tile_size_px
        Also measure the in-focus fraction of tiles of this side, of the region alone. A function
        gives it for a source.
    measure
        Also measure each image as the plane of a stack, see
        `semanticblur_core.focus.stack.focus_measure`.
    mask_folder, mask_margin_px
        Also write masks for photogrammetry there, with what is blurred enlarged by the margin.
    thumbnails
        Whether small pictures for a report are made.
    max_pixels
        Larger image files are not read.
    """

    gates: tuple[Gate, ...] = ()
    size: int | Literal["native"] = 320
    value_range: tuple[float, float] | None = None
    threshold: float = scores.THRESHOLD
    region: RegionKind | Callable[[Source], NDArray[np.bool_] | None] = "image"
    subject: scores.Subject = "centre"
    tile_size_px: float | Callable[[Source], float] | None = None
    measure: str | None = None
    mask_folder: Path | None = None
    mask_margin_px: int = 0
    thumbnails: bool = False
    max_pixels: int = io.MAX_PIXELS

    def __post_init__(self) -> None:
        for gate in self.gates:
            if not isinstance(gate, Gate):
                raise ConfigError(
                    f"gates: expected such as Gate('in_focus_fraction', 0.3), got {gate!r:.80}"
                )
        require_share("threshold", self.threshold)
        if not callable(self.region):
            require_choice("region", self.region, RegionKind)
        require_choice("subject", self.subject, scores.Subject)
        if self.mask_folder is not None:
            object.__setattr__(self, "mask_folder", Path(self.mask_folder))


@dataclass(frozen=True)
class ImageFocus:
    """Focus of one image.

    Attributes
    ----------
    name
        With extension, and with folders below the input.
    source
        File it came from.
    height, width
        In pixels.
    scores
        None where it could not be read.
    passed
        Whether all gates are kept; True where there are none.
    failed_gates
        Those that are not kept, for people.
    error
        Why it could not be checked.
    tiles
        In-focus fraction of tiles, ``(rows, columns)``; NaN where a tile has nothing of the region.
    tile_size_px
        Their side.
    plane
        Focus as the plane of a stack.
    thumbnail, overlay
        JPEG and PNG of the same shape, base64.
    elapsed_s
        Detection and scores, without waiting.
    stamp
        Bytes and time of change (ns) of its file, by which it is known again.
    field_of_view
        Where it lies in its plane, if it is a part of one.
    has_mask
        Whether a mask for photogrammetry was written.
    mask_error
        Why it was not, though it was wanted.
    """

    name: str
    source: str
    height: int = 0
    width: int = 0
    scores: scores.FocusScores | None = None
    passed: bool = False
    failed_gates: tuple[str, ...] = ()
    error: str | None = None
    tiles: NDArray[np.float32] | None = field(default=None, repr=False)
    tile_size_px: float | None = None
    plane: PlaneFocus | None = field(default=None, repr=False)
    thumbnail: str | None = field(default=None, repr=False)
    overlay: str | None = field(default=None, repr=False)
    elapsed_s: float = 0.0
    stamp: tuple[int, int] | None = None
    field_of_view: Field | None = None
    has_mask: bool = False
    mask_error: str | None = None


@dataclass(frozen=True)
class FocusUpdate:
    """One image checked, failed ones included."""

    image: ImageFocus
    n_done: int
    n_total: int


def focus_report(
    sources: Iterable[Source | str | Path] | str | Path,
    detector: MapMaker | None,
    options: FocusOptions | None = None,
) -> Generator[FocusUpdate]:
    """Check images one after the other, in order and in constant memory; close it to stop.

    Parameters
    ----------
    sources
        A file, or several, or `Source` objects for images from elsewhere.
    detector
        `semanticblur_core.Detector`, or a method of `semanticblur_core.focus.classical`. None: the
        classical scores alone, which need no map; those of the map are NaN.
    options
        Gates and the like.

    Yields
    ------
    FocusUpdate
        One for each image; one that cannot be read has ``image.error``.

    Raises
    ------
    ConfigError
        If masks are wanted without a map.

    Examples
    --------
    >>> from semanticblur_core import Detector, FocusOptions, focus_report
    >>> for update in focus_report(["a.jpg", "b.jpg"], Detector(), FocusOptions()):
    ...     image = update.image
    ...     print(image.name, image.scores.in_focus_fraction if image.scores else image.error)
    """
    options = options or FocusOptions()
    if detector is None and options.mask_folder is not None:
        raise ConfigError("masks need a blur map: choose the network or another method")
    listed = [
        one if isinstance(one, Source) else Source(Path(one).name, Path(one))
        for one in ([sources] if isinstance(sources, (str, Path)) else sources)
    ]
    # Files are read and scored in threads while the network works on the image between.
    n_threads = min(_MAX_THREADS, max(2, count_cores() // 2))
    n_ahead = 2
    with ThreadPoolExecutor(n_threads) as pool:
        read: deque[Future[_Prepared]] = deque()
        scored: deque[Future[ImageFocus]] = deque()
        waiting = iter(listed)
        n_done = 0
        try:
            while n_done < len(listed):
                while len(read) < n_ahead and (source := next(waiting, None)) is not None:
                    read.append(pool.submit(_prepare, source, options))
                if read:
                    prepared = _detect(read.popleft().result(), detector, options)
                    scored.append(pool.submit(_score, prepared, options))
                    if prepared.image is not None:
                        n_pixels = math.prod(prepared.image.shape[:2])
                        n_ahead = max(1, min(n_threads, _PIXELS_AHEAD // n_pixels))
                while scored and (len(scored) >= n_ahead or not read):
                    n_done += 1
                    yield FocusUpdate(scored.popleft().result(), n_done, len(listed))
        finally:
            futures: list[Future[Any]] = [*read, *scored]
            for future in futures:
                future.cancel()


def focus_of_image(
    image: NDArray[Any],
    detector: MapMaker,
    options: FocusOptions | None = None,
    *,
    name: str = "image",
) -> tuple[ImageFocus, NDArray[np.float32]]:
    """Focus of one image in memory, and its blur map ``(H, W)``.

    Raises
    ------
    ImageError
        If it is not one grey or RGB image.
    """
    options = options or FocusOptions()
    source = Source(name, Path(name), lambda: image)
    prepared = _detect(_prepare(source, options), detector, options)
    result = _score(prepared, options)
    if result.error is not None or prepared.blur is None:
        raise ImageError(result.error or f"{name}: no map")
    return result, prepared.blur


def colmap_mask(
    blur: NDArray[np.float32],
    *,
    threshold: float = scores.THRESHOLD,
    margin_px: int = 0,
    orientation: int = 1,
) -> NDArray[np.uint8]:
    """Mask for photogrammetry: 255 = use, 0 = ignore (out of focus).

    Parameters
    ----------
    blur
        ``(H, W)`` float32 in 0..1, of the image as it is looked at.
    threshold
        A pixel is ignored where the map is above it.
    margin_px
        Pixels no further than this from an ignored one are ignored too.
    orientation
        EXIF orientation of the file: the mask lies as its pixels are stored, before rotation, as
        COLMAP reads images.

    Returns
    -------
    ndarray
        ``(H, W)`` or ``(W, H)`` uint8.

    Raises
    ------
    ImageError
        If the margin is negative.
    """
    if margin_px < 0:
        raise ImageError(f"mask margin: expected at least 0 px, got {margin_px}")
    ignored = blur > threshold
    if margin_px and ignored.any():
        ignored = _widened(ignored, margin_px)
    mask = np.where(ignored, np.uint8(0), np.uint8(255))
    return io.to_stored_orientation(mask, orientation)


def _widened(area: NDArray[np.bool_], margin_px: int) -> NDArray[np.bool_]:
    """With all that is no further than this from it; some rows at a time, in the cache."""
    height, width = area.shape
    margin_px = min(margin_px, math.ceil(math.hypot(height, width)))
    columns = np.arange(width, dtype=np.int32)
    nowhere = width + margin_px
    wide = np.zeros_like(area)
    n_rows = max(64, 2 * margin_px)
    for top in range(0, height, n_rows):
        out = wide[top : top + n_rows]
        first, end = max(0, top - margin_px), min(height, top + len(out) + margin_px)
        inside = area[first:end]
        before = np.maximum.accumulate(np.where(inside, columns, -nowhere), axis=1)
        after = np.where(inside, columns, width + nowhere)[:, ::-1]
        after = np.minimum.accumulate(after, axis=1)[:, ::-1]
        distance = np.minimum(columns - before, after - columns)  # along each row
        for down in range(-margin_px, margin_px + 1):
            low, high = max(first, top + down), min(end, top + len(out) + down)
            reach = math.isqrt(margin_px**2 - down**2)
            if low < high:
                rows = np.s_[low - down - top : high - down - top]
                out[rows] |= distance[low - first : high - first] <= reach
    return wide


@dataclass(frozen=True)
class _Prepared:
    """An image between the steps; ``known`` where it has values; ``error`` ends it."""

    source: Source
    image: NDArray[Any] | None = None
    region: NDArray[np.bool_] | None = None
    known: NDArray[np.bool_] | None = None
    blur: NDArray[np.float32] | None = None
    error: str | None = None
    elapsed_s: float = 0.0
    stamp: tuple[int, int] | None = None


def _prepare(source: Source, options: FocusOptions) -> _Prepared:
    def work() -> _Prepared:
        if source.read is None and stacks.is_stack(source.path):
            raise ImageError(
                f"{source.path}: a stack; --stack finds its best plane, --planes=: checks each"
            )
        stamp = source.stamp
        read = source.read or (lambda: io.read_image(source.path, max_pixels=options.max_pixels))
        pixels = io.without_alpha(io.unmasked(read()))
        if pixels.size == 0:
            raise ImageError(f"{source.name}: the image has no pixels, shape {pixels.shape}")
        limits = source.value_range or options.value_range
        image = io.to_unit_range(pixels, limits=limits, name=source.name)
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ImageError(f"{source.name}: expected a grey or RGB image, got {image.shape}")
        region = source.region() if source.region else None
        if region is None and callable(options.region):
            region = options.region(source)
        if region is not None and region.shape != image.shape[:2]:
            raise ImageError(
                f"{source.name}: region of {region.shape} for an image of {image.shape[:2]}"
            )
        known = io.finite_pixels(pixels)
        if region is not None and known is not None:
            region = region & known
        return _Prepared(source, image, region, known, stamp=stamp)

    return _guarded(work, _Prepared(source))


def _detect(prepared: _Prepared, detector: MapMaker | None, options: FocusOptions) -> _Prepared:
    image = prepared.image
    if image is None or detector is None:
        return prepared

    def work() -> _Prepared:
        limits = None if image.dtype == np.uint8 else (0.0, 1.0)
        blur = detector.detect(image, size=options.size, value_range=limits)
        return replace(prepared, blur=blur)

    return _guarded(work, prepared)


def _score(prepared: _Prepared, options: FocusOptions) -> ImageFocus:
    source, image, blur, region = prepared.source, prepared.image, prepared.blur, prepared.region
    failed = ImageFocus(
        source.name,
        str(source.path),
        error=prepared.error,
        elapsed_s=prepared.elapsed_s,
        field_of_view=source.field_of_view,
    )
    if prepared.error is not None or image is None:
        return failed
    start = time.perf_counter()
    try:
        grey = as_grey(image)
        if options.region == "content" and source.region is None:
            known = prepared.known
            region = scores.content_mask(grey if known is None else np.where(known, grey, np.nan))
        measured = scores.score_image(
            grey, blur, region=region, threshold=options.threshold, subject=options.subject
        )
        tiles = None
        side = options.tile_size_px
        tile_size_px = side(source) if callable(side) else side
        if tile_size_px is not None and blur is not None:
            tiles = scores.tile_means(blur <= options.threshold, tile_size_px, region=region)
        plane = None
        if options.measure is not None:
            measure = focus_measure(options.measure, blur=blur)
            whole_px = round(tile_size_px or TILE_SIZE_PX)
            plane = plane_focus(source.index, image, measure, tile_size_px=whole_px)
        thumbnail, overlay = _pictures(image, blur) if options.thumbnails else (None, None)
    except Exception as error:  # the rest is checked all the same
        return replace(failed, error=_reason(error, source.name))
    has_mask, mask_error = False, None
    if options.mask_folder is not None and blur is not None:
        try:
            _write_mask(source, blur, options)
            has_mask = True
        except Exception as error:  # what was measured stays
            mask_error = _reason(error, source.name)
    scored = ImageFocus(
        name=source.name,
        source=str(source.path),
        height=grey.shape[0],
        width=grey.shape[1],
        scores=measured,
        tiles=tiles,
        tile_size_px=None if tiles is None else tile_size_px,
        plane=plane,
        thumbnail=thumbnail,
        overlay=overlay,
        elapsed_s=prepared.elapsed_s + time.perf_counter() - start,
        stamp=prepared.stamp,
        field_of_view=source.field_of_view,
        has_mask=has_mask,
        mask_error=mask_error,
    )
    return judge(scored, options.gates)


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Bytes and time of change (ns) of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def judge(image: ImageFocus, gates: Sequence[Gate]) -> ImageFocus:
    """The same image with the verdict of these gates; an unreadable one stays failed."""
    if image.scores is None:
        return image
    values = image.scores.to_dict()
    missed = tuple(_describe(gate, values[gate.score]) for gate in gates if not gate.passes(values))
    return replace(image, passed=not missed, failed_gates=missed)


def _describe(gate: Gate, value: float) -> str:
    found = f"{value:.4g}" if math.isfinite(value) else "none, for there is no content or no map"
    return f"{gate.describe()}, got {found}"


def _guarded(work: Callable[[], _Prepared], before: _Prepared) -> _Prepared:
    """Run a step; what it raises becomes the image's error."""
    start = time.perf_counter()
    try:
        done = work()
    except Exception as error:  # the rest is checked all the same
        done = replace(before, error=_reason(error, before.source.name))
    return replace(done, elapsed_s=before.elapsed_s + time.perf_counter() - start)


def _reason(error: BaseException, name: str) -> str:
    text = " ".join((str(error) or type(error).__name__).splitlines())
    if not isinstance(error, (SemanticBlurError, MemoryError, OSError, RuntimeError, ValueError)):
        text = f"unexpected {type(error).__name__}: {text}"  # of a kind nobody foresaw
    return text if name in text else f"{name}: {text}"


def _write_mask(source: Source, blur: NDArray[np.float32], options: FocusOptions) -> None:
    assert options.mask_folder is not None
    mask = colmap_mask(
        blur,
        threshold=options.threshold,
        margin_px=options.mask_margin_px,
        orientation=1 if source.read is not None else io.read_orientation(source.path),
    )
    io.write_png(mask_path(options.mask_folder, source.name), mask)


def mask_path(folder: Path, name: str) -> Path:
    """Where the mask of an image of this name lies, as COLMAP looks for it."""
    return folder / f"{name}.png"


def _pictures(image: NDArray[Any], blur: NDArray[np.float32] | None) -> tuple[str, str | None]:
    """A thumbnail as JPEG and its blur, orange where blurred, as a small PNG; base64."""
    step = max(1, min(image.shape[:2]) // (2 * THUMBNAIL_PX))
    small = image[::step, ::step]
    if small.dtype != np.uint8:
        small = np.rint(small * 255).astype(np.uint8)
    picture = Image.fromarray(small)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    thumbnail = _base64(picture, format="JPEG", quality=70)
    if blur is None:
        return thumbnail, None
    size = [max(1, round(n * _MAP_PX / max(blur.shape))) for n in blur.shape[::-1]]
    coarse = np.asarray(Image.fromarray(blur).resize((size[0], size[1]), Image.Resampling.BOX))
    levels = np.rint(coarse * (_OVERLAY_LEVELS - 1)).astype(np.uint8)
    tint = Image.fromarray(levels)
    tint.putpalette(_OVERLAY_COLOR * _OVERLAY_LEVELS)
    alphas = bytes(
        round(_OVERLAY_ALPHA * level / (_OVERLAY_LEVELS - 1)) for level in range(_OVERLAY_LEVELS)
    )
    return thumbnail, _base64(tint, format="PNG", transparency=alphas, bits=4, optimize=True)


def _base64(picture: Image.Image, **how: Any) -> str:
    stream = streams.BytesIO()
    picture.save(stream, **how)
    return base64.b64encode(stream.getvalue()).decode("ascii")
