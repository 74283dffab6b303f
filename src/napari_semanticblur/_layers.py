"""From a layer to an array with axes, and from a result back to its place in the world."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
# Letters of walked axes where none has a name, by how many there are; then those to spare.
_USUAL_AXES = {0: "", 1: "Z", 2: "TZ", 3: "TCZ"}
_SPARE_AXES = "ZTPQRUVWABDEFGHIJKLMNO"
_CHANNELS = ("c", "ch", "channel", "channels")


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


def camera_of(viewer: ViewerModel) -> Any:
    """The camera, which napari 0.9 moved to the scene."""
    return getattr(viewer, "scene", viewer).camera


def unwrapped(layer: Any) -> Any:
    """The layer itself; napari hands plugins a proxy of the viewer, whose layers are proxies."""
    return getattr(layer, "__wrapped__", layer)


def is_image(layer: Any) -> bool:
    """Whether it is an image layer, not labels, which napari derives from a common base."""
    from napari.layers import Image

    return isinstance(layer, Image)


def read_source(layer: Image, *, level: int = 0, viewer: ViewerModel | None = None) -> Source:
    """Describe a layer's data without reading it.

    Parameters
    ----------
    layer, level
        What is analysed.
    viewer
        Where the layer's axes have no names, those of this viewer's sliders are theirs.

    Raises
    ------
    ImageError
        If it is not an image layer, or has no such level, or no pixels.
    """
    layer = unwrapped(layer)
    if not is_image(layer):
        raise ImageError(f"{layer.name}: expected an image layer, got {type(layer).__name__}")
    levels = list(layer.data) if layer.multiscale else [layer.data]
    if not 0 <= level < len(levels):
        raise ImageError(f"{layer.name}: expected a level of 0 to {len(levels) - 1}, got {level}")
    array = levels[level]
    if 0 in array.shape:
        raise ImageError(f"{layer.name}: has no pixels, its shape is {tuple(array.shape)}")
    labels = tuple(layer.axis_labels)
    if viewer is not None and not any(map(_is_name, labels)):
        labels = tuple(viewer.dims.axis_labels)[-layer.ndim :]
    axes = axis_letters(labels, rgb=bool(layer.rgb))
    full = levels[0].shape[: layer.ndim]
    factors = tuple(a / b for a, b in zip(full, array.shape[: layer.ndim], strict=True))
    return Source(layer, array, axes, level, factors)


def axis_letters(labels: Sequence[str], *, rgb: bool) -> str:
    """One letter an axis: the first of its label, or one to spare where that is none or taken.

    The last two axes are rows and columns, whatever they are called. S is kept for the samples of
    RGB, and C for axes that are called c, ch, channel or channels.

    >>> axis_letters(("time", "z", "y", "x"), rgb=False)
    'TZYX'
    >>> axis_letters(("-3", "-2", "-1"), rgb=True)
    'ZYXS'
    >>> axis_letters(("slice", "c", "y", "x"), rgb=False)
    'ZCYX'
    """
    walked = labels[:-2]
    if not any(map(_is_name, walked)) and len(walked) in _USUAL_AXES:
        letters = list(_USUAL_AXES[len(walked)])
    else:
        letters = []
        for label in walked:
            letter = label[:1].upper() if _is_name(label) else ""
            barred = "YXS" if label.lower() in _CHANNELS else "YXSC"
            letters.append("" if letter in barred or letter in letters else letter)
        spare = (letter for letter in _SPARE_AXES if letter not in letters)
        letters = [letter or next(spare) for letter in letters]
    return "".join(letters) + "YX" + ("S" if rgb else "")


def _is_name(label: str) -> bool:
    """Whether an axis was named; napari calls it a number if not."""
    return label[:1].isascii() and label[:1].isalpha()


def coarse_level(layer: Image, *, at_least_px: int) -> int:
    """Coarsest level whose planes are at least that large along both axes; 0 of a plain layer."""
    if not layer.multiscale:
        return 0
    last = slice(layer.ndim - 2, layer.ndim)
    fitting = [i for i, data in enumerate(layer.data) if min(data.shape[last]) >= at_least_px]
    return max(fitting, default=0)


def slider_index(source: Source, viewer: ViewerModel, planes: Planes) -> tuple[int, ...]:
    """Index along the walked axes at which the viewer's sliders are; it may lie outside."""
    shown = shown_position(source.layer, viewer)
    index = []
    for axis in planes.walked_axes:
        place = source.layer_axes.index(axis)
        # The pixel of this level in which the centre of that pixel of level 0 lies.
        index.append(int(np.floor((shown[place] + 0.5) / source.factors[place] + 1e-6)))
    return tuple(index)


def plane_index(source: Source, viewer: ViewerModel, planes: Planes) -> tuple[int, ...]:
    """Index along the walked axes of the plane that the viewer shows.

    Raises
    ------
    ImageError
        If the sliders lie outside the layer, so that nothing of it is shown.
    """
    index = slider_index(source, viewer, planes)
    require_inside(source, planes, index)
    return index


def require_inside(source: Source, planes: Planes, index: Iterable[int]) -> None:
    """Refuse a plane that the layer does not have."""
    for axis, i, length in zip(planes.walked_axes, index, planes.lengths, strict=True):
        if not 0 <= i < length:
            raise ImageError(
                f"{source.layer.name}: nothing of it is shown, the slider along {axis} is at plane "
                f"{i} and it has 0 to {length - 1}; move the slider to where the image is"
            )


def shown_position(layer: Any, viewer: ViewerModel) -> NDArray[np.float64]:
    """Whole index, along all axes of the layer but the last two, at which napari shows it."""
    return np.round(_position(layer, _sliders(layer, viewer)))


def _sliders(layer: Any, viewer: ViewerModel) -> NDArray[np.float64]:
    """Where the sliders of the layer's axes but the last two are, in the layer's units."""
    point = np.asarray(viewer.dims.point, dtype=float)[-layer.ndim :][: layer.ndim - 2]
    return point * _slider_units(layer, viewer)


def _slider_units(layer: Any, viewer: ViewerModel) -> NDArray[np.float64]:
    """Layer's units in a unit of the sliders, which all layers share since napari 0.9."""
    units = getattr(viewer.dims, "units", None)
    if units is None or len(units) < layer.ndim:
        return np.ones(layer.ndim - 2)
    pairs = zip(units[-layer.ndim :], layer.units, strict=True)
    ratios = [
        (1 * shared).to_base_units().magnitude / (1 * own).to_base_units().magnitude
        for shared, own in pairs
    ]
    return np.array(ratios[: layer.ndim - 2], dtype=float)


def _position(layer: Any, sliders: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    """Place in the layer's data, along all axes but the last two, that napari slices it at.

    In a tilted layer this depends on rows and columns as well, and napari takes them as zero: it
    slices with those rows and columns of the inverse transform that belong to the sliders.
    """
    world = np.zeros(layer.ndim)
    world[: len(sliders)] = sliders
    return np.asarray(layer.world_to_data(world), dtype=float)[: len(sliders)]


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


def first_index(source: Source, channels: Channels) -> list[int]:
    """Index along each axis of the layer where the result of these channels begins."""
    start = [0] * source.layer.ndim
    if isinstance(channels, int):  # one channel's lies at its place
        start[source.layer_axes.index("C")] = channels
    return start


def in_layer_axes(
    source: Source, array: NDArray[Any], axes: str, channels: Channels = "each"
) -> NDArray[Any]:
    """An array of some of the layer's axes with all of them, in the layer's order.

    Parameters
    ----------
    source
        What was analysed.
    array
        Axes as ``axes`` says, then, of RGB, samples.
    axes
        Letters of the source's axes; along one that is missing, the array stands for every index.
    channels
        What it was made of: of one channel it stands for that channel only, see `first_index`.
    """
    n_samples = array.ndim - len(axes)
    missing = [axis for axis in source.layer_axes if axis not in axes]
    for_every = [axis for axis in missing if axis != "C" or not isinstance(channels, int)]
    order = [(*missing, *axes).index(axis) for axis in source.layer_axes]
    expanded = array[(np.newaxis,) * len(missing)]
    moved = expanded.transpose([*order, *range(len(order), len(order) + n_samples)])
    if not for_every:
        return moved
    shape = list(moved.shape)
    for axis in for_every:
        shape[source.layer_axes.index(axis)] = source.array.shape[source.axes.index(axis)]
    return np.broadcast_to(moved, shape)


def show_plane(source: Source, viewer: ViewerModel, planes: Planes, index: Sequence[int]) -> None:
    """Move the viewer's sliders to a plane, given as `plane_index` gives it."""
    if not index:
        return
    layer = source.layer
    sliders = _sliders(layer, viewer)
    wanted = _position(layer, sliders)
    for axis, i in zip(planes.walked_axes, index, strict=True):
        place = source.layer_axes.index(axis)
        factor = source.factors[place]
        wanted[place] = i * factor + (factor - 1) / 2
    origin = _position(layer, np.zeros(len(sliders)))
    steps = [_position(layer, step) - origin for step in np.eye(len(sliders))]
    # Least squares: of a layer turned by a right angle, the sliders reach no other plane.
    moved = np.linalg.lstsq(np.stack(steps, axis=1), wanted - origin)[0]
    first = viewer.dims.ndim - layer.ndim
    places = [first + i for i in range(len(sliders))]
    viewer.dims.set_point(places, (moved / _slider_units(layer, viewer)).tolist())


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


def record_of(layer: Any) -> dict[str, Any]:
    """What was noted on a layer when it was made here; empty on others."""
    record = layer.metadata.get(METADATA_KEY)
    return record if isinstance(record, dict) else {}


def source_images(viewer: ViewerModel) -> list[Image]:
    """Image layers but for results made here."""
    return [
        layer
        for layer in map(unwrapped, viewer.layers)
        if is_image(layer) and METADATA_KEY not in layer.metadata
    ]


def find_result(
    viewer: ViewerModel, layer: Image, kind: str, alike: Mapping[str, Any] | None = None
) -> Any:
    """The result layer of that kind ("map", "labels" ...) made from a layer, or None.

    Of several, the one whose record has the values in ``alike``.
    """
    layer = unwrapped(layer)
    for candidate in map(unwrapped, viewer.layers):
        record = record_of(candidate)
        same = record.get("source_id") == str(layer.unique_id)
        is_alike = all(record.get(name) == value for name, value in (alike or {}).items())
        if record.get("kind") == kind and same and is_alike and candidate is not layer:
            return candidate
    return None
