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

if TYPE_CHECKING:
    from semanticblur_core.focus.check import FocusOptions, Source
    from semanticblur_core.focus.stack import StackFocus
    from semanticblur_core.inference.planes import Planes
    from semanticblur_core.scale import Channels, Scale


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
    """Which planes of stacks and pyramids are checked, each as an image; as of `open_stack`.

    The stack that was read last stays open until another is; threads take turns. Close it.
    """

    def __init__(
        self,
        axes: str | None,
        channels: int | str,
        wanted: tuple[slice, ...] | None,
        level: int,
        value_range: tuple[float, float] | None,
    ) -> None:
        self.axes, self.channels, self.wanted, self.level = axes, channels, wanted, level
        self.value_range = value_range
        self._lock = threading.RLock()
        self._resources = ExitStack()
        self._opened: tuple[Path, Planes, Scale] | None = None
        self._limits: dict[Path, Any] = {}

    @property
    def is_asked_for(self) -> bool:
        """Whether any of it was said."""
        return bool(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What was said of it, as JSON values."""
        said = {
            "axes": self.axes,
            "channels": None if self.channels == "each" else self.channels,
            "planes": [[part.start, part.stop] for part in self.wanted or ()] or None,
            "level": self.level or None,
        }
        return {name: value for name, value in said.items() if value is not None}

    def close(self) -> None:
        """Close the stack that is open."""
        with self._lock:
            self._opened = None
            self._resources.close()

    @contextmanager
    def opened(self, path: Path) -> Iterator[tuple[Planes, Scale]]:
        """The planes of a file, to be read while no other thread does."""
        from semanticblur_core import stacks
        from semanticblur_core.inference.planes import Planes

        with self._lock:
            if self._opened is None or self._opened[0] != path:
                self.close()
                opening = stacks.open_stack(path, axes=self.axes, level=self.level)
                stack = self._resources.enter_context(opening)
                planes = Planes(stack.array, stack.axes, stack.channel(self.channels))
                self._opened = path, planes, stack.scale
            yield self._opened[1:]

    def read(self, path: Path, index: tuple[int, ...]) -> Any:
        """One plane, in 0..1 or as it is stored."""
        with self.opened(path) as (planes, _):
            if path not in self._limits:
                given = self.value_range
                limits = planes.as_limits(given) if given else planes.estimate_range()
                self._limits[path] = limits
            return planes.view(index).read_unit(limits=self._limits[path])


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
    for path, relative, named in listed:
        if not named and is_made(path):
            made.append(path)
        elif not named and is_of_camera(Path(path)) and _frame(path) in developed:
            raws.append(path)
        elif part is not None and part.is_asked_for:
            for source in _planes_of(Path(path), relative.as_posix(), part, max_pixels):
                sources.setdefault(f"{path}{source.index}", source)
        else:
            read = _reader(path, max_pixels)
            sources.setdefault(path, Source(relative.as_posix(), Path(path), read))
    for left_out, what in (
        (made, "masks or maps of the others"),
        (raws, "raw or HEIC of a frame whose picture of the same name is checked"),
    ):
        if left_out:
            n_files = f"{len(left_out)} file{'s' * (len(left_out) != 1)}"
            click.echo(
                f"semanticblur-core: {n_files} left out as {what}, first {left_out[0]}; named as "
                "inputs they are measured",
                err=True,
            )
    if found and (problems is None or not sources):
        raise ImageError(found[0])
    for line in found:
        click.echo(f"semanticblur-core: {line}", err=True)
    if problems is not None:
        problems += found
    return list(sources.values())


def _planes_of(path: Path, name: str, part: Part, max_pixels: int) -> Iterator[Source]:
    """The planes of a stack or pyramid, each read when its turn comes; one that tells why not."""
    from semanticblur_core import disk, stacks
    from semanticblur_core.errors import ImageError, SemanticBlurError
    from semanticblur_core.focus.check import Source
    from semanticblur_core.focus.session import plane_sources

    def refuse(reason: str) -> Any:
        raise ImageError(reason if str(path) in reason else f"{path}: {reason}")

    try:
        if path.suffix.lower() not in stacks.STACK_SUFFIXES and not stacks.is_zarr(path):
            raise ImageError(
                f"{path}: --axes, --channels, --planes, --level: of stacks and pyramids, which it "
                "is not; check it without"
            )
        with part.opened(path) as (planes, scale):
            disk.refuse_bomb(path, math.prod(planes.plane_shape), max_pixels)
            indices = list(itertools.product(*planes.box(part.wanted)))
            is_as_stored = str(planes.array.dtype) in ("uint8", "bool") and not part.value_range
            named = plane_sources(planes, indices, name=name, path=path)
    except SemanticBlurError as error:
        yield Source(name, path, functools.partial(refuse, str(error)))
        return
    side = None
    with suppress(ImageError):  # of pixels that are not square; told where tiles are asked for
        side = scale.pixel_side_um
    for source in named:
        yield replace(
            source,
            read=functools.partial(part.read, path, source.index),
            # Other planes come in 0..1, and are not to be stretched one by one.
            value_range=None if is_as_stored and planes.channels != "mean" else (0.0, 1.0),
            pixel_side_um=side,
        )


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
    along: str,
    options: FocusOptions,
) -> Iterator[StackInput]:
    """The planes of a folder, or of a file of any axes."""
    from semanticblur_core import disk, stacks

    path = disk.expand_home(text)
    if path.suffix.lower() in stacks.STACK_SUFFIXES or stacks.is_zarr(path):
        with stacks.open_stack(path, axes=axes, level=level) as opened:
            yield _of_file(path, opened, channels, wanted, along, options)
        return
    if axes or level or channels != "each":
        raise click.UsageError(
            "--axes, --channels and --level are of a stack's file, not of a folder"
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
