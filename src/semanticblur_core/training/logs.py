"""What a run leaves behind for people to look at: learning curves, and TensorBoard on request."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

from semanticblur_core import disk
from semanticblur_core.errors import TrainingError
from semanticblur_core.training.loop import HISTORY, TrainUpdate

CURVES = "curves.png"


class RunLog:
    """Writes the logs of a run as its updates come.

    Parameters
    ----------
    run_dir
        Folder of the run; the curves are drawn from its ``history.csv``.
    tensorboard
        Whether to write TensorBoard's files to ``run_dir/tensorboard`` too.

    Raises
    ------
    TrainingError
        If TensorBoard is wanted and not installed.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = False) -> None:
        self.run_dir = run_dir
        self._writer: Any = None
        if tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                raise TrainingError(
                    "--tensorboard: TensorBoard is not installed; "
                    "pip install 'napari-semanticblur[tensorboard]'"
                )
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def add(self, update: TrainUpdate) -> None:
        """Log one update."""
        if self._writer is None:
            return
        values = {"loss": update.loss, "learning rate": update.learning_rate}
        if update.scores is not None:
            scores = update.scores
            values |= {"val/MAE": scores.mae, "val/F-beta": scores.f_beta, "val/IoU": scores.iou}
        for name, value in values.items():
            self._writer.add_scalar(name, value, update.step)

    def draw(self) -> None:
        """Draw ``curves.png``; nothing without matplotlib."""
        if importlib.util.find_spec("matplotlib") is not None:
            draw_curves(self.run_dir / HISTORY, self.run_dir / CURVES)

    def close(self) -> None:
        """End TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def draw_curves(history: Path, target: Path) -> None:
    """Draw loss, MAE, F and IoU over the epochs of a ``history.csv`` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with history.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "training loss": ("mean_loss",),
        "validation MAE": ("val_mae",),
        "validation F-beta, IoU": ("val_f_beta", "val_iou"),
    }
    for axis, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for column in columns:
            axis.plot(epochs, [float(row[column]) for row in rows], marker=".", label=column)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(columns) > 1:
            axis.legend()
    with disk.replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
