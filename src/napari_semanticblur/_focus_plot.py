"""Focus against plane, drawn with Qt alone; a click chooses a plane."""

from __future__ import annotations

import math

from qtpy.QtCore import (  # type: ignore[attr-defined]
    QPointF,
    QRectF,
    QSize,
    Qt,
    Signal,
)
from qtpy.QtGui import QColor, QKeyEvent, QMouseEvent, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_semanticblur._colors import BLURRED_COLOR, SHARP_COLOR
from semanticblur_core.focus.stack import FocusCurve

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 18, 20
_POINTS_DRAWN = 120


class FocusPlot(QWidget):
    """A score along the planes of a stack.

    Attributes
    ----------
    plane_chosen
        Signal with the index of a plane that was clicked on, or reached with the arrow keys.
    curve
        What is drawn.
    """

    plane_chosen = Signal(int)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.curve: FocusCurve | None = None
        self._title, self._shown, self._limit = "", -1, math.nan
        self.setMinimumHeight(90)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAccessibleName("Focus against plane")
        self.setToolTip("A click goes to the plane. Dashed: the gate. Filled: the sharpest plane.")

    def sizeHint(self) -> QSize:  # noqa: N802
        """Room for a few labels."""
        return QSize(280, 150)

    def show_curve(
        self, curve: FocusCurve | None, *, title: str, shown: int, limit: float = math.nan
    ) -> None:
        """Draw a curve, with a line at the plane shown and one at the limit of the gate."""
        self.curve, self._title, self._shown, self._limit = curve, title, shown, limit
        self.update()

    def position_of(self, plane: int) -> QPointF:
        """Where a plane of the curve is drawn, in pixels of this widget."""
        assert self.curve is not None
        return self._place(plane, self.curve.scores[self.curve.positions.index(plane)])

    def mousePressEvent(self, event: QMouseEvent | None) -> None:  # noqa: N802
        """Choose the nearest plane."""
        if event is None or self.curve is None:
            return
        at = event.position().x()
        nearest = min(self.curve.positions, key=lambda p: abs(self._place(p, 0).x() - at))
        self.plane_chosen.emit(nearest)

    def keyPressEvent(self, event: QKeyEvent | None) -> None:  # noqa: N802
        """Step along the curve."""
        steps = {Qt.Key.Key_Left: -1, Qt.Key.Key_Right: 1}
        if event is None or self.curve is None or event.key() not in steps:
            super().keyPressEvent(event)
            return
        step = steps[Qt.Key(event.key())]
        beyond = [p for p in self.curve.positions if (p - self._shown) * step > 0]
        if beyond:
            self.plane_chosen.emit(min(beyond, key=lambda p: abs(p - self._shown)))

    def paintEvent(self, event: QPaintEvent | None) -> None:  # noqa: N802
        """Draw all of it."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().text().color()
        font = painter.font()
        font.setPointSizeF(max(6.0, font.pointSizeF() * 0.8))
        painter.setFont(font)
        painter.setPen(text)
        area = self._area
        curve = self.curve
        if curve is None:
            wanted = "No curve: check several planes of a stack first."
            painter.drawText(QRectF(self.rect()), Qt.AlignmentFlag.AlignCenter, wanted)
            return
        painter.drawText(QRectF(4, 0, self.width() - 8, _TOP), 0, self._title)
        self._draw_axes(painter, text, area, curve)
        if area.left() <= (x := self._place(self._shown, 0).x()) <= area.right():
            painter.setPen(QPen(text, 1))
            painter.drawLine(QPointF(x, area.top()), QPointF(x, area.bottom()))
        low, high = self._range
        if low <= self._limit <= high:
            y = self._place(curve.best, self._limit).y()
            painter.setPen(QPen(QColor(BLURRED_COLOR), 1.5, Qt.PenStyle.DashLine))
            painter.drawLine(QPointF(area.left(), y), QPointF(area.right(), y))
        points = [self._place(*point) for point in zip(curve.positions, curve.scores, strict=True)]
        painter.setPen(QPen(QColor(SHARP_COLOR).lighter(140), 2))
        painter.drawPolyline(QPolygonF(points))
        painter.setBrush(self.palette().base())
        for point in points if len(points) <= _POINTS_DRAWN else []:
            painter.drawEllipse(point, 2.5, 2.5)
        painter.setBrush(QColor(SHARP_COLOR).lighter(140))
        painter.drawEllipse(self.position_of(curve.best), 5, 5)

    def _draw_axes(self, painter: QPainter, text: QColor, area: QRectF, curve: FocusCurve) -> None:
        faint = QColor(text)
        faint.setAlpha(70)
        low, high = self._range
        right = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        for value in (low, high):
            y = self._place(curve.best, value).y()
            painter.setPen(faint)
            painter.drawLine(QPointF(area.left(), y), QPointF(area.right(), y))
            painter.setPen(text)
            painter.drawText(QRectF(0, y - 8, area.left() - 4, 16), right, f"{value:.3g}")
        below = QRectF(area.left(), area.bottom() + 2, area.width(), _BOTTOM)
        painter.drawText(below, Qt.AlignmentFlag.AlignLeft, str(curve.positions[0]))
        painter.drawText(below, Qt.AlignmentFlag.AlignRight, str(curve.positions[-1]))

    @property
    def _area(self) -> QRectF:
        longest = max((f"{value:.3g}" for value in self._range), key=len) if self.curve else ""
        left = max(_LEFT, self.fontMetrics().horizontalAdvance(longest) + 6)
        width, height = self.width() - left - _RIGHT, self.height() - _TOP - _BOTTOM
        return QRectF(left, _TOP, max(1, width), max(1, height))

    @property
    def _range(self) -> tuple[float, float]:
        assert self.curve is not None
        low, high = min(self.curve.scores), max(self.curve.scores)
        around = abs(low) / 2 or 0.5
        return (low, high) if high > low else (low - around, high + around)

    def _place(self, plane: int, score: float) -> QPointF:
        assert self.curve is not None
        area, (low, high) = self._area, self._range
        first, last = self.curve.positions[0], self.curve.positions[-1]
        share = (plane - first) / (last - first) if last > first else 0.5
        y = area.bottom() - (score - low) / (high - low) * area.height()
        return QPointF(area.left() + share * area.width(), y)
