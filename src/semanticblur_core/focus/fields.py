"""Planes of any size, cut into fields of view that are checked as images of their own.

A slide of gigapixels is never read whole: fields come one by one, and where its content lies is
told from a coarse view.
"""

from __future__ import annotations

import base64
import functools
import io as streams
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semanticblur_core.errors import ImageError
from semanticblur_core.focus.check import Field, ImageFocus, Source
from semanticblur_core.focus.classical import as_grey
from semanticblur_core.focus.scores import content_mask, tile_means
from semanticblur_core.focus.session import unit_range
from semanticblur_core.inference.planes import Channels, Planes, PlaneView

Bools = NDArray[np.bool_]
Limits = Sequence[tuple[float, float]] | None
Place = tuple[int, int]  # first and end

# Smaller fields show the network too little.
SMALLEST_FIELD_PX = 64
# Longer side of a coarse view, at least that of half as many pixels.
COARSE_SIDE_PX = 1024
# Fields with less than this share of the content of the fullest count as empty.
_LEAST_CONTENT = 0.01
# What is read at a time for it.
_BAND_PIXELS = 2**24


@dataclass(frozen=True)
class CutPlane:
    """A plane that is cut into fields.

    Attributes
    ----------
    name, path
        Of the plane, and the file that it is of.
    height, width
        In pixels.
    sources
        Its fields.
    n_empty
        Fields that are left out, for they hold no content.
    picture
        Coarse picture as JPEG, base64, where one was made.
    """

    name: str
    path: Path
    height: int
    width: int
    sources: list[Source]
    n_empty: int = 0
    picture: str | None = None


def cuts(length: int, side_px: float) -> list[tuple[int, int]]:
    """First and end of the fewest equal parts that are no longer than a side, but for rounding.

    Raises
    ------
    ImageError
        If the side is below 64 px.
    """
    if not SMALLEST_FIELD_PX <= side_px < math.inf:
        raise ImageError(f"fields: expected at least {SMALLEST_FIELD_PX} px, got {side_px:.4g}")
    ends = np.linspace(0, length, math.ceil(length / side_px) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(ends))


def coarse_view(
    view: PlaneView, limits: Limits, on_rows: Callable[[float], None] | None = None
) -> NDArray[np.float32]:
    """Means of equal squares of a plane, ``(h, w)`` or ``(h, w, 3)`` float32 in 0..1.

    It is read from top to bottom, once, some rows at a time, and ``on_rows`` told before each the
    share that is done. Means are over finite pixels; NaN of none.
    """
    height, width = view.shape
    step = max(1, max(height, width) // COARSE_SIDE_PX)
    n_rows = step * max(1, _BAND_PIXELS // (step * width))
    bands = []
    for top in range(0, height, n_rows):
        if on_rows is not None:
            on_rows(top / height)
        stored = view.read(slice(top, min(top + n_rows, height)))
        band = view.to_unit(stored, limits=limits)
        known = view.finite(stored)
        scale = np.float32(1 / 255 if band.dtype == np.uint8 else 1)
        colours = band.reshape(*band.shape[:2], -1)
        means = [
            tile_means(colours[..., i], step, region=known) * scale for i in range(colours.shape[2])
        ]
        bands.append(means[0] if band.ndim == 2 else np.stack(means, axis=-1))
    return np.concatenate(bands)


def content_of(view: NDArray[np.float32]) -> Bools:
    """Where a coarse view shows content, see `semanticblur_core.focus.scores.content_mask`."""
    return content_mask(as_grey(view), side_px=COARSE_SIDE_PX)


def cut(
    name: str,
    path: Path,
    shape: tuple[int, int],
    side_px: float,
    read: Callable[[slice, slice], NDArray[Any]],
    *,
    content: Bools | None = None,
    picture: str | None = None,
    **of_source: Any,
) -> CutPlane:
    """A plane as fields of about a side, each a source of `semanticblur_core.focus_report`.

    Parameters
    ----------
    name, path, shape
        Of the plane; a field is ``name[y=2048,x=0]``, by its first row and column.
    side_px
        No side of a field is longer; all are as nearly equal as they can be.
    read
        Gives the pixels of some rows and columns.
    content
        Coarse mask of the plane: it is the region of each field, and fields that hold less than a
        hundredth of what the fullest holds are left out.
    picture
        As in `CutPlane`.
    of_source
        Further values of each `Source`.

    Raises
    ------
    ImageError
        If the side is below 64 px.
    """
    places = list(itertools.product(*(cuts(length, side_px) for length in shape)))
    n_fields = len(places)
    regions: list[Callable[[], Bools] | None] = [None] * n_fields
    if content is not None:
        coarse = [_coarse_part(content.shape, shape, *place) for place in places]
        shares = [float(content[part].mean()) for part in coarse]
        least = max(shares) * _LEAST_CONTENT
        kept = [i for i, share in enumerate(shares) if share > 0 and share >= least]
        bits = np.packbits(content, axis=1)  # for there may be many planes
        regions = [functools.partial(_part, bits, content.shape, shape, *places[i]) for i in kept]
        places = [places[i] for i in kept]
    sources = [
        Source(
            _field_name(name, rows[0], columns[0]),
            path,
            functools.partial(read, slice(*rows), slice(*columns)),
            field_of_view=Field(
                name, rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]
            ),
            region=region,
            **of_source,
        )
        for (rows, columns), region in zip(places, regions, strict=True)
    ]
    return CutPlane(name, path, *shape, sources, n_fields - len(sources), picture)


def cut_array(
    array: Any,
    axes: str,
    side_px: float,
    *,
    name: str = "image",
    at: Sequence[int] = (),
    channels: Channels = "each",
    value_range: tuple[float, float] | None = None,
    by_content: bool = False,
) -> CutPlane:
    """One plane of an array, cut into fields for `semanticblur_core.focus_report`.

    Parameters
    ----------
    array, axes, channels
        See `semanticblur_core.inference.planes.Planes`; a lazy array is read field by field.
    side_px
        No side of a field is longer.
    name
        Of the plane.
    at
        Index of the plane along the other axes.
    value_range
        Intensities that count as black and white; by default 0 and 255 of 8 bits, else the 0.1 and
        99.9 percentiles of the array.
    by_content
        Leave out fields without content, and count that of the others alone: the plane is read
        once more, to see where it lies.

    Raises
    ------
    ImageError
        If axes do not fit, or the side is below 64 px.

    Examples
    --------
    >>> plane = cut_array(np.zeros((3000, 2000), np.uint8), "YX", 1024)
    >>> [source.name for source in plane.sources][-1]
    'image[y=2000,x=1000]'
    """
    planes = Planes(array, axes, channels)
    view = planes.view(tuple(at))
    limits = planes.estimate_range() if value_range is None else planes.as_limits(value_range)
    content = content_of(coarse_view(view, limits)) if by_content else None
    return cut(
        name,
        Path(name),
        view.shape,
        side_px,
        lambda rows, columns: view.read_unit(rows, columns, limits=limits, keep_nan=True),
        content=content,
        index=tuple(at),
        value_range=unit_range(planes, limits),
    )


def picture(view: NDArray[np.float32]) -> str:
    """A coarse view as JPEG, base64."""
    pixels = np.rint(np.nan_to_num(view).clip(0, 1) * 255).astype(np.uint8)
    stream = streams.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def plane_rows(
    planes: Iterable[CutPlane], images: Iterable[ImageFocus], *, min_fields: float, gated: bool
) -> list[dict[str, Any]]:
    """Plain JSON values of each plane as a whole, from its fields.

    Parameters
    ----------
    planes
        What was cut.
    images
        Fields, of any of them.
    min_fields
        A plane passes where at least this share of its fields does.
    gated
        Whether there are gates; otherwise what can be read passes.
    """
    fields: dict[tuple[str, str], list[ImageFocus]] = {}
    for image in images:
        if image.field_of_view is not None:
            fields.setdefault((image.source, image.field_of_view.plane), []).append(image)
    return [
        _plane_row(plane, fields.get((str(plane.path), plane.name), []), min_fields, gated)
        for plane in planes
    ]


def _plane_row(
    plane: CutPlane, fields: list[ImageFocus], min_fields: float, gated: bool
) -> dict[str, Any]:
    n_fields = len(plane.sources)
    # By the pixels that each score is of; those without any have none.
    weights, shares, blurs = [], [], []
    for image in fields:
        scores = image.scores
        if scores is not None and math.isfinite(scores.mean_blur):
            weights.append(scores.region_fraction * image.height * image.width)
            shares.append(scores.in_focus_fraction)
            blurs.append(scores.mean_blur)
    n_passed = sum(image.passed for image in fields)
    n_read = sum(image.scores is not None for image in fields)
    # Of no content nothing is known, and so no gate is kept.
    enough = n_fields > 0 and n_passed / n_fields >= min_fields
    passed = n_read == n_fields and (enough or not gated)
    return {
        "name": plane.name,
        "source": str(plane.path),
        "height": plane.height,
        "width": plane.width,
        "n_fields": n_fields,
        "n_fields_without_content": plane.n_empty,
        "n_fields_passed": n_passed,
        "n_fields_unreadable": sum(image.error is not None for image in fields),
        "in_focus_fraction": float(np.average(shares, weights=weights)) if weights else None,
        "mean_blur": float(np.average(blurs, weights=weights)) if weights else None,
        "passed": passed,
    }


def _field_name(plane: str, top: int, left: int) -> str:
    inside = f"y={top},x={left}]"
    return f"{plane[:-1]},{inside}" if plane.endswith("]") else f"{plane}[{inside}"


def _coarse_part(
    coarse: tuple[int, ...], shape: tuple[int, int], rows: Place, columns: Place
) -> tuple[slice, slice]:
    """Slices of a coarse mask in which some rows and columns of the plane lie."""
    down, across = (
        slice(int((first + 0.5) * n / length), int((end - 0.5) * n / length) + 1)
        for (first, end), n, length in zip((rows, columns), coarse, shape, strict=True)
    )
    return down, across


def _part(
    bits: NDArray[np.uint8],
    coarse: tuple[int, ...],
    shape: tuple[int, int],
    rows: Place,
    columns: Place,
) -> Bools:
    """Some rows and columns of the plane, of a coarse mask that is packed along its rows."""
    down, across = (
        ((np.arange(*place) + 0.5) * n / length).astype(np.intp)
        for place, n, length in zip((rows, columns), coarse, shape, strict=True)
    )
    rows_of_mask = np.unpackbits(bits[down[0] : down[-1] + 1], axis=1, count=coarse[1])
    part: Bools = rows_of_mask.view(np.bool_)[(down - down[0])[:, None], across[None]]
    return part
