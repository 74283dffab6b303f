"""Keys, brush and superpixels of the annotate widget, on its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from napari_semanticblur import _labelling
from napari_semanticblur._annotation_source import shown_plane
from napari_semanticblur._colors import BLURRED, SHARP, UNLABELLED
from semanticblur_core.errors import SemanticBlurError

if TYPE_CHECKING:
    from napari.layers import Labels

    from napari_semanticblur._annotation import Annotation

BRUSH_FACTOR = 1.5
# A click may tremble by that much.
CLICK_PX = 3


class Owner(Protocol):
    """What the tools take from the widget that they belong to."""

    brush: Any
    superpixels: Any
    superpixel_px: Any

    @property
    def viewer(self) -> Any:
        """The viewer of its layers."""
        ...

    @property
    def current(self) -> Annotation | None:
        """What is being painted."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether it is gone."""
        ...

    def choose(self, code: int) -> None:
        """Paint with this class from now on."""
        ...

    def step(self, by: int) -> None:
        """Go on to another image of the folder."""
        ...

    def say(self, text: str) -> None:
        """Tell the user."""
        ...

    def guarded(self, action: Callable[..., object]) -> Callable[..., None]:
        """The action, what it raises told instead."""
        ...


class Tools:
    """What works on the canvas.

    Parameters
    ----------
    widget
        Its widgets say how.
    """

    def __init__(self, widget: Owner) -> None:
        self._widget = widget
        self._annotations: WeakKeyDictionary[Labels, Annotation] = WeakKeyDictionary()

    def attach(self, annotation: Annotation) -> None:
        """Make a layer know the keys, the brush and the superpixels."""
        layer = annotation.layer
        is_new = layer not in self._annotations
        self._annotations[layer] = annotation
        self._bind_keys(layer)
        layer.brush_size = int(self._widget.brush.value)
        if is_new:
            layer.mouse_drag_callbacks.append(self._clicked)
            layer.events.brush_size.connect(self._brush_changed)
            layer.events.mode.connect(self._mode_changed)

    def detach(self, annotation: Annotation) -> None:
        """Leave a layer to the tools of another widget."""
        layer = annotation.layer
        if self._annotations.pop(layer, None) is not None:
            layer.mouse_drag_callbacks.remove(self._clicked)
            layer.events.brush_size.disconnect(self._brush_changed)
            layer.events.mode.disconnect(self._mode_changed)

    def brush_moved(self, size_px: int) -> None:
        """Give the layer the brush of the slider."""
        annotation = self._widget.current
        if annotation is not None:
            annotation.layer.brush_size = size_px

    def superpixels_switched(self, on: bool) -> None:
        """Clicks label superpixels in napari's mode that moves the view."""
        annotation = self._widget.current
        if annotation is None or annotation.is_read_only:
            return
        if on:
            annotation.layer.mode = "pan_zoom"
        elif str(annotation.layer.mode) == "pan_zoom":  # not where another tool was taken up
            annotation.layer.mode = "paint"

    def _bind_keys(self, layer: Labels) -> None:
        """Letters that napari leaves free on labels; these hold on this layer only."""
        widget = self._widget
        for key, action in {
            "S": lambda: widget.choose(SHARP),
            "D": lambda: widget.choose(BLURRED),
            "U": lambda: widget.choose(UNLABELLED),
            "G": lambda: setattr(widget.superpixels, "value", not widget.superpixels.value),
            "Q": lambda: self._scale_brush(1 / BRUSH_FACTOR),
            "W": lambda: self._scale_brush(BRUSH_FACTOR),
            "N": lambda: widget.step(1),
            "Shift-N": lambda: widget.step(-1),
        }.items():
            layer.bind_key(key, widget.guarded(action), overwrite=True)

    def _scale_brush(self, factor: float) -> None:
        brush = self._widget.brush
        size = int(brush.value)
        scaled = round(size * factor)
        self._set_brush(max(scaled, size + 1) if factor > 1 else scaled)

    def _set_brush(self, size_px: int) -> None:
        brush = self._widget.brush
        brush.value = min(max(size_px, int(brush.min)), int(brush.max))

    def _brush_changed(self, event: Any) -> None:
        if not self._widget.is_closed:
            self._set_brush(int(event.source.brush_size))

    def _mode_changed(self, event: Any) -> None:
        widget = self._widget
        if not widget.is_closed and widget.superpixels.value and str(event.mode) != "pan_zoom":
            widget.superpixels.value = False

    def _clicked(self, layer: Labels, event: Any) -> Iterator[None]:
        """A click labels; a drag moves the view, as ever."""
        start = np.asarray(event.pos)
        yield
        while event.type == "mouse_move":
            yield
        moved = float(np.abs(np.asarray(event.pos) - start).max()) > CLICK_PX
        widget, annotation = self._widget, self._annotations.get(layer)
        if widget.is_closed or not widget.superpixels.value or event.button != 1 or moved:
            return
        if str(layer.mode) != "pan_zoom":
            return
        plane = shown_plane(widget.viewer, layer)
        if annotation is None or annotation.source is None or not layer.editable:
            return
        if plane is None:
            widget.say(f"No plane of {layer.name} is shown: move the sliders to one.")
            return
        row, column = (round(float(p)) for p in layer.world_to_data(event.position)[-2:])
        height, width = layer.data.shape[-2:]
        if 0 <= row < height and 0 <= column < width:
            try:
                _labelling.label_superpixel(
                    layer,
                    annotation.source,
                    plane,
                    (row, column),
                    size_px=int(widget.superpixel_px.value),
                )
            except SemanticBlurError as error:  # nothing but NaN there, or unreadable
                widget.say(str(error))
