"""Blur maps from files and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from napari_semanticblur._colors import BLURRED, MAP_COLORMAP, UNLABELLED
from semanticblur_core import io
from semanticblur_core.errors import DataError, ImageError

LayerData = tuple[Any, dict[str, Any], str]
SUFFIXES = (".png", ".tif", ".npy")


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """Reader of files named as ``detect`` names its maps, or None for any other."""
    paths = [path] if isinstance(path, str) else path
    if all(Path(p).stem.endswith("_blur") and Path(p).suffix in SUFFIXES for p in paths):
        return read_maps
    return None


def read_maps(path: str | list[str]) -> list[LayerData]:
    """Image layers of blur maps, 0..1.

    Raises
    ------
    ImageError
        If a file cannot be read or is no blur map.
    """
    layers: list[LayerData] = []
    for each in [path] if isinstance(path, str) else path:
        attributes = {
            "name": Path(each).stem,
            "colormap": MAP_COLORMAP,
            "contrast_limits": (0, 1),
        }
        layers.append((io.read_map(Path(each)), attributes, "image"))
    return layers


def write_map(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write an image layer in 0..1: float32 as tif and npy, 8 bits as png.

    Raises
    ------
    ImageError
        If it is no map in 0..1, or of more than two axes for a png.
    """
    target, blur = Path(path), np.asarray(data)
    if blur.dtype.kind != "f" or attributes.get("rgb"):
        raise ImageError(f"{target.name}: expected a blur map of floats, got {blur.dtype}")
    low, high = float(np.min(blur)), float(np.max(blur))
    if not 0 <= low <= high <= 1:
        raise ImageError(
            f"{target.name}: expected a whole blur map in 0..1, got {low:g}..{high:g}; NaN is what "
            "was not analysed"
        )
    blur = blur.astype(np.float32, copy=False)
    if target.suffix == ".npy":
        io.write_npy(target, blur)
    elif target.suffix == ".png":
        io.write_png(target, np.round(_one_plane(target, blur) * 255).astype(np.uint8))
    else:
        io.write_tiff(target, blur)
    return [path]


def write_mask(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write labels of one plane as a mask, 255 = blurred and 0 = sharp.

    Raises
    ------
    ImageError
        If it is a stack.
    DataError
        If pixels are unlabelled: a mask has no code for them.
    """
    target = Path(path)
    codes = _one_plane(target, np.asarray(data))
    if (codes == UNLABELLED).any():
        share = float((codes == UNLABELLED).mean())
        raise DataError(
            f"{target.name}: {share:.0%} of the pixels are unlabelled, and a mask knows only "
            "blurred and sharp; label them, or save the layer as a tif of its codes"
        )
    io.write_png(target, np.where(codes == BLURRED, np.uint8(255), np.uint8(0)))
    return [path]


def _one_plane(target: Path, array: Any) -> Any:
    plane = array.reshape(array.shape[-2:]) if array.size == np.prod(array.shape[-2:]) else array
    if plane.ndim != 2:
        raise ImageError(
            f"{target.name}: a png holds one plane, this layer has shape {array.shape}; use tif"
        )
    return plane
