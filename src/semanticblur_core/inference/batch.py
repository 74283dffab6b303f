"""Files in, blur maps out: one file after the other, a bad one never stops the rest."""

from __future__ import annotations

import glob
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.overlay import draw_overlay

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

SAMPLES = {"cat": "chelsea", "coffee": "coffee", "astronaut": "astronaut"}
_RESULT_NAME = re.compile(r"_blur\.(png|tif|npy)$|_overlay\.png$")
_SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True)
class Job:
    """One input, and the stem of its outputs relative to the output folder."""

    source: str
    output_stem: str


@dataclass(frozen=True)
class DetectOptions:
    """How blur maps are made and which files are written."""

    output: Path
    size: int | Literal["native"] = 320
    threshold: float = 0.5
    formats: tuple[str, ...] = ("png",)
    overlay: bool = False
    overwrite: bool = False
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class FileResult:
    """What became of one input; ``error`` is None where it was done.

    ``mean_blur`` and ``blurred_fraction`` are in 0..1; ``elapsed_s`` covers reading, analysis and
    writing.
    """

    source: str
    outputs: list[Path] = field(default_factory=list)
    height: int = 0
    width: int = 0
    blurred_fraction: float = 0.0
    mean_blur: float = 0.0
    elapsed_s: float = 0.0
    error: str | None = None


def find_jobs(
    inputs: Iterable[str], output: Path, *, recursive: bool = False
) -> tuple[list[Job], list[str]]:
    """Images named by paths, globs, folders and ``sample:NAME``, in order, each once.

    Returns
    -------
    tuple
        The jobs, and the files that a folder or a glob named but that lie in the output folder
        under the name of a result: those are taken for results of an earlier run and left out.

    Raises
    ------
    ImageError
        If an input names nothing, a folder holds no image or cannot be read, or two inputs would
        write the same file.
    """
    found: dict[str, tuple[str, Path]] = {}
    left_out = []
    for text in inputs:
        try:
            for source, relative, named in _expand(text, recursive):
                if not named and _is_result(source, output):
                    left_out.append(source)
                    continue
                key = source if source.startswith(_SAMPLE_PREFIX) else str(Path(source).resolve())
                found.setdefault(key, (source, relative))
        except OSError as error:
            raise ImageError(f"{text}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise ImageError(f"{output}: the only images found are results of an earlier run")
    # A raw file is refused later; it must not rename the result of the JPEG beside it.
    stems = Counter(_stem(relative) for _, relative in found.values() if not _is_raw(relative))
    jobs = []
    for source, relative in found.values():
        stem = _stem(relative)
        shared = stems[stem] > 1 or _is_raw(relative)
        jobs.append(Job(source, str(relative) if shared else stem))
    names = Counter(job.output_stem for job in jobs)
    clash = next((job for job in jobs if names[job.output_stem] > 1), None)
    if clash is not None:
        raise ImageError(
            f"{clash.source}: another input would write the same {clash.output_stem}_blur file; "
            "detect them into different output folders"
        )
    return jobs, left_out


def detect_files(
    jobs: Iterable[Job], detector: Detector, options: DetectOptions
) -> Iterator[FileResult]:
    """Detect and write; yields a result per job, failed ones included. Close it to stop."""
    for job in jobs:
        start = time.perf_counter()
        try:
            result = _detect_file(job, detector, options)
        except SemanticBlurError as error:
            result = FileResult(job.source, error=str(error))
        except (MemoryError, OSError, RuntimeError) as error:  # torch's out of memory is the last
            reason = (str(error) or type(error).__name__).splitlines()[0]
            result = FileResult(job.source, error=f"{job.source}: {reason}")
        yield replace(result, elapsed_s=time.perf_counter() - start)


def _detect_file(job: Job, detector: Detector, options: DetectOptions) -> FileResult:
    base = options.output / job.output_stem
    targets = {name: base.with_name(f"{base.name}_blur.{name}") for name in options.formats}
    overlay_path = base.with_name(f"{base.name}_overlay.png")
    outputs = [*targets.values(), *([overlay_path] if options.overlay else [])]
    if not options.overwrite:
        existing = next((path for path in outputs if path.exists()), None)
        if existing is not None:
            raise ImageError(f"{existing}: exists already; --overwrite replaces it")
    image = load(job.source)
    try:
        blur = detector.detect(image, size=options.size, value_range=options.value_range)
    except SemanticBlurError as error:
        raise ImageError(f"{job.source}: {error}") from error
    if "png" in targets:
        io.write_png(targets["png"], np.round(blur * 255).astype(np.uint8))
    if "tif" in targets:
        io.write_tiff(targets["tif"], blur)
    if "npy" in targets:
        io.write_npy(targets["npy"], blur)
    if options.overlay:
        drawn = draw_overlay(
            image, blur, threshold=options.threshold, value_range=options.value_range
        )
        io.write_png(overlay_path, drawn)
    return FileResult(
        source=job.source,
        outputs=outputs,
        height=blur.shape[0],
        width=blur.shape[1],
        blurred_fraction=float((blur > options.threshold).mean()),
        mean_blur=float(blur.mean(dtype=np.float64)),
    )


def load(source: str) -> NDArray[Any]:
    """Image of a path or ``sample:NAME``."""
    if source.startswith(_SAMPLE_PREFIX):
        from skimage import data

        array: NDArray[Any] = getattr(data, SAMPLES[source.removeprefix(_SAMPLE_PREFIX)])()
        return array
    return io.read_image(Path(source))


def _expand(text: str, recursive: bool) -> Iterator[tuple[str, Path, bool]]:
    """Sources of one input, each with its path below the output folder and whether it was named."""
    if text.startswith(_SAMPLE_PREFIX):
        name = text.removeprefix(_SAMPLE_PREFIX)
        if name not in SAMPLES:
            raise ImageError(f"{text}: expected one of sample:{', sample:'.join(SAMPLES)}")
        yield text, Path(name), True
        return
    if not text.strip():
        raise ImageError("an input is empty; expected a path, a glob, a folder or sample:NAME")
    path = Path(text).expanduser()
    if path.is_dir():
        candidates = sorted(path.rglob("*") if recursive else path.iterdir())
        images = [p for p in candidates if _is_image_name(p) and p.is_file()]
        if not images:
            where = "" if recursive else "; --recursive looks into its subfolders"
            raise ImageError(f"{text}: no images in this folder{where}")
        for image in images:
            yield str(image), image.relative_to(path), False
    elif path.exists() or not glob.has_magic(text):
        # Missing and unknown files are reported by the reader, so that the rest is done.
        yield str(path), Path(path.name), True
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ImageError(f"{text}: no file matches")
        root = _fixed_part(path)
        for match in matches:
            yield str(match), match.relative_to(root), False


def _fixed_part(pattern: Path) -> Path:
    """Folder of a glob before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _stem(relative: Path) -> str:
    return str(relative.with_suffix(""))


def _is_raw(path: Path) -> bool:
    return path.suffix.lower() in io.RAW_SUFFIXES


def _is_image_name(path: Path) -> bool:
    known = (*io.IMAGE_SUFFIXES, *io.RAW_SUFFIXES)
    return path.suffix.lower() in known and not path.name.startswith(".")


def _is_result(source: str, output: Path) -> bool:
    """Whether a file lies in the output folder under one of the names given to results."""
    path = Path(source)
    return bool(_RESULT_NAME.search(path.name)) and output.resolve() in path.resolve().parents
