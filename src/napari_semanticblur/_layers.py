"""From a layer to an array with axes, and from a result back to its place in the world."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.errors import ImageError
from semanticblur_core.inference.planes import Channels, Planes

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

METADATA_KEY = "semanticblur"
# Letters for walked axes without a name of one letter, by how many axes are walked.
_USUAL_AXES = {0: "", 1: "Z", 2: "TZ", 3: "TCZ"}
_SPARE_AXES = "TZPQRUVWABDEFGHIJKLMNO"


@dataclass(frozen=True)
class Source:
    """What is analysed: one resolution level of an image layer.

    Attributes
    ----------
    layer
        The layer.
    array
        Its data at that level, not read.
    axes
        One letter an axis of the array, see `semanticblur_core.inference.planes.Planes`.
    level
        0 is full resolution.
    factors
        Pixels of level 0 in one pixel of this level, for each axis of the layer.
    """

    layer: Image
    array: Any
    axes: str
    level: int
    factors: tuple[float, ...]

    def planes(self, channels: Channels = "each") -> Planes:
        """The array as a sequence of planes."""
        return Planes(self.array, self.axes, channels)

    @property
    def layer_axes(self) -> str:
        """Axes of the layer: those of the array but for the samples of RGB."""
        return self.axes.replace("S", "")


def unwrapped(layer: Any) -> Any:
    """The layer itself; napari hands plugins a proxy of the viewer, whose layers are proxies."""
    return getattr(layer, "__wrapped__", layer)


def is_image(layer: Any) -> bool:
    """Whether it is an image layer, not labels, which napari derives from a common base."""
    from napari.layers import Image

    return isinstance(layer, Image)


def read_source(layer: Image, *, level: int = 0) -> Source:
    """Describe a layer's data without reading it.

    Raises
    ------
    ImageError
        If it is not an image layer, or has no such level.
    """
    layer = unwrapped(layer)
    if not is_image(layer):
        raise ImageError(f"{layer.name}: expected an image layer, got {type(layer).__name__}")
    levels = list(layer.data) if layer.multiscale else [layer.data]
    if not 0 <= level < len(levels):
        raise ImageError(f"{layer.name}: expected a level of 0 to {len(levels) - 1}, got {level}")
    array = levels[level]
    axes = axis_letters(tuple(layer.axis_labels), rgb=bool(layer.rgb))
    full = levels[0].shape[: layer.ndim]
    factors = tuple(a / b for a, b in zip(full, array.shape[: layer.ndim], strict=True))
    return Source(layer, array, axes, level, factors)


def axis_letters(labels: Sequence[str], *, rgb: bool) -> str:
    """One letter an axis, from the layer's axis labels where they begin with different letters.

    The last two axes are rows and columns, whatever they are called.

    >>> axis_letters(("time", "z", "y", "x"), rgb=False)
    'TZYX'
    >>> axis_letters(("-3", "-2", "-1"), rgb=True)
    'ZYXS'
    """
    walked = [label[:1].upper() for label in labels[:-2]]
    named = len(set(walked)) == len(walked) and all(
        letter.isascii() and letter.isalpha() and letter not in "YXS" for letter in walked
    )
    if not named:
        walked = list(_USUAL_AXES.get(len(walked), _SPARE_AXES[: len(walked)]))
    return "".join(walked) + "YX" + ("S" if rgb else "")


def coarse_level(layer: Image, *, at_least_px: int) -> int:
    """Coarsest level whose planes are at least that large along both axes; 0 of a plain layer."""
    if not layer.multiscale:
        return 0
    last = slice(layer.ndim - 2, layer.ndim)
    fitting = [i for i, data in enumerate(layer.data) if min(data.shape[last]) >= at_least_px]
    return max(fitting, default=0)


def plane_index(source: Source, viewer: ViewerModel, planes: Planes) -> tuple[int, ...]:
    """Index along the walked axes of the plane that the viewer shows."""
    position = source.layer.world_to_data(viewer.dims.point)
    index = []
    for axis, length in zip(planes.walked_axes, planes.lengths, strict=True):
        place = source.layer_axes.index(axis)
        # The pixel of this level in which the centre of that pixel of level 0 lies.
        shown = math.floor((float(position[place]) + 0.5) / source.factors[place] + 1e-6)
        index.append(min(max(shown, 0), length - 1))
    return tuple(index)


def visible_region(source: Source, viewer: ViewerModel) -> tuple[slice, slice] | None:
    """Rows and columns of the source's level in the canvas; None where that cannot be told."""
    layer = source.layer
    if tuple(viewer.dims.displayed) != (viewer.dims.ndim - 2, viewer.dims.ndim - 1):
        return None
    corners = np.asarray(layer.corner_pixels, dtype=float)[:, -2:]
    if layer.multiscale:
        corners = corners * np.asarray(layer.downsample_factors)[layer.data_level][-2:]
    corners = corners / source.factors[-2:]
    (top, left), (bottom, right) = np.floor(corners).astype(int).tolist()
    if bottom <= top or right <= left:
        return None
    return slice(max(top, 0), bottom + 1), slice(max(left, 0), right + 1)


def result_placement(source: Source, start: Sequence[int]) -> dict[str, Any]:
    """Arguments that put a result where its pixels lie in the world.

    Parameters
    ----------
    source
        What was analysed.
    start
        Index, along each axis of the layer and in pixels of the source's level, of the result's
        first pixel.

    Returns
    -------
    dict
        scale, translate, rotate, shear, affine, units and axis_labels for a layer's constructor.
        At level 0 with ``start`` zero they are the source's own.
    """
    layer = source.layer
    factors = np.asarray(source.factors)
    # Pixel centres: the first pixel of a coarse level lies amid the pixels that it stands for.
    first = np.asarray(start, dtype=float) * factors + (factors - 1) / 2
    affine = np.asarray(layer.affine.affine_matrix, dtype=float)
    moved: NDArray[Any] = np.asarray(layer.data_to_world(first)) - np.asarray(
        layer.data_to_world(np.zeros(layer.ndim))
    )
    shift = np.linalg.solve(affine[:-1, :-1], moved)
    return {
        "scale": np.asarray(layer.scale) * factors,
        "translate": np.asarray(layer.translate) + shift,
        "rotate": layer.rotate,
        "shear": layer.shear,
        "affine": affine,
        "units": layer.units,
        "axis_labels": layer.axis_labels,
    }


_PLACE = ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels")


def placed(layer: Any) -> dict[str, Any]:
    """Where a layer lies, as `result_placement` gives it."""
    values = {name: getattr(layer, name) for name in _PLACE}
    return values | {"affine": np.asarray(layer.affine.affine_matrix)}


def place(layer: Any, placement: dict[str, Any]) -> None:
    """Move a layer where it belongs; what is set redraws it, so only what is new."""
    now = placed(layer)
    for name, value in placement.items():
        if not np.array_equal(np.asarray(now[name]), np.asarray(value)):
            setattr(layer, name, value)


def in_layer_axes(source: Source, array: NDArray[Any], axes: str) -> NDArray[Any]:
    """An array of some of the layer's axes with all of them, in the layer's order.

    Parameters
    ----------
    source
        What was analysed.
    array
        Axes as ``axes`` says, then, of RGB, samples.
    axes
        Letters of the source's axes; along one that is missing, the array stands for every index.
    """
    n_samples = array.ndim - len(axes)
    missing = [axis for axis in source.layer_axes if axis not in axes]
    order = [(*missing, *axes).index(axis) for axis in source.layer_axes]
    expanded = array[(np.newaxis,) * len(missing)]
    moved = expanded.transpose([*order, *range(len(order), len(order) + n_samples)])
    if not missing:
        return moved
    shape = list(moved.shape)
    for axis in missing:
        shape[source.layer_axes.index(axis)] = source.array.shape[source.axes.index(axis)]
    return np.broadcast_to(moved, shape)


def show_plane(source: Source, viewer: ViewerModel, planes: Planes, index: Sequence[int]) -> None:
    """Move the viewer's sliders to a plane, given as `plane_index` gives it."""
    if not index:
        return
    layer = source.layer
    data = (np.asarray(source.array.shape[: layer.ndim], dtype=float) - 1) / 2
    places = [source.layer_axes.index(axis) for axis in planes.walked_axes]
    data[places] = index
    factors = np.asarray(source.factors)
    world = layer.data_to_world(data * factors + (factors - 1) / 2)
    first = viewer.dims.ndim - layer.ndim
    viewer.dims.set_point([first + place for place in places], [world[p] for p in places])


def labelled_region(
    source: Source, planes: Planes, labels: Any
) -> Callable[[Sequence[int]], NDArray[np.bool_]]:
    """Function from a plane's index to where a labels layer is not 0, ``(H, W)`` bool.

    Raises
    ------
    ImageError
        If the labels have neither the layer's pixels nor those of one plane of it.
    """
    layer = source.layer
    data = labels.data[0] if labels.multiscale else labels.data
    image = layer.data[0] if layer.multiscale else layer.data
    full = tuple(image.shape[: layer.ndim])
    if tuple(data.shape) not in (full, full[-2:]):
        raise ImageError(
            f"{labels.name}: labels of {tuple(data.shape)} for {layer.name} of {full}; they need "
            "the same pixels, or those of one plane"
        )
    # Pixels of full resolution amid those of the level.
    inside = [
        np.minimum(((np.arange(n) + 0.5) * factor).astype(int), length - 1)
        for n, factor, length in zip(
            planes.plane_shape, source.factors[-2:], full[-2:], strict=True
        )
    ]

    def region(index: Sequence[int]) -> NDArray[np.bool_]:
        place = dict(zip(planes.walked_axes, index, strict=True))
        if isinstance(planes.channels, int):
            place["C"] = planes.channels
        axes = source.layer_axes[: data.ndim - 2]
        plane = np.asarray(data[tuple(place.get(axis, 0) for axis in axes)])
        looked_at: NDArray[np.bool_] = plane[np.ix_(*inside)] != 0
        return looked_at

    return region


def find_result(viewer: ViewerModel, layer: Image, kind: str) -> Any:
    """The result layer of that kind ("map" or "labels") made from a layer, or None."""
    layer = unwrapped(layer)
    for candidate in map(unwrapped, viewer.layers):
        record = candidate.metadata.get(METADATA_KEY)
        if isinstance(record, dict) and record.get("kind") == kind:
            same = record.get("source_id") == str(layer.unique_id)
            if same and candidate is not layer:
                return candidate
    return None
