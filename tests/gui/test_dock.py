"""The docks in a real window."""

import itertools
from typing import Any

import numpy as np
import pytest
from napari.utils import progress
from qtpy.QtCore import QCoreApplication, QEvent, QTimer

WIDGETS = ("Detect defocus blur", "Annotate blur", "Fine-tune blur model", "Focus quality")


@pytest.mark.parametrize("name", WIDGETS)
def test_long_names_do_not_widen_a_dock(viewer: Any, name: str) -> None:
    dock, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    layer = viewer.add_image(np.zeros((40, 40), np.uint8), name="well")
    widget.reset_choices()
    narrow = dock.minimumSizeHint().width()
    layer.name = "well B03 field 7 channel DAPI " * 5
    widget.reset_choices()
    assert dock.minimumSizeHint().width() == narrow
    assert widget.native.widget().minimumSizeHint().width() <= narrow


@pytest.mark.parametrize("name", WIDGETS)
def test_a_high_dock_keeps_its_rows_together_and_nothing_is_cut_off(
    qtbot: Any, viewer: Any, name: str
) -> None:
    viewer.window.resize(1100, 1000)
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    widget.status.value = "a long line of many words " * 5
    column = widget.native.widget()

    def is_laid_out() -> None:
        assert column.isVisible()
        assert column.height() > 500
        assert column.width() == widget.native.viewport().width()
        assert widget.native.horizontalScrollBar().maximum() == 0
        items = [column.layout().itemAt(i) for i in range(column.layout().count())]
        shown = [item for item in items if item.widget() and item.widget().isVisible()]
        rows = [item.geometry() for item in shown]
        assert all(row.right() <= column.width() for row in rows)
        assert all(b.top() - a.bottom() < 20 for a, b in itertools.pairwise(rows))
        if name != "Focus quality":  # whose table takes what is left
            assert max(row.height() for row in rows) <= 150

    qtbot.waitUntil(is_laid_out, timeout=10_000)


@pytest.mark.parametrize("name", WIDGETS)
def test_every_line_of_a_message_is_seen(qtbot: Any, viewer: Any, name: str) -> None:
    viewer.window.resize(1100, 1000)
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    label = widget.status.native
    for n_words in (60, 25, 3, 40):
        widget.status.value = "words " * n_words
        qtbot.waitUntil(lambda: label.height() == label.heightForWidth(label.width()))


RUNS = {
    "run_button": "Detect defocus blur",
    "check_button": "Focus quality",
    "composite_button": "Focus quality",
    "map_button": "Annotate blur",
}


@pytest.fixture
def click(viewer: Any, request: pytest.FixtureRequest) -> Any:
    """A button that starts a run of many planes, to be clicked."""
    viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    name = RUNS[request.param]
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    widget.planes.value = next(each for each in widget.planes.choices if each.startswith("all"))
    if name == "Annotate blur":
        widget.annotate()
    return getattr(widget, request.param).native.click


@pytest.mark.parametrize("click", RUNS, indirect=True)
def test_a_double_click_starts_one_run(qtbot: Any, viewer: Any, click: Any) -> None:
    """napari handles events as it makes the bar of a run: the second click among them."""
    QTimer.singleShot(0, click)
    click()
    qtbot.wait(50)
    [bar] = progress._all_instances
    bar.cancel()
    qtbot.waitUntil(lambda: not progress._all_instances, timeout=60_000)


@pytest.mark.parametrize("click", RUNS, indirect=True)
def test_a_window_can_be_closed_as_a_run_starts(qtbot: Any, viewer: Any, click: Any) -> None:
    def close() -> None:
        window = viewer.window._qt_window
        viewer.close()
        window.deleteLater()
        QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)

    QTimer.singleShot(0, close)
    click()
    qtbot.waitUntil(lambda: not progress._all_instances, timeout=60_000)


# napari divides by the length as well.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("name", WIDGETS)
def test_a_stack_without_planes_is_a_line(viewer: Any, name: str) -> None:
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    viewer.add_image(np.zeros((0, 40, 50), np.uint8), name="none")
    viewer.add_labels(np.zeros((40, 50), np.uint8))
    if name != "Fine-tune blur model":  # which offers labels
        button = {
            "Detect defocus blur": "run_button",
            "Annotate blur": "start_button",
            "Focus quality": "check_button",
        }[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("napari.utils.notifications.show_error", lambda _: None)
            getattr(widget, button).native.click()
        assert widget.status.value == "none: has no pixels, its shape is (0, 40, 50)"
    viewer.add_image(np.zeros((3, 40, 50), np.uint8), name="some")
    viewer.layers["some"].data = np.zeros((0, 40, 50), np.uint8)
    viewer.layers.clear()
