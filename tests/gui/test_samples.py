"""The plugin in a real viewer; needs a display and napari."""

import os
import sys

import pytest

napari = pytest.importorskip("napari", reason="napari is not installed")

if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    pytest.skip("no display; run under xvfb-run", allow_module_level=True)


def test_samples_open_in_the_viewer(make_napari_viewer) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.open_sample("napari-semanticblur", "cat")
    (layer,) = viewer.layers
    assert layer.name == "cat"
    assert layer.rgb
    screenshot = viewer.screenshot(canvas_only=True, flash=False)
    assert screenshot[..., :3].std() > 10
