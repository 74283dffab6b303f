"""Bulk edits of an annotation layer, all of them through napari's history: Ctrl+Z undoes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._annotation_source import read_pixels
from napari_semanticblur._colors import BLURRED, SHARP, UNLABELLED
from napari_semanticblur._layers import Source
from semanticblur_core.data.labelling import labels_of_map, superpixel
from semanticblur_core.errors import DataError

if TYPE_CHECKING:
    from napari.layers import Image, Labels

Plane = tuple[int, ...]


def set_plane(
    layer: Labels,
    plane: Plane,
    where: NDArray[np.bool_],
    values: NDArray[np.uint8] | int,
    *,
    box: tuple[slice, slice] = (slice(None), slice(None)),
) -> int:
    """Label pixels of a plane.

    Parameters
    ----------
    layer
        The annotation.
    plane
        Index along the axes before rows and columns.
    where
        Pixels of the box.
    values
        One code, or one for each pixel of the box.
    box
        Rows and columns; all of them.

    Returns
    -------
    int
        Pixels that changed.
    """
    where = where & (layer.data[plane][box] != values)
    rows, columns = np.nonzero(where)
    if rows.size == 0:
        return 0
    chosen = values if isinstance(values, int) else values[rows, columns]
    rows += box[0].start or 0
    columns += box[1].start or 0
    leading = tuple(np.full(rows.shape, index) for index in plane)
    layer.data_setitem((*leading, rows, columns), chosen, refresh=False)
    return int(rows.size)


def set_all(layer: Labels, labels: NDArray[np.uint8]) -> None:
    """Label every pixel of every plane, as one step of undo."""
    with layer.block_history():
        for plane in np.ndindex(labels.shape[:-2]):
            set_plane(layer, plane, np.ones(labels.shape[-2:], np.bool_), labels[plane])
    layer.refresh(extent=False)


def add_labels(layer: Labels, labels: NDArray[np.uint8]) -> int:
    """Take over labels where the layer has none, as one step of undo; pixels that changed."""
    n = 0
    with layer.block_history():
        for plane in np.ndindex(labels.shape[:-2]):
            where = (layer.data[plane] == UNLABELLED) & (labels[plane] != UNLABELLED)
            n += set_plane(layer, plane, where, labels[plane])
    layer.refresh(extent=False)
    return n


def fill_rest(layer: Labels, planes: Iterable[Plane], code: int) -> int:
    """Label what is unlabelled of planes; pixels that changed, as one step of undo."""
    n = 0
    with layer.block_history():
        for plane in planes:
            n += set_plane(layer, plane, layer.data[plane] == UNLABELLED, code)
    layer.refresh(extent=False)
    return n


def label_superpixel(
    layer: Labels, source: Source, plane: Plane, point: tuple[int, int], *, size_px: int
) -> int:
    """Label the region of alike pixels around a point with the selected label."""
    box, mask = superpixel(read_pixels(source, plane), *point, size_px=size_px)
    code = int(layer.selected_label)
    with layer.block_history():
        n = set_plane(layer, plane, mask, code, box=box)
    layer.refresh(extent=False)
    return n


def start_from_map(
    layer: Labels, blur_map: Image, planes: Iterable[Plane], *, confidence: float
) -> int:
    """Label unlabelled pixels where a blur map is sure; pixels that changed, as one step of undo.

    Planes that the map does not have are left alone.
    """
    n = 0
    with layer.block_history():
        for plane in planes:
            blur = map_plane(layer, blur_map, plane)
            if blur is None:
                continue
            labels = labels_of_map(blur, confidence=confidence)
            where = (layer.data[plane] == UNLABELLED) & (labels != UNLABELLED)
            n += set_plane(layer, plane, where, labels)
    layer.refresh(extent=False)
    return n


def map_plane(layer: Labels, blur_map: Image, plane: Plane) -> NDArray[Any] | None:
    """A map's values at the pixels of a plane of the annotation; None where it has none."""
    index = map_index(layer, blur_map, plane)
    if index is None:
        return None
    height, width = layer.data.shape[-2:]
    blur: NDArray[Any] = np.asarray(blur_map.data[index])
    if blur.shape == (height, width):
        return blur
    # A coarser or finer level of the same image: the nearest pixel.
    rows = np.arange(height) * blur.shape[0] // height
    columns = np.arange(width) * blur.shape[1] // width
    nearest: NDArray[Any] = blur[rows[:, None], columns]
    return nearest


def map_index(layer: Labels, blur_map: Image, plane: Plane) -> Plane | None:
    """Where a map has a plane of the annotation; None where it has not."""
    height, width = layer.data.shape[-2:]
    middle = layer.data_to_world(np.array([*plane, (height - 1) / 2, (width - 1) / 2]))
    index = tuple(round(float(p)) for p in blur_map.world_to_data(middle)[:-2])
    inside = all(0 <= i < n for i, n in zip(index, blur_map.data.shape[:-2], strict=True))
    return index if inside else None


def import_labels(layer: Labels, plane: Plane | None, codes: NDArray[np.uint8]) -> int:
    """Take over codes, those that are not 0.

    Parameters
    ----------
    layer
        The annotation.
    plane
        Where codes of one plane go.
    codes
        Of that plane, or of all of them.

    Raises
    ------
    DataError
        If they do not fit.
    """
    shape = layer.data.shape
    # Readers of TIFF drop axes of length one.
    if _without_ones(codes.shape) == _without_ones(shape):
        whole, planes = codes.reshape(shape), list(np.ndindex(shape[:-2]))
    elif codes.shape == shape[-2:]:
        whole, planes = np.broadcast_to(codes, shape), [require_plane(layer, plane)]
    else:
        raise DataError(
            f"expected a mask of {shape[-2:]} pixels"
            + (f", or of all planes {shape}" if len(shape) > 2 else "")
            + f", got {codes.shape}"
        )
    n = 0
    with layer.block_history():
        for index in planes:
            n += set_plane(layer, index, whole[index] != UNLABELLED, whole[index])
    layer.refresh(extent=False)
    return n


def require_plane(layer: Labels, shown: Plane | None) -> Plane:
    """The plane that is shown.

    Raises
    ------
    DataError
        If there is none.
    """
    if shown is None:
        raise DataError(
            f"{layer.name}: no plane of it is shown; show its last two axes, and move the sliders "
            "to a plane that it has"
        )
    return shown


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def codes_of(array: NDArray[Any], meaning: str) -> NDArray[np.uint8]:
    """Codes of a mask or of labels.

    Parameters
    ----------
    array
        Any integers or bool.
    meaning
        ``"codes"``: 0, 1, 2 as they are; ``"blur"``: anything but 0 is blurred, 0 is sharp;
        ``"sharp"``: the other way round. In an 8-bit mask that has values above 127 these are what
        is not 0, and the others are grey edges, as in `semanticblur_core.io.read_mask`.

    Raises
    ------
    DataError
        If codes are asked for and there are others.
    """
    if meaning == "codes":
        if array.size and (array.min() < 0 or array.max() > BLURRED):
            raise DataError(
                f"expected codes 0 to 2, got {array.min()} to {array.max()}; say what labels mean"
            )
        return array.astype(np.uint8)
    marked, others = (BLURRED, SHARP) if meaning == "blur" else (SHARP, BLURRED)
    is_grey = array.dtype == np.uint8 and array.max(initial=0) > 127
    return np.where(array > 127 if is_grey else array != 0, np.uint8(marked), np.uint8(others))
