"""Curves of a training run, drawn with Qt alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_semanticblur._colors import BLURRED_COLOR, SHARP_COLOR

_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 10, 24, 20


@dataclass
class Curve:
    """Points of one line; ``name`` is for the legend."""

    name: str
    color: str
    width: float = 1.5
    points: list[tuple[float, float]] = field(default_factory=list)


class LossPlot(QWidget):
    """Loss, held-out error and error on photographs over the steps; the best step is marked.

    The axis is of the errors. The loss, which may be far above them, is drawn as a share of its
    highest value.

    Attributes
    ----------
    loss, held_out, photographs
        The curves.
    best_step
        Step of the best weights so far, 0 where there are none.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.loss = Curve("loss (relative)", "#999999", 1.0)
        self.held_out = Curve("held out", BLURRED_COLOR, 2.0)
        self.photographs = Curve("photographs", SHARP_COLOR, 2.0)
        self.best_step = 0
        self._n_steps = 1
        self.setMinimumHeight(130)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("Curves of the training")

    @property
    def curves(self) -> tuple[Curve, Curve, Curve]:
        """In the order they are drawn."""
        return self.loss, self.photographs, self.held_out

    def sizeHint(self) -> QSize:  # noqa: N802
        """Room for a few labels."""
        return QSize(260, 150)

    def clear(self, n_steps: int = 1) -> None:
        """Begin a run of that many steps."""
        for curve in self.curves:
            curve.points.clear()
        self.best_step, self._n_steps = 0, max(1, n_steps)
        self.update()

    def add(
        self,
        step: int,
        *,
        n_steps: int,
        loss: float = math.nan,
        held_out: float | None = None,
        photographs: float | None = None,
        is_best: bool = False,
    ) -> None:
        """A step; values that are missing or not finite draw nothing."""
        self._n_steps = max(1, n_steps)
        values = (loss, photographs, held_out)
        for curve, value in zip(self.curves, values, strict=True):
            if value is not None and math.isfinite(value):
                curve.points.append((step, value))
        if is_best:
            self.best_step = step
        self.update()

    @property
    def top(self) -> float:
        """Error at the upper end of the axis, a round number."""
        errors = (*self.held_out.points, *self.photographs.points)
        highest = max((y for _, y in errors), default=0.0)
        if highest <= 0:
            return 1.0
        unit = 10.0 ** math.floor(math.log10(highest))
        return next(unit * k for k in (1, 2, 5, 10) if unit * k >= highest * (1 - 1e-9))

    def paintEvent(self, event: QPaintEvent | None) -> None:  # noqa: N802
        """Draw all of it; a run has some hundred points."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().text().color()
        faint = QColor(text)
        faint.setAlpha(70)
        width, height = self.width() - _LEFT - _RIGHT, self.height() - _TOP - _BOTTOM
        area = QRectF(_LEFT, _TOP, max(1, width), max(1, height))
        font = painter.font()
        font.setPointSizeF(max(6.0, font.pointSizeF() * 0.8))
        painter.setFont(font)
        top = self.top
        for share in (0.0, 0.5, 1.0):
            y = area.bottom() - share * area.height()
            painter.setPen(faint)
            painter.drawLine(QPointF(area.left(), y), QPointF(area.right(), y))
            painter.setPen(text)
            where = QRectF(0, y - 8, _LEFT - 4, 16)
            right = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
            painter.drawText(where, right, f"{share * top:.3g}")
        below = QRectF(area.left(), area.bottom() + 2, area.width(), _BOTTOM)
        painter.drawText(below, Qt.AlignmentFlag.AlignLeft, "step 0")
        painter.drawText(below, Qt.AlignmentFlag.AlignRight, str(self._n_steps))

        def place(point: tuple[float, float], top: float = top) -> QPointF:
            x = area.left() + point[0] / self._n_steps * area.width()
            return QPointF(x, area.bottom() - min(point[1] / top, 1.0) * area.height())

        highest_loss = max((y for _, y in self.loss.points), default=1.0) or 1.0

        if self.best_step:
            painter.setPen(QPen(QColor(text), 1, Qt.PenStyle.DashLine))
            x = place((self.best_step, 0)).x()
            painter.drawLine(QPointF(x, area.top()), QPointF(x, area.bottom()))
        left = 4.0
        for curve in self.curves:
            painter.setPen(QPen(QColor(curve.color), curve.width))
            scale = highest_loss if curve is self.loss else top
            line = [place(point, scale) for point in curve.points]
            painter.drawPolyline(QPolygonF(line))
            if len(line) == 1:
                painter.drawEllipse(line[0], 1.5, 1.5)
            painter.drawLine(QPointF(left, 10), QPointF(left + 12, 10))
            painter.setPen(text)
            painter.drawText(QPointF(left + 15, 14), curve.name)
            left += 25 + painter.fontMetrics().horizontalAdvance(curve.name)
        painter.end()
