"""Full state of a training run, written as a whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from semanticblur_core import disk
from semanticblur_core.errors import TrainingError

FORMAT_VERSION = 1
_LITTLE_BYTES = 2**20
_KEYS = {"identity", "model", "averaged", "optimizer", "epoch", "best_mae", "history"}
# Bytes of a state for each of its parameters: it, its average, two moments of Adam.
_BYTES_PER_PARAMETER = 16


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and text; the file before it survives a crash at any moment."""
    with disk.replacing(path, durable=True) as temporary:
        try:
            torch.save(state | {"format_version": FORMAT_VERSION}, temporary)
        except RuntimeError as error:  # what a full disk becomes
            reason = str(error).splitlines()[0]
            if shutil.disk_usage(path.parent).free < _LITTLE_BYTES:
                reason = "no space left on the disk"
            raise TrainingError(f"{path}: cannot be written: {reason}") from error


def require_space(folder: Path, n_parameters: int) -> None:
    """Refuse before a run what would end it: two states beside each other, and weights.

    Raises
    ------
    TrainingError
        If there is too little room.
    """
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, 2 * _BYTES_PER_PARAMETER * n_parameters
    if free < needed:
        raise TrainingError(
            f"{folder}: {free / 2**20:,.0f} MiB free, and the states of a run take up to "
            f"{needed / 2**20:,.0f} MiB; make room or give another folder"
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises
    ------
    TrainingError
        If the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such checkpoint; start without --resume")
    try:
        # weights_only: a checkpoint is data, and no code in it is ever run.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "weights" in reason.lower():  # torch's advice is not to be followed
            reason = "it holds other than tensors, numbers and text"
        raise TrainingError(f"{path}: damaged, or not a checkpoint ({reason})") from error
    is_state = isinstance(state, dict) and state.keys() >= _KEYS
    if not is_state or state.get("format_version") != FORMAT_VERSION:
        raise TrainingError(f"{path}: not a training checkpoint of this release")
    return state


def precision_of(state: dict[str, Any]) -> str:
    """Precision that a checkpoint was computed in, as `choose_device` takes it.

    ``auto`` is decided by a stopwatch and may come out differently on another day, when a run is
    resumed.
    """
    return str(state["identity"]["computed on"]).rpartition("torch.")[2]
