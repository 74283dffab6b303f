"""Arrays of a result, which can be re-thresholded and added to. No widget here."""

from __future__ import annotations

import shlex
import threading
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
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
_BLOCK_PX = 2**20


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
        That the labels are to have.
    thresholds
        Walked axes, rows: that the labels of a row have; NaN where nothing was analysed.
    by_hand
        Which labels are not those of their threshold: they stay when it moves.
    lock
        Held while labels and ``thresholds`` do not agree; the worker writes them too.
    """

    box: tuple[range, ...]
    blur: NDArray[np.float32]
    labels: NDArray[np.uint8]
    done: NDArray[np.bool_]
    made_with: tuple[Any, ...]
    data: Callable[[], Any]
    threshold: float
    thresholds: NDArray[np.float32] = field(init=False)
    by_hand: NDArray[np.bool_] = field(init=False)
    lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Compared with maps as a plain number is, in float32.
        self.thresholds = np.full(self.labels.shape[:-1], np.nan, np.float32)
        # Pages of zeros take no memory until they are written to.
        self.by_hand = np.zeros(self.labels.shape, np.bool_)

    def write(self, place: tuple[Any, ...], blur: NDArray[np.float32], where: Any) -> None:
        """Put pixels of a map in, and their labels.

        Parameters
        ----------
        place
            Index of the plane in these arrays, then slices of rows and columns.
        blur
            Rows, columns.
        where
            Which of the pixels are known.
        """
        with self.lock:
            rows = self.thresholds[place[:-1]]
            rows[np.isnan(rows)] = self.threshold
            np.copyto(self.blur[place], blur, where=where)
            np.copyto(self.labels[place], label_codes(blur, rows[:, np.newaxis]), where=where)
            if self.by_hand[place].any():
                self.by_hand[place] &= ~where

    def move_threshold(self, rows: tuple[Any, ...]) -> None:
        """Bring the labels of some rows of a plane to `threshold`, but for what was painted."""
        before = self.thresholds[rows][:, np.newaxis]
        due = ~np.isnan(before) & (before != self.threshold)
        if not due.any():
            return
        blur, labels = self.blur[rows], self.labels[rows]
        painted = self.by_hand[rows]
        new = due & (labels != label_codes(blur, before)) & ~painted
        if new.any():
            painted |= new
        np.copyto(labels, label_codes(blur, self.threshold), where=due & ~painted)
        self.thresholds[rows][due[:, 0]] = self.threshold

    @property
    def has_mixed_thresholds(self) -> bool:
        """Whether some labels have another threshold than they are to have."""
        known = self.thresholds[~np.isnan(self.thresholds)]
        return bool((known != self.threshold).any())

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
    """Arrays of a layer's result, if its layers still show them; the map may have been removed."""
    pixels = _results.get(unwrapped(layer))
    if pixels is None:
        return None
    labels, blur = (find_result(viewer, layer, kind) for kind in ("labels", "map"))
    if labels is None or not np.may_share_memory(labels.data, pixels.labels):
        return None
    if blur is not None and not np.may_share_memory(blur.data, pixels.blur):
        return None
    return pixels


def reference(data: Any) -> Callable[[], Any]:
    """Function that gives the data as long as something else keeps it."""
    try:
        return weakref.ref(data)
    except TypeError:
        return lambda: data


def label_codes(
    blur: NDArray[np.float32], threshold: float | NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Codes of a blur map: 1 = sharp, 2 = blurred, 0 where it is NaN (not analysed yet)."""
    codes = np.where(blur > threshold, np.uint8(BLURRED), np.uint8(SHARP))
    codes[np.isnan(blur)] = 0
    return codes


def is_outdated(viewer: ViewerModel, layer: Image) -> bool:
    """Whether a layer has labels that are not of the data that it has now."""
    if find_result(viewer, layer, "labels") is None:
        return False
    pixels = pixels_of(viewer, layer)
    return pixels is None or pixels.data() is not layer.data


def rethreshold(
    viewer: ViewerModel, layer: Image, threshold: float
) -> Generator[None, None, float | None]:
    """Move the threshold of a layer's existing labels, bit by bit; no inference.

    Labels that were painted by hand stay as they are.

    Returns
    -------
    float or None
        Share of the labels that are blurred now.
    """
    pixels = pixels_of(viewer, layer)
    if pixels is None:
        return None
    pixels.threshold = threshold
    n_known = n_blurred = 0
    n_rows = max(1, _BLOCK_PX // pixels.blur.shape[-1])
    for index in np.ndindex(pixels.blur.shape[:-2]):
        for top in range(0, pixels.blur.shape[-2], n_rows):
            while not pixels.lock.acquire(blocking=False):  # the window does not wait for a worker
                yield
            try:
                rows = (*index, slice(top, top + n_rows))
                pixels.move_threshold(rows)
                n_known += int(np.count_nonzero(pixels.labels[rows]))
                n_blurred += int(np.count_nonzero(pixels.labels[rows] == BLURRED))
            finally:
                pixels.lock.release()
            yield
    for kind in ("map", "labels"):
        result = find_result(viewer, layer, kind)
        if result is None:
            continue
        record = result.metadata[METADATA_KEY]
        settings = {**record["settings"], "threshold": threshold}
        command = _with_threshold(record["command"], threshold)
        record = {**record, "settings": settings, "command": command}
        result.metadata = {**result.metadata, METADATA_KEY: record}
    return n_blurred / n_known if n_known else None


def _with_threshold(command: str, threshold: float) -> str:
    parts = shlex.split(command)
    flag = "--threshold="
    return shlex.join([f"{flag}{threshold:g}" if p.startswith(flag) else p for p in parts])
