"""Samples, readers and writers through napari itself."""

from pathlib import Path
from typing import Any

import numpy as np

from semanticblur_core import io


def test_samples_open_in_the_viewer(viewer: Any) -> None:
    viewer.open_sample("napari-semanticblur", "cat")
    (layer,) = viewer.layers
    assert layer.name == "cat"
    assert layer.rgb
    screenshot = viewer.screenshot(canvas_only=True, flash=False)
    assert screenshot[..., :3].std() > 10


def test_the_focal_stack_comes_with_its_truth(viewer: Any) -> None:
    viewer.open_sample("napari-semanticblur", "focal_stack")
    stack, truth = viewer.layers
    assert stack.data.shape == truth.data.shape
    assert set(np.unique(truth.data)) == {1, 2}


def test_labels_are_saved_and_maps_are_read(viewer: Any, tmp_path: Path) -> None:
    layer = viewer.add_labels(np.array([[1, 2], [2, 1]], np.uint8))
    layer.save(str(tmp_path / "mask.png"), plugin="napari-semanticblur")
    np.testing.assert_array_equal(io.read_mask(tmp_path / "mask.png"), layer.data == 2)
    io.write_tiff(tmp_path / "cat_blur.tif", np.full((9, 9), 0.25, np.float32))
    viewer.open(tmp_path / "cat_blur.tif", plugin="napari-semanticblur")
    assert viewer.layers[-1].colormap.name == "inferno"
    np.testing.assert_array_equal(viewer.layers[-1].data, 0.25)
