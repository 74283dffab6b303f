"""Questions to the person."""

from __future__ import annotations

from pathlib import Path


def ask(question: str) -> bool:
    """Yes or no; no is what Enter gives."""
    from qtpy.QtWidgets import QMessageBox

    yes = QMessageBox.StandardButton.Yes
    no = QMessageBox.StandardButton.No
    return bool(QMessageBox.question(None, "SemanticBlur", question, yes | no, no) == yes)


def ask_text(question: str, proposal: str) -> str:
    """A line of text; empty where the question was cancelled."""
    from qtpy.QtWidgets import QInputDialog

    text, accepted = QInputDialog.getText(None, "SemanticBlur", question, text=proposal)
    return text.strip() if accepted else ""


def ask_file(proposal: Path) -> Path | None:
    """Where to write weights; None where the question was cancelled."""
    from qtpy.QtWidgets import QFileDialog

    path, _ = QFileDialog.getSaveFileName(
        None, "Export weights", str(proposal), "Weights (*.safetensors)"
    )
    return Path(path) if path else None
