"""The docks in a real window."""

from typing import Any

import numpy as np
import pytest

WIDGETS = ("Detect defocus blur", "Annotate blur", "Fine-tune blur model", "Focus quality")


@pytest.mark.parametrize("name", WIDGETS)
def test_long_names_do_not_widen_a_dock(viewer: Any, name: str) -> None:
    dock, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", name)
    narrow = dock.minimumSizeHint().width()
    assert narrow <= 340
    viewer.add_image(np.zeros((40, 40), np.uint8), name="well B03 field 7 channel DAPI " * 5)
    widget.reset_choices()
    assert dock.minimumSizeHint().width() == narrow
    assert widget.native.widget().minimumSizeHint().width() <= narrow
