"""Layers of focus: tiles as a heat map, the composite and the depth it was made by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_semanticblur._colors import HEAT_COLORMAP
from napari_semanticblur._layers import (
    METADATA_KEY,
    Source,
    camera_of,
    find_result,
    first_index,
    in_layer_axes,
    result_placement,
    unwrapped,
)
from semanticblur_core import __version__
from semanticblur_core.focus.session import ArrayFocus, Heat
from semanticblur_core.focus.stack import CompositeUpdate
from semanticblur_core.inference.planes import Channels

if TYPE_CHECKING:
    from napari.components import ViewerModel


def show_heat_map(viewer: ViewerModel, source: Source, session: ArrayFocus, heat: Heat) -> Any:
    """Add or update the layer of a layer's tiles, each where it was measured.

    Raises
    ------
    ImageError
        If no plane has such tiles.
    """
    tiles = session.heat_map(heat)
    height, width = source.planes(session.channels).plane_shape
    size_px = session.tile_size_px
    array = in_layer_axes(source, tiles, f"{session.walked_axes}YX", session.channels)
    # Tiles at the far edges are smaller, and drawn as large as the others.
    factors = (*source.factors[:-2], *(factor * size_px for factor in source.factors[-2:]))
    top = 1.0 if heat == "in_focus" else float(np.nanmax(tiles)) or 1.0
    return _show(
        viewer,
        source,
        "heat",
        array,
        result_placement(replace(source, factors=factors), first_index(source, session.channels)),
        name="share in focus" if heat == "in_focus" else "Tenengrad",
        record={"heat": heat, "tile_size_px": size_px, "plane_shape": [height, width]},
        colormap=HEAT_COLORMAP,
        contrast_limits=(0.0, top),
        opacity=0.5,
    )


def show_composite(
    viewer: ViewerModel,
    source: Source,
    channels: Channels,
    along: str,
    at: tuple[int, ...],
    made: CompositeUpdate,
) -> None:
    """Add or update the composite, and, hidden, the index of the plane it took at each place."""
    assert made.composite is not None
    assert made.depth is not None
    axes = source.planes(channels).walked_axes.replace(along, "")
    layer = source.layer
    where = ", ".join(f"{axis.lower()} {i}" for axis, i in zip(axes, at, strict=True))
    if channels != "each":
        where = f"channel {channels}" + (f", {where}" if where else "")
    look: dict[str, Any] = {}
    if not layer.rgb:
        look = {"colormap": layer.colormap, "contrast_limits": tuple(layer.contrast_limits)}
    record = {"along": along, "at": list(at), "channels": channels}
    one = (np.newaxis,) * len(axes)
    start = first_index(source, channels)
    for axis, i in zip(axes, at, strict=True):
        start[source.layer_axes.index(axis)] = i
    placement = result_placement(source, start)
    for kind, pixels, name, how in (
        ("depth", made.depth.astype(np.float32), "sharpest plane", _depth_look(made)),
        ("composite", made.composite, "all in focus", {"rgb": layer.rgb, **look}),
    ):
        array = in_layer_axes(source, pixels[one], f"{axes}YX", channels)
        title = f"{name}, {where}" if where else name
        _show(
            viewer, source, kind, array, placement, name=title, record=record, alike=record, **how
        )


def look_at_tile(
    viewer: ViewerModel, source: Source, session: ArrayFocus, tile: tuple[int, int]
) -> None:
    """Move the camera to the middle of a tile."""
    shape = source.planes(session.channels).plane_shape
    middle = [
        min((i + 0.5) * session.tile_size_px, n - 0.5) * factor
        for i, n, factor in zip(tile, shape, source.factors[-2:], strict=True)
    ]
    world = source.layer.data_to_world([0.0] * (source.layer.ndim - 2) + middle)
    camera_of(viewer).center = (0.0, float(world[-2]), float(world[-1]))


def _depth_look(made: CompositeUpdate) -> dict[str, Any]:
    assert made.depth is not None
    top = max(1.0, float(made.depth.max()))
    return {"colormap": HEAT_COLORMAP, "contrast_limits": (0.0, top), "visible": False}


def _show(
    viewer: ViewerModel,
    source: Source,
    kind: str,
    array: Any,
    placement: dict[str, Any],
    *,
    name: str,
    record: dict[str, Any],
    alike: Mapping[str, Any] | None = None,
    **how: Any,
) -> Any:
    """Add a layer, or update that of the kind whose record says the same as ``alike``."""
    layer = source.layer
    record = {
        "kind": kind,
        "source": layer.name,
        "source_id": str(layer.unique_id),
        "version": __version__,
        "level": source.level,
        **record,
    }
    existing = find_result(viewer, layer, kind, alike)
    if existing is None:
        added = viewer.add_image(
            array,
            name=f"{layer.name} {name}",
            metadata={METADATA_KEY: record},
            **placement,
            **how,
        )
        viewer.layers.selection.active = layer
        return unwrapped(added)
    existing.data = array
    for key, value in placement.items():
        setattr(existing, key, value)
    existing.name = f"{layer.name} {name}"
    existing.metadata = {**existing.metadata, METADATA_KEY: record}
    if "contrast_limits" in how:
        existing.contrast_limits_range = existing.contrast_limits = how["contrast_limits"]
    return existing
