"""One fine-tuning: a process that learns from what is painted, its map shown meanwhile.

No widget here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._colors import MAP_COLORMAP
from napari_semanticblur._layers import (
    METADATA_KEY,
    Source,
    coarse_level,
    plane_index,
    read_source,
    record_of,
    result_placement,
    unwrapped,
)
from napari_semanticblur._painted import Annotated, as_bytes, save_layers
from napari_semanticblur._worker import Announcement, Failure, Run
from semanticblur_core import weights
from semanticblur_core.errors import DataError, ImageError, SemanticBlurError
from semanticblur_core.inference.planes import QUICK_RANGE_PIXELS
from semanticblur_core.training.background import BackgroundFinetune, FinetuneCommand, Progress

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image

PREVIEW_SIDE_PX = 1024


def require_something(
    command: FinetuneCommand, chosen: Sequence[Annotated], store: Path | None
) -> None:
    """Refuse what cannot be run.

    Raises
    ------
    WeightsError
        If the new model's name cannot be one, or there is no such base.
    DataError
        If there is nothing to learn from.
    """
    weights.next_version(command.output)
    weights.resolve(command.base)
    if not chosen and store is None:
        raise DataError("choose a layer of labels, or the folder of an annotation store")


class Tuning:
    """A fine-tuning, from the click to the model.

    Parameters
    ----------
    viewer
        Where the preview is shown.
    chosen, store
        See `save_layers`; ``store`` None and no layers is an error.
    command
        What to run; its ``data`` is used where layers have no store.
    preview
        Image layer whose plane shown is analysed as training goes on; None for none.
    on_status, on_progress
        Called in the main thread with a line for people, and with what happens.
    on_end
        Called once in the main thread with ``"done"``, ``"cancelled"`` or a `Failure`.

    Attributes
    ----------
    command
        The command as it is run; ``data`` is right once the layers are saved.
    first, best, last
        The first state that was measured (the base model), the best, and the newest.
    kept
        Name and version of the model that came of it, None if none.
    """

    def __init__(
        self,
        viewer: ViewerModel,
        chosen: Sequence[Annotated],
        store: Path | None,
        command: FinetuneCommand,
        *,
        preview: Image | None = None,
        on_status: Callable[[str], None] = lambda text: None,
        on_progress: Callable[[Progress], None] = lambda update: None,
        on_end: Callable[[str | Failure], None] = lambda outcome: None,
    ) -> None:
        require_something(command, chosen, store)
        self.viewer, self.command = viewer, command
        self._chosen, self._store = list(chosen), store
        self._on_status, self._on_progress, self._on_end = on_status, on_progress, on_end
        self.first: Progress | None = None
        self.best: Progress | None = None
        self.last: Progress | None = None
        self.kept: str | None = None
        self._process: BackgroundFinetune | None = None
        self._is_cancelled = self._is_paused = False
        self._before: NDArray[np.float32] | None = None
        self._latest: NDArray[np.float32] | None = None
        self._shows_before = False
        self.preview_layer: Image | None = None
        self._preview_source = None
        if preview is not None:
            with suppress(ImageError):  # none of its planes is shown: no preview
                self._preview_source = self._plane(preview)
        self._run = Run(
            self._work,
            title=None,  # the widget shows more, and the training needs the processor
            n_steps=0,
            on_update=self._update,
            on_end=self._ended,
        )

    def start(self) -> None:
        """Start in the background; the preview's layer is added here, while nothing runs."""
        if self._preview_source is not None:
            self._add_preview(*self._preview_source)
        self._run.start()

    @property
    def is_paused(self) -> bool:
        """Whether it rests."""
        return self._is_paused

    def pause(self) -> None:
        """Rest after the step under way."""
        self._is_paused = True
        if self._process is not None:
            self._process.pause()

    def resume(self) -> None:
        """Go on."""
        self._is_paused = False
        if self._process is not None:
            self._process.resume()

    def cancel(self) -> None:
        """End at once; the best so far becomes a version of the model."""
        self._is_cancelled = True
        if self._process is not None:
            self._process.cancel()

    def close(self) -> None:
        """The window is gone: end at once and keep the best so far, without another word."""
        self.cancel()
        self._keep_best("cancelled")
        self._name_preview()

    def show(self, *, before: bool) -> None:
        """Let the preview show the map of the base model, or the newest."""
        self._shows_before = before
        shown = self._before if before else self._latest
        layer = self.preview_layer
        if layer is None or shown is None or layer not in self.viewer.layers:
            return
        layer.data[...] = shown.reshape(layer.data.shape)
        layer.refresh(extent=False, thumbnail=False)

    def _plane(self, layer: Image) -> tuple[Source, tuple[int, ...]]:
        source = read_source(layer, level=coarse_level(layer, at_least_px=PREVIEW_SIDE_PX))
        return source, plane_index(source, self.viewer, source.planes())

    def _add_preview(self, source: Source, index: tuple[int, ...]) -> None:
        planes = source.planes()
        start = [0] * source.layer.ndim
        shape = [1] * source.layer.ndim
        shape[-2:] = planes.plane_shape
        for axis, i in zip(planes.walked_axes, index, strict=True):
            start[source.layer_axes.index(axis)] = i
        placement = result_placement(source, start)
        name = f"{source.layer.name} blur map (fine-tuning)"
        key = {"kind": "preview", "source_id": str(source.layer.unique_id)}
        for layer in map(unwrapped, self.viewer.layers):
            if key.items() <= record_of(layer).items() and list(layer.data.shape) == shape:
                self.preview_layer, layer.name = layer, name
                for attribute, value in placement.items():
                    setattr(layer, attribute, value)
                layer.visible = False
                return
        active = self.viewer.layers.selection.active
        self.preview_layer = unwrapped(
            self.viewer.add_image(
                np.zeros(shape, np.float32), name=name, colormap=MAP_COLORMAP,
                contrast_limits=(0, 1), opacity=0.7, visible=False,
                metadata={METADATA_KEY: key | {"source": source.layer.name}}, **placement,
            )
        )  # fmt: skip
        self.viewer.layers.selection.active = active

    # The worker's thread from here.

    def _work(self) -> Iterator[Any]:
        yield Announcement("Saving what is painted ...")
        folder = save_layers(self._chosen, self._store, self.command.data)
        self.command = replace(self.command, data=folder)
        pixels = None
        if self._preview_source is not None:
            source, index = self._preview_source
            planes = source.planes()
            in_memory = isinstance(source.array, np.ndarray)
            limits = planes.estimate_range(
                None if in_memory else [index], most_pixels=QUICK_RANGE_PIXELS
            )
            pixels = as_bytes(planes.view(index).read_unit(limits=limits))
        self._process = BackgroundFinetune(self.command, preview=pixels)
        if self._is_cancelled:
            return
        if self._is_paused:
            self._process.pause()
        yield Announcement("Starting the training process ...")
        yield from self._process.updates()

    # The main thread again.

    def _update(self, update: Any) -> int:
        if isinstance(update, Announcement):
            self._on_status(update.text)
            return 0
        if self._is_cancelled and update.phase != "done":
            return 0
        self.last = update
        if update.held_out_loss is not None or update.photographs is not None:
            self.first = self.first or update
        if update.is_best:
            self.best = update
        if update.result is not None:
            self.kept = update.result["model"]
        if update.preview is not None:
            self._latest = update.preview
            if self._before is None:
                self._before = update.preview
            self.show(before=self._shows_before)
            layer = self.preview_layer
            if self._latest is self._before and layer is not None and layer in self.viewer.layers:
                layer.visible = True
        self._on_progress(update)
        return 0

    def _ended(self, outcome: str | Failure) -> None:
        if self._is_cancelled and self.kept is None:
            outcome = "cancelled"
        if outcome != "done":
            outcome = self._keep_best(outcome)
        self._name_preview()
        self._on_end(outcome)

    def _name_preview(self) -> None:
        """Say what its map is of; hide it where no model came of it."""
        layer = self.preview_layer
        if layer is None or layer not in self.viewer.layers:
            return
        # Renamed or hidden, not removed: Mesa's software renderer crashes on a redraw after that.
        if self.kept:
            layer.name = layer.name.replace("(fine-tuning)", f"({self.kept})")
        else:
            layer.visible = False

    def _keep_best(self, outcome: str | Failure) -> str | Failure:
        """What a run that did not get to its end leaves."""
        try:
            if self.kept is None and self._process is not None:
                self.kept = self._process.keep_best()
        except SemanticBlurError as error:
            return Failure(str(error))
        if isinstance(outcome, Failure) and self.kept is not None:
            return Failure(f"{outcome.text}; the best so far is kept as {self.kept}")
        return outcome


class Clock:
    """How long the rest of a phase will take, from how long its last steps took."""

    def __init__(self) -> None:
        self._phase = ""
        self._times: list[tuple[float, int]] = []

    def left(self, update: Progress) -> str:
        """In words, to follow a line; empty where it cannot be told yet."""
        if update.phase != self._phase:
            self._phase, self._times = update.phase, []
        self._times = [*self._times[-20:], (time.monotonic(), update.step)]
        (first_s, first), (last_s, last) = self._times[0], self._times[-1]
        if last - first < 2:
            return ""
        seconds = (update.total_steps - last) * (last_s - first_s) / (last - first)
        return (
            f", about {max(1, round(seconds))} s left"
            if seconds < 90
            else (f", about {round(seconds / 60)} min left")
        )
