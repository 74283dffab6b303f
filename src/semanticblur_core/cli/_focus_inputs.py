"""What ``semanticblur-core focus`` checks: images, and stacks of files or folders."""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo, readable
from semanticblur_core.cli._options import progress_bar
from semanticblur_core.cli._stop import Stop

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from semanticblur_core.focus.check import FocusOptions, Source
    from semanticblur_core.focus.fields import CutPlane
    from semanticblur_core.focus.stack import StackFocus
    from semanticblur_core.inference.planes import Planes
    from semanticblur_core.scale import Channels, Scale

# Of a row of fields that is kept while its fields are read.
_BAND_BYTES = 2**29
# Planes that a report shows pictures of.
_PICTURED = 24


@dataclass(frozen=True)
class StackInput:
    """A stack that is open: its planes, how to collect them, and the array of a composite."""

    sources: list[Source]
    collected: StackFocus
    value_range: tuple[float, float] | None
    array: Any
    axes: str
    scale: Scale
    channels: Channels = "each"


class Part:
    """Which planes of stacks and pyramids are checked, each as an image, or its fields of view.

    Planes are as of `open_stack`. The file that was read last stays open until another is; threads
    take turns. Close it.

    Attributes
    ----------
    cut_planes
        What was cut into fields.
    """

    def __init__(
        self,
        axes: str | None,
        channels: int | str,
        wanted: tuple[slice, ...] | None,
        level: int,
        series: int | None,
        fields: tuple[float, str] | None,
        value_range: tuple[float, float] | None,
        *,
        max_pixels: int,
        by_content: bool = False,
        with_pictures: bool = False,
    ) -> None:
        self.axes, self.channels, self.wanted = axes, channels, wanted
        self.level, self.series = level, series
        self.fields, self.value_range, self.max_pixels = fields, value_range, max_pixels
        self.cut_planes: list[CutPlane] = []
        self._by_content, self._with_pictures = by_content, with_pictures
        self._lock = threading.RLock()
        self._resources = ExitStack()
        self._opened: tuple[Path, _Opened] | None = None
        self._limits: dict[Path, Any] = {}
        self._band: tuple[Any, NDArray[Any]] | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether any of it was said."""
        return bool(self.to_dict())

    @property
    def is_of_stacks(self) -> bool:
        """Whether what was said is of stacks and pyramids alone."""
        from semanticblur_core.inference.planes import takes_all

        of_all = {"fields", "planes"} if takes_all(self.wanted) else {"fields"}
        return bool(self.to_dict().keys() - of_all)

    def to_dict(self) -> dict[str, Any]:
        """What was said of it, as JSON values."""
        said = {
            "axes": self.axes,
            "channels": None if self.channels == "each" else self.channels,
            "planes": [[part.start, part.stop] for part in self.wanted or ()] or None,
            "level": self.level or None,
            "series": self.series,
            "fields": list(self.fields) if self.fields else None,
        }
        return {name: value for name, value in said.items() if value is not None}

    def close(self) -> None:
        """Close the file that is open."""
        with self._lock:
            self._opened = self._band = None
            self._resources.close()

    def sources_of(self, path: Path, name: str) -> list[Source]:
        """What is checked of a file, each read when its turn comes.

        Raises
        ------
        ImageError
            If it cannot be opened, or has no such part.
        """
        from semanticblur_core import disk
        from semanticblur_core.errors import ImageError
        from semanticblur_core.focus.session import plane_sources

        with self._open(path) as opened:
            planes = opened.planes
            if not self.fields:
                disk.refuse_bomb(path, math.prod(planes.plane_shape), self.max_pixels)
            indices = list(itertools.product(*planes.box(self.wanted)))
            is_as_stored = str(planes.array.dtype) in ("uint8", "bool") and not self.value_range
            side = None
            with suppress(ImageError):  # of pixels that are not square; told where it is asked for
                side = opened.scale.pixel_side_um
            about: dict[str, Any] = {
                # Other planes come in 0..1, and are not to be stretched one by one.
                "value_range": None if is_as_stored and planes.channels != "mean" else (0.0, 1.0),
                "pixel_side_um": side,
                "of_file": path.is_file(),
            }
            sources = plane_sources(planes, indices, name=name, path=path)
            if not self.fields:
                return [
                    replace(each, read=functools.partial(self._read, path, each.index), **about)
                    for each in sources
                ]
            cut_planes: list[CutPlane] = []
            for each in sources:
                is_shown = self._with_pictures and len(self.cut_planes + cut_planes) < _PICTURED
                cut_planes.append(self._cut(opened, each, about, is_shown=is_shown))
        self.cut_planes += cut_planes
        return [field for plane in cut_planes for field in plane.sources]

    def _cut(
        self, opened: _Opened, plane: Source, about: dict[str, Any], *, is_shown: bool
    ) -> CutPlane:
        from rich.markup import escape

        from semanticblur_core.focus import fields
        from semanticblur_core.focus.scores import tile_size_in_px

        assert self.fields is not None
        side, unit = self.fields
        side_px = tile_size_in_px(side, about["pixel_side_um"]) if unit == "um" else side
        shape = opened.planes.plane_shape
        fields.cuts(1, side_px)  # refused before anything is read
        content = picture = None
        if self._by_content or is_shown:
            stop = Stop(at_steps=True)
            with progress_bar() as progress, stop.heeded():
                title = escape(readable(f"Looking over {plane.name}"))
                task = progress.add_task(title, total=100)

                def on_rows(share: float) -> None:
                    if stop.is_asked_for:
                        raise KeyboardInterrupt
                    progress.update(task, completed=100 * share)

                view = self._coarse_view(plane.path, opened, plane.index, on_rows)
                on_rows(1.0)
            content = fields.content_of(view) if self._by_content else None
            picture = fields.picture(view) if is_shown else None
        return fields.cut(
            plane.name,
            plane.path,
            shape,
            side_px,
            functools.partial(self._read, plane.path, plane.index),
            content=content,
            picture=picture,
            index=plane.index,
            **about,
        )

    def _coarse_view(
        self,
        path: Path,
        opened: _Opened,
        index: tuple[int, ...],
        on_rows: Callable[[float], None],
    ) -> NDArray[np.float32]:
        """Of a level that is coarse already, where there is one."""
        from semanticblur_core import stacks
        from semanticblur_core.focus.fields import COARSE_SIDE_PX, coarse_view
        from semanticblur_core.inference.planes import Planes

        limits = self._limits_of(path, opened.planes)
        for level in range(opened.n_levels - 1, self.level, -1):
            with stacks.open_stack(
                path, axes=self.axes, level=level, series=self.series
            ) as coarser:
                planes = Planes(coarser.array, coarser.axes, coarser.channel(self.channels))
                is_same = planes.lengths == opened.planes.lengths  # Z may be coarser, too
                if is_same and max(planes.plane_shape) >= COARSE_SIDE_PX:
                    return coarse_view(planes.view(index), limits, on_rows)
        return coarse_view(opened.planes.view(index), limits, on_rows)

    @contextmanager
    def _open(self, path: Path) -> Iterator[_Opened]:
        """A file, to be read while no other thread does."""
        from semanticblur_core import io, stacks
        from semanticblur_core.errors import ImageError
        from semanticblur_core.inference.inputs import load
        from semanticblur_core.inference.planes import Planes
        from semanticblur_core.scale import Scale

        with self._lock:
            if self._opened is None or self._opened[0] != path:
                self.close()
                if _is_stack_file(path):
                    opening = stacks.open_stack(
                        path, axes=self.axes, level=self.level, series=self.series
                    )
                    stack = self._resources.enter_context(opening)
                    planes = Planes(stack.array, stack.axes, stack.channel(self.channels))
                    found = _Opened(planes, stack.scale, stack.n_levels)
                elif self.is_of_stacks:
                    raise ImageError(
                        f"{path}: --axes, --channels, --planes, --level, --series: of stacks and "
                        "pyramids, which it is not; check it without"
                    )
                else:
                    pixels = io.without_alpha(load(str(path), max_pixels=self.max_pixels))
                    found = _Opened(Planes(pixels, "YXS"[: pixels.ndim]), Scale())
                self._opened = path, found
            yield self._opened[1]

    def _read(
        self,
        path: Path,
        index: tuple[int, ...],
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Any:
        """A plane or part of one, in 0..1 or as it is stored."""
        with self._open(path) as opened:
            planes = opened.planes
            view, limits = planes.view(index), self._limits_of(path, planes)
            if _is_in_strips(planes, rows, columns):
                # As wide as the plane: each is decoded once for all the fields in a row.
                key = (path, index, rows.start, rows.stop)
                if self._band is None or self._band[0] != key:
                    self._band = None
                    self._band = key, view.read(rows)
                band = self._band[1]
                stored = (
                    band[..., columns, :] if "S" in planes.axes else band[..., columns]
                ).copy()
            else:
                stored = view.read(rows, columns)
            return view.to_unit(stored, limits=limits, keep_nan=True)

    def _limits_of(self, path: Path, planes: Planes) -> Any:
        if path not in self._limits:
            given = self.value_range
            self._limits[path] = planes.as_limits(given) if given else planes.estimate_range()
        return self._limits[path]


@dataclass(frozen=True)
class _Opened:
    """A file that is open."""

    planes: Planes
    scale: Scale
    n_levels: int = 1


def _is_stack_file(path: Path) -> bool:
    from semanticblur_core import stacks

    return path.suffix.lower() in stacks.STACK_SUFFIXES or stacks.is_zarr(path)


def _is_in_strips(planes: Planes, rows: slice, columns: slice) -> bool:
    """Whether some columns are stored with many others, of which all can be kept."""
    import numpy as np

    chunks = getattr(planes.array, "chunks", None)
    if not chunks or columns.start is None:
        return False
    is_wide: bool = np.max(chunks[planes.axes.index("X")]) >= 2 * (columns.stop - columns.start)
    inside = "YXSC" if planes.channels == "mean" else "YXS"
    lengths = dict(zip(planes.axes, planes.array.shape, strict=True)) | {
        "Y": rows.stop - rows.start
    }
    n_values = math.prod(length for axis, length in lengths.items() if axis in inside)
    return is_wide and n_values * np.dtype(planes.array.dtype).itemsize <= _BAND_BYTES


def find_sources(
    inputs: tuple[str, ...],
    recursive: bool,
    max_pixels: int,
    problems: list[str] | None = None,
    part: Part | None = None,
) -> list[Source]:
    """Images of the inputs; what names none or cannot be read is told of where there are others.

    Without ``problems``, which takes those lines, the first is raised. With a ``part`` that is
    asked for, the planes of stacks and pyramids are images of their own.
    """
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.check import Source
    from semanticblur_core.inference.inputs import expand_inputs, is_of_camera
    from semanticblur_core.inference.jobs import made_of

    sources: dict[str, Source] = {}
    found: list[str] = []
    listed = list(expand_inputs(inputs, recursive, found))
    is_made = made_of(path for path, _, _ in listed)
    developed = {_frame(path) for path, _, _ in listed if not is_of_camera(Path(path))}
    made, raws = [], []
    parted: set[str] = set()
    for path, relative, named in listed:
        if not named and is_made(path):
            made.append(path)
        elif not named and is_of_camera(Path(path)) and _frame(path) in developed:
            raws.append(path)
        elif part is not None and part.is_asked_for:
            if path in parted:
                continue
            parted.add(path)
            for source in _parts_of(Path(path), relative.as_posix(), part):
                sources.setdefault(f"{path}/{source.name}", source)
        else:
            read = _reader(path, max_pixels)
            sources.setdefault(path, Source(relative.as_posix(), Path(path), read))
    for left_out, what in (
        (made, "masks or maps of the others"),
        (raws, "raw or HEIC of a frame whose picture of the same name is checked"),
    ):
        if left_out:
            n_files = f"{len(left_out)} file{'s' * (len(left_out) != 1)}"
            echo(
                f"semanticblur-core: {n_files} left out as {what}, first {left_out[0]}; named as "
                "inputs they are measured",
                err=True,
            )
    if found and (problems is None or not sources):
        raise ImageError(found[0])
    for line in found:
        echo(f"semanticblur-core: {line}", err=True)
    if problems is not None:
        problems += found
    return list(sources.values())


def _parts_of(path: Path, name: str, part: Part) -> list[Source]:
    """Planes or fields of a file; or one source that tells why there are none."""
    from semanticblur_core.errors import ImageError, SemanticBlurError
    from semanticblur_core.focus.check import Source

    def refuse(reason: str) -> Any:
        raise ImageError(reason if str(path) in reason else f"{path}: {reason}")

    try:
        return part.sources_of(path, name)
    except SemanticBlurError as error:
        return [Source(name, path, functools.partial(refuse, str(error)))]


def _frame(path: str) -> tuple[str, str]:
    """What the files have in common that a camera writes of one frame."""
    folder, name = os.path.split(path)
    return folder, Path(name).stem.casefold()


def _reader(path: str, max_pixels: int) -> Callable[[], Any] | None:
    """How what is no file of an image is read."""
    from semanticblur_core import stacks
    from semanticblur_core.inference.inputs import is_sample, load

    if is_sample(path):
        return functools.partial(load, path)
    if Path(path).suffix.lower() == ".npy" or stacks.is_zarr(Path(path)):
        return functools.partial(_read_array, Path(path), max_pixels)
    return None


def _read_array(path: Path, max_pixels: int) -> Any:
    """The one plane of a npy or Zarr."""
    from semanticblur_core import disk, stacks
    from semanticblur_core.errors import ImageError
    from semanticblur_core.inference.planes import Planes

    with stacks.open_stack(path) as opened:
        planes = Planes(opened.array, opened.axes)
        if len(planes) > 1:
            raise ImageError(
                f"{path}: a stack; --stack finds its best plane, --planes=: checks each"
            )
        disk.refuse_bomb(path, math.prod(planes.plane_shape), max_pixels)
        return planes.view((0,) * len(planes.lengths)).read()


@contextmanager
def open_stack(
    text: str,
    recursive: bool,
    axes: str | None,
    channels: Any,
    wanted: tuple[slice, ...] | None,
    level: int,
    series: int | None,
    along: str,
    options: FocusOptions,
) -> Iterator[StackInput]:
    """The planes of a folder, or of a file of any axes."""
    from semanticblur_core import disk, stacks

    path = disk.expand_home(text)
    if _is_stack_file(path):
        with stacks.open_stack(path, axes=axes, level=level, series=series) as opened:
            yield _of_file(path, opened, channels, wanted, along, options)
        return
    if axes or level or series is not None or channels != "each":
        raise click.UsageError(
            "--axes, --channels, --level and --series are of a stack's file, not of a folder"
        )
    found = find_sources((text,), recursive, options.max_pixels)
    yield _of_folder(path, found, wanted, along, options)


def _of_folder(
    path: Path,
    found: list[Source],
    wanted: tuple[slice, ...] | None,
    along: str,
    options: FocusOptions,
) -> StackInput:
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.stack import FileStack, StackFocus, in_stack_order
    from semanticblur_core.inference.planes import Planes
    from semanticblur_core.scale import Scale

    files = {source.path: source for source in found}
    ordered = in_stack_order(list(files))
    stack = FileStack(ordered, max_pixels=options.max_pixels)
    try:
        [box] = Planes(stack, stack.axes).box(wanted)
        collected = StackFocus("Z", along=along)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    return StackInput(
        sources=[
            replace(files[ordered[i]], index=(i,), read=functools.partial(stack.read, i))
            for i in box
        ],
        collected=collected,
        value_range=options.value_range or stack.estimate_range(),
        array=stack,
        axes=stack.axes,
        scale=Scale(),
    )


def _of_file(
    path: Path,
    opened: Any,
    channels: Any,
    wanted: tuple[slice, ...] | None,
    along: str,
    options: FocusOptions,
) -> StackInput:
    from semanticblur_core import disk, io
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.session import plane_sources, unit_range
    from semanticblur_core.focus.stack import StackFocus
    from semanticblur_core.inference.planes import Planes

    try:
        planes = Planes(opened.array, opened.axes, opened.channel(channels))
        box = planes.box(wanted)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    disk.refuse_bomb(path, math.prod(planes.plane_shape), options.max_pixels)
    if not planes.walked_axes:
        is_read_as_image = path.suffix.lower() in io.TIFF_SUFFIXES
        what = "check it without --stack" if is_read_as_image else "save it as tif or png"
        raise ImageError(f"{path}: holds one plane and is no stack; {what}")
    if along not in planes.walked_axes:
        raise ImageError(
            f"{path}: no axis {along} to find focus along; --along takes one of "
            f"{planes.walked_axes}, --axes names them anew"
        )
    given = options.value_range
    limits = planes.as_limits(given) if given else planes.estimate_range()

    indices = itertools.product(*box)
    sources = plane_sources(planes, indices, name=path.name, path=path, limits=limits)
    return StackInput(
        sources=sources,
        collected=StackFocus(planes.walked_axes, along=along),
        value_range=unit_range(planes, limits),
        array=opened.array,
        axes=opened.axes,
        channels=planes.channels,
        scale=opened.scale,
    )
