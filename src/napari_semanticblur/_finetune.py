"""The widget "Fine-tune blur model"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from magicgui.types import FileDialogMode
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    FileEdit,
    Label,
    LineEdit,
    ProgressBar,
    PushButton,
    Select,
    SpinBox,
)

from napari_semanticblur._detect import (
    CUSTOM,
    LARGEST_PX,
    NATIVE,
    OTHER_FILE,
    PAPER,
    SMALLEST_PX,
    preferred_size,
)
from napari_semanticblur._dock import Dock, row, wrap
from napari_semanticblur._layers import METADATA_KEY, is_image, unwrapped
from napari_semanticblur._models import models, recommend
from napari_semanticblur._outcome import ModelActions, cancelled_text, outcome_text
from napari_semanticblur._painted import Annotated, annotated_layers, save_layers
from napari_semanticblur._settings import preferences
from napari_semanticblur._tuning import Clock, Tuning, require_something
from napari_semanticblur._worker import Failure, Run
from semanticblur_core import weights
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.training.background import FinetuneCommand, Progress, rescue

if TYPE_CHECKING:
    from napari.viewer import Viewer

QUICK, THOROUGH, CUSTOM_STEPS = "quick, about a minute", "thorough", "custom"
_LET_GO = (("forgetting_limit", "1"), ("drift_limit", "1"), ("importance_damping", "0"))
_BUDGETS = {QUICK: "quick", THOROUGH: "thorough", CUSTOM_STEPS: "quick"}


class FinetuneWidget(Dock):
    """Dock widget that teaches a model with what was painted.

    Parameters
    ----------
    napari_viewer
        Viewer that it belongs to.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        from qtpy.QtCore import QTimer

        from napari_semanticblur._loss_plot import LossPlot

        self._viewer = napari_viewer
        self._tuning: Tuning | None = None
        self._last_tuning: Tuning | None = None
        self._saving: Run | None = None
        self._is_closed = False
        self._opened: list[str] = []
        self._known: set[Any] = set()  # ids of annotation layers, chosen when they first appear
        self._names: dict[Any, str] = {}  # by id, as the choice says them
        chosen = preferences()
        self.layers = Select(choices=self._annotated_names, label="painted on", tooltip=_LAYERS_TIP)
        self.store = FileEdit(
            mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True, label="store", tooltip=_STORE_TIP
        )
        self.base = ComboBox(
            choices=self._bases, value="default", label="start from",
            tooltip="Stays as it is; the result is a model of its own.",
        )  # fmt: skip
        self.output = LineEdit(value="my model", label="new model", tooltip=_OUTPUT_TIP)
        self.budget = ComboBox(choices=list(_BUDGETS), value=QUICK, label="budget")
        self.n_steps = SpinBox(value=60, min=1, max=100_000, label="steps")
        self.seed = SpinBox(value=0, min=0, max=2**31 - 1, label="seed")
        self.device = ComboBox(
            choices=["auto", "cpu", "cuda", "mps"], value=chosen.device, label="device"
        )
        size, side = preferred_size(chosen.size)
        self.size = ComboBox(
            choices=[PAPER, NATIVE, CUSTOM], value=size, label="analysis",
            tooltip="As you will detect with it later.",
        )  # fmt: skip
        self.custom_size = SpinBox(
            value=side, min=SMALLEST_PX, max=LARGEST_PX, step=32, label="side (px)",
        )  # fmt: skip
        self.keep_photographs = CheckBox(
            value=True, text="keep what it knows of photographs", label="", tooltip=_KEEP_TIP
        )
        self.start_button = PushButton(text="Fine-tune")
        self.pause_button = PushButton(text="Pause", enabled=False)
        self.cancel_button = PushButton(
            text="Cancel", enabled=False, tooltip="Ends at once and keeps the best so far."
        )
        self.show_before = CheckBox(
            text="show the map before", enabled=False, label="",
            tooltip="The preview's layer shows the map of the model that it started from.",
        )  # fmt: skip
        self.progress = ProgressBar(value=0, min=0, max=1, label="")
        self.status = Label(value="")
        self.copy_button = PushButton(
            text="Copy command", tooltip="Saves what is painted, and copies the command that does "
            "the same.",
        )  # fmt: skip
        self.table = Label(value="")
        self.actions = ModelActions(self._say)
        super().__init__(
            widgets=[
                self.layers, self.store, self.base, self.output, self.budget, self.n_steps,
                self.seed, self.device, self.size, self.custom_size,
                self.keep_photographs,
                row(self.start_button, self.pause_button, self.cancel_button),
                self.progress, self.status, self.table, self.show_before, self.copy_button,
                *self.actions.widgets,
            ],
        )  # fmt: skip
        self.native.setObjectName("semanticblur-finetune")
        self.plot = LossPlot()
        place = list(self).index(self.table)
        self.column.insertWidget(place, self.plot)
        self.layers.native.setMaximumHeight(70)
        for label in (self.status, self.table):
            wrap(label)
        self._clock = Clock()
        self.budget.changed.connect(self._show_what_applies)
        self.size.changed.connect(self._show_what_applies)
        self.base.changed.connect(self._base_chosen)
        self.start_button.changed.connect(self.run)
        self.pause_button.changed.connect(self.pause_or_resume)
        self.cancel_button.changed.connect(self.cancel)
        self.copy_button.changed.connect(self.copy_command)
        self.show_before.changed.connect(self._before_switched)
        # Who adds an annotation layer says what it is just afterwards: looked at once more then.
        self._soon = QTimer(self.native)
        self._soon.setSingleShot(True)
        self._soon.setInterval(0)
        self._soon.timeout.connect(self._choose_annotations)
        self._viewer.layers.events.inserted.connect(self._layer_inserted)
        models.changed.connect(self._models_changed)
        self.native.destroyed.connect(self._closed)
        self.on_taken_out(self._closed)
        self._choose_annotations()
        self._show_what_applies()
        self._rescue()

    @property
    def is_running(self) -> bool:
        """Whether a run started here is at work."""
        return self._tuning is not None or self._saving is not None

    @property
    def command(self) -> FinetuneCommand:
        """What the widget says now; layers without a store go to a folder of the new model's."""
        sizes: dict[str, int | str] = {PAPER: 320, NATIVE: "native"}
        name = str(self.output.value).strip()
        return FinetuneCommand(
            data=weights.models_folder().parent / "annotations" / name,
            output=name,
            base=str(self.base.value),
            budget=_BUDGETS[self.budget.value],
            n_steps=int(self.n_steps.value) if self.budget.value == CUSTOM_STEPS else None,
            seed=int(self.seed.value),
            size=sizes.get(self.size.value, int(self.custom_size.value)),
            device=str(self.device.value),
            settings=() if self.keep_photographs.value else _LET_GO,
        )

    def run(self) -> None:
        """Start, with a line instead of a run if there is nothing to learn from."""
        if self.is_running:
            return
        chosen = self._chosen()
        try:
            tuning = Tuning(
                self._viewer,
                chosen,
                self._store,
                self.command,
                preview=self._preview_source(chosen),
                on_status=self._say,
                on_progress=self._progressed,
                on_end=self._ended,
            )
        except SemanticBlurError as error:
            self._fail(str(error))
            return
        self._tuning = tuning
        self._enable(running=True)
        self.plot.clear()
        self.table.value = ""
        self.show_before.value = False
        self.progress.max, self.progress.value = 1, 0
        self._say("Starting ...")
        self._clock = Clock()
        self._last_tuning = tuning
        self.show_before.enabled = False
        tuning.start()

    def pause_or_resume(self) -> None:
        """Rest after the step under way, or go on."""
        if self._tuning is None:
            return
        if self._tuning.is_paused:
            self._tuning.resume()
            self._clock = Clock()
            self._say("Going on ...")
        else:
            self._tuning.pause()
            self._say("Paused; the memory stays taken.")
        self.pause_button.text = "Resume" if self._tuning.is_paused else "Pause"

    def cancel(self) -> None:
        """End at once; the best so far is kept as a version of the new model."""
        if self._tuning is not None:
            self._say("Stopping ...")
            self._tuning.cancel()

    def copy_command(self) -> None:
        """Save what is painted into the store, and put the equivalent command on the clipboard."""
        if self.is_running:
            return
        chosen, store, command = self._chosen(), self._store, self.command
        folders: list[Path] = []

        def save() -> Any:
            folders.append(save_layers(chosen, store, command.data))
            yield None

        def ended(outcome: str | Failure) -> None:
            from dataclasses import replace

            from qtpy.QtWidgets import QApplication

            self._saving = None
            if self._is_closed:
                return
            self.copy_button.enabled = True
            if isinstance(outcome, Failure):
                self._fail(outcome.text)
                return
            text = str(replace(command, data=folders[0]))
            clipboard = QApplication.clipboard()
            if clipboard is not None:
                clipboard.setText(text)
            self._say(f"Copied: {text}")

        try:
            require_something(command, chosen, store)
        except SemanticBlurError as error:
            self._fail(str(error))
            return
        self.copy_button.enabled = False
        self._saving = Run(
            save, title="Save annotations", n_steps=0, on_update=lambda _: 0, on_end=ended
        )
        self._saving.start()

    @property
    def _store(self) -> Path | None:
        value = self.store.value
        return value if isinstance(value, Path) and str(value) != "." else None

    def _annotated_names(self, _: Any) -> list[tuple[str, str]]:
        """What is shown and the name of each layer: with its image where the name is no hint."""
        return [
            (name if name.startswith(image) else f"{name} (on {image})", name)
            for each in annotated_layers(self._viewer)
            for name, image in [(each.labels.name, each.source.layer.name)]
        ]

    def _chosen(self) -> list[Annotated]:
        names = list(self.layers.value or [])
        return [each for each in annotated_layers(self._viewer) if each.labels.name in names]

    def _layer_inserted(self, event: Any = None) -> None:
        if not self._is_closed:
            self._choose_annotations()
            self._soon.start()

    def _choose_annotations(self, _: Any = None) -> None:
        """Annotation layers are chosen when they first appear."""
        if self._is_closed:
            return
        self.reset_choices()
        annotations = [each for each in annotated_layers(self._viewer) if each.is_annotation]
        new = [e.labels for e in annotations if e.labels.unique_id not in self._known]
        self._known |= {labels.unique_id for labels in new}
        self.layers.value = [*(self.layers.value or []), *(labels.name for labels in new)]

    def reset_choices(self, *_: Any) -> None:
        """As napari asks after each change of layers: what is chosen stays so by its new name."""
        chosen = set(self.layers.value or [])
        before = self._names
        super().reset_choices()
        layers = [each.labels for each in annotated_layers(self._viewer)]
        self._names = {layer.unique_id: layer.name for layer in layers}
        self.layers.value = [
            layer.name for layer in layers if before.get(layer.unique_id) in chosen
        ]

    def _bases(self, _: Any) -> list[str]:
        return [*weights.PACKAGED, *weights.own_models(), *self._opened, OTHER_FILE]

    def _base_chosen(self, name: str) -> None:
        if name != OTHER_FILE:
            return
        from qtpy.QtWidgets import QFileDialog

        path, _ = QFileDialog.getOpenFileName(
            self.native, "Open weights", str(Path.home()), "Weights (*.safetensors)"
        )
        if path and path not in self._opened:
            self._opened.append(path)
        self.base.reset_choices()
        self.base.value = path or "default"

    def _preview_source(self, chosen: list[Annotated]) -> Any:
        """The image selected, or the first that was painted on."""
        active = unwrapped(self._viewer.layers.selection.active)
        if active is not None and is_image(active) and METADATA_KEY not in active.metadata:
            return active
        return chosen[0].source.layer if chosen else None

    def _before_switched(self, on: bool) -> None:
        if self._last_tuning is not None:
            self._last_tuning.show(before=on)

    def _progressed(self, update: Progress) -> None:
        if self._is_closed:
            return
        if update.preview is not None:
            self.show_before.enabled = True
        self.progress.max = max(1, update.total_steps)
        self.progress.value = min(update.step, update.total_steps)
        left = self._clock.left(update)
        if update.phase == "preparing":
            self._say(f"Preparing {update.step} of {update.total_steps} views")
        elif update.phase == "training":
            self.plot.add(
                update.step,
                n_steps=update.total_steps,
                loss=update.loss,
                held_out=update.held_out_loss,
                photographs=update.photographs,
                is_best=update.is_best,
            )
            if self._tuning is not None and not self._tuning.is_paused:
                self._say(f"Step {update.step} of {update.total_steps}{left}")

    def _ended(self, outcome: str | Failure) -> None:
        tuning, self._tuning = self._tuning, None
        if self._is_closed or tuning is None:
            return
        self._enable(running=False)
        if tuning.kept:
            models.changed.emit(tuning.kept)
        if isinstance(outcome, Failure):
            self._fail(outcome.text)
        elif outcome == "cancelled":
            self._say(cancelled_text(tuning))
            if tuning.kept:
                self.base.value = tuning.kept.partition("@")[0]
        elif tuning.last is not None and tuning.last.result is not None:
            table, verdict = outcome_text(tuning.last.result)
            self.table.value = table
            self._say(verdict)
            if tuning.last.result["is_proven"] and tuning.kept:
                recommend(tuning.kept)

    def _rescue(self) -> None:
        """Offer what a run left whose window ended without a word."""
        try:
            kept = rescue()
        except SemanticBlurError as error:
            self._say(str(error))
            return
        if kept:
            models.changed.emit(kept[-1])
            self._say(f"A training that was broken off left {', '.join(kept)}: the best it had.")

    def _enable(self, *, running: bool) -> None:
        self.start_button.enabled = self.copy_button.enabled = not running
        self.pause_button.enabled = self.cancel_button.enabled = running
        self.pause_button.text = "Pause"

    def _models_changed(self, name: str = "") -> None:
        if not self._is_closed:
            self.base.reset_choices()
            self.actions.refresh(name)

    def _show_what_applies(self, _: Any = None) -> None:
        self.n_steps.visible = self.budget.value == CUSTOM_STEPS
        self.custom_size.visible = self.size.value == CUSTOM

    def _say(self, text: str) -> None:
        if not self._is_closed:
            self.status.value = text

    def _fail(self, text: str) -> None:
        from napari.utils.notifications import show_error

        self._say(text)
        show_error(f"Fine-tune blur model: {text}")

    def _closed(self) -> None:
        """Qt's side of this is gone: end the run, and touch none of it again."""
        self._is_closed = True
        models.changed.disconnect(self._models_changed, missing_ok=True)
        if self._tuning is not None:
            self._tuning.close()


_LAYERS_TIP = (
    "Labels layers with 1 = sharp and 2 = blurred, of the shape of an image layer. Several can be "
    "chosen."
)
_STORE_TIP = (
    "Annotation store: all of it is learned from. Chosen layers are saved into it first; without "
    "one, into their own, or a new one among your files."
)
_KEEP_TIP = (
    "The weights stay as close to those it starts from as photographs need. Without, it learns "
    "more about images like yours, and may be no good for others."
)
_OUTPUT_TIP = "A name; each run makes the next version of it. Detect and the command line take it."
