"""The focus widget in a real viewer, driven as a person would."""

import csv
import gc
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from qtpy.QtCore import QPoint, Qt
from scipy import ndimage

from napari_semanticblur import _focus, _models
from napari_semanticblur._colors import FAILED_COLOR, PASSED_COLOR
from napari_semanticblur._layers import camera_of, find_result
from semanticblur_core import weights
from semanticblur_core.focus import calibration
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER, tile_means
from semanticblur_core.focus.sharpness import tenengrad_map

PEAK = 5


@pytest.fixture
def widget(viewer: Any) -> Any:
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Focus quality")
    widget.method.value = "classical scores, no map"
    widget.score.value = "Tenengrad"
    return widget


def stack(n_planes: int = 8, peak: int = PEAK, shape: tuple[int, int] = (96, 128)) -> np.ndarray:
    scene = np.random.default_rng(0).random(shape) * 255
    return np.stack(
        [ndimage.gaussian_filter(scene, 0.5 + abs(z - peak)) for z in range(n_planes)]
    ).astype(np.uint8)


def lazy(array: np.ndarray, read: list[int]) -> Any:
    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        read.append(z)
        return array[z : z + 1]

    n, *rest = array.shape
    return da.map_blocks(plane, chunks=((1,) * n, *((m,) for m in rest)), dtype=array.dtype)


def wait(qtbot: Any, widget: Any) -> None:
    qtbot.waitUntil(lambda: not widget.is_running, timeout=60_000)
    qtbot.waitUntil(lambda: not widget._refresh_timer.isActive(), timeout=20_000)


def check(qtbot: Any, widget: Any) -> None:
    widget.check_button.native.click()
    wait(qtbot, widget)


def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the index of every plane that is scored from now on."""
    from semanticblur_core.focus import check as module

    indices: list[tuple[int, ...]] = []
    score = module._score

    def counted(prepared: Any, options: Any) -> Any:
        indices.append(prepared.source.index)
        return score(prepared, options)

    monkeypatch.setattr(module, "_score", counted)
    return indices


def complaints(patch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    patch.setattr("napari.utils.notifications.show_error", shown.append)
    return shown


def verdicts(widget: Any) -> list[Any]:
    return [row.passed for row in widget.table.rows]


def test_a_stack_has_a_row_a_plane_and_its_best_one_is_shown(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    viewer.add_image(stack(), name="s", scale=(3, 1, 1), translate=(10, 0, 0))
    check(qtbot, widget)
    assert [row.cells[1] for row in widget.table.rows] == [f"z {z}" for z in range(8)]
    assert widget.plot.curve.best == PEAK
    widget.best_button.native.click()
    assert viewer.dims.point[0] == 10 + 3 * PEAK
    assert f"Best plane z {PEAK}, peak at 5.0" in widget.status.value


def test_a_click_on_the_plot_or_a_row_goes_to_the_plane(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    viewer.add_image(stack()[None].repeat(2, axis=0), name="s")
    viewer.dims.set_point(0, 1)
    check(qtbot, widget)
    where = widget.plot.position_of(2).toPoint()
    qtbot.mouseClick(widget.plot, Qt.MouseButton.LeftButton, pos=QPoint(where.x() + 2, 60))
    assert viewer.dims.point[:2] == (1, 2)
    qtbot.waitUntil(lambda: widget.plot._shown == 2, timeout=5000)
    qtbot.keyClick(widget.plot, Qt.Key.Key_Right)
    assert viewer.dims.point[:2] == (1, 3)
    row = next(i for i, r in enumerate(widget.table.rows) if r.cells[1] == "t 0, z 6")
    widget.table.scrollTo(widget.table.model().index(row, 0))
    middle = widget.table.visualRect(widget.table.model().index(row, 0)).center()
    qtbot.mouseClick(widget.table.viewport(), Qt.MouseButton.LeftButton, pos=middle)
    assert viewer.dims.point[:2] == (0, 6)


def test_rows_are_green_or_red_and_judged_anew_without_measuring(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer.add_image(stack(), name="s")
    check(qtbot, widget)
    assert verdicts(widget) == [None] * 8
    again = measured(monkeypatch)
    scores = widget.plot.curve.scores
    widget.gate.value = _focus.LIMIT
    widget.limit.value = (scores[PEAK] + scores[PEAK - 1]) / 2
    wait(qtbot, widget)
    assert verdicts(widget) == [z == PEAK for z in range(8)]
    model = widget.table.model()
    colors = [
        model.index(z, 0).data(Qt.ItemDataRole.BackgroundRole).name() for z in (PEAK, PEAK + 1)
    ]
    assert colors == [PASSED_COLOR, FAILED_COLOR]
    assert model.index(PEAK, 2).data() == "passed"
    widget.score.value = "normalised variance"
    wait(qtbot, widget)
    assert 0 < sum(verdicts(widget)) < 8  # the limit moved amid the values of the new score
    assert again == []


def test_a_calibrated_gate_and_one_that_does_not_fit(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    viewer.add_image(stack(), name="s")
    check(qtbot, widget)
    scores = widget.plot.curve.scores
    base = dict.fromkeys(HIGHER_IS_SHARPER, 0.5)

    def calibrated(name: str, score: str, good: float, bad: float) -> None:
        examples = [[{**base, score: value}] * 2 for value in (good, bad)]
        made = calibration.calibrate(*examples, protocol={"method": "hifst"})
        calibration.save(made, calibration.stored_path(name))

    calibrated("mine", "tenengrad", scores[PEAK], scores[PEAK - 1])
    calibrated("others", "mean_blur", 0.1, 0.9)
    widget.gate.reset_choices()
    assert list(widget.gate.choices) == ["none", "limit:", "mine", "others"]
    widget.gate.value = "mine"
    wait(qtbot, widget)
    assert verdicts(widget) == [z == PEAK for z in range(8)]
    widget.gate.value = "others"
    wait(qtbot, widget)
    assert "measured with method hifst, this run has classical" in widget.status.value
    assert verdicts(widget) == [None] * 8


@pytest.mark.parametrize("as_lazy", [False, True])
def test_only_the_new_planes_of_a_growing_stack_are_checked(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch, as_lazy: bool
) -> None:
    whole, read = stack(), list[int]()

    def grown_to(n: int) -> Any:
        return lazy(whole[:n], read) if as_lazy else whole[:n].copy()

    layer = viewer.add_image(grown_to(3), name="s", contrast_limits=(0, 255))
    indices = measured(monkeypatch)
    check(qtbot, widget)
    assert indices == [(0,), (1,), (2,)]
    for n in (5, 8):
        layer.data = grown_to(n)
        qtbot.waitUntil(lambda n=n: len(widget.session().images) == n, timeout=20_000)
        wait(qtbot, widget)
    assert indices == [(z,) for z in range(8)]
    assert len(widget.table.rows) == 8
    assert widget.plot.curve.best == PEAK
    layer.data = lazy(whole[::-1], read) if as_lazy else whole[::-1].copy()
    wait(qtbot, widget)
    assert len(indices) == 8
    assert "has other data: check it again" in widget.status.value
    assert widget.table.rows == []


def test_a_stack_that_grows_during_a_check_is_caught_up_with(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stack(40, peak=30)
    layer = viewer.add_image(whole[:20].copy(), name="s")
    indices = measured(monkeypatch)
    widget.check()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=20_000)
    layer.data = whole[:30].copy()
    layer.data = whole
    qtbot.waitUntil(lambda: len(widget.session().images) == 40, timeout=30_000)
    wait(qtbot, widget)
    assert sorted(indices) == [(z,) for z in range(40)]
    assert widget.plot.curve.best == 30


def test_new_planes_wait_where_they_are_not_followed(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(stack()[:3].copy(), name="s")
    check(qtbot, widget)
    widget.follow.value = False
    layer.data = stack()
    wait(qtbot, widget)
    assert len(widget.table.rows) == 3
    check(qtbot, widget)
    assert len(widget.table.rows) == 8


def test_of_a_lazy_stack_only_the_plane_shown_is_read(qtbot: Any, viewer: Any, widget: Any) -> None:
    read: list[int] = []

    def plane(block_info: Any = None) -> np.ndarray:
        read.append(block_info[None]["chunk-location"][0])
        return np.full((1, 1000, 1000), block_info[None]["chunk-location"][0], np.uint16)

    array = da.map_blocks(plane, chunks=((1,) * 10_000, (1000,), (1000,)), dtype=np.uint16)
    viewer.add_image(array, name="lazy", contrast_limits=(0, 10_000))
    viewer.dims.set_point(0, 1234)
    widget.planes.value = _focus.CURRENT
    read.clear()
    check(qtbot, widget)
    assert set(read) == {1234}
    assert [row.cells[1] for row in widget.table.rows] == ["z 1234"]


def test_the_heat_map_lies_on_the_image(qtbot: Any, viewer: Any, widget: Any) -> None:
    image = stack()
    layer = viewer.add_image(
        image, name="s", scale=(3, 2, 0.5), translate=(9, 5, -4), rotate=25, shear=[0.1, 0, 0]
    )
    widget.tile_size_px.value = 32
    check(qtbot, widget)
    widget.heat_button.native.click()
    heat = find_result(viewer, layer, "heat")
    assert heat.data.shape == (8, 3, 4)
    expected = tile_means(tenengrad_map(image[PEAK] / np.float32(255)), 32)
    np.testing.assert_allclose(heat.data[PEAK], expected, rtol=1e-4)
    for tile, pixel in (((0, 0), (15.5, 15.5)), ((2, 3), (79.5, 111.5))):
        np.testing.assert_allclose(
            heat.data_to_world((PEAK, *tile)), layer.data_to_world((PEAK, *pixel)), atol=1e-6
        )
    assert heat.contrast_limits[1] == pytest.approx(float(heat.data.max()))
    n_layers = len(viewer.layers)
    widget.heat_button.native.click()
    assert len(viewer.layers) == n_layers


def test_the_heat_map_of_a_method_is_the_share_in_focus(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    image = stack()[PEAK]
    image[:, 64:] = 128
    layer = viewer.add_image(image, name="half")
    widget.method.value = "local binary patterns"
    widget.score.value = "in focus"
    check(qtbot, widget)
    widget.heat_button.native.click()
    heat = find_result(viewer, layer, "heat")
    assert heat.name == "half share in focus"
    assert heat.data.shape == (2, 2)
    assert heat.data[0, 0] > heat.data[0, 1] + 0.3
    assert tuple(heat.contrast_limits) == (0, 1)
    widget.show_rows.value = _focus.TILES
    wait(qtbot, widget)
    widget._row_chosen(widget.table.rows[-1].target)
    np.testing.assert_allclose(camera_of(viewer).center[-2:], (95.5, 96))


def test_labels_say_where_to_look(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = stack(2, peak=0)
    image[:, :, 64:] = 128
    viewer.add_image(image, name="half")
    labels = np.zeros(image.shape, np.uint8)
    labels[0, :, :48] = 1
    labels[1, :, 80:] = 7
    layer = viewer.add_labels(labels, name="cells")
    viewer.add_labels(np.ones((5, 5), np.uint8), name="other")
    widget.method.value = "local binary patterns"
    widget.score.value = "in focus"
    assert layer in widget.region.choices
    widget.region.value = layer
    check(qtbot, widget)
    in_focus = [row.cells[3] for row in widget.table.rows]
    assert in_focus[0] > 0.5 > in_focus[1]
    images = widget.session().images
    assert images[(0,)].scores.region_fraction == 48 / 128
    layer.data[0, :, 32:] = 0
    layer.refresh()
    again = measured(monkeypatch)
    check(qtbot, widget)  # what was painted since counts
    assert again == [(0,)]
    assert widget.session().images[(0,)].scores.region_fraction == 32 / 128
    with pytest.MonkeyPatch.context() as patch:
        shown = complaints(patch)
        widget.region.value = viewer.layers["other"]
        check(qtbot, widget)
    assert shown[0].startswith("other: labels of (5, 5) for half of (2, 96, 128)")


@pytest.mark.parametrize("rgb", [False, True])
def test_the_composite_is_sharp_and_keeps_its_place(
    qtbot: Any, viewer: Any, widget: Any, rgb: bool
) -> None:
    near, far = stack(peak=1), stack(peak=6)
    image = np.concatenate([near[..., :64], far[..., 64:]], axis=2)[None].repeat(2, axis=0)
    image = np.stack([image] * 3, axis=-1) if rgb else image
    layer = viewer.add_image(image, rgb=rgb, name="s", scale=(1, 3, 2, 0.5), rotate=20)
    viewer.dims.set_point(0, 1)
    widget.composite_button.native.click()
    wait(qtbot, widget)
    made, depth = (find_result(viewer, layer, kind) for kind in ("composite", "depth"))
    assert made.name == "s all in focus, t 1"
    assert made.data.shape == (1, 8, *image.shape[2:])
    assert made.data.dtype == np.uint8
    for z in (0, 7):  # it stands at every plane
        np.testing.assert_allclose(
            made.data_to_world((0, z, 5, 6)), layer.data_to_world((1, z, 5, 6)), atol=1e-6
        )
    assert np.median(depth.data[0, 0, :, :56]) == 1
    assert np.median(depth.data[0, 0, :, 72:]) == 6
    assert not depth.visible
    difference = made.data[0, 0, :, :48].astype(int) - image[1, 1, :, :48]
    assert np.abs(difference).mean() < 2
    assert widget.session() is None  # scores are another matter


def test_tiles_are_listed_and_looked_at(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(stack(), name="s", scale=(1, 2, 2))
    widget.tile_size_px.value = 32
    check(qtbot, widget)
    widget.show_rows.value = _focus.TILES
    wait(qtbot, widget)
    assert [row.target[2] for row in widget.table.rows] == [
        (i, j) for i in range(3) for j in range(4)
    ]
    widget._row_chosen(widget.table.rows[-1].target)
    np.testing.assert_allclose(camera_of(viewer).center[-2:], (160, 224))


def test_every_layer_is_checked_and_the_tables_are_saved(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    sharp, soft = stack()[PEAK], stack()[0]
    viewer.add_image(soft, name="soft")
    viewer.add_image(np.stack([sharp] * 3, axis=-1), rgb=True, name="sharp")
    viewer.add_labels(np.ones((9, 9), np.uint8))
    widget.planes.value = _focus.LAYERS
    widget.gate.value = _focus.LIMIT
    check(qtbot, widget)
    assert {row.cells[0]: row.passed for row in widget.table.rows} == {
        "soft": False,
        "sharp": True,
    }
    widget.export(tmp_path / "focus.csv")
    with (tmp_path / "focus.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert {name: row["passed"] for name, row in rows.items()} == {
        "soft": "False",
        "sharp": "True",
    }
    assert float(rows["sharp"]["tenengrad"]) > float(rows["soft"]["tenengrad"])
    widget.export(tmp_path / "focus.html")
    page = (tmp_path / "focus.html").read_text()
    assert '"name":"sharp"' in page
    assert "Gates: tenengrad" in page


def test_a_level_and_a_channel_are_measured_in_their_place(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    full = np.random.default_rng(1).integers(0, 999, (2, 4, 1100, 1200), np.uint16)
    layer = viewer.add_image(
        [full, full[..., ::2, ::2]],
        multiscale=True,
        name="m",
        axis_labels=("c", "z", "y", "x"),
        scale=(1, 2, 0.5, 0.5),
    )
    assert list(widget.channels.choices) == ["each", 0, 1, "mean"]
    widget.channels.value = 1
    viewer.dims.set_point((0, 1), (1, 4))
    widget.planes.value = _focus.CURRENT
    widget.tile_size_px.value = 512
    check(qtbot, widget)
    assert [row.cells[1] for row in widget.table.rows] == ["z 2"]
    widget.heat_button.native.click()
    heat = find_result(viewer, layer, "heat")
    assert heat.data.shape == (1, 4, 3, 3)  # at its channel
    assert np.isfinite(heat.data[:, 2]).all()
    np.testing.assert_allclose(
        heat.data_to_world((0, 2, 1, 1)), layer.data_to_world((1, 2, 767.5, 767.5))
    )


def test_channels_and_settings_keep_what_was_made_of_the_others(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    image = np.stack([stack(peak=2), stack(peak=5)])
    layer = viewer.add_image(image, name="m", axis_labels=("c", "z", "y", "x"))
    for channel in (0, 1):
        widget.channels.value = channel
        widget.composite_button.native.click()
        wait(qtbot, widget)
    made = [each for each in viewer.layers if "all in focus" in each.name]
    assert [each.name for each in made] == [f"m all in focus, channel {c}" for c in (0, 1)]
    for channel, each in enumerate(made):
        assert each.data.shape == (1, *image.shape[1:])
        np.testing.assert_allclose(
            each.data_to_world((0, 1, 2, 3)), layer.data_to_world((channel, 1, 2, 3))
        )

    check(qtbot, widget)
    first = dict(widget.session().images)
    assert len(first) == image.shape[1]
    widget.tile_size_px.value = 96
    widget.export(tmp_path / "focus.html")
    assert "tiles 64 px" in (tmp_path / "focus.html").read_text()  # as it was measured
    widget.planes.value = _focus.CURRENT
    check(qtbot, widget)
    assert len(widget.session().images) == 1
    widget.tile_size_px.value = 64
    check(qtbot, widget)
    assert widget.session().images == first


def test_the_report_of_a_stack_has_its_curve(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path
) -> None:
    viewer.add_image(stack(), name="s")
    widget.score.value = "blur effect"  # low is sharp
    check(qtbot, widget)
    widget.export(tmp_path / "focus.html")
    page = (tmp_path / "focus.html").read_text()
    assert '"descending":true' in page
    assert '"score":[0.' in page
    assert f'"best_plane":{{"index":{PEAK},"name":"s[Z={PEAK}]"}}' in page


def test_cancel_keeps_what_is_done(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((400, 128, 128), np.uint8), name="long")
    widget.check()
    qtbot.waitUntil(lambda: widget.progress.value >= 3, timeout=20_000)
    widget.cancel_button.native.click()
    wait(qtbot, widget)
    assert 3 <= len(widget.table.rows) < 400
    assert widget.status.value == "Stopped"
    assert widget.check_button.enabled
    assert not widget.cancel_button.enabled


def test_planes_that_come_quickly_do_not_pile_up(qtbot: Any, viewer: Any, widget: Any) -> None:
    """napari's progress bar handles events as it draws; nested, they once ended the process."""
    viewer.add_image(np.zeros((400, 16, 16), np.uint8), name="many")
    widget.check()
    time.sleep(1.5)  # the window is busy elsewhere, and updates gather
    wait(qtbot, widget)
    assert len(widget.session().images) == 400


def test_a_layer_that_goes_away_stops_its_check(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(np.zeros((400, 128, 128), np.uint8), name="long")
    widget.check()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=20_000)
    viewer.layers.remove(layer)
    wait(qtbot, widget)
    assert widget.table.rows == []


def test_closing_the_viewer_ends_a_check(qtbot: Any, viewer: Any, widget: Any) -> None:
    viewer.add_image(np.zeros((400, 128, 128), np.uint8), name="long")
    widget.check()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=20_000)
    viewer.close()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=20_000)


def test_closing_the_dock_ends_a_check(qtbot: Any, viewer: Any) -> None:
    dock, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Focus quality")
    widget.method.value = "classical scores, no map"
    viewer.add_image(np.zeros((400, 128, 128), np.uint8), name="long")
    widget.check()
    qtbot.waitUntil(lambda: widget.progress.value >= 1, timeout=20_000)
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=20_000)
    assert 1 <= len(widget.session(viewer.layers["long"]).images) < 400
    left = weakref.ref(widget)
    dock = widget = None
    qtbot.waitUntil(lambda: gc.collect() >= 0 and left() is None, timeout=5000)


def test_a_layer_whose_slider_is_elsewhere_does_not_stop_the_others(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    viewer.add_image(stack(), name="long")
    viewer.add_image(stack(3), name="short")
    viewer.dims.set_point(0, 6)
    widget.planes.value = _focus.LAYERS
    check(qtbot, widget)
    assert [row.cells[:2] for row in widget.table.rows] == [("long", "z 6")]
    assert "1 of 1 planes checked; 1 left out: " in widget.status.value
    assert "short" in widget.status.value
    # Forgotten is only what can be measured again.
    widget.layer.value = viewer.layers["short"]
    widget.planes.value = _focus.ALL
    check(qtbot, widget)
    widget.planes.value = _focus.CURRENT
    with pytest.MonkeyPatch.context() as patch:
        shown = complaints(patch)
        widget.again_button.native.click()
        assert len(shown) == 1
    assert len(widget.session().images) == 3


def test_a_layer_that_cannot_be_measured_does_not_stop_the_others(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = complaints(monkeypatch)
    viewer.add_image(np.full((96, 128), np.nan), name="empty", contrast_limits=(0, 1))
    viewer.add_image(stack()[PEAK], name="good")
    widget.planes.value = _focus.LAYERS
    check(qtbot, widget)
    assert [row.cells[0] for row in widget.table.rows] == ["good"]
    told = "Checked; 1 left out: empty: no finite value (all NaN or infinite)"
    assert widget.status.value == told
    assert len(shown) == 1
    viewer.layers.remove("good")
    check(qtbot, widget)
    assert widget.status.value == "empty: no finite value (all NaN or infinite)"


def test_rows_follow_the_name_and_only_what_was_measured_is_judged(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    layer = viewer.add_image(stack()[PEAK], name="before")
    check(qtbot, widget)
    layer.name = "after"
    qtbot.waitUntil(lambda: widget.table.rows[0].cells[0] == "after", timeout=5000)
    widget.gate.value = _focus.LIMIT
    widget.score.value = "in focus"  # of a map, which this method makes none of
    qtbot.waitUntil(lambda: not widget._refresh_timer.isActive(), timeout=20_000)
    assert verdicts(widget) == [None]
    assert widget.table.rows[0].cells[2] == "not measured"
    assert widget.session().images[()].name == "after"


def test_models_that_are_made_or_renamed_are_followed(
    viewer: Any, widget: Any, random_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    for version in (1, 2):
        shutil.copy(random_weights, tmp_path / "models" / f"mine@{version}.safetensors")
    _models.models.changed.emit("mine@2")
    assert widget.model.value == "default"
    widget.method.value, widget.model.value = "network", "mine"
    before = widget.settings.key
    weights.rename_model("mine", "ours")
    _models.models.changed.emit("ours@2")
    assert widget.model.value == "ours"
    assert widget.settings.key == before  # so that no score is forgotten
    widget.model.value = "default"
    assert widget.settings.key != before


def test_what_cannot_be_done_is_one_line(qtbot: Any, viewer: Any, widget: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shown = complaints(patch)
        widget.check_button.native.click()
        assert widget.status.value == "Open an image first."
        viewer.add_image(stack()[0], name="one")
        widget.heat_button.native.click()
        check(qtbot, widget)
        widget.best_button.native.click()
        widget.composite_button.native.click()
        assert shown == [
            "one: check its focus first",
            "one: a single plane, no stack",
            "one: a single plane, no stack",
        ]
        viewer.add_image(np.full((90, 90), np.nan), name="broken", contrast_limits=(0, 1))
        widget.layer.value = viewer.layers["broken"]
        check(qtbot, widget)
        assert shown[3] == "broken: no finite value (all NaN or infinite)"
    assert widget.check_button.enabled


def test_the_network_is_a_method_like_others(qtbot: Any, viewer: Any, widget: Any) -> None:
    image = np.stack([stack()[PEAK]] * 3, axis=-1)
    image[:, 64:] = ndimage.gaussian_filter(image[:, 64:], (6, 6, 0))
    viewer.add_image(image, rgb=True, name="photo")
    widget.method.value = "network"
    widget.score.value = "in focus"
    check(qtbot, widget)
    (row,) = widget.table.rows
    assert np.isfinite(row.cells[3:]).all()


def test_the_menu_has_it(viewer: Any) -> None:
    from napari._app_model import get_app_model

    items = get_app_model().menus.get_menu("napari/layers/measure")
    commands = {item.command.id for item in items if hasattr(item, "command")}
    assert "napari-semanticblur.focus" in commands


def test_neither_opening_nor_classical_scores_load_torch() -> None:
    code = """
import sys, time
import napari, numpy as np
from qtpy.QtWidgets import QApplication
viewer = napari.Viewer()
_, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Focus quality")
assert "torch" not in sys.modules, "opened"
viewer.add_image(np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8))
widget.method.value = "classical scores, no map"
widget.check()
until = time.monotonic() + 30
while widget.is_running and time.monotonic() < until:
    QApplication.processEvents()
assert len(widget.session().images) == 3
assert "torch" not in sys.modules, "checked"
viewer.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_is_shown_is_as_measured_with_what_is_chosen_or_that_is_told(
    qtbot: Any, viewer: Any, widget: Any
) -> None:
    viewer.add_image(stack(n_planes=3), name="s")
    check(qtbot, widget)
    widget.region.value = _focus.CONTENT
    assert "measured with method classical" in widget.status.value
    widget.planes.value = _focus.CURRENT
    check(qtbot, widget)
    assert len(widget.table.rows) == 1
    widget.region.value = _focus.EVERYWHERE
    wait(qtbot, widget)
    assert len(widget.table.rows) == 3
    widget.region.value = _focus.CONTENT
    wait(qtbot, widget)
    assert len(widget.table.rows) == 1
    assert "measured with" not in widget.status.value


def test_a_layer_that_is_gone_is_let_go(qtbot: Any, viewer: Any, widget: Any) -> None:
    layer = viewer.add_image(stack(n_planes=2), name="s")
    check(qtbot, widget)
    gone = weakref.ref(layer)
    viewer.layers.remove(layer)
    del layer
    wait(qtbot, widget)

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    qtbot.waitUntil(is_gone, timeout=10_000)


def slow(array: np.ndarray, broken: set[int]) -> Any:
    """Planes that take a while to come, or are broken."""

    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        time.sleep(0.02)
        if z in broken:
            raise OSError("torn tape")
        return array[z : z + 1]

    n, *rest = array.shape
    return da.map_blocks(plane, chunks=((1,) * n, *((m,) for m in rest)), dtype=array.dtype)


@pytest.mark.parametrize("what", ["removed", "changed"])
def test_a_layer_that_goes_away_stops_its_composite(
    qtbot: Any, viewer: Any, widget: Any, what: str
) -> None:
    layer = viewer.add_image(slow(stack(40), set()), name="s", contrast_limits=(0, 255))
    widget.composite_button.native.click()
    qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=20_000)
    if what == "removed":
        viewer.layers.remove(layer)
        said = "the layer s was removed"
    else:
        layer.data = stack(4)
        said = "the data of s was changed"
    wait(qtbot, widget)
    assert widget.status.value == f"Stopped: {said}"
    assert list(viewer.layers) == ([] if what == "removed" else [layer])
    assert widget.composite_button.enabled


def test_a_check_says_why_it_stopped(
    qtbot: Any, viewer: Any, widget: Any, make_napari_viewer: Any
) -> None:
    layer = viewer.add_image(np.zeros((400, 128, 128), np.uint8), name="long")
    other = make_napari_viewer(show=True)
    for action, said in (
        (other.close, "napari ended it because a window was closed; run it again"),
        (lambda: viewer.layers.remove(layer), "the layer long was removed"),
    ):
        widget.check()
        qtbot.waitUntil(lambda: widget.progress.value >= 2, timeout=5000)
        action()
        wait(qtbot, widget)
        assert widget.status.value == f"Stopped: {said}"


def test_a_plane_that_cannot_be_read_is_told_and_tried_again(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, broken = complaints(monkeypatch), set[int]()
    viewer.add_image(slow(stack(), broken), name="s", contrast_limits=(0, 255))
    viewer.dims.set_point(0, 0)
    broken |= {1, 3}
    left_out = "Checked; 2 left out: s[Z=1]: plane Z=1: cannot be read: torn tape"
    for _ in range(2):
        check(qtbot, widget)
        assert (widget.status.value, shown.pop(), shown) == (left_out, left_out, [])
    broken.clear()
    again = measured(monkeypatch)
    for planes, z in ((_focus.CURRENT, 3), (_focus.ALL, 1)):
        widget.planes.value = planes
        viewer.dims.set_point(0, 3)
        check(qtbot, widget)
        assert again.pop() == (z,)
        assert again == []
        assert widget.status.value == "1 of 1 planes checked"
    assert widget.plot.curve.positions == tuple(range(8))


def test_the_composite_does_without_planes_that_cannot_be_read(
    qtbot: Any, viewer: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, broken = complaints(monkeypatch), set[int]()
    layer = viewer.add_image(slow(stack(), broken), name="s", contrast_limits=(0, 255))
    viewer.dims.set_point(0, 0)
    broken |= {2, 6}
    widget.composite_button.native.click()
    wait(qtbot, widget)
    said = "All in focus: done; 2 left out: plane Z=2: cannot be read: torn tape"
    assert (widget.status.value, shown) == (said, [])
    made, depth = (find_result(viewer, layer, kind) for kind in ("composite", "depth"))
    assert (depth.data == PEAK).all()
    np.testing.assert_allclose(made.data[0], stack()[PEAK], atol=1)
    broken.update(range(8))
    widget.composite_button.native.click()
    wait(qtbot, widget)
    assert shown == ["s: plane Z=0: cannot be read: torn tape"]
