"""What came of a fine-tuning, in words; and what can be done with models of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magicgui.widgets import ComboBox, Container, PushButton

from napari_semanticblur._dialogs import ask, ask_file, ask_text
from napari_semanticblur._dock import guarded
from napari_semanticblur._models import exists, models, recommend
from napari_semanticblur._settings import preferences, set_default_model
from semanticblur_core import disk, weights

if TYPE_CHECKING:
    from napari_semanticblur._tuning import Tuning


def outcome_text(result: dict[str, Any]) -> tuple[str, str]:
    """A table (HTML) of before and after, and a verdict in a sentence or two."""
    rows = [
        (name, result["before"][key], result["after"][key])
        for name, key in (("MAE", "mae"), ("F", "f_beta"), ("IoU", "iou"))
    ]
    rows.append(("MAE, generated photos", result["forgetting_before"], result["forgetting_after"]))
    cells = "".join(
        f"<tr><td>{name}&nbsp;&nbsp;</td><td align=right>{before:.3f}&nbsp;&nbsp;</td>"
        f"<td align=right>{after:.3f}</td></tr>"
        for name, before, after in rows
    )
    held_out = result["held_out"] or "NONE: too few strokes, so these are the ones learned from"
    table = (
        f"<table><tr><td></td><td>before&nbsp;&nbsp;</td><td>after</td></tr>{cells}</table>"
        f"<small>held out: {held_out}; labelled pixels only</small>"
    )
    if result["is_proven"]:
        verdict = "Better, and chosen in Detect."
    elif result["is_better"]:
        verdict = (
            "Better on these labels, but nothing tells whether it is on others: not chosen in "
            "Detect. With two strokes or more of each class, part of them can be held out."
        )
    elif result["has_improved"]:
        verdict = "Better here, but photographs were FORGOTTEN in part: not chosen in Detect."
    else:
        verdict = (
            "NOT better on the held-out labels, so not chosen in Detect. More strokes may help, or "
            "not to keep what it knows of photographs."
        )
    return table, f"{verdict} It is {result['model']}."


def cancelled_text(tuning: Tuning) -> str:
    """What a cancelled run left."""
    best, first = tuning.best, tuning.first
    if tuning.kept is None or best is None:
        return "Stopped; nothing was better than at the start yet, and nothing is kept."
    text = f"Stopped; the best so far (step {best.step}) is {tuning.kept}"
    if best.held_out_loss is not None and first is not None and first.held_out_loss is not None:
        text += f": held-out error {first.held_out_loss:.3f} to {best.held_out_loss:.3f}"
    return f"{text}. Fine-tune goes on from it."


def doubts(name: str) -> str:
    """Why a model should not become the default without a thought; "" if nothing speaks against it.

    Raises
    ------
    WeightsError
        If there is no such model.
    """
    report = weights.read_info(weights.resolve(name)).metrics.get("finetune")
    if not isinstance(report, dict):
        return ""
    if report.get("is_better"):
        proven = report.get("is_proven", bool(report.get("held_out")))
        return "" if proven else "nothing was held out to tell whether it is better"
    if "stopped" in report:
        return "its training was stopped, and it was not checked to the end"
    if report.get("has_forgotten"):
        return "it forgot photographs in part"
    return "it is no better than before on the held-out labels"


class ModelActions:
    """Buttons for models of one's own.

    Parameters
    ----------
    say
        Shows a line.

    Attributes
    ----------
    widgets
        For a container.
    ask, ask_text, ask_file
        Dialogs, which tests replace.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.own = ComboBox(choices=self._names, label="your models", nullable=True)
        self.default_button = PushButton(
            text="Use by default", tooltip="Detect starts with it. The command line does not."
        )
        self.rename_button = PushButton(text="Rename")
        self.delete_button = PushButton(text="Delete")
        self.export_button = PushButton(text="Export", tooltip="Copies the file to share it.")
        self._buttons = [
            self.default_button, self.rename_button, self.export_button, self.delete_button
        ]  # fmt: skip
        self.widgets = [
            self.own,
            *(
                Container(widgets=pair, layout="horizontal", labels=False, label="")
                for pair in (self._buttons[:2], self._buttons[2:])
            ),
        ]
        for button, action in (
            (self.default_button, self.make_default),
            (self.rename_button, self.rename),
            (self.delete_button, self.delete),
            (self.export_button, self.export),
        ):
            button.changed.connect(self._guarded(action))
        self.own.changed.connect(self._enable)
        self.ask, self.ask_text, self.ask_file = ask, ask_text, ask_file
        self.refresh()

    def refresh(self, name: str = "") -> None:
        """Look again what there is, and choose that version of a model."""
        self.own.reset_choices()
        if name in self.own.choices:
            self.own.value = name
        self._enable()

    def _enable(self, _: object = None) -> None:
        for button in self._buttons:
            button.enabled = self.own.value is not None

    def make_default(self, name: str) -> None:
        """Let Detect start with it; a model that is worse only after a question."""
        doubt = doubts(name)
        if doubt and not self.ask(f"{name}: {doubt}. Use it by default all the same?"):
            self._say(f"{name} was not made the default.")
            return
        set_default_model(name)
        recommend(name)
        self._say(f"Detect starts with {name} from now on.")

    def rename(self, name: str) -> None:
        """Rename it, all its versions."""
        stem = name.partition("@")[0]
        new = self.ask_text(f"New name of {stem} (all its versions):", stem)
        if new and new != stem:
            weights.rename_model(stem, new)
            default = preferences().model
            if default.partition("@")[0] == stem:
                set_default_model(new + default.removeprefix(stem))
            models.changed.emit(name.replace(stem, new, 1))
            self._say(f"{stem} is {new} now.")

    def delete(self, name: str) -> None:
        """Delete that version."""
        if self.ask(f"Delete {name}? It cannot be brought back."):
            weights.delete_model(name)
            models.changed.emit("")
            note = ""
            default = preferences().model
            if default.partition("@")[0] == name.partition("@")[0] and not exists(default):
                set_default_model("default")
                note = " Detect starts with the packaged model again."
            self._say(f"{name} was deleted.{note}")

    def export(self, name: str) -> None:
        """Copy its file to where others can take it."""
        source = weights.resolve(name)
        target = self.ask_file(Path.home() / f"{name}.safetensors")
        if target is None:
            return
        with disk.replacing(target, durable=True) as temporary:
            shutil.copyfile(source, temporary)
        self._say(f"{name} was copied to {target}.")

    def _names(self, _: Any) -> list[str]:
        return [p.stem for name in weights.own_models() for p in weights.model_versions(name)[::-1]]

    def _guarded(self, action: Callable[[str], None]) -> Callable[..., None]:
        def run() -> None:
            if self.own.value is not None:
                action(self.own.value)

        return guarded(run, self._say)
