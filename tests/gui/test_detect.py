"""The detect widget in a real viewer, driven as a person would."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from PIL import Image
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication
from skimage.data import chelsea

from napari_semanticblur import _detect, _detection
from napari_semanticblur._detection import range_axis
from napari_semanticblur._layers import find_result
from napari_semanticblur._models import models
from napari_semanticblur._settings import Preferences, preferences
from semanticblur_core import Detector, weights
from semanticblur_core.focus.classical import ClassicalDetector

ANGLE_DEG = 25
AMID = 0.4


@pytest.fixture
def widget(viewer: Any) -> Any:
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    return widget


def finish(qtbot: Any, widget: Any, timeout_ms: int = 180_000) -> None:
    widget.run()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=timeout_ms)


def results(viewer: Any, layer: Any) -> tuple[Any, Any]:
    return find_result(viewer, layer, "map"), find_result(viewer, layer, "labels")


def photo(height: int = 90, width: int = 120) -> np.ndarray:
    """A part of a photograph; one that is larger is repeated."""
    n = 1 + max(height, width) // 300
    return np.tile(chelsea(), (n, n, 1))[40 : 40 + height, 60 : 60 + width]


@pytest.fixture
def random_model(random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model that widgets start with in a test: with it photographs get maps around `AMID`.

    The model that ships may find all of an image blurred, and then labels that are turned, or of
    another plane or threshold, would be right as well.
    """
    name = str(random_weights)
    chosen = Preferences(model=name, threshold=AMID)
    monkeypatch.setattr(_detect, "preferences", lambda: chosen)
    return name


def assert_telling(blur: np.ndarray, threshold: float) -> None:
    """Labels of this map are others where they are turned, mirrored or of another threshold."""
    blurred = blur > threshold
    assert 0.05 < blurred.mean() < 0.95
    for other in (blurred[..., ::-1, ::-1], blurred[..., ::-1], blurred[..., ::-1, :]):
        assert (blurred != other).mean() > 0.05


def move_threshold(qtbot: Any, widget: Any, threshold: float) -> None:
    widget.threshold.value = threshold
    qtbot.waitUntil(lambda: not widget._rethresholding, timeout=5000)


def test_a_photo_gets_a_map_and_labels_that_line_up(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    image = photo()
    layer = viewer.add_image(image, rgb=True, scale=(2, 0.5), rotate=ANGLE_DEG, name="photo")
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    expected = Detector(random_model, device="cpu", backend="torch").detect(image)
    assert_telling(expected, AMID)
    np.testing.assert_allclose(blur.data, expected, atol=0.01)
    np.testing.assert_array_equal(labels.data, np.where(blur.data > AMID, 2, 1))
    assert (blur.name, labels.name) == ("photo blur map", "photo blur")
    assert labels.data.dtype == np.uint8
    for result in (blur, labels):
        np.testing.assert_allclose(result.scale, layer.scale)
        np.testing.assert_allclose(result.rotate, layer.rotate)
    record = labels.metadata["semanticblur"]
    assert record["complete"]
    assert record["model"] == random_model
    assert len(record["model_sha256"]) == 64
    assert tuple(blur.contrast_limits) == (0, 1)
    assert "out of focus" in widget.status.value


def test_running_again_updates_its_layers(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    finish(qtbot, widget)
    before = results(viewer, layer)
    widget.size.value = _detect.CUSTOM
    widget.custom_size.value = 64
    finish(qtbot, widget)
    assert results(viewer, layer) == before
    assert len(viewer.layers) == 3
    assert before[0].metadata["semanticblur"]["settings"]["size"] == 64


def test_the_threshold_moves_the_labels_without_a_run(
    qtbot: Any,
    viewer: Any,
    random_model: str,
    widget: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    monkeypatch.setattr(_detection.Detection, "start", lambda self: pytest.fail("a run started"))
    for threshold in (0.38, 0.45):
        assert_telling(blur.data, threshold)
        move_threshold(qtbot, widget, threshold)
        np.testing.assert_array_equal(labels.data, np.where(blur.data > threshold, 2, 1))
        record = labels.metadata["semanticblur"]
        assert record["settings"]["threshold"] == threshold
        assert f"--threshold={threshold:g}" in record["command"]


def test_what_was_painted_on_a_result_stays_when_the_threshold_moves(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    corrected = blur.data > AMID
    corrected[20:] = False
    assert corrected.any()
    labels.data[corrected] = 1
    corrected[70:, :30], labels.data[70:, :30] = True, 0
    painted = labels.data[corrected]
    for threshold in (0.39, 0.2, 0.7, 0.41):  # past every value that was painted on, and back
        move_threshold(qtbot, widget, threshold)
        expected = np.where(blur.data > threshold, 2, 1)
        expected[corrected] = painted
        np.testing.assert_array_equal(labels.data, expected)
    viewer.layers.remove(blur)
    move_threshold(qtbot, widget, 0.45)
    expected = np.where(blur.data > 0.45, 2, 1)
    expected[corrected] = painted
    np.testing.assert_array_equal(labels.data, expected)
    assert "0.45" in labels.metadata["semanticblur"]["command"]
    finish(qtbot, widget)  # the removed map comes back, and a run paints over
    again, same = results(viewer, layer)
    assert same is labels
    np.testing.assert_array_equal(labels.data, np.where(again.data > 0.45, 2, 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64, bool])
def test_stacks_of_any_dtype(qtbot: Any, viewer: Any, widget: Any, dtype: Any) -> None:
    stack = (np.random.default_rng(2).random((3, 50, 60)) * 200).astype(dtype)
    layer = viewer.add_image(stack, name="stack", scale=(2, 1, 1))
    widget.planes.value = _detect.ALL
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    assert blur.data.shape == labels.data.shape == stack.shape
    assert np.isfinite(blur.data).all()
    assert set(np.unique(labels.data)) <= {1, 2}


def test_one_plane_of_five_axes_keeps_them_all(qtbot: Any, viewer: Any, widget: Any) -> None:
    data = np.random.default_rng(3).integers(0, 9999, (2, 3, 4, 40, 50), np.uint16)
    layer = viewer.add_image(data, name="5d", scale=(1, 1, 3, 2, 2), translate=(0, 0, 9, 0, 0))
    viewer.dims.set_point((0, 1, 2), (1, 2, 9 + 3 * 3))
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    assert blur.data.shape == labels.data.shape == (1, 1, 1, 40, 50)
    np.testing.assert_allclose(
        blur.data_to_world((0, 0, 0, 5, 6)), layer.data_to_world((1, 2, 3, 5, 6))
    )
    assert labels.metadata["semanticblur"]["planes"] == [[1, 2], [2, 3], [3, 4]]


def slices(n_planes: int) -> np.ndarray:
    """Planes that differ: parts of a photograph."""
    grey = chelsea()[..., 1]
    return np.stack([grey[50 * z : 50 * z + 60, 60 * z : 60 * z + 80] for z in range(n_planes)])


def test_another_plane_is_added_to_a_result_that_holds_it(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    layer = viewer.add_image(slices(4), name="stack")
    widget.planes.value = _detect.ALL
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    before = blur.data.copy()
    moved = 0.38
    for z in (0, 1, 3):
        assert np.abs(before[2] - before[z]).max() > 0.05
    assert_telling(before[2], moved)
    assert_telling(before[2], AMID)
    move_threshold(qtbot, widget, moved)
    blur.data[2], labels.data[2] = np.nan, 0
    widget.planes.value = _detect.CURRENT
    viewer.dims.set_point(0, 2)
    viewer.layers.selection.active = layer
    _detect.detect_now(viewer)  # its own threshold is another
    qtbot.waitUntil(lambda: not _detection._running, timeout=60_000)
    assert results(viewer, layer) == (blur, labels)
    np.testing.assert_allclose(blur.data, before, atol=1e-6)
    np.testing.assert_array_equal(labels.data, np.where(before > moved, 2, 1))
    for result in (blur, labels):
        record = result.metadata["semanticblur"]
        assert record["complete"]
        assert record["planes"] == [[0, 4]]
        assert record["settings"]["threshold"] == moved
        assert "--planes" not in record["command"]


def test_a_longer_result_of_other_settings_is_kept(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(slices(4), name="stack")
    widget.planes.value = _detect.ALL
    finish(qtbot, widget)
    earlier = results(viewer, layer)
    before = earlier[0].data.copy()
    widget.planes.value = _detect.CURRENT
    widget.size.value = _detect.CUSTOM
    widget.custom_size.value = 64
    finish(qtbot, widget)
    np.testing.assert_array_equal(earlier[0].data, before)
    assert len(viewer.layers) == 5
    assert not earlier[1].visible  # two on top of each other have no colours of theirs
    assert results(viewer, layer)[1].visible
    now = results(viewer, layer)
    assert now[0].data.shape == (1, 60, 80)
    assert "is kept beside it" in widget.status.value
    widget.custom_size.value = 96
    finish(qtbot, widget)
    assert results(viewer, layer) == now
    assert len(viewer.layers) == 5


def test_the_share_follows_the_threshold_until_the_data_are_others(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    moved = float(np.quantile(blur.data, 0.25))
    move_threshold(qtbot, widget, moved)
    share = f"{(labels.data == 2).mean():.0%}"
    assert share in ("74%", "75%", "76%")
    assert widget.status.value == f"photo: {share} out of focus at this threshold"
    before = labels.data.copy()
    layer.data = layer.data[::-1].copy()
    move_threshold(qtbot, widget, 0.0)
    assert "are of other data now" in widget.status.value
    np.testing.assert_array_equal(labels.data, before)


def test_of_several_layers_selected_none_is_meant(
    viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_warning", shown.append)
    for name in "ab":
        viewer.add_image(photo(), rgb=True, name=name)
    viewer.layers.selection = set(viewer.layers)
    _detect.detect_now(viewer)
    assert shown == ["Detect defocus blur: select one image layer, not several."]


def test_new_models_stand_before_the_way_to_others(
    viewer: Any, widget: Any, random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    made = weights.next_version("mine")
    made.parent.mkdir(parents=True)
    shutil.copy(random_weights, made)
    before = widget.model.value
    models.changed.emit("mine@1")
    assert list(widget.model.choices) == widget._models(None)
    assert widget.model.choices[-1] == _detect.OTHER_FILE
    assert widget.model.value == before


def detected_stack(qtbot: Any, viewer: Any, widget: Any) -> Any:
    """A long stack that was detected quickly, at 64 px."""
    layer = viewer.add_image(np.zeros((60, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.size.value = _detect.CUSTOM
    widget.custom_size.value = 64
    finish(qtbot, widget)
    return layer


@pytest.mark.parametrize("map_is", ["there", "removed"])
def test_cancelling_a_rerun_brings_the_earlier_result_back(
    qtbot: Any, viewer: Any, widget: Any, map_is: str
) -> None:
    layer = detected_stack(qtbot, viewer, widget)
    blur, labels = results(viewer, layer)
    before = blur.data.copy(), labels.data.copy(), labels.metadata["semanticblur"]
    if map_is == "removed":
        viewer.layers.remove(blur)
    widget.custom_size.value = 320
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 3, timeout=60_000)
    assert (labels.data == 0).any()
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=5000)
    if map_is == "removed":
        blur, _ = results(viewer, layer)
    assert results(viewer, layer) == (blur, labels)
    assert blur.metadata["semanticblur"] == before[2] | {"kind": "map"}
    np.testing.assert_array_equal(blur.data, before[0])
    np.testing.assert_array_equal(labels.data, before[1])
    assert labels.metadata["semanticblur"] == before[2]
    assert "the earlier result is back" in widget.status.value


def test_a_larger_result_is_shown_again_if_the_run_beside_it_is_cancelled(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    layer = detected_stack(qtbot, viewer, widget)
    _, earlier = results(viewer, layer)
    widget.custom_size.value = 320
    widget.planes.value = _detect.RANGE
    widget.first.value, widget.last.value = 0, 50
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 3, timeout=60_000)
    _, labels = results(viewer, layer)
    assert labels is not earlier
    assert (earlier.visible, labels.visible) == (False, True)
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=5000)
    assert (earlier.visible, labels.visible) == (True, False)
    assert "the earlier result, of more planes, is shown again" in widget.status.value


def test_a_rerun_follows_a_layer_that_was_calibrated(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    finish(qtbot, widget)
    layer.scale, layer.translate, layer.rotate = (0.2, 0.5), (3, 4), ANGLE_DEG
    finish(qtbot, widget)
    for result in results(viewer, layer):
        for point in ((0, 0), (5, 7)):
            np.testing.assert_allclose(result.data_to_world(point), layer.data_to_world(point))


def test_a_result_follows_a_layer_that_is_calibrated_during_the_run(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    layer = viewer.add_image(np.zeros((60, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=60_000)
    layer.scale, layer.translate = (3, 2, 2), (7, 0, 0)
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=60_000)
    for result in results(viewer, layer):
        np.testing.assert_allclose(result.scale, (3, 2, 2))
        np.testing.assert_allclose(result.translate, (7, 0, 0))


def sliced(layer: Any) -> np.ndarray:
    """What napari draws of a layer."""
    return np.asarray(layer._slice.image.raw)


TILT = np.eye(4)
TILT[0, 1] = 0.3


@pytest.mark.filterwarnings("ignore:Non-orthogonal slicing:UserWarning")
@pytest.mark.parametrize(
    "placement",
    [
        {"scale": (3, 0.5, 2), "translate": (10, -4, 5), "units": ("um", "nm", "nm")},
        {"rotate": ANGLE_DEG},
        {"shear": (0.2, 0.1, -0.3), "axis_labels": ("z", "y", "x")},
        {"affine": np.diag([1.0, -2, 3, 1]) + 0.1 * np.eye(4, k=1)},
        {"scale": (1, -1, 1)},
        {"affine": TILT},
    ],
    ids=["scale", "rotate", "shear", "affine", "flip", "tilt"],
)
def test_results_lie_where_the_image_lies(
    qtbot: Any, viewer: Any, widget: Any, placement: dict[str, Any]
) -> None:
    numbers = np.arange(1, 5, dtype=np.uint8)[:, None, None]
    layer = viewer.add_image(np.tile(numbers, (1, 40, 50)), name="stack", **placement)
    for step in range(viewer.dims.nsteps[0]):
        viewer.dims.set_current_step(0, step)
        if (sliced(layer) == 3).all():
            break
    assert (sliced(layer) == 3).all()
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    assert (sliced(labels) > 0).all()  # it is seen where the image is
    for result in (blur, labels):
        assert result.data.shape == (1, 40, 50)
        first = 2
        assert result.metadata["semanticblur"]["planes"] == [[first, first + 1]]
        for point in ((0, 0, 0), (0, 5, 7), (0, 39, 49)):
            there = (point[0] + first, *point[1:])
            np.testing.assert_allclose(
                result.data_to_world(point), layer.data_to_world(there), atol=1e-9
            )
        assert (result.units, result.axis_labels) == (layer.units, layer.axis_labels)


def test_sliders_beyond_the_layer(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((4, 40, 50), np.uint8), name="short")
    viewer.add_image(np.zeros((9, 4, 5), np.uint8), name="long")
    widget.layer.value = layer
    viewer.dims.set_point(0, 7)
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        widget.run()
    assert shown[0].startswith("short: nothing of it is shown, the slider along Z is at plane 7")
    widget.planes.value = _detect.ALL
    finish(qtbot, widget)
    assert results(viewer, layer)[0].data.shape == (4, 40, 50)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_pyramid_that_is_coarser_along_z_shows_the_plane_it_analysed(
    qtbot: Any, viewer: Any, widget: Any, factor: int
) -> None:
    full = np.zeros((8, 80, 80), np.uint8)
    layer = viewer.add_image([full, full[::factor, ::2, ::2]], name="pyramid")
    widget.level.value = 1
    for z in range(8):
        viewer.dims.set_point(0, z)
        finish(qtbot, widget)
        blur, _ = results(viewer, layer)
        assert blur.metadata["semanticblur"]["planes"] == [[z // factor, z // factor + 1]]
        assert round(float(blur.world_to_data((z, 0, 0))[0])) == 0


def test_a_range_of_planes(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((6, 40, 50), np.uint8), name="stack")
    widget.planes.value = _detect.RANGE
    widget.first.value, widget.last.value = 4, 2
    widget.run()
    assert "planes 4 to 2: the first is above the last" in widget.status.value
    widget.first.value, widget.last.value = 2, 4
    finish(qtbot, widget)
    blur, _ = results(viewer, layer)
    assert blur.data.shape == (3, 40, 50)
    np.testing.assert_allclose(blur.translate, (2, 0, 0))


def test_a_mean_of_channels_stands_for_all_of_them(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    data = np.stack([np.moveaxis(photo()[z : z + 60], -1, 0) for z in (0, 30)]).astype(np.uint16)
    layer = viewer.add_image(data, name="multi", axis_labels=("t", "c", "y", "x"))
    assert list(widget.channels.choices) == ["each", 0, 1, 2, "mean"]
    widget.channels.value = "mean"
    widget.planes.value = _detect.ALL
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    assert blur.data.shape == labels.data.shape == data.shape
    np.testing.assert_array_equal(blur.data[:, 0], blur.data[:, 2])
    assert not labels.editable  # one map for three channels
    assert_telling(blur.data, 0.38)
    move_threshold(qtbot, widget, 0.38)
    np.testing.assert_array_equal(labels.data, np.where(blur.data > 0.38, 2, 1))


def test_one_channel_s_result_lies_at_its_place(qtbot: Any, viewer: Any, widget: Any) -> None:
    data = np.random.default_rng(5).integers(0, 999, (3, 7, 40, 50), np.uint16)
    layer = viewer.add_image(data, name="multi", axis_labels=("c", "z", "y", "x"))
    assert widget.last.max == 6
    widget.channels.value = 2
    widget.planes.value = _detect.RANGE
    widget.first.value, widget.last.value = 4, 5
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    assert blur.data.shape == labels.data.shape == (1, 2, 40, 50)
    np.testing.assert_allclose(
        labels.data_to_world((0, 0, 3, 4)), layer.data_to_world((2, 4, 3, 4))
    )
    labels.data_setitem((np.array([0]), np.array([1]), np.array([2]), np.array([3])), 2)
    assert labels.data[0, 1, 2, 3] == 2
    assert "--channels=2 --planes=4:6" in labels.metadata["semanticblur"]["command"]


def test_a_range_along_z_where_channels_come_last(qtbot: Any, viewer: Any, widget: Any) -> None:
    """ImageJ's order: a range is of planes, not of channels."""
    viewer.add_image(np.zeros((9, 2, 40, 50), np.uint8), axis_labels=("z", "c", "y", "x"))
    widget.planes.value = _detect.RANGE
    for channels in ("each", "mean", 1):
        widget.channels.value = channels
        assert (widget.first.value, widget.last.value, widget.last.max) == (0, 8, 8)
        assert (widget.first.label, widget.last.label) == ("from z", "to z")
    widget.channels.value = "each"
    viewer.dims.set_point(1, 1)
    widget.first.value, widget.last.value = 3, 5
    finish(qtbot, widget)
    blur, labels = results(viewer, viewer.layers[0])
    assert blur.data.shape == (3, 1, 40, 50)
    assert "--planes=3:6,1:2" in labels.metadata["semanticblur"]["command"]


def test_what_can_be_chosen_follows_the_layer(viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((3, 5, 64, 64), np.uint16), name="multi")
    assert not widget.channels.visible
    layer.axis_labels = ("c", "z", "y", "x")
    assert list(widget.channels.choices) == ["each", 0, 1, 2, "mean"]
    widget.channels.value = 1
    widget.planes.value = _detect.RANGE
    layer.data = np.zeros((2, 9, 64, 64), np.uint16)
    assert list(widget.channels.choices) == ["each", 0, 1, "mean"]
    assert widget.channels.value == 1
    assert (widget.last.max, widget.last.value) == (8, 8)
    full = np.zeros((8, 80, 80), np.uint8)
    widget.layer.value = viewer.add_image([full, full[::2, ::2, ::2]], name="pyramid")
    assert not widget.channels.visible
    assert widget.last.max == 7
    widget.level.value = 1
    assert (widget.last.max, widget.last.value) == (3, 3)


def test_channels_are_named_where_the_window_names_axes(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    """A person names the sliders, and these names are the viewer's."""
    layer = viewer.add_image(np.zeros((3, 5, 40, 50), np.uint8), name="multi")
    assert not widget.channels.visible
    viewer.dims.axis_labels = ("c", "z", "y", "x")
    assert list(widget.channels.choices) == ["each", 0, 1, 2, "mean"]
    widget.channels.value = 2
    finish(qtbot, widget)
    blur, _ = results(viewer, layer)
    assert blur.data.shape == (1, 1, 40, 50)
    assert "--axes=CZYX --channels=2" in blur.metadata["semanticblur"]["command"]


def test_the_range_of_data_in_memory_is_that_of_now(qtbot: Any, viewer: Any, widget: Any) -> None:
    data = np.random.default_rng(0).integers(0, 100, (64, 64)).astype(np.uint16)
    layer = viewer.add_image(data, name="changed in place")
    for factor in (1, 100):
        layer.data[:] *= factor
        finish(qtbot, widget)
        [[low, high]] = results(viewer, layer)[0].metadata["semanticblur"]["value_range"]
        assert (low, high) == pytest.approx(np.percentile(layer.data, (0.1, 99.9)))


def test_a_plane_that_cannot_be_read_is_left_out(qtbot: Any, viewer: Any, widget: Any) -> None:
    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        if z == 3:  # napari itself shows the one in the middle
            raise ValueError("codec broke")
        return np.full((1, 40, 50), z, np.uint16)

    stack = da.map_blocks(plane, chunks=((1,) * 5, (40,), (50,)), dtype=np.uint16)
    layer = viewer.add_image(stack, name="damaged", contrast_limits=(0, 5))
    viewer.dims.set_point(0, 0)
    widget.planes.value = _detect.ALL
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_warning", shown.append)
        finish(qtbot, widget)
    assert shown == ["damaged: left out plane Z=3: cannot be read: codec broke"]
    assert "codec broke" in widget.status.value
    blur, labels = results(viewer, layer)
    assert np.isnan(blur.data).all(axis=(1, 2)).tolist() == [False, False, False, True, False]
    assert not labels.metadata["semanticblur"]["complete"]
    assert widget.progress.value == 4


def test_measuring_intensities_of_a_lazy_stack_is_announced(qtbot: Any, viewer: Any) -> None:
    stack = da.from_array(np.zeros((3, 40, 50), np.uint16), chunks=(1, 40, 50))
    layer = viewer.add_image(stack, name="lazy", contrast_limits=(0, 5))
    said: list[str] = []
    settings = _detection.Settings(scope="all")
    _detection.Detection(viewer, layer, settings, on_status=said.append).start()
    qtbot.waitUntil(lambda: not _detection._running, timeout=60_000)
    measured = [text for text in said if text.startswith("Measuring")]
    assert measured == [f"Measuring intensities, plane {n} of 3 ..." for n in (1, 2, 3)]


def test_a_large_lazy_plane_is_not_read_whole_before_it_is_analysed(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def chunk(block_info: Any = None) -> np.ndarray:
        read.append(block_info[None]["chunk-location"])
        return np.random.default_rng(0).integers(0, 999, (300, 300)).astype(np.uint16)

    plane = da.map_blocks(chunk, chunks=((300,) * 20,) * 2, dtype=np.uint16)
    layer = viewer.add_image(plane, name="lazy", contrast_limits=(0, 999))
    widget.size.value = _detect.NATIVE
    read.clear()
    before: list[int] = []

    def nothing(*args: Any, **kwargs: Any) -> Any:
        before.append(len(read))
        return iter(())

    monkeypatch.setattr(Detector, "iter_planes", nothing)
    finish(qtbot, widget)
    assert before == [186]  # of 400
    assert results(viewer, layer) == (None, None)


def test_a_lazy_stack_is_read_only_where_it_is_shown(qtbot: Any, viewer: Any, widget: Any) -> None:
    read = []

    def plane(block_info: Any = None) -> np.ndarray:
        read.append(block_info[None]["chunk-location"][0])
        return np.full((1, 1000, 1000), block_info[None]["chunk-location"][0], np.uint16)

    stack = da.map_blocks(plane, chunks=((1,) * 10_000, (1000,), (1000,)), dtype=np.uint16)
    assert stack.nbytes == 20e9
    viewer.add_image(stack, name="lazy", contrast_limits=(0, 10_000))
    viewer.dims.set_point(0, 1234)
    read.clear()
    finish(qtbot, widget)
    assert set(read) == {1234}


def test_levels_of_a_pyramid(qtbot: Any, viewer: Any, widget: Any) -> None:
    full = np.random.default_rng(6).integers(0, 256, (400, 600), np.uint8)
    layer = viewer.add_image([full, full[::2, ::2], full[::4, ::4]], name="pyramid")
    assert widget.level.visible
    widget.level.value = 1
    finish(qtbot, widget)
    blur, _ = results(viewer, layer)
    assert blur.data.shape == (200, 300)
    np.testing.assert_allclose(blur.scale, (2, 2))


def test_native_tiles_that_were_cancelled_say_nothing_false(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    """Where a tile is still to come, the sum of those that are done is not the map."""
    image = photo(1000, 1400)
    layer = viewer.add_image(image, rgb=True, name="large")
    widget.size.value = _detect.NATIVE
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=60_000)
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=10_000)
    blur, labels = results(viewer, layer)
    part = blur.data.copy()
    made = np.isfinite(part)
    assert 0.05 < made.mean() < 1
    np.testing.assert_array_equal(labels.data > 0, made)
    assert not labels.metadata["semanticblur"]["complete"]
    finish(qtbot, widget, 120_000)
    np.testing.assert_allclose(part[made], blur.data[made], atol=0.02)


def test_native_tiles_fill_the_layer(
    qtbot: Any, viewer: Any, random_model: str, widget: Any
) -> None:
    image = photo(600, 700)
    layer = viewer.add_image(image, rgb=True, name="large")
    widget.size.value = _detect.NATIVE
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    detector = Detector(random_model, device="cpu", backend="torch")
    expected = detector.detect(image, size="native")
    assert_telling(expected, np.median(expected))
    np.testing.assert_allclose(blur.data, expected, atol=0.01)
    assert (labels.data > 0).all()


def test_cancel_keeps_what_is_done(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    finish_one = widget.settings
    assert finish_one.scope == "current"
    finish(qtbot, widget)  # loads the model
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=60_000)
    start = time.perf_counter()
    widget.cancel_button.native.click()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=5000)
    assert time.perf_counter() - start < 3
    blur, labels = results(viewer, layer)
    done = np.isfinite(blur.data).all(axis=(1, 2))
    assert 2 <= done.sum() < 200
    np.testing.assert_array_equal(labels.data.any(axis=(1, 2)), done)
    assert not labels.metadata["semanticblur"]["complete"]
    assert widget.run_button.enabled


@pytest.mark.parametrize("what", ["removed", "changed"])
def test_a_layer_that_goes_away_stops_the_run(
    qtbot: Any, viewer: Any, widget: Any, what: str
) -> None:
    layer = viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=60_000)
    if what == "removed":
        viewer.layers.remove(layer)
    else:
        layer.data = np.ones((200, 64, 64), np.uint8)
    qtbot.waitUntil(lambda: not widget.is_running, timeout=5000)
    assert what in widget.status.value


def test_a_layer_is_analysed_once_at_a_time(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.run()
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        viewer.layers.selection.active = layer
        _detect.detect_now(viewer)
    assert "is being analysed already" in shown[0]
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=60_000)


def test_closing_the_viewer_ends_the_run(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((300, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=60_000)
    viewer.close()
    qtbot.waitUntil(lambda: not _detection._running, timeout=20_000)


def test_errors_are_lines_a_person_can_act_on(
    qtbot: Any, viewer: Any, widget: Any, caplog: pytest.LogCaptureFixture
) -> None:
    viewer.add_image(np.full((40, 50), np.nan), name="broken", contrast_limits=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        finish(qtbot, widget)
        assert shown == ["broken: no finite value (all NaN or infinite)"]

        def no_memory(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: not enough memory\nand more")

        patch.setattr(Detector, "iter_planes", no_memory)
        viewer.layers["broken"].data = np.zeros((40, 50))
        finish(qtbot, widget)
        assert shown[1] == "broken: DefaultCPUAllocator: not enough memory"

        def unforeseen(*args: Any, **kwargs: Any) -> Any:
            raise KeyError("oops")

        patch.setattr(Detector, "iter_planes", unforeseen)
        with caplog.at_level("ERROR"):
            finish(qtbot, widget)
        assert shown[2:] == ["broken: KeyError: 'oops'"]
        assert "Traceback" in caplog.text
    assert widget.run_button.enabled
    assert len(viewer.layers) == 1


def test_one_click_needs_no_dock(qtbot: Any, viewer: Any) -> None:
    from napari._app_model import get_app_model

    layer = viewer.add_image(photo(), rgb=True, name="photo")
    viewer.layers.selection.active = layer
    get_app_model().commands.execute_command("napari-semanticblur.detect_now")
    qtbot.waitUntil(lambda: not _detection._running, timeout=60_000)
    assert all(results(viewer, layer))


def test_one_click_on_a_result_analyses_its_image(qtbot: Any, viewer: Any) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    for selected in (layer, "photo blur map", "photo blur", None):
        viewer.layers.selection.active = (
            viewer.layers[selected] if isinstance(selected, str) else selected
        )
        _detect.detect_now(viewer)
        qtbot.waitUntil(lambda: not _detection._running, timeout=60_000)
        assert [x.name for x in viewer.layers] == ["photo", "photo blur map", "photo blur"]
        active = viewer.layers.selection.active
        assert (active and active.name) == (
            selected if isinstance(selected, str) else selected and selected.name
        )


def test_one_click_on_a_map_whose_image_is_gone_analyses_nothing(qtbot: Any, viewer: Any) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    _detect.detect_now(viewer)
    qtbot.waitUntil(lambda: not _detection._running, timeout=60_000)
    viewer.layers.remove(layer)
    viewer.layers.selection.active = viewer.layers["photo blur map"]
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_warning", shown.append)
        _detect.detect_now(viewer)
    assert shown == ["Detect defocus blur: select an image layer first."]
    assert not _detection._running


def test_closing_the_dock_ends_the_run(qtbot: Any, viewer: Any) -> None:
    dock, widget = viewer.window.add_plugin_dock_widget(
        "napari-semanticblur", "Detect defocus blur"
    )
    viewer.add_image(np.zeros((300, 64, 64), np.uint8), name="long")
    finish(qtbot, widget)
    assert widget.progress.value == widget.progress.max == 1  # the bar ends full
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=60_000)
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: not _detection._running, timeout=20_000)
    assert np.isnan(find_result(viewer, viewer.layers["long"], "map").data).any()


def test_the_bar_in_the_activity_dock_cancels(qtbot: Any, viewer: Any) -> None:
    layer = viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    detection = _detection.Detection(viewer, layer, _detection.Settings(scope="all"))
    detection.start()
    qtbot.waitUntil(lambda: "labels" in detection._layers, timeout=60_000)
    detection._run._progress.cancel()
    qtbot.waitUntil(lambda: not _detection._running, timeout=5000)
    assert not results(viewer, layer)[1].metadata["semanticblur"]["complete"]


@pytest.mark.parametrize(("side", "kept"), [("16", 33), ("9999", 4096)])
def test_a_side_beyond_the_widget_s_limits_is_brought_within(
    viewer: Any, monkeypatch: pytest.MonkeyPatch, side: str, kept: int
) -> None:
    monkeypatch.setattr(_detect, "preferences", lambda: Preferences(size=side))
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    assert widget.settings.size == kept
    assert f"preference Analysis size '{side}': expected native" in widget.status.value


@pytest.mark.parametrize("side", ["320", "native"])
def test_custom_is_another_side_than_the_usual(
    viewer: Any, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(_detect, "preferences", lambda: Preferences(size=side))
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    assert str(widget.settings.size) == side
    assert widget.status.value == ""
    widget.size.value = _detect.CUSTOM
    assert widget.settings.size == 448


def test_preferences_are_what_the_widget_starts_with(
    viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pytest.importorskip("napari.settings")
    if not hasattr(settings, "get_plugin_settings"):
        pytest.skip("this napari has no preferences of plugins")
    assert preferences() == Preferences()
    monkeypatch.setattr(settings.get_plugin_settings("napari-semanticblur").detect, "size", "64")
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    assert widget.settings.size == 64
    monkeypatch.setattr(settings.get_plugin_settings("napari-semanticblur").detect, "size", "big")
    unusable = _detect.DetectWidget(viewer)
    assert unusable.settings.size == 320
    assert "Analysis size 'big'" in unusable.status.value
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        viewer.add_image(photo(), rgb=True)
        _detect.detect_now(viewer)
    assert "Analysis size 'big'" in shown[0]


def test_the_menus_have_it(viewer: Any) -> None:
    from napari._app_model import get_app_model

    items = get_app_model().menus.get_menu("napari/layers/segment")
    commands = {item.command.id for item in items if hasattr(item, "command")}
    assert {"napari-semanticblur.detect", "napari-semanticblur.detect_now"} <= commands


def test_a_range_is_never_of_channels() -> None:
    assert [range_axis(axes) for axes in ("ZC", "TZC", "CZ", "C", "")] == [0, 1, 1, 0, 0]


def test_the_copied_command_says_where_it_differs(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "held.jpg", exif=exif)
    viewer.open(tmp_path / "held.jpg", plugin="napari")
    finish(qtbot, widget)
    widget.copy_button.native.click()
    assert widget.status.value.endswith("upright, and napari shows it unturned")


def test_the_command_is_copied(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((3, 40, 50), np.uint16), name="stack")
    assert not widget.copy_button.enabled
    finish(qtbot, widget)
    widget.copy_button.native.click()
    clipboard = QApplication.clipboard()
    assert clipboard is not None
    assert clipboard.text() == (
        "semanticblur-core detect --input=FILE --output=result --model=default --device=auto "
        "--backend=torch --size=320 --threshold=0.5 --axes=ZYX --planes=1:2 --range=0,1"
    )


@pytest.mark.parametrize("channels", ["each", "mean", 1])
def test_the_copied_command_makes_the_same_map(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path, channels: Any
) -> None:
    data = np.random.default_rng(7).integers(0, 1000, (2, 3, 50, 60)).astype(np.uint16)
    data[0] //= 100
    data[:, 2] = data[:, 2, ::-1, ::-1] // 2
    np.save(tmp_path / "multi.npy", data)
    [layer] = viewer.open(tmp_path / "multi.npy", plugin="napari")
    layer.axis_labels = ("c", "z", "y", "x")
    widget.channels.value = channels
    widget.planes.value = _detect.RANGE
    widget.first.value, widget.last.value = 1, 2
    viewer.dims.set_point(0, 1)
    finish(qtbot, widget)
    blur, _ = results(viewer, layer)
    command = shlex.split(blur.metadata["semanticblur"]["command"])
    done = subprocess.run(
        [sys.executable, "-m", "semanticblur_core", *command[1:], "--format=npy", "--device=cpu"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "result" / "multi_blur.npy")
    here = blur.data[0] if channels == "mean" else blur.data
    np.testing.assert_allclose(here.reshape(made.shape), made, atol=1e-5)


def test_a_model_of_one_s_own_can_be_chosen(
    qtbot: Any, viewer: Any, widget: Any, random_weights: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copy(random_weights, tmp_path / "models" / "mine@1.safetensors")
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    widget.model.reset_choices()
    widget.model.value = "mine"
    finish(qtbot, widget)
    blur, _ = results(viewer, layer)
    np.testing.assert_allclose(
        blur.data, Detector(str(random_weights), device="cpu").detect(layer.data), atol=0.01
    )
    weights.rename_model("mine", "ours")
    models.changed.emit("ours@1")
    assert widget.model.value == "ours"
    weights.rename_model("ours", "mine")
    models.changed.emit("mine@1")
    widget.model.value = "default"
    (tmp_path / "models" / "mine@1.safetensors").unlink()
    widget.model.reset_choices()
    assert "mine" not in widget.model.choices


def test_a_method_without_weights_stands_among_the_models(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    layer = viewer.add_image(photo(), rgb=True, name="photo")
    widget.model.value = "lbp"
    assert not widget.size.visible
    finish(qtbot, widget)
    blur, labels = results(viewer, layer)
    np.testing.assert_array_equal(blur.data, ClassicalDetector("lbp").detect(layer.data))
    command = labels.metadata["semanticblur"]["command"]
    assert "detect --input=FILE --output=result --method=lbp --threshold=0.5" in command


def test_opening_the_widget_loads_no_torch() -> None:
    code = (
        "import sys, time\n"
        "from napari.components import ViewerModel\n"
        "from qtpy.QtWidgets import QApplication\n"
        "app = QApplication([])\n"
        "import napari_semanticblur._detect as d\n"
        "d.DetectWidget(ViewerModel())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_window_stays_alive_during_a_stack(qtbot: Any, viewer: Any, widget: Any) -> None:
    """Figures for a quiet machine are in the guide; here only that nothing is held for long."""
    viewer.add_image(np.zeros((20, 256, 256), np.uint8), name="stack")
    finish(qtbot, widget)  # torch is imported and the layers are there
    ticks: list[float] = []
    timer = QTimer()
    timer.timeout.connect(lambda: ticks.append(time.perf_counter()))
    timer.start(5)
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=120_000)
    timer.stop()
    assert len(ticks) > 20
    assert np.diff(ticks).max() < 1


def test_a_run_that_napari_ended_says_so(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((200, 64, 64), np.uint8), name="long")
    widget.planes.value = _detect.ALL
    widget.run()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=60_000)
    widget._detection._run._worker.quit()  # as with the window of another viewer
    qtbot.waitUntil(lambda: not widget.is_running, timeout=5000)
    said = "Stopped: napari ended it because a window was closed; run it again"
    assert widget.status.value == said
