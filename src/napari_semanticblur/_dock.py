"""What the widgets have in common as docks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from magicgui.widgets import Container, Label, Widget
from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtWidgets import QComboBox, QSizePolicy

from semanticblur_core.errors import SemanticBlurError

# Of a choice in letters. Layers have long names, and a dock is at least as wide as its widest line.
_SHORTEST_CHOICE = 12


class Dock(Container):  # type: ignore[type-arg]
    """A column of widgets that scrolls where the window is too low for it.

    Long names of layers do not widen it: they are shortened.

    napari docks ``native``, which of magicgui's scrollable containers is what lies inside the
    scroll area; here it is the area.
    """

    def __init__(self, *, widgets: Sequence[Widget], **how: Any) -> None:
        for widget in widgets:
            for box in (widget.native, *widget.native.findChildren(QComboBox)):
                if isinstance(box, QComboBox):
                    _shorten(box)
        super().__init__(widgets=widgets, scrollable=True, **how)
        # As high as all it holds where there is room, as low as need be where there is none.
        self.native.setSizeAdjustPolicy(type(self.native).SizeAdjustPolicy.AdjustToContents)
        self.native.setMinimumHeight(120)
        self.native.setFrameShape(type(self.native).Shape.NoFrame)
        self._fit = _Fit(self.native)

    def on_taken_out(self, then: Callable[[], None]) -> None:
        """Call it when the dock is closed: napari takes this out of it, and deletes nothing."""
        self._watch = _Watch(self.native, then)

    @property
    def native(self) -> Any:
        """The scroll area."""
        return self.root_native_widget

    @property
    def column(self) -> Any:
        """Layout of what it holds."""
        return super().native.layout()


def row(*widgets: Widget) -> Container[Any]:
    """Widgets beside each other."""
    return Container(widgets=list(widgets), layout="horizontal", labels=False, label="")


def guarded(action: Callable[[], object], say: Callable[[str], None]) -> Callable[..., None]:
    """The action, whatever it is called with; what a person can act on is told, not raised."""

    def run(*_: object) -> None:
        try:
            action()
        except SemanticBlurError as error:
            complain(str(error), say)
        except OSError as error:
            reason = error.strerror or str(error)
            complain(f"{error.filename}: {reason}" if error.filename else reason, say)

    return run


def complain(text: str, say: Callable[[str], None]) -> None:
    """Tell of an error in the widget's own line and in napari's corner."""
    from napari.utils.notifications import show_error

    say(text)
    show_error(text)


def timer(
    parent: Any, callback: Callable[[], None], interval_ms: int, *, is_single: bool = False
) -> QTimer:
    """A timer, not started, that calls again and again or once for each start."""
    made = QTimer(parent)
    made.setSingleShot(is_single)
    made.setInterval(interval_ms)
    made.timeout.connect(callback)
    return made


def wrap(label: Label) -> None:
    """Let lines break where the dock ends, however narrow it is."""
    label.native.setWordWrap(True)
    policy = label.native.sizePolicy()
    policy.setHorizontalPolicy(QSizePolicy.Policy.Ignored)
    label.native.setSizePolicy(policy)
    _Whole(label.native)


def _shorten(box: QComboBox) -> None:
    box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    box.setMinimumContentsLength(_SHORTEST_CHOICE)
    view = box.view()
    if view is not None:  # never so, but the bindings' types allow it
        view.setTextElideMode(Qt.TextElideMode.ElideMiddle)


class _Fit(QObject):  # type: ignore[misc,unused-ignore]
    """Keeps a scroll area as wide as what it holds, and that at the top where nothing fills it."""

    def __init__(self, area: Any) -> None:
        super().__init__(area)
        self._area, self._is_new = area, True
        area.widget().installEventFilter(self)

    def eventFilter(self, column: Any, event: Any) -> bool:  # noqa: N802
        layout = column.layout()
        if event.type() == QEvent.Type.Show and self._is_new:
            self._is_new = False
            fills = QSizePolicy.Policy.Expanding
            inside = (layout.itemAt(i).widget() for i in range(layout.count()))
            if all(widget.sizePolicy().verticalPolicy() != fills for widget in inside):
                layout.addStretch(1)
        elif event.type() == QEvent.Type.LayoutRequest:
            bar = self._area.verticalScrollBar().sizeHint().width()
            self._area.setMinimumWidth(layout.totalMinimumSize().width() + bar)
        return False


class _Whole(QObject):  # type: ignore[misc,unused-ignore]
    """Keeps a label as high as its lines need: layouts in a scroll area give it less."""

    def __init__(self, label: Any) -> None:
        super().__init__(label)
        label.installEventFilter(self)

    def eventFilter(self, label: Any, event: Any) -> bool:  # noqa: N802
        if event.type() in (QEvent.Type.Resize, QEvent.Type.Paint):  # other lines are painted
            needed = max(0, label.heightForWidth(label.width()))
            if label.minimumHeight() != needed:
                label.setMinimumHeight(needed)
        return False


class _Watch(QObject):  # type: ignore[misc,unused-ignore]
    def __init__(self, area: Any, then: Callable[[], None]) -> None:
        super().__init__(area)
        self._then = then
        area.installEventFilter(self)

    def eventFilter(self, area: Any, event: Any) -> bool:  # noqa: N802
        if event.type() == QEvent.Type.ParentChange and area.parent() is None:
            self._then()
        return False
