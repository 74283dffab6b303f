"""One detection on one layer: settings in, a map layer and a labels layer out. No widget here."""

from __future__ import annotations

import importlib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._colors import (
    BLURRED,
    MAP_COLORMAP,
    SHARP,
    label_colormap,
)
from napari_semanticblur._layers import (
    METADATA_KEY,
    find_result,
    in_layer_axes,
    plane_index,
    read_source,
    result_placement,
    unwrapped,
    visible_region,
)
from napari_semanticblur._models import METHODS
from napari_semanticblur._worker import Announcement, Failure, Run
from semanticblur_core import __version__
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.planes import Channels, Planes
from semanticblur_core.inference.tiling import OVERLAP_PX, TILE_SIZE_PX, TileGrid

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

    from semanticblur_core.inference.planes import DetectUpdate

Scope = Literal["current", "all", "range"]
Limits = list[tuple[float, float]]

# What is remembered of a layer as long as it lives. Ranges of intensity, so that its planes are
# analysed alike whenever they are; and the arrays of its result, to re-threshold and to add to.
_ranges: WeakKeyDictionary[Any, tuple[int, Channels, Limits | None]] = WeakKeyDictionary()
_results: WeakKeyDictionary[Any, Pixels] = WeakKeyDictionary()
_running: set[Detection] = set()


@dataclass(frozen=True, eq=False)
class Pixels:
    """Arrays of a result: walked axes, rows, columns, and which planes of the layer they are."""

    box: tuple[range, ...]
    blur: NDArray[np.float32]
    labels: NDArray[np.uint8]
    made_with: tuple[Any, ...]

    def covers(self, box: tuple[range, ...]) -> bool:
        """Whether these planes are among them."""
        pairs = zip(self.box, box, strict=True)
        return all(ours.start <= b.start and b.stop <= ours.stop for ours, b in pairs)


@dataclass(frozen=True)
class Settings:
    """What a detection does.

    Attributes
    ----------
    model, device
        See `semanticblur_core.Detector`.
    size
        Side of the square that a plane is squashed to in pixels, or ``"native"`` for tiles.
    scope, first, last
        The plane shown, all planes, or planes first to last (both included, from 0) along the last
        axis with a slider.
    threshold
        A pixel is blurred where the map is above it.
    level
        Resolution level of a multiscale layer, 0 is full.
    channels
        See `semanticblur_core.inference.planes.Planes`.
    """

    model: str = "default"
    device: str = "auto"
    size: int | Literal["native"] = 320
    scope: Scope = "current"
    first: int = 0
    last: int = 0
    threshold: float = 0.5
    level: int = 0
    channels: Channels = "each"


def label_codes(blur: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """Codes of a blur map: 1 = sharp, 2 = blurred, 0 where it is NaN (not analysed yet)."""
    codes = np.where(blur > threshold, np.uint8(BLURRED), np.uint8(SHARP))
    codes[np.isnan(blur)] = 0
    return codes


class Detection:
    """A detection, from the click to the layers.

    Parameters
    ----------
    viewer, layer, settings
        What to do on which layer of which viewer.
    on_status
        Called in the main thread with a line for people.
    on_progress
        Called in the main thread with steps done and steps in all.
    on_end
        Called once in the main thread.

    Raises
    ------
    ImageError, ConfigError
        If the layer cannot be analysed so.
    """

    def __init__(
        self,
        viewer: ViewerModel,
        layer: Image,
        settings: Settings,
        *,
        on_status: Callable[[str], None] = lambda text: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.viewer, self.layer, self.settings = viewer, unwrapped(layer), settings
        if any(other.layer is self.layer for other in _running):
            raise ImageError(f"{self.layer.name}: is being analysed already; cancel that first")
        self.threshold = settings.threshold
        self._on_status, self._on_progress, self._on_end = on_status, on_progress, on_end
        self.source = read_source(layer, level=settings.level)
        self.planes = self.source.planes(settings.channels)
        shown = plane_index(self.source, viewer, self.planes)
        self.box = _box(self.planes, settings, shown)
        self.indices = _nearest_first(self.box, shown)
        self.visible = visible_region(self.source, viewer)
        pieces = 1
        if settings.size == "native" and settings.model not in METHODS:
            pieces = len(TileGrid(*self.planes.plane_shape, TILE_SIZE_PX, OVERLAP_PX))
        self.n_steps = len(self.indices) * pieces
        self._made_with = (
            *(settings.model, settings.device, settings.size, settings.level, settings.channels),
            id(layer.data),
        )
        self._n_blurred = self._n_done = 0
        self.pixels = self._earlier_pixels()
        if self.pixels is None:
            _require_memory(self._shape, layer.name)
        self.limits: Limits | None = None
        self._layers: dict[str, Any] = {}
        self._reason = ""
        self._sha256: str | None = None
        self._stopped_because = ""
        self._data_id = id(layer.data)
        self._run = Run(
            self._work,
            title=f"Detect defocus blur: {layer.name}",
            n_steps=self.n_steps,
            on_update=self._update,
            on_end=self._ended,
        )

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*(len(axis) for axis in self.box), *self.planes.plane_shape)

    def _earlier_pixels(self) -> Pixels | None:
        """Arrays of an earlier result that these planes can be added to: none of it is lost."""
        pixels = _results.get(self.layer)
        if pixels is None or pixels.made_with != self._made_with:
            return None
        shown = [find_result(self.viewer, self.layer, kind) for kind in ("map", "labels")]
        same = all(layer is not None for layer in shown) and all(
            np.may_share_memory(layer.data, array)
            for layer, array in zip(shown, (pixels.blur, pixels.labels), strict=True)
        )
        return pixels if same and pixels.covers(self.box) else None

    def start(self) -> None:
        """Start in the background."""
        _running.add(self)
        self.viewer.layers.events.removed.connect(self._layer_removed)
        self.layer.events.data.connect(self._data_changed)
        self._run.start()

    def cancel(self) -> None:
        """Stop at the next tile or plane; what is done is kept."""
        self._run.cancel()

    def command_line(self) -> str:
        """Equivalent ``semanticblur-core`` command."""
        settings = self.settings
        path = self.layer.source.path
        parts = ["semanticblur-core", "detect", f"--input={path or 'FILE'}", "--output=result"]
        if settings.model in METHODS:
            parts.append(f"--method={settings.model}")
        else:
            parts += [f"--model={settings.model}", f"--device={settings.device}"]
            parts.append(f"--size={settings.size}")
        parts.append(f"--threshold={settings.threshold:g}")
        if len(self.source.axes.replace("S", "")) > 2 or self.source.axes != self.planes.axes:
            parts.append(f"--axes={self.source.axes}")
        if settings.channels != "each":
            parts.append(f"--channels={settings.channels}")
        if self.planes.lengths and len(self.indices) < len(self.planes):
            parts.append("--planes=" + ",".join(f"{axis.start}:{axis.stop}" for axis in self.box))
        for low, high in (self.limits or [])[:1]:
            parts.append(f"--range={low:.9g},{high:.9g}")
        if self.source.level:
            parts.append(f"--level={self.source.level}")
        return shlex.join(parts)

    # The worker's thread from here.

    def _work(self) -> Iterator[Any]:
        from napari_semanticblur import _models

        settings = self.settings
        if not _models.is_loaded(settings.model, settings.device):
            yield Announcement("Loading PyTorch and the model; the first time takes a moment ...")
            # napari imports it for its first Labels layer, in the main thread if it is left to it.
            importlib.import_module("pandas")
        detector = _models.detector(settings.model, settings.device)
        self._reason = detector.reason
        self._sha256 = getattr(detector, "sha256", None)
        yield Announcement(f"Detecting ({detector.reason}) ...")
        if self.pixels is None:
            blur = np.full(self._shape, np.nan, np.float32)  # NaN: not analysed yet
            labels = np.zeros(self._shape, np.uint8)
            self.pixels = Pixels(self.box, blur, labels, self._made_with)
        self.limits = self._find_limits()
        for update in detector.iter_planes(
            self.source.array,
            self.source.axes,
            indices=self.indices,
            channels=settings.channels,
            size=settings.size,
            value_range=self.limits,
            visible=self.visible,
        ):
            self._write(update)
            yield update

    def _find_limits(self) -> Limits | None:
        key = (id(self.layer.data), self.settings.channels)
        known = _ranges.get(self.layer)
        if known is not None and known[:2] == key:
            return known[2]
        whole = self.settings.scope == "all" or isinstance(self.source.array, np.ndarray)
        limits = self.planes.estimate_range(None if whole else self.indices[:1])
        _ranges[self.layer] = (*key, limits)
        return limits

    def _write(self, update: DetectUpdate) -> None:
        assert self.pixels is not None
        place = tuple(i - axis.start for i, axis in zip(update.index, self.pixels.box, strict=True))
        region: tuple[Any, ...] = (*place, *update.region)
        part = update.blur[update.region]
        self.pixels.blur[region] = part
        self.pixels.labels[region] = label_codes(part, self.threshold)
        if update.plane_done:
            self._n_blurred += int(np.count_nonzero(update.blur > self.threshold))
            self._n_done += update.blur.size

    # The main thread again.

    def _update(self, update: Any) -> int:
        if isinstance(update, Announcement):
            self._on_status(update.text)
            return 0
        # napari takes about a tenth of a second to add a layer: one a turn of the event loop.
        if "map" not in self._layers:
            self._show("map")
        elif "labels" not in self._layers:
            self._show("labels")
        elif update.plane_done or self.settings.size == "native":
            self._refresh()
        self._on_progress(update.n_done, self.n_steps)
        self._on_status(f"{update.n_done} of {self.n_steps} done")
        return int(update.n_done)

    def _show(self, kind: Literal["map", "labels"]) -> None:
        """Add a layer, or give the one of an earlier run the new data; once a run."""
        if kind in self._layers or self.layer not in self.viewer.layers:
            return
        assert self.pixels is not None
        _results[self.layer] = self.pixels
        made = self.pixels.blur if kind == "map" else self.pixels.labels
        # One map stands for all channels of a mean.
        array = in_layer_axes(self.source, made, self.planes.walked_axes + "YX")
        start = [0] * self.layer.ndim
        for axis, extent in zip(self.planes.walked_axes, self.pixels.box, strict=True):
            start[self.source.layer_axes.index(axis)] = extent.start
        placement = result_placement(self.source, start)
        record = {METADATA_KEY: self._record(kind, complete=False)}
        existing = find_result(self.viewer, self.layer, kind)
        if existing is not None:
            if not np.may_share_memory(existing.data, array):
                existing.data = array
                for name, value in placement.items():
                    setattr(existing, name, value)
            existing.metadata = {**existing.metadata, **record}
            added = existing
        elif kind == "map":
            added = self.viewer.add_image(
                array,
                name=f"{self.layer.name} blur map",
                colormap=MAP_COLORMAP,
                contrast_limits=(0, 1),
                visible=False,
                metadata=record,
                **placement,
            )
        else:
            added = self.viewer.add_labels(
                array,
                name=f"{self.layer.name} blur",
                colormap=label_colormap(),
                opacity=0.4,
                metadata=record,
                **placement,
            )
        self._layers[kind] = unwrapped(added)
        self.viewer.layers.selection.active = self.layer

    def _record(self, kind: str, *, complete: bool) -> dict[str, Any]:
        return {
            "kind": kind,
            "source": self.layer.name,
            "source_id": str(self.layer.unique_id),
            "model": self.settings.model,
            "model_sha256": self._sha256,
            "version": __version__,
            "settings": asdict(self.settings) | {"threshold": self.threshold},
            "axes": self.source.axes,
            "planes": [[axis.start, axis.stop] for axis in self.box],
            "level": self.source.level,
            "value_range": self.limits,
            "device": self._reason,
            "complete": complete,
            "command": self.command_line(),
        }

    def _refresh(self) -> None:
        for layer in self._layers.values():
            if layer.visible:
                layer.refresh(extent=False, thumbnail=False)

    def _layer_removed(self, event: Any) -> None:
        if event.value is self.layer or event.value in self._layers.values():
            self._stopped_because = f"the layer {event.value.name} was removed"
            self.cancel()

    def _data_changed(self, event: Any = None) -> None:
        if id(self.layer.data) != self._data_id:
            self._stopped_because = f"the data of {self.layer.name} was changed"
            self.cancel()

    def _ended(self, outcome: str | Failure) -> None:
        from napari.utils.notifications import show_error

        self.viewer.layers.events.removed.disconnect(self._layer_removed)
        self.layer.events.data.disconnect(self._data_changed)
        _running.discard(self)
        if "map" in self._layers:
            self._show("labels")
        for kind, layer in self._layers.items():
            layer.metadata = {
                **layer.metadata,
                METADATA_KEY: self._record(kind, complete=outcome == "done"),
            }
            # Mesa's software renderer crashes where a layer is redrawn soon after one was removed.
            if self.layer in self.viewer.layers and layer in self.viewer.layers:
                layer.refresh(extent=False)
        if isinstance(outcome, Failure):
            text = f"{self.layer.name}: {outcome.text}"
            show_error(text)
        elif outcome == "cancelled":
            why = f": {self._stopped_because}" if self._stopped_because else ""
            text = f"Stopped{why}"
            # The status bar, not a notification: the redraw under one that pops up does the same.
            self.viewer.status = f"Detect defocus blur stopped{why}"
        else:
            text = f"{self._n_blurred / max(self._n_done, 1):.0%} out of focus ({self._reason})"
        self._on_status(text)
        self._on_end()


def rethreshold(viewer: ViewerModel, layer: Image, threshold: float) -> Iterator[None]:
    """Label codes of a layer's existing map at another threshold, plane by plane; no inference."""
    shown = [find_result(viewer, layer, kind) for kind in ("map", "labels")]
    pixels = _results.get(unwrapped(layer))
    if pixels is None or None in shown:
        return
    blur_map, labels = shown
    if not np.may_share_memory(labels.data, pixels.labels):
        return
    for index in np.ndindex(pixels.blur.shape[:-2]):
        pixels.labels[index] = label_codes(pixels.blur[index], threshold)
        yield
    for result in (blur_map, labels):
        record = result.metadata[METADATA_KEY]
        settings = {**record["settings"], "threshold": threshold}
        command = _with_threshold(record["command"], threshold)
        record = {**record, "settings": settings, "command": command}
        result.metadata = {**result.metadata, METADATA_KEY: record}


def _with_threshold(command: str, threshold: float) -> str:
    parts = shlex.split(command)
    flag = "--threshold="
    return shlex.join([f"{flag}{threshold:g}" if p.startswith(flag) else p for p in parts])


def _box(planes: Planes, settings: Settings, shown: Sequence[int]) -> tuple[range, ...]:
    """Planes asked for, as a range along each walked axis."""
    if settings.scope == "all":
        return tuple(range(length) for length in planes.lengths)
    box = [range(i, i + 1) for i in shown]
    if settings.scope == "range" and box:
        first, last, length = settings.first, settings.last, planes.lengths[-1]
        if not 0 <= first <= last < length:
            raise ImageError(
                f"planes {first} to {last}: expected a range within 0 to {length - 1} along "
                f"{planes.walked_axes[-1]}"
            )
        box[-1] = range(first, last + 1)
    return tuple(box)


def _nearest_first(box: tuple[range, ...], shown: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of a box, those near the plane shown first."""
    starts = [axis.start for axis in box]
    indices = [
        tuple(int(i) + start for i, start in zip(index, starts, strict=True))
        for index in np.ndindex(tuple(len(axis) for axis in box))
    ]
    return sorted(indices, key=lambda i: [abs(a - b) for a, b in zip(i, shown, strict=True)])


def _require_memory(shape: tuple[int, ...], name: str) -> None:
    import psutil

    needed, free = math.prod(shape) * 5, psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise ImageError(
            f"{name}: a result of {' x '.join(map(str, shape))} needs {needed / 2**30:.1f} GiB of "
            f"memory and {free / 2**30:.1f} are free; analyse a range of planes or a coarser "
            "level, or use the command line, which writes files"
        )
