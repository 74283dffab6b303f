"""Arrays of a result, which can be re-thresholded and added to. No widget here."""

from __future__ import annotations

import shlex
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._colors import BLURRED, SHARP
from napari_semanticblur._layers import METADATA_KEY, find_result, unwrapped

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

# Pixels whose codes are made in one go while the window waits, a few hundredths of a second.
_BLOCK_PX = 2**21


@dataclass(eq=False)
class Pixels:
    """Arrays of a result.

    Attributes
    ----------
    box
        Which planes of the layer they are, along each walked axis.
    blur, labels
        Walked axes, rows, columns; NaN and 0 where nothing was analysed.
    done
        Walked axes: which planes are whole.
    made_with
        Equal for results that can stand in one layer.
    data
        Gives the layer's data that was analysed.
    threshold
        Of the labels.
    """

    box: tuple[range, ...]
    blur: NDArray[np.float32]
    labels: NDArray[np.uint8]
    done: NDArray[np.bool_]
    made_with: tuple[Any, ...]
    data: Callable[[], Any]
    threshold: float

    def covers(self, box: tuple[range, ...]) -> bool:
        """Whether these planes are among them."""
        pairs = zip(self.box, box, strict=True)
        return all(ours.start <= b.start and b.stop <= ours.stop for ours, b in pairs)

    @property
    def n_done(self) -> int:
        """Planes that are whole."""
        return int(self.done.sum())


# As long as a layer lives: the arrays of its result.
_results: WeakKeyDictionary[Any, Pixels] = WeakKeyDictionary()


def remember(layer: Any, pixels: Pixels) -> None:
    """These arrays are the layer's result now."""
    _results[unwrapped(layer)] = pixels


def pixels_of(viewer: ViewerModel, layer: Image) -> Pixels | None:
    """Arrays of a layer's result, if both of its layers still show them."""
    pixels = _results.get(unwrapped(layer))
    if pixels is None:
        return None
    for kind, array in (("map", pixels.blur), ("labels", pixels.labels)):
        shown = find_result(viewer, layer, kind)
        if shown is None or not np.may_share_memory(shown.data, array):
            return None
    return pixels


def reference(data: Any) -> Callable[[], Any]:
    """Function that gives the data as long as something else keeps it."""
    try:
        return weakref.ref(data)
    except TypeError:
        return lambda: data


def label_codes(blur: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """Codes of a blur map: 1 = sharp, 2 = blurred, 0 where it is NaN (not analysed yet)."""
    codes = np.where(blur > threshold, np.uint8(BLURRED), np.uint8(SHARP))
    codes[np.isnan(blur)] = 0
    return codes


def rethreshold(viewer: ViewerModel, layer: Image, threshold: float) -> Iterator[None]:
    """Label codes of a layer's existing map at another threshold, bit by bit; no inference."""
    pixels = pixels_of(viewer, layer)
    if pixels is None:
        return
    pixels.threshold = threshold
    n_rows = max(1, _BLOCK_PX // pixels.blur.shape[-1])
    for index in np.ndindex(pixels.blur.shape[:-2]):
        for top in range(0, pixels.blur.shape[-2], n_rows):
            rows = (*index, slice(top, top + n_rows))
            pixels.labels[rows] = label_codes(pixels.blur[rows], threshold)
            yield
    for kind in ("map", "labels"):
        result = find_result(viewer, layer, kind)
        if result is None:
            return
        record = result.metadata[METADATA_KEY]
        settings = {**record["settings"], "threshold": threshold}
        command = _with_threshold(record["command"], threshold)
        record = {**record, "settings": settings, "command": command}
        result.metadata = {**result.metadata, METADATA_KEY: record}


def _with_threshold(command: str, threshold: float) -> str:
    parts = shlex.split(command)
    flag = "--threshold="
    return shlex.join([f"{flag}{threshold:g}" if p.startswith(flag) else p for p in parts])
