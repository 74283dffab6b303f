"""What is to be detected and how, and the files that come of it."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from semanticblur_core import disk, io, stacks
from semanticblur_core.config import require_share
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.inputs import expand_inputs, is_of_camera, is_sample
from semanticblur_core.maps import is_kept, tidy_unused

_log = logging.getLogger(__name__)
# Of a million files not all are opened for this: after so many that are whole, all are taken to be.
_WHOLE_OF_ALL = 100
_RESULT_FORMATS = ("png", "tif", "npy", "zarr", "csv", "json", "mp4")
_OF_PLANE = re.compile(r"\[[A-Z]=\d+(,[A-Z]=\d+)*\]$")
_OF_SERIES = re.compile(r"_series\d+$")
_RESULT_NAME = re.compile(rf"_blur\.({'|'.join(_RESULT_FORMATS)})$|_overlay\.png$")
_PART = re.compile(r"^\.(.+)\.[0-9a-f]{8}(\.map)?\.part$")


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

    Results go to the folder ``output``; those that are there are an error, unless ``overwrite``
    replaces them or ``resume`` keeps them. ``size`` is the side in pixels that images are squashed
    to, or native; a pixel is blurred where its map is above ``threshold``, 0..1. ``overlay`` also
    writes the picture, tinted. ``value_range`` are the intensities that count as black and white,
    ``channel_ranges`` those of each channel of a stack.

    ``formats`` None is png for an image, tif for a stack and csv for a video; each takes those that
    are for its kind. ``axes``, ``channels``, ``planes`` and ``level`` say what a stack is and which
    planes of it are wanted: a slice for each walked axis, for the last ones where there are fewer;
    ``series`` is the image of a TIFF that holds several.
    ``every`` is the step between frames of a video. Images, planes and frames of more than
    ``max_pixels`` are not read into memory.

    Raises
    ------
    ConfigError
        If the threshold is no share, or the step below 1.
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
    channels: int | str = "each"
    planes: tuple[slice, ...] | None = None
    level: int = 0
    series: int | None = None
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


def find_jobs(
    inputs: Iterable[str | Path],
    output: Path,
    *,
    recursive: bool = False,
    on_problem: Callable[[str], None] | None = None,
    options: DetectOptions | None = None,
) -> tuple[list[Job], list[str]]:
    """Images named by paths, globs, folders and ``sample:NAME``, in order, each once.

    Parameters
    ----------
    inputs, output, recursive
        As of ``semanticblur-core detect``.
    on_problem
        Called with a line for each input that names nothing and each folder that cannot be read,
        where there are others; without it the first of them is raised.
    options
        Formats that will be written; without them any might be.

    Returns
    -------
    tuple
        The jobs, and the files that a folder or a glob named but that lie in the output folder
        under the name of a result, or are named as a mask or map of another one, see `made_of`:
        those are taken for results of an earlier run and left out. A job that would write the file
        of one before it, or might write that of an input, is refused.

    Raises
    ------
    ImageError
        If an input names nothing, or a folder holds no image or cannot be read.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    problems: list[str] = []
    expanded = list(expand_inputs(map(str, inputs), recursive, problems, arrays=True))
    is_made = made_of(source for source, _, _ in expanded)
    found: dict[str, tuple[str, Path]] = {}
    left_out: list[str] = []
    listed: dict[str, None] = {}
    place = _placer()
    for source, relative, named in expanded:
        if not named and (_is_result(source, output) or is_made(source)):
            left_out.append(source)
            continue
        key = source if is_sample(source) else place(source)
        if not named:
            listed[key] = None
        _, before = found.setdefault(key, (source, relative))
        if len(relative.parts) < len(before.parts):  # not by way of a circle of links
            found[key] = (source, relative)
    for problem in problems:
        if on_problem is None or not (found or left_out):
            raise ImageError(problem)
        on_problem(problem)
    if not found:
        raise ImageError(f"{output}: the only images found are results of an earlier run")
    later, n_whole = list[str](), 0
    for key in listed:
        path = Path(found[key][0])
        if stacks.is_ome_tiff(path) and n_whole < _WHOLE_OF_ALL:
            first = stacks.first_file(path)
            if first is not None and place(str(first)) in found:
                later.append(key)
            n_whole += not later
    if later:
        _log.info(
            "%d files left out, whose images begin in others of these (one OME-TIFF in several "
            "files); the first is %s",
            len(later),
            found[later[0]][0],
        )
    for key in later:
        del found[key]
    # A raw file must not rename the result of the JPEG beside it, and keeps its own name without.
    places = {relative for _, relative in found.values() if not is_of_camera(relative)}
    stems = Counter(map(_stem, places))
    jobs = []
    series = "" if options is None or options.series is None else f"_series{options.series}"
    for source, relative in found.values():
        stem = _stem(relative)
        shared = stems[stem] > 1 or is_of_camera(relative)
        jobs.append(Job(source, f"{relative if shared else stem}{series}"))
    return list(_without_clashes(jobs, output, options)), left_out


def _placer() -> Callable[[str], str]:
    """Function that tells files apart: links to folders are followed, those to files are not."""
    real = functools.cache(os.path.realpath)

    def place(source: str) -> str:
        folder, name = os.path.split(source)
        return os.path.join(real(folder or os.curdir), name)  # noqa: PTH118

    return place


def _without_clashes(
    jobs: Sequence[Job], output: Path, options: DetectOptions | None
) -> Iterator[Job]:
    """The jobs, those refused that would write the file of another or the place of an input."""
    named_as_results = {
        os.path.realpath(job.source): job.source
        for job in jobs
        if is_result_name(Path(job.source).name)
    }
    # By the name first: there may be a million outputs, and each look at the disk takes its time.
    names = {Path(path).name for path in named_as_results}
    if options is None:
        options = DetectOptions(output, formats=_RESULT_FORMATS, overlay=True)
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
        for path in possible_outputs(job, options) if names else ():
            taken = named_as_results.get(os.path.realpath(path)) if path.name in names else None
            if taken is not None:
                refusal = f"its result would take the place of {taken}, an input; detect it into "
                job = replace(job, refusal=f"{refusal}another output folder")
                break
        yield job


def _stem(relative: Path) -> str:
    has_name = relative.stem.strip(".") != ""
    return str(relative.with_suffix("") if has_name else relative)


def _is_result(source: str, output: Path) -> bool:
    """Whether a file lies in the output folder under one of the names given to results."""
    if not is_result_name(Path(source).name):
        return False
    return Path(os.path.realpath(output)) in Path(os.path.realpath(source)).parents


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


def take_back(outputs: Iterable[Path]) -> None:
    """Delete results that no report will tell of, so that they are made again."""
    for path in outputs:
        with suppress(OSError):
            disk.remove(path)


def is_result_name(name: str) -> bool:
    """Whether it is a name that results have."""
    return bool(_RESULT_NAME.search(name))


def made_of(paths: Iterable[str]) -> Callable[[str], bool]:
    """Tells which of some files are named as the mask or a map of another of them.

    Masks are called ``NAME.EXT.png``, those of planes ``NAME.EXT[Z=3].png``, and lie anywhere.
    Maps, ``NAME_blur.png``, ``NAME.EXT_blur.png``, ``NAME_series1_blur.tif`` and so on, lie in the
    folder of the other or below it: elsewhere they may be images of their own, as in collections
    for deblurring.
    """
    names, places = set[str](), set[tuple[str, str]]()
    for path in paths:
        folder, name = os.path.split(path)
        folder = folder or os.curdir
        names.add(name)
        places |= {(folder, name), (folder, os.path.splitext(name)[0])}  # noqa: PTH122

    def is_made(path: str) -> bool:
        folder, name = os.path.split(path)
        if name.endswith(".png") and _OF_PLANE.sub("", name.removesuffix(".png")) in names:
            return True
        if not is_result_name(name):
            return False
        origin, here = name.rpartition("_")[0], Path(folder)
        origins = (origin, _OF_SERIES.sub("", origin))
        return any((str(above), o) in places for above in (here, *here.parents) for o in origins)

    return is_made


def remove_stale_parts(jobs: Iterable[Job], options: DetectOptions, *, keep: bool = False) -> None:
    """Delete what killed runs had begun to write under the names of these jobs' results.

    What a process that lives is writing stays, and what the system cannot tell from it. With
    ``keep`` so does what `find_kept` finds, unless the results are there.
    """
    for entry, job in _parts(jobs, options):
        path = Path(entry.path)
        if keep and is_kept(path) and not _has_results(job, options):
            tidy_unused(path)
        else:
            disk.remove_if_stale(path)


def find_kept(
    jobs: Iterable[Job], options: DetectOptions, *, since: float = -math.inf
) -> list[Path]:
    """Folders with what was made of these jobs since a time, with which ``resume`` goes on."""
    found = [Path(entry.path) for entry, _ in _parts(jobs, options)]
    return sorted(p for p in found if is_kept(p) and p.stat().st_mtime >= since)


def _has_results(job: Job, options: DetectOptions) -> bool:
    """Whether the results are there, so far as that is known without a look at the source."""
    there = [path.exists() for path in possible_outputs(job, options)]
    return any(there) if options.formats is None else all(there)


def _parts(jobs: Iterable[Job], options: DetectOptions) -> Iterator[tuple[os.DirEntry[str], Job]]:
    """Temporary files and folders under the names of these jobs' results."""
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        by_folder.setdefault((options.output / job.output_stem).parent, []).append(job)
    for folder, own in by_folder.items():
        with suppress(OSError):
            parts = [entry for entry in os.scandir(folder) if _part_of(entry)]
            # Names are made only where something is left behind: there may be a million.
            wanted = {
                disk.shortened(name): job
                for job in (own if parts else [])
                for path in possible_outputs(job, options)
                for name in (path.name, path.stem)  # what is kept may become any format
            }
            for entry in parts:
                if _part_of(entry) in wanted:
                    yield entry, wanted[_part_of(entry)]


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
    # Of no bytes is what a power cut or a bad copy leaves.
    if options.resume and len(existing) == len(outputs) and all(p.stat().st_size for p in outputs):
        return True
    if existing and not (options.overwrite or options.resume):
        raise ImageError(
            f"{existing[0]}: exists already; --overwrite replaces it, --resume keeps it"
        )
    return False
