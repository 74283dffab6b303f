"""A sortable table of scores: green where the gate is kept, red where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtpy.QtCore import (  # type: ignore[attr-defined]
    QAbstractTableModel,
    QModelIndex,
    QSize,
    QSortFilterProxyModel,
    Qt,
    Signal,
)
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QAbstractItemView, QTableView, QWidget

from napari_semanticblur._colors import FAILED_COLOR, PASSED_COLOR

_NO_PARENT = QModelIndex()
# Widest a name is shown at first; it can be dragged wider.
_NAME_PX = 140


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes
    ----------
    cells
        Texts and numbers; NaN is shown as a dash.
    passed
        Verdict of the gate; None where there is none.
    why
        Shown when the pointer rests on the line.
    order
        What the second column is sorted by.
    target
        Given back when the line is chosen.
    """

    cells: tuple[str | float, ...]
    passed: bool | None
    why: str
    order: tuple[int, ...]
    target: Any


class _Model(QAbstractTableModel):
    def __init__(self, parent: QWidget) -> None:
        super().__init__(parent)
        self.headers: tuple[str, ...] = ()
        self.rows: list[Row] = []

    def rowCount(self, parent: QModelIndex = _NO_PARENT) -> int:  # noqa: N802
        return 0 if parent.isValid() else len(self.rows)

    def columnCount(self, parent: QModelIndex = _NO_PARENT) -> int:  # noqa: N802
        return 0 if parent.isValid() else len(self.headers)

    def headerData(  # noqa: N802
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if role == Qt.ItemDataRole.DisplayRole and orientation == Qt.Orientation.Horizontal:
            return self.headers[section]
        return None

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        row = self.rows[index.row()]
        if role == Qt.ItemDataRole.DisplayRole:
            cell = row.cells[index.column()]
            if isinstance(cell, str):
                return cell
            return f"{cell:.4g}" if math.isfinite(cell) else "\N{EN DASH}"
        if role == Qt.ItemDataRole.ToolTipRole:
            return row.why or None
        if row.passed is not None and role == Qt.ItemDataRole.BackgroundRole:
            return QColor(PASSED_COLOR if row.passed else FAILED_COLOR)
        if row.passed is not None and role == Qt.ItemDataRole.ForegroundRole:
            return QColor("black")
        return None

    def show(self, headers: tuple[str, ...], rows: list[Row]) -> None:
        """Take other rows; where they only became more, those that are there stay as they are."""
        before = len(self.rows)
        more = len(rows) - before
        same = all(a is b for a, b in zip(rows, self.rows, strict=False))
        if headers == self.headers and more >= 0 and same:
            if more:
                self.beginInsertRows(_NO_PARENT, before, len(rows) - 1)
                self.rows = rows
                self.endInsertRows()
            return
        self.beginResetModel()
        self.headers, self.rows = headers, rows
        self.endResetModel()


class _Sorted(QSortFilterProxyModel):
    def lessThan(self, left: QModelIndex, right: QModelIndex) -> bool:  # noqa: N802
        model = self.sourceModel()
        assert isinstance(model, _Model)
        a, b = model.rows[left.row()], model.rows[right.row()]
        if left.column() == 1:
            return (a.cells[0], a.order) < (b.cells[0], b.order)
        return _key(a.cells[left.column()]) < _key(b.cells[left.column()])


def _key(cell: str | float) -> tuple[int, float, str]:
    if isinstance(cell, str):
        return 1, 0.0, cell
    return (1, cell, "") if math.isfinite(cell) else (0, 0.0, "")


class FocusTable(QTableView):
    """The table; sorted by a click on a column.

    Attributes
    ----------
    row_chosen
        Signal with the target of a row that was clicked on or reached with the arrow keys.
    """

    row_chosen = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._model = _Model(self)
        self._sorted = _Sorted(self)
        self._sorted.setSourceModel(self._model)
        self.setModel(self._sorted)
        self.setSortingEnabled(True)
        self.sortByColumn(1, Qt.SortOrder.AscendingOrder)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setAlternatingRowColors(False)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.setMinimumHeight(96)
        self.setAccessibleName("Focus of layers, planes and tiles")
        header = self.verticalHeader()
        if header is not None:
            header.hide()
            header.setDefaultSectionSize(22)
        self.clicked.connect(self._clicked)
        self.activated.connect(self._clicked)

    def sizeHint(self) -> QSize:  # noqa: N802
        """No more than its least height: it takes what the rest of the dock leaves."""
        return QSize(super().sizeHint().width(), self.minimumHeight())

    @property
    def rows(self) -> list[Row]:
        """Rows as they are sorted."""
        places = (self._sorted.index(i, 0) for i in range(self._sorted.rowCount()))
        return [self._model.rows[self._sorted.mapToSource(place).row()] for place in places]

    def show_rows(self, headers: Sequence[str], rows: list[Row]) -> None:
        """Show these."""
        first = tuple(headers) != self._model.headers or not self._model.rows
        self._model.show(tuple(headers), rows)
        if first:
            self.resizeColumnsToContents()
            # A layer's long name leaves room for what was found.
            self.setColumnWidth(0, min(self.columnWidth(0), _NAME_PX))

    def _clicked(self, place: QModelIndex) -> None:
        self.row_chosen.emit(self._model.rows[self._sorted.mapToSource(place).row()].target)
