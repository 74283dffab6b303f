"""Files in, blur maps out: one file after the other, a bad one never stops the rest."""

from __future__ import annotations

import functools
import glob
import itertools
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io, stacks
from semanticblur_core.config import require_share
from semanticblur_core.data.squash import squash
from semanticblur_core.errors import ConfigError, ImageError, SemanticBlurError
from semanticblur_core.inference.overlay import draw_overlay
from semanticblur_core.inference.planes import BATCH_PIXELS, Channels, DetectUpdate, Planes
from semanticblur_core.inference.tiling import TileGrid

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

SAMPLES = {"cat": "chelsea", "coffee": "coffee", "astronaut": "astronaut"}
_RESULT_FORMATS = ("png", "tif", "npy", "zarr", "csv", "json", "mp4")
_RESULT_NAME = re.compile(rf"_blur\.({'|'.join(_RESULT_FORMATS)})$|_overlay\.png$")
_PART = re.compile(r"^\.(.+)\.[0-9a-f]{8}(\.map)?\.part$")
_SAMPLE_PREFIX = "sample:"
_IMAGE_FORMATS = ("png", "tif", "npy", "zarr")
STREAMED_PIXELS = 64_000_000
_T = TypeVar("_T")


class MapMaker(Protocol):
    """What finds blur: the network's `Detector`, or a hand-crafted method."""

    @property
    def name(self) -> str:
        """The model or method, for people."""
        ...

    def detect(
        self,
        image: NDArray[Any],
        *,
        size: int | Literal["native"],
        value_range: tuple[float, float] | None,
    ) -> NDArray[np.float32]:
        """Blur map of one image, see `semanticblur_core.Detector.detect`."""
        ...

    def iter_planes(
        self,
        array: Any,
        axes: str,
        *,
        indices: Sequence[Sequence[int]] | None,
        channels: Channels,
        size: int | Literal["native"],
        value_range: tuple[float, float] | Sequence[tuple[float, float]] | None,
    ) -> Iterator[DetectUpdate]:
        """Maps of planes, see `semanticblur_core.Detector.iter_planes`."""
        ...


@dataclass(frozen=True)
class Job:
    """One input, the stem of its outputs relative to the output folder, and why it is not done.

    ``refusal`` is None of one that is.
    """

    source: str
    output_stem: str
    refusal: str | None = None


@dataclass(frozen=True)
class DetectOptions:
    """How blur maps are made and which files are written.

    ``formats`` None is png for an image, tif for a stack and csv for a video; each takes those that
    are for its kind. ``axes``, ``channels``, ``planes`` and ``level`` say what a stack is and which
    planes of it are wanted: a slice for each walked axis, for the last ones where there are fewer.
    ``every`` is the step between frames of a video. Images, planes and frames of more than
    ``max_pixels`` are not read into memory.
    """

    output: Path
    size: int | Literal["native"] = 320
    threshold: float = 0.5
    formats: tuple[str, ...] | None = None
    overlay: bool = False
    overwrite: bool = False
    resume: bool = False
    value_range: tuple[float, float] | None = None
    axes: str | None = None
    channels: Channels = "each"
    planes: tuple[slice, ...] | None = None
    level: int = 0
    every: int = 1
    max_pixels: int = io.MAX_PIXELS
    channel_ranges: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        formats: Any = self.formats
        if isinstance(formats, str):  # as the command line takes them
            formats = tuple(part.strip() for part in formats.split(","))
            object.__setattr__(self, "formats", formats)
        require_share("threshold", self.threshold)
        if self.every < 1:
            raise ConfigError(f"every: expected at least 1, got {self.every}")


@dataclass(frozen=True)
class FileResult:
    """What became of one input; ``error`` is None where it was done.

    ``mean_blur`` and ``blurred_fraction`` are in 0..1, NaN where nothing was analysed;
    ``elapsed_s`` covers reading, analysis (of several at once its share) and writing. ``planes``
    are those of a stack, ``n_frames`` the analysed ones of a video. ``skipped`` says that all of it
    was there before.
    """

    source: str
    outputs: list[Path] = field(default_factory=list)
    height: int = 0
    width: int = 0
    blurred_fraction: float = math.nan
    mean_blur: float = math.nan
    elapsed_s: float = 0.0
    error: str | None = None
    planes: list[PlaneResult] = field(default_factory=list)
    skipped: bool = False
    n_frames: int = 0


@dataclass(frozen=True)
class PlaneResult:
    """One plane of a stack: its index along the walked axes, and what was measured on it."""

    index: tuple[int, ...]
    blurred_fraction: float
    mean_blur: float


def find_jobs(
    inputs: Iterable[str | Path],
    output: Path,
    *,
    recursive: bool = False,
    on_problem: Callable[[str], None] | None = None,
) -> tuple[list[Job], list[str]]:
    """Images named by paths, globs, folders and ``sample:NAME``, in order, each once.

    Parameters
    ----------
    inputs, output, recursive
        As of ``semanticblur-core detect``.
    on_problem
        Called with a line for each input that names nothing and each folder that cannot be read,
        where there are others; without it the first of them is raised.

    Returns
    -------
    tuple
        The jobs, and the files that a folder or a glob named but that lie in the output folder
        under the name of a result: those are taken for results of an earlier run and left out. A
        job that would write the file of one before it, or the place of an input, is refused.

    Raises
    ------
    ImageError
        If an input names nothing, or a folder holds no image or cannot be read.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    found: dict[str, tuple[str, Path]] = {}
    left_out: list[str] = []
    problems: list[str] = []
    place = _placer()
    for source, relative, named in expand_inputs(
        map(str, inputs), recursive, problems, arrays=True
    ):
        if not named and _is_result(source, output):
            left_out.append(source)
            continue
        key = source if is_sample(source) else place(source)
        _, before = found.setdefault(key, (source, relative))
        if len(relative.parts) < len(before.parts):  # not by way of a circle of links
            found[key] = (source, relative)
    for problem in problems:
        if on_problem is None or not (found or left_out):
            raise ImageError(problem)
        on_problem(problem)
    if not found:
        raise ImageError(f"{output}: the only images found are results of an earlier run")
    # A raw file is refused later; it must not rename the result of the JPEG beside it.
    places = {relative for _, relative in found.values() if not _is_raw(relative)}
    stems = Counter(map(_stem, places))
    jobs = []
    for source, relative in found.values():
        stem = _stem(relative)
        shared = stems[stem] > 1 or _is_raw(relative)
        jobs.append(Job(source, str(relative) if shared else stem))
    return list(_without_clashes(jobs, output)), left_out


def _placer() -> Callable[[str], str]:
    """Function that tells files apart: links to folders are followed, those to files are not."""
    real = functools.cache(os.path.realpath)

    def place(source: str) -> str:
        folder, name = os.path.split(source)
        return os.path.join(real(folder or os.curdir), name)  # noqa: PTH118

    return place


def _without_clashes(jobs: Sequence[Job], output: Path) -> Iterator[Job]:
    """The jobs, those refused that would write the file of another or the place of an input."""
    named_as_results = {
        os.path.realpath(job.source): job.source
        for job in jobs
        if is_result_name(Path(job.source).name)
    }
    # By the name first: there may be a million outputs, and each look at the disk takes its time.
    names = {Path(path).name for path in named_as_results}
    everything = DetectOptions(output, formats=_RESULT_FORMATS, overlay=True)
    writers: dict[str, Job] = {}
    for job in jobs:
        first = writers.setdefault(job.output_stem, job)
        if first is not job:
            if os.path.realpath(first.source) != os.path.realpath(job.source):
                yield replace(
                    job,
                    refusal=f"would write the same {job.output_stem}_blur file as {first.source}; "
                    "detect it into another output folder",
                )
            continue
        for path in possible_outputs(job, everything) if names else ():
            taken = named_as_results.get(os.path.realpath(path)) if path.name in names else None
            if taken is not None:
                refusal = f"its result would take the place of {taken}, an input; detect it into "
                job = replace(job, refusal=f"{refusal}another output folder")
                break
        yield job


def detect_files(
    jobs: Iterable[Job], detector: MapMaker, options: DetectOptions
) -> Generator[FileResult]:
    """Detect and write; yields a result per job, failed ones included. Close it to stop.

    Where the detector takes several images at once (on a GPU), as many photographs are read ahead.
    """
    begun = (_begin(job, options) for job in jobs)
    for some in batched(begun, images_at_once(detector, options), _Begun.n_pixels):
        _detect_together([item for item in some if item.image is not None], detector, options)
        for item in some:
            start = time.perf_counter()
            result = item.result
            if result is None:
                result = _attempt(item.job, functools.partial(_finish, item, detector, options))
            item.image = item.blur = None  # not in memory beside the next
            yield replace(result, elapsed_s=item.elapsed_s + time.perf_counter() - start)


@dataclass
class _Begun:
    """A job under way: over, or a photograph with its map or without, or all to be done."""

    job: Job
    result: FileResult | None = None
    image: NDArray[Any] | None = None
    blur: NDArray[np.float32] | None = None
    elapsed_s: float = 0.0

    def n_pixels(self) -> float:
        """What it holds; a stack or a video waits for nothing and lets nothing wait."""
        if self.image is not None:
            return math.prod(self.image.shape[:2])
        return math.inf if self.result is None else 0


def _begin(job: Job, options: DetectOptions) -> _Begun:
    """Read a photograph, unless its results are there."""
    if job.refusal is not None:
        return _Begun(job, result=FileResult(job.source, error=f"{job.source}: {job.refusal}"))
    start = time.perf_counter()
    found = _attempt(job, functools.partial(_read_photograph, job, options))
    elapsed_s = time.perf_counter() - start
    if isinstance(found, FileResult):
        return _Begun(job, result=found, elapsed_s=elapsed_s)
    return _Begun(job, image=found, elapsed_s=elapsed_s)


def _attempt(job: Job, action: Callable[[], _T]) -> _T | FileResult:
    """What an action returns, or how the job failed."""
    try:
        return action()
    except SemanticBlurError as error:
        return FileResult(job.source, error=str(error))
    except (MemoryError, OSError, RuntimeError) as error:  # torch's out of memory is the last
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return FileResult(job.source, error=f"{job.source}: {reason}")
    except Exception as error:  # of a kind nobody foresaw; the rest is done all the same
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return FileResult(job.source, error=f"{job.source}: unexpected {reason}")


def images_at_once(detector: MapMaker, options: DetectOptions) -> int:
    """How many images the detector computes in one pass; at native size it takes tiles of one."""
    return 1 if options.size == "native" else int(getattr(detector, "batch_size", 1))


def batched(items: Iterable[_T], n: int, n_pixels: Callable[[_T], float]) -> Iterator[list[_T]]:
    """Up to ``n`` items at a time, in order, that hold at most `BATCH_PIXELS` unless it is one."""
    held: list[_T] = []
    total = 0.0
    for item in items:
        if held and total + n_pixels(item) > BATCH_PIXELS:
            yield held
            held, total = [], 0.0
        held.append(item)
        total += n_pixels(item)
        if len(held) >= n or total >= BATCH_PIXELS:
            yield held
            held, total = [], 0.0
    if held:
        yield held


def _detect_together(photographs: list[_Begun], detector: MapMaker, options: DetectOptions) -> None:
    """Maps of several photographs in one pass; if that fails they are left to be done singly."""
    if len(photographs) < 2:
        return
    start = time.perf_counter()
    images = [item.image for item in photographs if item.image is not None]
    try:
        # Only the network takes several at once.
        maps = cast("Detector", detector).detect_batch(
            images, size=options.size, value_range=options.value_range
        )
    except Exception:  # told of the file that it is of, when that is done alone
        return
    for item, blur in zip(photographs, maps, strict=True):
        item.blur = blur
        item.elapsed_s += (time.perf_counter() - start) / len(photographs)


def _require_one_range(job: Job, options: DetectOptions) -> None:
    if options.channel_ranges is not None:
        raise ImageError(
            f"{job.source}: {len(options.channel_ranges)} intensity ranges for an image without "
            "channels to walk; give one"
        )


def _is_video(job: Job) -> bool:
    return Path(job.source).suffix.lower() in io.VIDEO_SUFFIXES


def _is_photograph(job: Job, options: DetectOptions) -> bool:
    """Whether it is neither a video nor a stack nor to be read piece by piece."""
    path = Path(job.source)
    if is_sample(job.source):
        return True
    # With such options also a TIFF of one image, which may be a pyramid.
    as_stack = bool(_stack_options(options)) and path.suffix.lower() in stacks.STACK_SUFFIXES
    return not (_is_video(job) or as_stack or stacks.is_stack(path) or _is_streamed(path, options))


def _stack_options(options: DetectOptions) -> list[str]:
    """Those that were given and are of stacks only."""
    given = {
        "--axes": options.axes is not None,
        "--planes": options.planes is not None,
        "--channels": options.channels != "each",
        "--level": options.level != 0,
    }
    return [name for name, is_given in given.items() if is_given]


def _refuse_stack_options(job: Job, options: DetectOptions) -> None:
    if _stack_options(options):
        raise ImageError(
            f"{job.source}: {', '.join(_stack_options(options))}: of stacks and pyramids, which it "
            "is not; detect it without"
        )


def _read_photograph(job: Job, options: DetectOptions) -> NDArray[Any] | FileResult | None:
    """Its pixels, or its results that are there before; None of other kinds."""
    if not _is_photograph(job, options):
        return None
    _require_one_range(job, options)
    _refuse_stack_options(job, options)
    targets, overlay = _picture_outputs(job, options, "png")
    outputs = [*targets.values(), *overlay]
    if is_done(outputs, options):
        return FileResult(job.source, outputs, skipped=True)
    return load(job.source, max_pixels=options.max_pixels)


def _picture_outputs(
    job: Job, options: DetectOptions, default: str
) -> tuple[dict[str, Path], list[Path]]:
    """Files of its map by format, and the file of its overlay if one is wanted."""
    base = options.output / job.output_stem
    overlay = [base.with_name(f"{base.name}_overlay.png")] if options.overlay else []
    return result_paths(job, options, default, _IMAGE_FORMATS), overlay


def _finish(begun: _Begun, detector: MapMaker, options: DetectOptions) -> FileResult:
    """Detect what is not detected yet, and write."""
    job, image, blur = begun.job, begun.image, begun.blur
    if image is None and _is_video(job):
        from semanticblur_core.inference.video import detect_video

        _require_one_range(job, options)
        _refuse_stack_options(job, options)
        return detect_video(job, detector, options)
    if image is None:
        return _detect_stack(job, detector, options)
    if blur is None:
        try:
            blur = detector.detect(image, size=options.size, value_range=options.value_range)
        except SemanticBlurError as error:
            raise ImageError(f"{job.source}: {error}") from error
    targets, overlay = _picture_outputs(job, options, "png")
    sizes = _photograph_pixel_size(job) if {"tif", "zarr"} & set(targets) else {}
    if "tif" in targets and not sizes:
        io.write_tiff(targets["tif"], blur)
    if "npy" in targets:
        io.write_npy(targets["npy"], blur)
    described = {"tif", "zarr"} if sizes else {"zarr"}
    for name in sorted(described & set(targets)):
        with stacks.new_map(targets[name], blur.shape) as maps:
            maps.append(blur)
            write = stacks.write_tiff if name == "tif" else stacks.write_zarr
            write(targets[name], maps, axes="YX", pixel_size_um=sizes)
    _write_pictures(targets.get("png"), overlay, blur, image, options, options.value_range)
    return FileResult(
        source=job.source,
        outputs=[*targets.values(), *overlay],
        height=blur.shape[0],
        width=blur.shape[1],
        blurred_fraction=float((blur > options.threshold).mean()),
        mean_blur=float(blur.mean(dtype=np.float64)),
    )


def _photograph_pixel_size(job: Job) -> Mapping[str, float]:
    """Micrometres a step of the image as it is read, turned upright; of others than TIFF none."""
    path = Path(job.source)
    if is_sample(job.source) or path.suffix.lower() not in io.TIFF_SUFFIXES:
        return {}
    sizes = stacks.read_pixel_size(path)
    if io.read_orientation(path) in (5, 6, 7, 8):
        turned = {"X": "Y", "Y": "X"}
        return {turned.get(axis, axis): size for axis, size in sizes.items()}
    return sizes


def _write_pictures(
    png: Path | None,
    overlay: list[Path],
    blur: NDArray[np.float32],
    image: NDArray[Any],
    options: DetectOptions,
    value_range: tuple[float, float] | None,
) -> None:
    if png is not None:
        io.write_png(png, np.round(blur * 255).astype(np.uint8))
    for path in overlay:
        drawn = draw_overlay(image, blur, threshold=options.threshold, value_range=value_range)
        io.write_png(path, drawn)


def _detect_stack(job: Job, detector: MapMaker, options: DetectOptions) -> FileResult:
    path = Path(job.source)
    targets, overlay = _picture_outputs(job, options, "tif")
    outputs = [*targets.values(), *overlay]
    if is_done(outputs, options):
        return FileResult(job.source, outputs, skipped=True)
    with stacks.open_stack(path, axes=options.axes, level=options.level) as stack:
        try:
            planes = Planes(stack.array, stack.axes, options.channels)
            box = chosen_planes(planes, options.planes)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        shape = (*(len(axis) for axis in box), *planes.plane_shape)
        has_pictures = "png" in targets or bool(overlay)
        if has_pictures and (math.prod(shape[:-2]) > 1 or math.prod(shape) > STREAMED_PIXELS):
            raise ImageError(
                f"{path}: a stack or a large image, and pictures hold one plane in memory; use "
                "--format=tif, npy or zarr, without --overlay"
            )
        with stacks.new_map(next(iter(targets.values())), shape) as maps:
            try:
                measured = list(_append_planes(maps, planes, box, detector, options))
            except SemanticBlurError as error:
                raise ImageError(f"{path}: {error}") from error
            where: dict[str, Any] = {
                "axes": f"{planes.walked_axes}YX",
                "pixel_size_um": stack.pixel_size_um,
                "time_step_s": stack.time_step_s,
            }
            if "tif" in targets:
                stacks.write_tiff(targets["tif"], maps, **where)
            if "zarr" in targets:
                stacks.write_zarr(targets["zarr"], maps, **where)
            if "npy" in targets:
                stacks.write_npy(targets["npy"], maps)
            if has_pictures:
                index = [axis[0] for axis in box]
                unit = planes.view(index).read_unit(limits=_stack_limits(planes, options))
                limits = None if unit.dtype == np.uint8 else (0.0, 1.0)
                blur = maps.read([0] * len(box), slice(None))
                _write_pictures(targets.get("png"), overlay, blur, unit, options, limits)
    return FileResult(
        source=job.source,
        outputs=outputs,
        height=shape[-2],
        width=shape[-1],
        blurred_fraction=float(np.mean([plane.blurred_fraction for plane in measured])),
        mean_blur=float(np.mean([plane.mean_blur for plane in measured])),
        planes=measured,
    )


def _append_planes(
    maps: stacks.MapFile,
    planes: Planes,
    box: list[range],
    detector: MapMaker,
    options: DetectOptions,
) -> Iterator[PlaneResult]:
    """Detect planes in order and append their maps."""
    n_pixels = math.prod(planes.plane_shape)
    for index, strips in _iter_strips(planes, box, detector, options):
        n_blurred, total = 0, 0.0
        for strip in strips:
            maps.append(strip)
            n_blurred += int(np.count_nonzero(strip > options.threshold))
            total += float(strip.sum(dtype=np.float64))
        yield PlaneResult(index, n_blurred / n_pixels, total / n_pixels)


def _iter_strips(
    planes: Planes, box: list[range], detector: MapMaker, options: DetectOptions
) -> Iterator[tuple[tuple[int, ...], Iterable[NDArray[np.float32]]]]:
    """Each plane's index and map; at native size in strips, a plane is never held whole."""
    limits = _stack_limits(planes, options)
    if options.size == "native":
        grid = TileGrid(*planes.plane_shape)
        # Only the network has a native size: other methods always work at the image's own.
        network = cast("Detector", detector)
        for index in itertools.product(*box):
            read = _banded(functools.partial(planes.view(index).read_unit, limits=limits))
            yield index, (strip for _, strip in network.iter_strips(read, grid))
        return
    n_pixels = math.prod(planes.plane_shape)
    if n_pixels > options.max_pixels:
        raise ImageError(
            f"planes of {n_pixels / 1e6:.0f} million pixels are too large to be squashed; "
            "--size=native streams them, --level takes a coarser one of a pyramid, "
            "--max-pixels raises the limit"
        )
    for update in detector.iter_planes(
        planes.array, planes.axes, indices=list(itertools.product(*box)),
        channels=planes.channels, size=options.size, value_range=limits,
    ):  # fmt: skip
        yield update.index, [update.blur]


def _stack_limits(planes: Planes, options: DetectOptions) -> list[tuple[float, float]] | None:
    """Intensities that count as black and white, by channel."""
    if options.channel_ranges is not None:
        return planes.as_limits(options.channel_ranges)
    if options.value_range is not None:
        return planes.as_limits(options.value_range)
    return planes.estimate_range()


def _banded(
    read: Callable[[slice, slice], NDArray[Any]],
) -> Callable[[slice, slice], NDArray[Any]]:
    """Read whole rows once and cut the tiles of a row from them: files are often kept in rows."""
    held: tuple[slice, NDArray[Any]] | None = None

    def read_cut(rows: slice, columns: slice) -> NDArray[Any]:
        nonlocal held
        if held is None or held[0] != rows:
            held = rows, read(rows, slice(None))
        return held[1][:, columns]

    return read_cut


def _is_streamed(path: Path, options: DetectOptions) -> bool:
    """Whether a single large TIFF is to be read piece by piece."""
    if options.size != "native" or path.suffix.lower() not in io.TIFF_SUFFIXES:
        return False
    return stacks.plane_pixels(path) > STREAMED_PIXELS


def chosen_planes(planes: Planes, wanted: tuple[slice, ...] | None) -> list[range]:
    """Indices along each walked axis.

    Raises
    ------
    ImageError
        If a slice is of no axis or names no plane.
    """
    chosen = wanted or ()
    if len(chosen) > len(planes.lengths):
        raise ImageError(
            f"--planes: {len(chosen)} ranges for {len(planes.lengths)} axes "
            f"({planes.walked_axes or 'none'})"
        )
    whole = [slice(None)] * (len(planes.lengths) - len(chosen))
    box = [
        range(length)[part] for length, part in zip(planes.lengths, [*whole, *chosen], strict=True)
    ]
    if any(len(axis) == 0 for axis in box):
        raise ImageError(f"--planes: names no plane of {planes.lengths} along {planes.walked_axes}")
    return box


def is_sample(source: str) -> bool:
    """Whether a source is ``sample:NAME`` and no file."""
    return source.startswith(_SAMPLE_PREFIX)


def result_paths(
    job: Job, options: DetectOptions, default: str, possible: tuple[str, ...]
) -> dict[str, Path]:
    """Files of maps or tables, by format: the wanted ones that this kind of input can have.

    Raises
    ------
    ImageError
        If it can have none of them.
    """
    wanted = options.formats or (default,)
    base = options.output / job.output_stem
    paths = {
        name: base.with_name(f"{base.name}_blur.{name}") for name in wanted if name in possible
    }
    if not paths:
        raise ImageError(
            f"{job.source}: --format={','.join(wanted)}: expected of {', '.join(possible)} for it"
        )
    return paths


def possible_outputs(job: Job, options: DetectOptions) -> list[Path]:
    """All files that a job might write, whatever its source turns out to be."""
    base = options.output / job.output_stem
    names = [f"{base.name}_blur.{name}" for name in options.formats or ("png", "tif", "csv")]
    if options.overlay:
        names.append(f"{base.name}_overlay.png")
    return [base.with_name(name) for name in names]


def is_result_name(name: str) -> bool:
    """Whether it is a name that results have."""
    return bool(_RESULT_NAME.search(name))


def job_outputs(job: Job, options: DetectOptions) -> list[Path]:
    """The files that a job writes; its source may be looked into.

    Raises
    ------
    ImageError
        If it can have none of the formats.
    """
    if _is_video(job):
        from semanticblur_core.inference.video import FORMATS

        return list(result_paths(job, options, "csv", FORMATS).values())
    default = "png" if _is_photograph(job, options) else "tif"
    targets, overlay = _picture_outputs(job, options, default)
    return [*targets.values(), *overlay]


def remove_stale_parts(jobs: Iterable[Job], options: DetectOptions) -> None:
    """Delete what killed runs had begun to write under the names of these jobs' results.

    What a process that lives is writing stays, and what the system cannot tell from it.
    """
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        by_folder.setdefault((options.output / job.output_stem).parent, []).append(job)
    for folder, own in by_folder.items():
        with suppress(OSError):
            parts = [entry for entry in os.scandir(folder) if _part_of(entry)]
            # Names are made only where something is left behind: there may be a million.
            wanted = {
                path.name
                for job in (own if parts else [])
                for path in possible_outputs(job, options)
            }
            for entry in parts:
                if _part_of(entry) in wanted:
                    io.remove_if_stale(Path(entry.path))


def _part_of(entry: os.DirEntry[str]) -> str:
    """The name that a temporary file or folder is to get; empty for others."""
    match = _PART.match(entry.name)
    return match[1] if match is not None else ""


def is_done(outputs: list[Path], options: DetectOptions) -> bool:
    """Whether all results are there and are to be kept; results appear whole or not at all.

    Raises
    ------
    ImageError
        If one is there and neither to be kept nor replaced.
    """
    existing = [path for path in outputs if path.exists()]
    if options.resume and len(existing) == len(outputs):
        return True
    if existing and not (options.overwrite or options.resume):
        raise ImageError(
            f"{existing[0]}: exists already; --overwrite replaces it, --resume keeps it"
        )
    return False


def load(source: str, *, max_pixels: int = io.MAX_PIXELS) -> NDArray[Any]:
    """Image of a path, of at most so many pixels, or ``sample:NAME``."""
    if source.startswith(_SAMPLE_PREFIX):
        from skimage import data

        array: NDArray[Any] = getattr(data, SAMPLES[source.removeprefix(_SAMPLE_PREFIX)])()
        return array
    return io.read_image(Path(source), max_pixels=max_pixels)


def sample_photographs(height: int, width: int) -> NDArray[np.float32]:
    """The samples, squashed: ``(3, height, width, 3)`` float32 in 0..1.

    What a network computes is compared on them: on noise its maps are 0 nearly everywhere, and hide
    most of what differs.
    """
    return np.stack([squash(load(f"{_SAMPLE_PREFIX}{name}"), height, width) for name in SAMPLES])


def expand_input(
    text: str,
    recursive: bool,
    *,
    arrays: bool = False,
    on_error: Callable[[OSError], None] | None = None,
) -> Iterator[tuple[str, Path, bool]]:
    """Sources of one input, each with its path below the output folder and whether it was named.

    Parameters
    ----------
    text
        Path, glob, folder or ``sample:NAME``.
    recursive
        Whether a folder stands for its subfolders too.
    arrays
        Whether a folder or a glob stands for npy files and Zarr folders too.
    on_error
        Told of a subfolder that cannot be read; without it that is raised.

    Raises
    ------
    ImageError
        If it names nothing, or a folder that holds no image.
    OSError
        If a folder cannot be read.
    """
    if text.startswith(_SAMPLE_PREFIX):
        name = text.removeprefix(_SAMPLE_PREFIX)
        if name not in SAMPLES:
            raise ImageError(f"{text}: expected one of sample:{', sample:'.join(SAMPLES)}")
        yield text, Path(name), True
        return
    if not text.strip():
        raise ImageError("an input is empty; expected a path, a glob, a folder or sample:NAME")
    path = io.expand_home(text)
    if stacks.is_zarr(path):
        yield _source(path), Path(path.name), True
        return
    if path.is_dir():
        images = [p for p in _entries(path, recursive, on_error) if _is_image(p, arrays)]
        if not images:
            where = "" if recursive else "; --recursive looks into its subfolders"
            video = next((p for p in path.iterdir() if p.suffix.lower() in io.VIDEO_SUFFIXES), None)
            if video is not None and arrays:
                where = f"; videos are taken by name or by a glob, '{path}/*{video.suffix}'"
            raise ImageError(f"{text}: no images in this folder{where}")
        for image in images:
            yield _source(image), image.relative_to(path), False
    elif path.exists() or not glob.has_magic(text):
        # Missing and unknown files are reported by the reader, so that the rest is done.
        yield _source(path), Path(path.name), True
    else:
        root = _fixed_part(path)
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        matches = [
            match
            for match in matches
            if _is_file_or_lost(match) or (arrays and stacks.is_zarr(match))
            if not any(stacks.is_zarr(root / part) for part in match.relative_to(root).parents)
        ]
        if not matches:
            raise ImageError(f"{text}: no file matches")
        for match in matches:
            yield _source(match), match.relative_to(root), False


def expand_inputs(
    texts: Iterable[str], recursive: bool, problems: list[str], *, arrays: bool = False
) -> Iterator[tuple[str, Path, bool]]:
    """`expand_input` of each; what names nothing or cannot be read becomes a line of problems."""

    def unreadable(error: OSError, name: str = "") -> None:
        reason = error.strerror or error
        problems.append(f"{name or error.filename}: cannot be read: {reason}")

    for text in texts:
        try:
            yield from expand_input(text, recursive, arrays=arrays, on_error=unreadable)
        except OSError as error:
            unreadable(error, text)
        except ImageError as error:
            problems.append(str(error))


def _source(path: Path) -> str:
    """As text that no sample is meant by."""
    return f".{os.sep}{path}" if is_sample(str(path)) else str(path)


def _entries(
    folder: Path, recursive: bool, on_error: Callable[[OSError], None] | None
) -> list[Path]:
    """What lies in a folder; a Zarr is one thing, of perhaps a million files."""
    if not recursive:
        return sorted(folder.iterdir())
    found: list[Path] = []

    def failed(error: OSError) -> None:
        if on_error is None or error.filename == str(folder):
            raise error
        on_error(error)

    root, seen = os.path.realpath(folder), set[str]()
    for parent, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        found += [Path(parent, name) for name in (*folders, *files)]
        inside = []
        for name in folders:
            path = Path(parent, name)
            if name.startswith(".") or stacks.is_zarr(path):
                continue
            if path.is_symlink():  # not to what is walked anyway, nor to what that lies in
                place = os.path.realpath(path)
                if place in seen or _lies_in(place, root) or _lies_in(root, place):
                    continue
                seen.add(place)
            inside.append(name)
        folders[:] = inside
    return sorted(found)


def _lies_in(place: str, folder: str) -> bool:
    return f"{place}{os.sep}".startswith(f"{folder.rstrip(os.sep)}{os.sep}")


def _fixed_part(pattern: Path) -> Path:
    """Folder of a glob before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _stem(relative: Path) -> str:
    has_name = relative.stem.strip(".") != ""
    return str(relative.with_suffix("") if has_name else relative)


def _is_raw(path: Path) -> bool:
    return path.suffix.lower() in io.RAW_SUFFIXES


def _is_image(path: Path, arrays: bool) -> bool:
    if path.name.startswith("."):
        return False
    known = (*io.IMAGE_SUFFIXES, *io.RAW_SUFFIXES, *([".npy"] if arrays else []))
    is_file = path.suffix.lower() in known and _is_file_or_lost(path)
    return is_file or (arrays and stacks.is_zarr(path))


def _is_file_or_lost(path: Path) -> bool:
    """A file, or a link that leads to none, which the reader reports."""
    return path.is_file() or not path.exists()


def _is_result(source: str, output: Path) -> bool:
    """Whether a file lies in the output folder under one of the names given to results."""
    if not is_result_name(Path(source).name):
        return False
    return Path(os.path.realpath(output)) in Path(os.path.realpath(source)).parents
