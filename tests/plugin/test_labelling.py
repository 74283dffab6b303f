"""Bulk edits of an annotation, and which plane they are of."""

from pathlib import Path

import numpy as np
import pytest
from napari.components import ViewerModel
from PIL import Image

from napari_semanticblur._annotation_source import shown_plane
from napari_semanticblur._labelling import codes_of, fill_rest, import_labels
from semanticblur_core import io
from semanticblur_core.errors import DataError


def test_one_undo_takes_the_rest_of_all_planes_back() -> None:
    # More planes than napari keeps steps.
    layer = ViewerModel().add_labels(np.zeros((130, 10, 12), np.uint8))
    layer.data_setitem((np.array([0]), np.array([1]), np.array([1])), 2)
    before = layer.data.copy()
    assert fill_rest(layer, np.ndindex(130), 1) == before.size - 1
    assert layer.data.all()
    layer.undo()
    np.testing.assert_array_equal(layer.data, before)


def test_a_plane_that_a_stack_does_not_have_is_not_shown() -> None:
    viewer = ViewerModel()
    viewer.add_image(np.zeros((12, 60, 70), np.uint8))
    layer = viewer.add_labels(np.zeros((4, 60, 70), np.uint8), translate=(2, 0, 0), name="short")
    for point, plane in ((1, None), (2, (0,)), (5, (3,)), (6, None), (9, None)):
        viewer.dims.set_point(0, point)
        assert shown_plane(viewer, layer) == plane
    with pytest.raises(DataError, match="short: no plane of it is shown"):
        import_labels(layer, shown_plane(viewer, layer), np.ones((60, 70), np.uint8))
    assert not layer.data.any()


@pytest.mark.parametrize("bits", [1, 8])
def test_a_mask_means_what_it_means_everywhere(tmp_path: Path, bits: int) -> None:
    mask = np.zeros((60, 70), np.uint8)
    mask[5], mask[6], mask[7], mask[8] = 255, 3, 127, 128  # edges were resized
    picture = Image.fromarray(mask if bits == 8 else mask > 127)
    picture.save(tmp_path / "m.png")
    blurred = io.read_mask(tmp_path / "m.png")
    array = mask if bits == 8 else mask > 127
    np.testing.assert_array_equal(codes_of(array, "blur"), np.where(blurred, 2, 1))
    np.testing.assert_array_equal(codes_of(array, "sharp"), np.where(blurred, 1, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_zeros_and_ones_and_numbered_things_are_masks_too(dtype: type) -> None:
    things = np.arange(60 * 70).reshape(60, 70) % 3
    expected = np.where(things == 0, 1, 2)
    np.testing.assert_array_equal(codes_of(things.astype(dtype), "blur"), expected)
    ones = (things > 0).astype(dtype)
    np.testing.assert_array_equal(codes_of(ones, "blur"), expected)
