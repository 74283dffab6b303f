"""Files in, blur maps out: one file after the other, a bad one never stops the rest."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io, stacks
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.inputs import is_sample, is_video, load
from semanticblur_core.inference.jobs import DetectOptions, Job, is_done, result_paths
from semanticblur_core.inference.map_maker import MapMaker, batched, images_at_once
from semanticblur_core.inference.overlay import draw_overlay
from semanticblur_core.inference.planes import Planes, takes_all
from semanticblur_core.inference.results import FileResult, PlaneResult
from semanticblur_core.inference.rows import Limits, OnPart, RowMaker
from semanticblur_core.maps import MapFile, kept_map, new_map
from semanticblur_core.scale import Scale

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

_IMAGE_FORMATS = ("png", "tif", "npy", "zarr")
STREAMED_PIXELS = 64_000_000
OnProgress = Callable[[str, int, int], None]
_T = TypeVar("_T")


def detect_files(
    jobs: Iterable[Job],
    detector: MapMaker,
    options: DetectOptions,
    *,
    on_progress: OnProgress | None = None,
) -> Generator[FileResult]:
    """Detect and write; yields a result per job, failed ones included. Close it to stop.

    Where the detector takes several images at once (on a GPU), as many photographs are read ahead.
    ``on_progress`` is called while a stack, a slide or a video is done, with its job's source, how
    much is done and of how much. With ``resume`` they go on where a run was stopped.
    """
    return iter_results(jobs, detector, options, on_progress=on_progress, fresh=not options.resume)


def iter_results(
    jobs: Iterable[Job],
    detector: MapMaker,
    options: DetectOptions,
    *,
    on_progress: OnProgress | None,
    fresh: bool,
) -> Generator[FileResult]:
    """As `detect_files`; unless ``fresh``, what was kept of a stack or a video is gone on with."""
    begun = (_begin(job, options) for job in jobs)
    for some in batched(begun, images_at_once(detector, options), _Begun.n_pixels):
        _detect_together([item for item in some if item.image is not None], detector, options)
        for item in some:
            start = time.perf_counter()
            result = item.result
            if result is None:
                on_part = on_progress and functools.partial(on_progress, item.job.source)
                finish = functools.partial(_finish, item, detector, options, on_part, fresh)
                result = _attempt(item.job, finish)
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
        reason = " ".join((str(error) or type(error).__name__).splitlines())
        return FileResult(job.source, error=f"{job.source}: {reason}")
    except Exception as error:  # of a kind nobody foresaw; the rest is done all the same
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return FileResult(job.source, error=f"{job.source}: unexpected {reason}")


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


def _is_photograph(job: Job, options: DetectOptions) -> bool:
    """Whether it is neither a video nor a stack nor to be read piece by piece."""
    path = Path(job.source)
    if is_sample(job.source):
        return True
    # With such options also a TIFF of one image, which may be a pyramid.
    as_stack = bool(_stack_options(options)) and path.suffix.lower() in stacks.STACK_SUFFIXES
    is_read_in_parts = as_stack or stacks.is_stack(path) or _is_streamed(path, options)
    return not (is_video(job.source) or is_read_in_parts)


def _stack_options(options: DetectOptions) -> list[str]:
    """Those that were given and are of stacks only."""
    given = {
        "--axes": options.axes is not None,
        "--planes": not takes_all(options.planes),
        "--channels": options.channels != "each",
        "--level": options.level != 0,
        "--series": options.series is not None,
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


def _finish(
    begun: _Begun, detector: MapMaker, options: DetectOptions, on_part: OnPart | None, fresh: bool
) -> FileResult:
    """Detect what is not detected yet, and write."""
    job, image, blur = begun.job, begun.image, begun.blur
    if image is None and is_video(job.source):
        from semanticblur_core.inference.video import detect_video

        _require_one_range(job, options)
        _refuse_stack_options(job, options)
        return detect_video(job, detector, options, on_part, fresh=fresh)
    if image is None:
        return _detect_stack(job, detector, options, on_part, fresh)
    if blur is None:
        how: Any = {"size": options.size, "value_range": options.value_range}
        if options.size == "native" and on_part is not None:
            how["on_tile"] = on_part
        try:
            blur = detector.detect(image, **how)
        except SemanticBlurError as error:
            raise ImageError(f"{job.source}: {error}") from error
    targets, overlay = _picture_outputs(job, options, "png")
    scale = _photograph_scale(job) if {"tif", "zarr"} & set(targets) else Scale()
    if "tif" in targets and not scale.steps:
        io.write_tiff(targets["tif"], blur)
    if "npy" in targets:
        io.write_npy(targets["npy"], blur)
    described = {"tif", "zarr"} if scale.steps else {"zarr"}
    for name in sorted(described & set(targets)):
        with new_map(targets[name], blur.shape) as maps:
            maps.append(blur)
            write = stacks.write_tiff if name == "tif" else stacks.write_zarr
            write(targets[name], maps, axes="YX", scale=scale)
    _write_pictures(targets.get("png"), overlay, blur, image, options, options.value_range)
    return FileResult(
        source=job.source,
        outputs=[*targets.values(), *overlay],
        height=blur.shape[0],
        width=blur.shape[1],
        blurred_fraction=float((blur > options.threshold).mean()),
        mean_blur=float(blur.mean(dtype=np.float64)),
    )


def _photograph_scale(job: Job) -> Scale:
    """That of the image as it is read, turned upright; of others than TIFF none."""
    path = Path(job.source)
    if is_sample(job.source) or path.suffix.lower() not in io.TIFF_SUFFIXES:
        return Scale()
    scale = stacks.read_scale(path)
    orientation = io.read_orientation(path)
    if orientation == 1:
        return scale
    turned = {"X": "Y", "Y": "X"} if orientation >= 5 else {}
    sizes = {turned.get(axis, axis): size for axis, size in scale.pixel_size_um.items()}
    return Scale(sizes)  # its first pixel lies elsewhere than the file's


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


@contextmanager
def _opened(job: Job, options: DetectOptions) -> Iterator[tuple[stacks.Stack, RowMaker]]:
    """A stack, and the planes of it that are asked for."""
    path = Path(job.source)
    with stacks.open_stack(
        path, axes=options.axes, level=options.level, series=options.series
    ) as stack:
        try:
            planes = Planes(stack.array, stack.axes, stack.channel(options.channels))
            maker = RowMaker(planes, planes.box(options.planes), options)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        yield stack, maker


def divide(job: Job, options: DetectOptions, n_workers: int) -> list[range]:
    """Parts of a stack's or slide's map that several workers can make, see `detect_rows`.

    None of what is done before, cannot be done, or is too small for it: less than 8 planes or 4
    rows of tiles a part.
    """
    try:
        if is_video(job.source) or job.refusal is not None or _is_photograph(job, options):
            return []
        targets, overlay = _picture_outputs(job, options, "tif")
        if is_done([*targets.values(), *overlay], options):
            return []
        with _opened(job, options) as (_, maker):
            return maker.divide(n_workers)
    except Exception:  # told of where the file is done
        return []


def detect_rows(
    job: Job, detector: MapMaker, options: DetectOptions, rows: range, on_part: OnPart | None = None
) -> None:
    """Make some rows of a stack's map, which are kept until `detect_files` does the whole.

    Raises
    ------
    SemanticBlurError
        If that fails, as the whole will.
    """
    targets, _ = _picture_outputs(job, options, "tif")
    target = next(iter(targets.values()))
    with (
        _opened(job, options) as (_, maker),
        kept_map(target, maker.shape, maker.key(job, detector), stays=True) as maps,
    ):
        maker.make(maps, _limits(maps, maker), detector, wanted=rows, on_part=on_part)


def _limits(maps: MapFile, maker: RowMaker) -> Limits:
    """As `RowMaker.limits`, unless they are known of an earlier run or another worker."""
    found = maps.remembered("limits", maker.limits)
    return None if found is None else [(low, high) for low, high in found]


def _detect_stack(
    job: Job, detector: MapMaker, options: DetectOptions, on_part: OnPart | None, fresh: bool
) -> FileResult:
    path = Path(job.source)
    targets, overlay = _picture_outputs(job, options, "tif")
    outputs = [*targets.values(), *overlay]
    if is_done(outputs, options):
        return FileResult(job.source, outputs, skipped=True)
    with _opened(job, options) as (stack, maker):
        planes, box, shape = maker.planes, maker.box, maker.shape
        has_pictures = "png" in targets or bool(overlay)
        if has_pictures and (math.prod(shape[:-2]) > 1 or math.prod(shape) > STREAMED_PIXELS):
            raise ImageError(
                f"{path}: a stack or a large image, and pictures hold one plane in memory; use "
                "--format=tif, npy or zarr, without --overlay"
            )
        target, key = next(iter(targets.values())), maker.key(job, detector)
        with kept_map(target, shape, key, fresh=fresh) as maps:
            try:
                limits = _limits(maps, maker)
                measured = maker.make(maps, limits, detector, on_part=on_part)
                if has_pictures and measured[0].error is not None:
                    raise ImageError(measured[0].error)  # they show all of the plane
            except SemanticBlurError as error:
                raise ImageError(f"{path}: {error}") from error
            where: dict[str, Any] = {
                "axes": f"{planes.walked_axes}YX",
                "scale": stack.scale.of_part(dict(zip(planes.walked_axes, box, strict=True))),
            }
            if "tif" in targets:
                stacks.write_tiff(targets["tif"], maps, **where)
            if "zarr" in targets:
                stacks.write_zarr(targets["zarr"], maps, **where)
            if "npy" in targets:
                stacks.write_npy(targets["npy"], maps)
            if has_pictures:
                index = [axis[0] for axis in box]
                unit = planes.view(index).read_unit(limits=limits)
                ends = None if unit.dtype == np.uint8 else (0.0, 1.0)
                blur = maps.read([0] * len(box), slice(None))
                _write_pictures(targets.get("png"), overlay, blur, unit, options, ends)
    return FileResult(
        source=job.source,
        outputs=outputs,
        height=shape[-2],
        width=shape[-1],
        blurred_fraction=_mean([(p.blurred_fraction, p.n_pixels) for p in measured]),
        mean_blur=_mean([(p.mean_blur, p.n_pixels) for p in measured]),
        planes=measured,
        value_range=limits,
        unreadable_part=_unreadable_part(job, measured),
    )


def _mean(values: list[tuple[float, int]]) -> float:
    """Mean of those that are of any pixels, weighted by how many."""
    n_pixels = sum(n for _, n in values)
    return math.fsum(value * n for value, n in values if n) / n_pixels


def _unreadable_part(job: Job, planes: list[PlaneResult]) -> str | None:
    errors = [plane.error for plane in planes if plane.error is not None]
    if not errors:
        return None
    if planes[0].index == ():
        return f"{job.source}: NaN where it {errors[0]}"
    which = errors[0] if len(errors) == 1 else f"the first of them {errors[0]}"
    return f"{job.source}: NaN in {len(errors)} of {len(planes)} planes, {which}"


def _is_streamed(path: Path, options: DetectOptions) -> bool:
    """Whether a single large TIFF is to be read piece by piece."""
    if options.size != "native" or path.suffix.lower() not in io.TIFF_SUFFIXES:
        return False
    return stacks.plane_pixels(path) > STREAMED_PIXELS


def job_outputs(job: Job, options: DetectOptions) -> list[Path]:
    """The files that a job writes; its source may be looked into.

    Raises
    ------
    ImageError
        If it can have none of the formats.
    """
    if is_video(job.source):
        from semanticblur_core.inference.video import FORMATS

        return list(result_paths(job, options, "csv", FORMATS).values())
    default = "png" if _is_photograph(job, options) else "tif"
    targets, overlay = _picture_outputs(job, options, default)
    return [*targets.values(), *overlay]
