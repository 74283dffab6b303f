"""The annotate widget in a real viewer, driven as a person would."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from napari.layers import Layer
from PIL import Image
from qtpy.QtCore import Qt, QTimer

from napari_semanticblur import _annotate, _where_next
from napari_semanticblur._layers import METADATA_KEY, camera_of, find_result
from napari_semanticblur._models import recommend
from semanticblur_core import io, weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.data.autosave import Autosave
from semanticblur_core.data.journal import JournalWriter, find_leftovers, read_leftover, replay
from semanticblur_core.data.store import AnnotationStore, read_store
from semanticblur_core.network import SemanticBlur


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def open_widget(viewer: Any) -> Callable[[], Any]:
    def opened() -> Any:
        return viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")[1]

    return opened


@pytest.fixture
def widget(open_widget: Any) -> Any:
    return open_widget()


def photo(height: int = 90, width: int = 120) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def stroke(layer: Any, start: tuple[float, ...], end: tuple[float, ...], code: int = 1) -> None:
    """As napari's own mouse callback paints: one item of history."""
    layer.selected_label = code
    layer.brush_size = 7
    with layer.block_history():
        layer._draw(code, start, start)
        layer._draw(code, start, end)


def journaled(widget: Any, annotation: Any = None) -> np.ndarray:
    """What a crash now would leave."""
    annotation = annotation or widget.current
    while annotation.poll():
        pass
    assert annotation.autosave.flush(5)
    labels = np.zeros(annotation.layer.data.shape, np.uint8)
    leftover = read_leftover(annotation.autosave.folder)
    replay(leftover.changes if leftover else [], labels)
    return labels


def saved(qtbot: Any, widget: Any) -> None:
    widget.save()
    annotation = widget.current
    qtbot.waitUntil(lambda: not annotation.is_saving, timeout=10_000)
    assert "Saved" in widget.status.value


def test_strokes_undo_and_redo_are_journaled(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.start_button.native.click()
    layer = viewer.layers["photo annotation"]
    assert (layer.data.shape, layer.data.dtype, layer.mode) == ((90, 120), np.uint8, "paint")
    assert viewer.layers.selection.active is layer
    stroke(layer, (20, 20), (20, 80), 1)
    stroke(layer, (60, 20), (60, 80), 2)
    both = layer.data.copy()
    assert set(np.unique(both)) == {0, 1, 2}
    np.testing.assert_array_equal(journaled(widget), both)
    layer.undo()
    assert not (layer.data == 2).any()
    np.testing.assert_array_equal(journaled(widget), layer.data)
    layer.redo()
    np.testing.assert_array_equal(journaled(widget), both)


def test_the_timer_journals_without_being_asked(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    folder = widget.current.autosave.folder

    def on_disk() -> np.ndarray:
        labels = np.zeros(layer.data.shape, np.uint8)
        leftover = read_leftover(folder)
        replay(leftover.changes if leftover else [], labels)
        return labels

    for action in (lambda: stroke(layer, (20, 20), (20, 80), 2), layer.undo, layer.redo):
        action()
        start = time.perf_counter()
        qtbot.waitUntil(lambda: np.array_equal(on_disk(), layer.data), timeout=5000)
        assert time.perf_counter() - start < 2


TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": (2, 0.5, 0.25)},
    "translate": {"translate": (5, -7, 11)},
    "rotate": {"rotate": (0, 0, 30)},
    "shear": {"shear": (0, 0, 0.3)},
    "affine": {"affine": np.array([[1, 0, 0, 3], [0, 0, 1, 4], [0, -1, 0.2, 5], [0, 0, 0, 1]])},
    "units": {"units": ("second", "micrometer", "micrometer"), "axis_labels": ("t", "y", "x")},
}


@pytest.mark.filterwarnings("ignore:Non-orthogonal slicing:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_layer_lies_where_its_image_lies(viewer: Any, widget: Any, name: str) -> None:
    image = viewer.add_image(np.zeros((4, 40, 50, 3), np.uint8), rgb=True, **TRANSFORMS[name])
    widget.annotate()
    layer = widget.current.layer
    assert layer.data.shape == (4, 40, 50)
    for attribute in ("scale", "translate", "rotate", "shear"):
        np.testing.assert_allclose(getattr(layer, attribute), getattr(image, attribute))
    np.testing.assert_allclose(layer.affine.affine_matrix, image.affine.affine_matrix)
    assert (layer.units, layer.axis_labels) == (image.units, image.axis_labels)
    record = layer.metadata[METADATA_KEY]
    assert (record["role"], record["source"], record["store"], record["name"]) == (
        *("annotation", image.name), None, None,
    )  # fmt: skip


def test_planes_of_a_stack_are_labelled_one_by_one(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    stack = np.random.default_rng(2).integers(0, 9999, (5, 64, 80), np.uint16)
    viewer.add_image(stack, name="stack", scale=(3, 1, 1))
    widget.store.value = tmp_path / "store"
    widget.annotate()
    layer = widget.current.layer
    for plane, code in ((1, 1), (3, 2)):
        viewer.dims.set_point(0, plane * 3)
        stroke(layer, (plane, 20, 20), (plane, 20, 60), code)
    widget._tick()
    assert "2 of 5 planes" in widget.progress.value
    assert layer.data.any(axis=(1, 2)).tolist() == [False, True, False, True, False]
    # Undo of what is not shown is found too.
    viewer.dims.set_point(0, 0)
    layer.undo()
    np.testing.assert_array_equal(journaled(widget), layer.data)
    layer.redo()
    widget.fill_blurred_button.native.click()
    assert (layer.data[0] == 2).all()
    assert not layer.data[2].any()
    saved(qtbot, widget)
    planes = read_store(tmp_path / "store")
    assert [plane.name for plane in planes] == ["stack[0]", "stack[1]", "stack[3]"]
    for plane, index in zip(planes, (0, 1, 3), strict=True):
        np.testing.assert_array_equal(plane.image, stack[index])
        np.testing.assert_array_equal(plane.labels, layer.data[index])


def test_strokes_through_planes_are_journaled(viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((60, 40, 50), np.uint8), name="stack")
    widget.annotate()
    layer = widget.current.layer
    layer.n_edit_dimensions = 3
    stroke(layer, (30, 20, 20), (45, 20, 40), 2)
    assert layer.data[40].any()
    np.testing.assert_array_equal(journaled(widget), layer.data)
    layer.undo()
    np.testing.assert_array_equal(journaled(widget), layer.data)


def test_the_layer_list_and_the_widget_agree(viewer: Any, widget: Any) -> None:
    images = [viewer.add_image(photo(), rgb=True, name=name) for name in ("a", "b")]
    annotations = []
    for image in images:
        widget.layer.value = image
        widget.annotate()
        annotations.append(widget.current)
    assert widget.current is annotations[1]
    viewer.layers.selection.active = annotations[0].layer
    assert widget.layer.value is images[0]
    widget.fill_rest(1)
    assert annotations[0].layer.data.all()
    assert not annotations[1].layer.data.any()
    widget.layer.value = images[1]
    assert widget.current is annotations[1]
    assert viewer.layers.selection.active is annotations[1].layer
    widget.choose(2)
    assert [each.layer.selected_label for each in annotations] == [1, 2]
    # Without its image an annotation can still be painted on and saved.
    viewer.layers.remove(images[1])
    viewer.layers.selection.active = annotations[1].layer
    widget.fill_rest(2)
    assert (annotations[1].layer.data == 2).all()


def test_bulk_edits_are_undone_by_napari(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 2)
    before = layer.data.copy()
    widget.fill_sharp_button.native.click()
    np.testing.assert_array_equal(layer.data, np.where(before == 0, 1, before))
    assert "100.0% labelled" in widget.progress.value
    np.testing.assert_array_equal(journaled(widget), layer.data)
    layer.undo()
    np.testing.assert_array_equal(layer.data, before)
    np.testing.assert_array_equal(journaled(widget), before)


def test_a_plane_that_is_not_shown_is_not_filled(
    viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = viewer.add_image(np.zeros((4, 40, 50), np.uint8), name="short")
    viewer.add_image(np.zeros((12, 40, 50), np.uint8), name="long")
    widget.layer.value = short
    widget.annotate()
    layer = widget.current.layer
    viewer.dims.set_point(0, 9)
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_error", shown.append)
    widget.fill_sharp_button.native.click()
    assert not layer.data.any()
    assert "short annotation: no plane of it is shown" in shown[0]
    widget.planes.value = _annotate.ALL
    widget.fill_sharp_button.native.click()
    assert layer.data.all()
    layer.undo()
    assert not layer.data.any()


def test_starting_from_the_map_runs_a_detection_if_there_is_none(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 2)
    painted = layer.data == 2
    before = layer.data.copy()
    widget.confidence.value = 0.7
    widget.map_button.native.click()
    qtbot.waitUntil(lambda: widget._detection is None, timeout=60_000)
    blur = find_result(viewer, image, "map").data
    expected = np.where(blur >= 0.7, 2, np.where(blur <= 1 - 0.7, 1, 0))
    expected[painted] = 2
    np.testing.assert_array_equal(layer.data, expected)
    layer.undo()
    np.testing.assert_array_equal(layer.data, before)
    # Now there is a map: all of it.
    widget.confidence.value = 0.5
    widget.start_from_map()
    np.testing.assert_array_equal(layer.data[~painted], np.where(blur > 0.5, 2, 1)[~painted])


def test_where_next_ranks_places_and_goes_there(qtbot: Any, viewer: Any, widget: Any) -> None:
    image = viewer.add_image(np.zeros((4, 128, 128), np.uint8), name="stack", scale=(5, 2, 2))
    blur = np.zeros((4, 128, 128), np.float32)
    blur[2, 64:, :64] = 0.5
    blur[1, :64, 64:] = 0.6
    record = {"kind": "map", "source_id": str(image.unique_id)}
    viewer.add_image(blur, scale=(5, 2, 2), metadata={METADATA_KEY: record})
    widget.layer.value = image
    where = widget.where_next
    for plane, center in ((2, (2 * 96, 2 * 32)), (1, (2 * 32, 2 * 96)), (2, (2 * 96, 2 * 32))):
        where.place_button.native.click()
        qtbot.waitUntil(lambda: not where.is_running, timeout=5000)
        assert viewer.dims.current_step[0] == plane
        np.testing.assert_allclose(camera_of(viewer).center[-2:], center)
    assert "plane 2, row 96, column 32: unsure by 100%" in widget.status.value
    assert [str(place) for place in where.ranking.choices if place is not None] == [
        "plane 2, row 96, column 32: unsure by 100%",
        "plane 1, row 32, column 96: unsure by 80%",
    ]
    where.ranking.value = where.ranking.choices[-1]
    assert viewer.dims.current_step[0] == 1
    widget.planes.value = _annotate.ALL
    widget.fill_sharp_button.native.click()
    where.place_button.native.click()
    qtbot.waitUntil(lambda: not where.is_running, timeout=5000)
    assert "sure wherever" in widget.status.value


def test_where_next_looks_at_all_planes_and_asks_the_newest_model(
    qtbot: Any, viewer: Any, widget: Any, home: Path
) -> None:
    digests = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        path = home / "models" / f"{name}@1.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        model = SemanticBlur(ModelConfig(backbone="resnet34")).eval()
        weights.save(path, model, provenance={}, metrics={}, licence="test")
        digests.append(weights.read_info(path).sha256)
    rng = np.random.default_rng(0)
    image = viewer.add_image(rng.integers(0, 256, (3, 64, 64), np.uint8), name="stack")
    widget.layer.value = image
    for name, digest in zip(("a@1", "b@1"), digests, strict=True):
        recommend(name)
        widget.where_next.place_button.native.click()
        qtbot.waitUntil(lambda: widget._detection is None, timeout=60_000)
        qtbot.waitUntil(lambda: not widget.where_next.is_running, timeout=5000)
        blur_map = find_result(viewer, image, "map")
        assert blur_map.metadata[METADATA_KEY]["model_sha256"] == digest
        assert np.isfinite(blur_map.data).all()
        assert blur_map.data.shape == (3, 64, 64)
    shown = blur_map.data
    widget.where_next.place_button.native.click()
    assert widget._detection is None
    qtbot.waitUntil(lambda: not widget.where_next.is_running, timeout=5000)
    assert find_result(viewer, image, "map").data is shown


def test_keys_change_the_class_and_the_brush(qtbot: Any, viewer: Any, widget: Any) -> None:
    from qtpy.QtCore import Qt

    viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    canvas = viewer.window._qt_viewer.canvas.native

    def press(key: str) -> None:
        qtbot.keyClick(canvas, getattr(Qt.Key, f"Key_{key}"))

    for key, code in (("D", 2), ("S", 1), ("U", 0)):
        press(key)
        assert layer.selected_label == code
    size = layer.brush_size
    press("W")
    assert layer.brush_size > size
    assert widget.brush.value == layer.brush_size
    press("Q")
    press("Q")
    assert layer.brush_size < size
    press("G")
    assert widget.superpixels.value
    assert layer.mode == "pan_zoom"
    layer.mode = "paint"
    assert not widget.superpixels.value
    # napari's own keys still work: 1 erases, 2 paints.
    press("1")
    assert layer.mode == "erase"
    widget.polygon_button.native.click()
    assert layer.mode == "polygon"
    layer.selected_label = 9
    assert layer.selected_label == 2


def click(qtbot: Any, viewer: Any, row: int, column: int) -> None:
    from qtpy.QtCore import QPoint, Qt

    canvas = viewer.window._qt_viewer.canvas
    zoom, center = camera_of(viewer).zoom, camera_of(viewer).center
    size = canvas.native.size()
    x = size.width() / 2 + (column - center[2]) * zoom
    y = size.height() / 2 + (row - center[1]) * zoom
    point = QPoint(round(x), round(y))
    qtbot.mouseMove(canvas.native, point)
    qtbot.mouseClick(canvas.native, Qt.MouseButton.LeftButton, pos=point)


def test_a_click_labels_a_superpixel(qtbot: Any, viewer: Any, widget: Any) -> None:
    image = np.full((200, 300), 50, np.uint8)
    image[:, 150:] = 200
    viewer.add_image(image, name="halves")
    widget.annotate()
    viewer.reset_view()
    layer = widget.current.layer
    widget.choose(2)
    widget.superpixels.value = True
    click(qtbot, viewer, 100, 140)
    assert layer.data[100, 140] == 2
    assert 300 < (layer.data == 2).sum() < 4000
    assert not layer.data[:, 153:].any()
    layer.undo()
    assert not layer.data.any()


def test_a_polygon_can_be_begun_while_clicks_label_superpixels(viewer: Any, widget: Any) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    widget.superpixels.value = True
    widget.polygon_button.native.click()
    assert str(widget.current.layer.mode) == "polygon"
    assert not widget.superpixels.value


def test_without_its_image_there_is_no_map_to_start_from(viewer: Any, widget: Any) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    viewer.layers.remove(image)
    viewer.layers.selection.active = layer
    widget.map_button.native.click()
    assert widget.status.value == "Open the image of photo annotation first."
    assert widget._detection is None


def test_data_of_another_shape_are_neither_counted_nor_saved(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "store"
    widget.annotate()
    layer = widget.current.layer
    own = layer.data
    stroke(layer, (20, 20), (20, 80))
    share = f"{(own == 1).mean():.1%} sharp"
    qtbot.waitUntil(lambda: share in widget.progress.value, timeout=5000)
    layer.data = np.ones((10, 10), np.uint8)
    qtbot.waitUntil(lambda: "was given data of (10, 10)" in widget.status.value, timeout=5000)
    assert share in widget.progress.value
    widget.save_button.native.click()
    assert "Nothing is saved until it is so again" in widget.status.value
    layer.data = own
    qtbot.waitUntil(lambda: "works again" in widget.status.value, timeout=5000)
    saved(qtbot, widget)


def test_a_label_of_no_meaning_is_seen_and_told_of(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "store"
    widget.annotate()
    layer = widget.current.layer
    layer.paint((30, 40), 7)
    assert layer.get_color(7)[3] > 0
    layer.data[:30] = 0
    layer.data[30] = 0
    layer.data[30, 40] = 7
    widget.save()
    qtbot.waitUntil(lambda: "label 7 at 30, 40" in widget.status.value, timeout=10_000)


def test_masks_are_imported_with_the_meaning_that_is_said(
    viewer: Any, widget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    mask = np.zeros((90, 120), np.uint8)
    mask[:, 60:] = 255
    io.write_png(tmp_path / "mask.png", mask)
    monkeypatch.setattr(type(widget), "_ask_for_file", lambda self: tmp_path / "mask.png")
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_error", shown.append)
    widget.import_button.native.click()
    assert "not guessed" in shown[0]
    blurred_white, sharp_white, codes = _annotate.MEANINGS
    widget.import_meaning.value = blurred_white
    widget.import_button.native.click()
    np.testing.assert_array_equal(layer.data, np.where(mask, 2, 1))
    widget.import_meaning.value = sharp_white
    widget.import_button.native.click()
    np.testing.assert_array_equal(layer.data, np.where(mask, 1, 2))
    layer.undo()
    np.testing.assert_array_equal(layer.data, np.where(mask, 2, 1))
    other = np.zeros((90, 120), np.int32)
    other[5], other[6] = 1, 2
    labels = viewer.add_labels(other)
    widget.import_from.reset_choices()
    widget.import_from.value = labels
    widget.import_meaning.value = codes
    before = layer.data.copy()
    widget.import_button.native.click()
    np.testing.assert_array_equal(layer.data, np.where(other, other, before))
    labels.data = other * 5
    widget.import_button.native.click()
    assert "expected codes 0 to 2, got 0 to 10" in shown[1]
    labels.data = np.zeros((3, 4), np.int32)
    widget.import_button.native.click()
    assert "got (3, 4)" in shown[2]
    labels.data = other.T.copy()
    widget.import_button.native.click()
    assert "got (120, 90)" in shown[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 256, (60 + i, 80, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"photo{i}.png")
    return tmp_path / "images"


def test_a_path_that_is_typed_is_taken_by_enter(
    qtbot: Any, viewer: Any, widget: Any, folder: Path
) -> None:
    line = widget.folder.line_edit.native
    line.setText("")
    qtbot.keyClicks(line, str(folder.parent))  # a folder, too, on the way
    qtbot.wait(3 * _annotate.SOON_MS)
    assert widget.current is None
    assert not list(folder.parent.parent.glob("*annotations"))
    qtbot.keyClicks(line, f"/{folder.name}")
    qtbot.keyClick(line, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
    assert widget.store.value == folder.parent / "images annotations"
    qtbot.keyClicks(line, " no more")
    qtbot.keyClick(line, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: "no such folder" in widget.status.value, timeout=5000)


def test_a_folder_is_walked_and_the_store_remembers(
    qtbot: Any, viewer: Any, widget: Any, folder: Path, open_widget: Any
) -> None:
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
    store = folder.parent / "images annotations"
    assert widget.store.value == store
    painted = {}
    for i in range(3):
        layer = widget.current.layer
        assert layer.name == f"photo{i} annotation"
        assert [each.name for each in viewer.layers] == [f"photo{i}", f"photo{i} annotation"]
        record = layer.metadata[METADATA_KEY]
        assert (record["store"], record["name"]) == (str(store), f"photo{i}")
        stroke(layer, (20 + i, 20), (20 + i, 60), 1 + i % 2)
        painted[f"photo{i}"] = layer.data.copy()
        widget.next_button.native.click()
    assert "last image" in widget.status.value
    widget.previous_button.native.click()
    qtbot.waitUntil(lambda: not widget._closing, timeout=10_000)
    np.testing.assert_array_equal(widget.current.layer.data, painted["photo1"])
    for plane in read_store(store):
        np.testing.assert_array_equal(plane.labels, painted[plane.name])
        expected = io.read_image(folder / f"{plane.name}.png")
        np.testing.assert_array_equal(plane.image, expected)
    assert not find_leftovers(store / "journal")[0]
    # A change of what was saved keeps the version before.
    stroke(widget.current.layer, (50, 20), (50, 60), 1)
    saved(qtbot, widget)
    [previous] = AnnotationStore(store).previous("photo1")
    np.testing.assert_array_equal(io.read_image(previous), painted["photo1"])


def test_each_folder_has_a_store_of_its_own_unless_one_is_chosen(
    qtbot: Any, viewer: Any, widget: Any, folder: Path
) -> None:
    other = folder.parent / "others"
    other.mkdir()
    for i in range(2):  # of the same names
        Image.fromarray(photo(50, 60) + np.uint8(i)).save(other / f"photo{i}.png")
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
    for _ in range(2):
        stroke(widget.current.layer, (20, 20), (20, 50), 1)
        widget.step(1)
    qtbot.waitUntil(lambda: not widget._closing, timeout=10_000)
    widget.folder.value = other
    qtbot.waitUntil(lambda: widget.current.layer.data.shape == (50, 60), timeout=5000)
    assert widget.store.value == folder.parent / "others annotations"
    assert widget.current.store == widget.store.value
    assert widget.current.name == "photo0"
    # In one store the pixels tell which images are labelled.
    widget.store.value = folder.parent / "images annotations"
    assert widget.files_without_labels() == [other / "photo0.png", other / "photo1.png"]
    # An annotation stays where it was begun, and that is said.
    stroke(widget.current.layer, (20, 20), (20, 50), 1)
    saved(qtbot, widget)
    assert "Saved photo0 in " in widget.status.value
    assert f"It stays there: {widget.store.value} is for" in widget.status.value
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current.title == "photo2", timeout=5000)
    assert widget.store.value == folder.parent / "images annotations"


def test_the_images_of_a_folder_are_ranked(
    qtbot: Any, viewer: Any, widget: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubtful:
        def detect(self, image: np.ndarray) -> np.ndarray:
            """Sure of the first, least of the last; a stack has come as its middle plane."""
            assert image.shape[2:] in ((), (3,))
            height = {60: 0, 61: 0.2, 62: 0.4}.get(image.shape[0], 0.5)
            return np.full(image.shape[:2], height, np.float32)

    np.save(folder / "stack.npy", np.zeros((5, 40, 50), np.uint8))
    (folder / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr("napari_semanticblur._models.detector", lambda *_: Doubtful())
    monkeypatch.setattr("napari_semanticblur._models.is_loaded", lambda *_: True)
    widget.folder.value = folder
    qtbot.waitUntil(lambda: bool(widget._files), timeout=5000)
    widget.where_next.image_button.native.click()
    qtbot.waitUntil(lambda: not widget.where_next.is_running, timeout=5000)
    ranked = [str(place) for place in widget.where_next.ranking.choices if place is not None]
    assert ranked[0] == "stack.npy: unsure by 100%"
    assert ranked[1:] == [
        f"photo{i}.png: unsure by {doubt}%" for i, doubt in ((2, 80), (1, 40), (0, 0))
    ]
    assert widget.current.title == "stack"
    widget.next_button.native.click()
    assert widget.current.title == "photo2"


def test_a_ranking_that_ends_with_its_dock_opens_nothing(
    qtbot: Any, viewer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(paths: list[Path], *_: Any) -> Iterator[Any]:
        yield _where_next.Place(paths[-1], 1.0)
        while True:
            time.sleep(0.01)
            yield _where_next.Announcement("looking")

    monkeypatch.setattr(_where_next, "doubts_of", slowly)
    dock, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    widget.folder.value = folder
    qtbot.waitUntil(lambda: bool(widget._files), timeout=5000)
    widget.where_next.image_button.native.click()
    qtbot.waitUntil(lambda: widget.status.value == "looking", timeout=5000)
    before = [layer.name for layer in viewer.layers]
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: not widget.where_next.is_running, timeout=5000)
    assert [layer.name for layer in viewer.layers] == before
    _, again = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    assert again.current.title == "photo0"


def test_the_command_line_reads_what_the_widget_wrote(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    viewer.add_image(photo(), rgb=True, name="a photo: of/things")
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    stroke(widget.current.layer, (60, 20), (60, 80), 2)
    widget.store.value = tmp_path / "store"
    saved(qtbot, widget)
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "semanticblur_core"]
    check = [*command, "data", "check", store]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=True)
    assert "labelled images: 1" in done.stdout
    score = [*command, "eval", f"--data={store}", "--device=cpu", f"--json={tmp_path / 'r.json'}"]
    subprocess.run(score, capture_output=True, timeout=60, check=True)
    assert json.loads((tmp_path / "r.json").read_text())["n_images"] == 1
    assert not find_leftovers(tmp_path / "home" / "journal")[0]


def test_another_image_of_the_same_name_gets_a_name_of_its_own(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    widget.store.value = tmp_path / "store"
    first = viewer.add_image(photo(), rgb=True, name="image")
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    journaled(widget)
    other = viewer.add_image(255 - photo(), rgb=True, name="image")
    viewer.layers.remove(first)  # its strokes are still only in the journal
    other.name = "image"
    widget.layer.value = other
    widget.annotate()
    assert not widget.current.layer.data.any()
    assert widget.current.name == "image 2"
    stroke(widget.current.layer, (60, 20), (60, 80), 2)
    saved(qtbot, widget)
    [plane] = read_store(tmp_path / "store")
    np.testing.assert_array_equal(plane.image, 255 - photo())


def test_a_real_mouse_paints(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(photo(200, 300), rgb=True, name="photo")
    widget.annotate()
    viewer.reset_view()
    widget.choose(2)
    click(qtbot, viewer, 100, 140)
    layer = widget.current.layer
    assert layer.data[100, 140] == 2
    assert widget.current.autosave._n_strokes == 1
    np.testing.assert_array_equal(journaled(widget), layer.data)


def test_two_viewers_do_not_write_one_image(
    qtbot: Any, viewer: Any, widget: Any, make_napari_viewer: Any, tmp_path: Path
) -> None:
    image = photo()
    viewer.add_image(image, rgb=True, name="photo")
    widget.store.value = tmp_path / "store"
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    journaled(widget)
    other = make_napari_viewer(show=True)
    other.add_image(image, rgb=True, name="photo")
    _, second = other.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    second.store.value = tmp_path / "store"
    second.annotate()
    assert "is open in another window" in second.status.value
    assert not second.current.layer.editable
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        second.fill_sharp_button.native.click()
    assert "read-only" in shown[0]
    saved(qtbot, widget)
    painted = widget.current.layer.data.copy()
    widget.current.close()  # as when its window is closed
    qtbot.waitUntil(lambda: not second.current.is_read_only, timeout=5000)
    assert "can be painted on now" in second.status.value
    layer = second.current.layer
    np.testing.assert_array_equal(layer.data, painted)
    stroke(layer, (60, 20), (60, 80), 2)
    both = layer.data.copy()
    saved(qtbot, second)
    [plane] = read_store(tmp_path / "store")
    np.testing.assert_array_equal(plane.image, image)
    np.testing.assert_array_equal(plane.labels, both)
    assert set(np.unique(both)) == {0, 1, 2}


PAINTER = """
import sys, time
from pathlib import Path
import napari, numpy as np
from qtpy.QtCore import QTimer

viewer = napari.Viewer()
_, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
image = np.random.default_rng(1).integers(0, 256, (400, 500, 3), np.uint8)
layer = viewer.add_image(image, rgb=True, name="photo", scale=(2, 2))
if sys.argv[1] != "none":
    widget.store.value = Path(sys.argv[1])
widget.annotate()
labels = widget.current.layer
n = 0

def paint():
    global n
    row, column = 5 + (n * 10) % 390, 5 + 50 * (n * 10 // 390)
    with labels.block_history():
        labels._draw(1 + n % 2, (row, column), (row, column + 40))
    n += 1
    # The time by which the stroke was made, and where it was.
    print(time.time(), row, column + 20, 1 + (n - 1) % 2, flush=True)

labels.brush_size = 5
timer = QTimer()
timer.timeout.connect(paint)
timer.start(60)
napari.run()
"""


def test_strokes_are_saved_when_python_ends_without_closing_the_window(tmp_path: Path) -> None:
    ends = PAINTER.partition("timer = QTimer()")[0] + "paint()\n"
    done = subprocess.run(
        [sys.executable, "-c", ends, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    labels = AnnotationStore(tmp_path / "store").labels_of("photo")
    assert labels is not None
    assert (labels == 1).sum() > 100


@pytest.mark.parametrize("where", ["store", "none"])
def test_strokes_survive_a_kill(
    qtbot: Any, viewer: Any, open_widget: Any, tmp_path: Path, where: str
) -> None:
    store = tmp_path / "store" if where == "store" else None
    painter = subprocess.Popen(
        [sys.executable, "-c", PAINTER, str(store or "none")], stdout=subprocess.PIPE, text=True
    )
    assert painter.stdout is not None
    with painter.stdout:
        lines = [painter.stdout.readline()]
        while float(lines[-1].split()[0]) < float(lines[0].split()[0]) + 3.2:
            lines.append(painter.stdout.readline())
        os.kill(painter.pid, signal.SIGKILL)
        killed = time.time()
        lines += painter.stdout.readlines()
    painter.wait(10)
    strokes = [[float(value) for value in line.split()] for line in lines if line.strip()]
    kept = [each for each in strokes if each[0] < killed - 2]
    assert len(kept) >= 5

    viewer.add_image(
        np.random.default_rng(1).integers(0, 256, (400, 500, 3), np.uint8), rgb=True, name="photo"
    )
    widget = open_widget()
    if store is not None:
        widget.store.value = store
    qtbot.waitUntil(lambda: widget.found.visible, timeout=5000)
    offer = widget.found.current_choice
    assert offer.startswith("Recovered ")
    assert f" of photo, {time.strftime('%d %b')}" in offer
    widget.restore_button.native.click()
    layer = widget.current.layer
    lost = [each for each in kept if layer.data[int(each[1]), int(each[2])] != each[3]]
    assert not lost
    assert not widget.found.visible
    recovered = layer.data.copy()
    if store is not None:
        saved(qtbot, widget)
        [plane] = read_store(store)
        np.testing.assert_array_equal(plane.labels, recovered)
        assert not find_leftovers(store / "journal")[0]


def test_what_was_recovered_can_be_discarded_after_a_question(
    viewer: Any, open_widget: Any, home: Path
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget = open_widget()
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    journaled(widget)
    layer = widget.current.layer
    viewer.layers.remove(layer)
    widget._look_for_leftovers()
    assert "1 stroke of photo" in widget.status.value
    asked: list[str] = []
    widget.ask = lambda question: bool(asked.append(question) or len(asked) > 1)
    widget.discard_button.native.click()
    assert "1 stroke of photo" in asked[0]
    assert find_leftovers(home / "journal")[0]
    widget.discard_button.native.click()
    assert not find_leftovers(home / "journal")[0]
    assert not widget.found.visible


def test_what_was_recovered_can_be_taken_back_and_what_was_painted_since_stays(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    AnnotationStore(tmp_path / "S", create=True)
    left = Autosave(tmp_path / "S" / "journal" / "photo", np.zeros((90, 120), np.uint8), name="x")
    left.labels[5:9, 5:30] = 1
    left.stroke_ended()
    left.finish_looking()
    left.close()
    widget.store.value = tmp_path / "S"
    widget.layer.value = image
    assert widget.found.visible
    widget.annotate()
    assert "Recovered 1 stroke of photo" in widget.status.value
    assert not widget.found.visible  # it is here now, so nothing is left to restore
    layer = widget.current.layer
    stroke(layer, (60, 20), (60, 80), 2)
    since = layer.data.copy()
    since[:20] = 0
    widget.take_back_button.native.click()
    np.testing.assert_array_equal(layer.data, since)
    layer.undo()
    assert np.count_nonzero(layer.data == 1) == 4 * 25
    assert not widget.take_back_button.visible


def test_an_image_that_is_still_being_saved_can_be_painted_on_when_that_ends(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "S"
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    painted = widget.current.layer.data.copy()
    go, write = threading.Event(), AnnotationStore.write

    def slow(*args: Any, **keywords: Any) -> Any:
        go.wait(10)
        return write(*args, **keywords)

    monkeypatch.setattr(AnnotationStore, "write", slow)
    viewer.layers.remove(widget.current.layer)
    widget.annotate()
    annotation = widget.current
    assert annotation.is_read_only
    assert not annotation.layer.editable
    go.set()
    qtbot.waitUntil(lambda: not annotation.is_read_only, timeout=5000)
    assert annotation.layer.editable
    np.testing.assert_array_equal(annotation.layer.data, painted)
    stroke(annotation.layer, (60, 20), (60, 80), 2)
    saved(qtbot, widget)
    [plane] = read_store(tmp_path / "S")
    np.testing.assert_array_equal(plane.labels, annotation.layer.data)


def test_the_dock_can_be_closed_and_opened_again(
    qtbot: Any, viewer: Any, tmp_path: Path, open_widget: Any
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    dock, first = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    first.store.value = tmp_path / "S"
    first.annotate()
    layer = first.current.layer
    stroke(layer, (20, 20), (20, 80), 1)
    dock.destroyOnClose()
    qtbot.wait(20)
    stroke(layer, (40, 20), (40, 80), 1)
    second = open_widget()
    assert second is not first
    assert second.current is not None
    assert second.current.layer is layer
    assert second.store.value == tmp_path / "S"
    second.annotate()
    stroke(layer, (60, 20), (60, 80), 2)
    assert layer.editable
    saved(qtbot, second)
    [plane] = read_store(tmp_path / "S")
    np.testing.assert_array_equal(plane.labels, layer.data)
    assert len(layer.mouse_drag_callbacks) == len(set(layer.mouse_drag_callbacks))


def test_a_folder_stays_open_when_the_dock_was_closed(
    qtbot: Any, viewer: Any, folder: Path, open_widget: Any
) -> None:
    dock, first = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    first.folder.value = folder
    qtbot.waitUntil(lambda: first.current is not None, timeout=5000)
    dock.destroyOnClose()
    second = open_widget()
    assert second.folder.value == folder
    second.step(1)
    assert second.current.title == "photo1"
    assert [layer.name for layer in viewer.layers] == ["photo1", "photo1 annotation"]


def test_strokes_come_without_their_image_if_its_file_has_changed(
    viewer: Any, open_widget: Any, folder: Path
) -> None:
    path = folder / "photo0.png"
    image = viewer.open(path, plugin="napari")[0]
    widget = open_widget()
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 60), 1)
    painted = widget.current.layer.data.copy()
    viewer.layers.clear()
    Image.fromarray(np.asarray(image.data)[::-1]).save(path)  # of the same shape
    widget._look_for_leftovers()
    widget.restore_button.native.click()
    assert [layer.name for layer in viewer.layers] == ["photo0 annotation"]
    assert "no longer the image" in widget.status.value
    np.testing.assert_array_equal(viewer.layers[0].data, painted)


def test_labels_that_a_store_held_before_are_added_to(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    held = np.zeros((90, 120), np.uint8)
    held[30:60, 40:100] = 1
    image = photo().astype(np.float32)
    image[3, 4] = np.nan  # an image with NaN is known again too
    AnnotationStore(tmp_path / "S", create=True).write("photo", held, image=image, split="val")
    viewer.add_image(image, rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (40, 20), (40, 80), 2)
    painted = layer.data.copy()
    assert not widget.hold_out.value
    widget.store.value = tmp_path / "S"
    saved(qtbot, widget)
    widget._show_what_applies()
    assert widget.hold_out.value
    expected = np.where(painted == 0, held, painted)
    [plane] = read_store(tmp_path / "S")
    np.testing.assert_array_equal(plane.labels, expected)
    np.testing.assert_array_equal(layer.data, expected)
    layer.undo()
    np.testing.assert_array_equal(layer.data, painted)


def test_an_image_is_held_out_by_a_tick(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    assert not widget.hold_out.visible
    widget.annotate()
    widget.hold_out.value = True  # before there is a store
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    widget.store.value = tmp_path / "S"
    saved(qtbot, widget)
    assert read_store(tmp_path / "S")[0].split == "val"
    stroke(widget.current.layer, (60, 20), (60, 80), 2)
    widget.hold_out.value = False
    qtbot.waitUntil(lambda: not widget.current.is_saving, timeout=5000)
    assert widget.status.value == "photo is not held out: models learn from it."
    [plane] = read_store(tmp_path / "S")
    assert plane.split is None
    assert not (plane.labels == 2).any()


def test_what_was_erased_and_not_saved_is_erased_by_a_recovery(
    viewer: Any, widget: Any, tmp_path: Path
) -> None:
    held = np.zeros((90, 120), np.uint8)
    held[5:20, 5:50] = 1
    AnnotationStore(tmp_path / "S", create=True).write("photo", held, image=photo())
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.annotate()  # without the store
    stroke(widget.current.layer, (60, 20), (60, 80), 2)
    widget.current.layer.data[5:20, 5:50] = 1
    left = Autosave(
        tmp_path / "S" / "journal" / "photo", held.copy(), saved=held, name="photo",
        facts={"fingerprint": widget.current.fingerprint},
    )  # fmt: skip
    left.labels[5:20, 20:50], left.labels[30:40] = 0, 1
    left.finish_looking()
    left.close()
    now, layer = widget.current.layer.data, widget.current.layer
    expected = np.where(left.labels != held, left.labels, now)
    widget.store.value = tmp_path / "S"
    widget.found.value = 0
    widget.restore_button.native.click()
    assert widget.current.image is image
    np.testing.assert_array_equal(layer.data, expected)
    assert not layer.data[5:20, 20:50].any()
    assert (layer.data[60, 20:80] == 2).all()


def test_without_its_image_the_labels_still_come_back(viewer: Any, open_widget: Any) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo", scale=(3, 3))
    widget = open_widget()
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 1)
    painted = layer.data.copy()
    viewer.layers.remove(layer)
    viewer.layers.remove(image)
    widget.restore_button.native.click()
    recovered = viewer.layers["photo annotation"]
    np.testing.assert_array_equal(recovered.data, painted)
    np.testing.assert_allclose(recovered.scale, (3, 3))


@contextmanager
def full_disk() -> Iterator[None]:
    """No journal can be written, while everything else can."""

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JournalWriter, "_write", no_room)
        yield


def test_a_full_disk_is_said_once_and_painting_goes_on(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer.add_image(photo(400, 500), rgb=True, name="photo")
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 1)
    journaled(widget)
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_warning", shown.append)
    with full_disk():
        for i in range(12):
            stroke(layer, (50 + 20 * i, 20 + i), (60 + 20 * i, 300), 1 + i % 2)
            qtbot.wait(50)
            widget._tick()
        qtbot.waitUntil(lambda: bool(shown), timeout=5000)
        qtbot.wait(1200)
    assert len(shown) == 1
    assert "Autosave cannot write to" in shown[0]
    assert "tries again" in shown[0]
    painted = layer.data.copy()
    qtbot.waitUntil(lambda: "works again" in widget.status.value, timeout=5000)
    np.testing.assert_array_equal(journaled(widget), painted)


def test_on_a_full_disk_no_image_is_left_with_its_strokes_in_memory_only(
    qtbot: Any, viewer: Any, widget: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 60), 1)
    journaled(widget)
    errors: list[str] = []
    warnings: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_error", errors.append)
    monkeypatch.setattr("napari.utils.notifications.show_warning", warnings.append)
    # Mesa crashed at times as it drew after a layer with fresh strokes had been removed.
    viewer.window._qt_window.hide()
    with full_disk():
        for i in range(4):
            stroke(layer, (25 + 6 * i, 10), (30 + 6 * i, 70), 1 + i % 2)
        painted = layer.data.copy()
        widget.next_button.native.click()
        assert [each.name for each in viewer.layers] == ["photo0", "photo0 annotation"]
        assert "Autosave cannot write" in errors[0]
        viewer.layers.remove(layer)  # by hand nobody can be stopped
        qtbot.waitUntil(lambda: bool(warnings), timeout=5000)
        assert "are in memory" in warnings[-1]
    qtbot.waitUntil(lambda: not widget._closing, timeout=5000)
    [plane] = read_store(folder.parent / "images annotations")
    np.testing.assert_array_equal(plane.labels, painted)


def test_a_journal_that_cannot_begin_begins_when_it_can(
    viewer: Any, widget: Any, home: Path
) -> None:
    home.mkdir()
    (home / "journal").write_text("in the way")
    viewer.add_image(photo(), rgb=True, name="photo")
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_warning", shown.append)
        widget.annotate()
        layer = widget.current.layer
        stroke(layer, (20, 20), (20, 80), 1)
        widget._tick()
        assert len(shown) == 1
        assert "cannot be written" in shown[0]
    (home / "journal").unlink()
    widget._tick()
    np.testing.assert_array_equal(journaled(widget), layer.data)


def test_closing_the_viewer_saves_what_was_painted(
    viewer: Any, widget: Any, tmp_path: Path, qtbot: Any
) -> None:
    viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "store"
    widget.annotate()
    annotation = widget.current
    stroke(annotation.layer, (20, 20), (20, 80), 1)
    painted = annotation.layer.data.copy()
    viewer.close()
    qtbot.waitUntil(lambda: widget.is_closed, timeout=5000)
    annotation.wait()
    [plane] = read_store(tmp_path / "store")
    np.testing.assert_array_equal(plane.labels, painted)
    assert not find_leftovers(tmp_path / "store" / "journal")[0]


def test_the_menu_has_it_and_opening_it_loads_no_torch(viewer: Any) -> None:
    from napari._app_model import get_app_model

    items = get_app_model().menus.get_menu("napari/layers/annotate")
    assert "napari-semanticblur.annotate" in {
        item.command.id for item in items if hasattr(item, "command")
    }
    code = (
        "import sys\n"
        "from napari.components import ViewerModel\n"
        "from qtpy.QtWidgets import QApplication\n"
        "app = QApplication([])\n"
        "import napari_semanticblur._annotate as a\n"
        "a.AnnotateWidget(ViewerModel())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_that_cannot_be_read_does_not_stand_in_the_way(
    qtbot: Any, viewer: Any, widget: Any, folder: Path
) -> None:
    (folder / "photo0a.png").write_bytes(b"no picture")
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
    widget.next_button.native.click()
    assert widget.current.image.name == "photo1"
    assert "left out" in widget.status.value
    assert "photo0a.png" in widget.status.value


def test_leftovers_of_the_same_words_can_be_told_apart(viewer: Any, open_widget: Any) -> None:
    widget = open_widget()
    for seed in (1, 2):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 80), np.uint8)
        image = viewer.add_image(pixels, name="photo")
        widget.layer.value = image
        widget.annotate()
        stroke(widget.current.layer, (20, 20), (20, 60), 1)
        journaled(widget)
        for layer in (widget.current.layer, image):
            viewer.layers.remove(layer)
    texts = [text for text, _ in widget._offers(None)]
    assert len(set(texts)) == len(texts) == len(widget.found.choices) == 2
    again = open_widget()
    assert len(again.found.choices) == 2
    again.ask = lambda _: True
    for _ in range(2):
        again.discard()
    assert not again.found.visible


def test_what_was_annotated_is_let_go_with_its_layers(
    qtbot: Any, viewer: Any, widget: Any, folder: Path
) -> None:
    widget.folder.value = folder
    qtbot.waitUntil(lambda: widget.current is not None, timeout=10_000)
    gone = [weakref.ref(widget.current), weakref.ref(widget.current.image)]
    stroke(widget.current.layer, (5, 5), (5, 20), 1)
    widget.step(1)
    qtbot.waitUntil(lambda: not widget._closing, timeout=10_000)

    def is_gone() -> bool:
        gc.collect()
        return all(each() is None for each in gone)

    qtbot.waitUntil(is_gone, timeout=10_000)


def test_strokes_that_came_back_alone_take_their_image_when_it_is_opened(
    qtbot: Any, viewer: Any, open_widget: Any, tmp_path: Path
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget = open_widget()
    widget.annotate()
    stroke(widget.current.layer, (20, 20), (20, 80), 1)
    journaled(widget)
    for layer in (widget.current.layer, image):
        viewer.layers.remove(layer)
    widget.restore_button.native.click()
    restored = widget.current
    assert restored.image is None
    other = viewer.add_image(photo(90, 121), rgb=True, name="another")
    assert not restored.adopt(other)
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.layer.value = image
    widget.annotate()
    assert widget.current is restored
    assert (restored.image, restored.is_read_only) == (image, False)
    widget.store.value = tmp_path / "store"
    saved(qtbot, widget)
    assert AnnotationStore(tmp_path / "store").image_of(restored.name) is not None


def test_strokes_on_a_copy_of_an_annotation_stay(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "S"
    widget.annotate()
    first = widget.current.layer
    stroke(first, (20, 20), (20, 80), 1)
    data, state, kind = first.as_layer_data_tuple()
    copy = Layer.create(data.copy(), state, kind)
    viewer.layers.append(copy)
    copy.data[60:66, 20:80] = 2
    painted = copy.data.copy()
    viewer.layers.selection.active = image
    go, write = threading.Event(), AnnotationStore.write

    def slow(*args: Any, **keywords: Any) -> Any:
        go.wait(10)
        return write(*args, **keywords)

    monkeypatch.setattr(AnnotationStore, "write", slow)
    viewer.layers.remove(first)
    widget.annotate()  # while the first is still being saved
    assert widget.current.layer is copy
    assert widget.current.is_read_only
    go.set()
    qtbot.waitUntil(lambda: not widget.current.is_read_only, timeout=5000)
    np.testing.assert_array_equal(copy.data, painted)
    saved(qtbot, widget)
    np.testing.assert_array_equal(AnnotationStore(tmp_path / "S").labels_of("photo"), painted)


def test_an_image_that_is_given_other_data_is_not_painted_on(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "S"
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 1)
    painted = layer.data.copy()
    image.data = photo()  # the same
    assert (layer.editable, layer.mode) == (True, "paint")
    image.data = 255 - photo()
    assert not layer.editable
    told = "photo: has other data than photo annotation was painted on"
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        patch.setattr("napari.utils.notifications.show_warning", shown.append)
        widget._tick()
        assert shown.pop().startswith(told)
        for button in (widget.save_button, widget.fill_sharp_button, widget.map_button):
            button.native.click()
            assert shown.pop().startswith(told)
        widget.status.value = ""
        widget.start_button.native.click()
    assert widget.status.value.startswith(told)
    assert AnnotationStore(tmp_path / "S").labels_of("photo") is None
    image.data = photo()
    assert (layer.editable, layer.mode) == (True, "paint")
    widget._tick()
    assert widget.status.value.startswith("Autosave works again")
    saved(qtbot, widget)
    # Without its layer what was painted is saved beside what it was painted on.
    stroke(layer, (60, 20), (60, 80), 2)
    painted = layer.data.copy()
    image.data = 255 - photo()
    viewer.layers.remove(layer)
    widget.annotate()
    assert not widget.current.layer.data.any()
    stroke(widget.current.layer, (5, 20), (5, 80), 1)
    saved(qtbot, widget)
    one, other = sorted(read_store(tmp_path / "S"), key=lambda each: each.name)
    np.testing.assert_array_equal(one.image, photo())
    np.testing.assert_array_equal(one.labels, painted)
    np.testing.assert_array_equal(other.image, 255 - photo())
    np.testing.assert_array_equal(other.labels, widget.current.layer.data)


def test_an_image_that_is_removed_and_opened_again_is_painted_on(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    image = viewer.add_image(photo(), rgb=True, name="photo")
    widget.store.value = tmp_path / "S"
    widget.annotate()
    annotation = widget.current
    stroke(annotation.layer, (20, 20), (20, 80), 1)
    viewer.layers.remove(image)
    again = viewer.add_image(photo(), rgb=True, name="photo")
    widget.layer.value = again
    widget.annotate()
    assert widget.current is annotation
    assert (annotation.image, annotation.is_read_only) == (again, False)
    assert len(viewer.layers) == 2
    image.data = 255 - photo()  # which is nobody's any more
    assert annotation.layer.editable
    again.data = 255 - photo()
    assert not annotation.layer.editable


class Slow:
    """A lazy stack whose planes are read when they are let through; the window's own at once."""

    def __init__(self, value: int = 0) -> None:
        self.let_through = threading.Event()
        self.array = da.map_blocks(
            self._plane, value, chunks=((1,) * 3, (90,), (120,)), dtype=np.uint8, meta=np.empty(0)
        )

    def _plane(self, value: int) -> np.ndarray:
        if threading.current_thread().name == "semanticblur-read":
            assert self.let_through.wait(20)
        return np.full((1, 90, 120), value, np.uint8)


def test_a_slow_stack_is_read_in_the_background(qtbot: Any, viewer: Any, widget: Any) -> None:
    slow = Slow()
    image = viewer.add_image(slow.array, name="slow", contrast_limits=(0, 255))
    with dask.config.set(scheduler="synchronous"):
        widget.annotate()
        assert widget.current is None
        assert widget.status.value.startswith("Reading slow")
        widget.sharp_button.native.click()
        assert "slow is being read" in widget.status.value
        slow.let_through.set()
        qtbot.waitUntil(lambda: widget.current is not None, timeout=5000)
        annotation = widget.current
        stroke(annotation.layer, (0, 20, 20), (0, 20, 80), 1)

        other = Slow(7)
        image.data = other.array
        assert not annotation.layer.editable
        assert "are being read" in annotation.problem
        other.let_through.set()
        told = "slow: has other data than slow annotation was painted on"
        qtbot.waitUntil(lambda: widget.status.value.startswith(told), timeout=5000)
        image.data = slow.array  # known from before
        qtbot.waitUntil(lambda: annotation.layer.editable, timeout=5000)
        assert (journaled(widget)[0, 20, 20:80] == 1).all()


def test_what_is_read_is_not_annotated_where_another_image_was_chosen(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    slow = Slow()
    other = viewer.add_image(photo(), rgb=True, name="photo")
    widget.layer.value = viewer.add_image(slow.array, name="slow", contrast_limits=(0, 255))
    with dask.config.set(scheduler="synchronous"):
        widget.annotate()
        widget.layer.value = other
        slow.let_through.set()
        qtbot.wait(1200)
    assert widget._annotations == []


# napari divides by the length of a stack as well.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_images_that_cannot_be_read_are_told_of_and_stop_no_others(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    class CodecError(Exception):
        pass

    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        if z == 2:
            raise CodecError("decoder broke")
        return np.zeros((1, 90, 120), np.uint8)

    broken = da.map_blocks(plane, chunks=((1,) * 3, (90,), (120,)), dtype=np.uint8)
    layer = viewer.add_image(broken, name="broken", contrast_limits=(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("napari.utils.notifications.show_error", shown.append)
        for button in (widget.start_button, widget.save_button, widget.map_button):
            button.native.click()
            assert shown.pop() == "broken: plane Z=2: cannot be read: decoder broke"
    viewer.add_image(np.zeros((0, 90, 120), np.uint8), name="none")
    good = viewer.add_image(np.zeros((3, 90, 120), np.uint8), name="good")
    widget.layer.value = good
    widget.annotate()
    stroke(widget.current.layer, (0, 20, 20), (0, 20, 80), 1)
    viewer.layers.remove(good)
    widget.layer.value = layer
    viewer.layers.selection.active = widget._annotations[0].layer
    widget.store.value = tmp_path / "S"
    saved(qtbot, widget)  # after a look whether its image is among those that are open


def test_a_double_click_on_where_next_says_nothing_false(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = viewer.add_image(np.zeros((40, 50), np.uint8), name="photo")
    record = {"kind": "map", "source_id": str(image.unique_id)}
    viewer.add_image(np.full((40, 50), 0.5), metadata={METADATA_KEY: record})
    widget.layer.value = image
    widget.annotate()
    click = widget.where_next.place_button.native.click
    QTimer.singleShot(0, click)
    click()
    qtbot.waitUntil(lambda: not widget.where_next.is_running, timeout=5000)
    assert widget.status.value == "Stopped"


def test_a_store_that_is_deleted_is_told_of_and_strokes_are_saved_elsewhere(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_warning", shown.append)
    monkeypatch.setattr("napari.utils.notifications.show_error", shown.append)
    image = photo()
    viewer.add_image(image, rgb=True, name="photo")
    gone = widget.store.value = tmp_path / "gone"
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, (20, 20), (20, 80), 1)
    journaled(widget)
    shutil.rmtree(gone)
    stroke(layer, (60, 20), (60, 80), 2)
    widget._tick()
    qtbot.waitUntil(lambda: bool(shown), timeout=5000)
    assert f"{gone} is gone" in shown[0]
    assert "Painting goes on" in shown[0]
    widget.save()
    qtbot.waitUntil(lambda: len(shown) == 2, timeout=10_000)
    assert shown[1] == f"{gone}: is gone; bring it back, or choose another store"
    # Nor does another image bring it back: its disk may be unmounted.
    viewer.add_image(image[::-1].copy(), rgb=True, name="another")
    widget.layer.value = viewer.layers["another"]
    widget.start_button.native.click()
    assert widget.status.value == f"{gone}: is gone; bring it back, or choose another store"
    assert len(viewer.layers) == 3
    assert not gone.exists()
    widget.layer.value = viewer.layers["photo"]
    painted = layer.data.copy()
    assert set(np.unique(painted)) == {0, 1, 2}
    widget.store.value = tmp_path / "S"
    saved(qtbot, widget)
    np.testing.assert_array_equal(AnnotationStore(tmp_path / "S").labels_of("photo"), painted)
    assert AnnotationStore(tmp_path / "S").image_of("photo") is not None
    assert not gone.exists()
    widget.status.value, widget._told = "Saved photo in S.", "a trouble that is over"
    widget._tick()
    told = "Saved photo in S. Autosave works again; nothing that was painted is lost."
    assert widget.status.value == told


def test_a_click_on_a_plane_that_cannot_be_read_is_a_line(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    is_broken = False

    def plane(block_info: Any = None) -> np.ndarray:
        if is_broken:
            raise RuntimeError("decoder broke")
        return np.zeros((1, 200, 300), np.uint8)

    lazy = da.map_blocks(plane, chunks=((1,) * 3, (200,), (300,)), dtype=np.uint8)
    viewer.add_image(lazy, name="lazy", contrast_limits=(0, 255))
    widget.annotate()
    viewer.reset_view()
    layer = widget.current.layer
    widget.superpixels.value = True
    is_broken = True
    click(qtbot, viewer, 100, 140)
    z = int(viewer.dims.current_step[0])
    assert widget.status.value == f"lazy: plane Z={z}: cannot be read: decoder broke"
    assert not layer.data.any()
    layer.mode = "paint"
    stroke(layer, (z, 20, 20), (z, 20, 80), 1)
    np.testing.assert_array_equal(journaled(widget), layer.data)
