"""The widget "Detect defocus blur", and the same with one click."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from magicgui.widgets import (
    ComboBox,
    Container,
    FloatSlider,
    Label,
    ProgressBar,
    PushButton,
    SpinBox,
)

from napari_semanticblur._detection import Detection, Settings, range_axis
from napari_semanticblur._dock import Dock, timer, wrap
from napari_semanticblur._layers import (
    METADATA_KEY,
    coarse_level,
    find_result,
    read_source,
    record_of,
    source_images,
    unwrapped,
)
from napari_semanticblur._models import METHODS, exists, models
from napari_semanticblur._results import is_outdated, pixels_of, rethreshold
from napari_semanticblur._settings import preferences
from semanticblur_core import io, weights
from semanticblur_core.config import MAX_SIZE_PX, MIN_SIZE_PX
from semanticblur_core.errors import ConfigError, ImageError, SemanticBlurError

if TYPE_CHECKING:
    from napari.layers import Image
    from napari.viewer import Viewer

PAPER, NATIVE, CUSTOM = "320 px, squashed", "native pixels, tiles", "custom, squashed"
CURRENT, ALL, RANGE = "the one shown", "all", "a range"
OTHER_FILE = "other file ..."
# A level of a multiscale layer is analysed at first that has about the pixels of a photograph.
LEVEL_SIDE_PX = 1024
# Sizes of the preferences that have a name here.
_SIZES = {"320": PAPER, "native": NATIVE}
SMALLEST_PX, LARGEST_PX, USUAL_CUSTOM_PX = MIN_SIZE_PX, MAX_SIZE_PX, 448


class DetectWidget(Dock):
    """Dock widget that runs the network on an image layer.

    Parameters
    ----------
    napari_viewer
        Viewer that it belongs to.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        self._viewer = napari_viewer
        self._detection: Detection | None = None
        self._rethresholding: dict[Image, Generator[None, None, float | None]] = {}
        self._silently: set[Image] = set()
        chosen = preferences()
        self.layer = ComboBox(choices=self._images, label="image")
        self._opened_models = []
        if chosen.model not in (*_known_models(), *METHODS):
            self._opened_models.append(chosen.model)
        self._last_model = chosen.model
        self.model = ComboBox(
            choices=self._models, value=chosen.model, label="model", tooltip=_MODEL_TIP
        )
        self.device = ComboBox(
            choices=["auto", "cpu", "cuda", "mps"],
            value=chosen.device,
            label="device",
            tooltip="auto: a GPU where there is one. The reason is shown below after a run.",
        )
        size, side = preferred_size(chosen.size)
        self.size = ComboBox(
            choices=[PAPER, NATIVE, CUSTOM], value=size, label="analysis", tooltip=_SIZE_TIP
        )
        self.custom_size = SpinBox(
            value=side, min=SMALLEST_PX, max=LARGEST_PX, step=32,
            label="side (px)",
        )  # fmt: skip
        # What can be chosen depends on the layer; reset_choices, which napari calls, asks again.
        self._levels: list[int] = [0]
        self._channels: list[Any] = ["each"]
        self.level = ComboBox(
            choices=lambda _: self._levels, label="level", tooltip="Resolution that is analysed."
        )
        self.planes = ComboBox(choices=[CURRENT, ALL, RANGE], label="planes")
        self.first = SpinBox(label="from", min=0, max=0)
        self.last = SpinBox(label="to", min=0, max=0)
        self.channels = ComboBox(
            choices=lambda _: self._channels,
            label="channels",
            tooltip="How the axis named c is treated.",
        )
        self.threshold = FloatSlider(
            value=chosen.threshold, min=0, max=1, step=0.01, label="threshold",
            tooltip="Blurred where the map is above it. Moves the labels at once, without a run.",
        )  # fmt: skip
        self.run_button = PushButton(text="Detect defocus blur")
        self.cancel_button = PushButton(text="Cancel", enabled=False)
        self.progress = ProgressBar(value=0, min=0, max=1, label="")
        self.status = Label(value="")
        self.copy_button = PushButton(
            text="Copy command", enabled=False,
            tooltip="Copies the semanticblur-core command that does the same.",
        )  # fmt: skip
        super().__init__(
            widgets=[
                self.layer, self.model, self.device, self.size, self.custom_size, self.level,
                self.planes, self.first, self.last, self.channels, self.threshold,
                Container(
                    widgets=[self.run_button, self.cancel_button],
                    layout="horizontal", labels=False, label="",
                ),
                self.progress, self.status, self.copy_button,
            ]
        )  # fmt: skip
        self.native.setObjectName("semanticblur-detect")
        wrap(self.status)
        self._is_closed = False
        self.layer.changed.connect(self._layer_chosen)
        self.model.changed.connect(self._model_chosen)
        self.size.changed.connect(self._show_what_applies)
        self.planes.changed.connect(self._show_what_applies)
        self.level.changed.connect(self._limit_planes)
        self.channels.changed.connect(self._limit_planes)
        self.threshold.changed.connect(self._threshold_moved)
        self.run_button.changed.connect(self.run)
        self.cancel_button.changed.connect(self.cancel)
        self.copy_button.changed.connect(self.copy_command)
        models.changed.connect(self._models_changed)
        models.recommended.connect(self._model_recommended)
        self._timer = timer(self.native, self._rethreshold_some, 0)
        self.native.destroyed.connect(self._closed)
        self.on_taken_out(self._closed)
        self._followed: Image | None = None
        self._viewer.layers.events.removed.connect(self._layer_removed)
        self._viewer.dims.events.axis_labels.connect(self._update_choices)
        self._layer_chosen(self.layer.value)
        if chosen.size not in _SIZES and not chosen.size.isdecimal():
            self._say(f"{_unusable(chosen.size)}; {PAPER} is chosen")
        elif self.size.value == CUSTOM and self.settings.size != int(chosen.size):
            self._say(f"{_unusable(chosen.size)}; {self.settings.size} is chosen")

    def _images(self, _: Any) -> list[Image]:
        return source_images(self._viewer)

    def _models(self, _: Any) -> list[str]:
        """Packaged models, those made here, methods, files opened before, and the way to others."""
        return [*_known_models(), *METHODS, *self._opened_models, OTHER_FILE]

    @property
    def settings(self) -> Settings:
        """What the widget says now."""
        size = {PAPER: 320, NATIVE: "native"}.get(self.size.value, int(self.custom_size.value))
        scope = {CURRENT: "current", ALL: "all", RANGE: "range"}[self.planes.value]
        return Settings(
            model=self.model.value,
            device=self.device.value,
            size=cast(Any, size),
            scope=cast(Any, scope),
            first=int(self.first.value),
            last=int(self.last.value),
            threshold=float(self.threshold.value),
            level=int(self.level.value or 0),
            channels=self.channels.value,
        )

    @property
    def is_running(self) -> bool:
        """Whether a detection started here is at work."""
        return self._detection is not None

    def run(self) -> None:
        """Start, with a line instead of a run if the layer cannot be analysed."""
        from napari.utils.notifications import show_error

        if self.is_running:
            return
        if self.layer.value is None:
            self._say("Open an image first.")
            return
        try:
            detection = Detection(
                self._viewer,
                self.layer.value,
                self.settings,
                on_status=self._say,
                on_progress=self._progressed,
                on_end=self._ended,
            )
        except SemanticBlurError as error:
            self._say(str(error))
            show_error(str(error))
            return
        self._detection = detection
        self.run_button.enabled, self.cancel_button.enabled = False, True
        self.progress.max, self.progress.value = detection.n_steps, 0
        self._say("Starting ...")
        detection.start()

    def cancel(self) -> None:
        """Stop at the next tile or plane; what is done is kept."""
        if self._detection is not None:
            self._say("Stopping ...")
            self._detection.cancel()

    def copy_command(self) -> None:
        """Put the equivalent command line on the clipboard."""
        from qtpy.QtWidgets import QApplication

        labels = find_result(self._viewer, self.layer.value, "labels") if self.layer.value else None
        if labels is None:
            return
        clipboard = QApplication.clipboard()
        if clipboard is not None:
            command = labels.metadata[METADATA_KEY]["command"]
            clipboard.setText(command)
            self._say(f"Copied: {command}{self._turned()}")

    def _turned(self) -> str:
        """What the command does otherwise with a photograph that its camera says is to be turned.

        napari shows it as it is stored.
        """
        path = Path(self.layer.value.source.path or "")
        if path.suffix.lower() not in io.PILLOW_SUFFIXES or not path.is_file():
            return ""
        try:
            is_turned = io.read_orientation(path) != 1
        except ImageError:
            return ""
        return ". It turns the photograph upright, and napari shows it unturned" * is_turned

    def _closed(self) -> None:
        """Qt's side of this is gone: stop, and touch none of it again."""
        self._is_closed = True
        if self._detection is not None:
            self._detection.cancel()

    def _say(self, text: str) -> None:
        if not self._is_closed:
            self.status.value = text

    def _progressed(self, n_done: int, n_total: int) -> None:
        if not self._is_closed:
            self.progress.value = n_done

    def _ended(self) -> None:
        detection, self._detection = self._detection, None
        if self._is_closed:
            return
        self.run_button.enabled, self.cancel_button.enabled = True, False
        self._update_copy_button()
        if detection is None:
            return
        if detection.has_mixed_thresholds:
            self._begin_rethresholding(detection.layer, detection.threshold)
        if detection.layer in self._rethresholding:  # how the run ended stays to be read
            self._silently.add(detection.layer)

    def _layer_chosen(self, layer: Image | None) -> None:
        if self._is_closed:
            return
        self._follow(layer)
        self._update_copy_button()
        self._update_choices()
        if layer is not None:
            self.level.value = min(
                coarse_level(layer, at_least_px=LEVEL_SIDE_PX), len(self._levels) - 1
            )
            pixels = pixels_of(self._viewer, layer)
            if pixels is not None:
                with self.threshold.changed.blocked():
                    self.threshold.value = pixels.threshold

    def _layer_removed(self, event: Any) -> None:
        """The last image is gone without another being chosen."""
        if self._followed is unwrapped(event.value):
            self._follow(None)

    def _follow(self, layer: Image | None) -> None:
        """Hear of other data and other names of axes of the layer that is chosen."""
        if self._followed is layer:
            return
        for each, change in ((self._followed, "disconnect"), (layer, "connect")):
            if each is not None:
                getattr(each.events.data, change)(self._update_choices)
                getattr(each.events.axis_labels, change)(self._update_choices)
        self._followed = layer

    def _update_choices(self, _: Any = None) -> None:
        """Offer the levels, channels and planes that the layer has; what is chosen stays."""
        layer = self.layer.value
        if self._is_closed:
            return
        if layer is not None:
            try:
                source = read_source(layer, viewer=self._viewer)
                planes = source.planes()
            except SemanticBlurError as error:
                self._say(str(error))
                return
            n_levels = len(layer.data) if layer.multiscale else 1
            self._levels = list(range(n_levels))
            self._channels = ["each"]
            if "C" in planes.walked_axes:
                length = planes.lengths[planes.walked_axes.index("C")]
                self._channels += [*range(length), *(["mean"] if "S" not in source.axes else [])]
            self.channels.reset_choices()
            self.level.reset_choices()
            self._limit_planes()
        self._show_what_applies()

    def _limit_planes(self) -> None:
        """A range of planes is along the last axis that level leaves, channels aside."""
        layer = self.layer.value
        if self._is_closed or layer is None or self.channels.value not in self._channels:
            return
        level = min(int(self.level.value or 0), len(self._levels) - 1)
        try:
            source = read_source(layer, level=level, viewer=self._viewer)
            planes = source.planes(self.channels.value)
        except SemanticBlurError as error:
            self._say(str(error))
            return
        along = range_axis(planes.walked_axes)
        last = planes.lengths[along] - 1 if planes.lengths else 0
        axis = planes.walked_axes[along : along + 1].lower()
        self.first.label, self.last.label = f"from {axis}".strip(), f"to {axis}".strip()
        if last != self.last.max:
            self.first.max = self.last.max = last
            self.first.value, self.last.value = 0, last

    def _show_what_applies(self) -> None:
        layer = self.layer.value
        n_walked = 0 if layer is None else layer.ndim - 2
        of_network = self.model.value not in METHODS
        self.device.visible = self.size.visible = of_network
        self.custom_size.visible = of_network and self.size.value == CUSTOM
        self.level.visible = layer is not None and bool(layer.multiscale)
        self.planes.visible = n_walked > 0
        self.first.visible = self.last.visible = n_walked > 0 and self.planes.value == RANGE
        self.channels.visible = len(self._channels) > 1

    def _update_copy_button(self) -> None:
        layer = self.layer.value
        done = layer is not None and find_result(self._viewer, layer, "labels") is not None
        self.copy_button.enabled = done

    def _models_changed(self, name: str) -> None:
        """One was made, deleted or renamed; what is chosen follows its new name."""
        if self._is_closed:
            return
        before, self._opened_models = self.model.value, [*filter(exists, self._opened_models)]
        self._offer_models()
        if name and before not in self.model.choices:
            self._model_recommended(name)

    def _model_recommended(self, name: str) -> None:
        """Choose it; the newest version goes by the model's name."""
        if self._is_closed:
            return
        if name not in _known_models() and name not in self._opened_models:
            stem = name.partition("@")[0]
            newest = [path.stem for path in weights.model_versions(stem)[-1:]]
            if [name] == newest:
                name = stem
            else:
                self._opened_models.append(name)
        self._offer_models()
        self.model.value = name

    def _offer_models(self) -> None:
        """Bring the choices up to date, in order: magicgui alone puts what is new last."""
        chosen = self.model.value
        with self.model.changed.blocked():
            self.model.choices = self._models(None)[:1]
            self.model.reset_choices()
            if chosen in self.model.choices:
                self.model.value = chosen
        if self.model.value != chosen:
            self._model_chosen(self.model.value)

    def _model_chosen(self, model: str) -> None:
        if model != OTHER_FILE:
            self._last_model = model
            self._show_what_applies()
            return
        from qtpy.QtWidgets import QFileDialog

        path, _ = QFileDialog.getOpenFileName(
            self.native, "Open weights", str(Path.home()), "Weights (*.safetensors)"
        )
        if path and path not in self._opened_models:
            self._opened_models.append(path)
        with self.model.changed.blocked():
            self.model.value = self._last_model
        self._offer_models()
        self.model.value = path or self._last_model

    def _threshold_moved(self, threshold: float) -> None:
        if self.layer.value is not None:
            self._move_threshold(unwrapped(self.layer.value), threshold)

    def _move_threshold(self, layer: Image, threshold: float) -> None:
        if self._detection is not None and self._detection.layer is layer:
            self._detection.threshold = threshold
        elif is_outdated(self._viewer, layer):
            self._say(f"The labels of {layer.name} are of other data now; detect again.")
            return
        self._silently.discard(layer)
        self._begin_rethresholding(layer, threshold)

    def _begin_rethresholding(self, layer: Image, threshold: float) -> None:
        self._rethresholding[layer] = rethreshold(self._viewer, layer, threshold)
        self._timer.start()

    def _rethreshold_some(self) -> None:
        """A little at a time, so that the window stays alive on long stacks."""
        until = time.perf_counter() + 0.02
        changed = []
        while self._rethresholding and time.perf_counter() < until:
            layer, work = next(iter(self._rethresholding.items()))
            changed += [layer] if layer not in changed else []
            try:
                next(work)
            except StopIteration as end:
                del self._rethresholding[layer]
                silently = layer in self._silently
                self._silently.discard(layer)
                if end.value is not None and not self.is_running and not silently:
                    self._say(f"{layer.name}: {end.value:.0%} out of focus at this threshold")
        for layer in changed:
            labels = find_result(self._viewer, layer, "labels")
            if labels is not None:
                labels.refresh(extent=False, thumbnail=False)
        if not self._rethresholding:
            self._timer.stop()


def detect_now(viewer: Viewer) -> None:
    """Detect the selected image layer, the plane shown, with the preferences; no dock needed."""
    from napari.utils.notifications import show_error, show_info, show_warning

    layer = _image_meant(viewer)
    if layer is None:
        several = len(viewer.layers.selection) > 1
        which = "one image layer, not several" if several else "an image layer first"
        show_warning(f"Detect defocus blur: select {which}.")
        return
    chosen = preferences()

    def say(text: str) -> None:
        viewer.status = text

    try:
        level = 0
        if getattr(layer, "multiscale", False) and chosen.size != "native":
            level = coarse_level(layer, at_least_px=LEVEL_SIDE_PX)
        if chosen.size != "native" and not chosen.size.isdecimal():
            raise ConfigError(_unusable(chosen.size))
        settings = Settings(
            chosen.model,
            chosen.device,
            cast(Any, chosen.size if chosen.size == "native" else int(chosen.size)),
            threshold=chosen.threshold,
            level=level,
        )
        detection = Detection(viewer, layer, settings, on_status=say)
    except SemanticBlurError as error:
        show_error(f"Detect defocus blur: {error}")
        return
    show_info(f"Detecting defocus blur in {layer.name} ...")
    detection.start()


def _image_meant(viewer: Viewer) -> Any:
    """The layer that is selected, the image that a selected result is of, or the only image."""
    layers = [unwrapped(layer) for layer in viewer.layers]
    layer = unwrapped(viewer.layers.selection.active)
    if layer is None:
        images = source_images(viewer)
        return images[0] if len(images) == 1 else None
    record = record_of(layer)
    if "source_id" in record:
        meant = [each for each in layers if str(each.unique_id) == record["source_id"]]
        return meant[0] if meant else None
    return layer


def preferred_size(size: str) -> tuple[str, int]:
    """Kind of analysis that the preferences name, and the side of a custom one.

    The side is within what the widgets take, and the usual one if the preferences name none.
    """
    side = int(size) if size.isdecimal() and size not in _SIZES else USUAL_CUSTOM_PX
    kind = _SIZES.get(size, CUSTOM if size.isdecimal() else PAPER)
    return kind, min(max(side, SMALLEST_PX), LARGEST_PX)


def _unusable(size: str) -> str:
    return (
        f"preference Analysis size {size!r}: expected native or a side of {SMALLEST_PX} to "
        f"{LARGEST_PX} pixels"
    )


def _known_models() -> list[str]:
    return [*weights.PACKAGED, *weights.own_models()]


_MODEL_TIP = (
    "The packaged model, one fine-tuned here, a file of weights, or a method without any: HiFST, "
    "local binary patterns (lbp), spectrum and gradients (dbdf), at the image's own pixels."
)
_SIZE_TIP = (
    "Squashed: the whole plane is brought to a square of that side (320 is the paper's protocol, "
    "best for photographs). Native: tiles of 512 px at the image's own pixels, for microscopy."
)
