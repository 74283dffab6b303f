"""Images named by paths, globs and folders, and the samples."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk, io, stacks
from semanticblur_core.data.squash import squash
from semanticblur_core.errors import ImageError

SAMPLES = {"cat": "chelsea", "coffee": "coffee", "astronaut": "astronaut"}
_SAMPLE_PREFIX = "sample:"
# What a formula begins with in a table that a spreadsheet opens.
OF_FORMULAS = ("=", "+", "-", "@")


def is_sample(source: str) -> bool:
    """Whether a source is ``sample:NAME`` and no file."""
    return source.startswith(_SAMPLE_PREFIX)


def is_video(source: str) -> bool:
    """Whether a source is a video, by its name."""
    return Path(source).suffix.lower() in io.VIDEO_SUFFIXES


def load(source: str, *, max_pixels: int = io.MAX_PIXELS) -> NDArray[Any]:
    """Image of a path, of at most so many pixels, or ``sample:NAME``.

    Raises
    ------
    ImageError
        If there is no such sample, or the file cannot be read.
    """
    if is_sample(source):
        from skimage import data

        array: NDArray[Any] = getattr(data, SAMPLES[_sample_name(source)])()
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
    if is_sample(text):
        yield text, Path(_sample_name(text)), True
        return
    if not text.strip():
        raise ImageError("an input is empty; expected a path, a glob, a folder or sample:NAME")
    path = disk.expand_home(text)
    if stacks.is_zarr(path):
        for source, relative in _with_fields(path, _zarr_name(path)):
            yield source, relative, True
        return
    if path.is_dir():
        images = [p for p in _entries(path, recursive, on_error) if _is_image(p, arrays)]
        if not images:
            where = "" if recursive else "; --recursive looks into its subfolders"
            video = next((p for p in path.iterdir() if is_video(p.name)), None)
            if video is not None and arrays:
                where = f"; videos are taken by name or by a glob, '{path}/*{video.suffix}'"
            raise ImageError(f"{text}: no images in this folder{where}")
        for image in images:
            for source, relative in _with_fields(image, image.relative_to(path)):
                yield source, relative, False
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
            for source, relative in _with_fields(match, match.relative_to(root)):
                yield source, relative, False


def _with_fields(path: Path, relative: Path) -> Iterator[tuple[str, Path]]:
    """A source and its path below the output folder; of a plate, those of its fields."""
    fields = stacks.plate_images(path) if path.is_dir() else []
    for field in fields:
        parts = (relative.stem, *field.relative_to(path).parts)
        yield _source(field), relative.with_name(f"{'_'.join(parts)}.zarr")
    if not fields:
        yield _source(path), relative


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


def _zarr_name(path: Path) -> Path:
    """Name of a Zarr; of a level or array within one, that and its own."""
    names = [path.name]
    # The rows of a plate need not be groups.
    while stacks.is_zarr(path.parent) or stacks.is_zarr(path.parent.parent):
        path = path.parent
        names.insert(0, path.stem)
    # So that the stem is all of it, dots included.
    return Path(path.name if len(names) == 1 else f"{'_'.join(names)}.zarr")


def _sample_name(source: str) -> str:
    name = source.removeprefix(_SAMPLE_PREFIX)
    if name not in SAMPLES:
        raise ImageError(f"{source}: expected one of sample:{', sample:'.join(SAMPLES)}")
    return name


def _source(path: Path) -> str:
    """As text that is taken for no sample, nor by a spreadsheet for a formula."""
    text = str(path)
    return f".{os.sep}{text}" if is_sample(text) or text.startswith(OF_FORMULAS) else text


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


def is_of_camera(path: Path) -> bool:
    """Whether it is named as camera raw or HEIC, which often lies beside a JPEG of its name."""
    return path.suffix.lower() in io.CAMERA_SUFFIXES


def _is_image(path: Path, arrays: bool) -> bool:
    if path.name.startswith("."):
        return False
    known = (*io.IMAGE_SUFFIXES, *io.CAMERA_SUFFIXES, *([".npy"] if arrays else []))
    is_file = path.suffix.lower() in known and _is_file_or_lost(path)
    return is_file or (arrays and stacks.is_zarr(path))


def _is_file_or_lost(path: Path) -> bool:
    """A file, or what is none, such as a link that leads nowhere, which the reader reports."""
    return not path.is_dir()
