"""How much there is to compute, as far as the headers of files tell without much reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from semanticblur_core import io, stacks
from semanticblur_core.inference.choice import REMEMBERED_SIZE_PX
from semanticblur_core.inference.inputs import is_sample, is_video, load
from semanticblur_core.inference.jobs import DetectOptions, Job
from semanticblur_core.inference.planes import Planes
from semanticblur_core.inference.tiling import TileGrid

_MOST_HEADERS = 100


def count_squares(jobs: Sequence[Job], options: DetectOptions) -> float:
    """What the network will compute, in squares of 320 px: planes, frames and tiles by their area.

    A photograph that is squashed needs no look. Of the other files at most 100, spread evenly, are
    looked at and stand for the rest; a file that cannot be read counts as one plane.
    """
    unknown = [job for job in jobs if _needs_a_look(job, options)]
    known = (len(jobs) - len(unknown)) * _squares_of_plane((1, 1), options)
    seen = unknown[:: math.ceil(len(unknown) / _MOST_HEADERS) or 1]
    if not seen:
        return known
    return known + len(unknown) / len(seen) * sum(_squares_of_file(job, options) for job in seen)


def _needs_a_look(job: Job, options: DetectOptions) -> bool:
    # What is neither a photograph nor a sample may also be an array within a Zarr.
    plain = is_sample(job.source) or job.source.lower().endswith(io.PILLOW_SUFFIXES)
    return options.size == "native" or not plain


def _squares_of_file(job: Job, options: DetectOptions) -> float:
    try:
        n_planes, shape = _planes_of_file(job, options)
    except Exception:  # reported when it is its turn: counting ends no batch
        return 1.0
    return n_planes * _squares_of_plane(shape, options)


def _planes_of_file(job: Job, options: DetectOptions) -> tuple[int, tuple[int, int]]:
    """How many planes or frames, and their height and width."""
    path = Path(job.source)
    if is_sample(job.source):
        height, width = load(job.source).shape[:2]
        return 1, (height, width)
    if is_video(job.source):
        from semanticblur_core.inference.video import count_frames

        n_frames, shape = count_frames(path)
        return math.ceil(n_frames / options.every), shape
    if path.suffix.lower() not in stacks.STACK_SUFFIXES and not stacks.is_zarr(path):
        return 1, io.read_shape(path)
    with stacks.open_stack(
        path, axes=options.axes, level=options.level, series=options.series
    ) as stack:
        planes = Planes(stack.array, stack.axes, stack.channel(options.channels))
        box = planes.box(options.planes)
        return math.prod(len(axis) for axis in box), planes.plane_shape


def _squares_of_plane(shape: tuple[int, int], options: DetectOptions) -> float:
    if options.size != "native":
        return (options.size / REMEMBERED_SIZE_PX) ** 2
    grid = TileGrid(*shape)
    return len(grid) * math.prod(grid.tile_shape) / REMEMBERED_SIZE_PX**2
