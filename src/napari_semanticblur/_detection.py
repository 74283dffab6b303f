"""One detection on one layer: settings in, a map layer and a labels layer out. No widget here."""

from __future__ import annotations

import importlib
import math
import shlex
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from napari_semanticblur import _models
from napari_semanticblur._colors import MAP_COLORMAP, label_colormap
from napari_semanticblur._layers import (
    METADATA_KEY,
    find_result,
    first_index,
    in_layer_axes,
    place,
    placed,
    read_source,
    require_inside,
    result_placement,
    slider_index,
    unwrapped,
    visible_region,
)
from napari_semanticblur._models import METHODS, identity
from napari_semanticblur._results import Pixels, pixels_of, reference, remember
from napari_semanticblur._worker import Announcement, Failure, Run
from semanticblur_core import __version__
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.map_maker import iter_readable
from semanticblur_core.inference.planes import QUICK_RANGE_PIXELS, Channels, Planes
from semanticblur_core.inference.tiling import OVERLAP_PX, TILE_SIZE_PX, TileGrid

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

    from semanticblur_core.inference.planes import DetectUpdate

Scope = Literal["current", "all", "range"]
Limits = list[tuple[float, float]]
Kind = Literal["map", "labels"]

# A redraw of a large layer takes longer than a tile: no more often than that.
_REFRESH_S = 0.1
# Longest that the worker waits for its layers to be added.
_ADDING_S = 1.0
# Time for the event loop between two steps of that.
_STEP_MS = 10


@dataclass(frozen=True, eq=False)
class _Range:
    """Intensities of a layer's data, so that its planes are analysed alike whenever they are."""

    data: Callable[[], Any]
    channels: Channels
    whole: bool
    channel: int
    limits: Limits | None

    def serves(self, data: Any, channels: Channels, *, whole: bool, channel: int) -> bool:
        """Whether it is of all these data, or of what is wanted of them."""
        same = self.data() is data and self.channels == channels
        return same and (self.whole or (not whole and self.channel == channel))


_ranges: WeakKeyDictionary[Any, _Range] = WeakKeyDictionary()
_running: set[Detection] = set()


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
        self.is_cancelled = False
        for other in _running:
            if other.layer is self.layer:
                raise ImageError(
                    f"{self.layer.name}: its last analysis is still stopping; try again in a moment"
                    if other.is_cancelled
                    else f"{self.layer.name}: is being analysed already; cancel that first"
                )
        self._on_status, self._on_progress, self._on_end = on_status, on_progress, on_end
        self.source = read_source(layer, level=settings.level, viewer=viewer)
        self.planes = self.source.planes(settings.channels)
        shown = slider_index(self.source, viewer, self.planes)
        self.box = _box(self.planes, settings, shown)
        require_inside(self.source, self.planes, [axis.start for axis in self.box])
        self.indices = _nearest_first(self.box, shown)
        self.visible = visible_region(self.source, viewer)
        pieces = 1
        if settings.size == "native" and settings.model not in METHODS:
            pieces = len(TileGrid(*self.planes.plane_shape, TILE_SIZE_PX, OVERLAP_PX))
        self.n_steps = len(self.indices) * pieces
        self._data = self.layer.data
        self._model = identity(settings.model)
        self._made_with = (*self._model, settings.size, settings.level, settings.channels)
        self._n_blurred = self._n_done = 0
        self._earlier = pixels_of(viewer, self.layer)
        self.pixels = self._earlier if self._can_be_added_to(self._earlier) else None
        if self.pixels is None:
            _require_memory(self._shape, layer.name)
        # One for all planes of a layer.
        self._threshold = settings.threshold if self.pixels is None else self.pixels.threshold
        self._put_away: dict[Kind, dict[str, Any]] = {}
        self._put_behind: list[Any] = []
        self.limits: Limits | None = None
        self._layers: dict[Kind, Any] = {}
        self._adding: Iterator[None] | None = None
        self._hidden: list[Any] = []
        self._are_added = threading.Event()
        self._n_steps_done = 0
        self._refreshed = 0.0
        self._reason = ""
        self._sha256: str | None = None
        self._stopped_because = ""
        self._unreadable: dict[tuple[int, ...], str] = {}
        self._run = Run(
            self._work,
            title=f"Detect defocus blur: {layer.name}",
            n_steps=self.n_steps,
            on_update=self._update,
            on_end=self._ended,
            on_cancel=self.cancel,
        )

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*(len(axis) for axis in self.box), *self.planes.plane_shape)

    def _can_be_added_to(self, earlier: Pixels | None) -> bool:
        """Whether these planes belong into an earlier result: then none of it is lost."""
        return (
            earlier is not None
            and earlier.made_with == self._made_with
            and earlier.data() is self._data
            and earlier.covers(self.box)
        )

    @property
    def threshold(self) -> float:
        """Of what is still to come; `rethreshold` moves what is there."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = threshold
        if self.pixels is not None:
            self.pixels.threshold = threshold

    @property
    def has_mixed_thresholds(self) -> bool:
        """Whether the labels of some rows were made with another threshold than it is now."""
        return self.pixels is not None and self.pixels.has_mixed_thresholds

    def start(self) -> None:
        """Start in the background."""
        _running.add(self)
        self.viewer.layers.events.removed.connect(self._layer_removed)
        self.layer.events.data.connect(self._data_changed)
        self._run.start()

    def cancel(self) -> None:
        """Stop at the next tile or plane; what is done is kept."""
        self.is_cancelled = True
        self._run.cancel()
        self._are_added.set()

    @property
    def _made(self) -> tuple[range, ...]:
        """Planes of the result, those of earlier runs among them."""
        return self.box if self.pixels is None else self.pixels.box

    def command_line(self) -> str:
        """Equivalent ``semanticblur-core`` command."""
        settings = self.settings
        path = self.layer.source.path
        parts = ["semanticblur-core", "detect", f"--input={path or 'FILE'}", "--output=result"]
        if settings.model in METHODS:
            parts.append(f"--method={settings.model}")
        else:
            parts += [f"--model={self._model[0]}", f"--device={settings.device}"]
            parts += [f"--backend={_models.BACKEND}", f"--size={settings.size}"]
        parts.append(f"--threshold={self.threshold:g}")
        if len(self.source.axes.replace("S", "")) > 2:
            parts.append(f"--axes={self.source.axes}")
        if settings.channels != "each":
            parts.append(f"--channels={settings.channels}")
        if math.prod(map(len, self._made)) < len(self.planes):
            parts.append("--planes=" + ",".join(f"{axis.start}:{axis.stop}" for axis in self._made))
        ranges = [f"{low:.9g},{high:.9g}" for low, high in self.limits or []]
        if ranges:
            parts.append(f"--range={','.join(ranges if len(set(ranges)) > 1 else ranges[:1])}")
        if self.source.level:
            parts.append(f"--level={self.source.level}")
        return shlex.join(parts)

    # The worker's thread from here.

    def _work(self) -> Iterator[Any]:
        settings = self.settings
        if not _models.is_loaded(settings.model, settings.device):
            yield Announcement("Loading PyTorch and the model; the first time takes a moment ...")
            # napari imports it for its first Labels layer, in the main thread if it is left to it.
            importlib.import_module("pandas")
        detector = _models.detector(settings.model, settings.device)
        self._reason = detector.reason
        self._sha256 = getattr(detector, "sha256", None)
        if self.pixels is None:
            self.pixels = Pixels(
                self.box,
                np.full(self._shape, np.nan, np.float32),  # NaN: not analysed yet
                np.zeros(self._shape, np.uint8),
                np.zeros(self._shape[:-2], np.bool_),
                self._made_with,
                reference(self._data),
                self.threshold,
            )
        self.limits = yield from self._find_limits()
        yield Announcement(f"Detecting ({detector.reason}) ...")
        for n_done, update in enumerate(self._updates(detector), 1):
            self._write(update)
            yield replace(update, n_done=min(n_done, self.n_steps))
            if n_done == 1:  # adding them takes half the time where nothing else is computed
                self._are_added.wait(_ADDING_S)

    def _updates(self, detector: Any) -> Iterator[DetectUpdate]:
        """What the detector yields, all planes but those that cannot be read."""

        def detect(indices: list[tuple[int, ...]]) -> Iterator[DetectUpdate]:
            updates: Iterator[DetectUpdate] = detector.iter_planes(
                self.source.array,
                self.source.axes,
                indices=indices,
                channels=self.settings.channels,
                size=self.settings.size,
                value_range=self.limits,
                visible=self.visible,
            )
            return updates

        def leave_out(index: tuple[int, ...], error: ImageError) -> None:
            self._unreadable[index] = str(error)

        return iter_readable(detect, self.indices, leave_out)

    def _find_limits(self) -> Generator[Announcement | None, None, Limits | None]:
        in_memory = isinstance(self.source.array, np.ndarray)
        whole = self.settings.scope == "all" or in_memory
        channel = self.planes.channel(self.indices[0])
        channels = self.settings.channels
        known = None if in_memory else _ranges.get(self.layer)  # it can have been written to
        if known is not None and known.serves(self._data, channels, whole=whole, channel=channel):
            return known.limits
        limits = yield from self._estimate_range(
            self.planes.range_samples()[0] if whole else self.indices[:1]
        )
        _ranges[self.layer] = _Range(reference(self._data), channels, whole, channel, limits)
        return limits

    def _estimate_range(
        self, indices: list[tuple[int, ...]]
    ) -> Generator[Announcement | None, None, Limits | None]:
        """Range of some planes, without those that cannot be read."""
        n_planes, n_read = len(indices), -1
        estimate = self.planes.iter_range(indices, most_pixels=QUICK_RANGE_PIXELS)
        while True:
            before = n_read
            try:
                n_read = next(estimate)
            except StopIteration as end:
                limits: Limits | None = end.value
                return limits
            if before < n_read < n_planes and n_planes > 1:
                yield Announcement(f"Measuring intensities, plane {n_read + 1} of {n_planes} ...")
            else:
                yield None

    def _write(self, update: DetectUpdate) -> None:
        assert self.pixels is not None
        place = tuple(i - axis.start for i, axis in zip(update.index, self.pixels.box, strict=True))
        region = update.region
        self.pixels.write((*place, *region), update.blur[region], update.finished[region])
        if update.plane_done:
            self.pixels.done[place] = True
            self._n_blurred += int(np.count_nonzero(update.blur > self.threshold))
            self._n_done += update.blur.size

    # The main thread again.

    def _update(self, update: Any) -> int:
        if update is None:
            return 0
        if isinstance(update, Announcement):
            self._on_status(update.text)
            return 0
        if self._adding is None:
            self._adding = self._add_layers()
            self._add_more()
        self._n_steps_done = update.n_done
        if not self._are_added.is_set():
            return 0
        self._refresh(update.index)
        self._on_progress(update.n_done, self.n_steps)
        self._on_status(f"{update.n_done} of {self.n_steps} done")
        return int(update.n_done)

    def _add_more(self) -> None:
        """Take a step in adding the layers, the next one in another turn of the event loop."""
        from qtpy.QtCore import QTimer

        assert self._adding is not None
        if next(self._adding, "over") is None:
            QTimer.singleShot(_STEP_MS, self._add_more)
        else:
            self._are_added.set()
            # The last update may have come meanwhile.
            self._on_progress(self._n_steps_done, self.n_steps)

    def _add_layers(self) -> Iterator[None]:
        """Steps of which napari takes up to a tenth of a second for each."""
        selected = self.viewer.layers.selection.active
        self._show("map")
        yield
        self._show("labels")
        yield
        layers = self.viewer.layers
        if unwrapped(layers.selection.active) in self._layers.values() and (
            selected is None or selected in layers
        ):
            layers.selection.active = selected
        yield
        for layer in self._hidden:
            layer.visible = True

    def _show(self, kind: Kind) -> None:
        """Add a layer, or give the one of an earlier run the new data; once a run."""
        if kind in self._layers or self.layer not in self.viewer.layers:
            return
        assert self.pixels is not None
        remember(self.layer, self.pixels)
        array, placement = self._placed(self.pixels.blur if kind == "map" else self.pixels.labels)
        record = {METADATA_KEY: self._record(kind)}
        layer = find_result(self.viewer, self.layer, kind)
        if layer is not None and self._loses_planes:
            layer.metadata = {
                **layer.metadata,
                METADATA_KEY: {**layer.metadata[METADATA_KEY], "kind": f"earlier {kind}"},
            }
            if layer.visible:  # two results on top of each other have no colours of theirs
                layer.visible = False
                self._put_behind.append(layer)
            layer = None
        if layer is not None:
            if not np.may_share_memory(layer.data, array):
                # A copy: napari empties the dict of a layer to fill it anew.
                kept = {"data": layer.data, "metadata": {**layer.metadata}, "place": placed(layer)}
                self._put_away[kind] = kept
                layer.data = array
            place(layer, placement)
            layer.metadata = {**layer.metadata, **record}
        else:
            layer = self._add(kind, array, metadata=record, **placement)
        if kind == "labels":
            # One map stands for all channels of a mean: what is painted on one cannot.
            layer.editable = array.flags.writeable
        self._layers[kind] = layer

    def _add(self, kind: Kind, array: Any, **keywords: Any) -> Any:
        if kind == "map":
            layer = self.viewer.add_image(
                array,
                name=f"{self.layer.name} blur map",
                colormap=MAP_COLORMAP,
                contrast_limits=(0, 1),
                visible=False,
                **keywords,
            )
        else:
            layer = self.viewer.add_labels(
                array,
                name=f"{self.layer.name} blur",
                colormap=label_colormap(),
                opacity=0.4,
                visible=False,
                **keywords,
            )
            self._hidden.append(unwrapped(layer))
        return unwrapped(layer)

    def _placed(self, made: Any) -> tuple[Any, dict[str, Any]]:
        """An array of the result with the layer's axes, and where it lies."""
        source, channels = self.source, self.settings.channels
        start = first_index(source, channels)
        axes = self.planes.walked_axes
        for axis, extent in zip(axes, self._made, strict=True):
            start[source.layer_axes.index(axis)] = extent.start
        lying = in_layer_axes(source, made, f"{axes}YX", channels)
        return lying, result_placement(source, start)

    @property
    def _loses_planes(self) -> bool:
        """Whether the earlier result holds more planes than this one will: then it is kept."""
        earlier = self._earlier
        if earlier is None or earlier is self.pixels:
            return False
        return earlier.n_done > len(self.indices)

    def _record(self, kind: Kind) -> dict[str, Any]:
        return {
            "kind": kind,
            "source": self.layer.name,
            "source_id": str(self.layer.unique_id),
            "model": self.settings.model,
            "model_sha256": self._sha256,
            "version": __version__,
            "settings": asdict(self.settings) | {"threshold": self.threshold},
            "axes": self.source.axes,
            "planes": [[axis.start, axis.stop] for axis in self._made],
            "level": self.source.level,
            "value_range": self.limits,
            "device": self._reason,
            "complete": self.pixels is not None and bool(self.pixels.done.all()),
            "command": self.command_line(),
        }

    def _refresh(self, index: tuple[int, ...]) -> None:
        """Draw what has changed, if it is what is shown, and not too often."""
        now = time.perf_counter()
        if now - self._refreshed < _REFRESH_S:
            return
        flat = self.viewer.dims.ndisplay == 2
        if flat and index != slider_index(self.source, self.viewer, self.planes):
            return
        for layer in self._layers.values():
            if layer.visible:
                layer.refresh(extent=False, thumbnail=False)
        self._refreshed = time.perf_counter()

    def _layer_removed(self, event: Any) -> None:
        if event.value is self.layer or event.value in self._layers.values():
            self._stopped_because = f"the layer {event.value.name} was removed"
            self.cancel()

    def _data_changed(self, event: Any = None) -> None:
        if self.layer.data is not self._data:
            self._stopped_because = f"the data of {self.layer.name} was changed"
            self.cancel()

    def _ended(self, outcome: str | Failure) -> None:
        from napari.utils.notifications import show_error, show_warning

        self.viewer.layers.events.removed.disconnect(self._layer_removed)
        self.layer.events.data.disconnect(self._data_changed)
        _running.discard(self)
        for _ in self._adding or ():
            pass
        is_back = outcome != "done" and self._restore()
        for kind, layer in self._layers.items():
            if not is_back:
                self._place_anew(layer)
                layer.metadata = {**layer.metadata, METADATA_KEY: self._record(kind)}
            # Mesa's software renderer crashes where a layer is redrawn soon after one was removed.
            if self.layer in self.viewer.layers and layer in self.viewer.layers:
                layer.refresh(extent=False)
        if isinstance(outcome, Failure):
            text = f"{self.layer.name}: {outcome.text}"
            show_error(text)
        elif outcome == "cancelled":
            because = self._stopped_because or self._run.why_cancelled
            why = f": {because}" if because else ""
            text = f"Stopped{why}{'; the earlier result is back' if is_back else ''}"
            # The status bar, not a notification: the redraw under one that pops up does the same.
            self.viewer.status = f"Detect defocus blur stopped{why}"
        else:
            text = f"{self._n_blurred / max(self._n_done, 1):.0%} out of focus ({self._reason})"
            if self._unreadable:
                text += f"; left out {_named(self._unreadable)}"
                show_warning(f"{self.layer.name}: left out {_named(self._unreadable)}")
        if self._loses_planes and self._layers:
            if outcome == "done":
                text += "; the earlier result, of more planes, is kept beside it, hidden"
            else:
                text += "; the earlier result, of more planes, is shown again"
                for layer in self._layers.values():
                    layer.visible = False
                for layer in self._put_behind:
                    layer.visible = True
        self._on_status(text)
        self._on_end()

    def _place_anew(self, layer: Any) -> None:
        """Follow an image that was calibrated meanwhile."""
        if self.pixels is not None and self.layer.data is self._data:
            place(layer, self._placed(self.pixels.blur)[1])

    def _restore(self) -> bool:
        """Give layers that were taken over back what they showed, unless this run made more."""
        earlier, made = self._earlier, self.pixels
        if not self._put_away or earlier is None or made is None or made.n_done > earlier.n_done:
            return False
        remember(self.layer, earlier)
        for kind, layer in self._layers.items():
            if layer not in self.viewer.layers:
                continue
            kept = self._put_away.get(kind)
            if kept is None:  # one of the two had been removed before
                [other] = self._put_away.values()
                array = earlier.blur if kind == "map" else earlier.labels
                record = {**other["metadata"][METADATA_KEY], "kind": kind}
                kept = {**other, "data": array.reshape(other["data"].shape)}
                kept["metadata"] = {METADATA_KEY: record}
            layer.data, layer.metadata = kept["data"], kept["metadata"]
            place(layer, kept["place"])
        return True


def _box(planes: Planes, settings: Settings, shown: Sequence[int]) -> tuple[range, ...]:
    """Planes asked for, as a range along each walked axis."""
    if settings.scope == "all":
        return tuple(range(length) for length in planes.lengths)
    box = [range(i, i + 1) for i in shown]
    if settings.scope == "range" and box:
        along = range_axis(planes.walked_axes)
        first, last, length = settings.first, settings.last, planes.lengths[along]
        if first > last:
            raise ImageError(f"planes {first} to {last}: the first is above the last")
        if not 0 <= first <= last < length:
            raise ImageError(
                f"planes {first} to {last}: expected a range within 0 to {length - 1} along "
                f"{planes.walked_axes[along]}"
            )
        box[along] = range(first, last + 1)
    return tuple(box)


def range_axis(walked_axes: str) -> int:
    """Which of the walked axes a range of planes is along: the last, but not channels."""
    return max((i for i, axis in enumerate(walked_axes) if axis != "C"), default=0)


def _nearest_first(box: tuple[range, ...], shown: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of a box, those near the plane shown first."""
    starts = [axis.start for axis in box]
    indices = [
        tuple(int(i) + start for i, start in zip(index, starts, strict=True))
        for index in np.ndindex(tuple(len(axis) for axis in box))
    ]
    return sorted(indices, key=lambda i: [abs(a - b) for a, b in zip(i, shown, strict=True)])


def _named(unreadable: dict[tuple[int, ...], str]) -> str:
    """Planes that could not be read, in short, with the reason of the first."""
    n, first = len(unreadable), next(iter(unreadable.values()))
    return first if n == 1 else f"{n} planes, among them {first}"


def _require_memory(shape: tuple[int, ...], name: str) -> None:
    import psutil

    needed, free = math.prod(shape) * 5, psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise ImageError(
            f"{name}: a result of {' x '.join(map(str, shape))} needs {needed / 2**30:.1f} GiB of "
            f"memory and {free / 2**30:.1f} are free; analyse a range of planes or a coarser "
            "level, or use the command line, which writes files"
        )
