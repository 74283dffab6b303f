"""``semanticblur-core detect``."""

from __future__ import annotations

import functools
import json
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo, readable
from semanticblur_core.cli._options import (
    ChannelsType,
    ListType,
    PathType,
    RangesType,
    ScalesType,
    ShareType,
    SizeType,
    backend_option,
    device_option,
    flip_option,
    level_option,
    max_pixels_option,
    method_option,
    planes_option,
    precision_option,
    progress_bar,
    refuse_clashes,
    refuse_flags,
    refuse_network_flags,
    say,
    series_option,
    warn_of_squashing,
)
from semanticblur_core.cli._stop import Stop
from semanticblur_core.config import MAX_SIZE_PX

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from semanticblur_core.focus.classical import ClassicalDetector
    from semanticblur_core.inference.cluster import DetectionCluster
    from semanticblur_core.inference.detector import Detector
    from semanticblur_core.inference.jobs import DetectOptions
    from semanticblur_core.inference.results import FileResult, PlaneResult
    from semanticblur_core.inference.table import Owners, SummaryTable


@click.command(name="detect")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="PATH|GLOB|DIR|sample:NAME",
    help="Image, video, quoted glob, folder (of images and stacks), or sample:cat, sample:coffee, "
    "sample:astronaut (photographs that ship with scikit-image). May be given several times.",
)
@click.option(
    "--output",
    required=True,
    type=PathType(file_okay=False),
    help="Folder for the results; made if it is not there.",
)
@click.option("--recursive", is_flag=True, help="Look into subfolders of an input folder too.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--resume", is_flag=True, help="Skip inputs whose results are all there.")
@method_option
@click.option(
    "--model",
    default="default",
    show_default=True,
    help="Packaged model, your own, or a file.",
)
@device_option
@precision_option
@backend_option
@flip_option
@click.option(
    "--size",
    type=SizeType(),
    default=320,
    show_default=True,
    help="Side of the square the image is squashed to for analysis (320: the paper's protocol), "
    "or native. The map is brought back to the image's size.",
)
@click.option(
    "--scales",
    type=ScalesType(),
    default="1",
    show_default=True,
    help="Analyse at the size times each of these and average: 1,1.4 is better on photographs, in "
    "three times the time.",
)
@click.option(
    "--upsampling",
    type=click.Choice(["guided", "bilinear", "nearest-exact"]),
    default="guided",
    show_default=True,
    help="How a squashed image's map is brought to its size; guided follows the image's edges.",
)
@click.option(
    "--threshold",
    type=ShareType(),
    default=0.5,
    show_default=True,
    help="A pixel is blurred where the map is above it.",
)
@click.option(
    "--format",
    "formats",
    type=ListType(("png", "tif", "npy", "zarr", "csv", "json", "mp4")),
    help="png: 8 bits to look at, white = out of focus; tif, npy, zarr: float32 in 0..1. Of videos "
    "csv, json: a row a frame; mp4: the maps. Default: png, tif for stacks, csv for videos.",
)
@click.option(
    "--overlay", is_flag=True, help="Also write the photograph with its blurred part tinted."
)
@click.option(
    "--range",
    "value_ranges",
    type=RangesType(),
    help="Intensities that count as black and white, one pair, or one for each channel of a stack. "
    "Default: 0,255 for 8-bit images, else the 0.1 and 99.9 percentiles.",
)
@click.option("--axes", help="What the axes of a stack are, such as TZYX, if not as the file says.")
@planes_option
@click.option(
    "--channels",
    type=ChannelsType(),
    default="each",
    show_default=True,
    help="Channels (axis C): each of its own, mean, or one by number or name.",
)
@level_option
@series_option
@click.option(
    "--every",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of a video, each N-th frame.",
    metavar="N",
)
@max_pixels_option
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes on this machine, each with a model of its own.",
)
@click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Work on a running dask.distributed cluster instead; it sees the files under the same "
    "paths.",
)
@click.option(
    "--table",
    "table_path",
    type=PathType(dir_okay=False),
    help="Write a summary table, a row a file: .csv or .parquet.",
)
@click.option(
    "--json",
    "json_path",
    type=PathType(dir_okay=False, writes=True),
    help="Write what was measured on each file.",
)
def command(
    inputs: tuple[str, ...],
    output: Path,
    recursive: bool,
    overwrite: bool,
    resume: bool,
    method: str,
    model: str,
    device: str,
    precision: str,
    backend: str,
    flip: bool,
    size: Any,
    scales: tuple[float, ...],
    upsampling: str,
    threshold: float,
    formats: tuple[str, ...] | None,
    overlay: bool,
    value_ranges: tuple[tuple[float, float], ...] | None,
    axes: str | None,
    planes: tuple[slice, ...] | None,
    channels: Any,
    level: int,
    series: int | None,
    every: int,
    max_pixels: int,
    workers: int,
    scheduler: str | None,
    table_path: Path | None,
    json_path: Path | None,
) -> None:
    """Find what is out of focus in images.

    For each image a blur map OUTPUT/<folder>/<name>_blur.png (white = out of focus), and with
    --overlay a picture <name>_overlay.png. For a stack (TIFF, npy, Zarr) a stack of maps, for a
    video a table <name>_blur.csv of its frames. A file that cannot be read is reported, the rest
    is done, and the exit code is 2.
    """
    from semanticblur_core.errors import SemanticBlurError
    from semanticblur_core.inference.backends import is_exported
    from semanticblur_core.inference.batch import detect_files, divide
    from semanticblur_core.inference.inputs import is_video
    from semanticblur_core.inference.jobs import (
        DetectOptions,
        find_jobs,
        find_kept,
        is_result_name,
        possible_outputs,
        remove_stale_parts,
        take_back,
    )
    from semanticblur_core.inference.table import owners, require_table_format, summary_table
    from semanticblur_core.inference.workload import count_squares

    if scheduler is not None and workers > 1:
        raise click.UsageError("--workers is of this machine; --scheduler has workers of its own")
    if resume and overwrite:
        raise click.UsageError("--resume keeps results that are there, --overwrite makes them anew")
    if table_path is not None:
        require_table_format(table_path)
    refuse_network_flags(
        method, "model", "device", "precision", "backend", "flip", "size", "scales", "upsampling"
    )
    if size != "native" and scales and size * max(scales) > MAX_SIZE_PX:
        raise click.UsageError(
            f"--scales: {size} px times {max(scales):g} is more than {MAX_SIZE_PX} px"
        )
    one_range = value_ranges is not None and len(value_ranges) == 1
    options = DetectOptions(
        output,
        size=size,
        threshold=threshold,
        formats=formats,
        overlay=overlay,
        overwrite=overwrite,
        resume=resume,
        value_range=value_ranges[0] if value_ranges and one_range else None,
        channel_ranges=None if one_range else value_ranges,
        axes=axes,
        channels=channels,
        planes=planes,
        level=level,
        series=series,
        every=every,
        max_pixels=max_pixels,
    )
    problems: list[str] = []
    jobs, left_out = find_jobs(
        inputs, output, recursive=recursive, on_problem=problems.append, options=options
    )
    if not any(is_video(job.source) for job in jobs):
        refuse_flags("of videos, and no input is one", "every")
    reports = {"--table": table_path, "--json": json_path}
    suspects = any(path and is_result_name(path.name) for path in reports.values())
    refuse_clashes(
        reports,
        (Path(job.source) for job in jobs),
        (path for job in (jobs if suspects else []) for path in possible_outputs(job, options)),
    )
    for flag, path in reports.items():
        if path is not None and path.is_file() and not (overwrite or resume):
            raise click.UsageError(
                f"{flag}={path}: exists already; --resume goes on with it, --overwrite replaces it"
            )
    for problem in problems:
        echo(f"semanticblur-core: {problem}", err=True)
    if left_out:
        echo(
            f"{len(left_out)} file{'s' * (len(left_out) != 1)} left out, named as masks or maps "
            f"of others, first {left_out[0]}; named as inputs they are detected"
        )

    if scheduler is None and workers > len(jobs):
        n = sum(len(divide(job, options, workers)) or 1 for job in jobs)
        if n < workers:
            n = max(1, n)
            echo(f"workers needed: {n} of {workers}")
            workers = n
    if scheduler is not None and Path(model).is_file():
        model = str(Path(model).absolute())  # workers are in folders of their own
    alone = scheduler is None and workers == 1
    if not alone and backend == "auto" and not is_exported(model):
        backend = "torch"  # the same in every worker, whatever was measured on its machine
    if workers > 1 and method == "network" and backend in ("torch", "compile"):
        from semanticblur_core.device import settle_precision

        precision = settle_precision(device, precision)
    make = functools.partial(
        _make_detector,
        method,
        model,
        device=device,
        precision=precision,
        flip=flip,
        backend=backend,
        n_images=count_squares(jobs, options) if backend == "auto" and alone else len(jobs),
        upsampling=upsampling,
        scales=scales,
    )
    results, n_failed, n_skipped, lacks_parts = [], 0, 0, False
    detector: Any = SimpleNamespace(name=model, reason="no worker answered")
    if method != "network" or alone:
        detector = make()
    with ExitStack() as resources:
        stop = Stop()
        resources.enter_context(stop.heeded())
        progress = resources.enter_context(progress_bar())
        table = None
        if table_path is not None:
            settings = {
                "model": model if method == "network" else method,
                "size": str(size) if method == "network" else "",
                "threshold": threshold,
                "planes": json.dumps(_of_stacks(options)) if _of_stacks(options) else "",
            }
            table = resources.enter_context(
                summary_table(table_path, resume=resume, settings=settings)
            )
        earlier = _read_images(json_path) if json_path is not None and resume else {}
        claims = owners(earlier)
        for output_place, named in (table.claims if table is not None else {}).items():
            claims.setdefault(output_place, {}).update(named)
        task = progress.add_task("Detecting", total=len(jobs))
        bars = _FileBars(progress)
        cluster, is_begun, is_whole, begun_at = None, True, False, time.time() - 1
        try:
            if alone:
                remove_stale_parts(jobs, options, keep=resume)
                coming = detect_files(jobs, detector, options, on_progress=bars.advance)
            else:
                cluster = resources.enter_context(_open_cluster(make, workers, scheduler))
                coming = resources.enter_context(
                    closing(cluster.detect_files(jobs, options, on_progress=bars.advance))
                )
            for found in stop.each(coming):
                result = _unless_of_another(found, claims)
                if result.skipped:
                    result = replace(
                        result, unreadable_part=_unreadable_before(result, table, earlier)
                    )
                n_failed += result.error is not None
                lacks_parts |= result.unreadable_part is not None
                n_skipped += result.skipped
                if table is not None:
                    try:
                        table.add(result)
                    except SemanticBlurError:
                        if result.error is None and not result.skipped:
                            take_back(result.outputs)
                        raise
                if json_path is not None:
                    results.append(result)
                progress.advance(task)
                bars.remove(result.source)
                _report(result, progress, quiet=progress.console.is_terminal and len(jobs) > 1)
                if method == "network" and isinstance(size, int):
                    warn_of_squashing(progress, result.source, result.width, result.height)
            is_whole = True
        except SemanticBlurError:
            is_begun = alone or cluster is not None
            raise
        finally:
            if cluster is not None and cluster.detector is not None and method == "network":
                detector = cluster.detector
            if n_failed or not is_whole:
                _tell_of_kept(find_kept(jobs, options, since=begun_at), progress)
            # Written after an interruption too: it tells what was done.
            if json_path is not None and is_begun:
                _write_json(json_path, results, detector, options, earlier, is_whole=is_whole)
    if table is not None and table_path is not None and json_path is None:
        if table.n_of_other_settings:
            _tell_of_other_settings(table.n_of_other_settings, table_path)
        if table.n_unknown:
            _tell_of_unknown(table.n_unknown, table_path)
    if len(jobs) > 1:
        kept = f", {n_skipped} of them before" if n_skipped else ""
        echo(f"{len(jobs) - n_failed} of {len(jobs)} images done{kept} ({detector.reason})")
    if n_failed or lacks_parts or problems:
        raise SystemExit(2)


def _open_cluster(
    make: functools.partial[Any], workers: int, scheduler: str | None
) -> DetectionCluster:
    from semanticblur_core.inference.cluster import DetectionCluster

    if scheduler is None:
        return DetectionCluster(make, n_workers=workers)
    cluster = DetectionCluster(make, scheduler=scheduler)
    n_threads = cluster.count_threads()
    echo(
        f"{n_threads} worker threads at {scheduler}"
        if n_threads
        else f"no worker at {scheduler} yet, waiting for one"
    )
    return cluster


def _make_detector(method: str, model: str, **how: Any) -> Detector | ClassicalDetector:
    if method != "network":
        from semanticblur_core.focus.classical import ClassicalDetector

        return ClassicalDetector(method)
    from semanticblur_core.inference.detector import Detector

    detector = Detector(model, **how)
    if detector.backend in ("torch", "compile"):
        from semanticblur_core.device import keep_freed_memory

        keep_freed_memory()
    return detector


class _FileBars:
    """Bars of the files that take long, below that of all; told of by any thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def advance(self, source: str, n_done: int, n_all: int) -> None:
        """Of a file so much is done, of so much."""
        from rich.markup import escape

        with self._lock:
            if source not in self._bars:
                name = escape(readable(Path(source).name))
                self._bars[source] = self._progress.add_task(f"  {name}, %", total=100)
            percent = 100 * n_done // max(1, n_all)
            self._progress.update(self._bars[source], completed=percent)

    def remove(self, source: str) -> None:
        """A file is over."""
        with self._lock:
            if source in self._bars:
                self._progress.remove_task(self._bars.pop(source))


def _tell_of_kept(kept: list[Path], progress: Progress) -> None:
    if not kept:
        return
    n_bytes = 0
    with suppress(OSError):  # another run goes on with it
        n_bytes = sum(path.stat().st_size for folder in kept for path in folder.iterdir())
    which = f"{kept[0]}{f' and {len(kept) - 1} more' if len(kept) > 1 else ''}"
    say(
        progress,
        f"semanticblur-core: what is made of a map so far is kept, {n_bytes / 2**20:,.1f} MiB in "
        f"{which}: --resume goes on with it, a run without --resume deletes it",
        err=True,
    )


def _report(result: FileResult, progress: Progress, *, quiet: bool) -> None:
    if result.unreadable_part is not None:
        say(progress, f"semanticblur-core: {result.unreadable_part}", err=True)
    if result.error is not None:
        say(progress, f"semanticblur-core: {result.error}", err=True)
    elif result.skipped:
        say(progress, f"{result.source}: done before")
    elif not quiet:
        say(
            progress,
            f"{result.source}: {result.blurred_fraction:.1%} out of focus, mean blur "
            f"{result.mean_blur:.3f}, {result.elapsed_s:.2f} s -> "
            f"{', '.join(str(path) for path in result.outputs)}",
        )


def _unreadable_before(
    result: FileResult, table: SummaryTable | None, earlier: dict[str, dict[str, Any]]
) -> str | None:
    """What was missing, as the reports of the run say that made a result."""
    from semanticblur_core.inference.table import place

    told = None if table is None else table.unreadable_part(result.source)
    return told or earlier.get(place(result.source), {}).get("unreadable_part")


def _unless_of_another(result: FileResult, claims: Owners) -> FileResult:
    """Where a file is skipped because of results that are another's by name: a failure."""
    from semanticblur_core.inference.table import other_owner

    found = other_owner(result, claims) if result.skipped else None
    if found is None:
        return result
    error = f"{found[0]} is the result of {found[1]}; detect it into another output folder"
    return replace(result, error=f"{result.source}: {error}", skipped=False, outputs=[])


def _write_json(
    path: Path,
    results: list[FileResult],
    detector: Any,
    options: DetectOptions,
    earlier: dict[str, dict[str, Any]],
    *,
    is_whole: bool,
) -> None:
    """What was measured, on resume before too; ``detector`` or what is known of a worker's."""
    from semanticblur_core import __version__, disk
    from semanticblur_core.inference.table import place, still_holds

    protocol: dict[str, Any] = {
        "blurred_is": f"map > {options.threshold:g}",
        "value_range": options.channel_ranges or options.value_range,
        **_of_stacks(options),
    }
    if hasattr(detector, "backend"):  # hand-crafted methods have none
        protocol |= {
            "size": options.size,
            "scales": detector.scales,
            "map_resize": detector.upsampling,
            "flip": detector.flip,
            "backend": detector.backend,
            "device": detector.device,
            "precision": detector.precision,
        }
    settings = {
        "model_sha256": getattr(detector, "sha256", None),
        "protocol": json.loads(json.dumps(protocol)),
    }
    images, n_other, n_unknown = [], 0, 0
    for result in results:
        before = earlier.pop(place(result.source), None)
        if result.error is None and not result.skipped:
            images.append(_image(result, detector, options))
        elif before and still_holds(before, result):
            if result.skipped:
                outputs = [str(output) for output in result.outputs]
                before |= {"input": result.source, "outputs": outputs}
            images.append(_without(before, settings))
            n_other += result.skipped and not settings.keys().isdisjoint(images[-1])
        else:
            n_unknown += result.skipped
    # Files that a stopped run did not come to, or that are no inputs of this one; but for those
    # whose results are of others now.
    done = [r for r in results if r.error is None and not r.skipped]
    written = {place(output) for result in done for output in result.outputs}
    images += [
        _without(image, settings)
        for image in earlier.values()
        if written.isdisjoint(map(place, image["outputs"]))
    ]
    if n_other:
        _tell_of_other_settings(n_other, path)
    if n_unknown:
        _tell_of_unknown(n_unknown, path)
    document = {
        "software": f"napari-semanticblur {__version__}",
        "model": detector.name,
        **settings,
        "interrupted": not is_whole,
        "images": images,
        "skipped": [result.source for result in results if result.skipped],
        "failures": [{"input": r.source, "error": r.error} for r in results if r.error is not None],
    }
    disk.write_text(path, json.dumps(document, indent=1) + "\n")


def _of_stacks(options: DetectOptions) -> dict[str, Any]:
    """Which planes of stacks and videos are meant, as far as that was said."""
    planes = [
        f"{part.start or 0}:{'' if part.stop is None else part.stop}"
        for part in options.planes or ()
    ]
    said = {
        "axes": options.axes,
        "channels": None if options.channels == "each" else options.channels,
        "planes": planes or None,
        "level": options.level or None,
        "series": options.series,
        "every": None if options.every == 1 else options.every,
    }
    return {name: value for name, value in said.items() if value is not None}


def _tell_of_unknown(n_files: int, place: Path) -> None:
    echo(
        f"{n_files} of the files done before have no numbers in {place}: the run that made them "
        "was ended before it told of them; --overwrite measures anew"
    )


def _tell_of_other_settings(n_files: int, kept_in: Path | None) -> None:
    echo(
        f"{n_files} of the files done before were made with other settings, which {kept_in} keeps "
        "beside each"
    )


def _image(result: FileResult, detector: Any, options: DetectOptions) -> dict[str, Any]:
    return {
        "input": result.source,
        "outputs": [str(output) for output in result.outputs],
        "height": result.height,
        "width": result.width,
        "blurred_fraction": result.blurred_fraction,
        "mean_blur": result.mean_blur,
        "threshold": options.threshold,
        "model": detector.name,
        "elapsed_s": result.elapsed_s,
        **({"value_range": result.value_range} if result.value_range else {}),
        **({"unreadable_part": result.unreadable_part} if result.unreadable_part else {}),
        **({"planes": list(map(_plane, result.planes))} if result.planes else {}),
    }


def _plane(plane: PlaneResult) -> dict[str, Any]:
    if not plane.n_pixels:
        return {"index": plane.index, "error": plane.error}
    untold = ("n_pixels", "error") if plane.error is None else ()
    return {name: value for name, value in asdict(plane).items() if name not in untold}


def _without(image: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Without those settings of its own that are the document's."""
    return {
        name: value
        for name, value in image.items()
        if name not in settings or value != settings[name]
    }


def _read_images(path: Path) -> dict[str, dict[str, Any]]:
    """Images of an earlier run's file by `place`, each with the settings that it was made with.

    None where there is no such file.
    """
    from semanticblur_core.inference.table import place

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        images = document["images"]
        common = {name: document.get(name) for name in ("model_sha256", "protocol")}
        return {place(image["input"]): common | image for image in images if "outputs" in image}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
