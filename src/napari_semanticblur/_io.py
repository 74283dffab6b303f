"""Blur maps from files and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._colors import BLURRED, MAP_COLORMAP, SHARP, UNLABELLED
from napari_semanticblur._layers import axis_letters
from semanticblur_core import io, stacks
from semanticblur_core.errors import DataError, ImageError
from semanticblur_core.maps import new_map
from semanticblur_core.scale import Scale

LayerData = tuple[Any, dict[str, Any], str]
SUFFIXES = (".png", ".tif", ".npy", ".zarr")


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """Reader of files named as ``detect`` names its maps, or None for any other."""
    paths = [path] if isinstance(path, str) else path
    if all(Path(p).stem.endswith("_blur") and Path(p).suffix in SUFFIXES for p in paths):
        return read_maps
    return None


def read_maps(path: str | list[str]) -> list[LayerData]:
    """Image layers of blur maps, 0..1; NaN is what was not analysed.

    Raises
    ------
    ImageError
        If a file cannot be read or is no blur map.
    """
    layers: list[LayerData] = []
    for each in [path] if isinstance(path, str) else path:
        data, attributes = _read(Path(each))
        attributes |= {
            "name": Path(each).stem,
            "colormap": MAP_COLORMAP,
            "contrast_limits": (0, 1),
        }
        layers.append((data, attributes, "image"))
    return layers


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    if path.suffix == ".zarr":
        return _read_zarr(path)
    if path.suffix == ".png":
        return io.read_map(path), {}
    with stacks.open_stack(path) as stack:
        if stack.array.dtype.kind == "f":
            blur = np.asarray(stack.array)
            low, high = _limits(path, blur)
            if not 0 <= low <= high <= 1:
                raise ImageError(f"{path}: expected floats in 0..1, got {low:g}..{high:g}")
            return blur, _scale(stack)
    return io.read_map(path), {}


def _read_zarr(path: Path) -> tuple[Any, dict[str, Any]]:
    """All levels, read where they are shown."""
    levels: list[Any] = []
    with stacks.open_stack(path) as stack:
        levels.append(stack.array)
    while max(levels[-1].shape[-2:]) > stacks.COARSEST_SIDE_PX:
        try:
            with stacks.open_stack(path, level=len(levels)) as coarser:
                levels.append(coarser.array)
        except ImageError:  # there are no more
            break
    if levels[0].dtype.kind != "f":
        raise ImageError(f"{path}: expected a blur map of floats, got {levels[0].dtype}")
    return (levels if len(levels) > 1 else levels[0]), _scale(stack)


def _scale(stack: stacks.Stack) -> dict[str, Any]:
    sizes, origin = stack.scale.pixel_size_um, stack.scale.origin
    steps = dict(stack.scale.unnamed) | dict(sizes)
    if not steps:
        return {}
    return {
        "scale": [float(steps.get(axis, 1)) for axis in stack.axes],
        "translate": [float(origin.get(axis, 0)) if axis in steps else 0.0 for axis in stack.axes],
        "units": ["um" if axis in sizes else "pixel" for axis in stack.axes],
        "axis_labels": [axis.lower() for axis in stack.axes],
    }


def _limits(path: Path, blur: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest value of a map; NaN does not count."""
    if blur.dtype.kind != "f":
        raise ImageError(f"{path}: expected a blur map of floats, got {blur.dtype}")
    known = blur[np.isfinite(blur)] if np.isnan(blur).any() else blur
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def write_map(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write an image layer in 0..1: float32 as tif and npy, 8 bits as png.

    NaN, what was not analysed, is kept in tif and npy. A tif is an OME-TIFF with the names of the
    axes and, where the layer's units are lengths, the pixel size and the place; no file holds how
    it is turned.

    Raises
    ------
    ImageError
        If it is no map in 0..1, or of more than two axes or not whole for a png.
    """
    target, blur = Path(path), np.asarray(data)
    if attributes.get("rgb"):
        raise ImageError(f"{target.name}: expected a blur map, got a colour image")
    low, high = _limits(target, blur)
    if not 0 <= low <= high <= 1:
        raise ImageError(f"{target.name}: expected a blur map in 0..1, got {low:g}..{high:g}")
    if target.suffix == ".png" and np.isnan(blur).any():
        raise ImageError(
            f"{target.name}: part of this map was not analysed (NaN), and a png has no code for "
            "that; save it as tif or npy"
        )
    blur = blur.astype(np.float32, copy=False)
    if target.suffix == ".npy":
        io.write_npy(target, blur)
    elif target.suffix == ".png":
        io.write_png(target, np.round(_one_plane(target, blur) * 255).astype(np.uint8))
    else:
        labels = attributes.get("axis_labels") or [""] * blur.ndim
        axes = axis_letters(tuple(labels), rgb=False)
        with new_map(target, blur.shape) as maps:
            maps.append(blur)
            stacks.write_tiff(target, maps, axes=axes, scale=_scale_of_layer(axes, attributes))
    return [path]


def _scale_of_layer(axes: str, attributes: dict[str, Any]) -> Scale:
    """Micrometres a step and the place along the axes whose unit is a length."""
    import pint

    registry = pint.get_application_registry()  # type: ignore[no-untyped-call]
    steps, units = attributes.get("scale"), attributes.get("units")
    if steps is None or units is None:
        return Scale()
    places = attributes.get("translate")
    sizes, origin = {}, {}
    for axis, step, at, unit in zip(
        axes, steps, [0.0] * len(axes) if places is None else places, units, strict=True
    ):
        one = registry.Quantity(1.0, str(unit))
        if one.is_compatible_with("micrometer"):
            factor = float(one.to("micrometer").magnitude)
            sizes[axis] = abs(float(step)) * factor
            if step > 0:
                origin[axis] = float(at) * factor
    return Scale(sizes, origin=origin)


def write_mask(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write labels of one plane as a mask, 255 = blurred and 0 = sharp.

    Raises
    ------
    ImageError
        If it is a stack.
    DataError
        If pixels are unlabelled, or labelled as anything but sharp and blurred: a mask has no code
        for them.
    """
    target = Path(path)
    codes = _one_plane(target, np.asarray(data))
    if (codes == UNLABELLED).any():
        share = float((codes == UNLABELLED).mean())
        raise DataError(
            f"{target.name}: {share:.0%} of the pixels are unlabelled, and a mask knows only "
            "blurred and sharp; label them, or save the layer as a tif of its codes"
        )
    others = np.setdiff1d(codes, (SHARP, BLURRED))
    if others.size:
        raise DataError(
            f"{target.name}: label {others[0]} is neither sharp ({SHARP}) nor blurred ({BLURRED}); "
            "a blur mask knows no others, save the layer as a tif"
        )
    io.write_png(target, np.where(codes == BLURRED, np.uint8(255), np.uint8(0)))
    return [path]


def _one_plane(target: Path, array: Any) -> Any:
    plane = array.reshape(array.shape[-2:]) if array.size == np.prod(array.shape[-2:]) else array
    if plane.ndim != 2:
        raise ImageError(
            f"{target.name}: a png holds one plane, this layer has shape {array.shape}; save it as "
            "tif (of labels: napari's own, 1 = sharp and 2 = blurred), or one plane of it"
        )
    return plane
