"""The docks in a real window."""

import itertools
from typing import Any

import numpy as np
import pytest

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
    qtbot.waitUntil(lambda: column.isVisible() and column.height() > 500)
    qtbot.wait(50)
    assert column.width() == widget.native.viewport().width()
    assert widget.native.horizontalScrollBar().maximum() == 0
    items = [column.layout().itemAt(i) for i in range(column.layout().count())]
    rows = [item.geometry() for item in items if item.widget() and item.widget().isVisible()]
    assert all(row.right() <= column.width() for row in rows)
    assert all(b.top() - a.bottom() < 20 for a, b in itertools.pairwise(rows))
    if name != "Focus quality":  # whose table takes what is left
        assert max(row.height() for row in rows) <= 150


@pytest.mark.parametrize("name", WIDGETS)
def test_every_line_of_a_message_is_seen(qtbot: Any, viewer: Any, name: str) -> None:
    viewer.window.resize(1100, 1000)
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    label = widget.status.native
    for n_words in (60, 25, 3, 40):
        widget.status.value = "words " * n_words
        qtbot.waitUntil(lambda: label.height() == label.heightForWidth(label.width()))
