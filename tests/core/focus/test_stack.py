"""Stacks: planes are found where they were made sharp, read once, and composed without loss."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from semanticblur_core import io
from semanticblur_core.data.focal_stack import focal_stack
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus.classical import ClassicalDetector
from semanticblur_core.focus.stack import (
    FileStack,
    PlaneFocus,
    StackFocus,
    all_in_focus,
    focus_measure,
    in_stack_order,
    iter_focus,
    plane_focus,
)


class Counted:
    """An array that notes which places along its first axis are read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.read = array, list[int]()
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        self.read.append(key[0])
        part: np.ndarray = self.array[key]
        return part


def defocused(peaks: list[float], n_planes: int = 9, side: int = 96) -> np.ndarray:
    """``(T, Z, side, side)``: one texture, sharpest at a peak, as 8 bits."""
    scene = np.random.default_rng(0).random((side, side)) * 255
    return np.stack(
        [
            [ndimage.gaussian_filter(scene, 0.6 + abs(z - peak) * 0.7) for z in range(n_planes)]
            for peak in peaks
        ]
    ).astype(np.uint8)


def measured(array: Any, axes: str, **options: Any) -> StackFocus:
    result = StackFocus("".join(axis for axis in axes if axis not in "YXS"))
    for _ in iter_focus(array, axes, result, **options):
        pass
    return result


@pytest.mark.parametrize("measure", ["tenengrad", "laplacian"])
@pytest.mark.parametrize("peak", [2.0, 4.0, 5.5])
def test_the_peak_is_where_it_was_made(peak: float, measure: str) -> None:
    stack = defocused([peak])[0]
    curve = measured(stack, "ZYX", measure=focus_measure(measure)).curve()
    assert abs(curve.best - peak) <= 0.5
    assert curve.peak == pytest.approx(peak, abs=0.3)
    assert curve.positions == tuple(range(9))


def test_a_parabola_through_three_scores_worked_out_by_hand() -> None:
    result = StackFocus()
    # exp(-(z - 1.25)^2): its logarithm is a parabola, so the peak is exact, for uneven steps too.
    for z in (0, 1, 3):
        result.add(PlaneFocus((z,), float(np.exp(-((z - 1.25) ** 2))), np.zeros((1, 1))))
    curve = result.curve()
    assert curve.best == 1
    assert curve.peak == pytest.approx(1.25)


def test_a_peak_at_the_end_stays_there() -> None:
    curve = measured(defocused([0.0])[0], "ZYX").curve()
    assert (curve.best, curve.peak) == (0, 0.0)


def test_axes_go_by_name_and_drift_is_found() -> None:
    stack = defocused([2.0, 2.5, 3.0, 3.5])
    drift = measured(stack, "TZYX").drift(step_um=2.0)
    assert drift.planes_per_step == pytest.approx(0.5, abs=0.15)
    assert drift.um_per_step == pytest.approx(2 * drift.planes_per_step)
    moved = measured(np.moveaxis(stack, 1, -1), "TYXZ")
    assert moved.curve((0,)).best == 2
    colour = measured(np.stack([stack[0]] * 3, axis=-1), "ZYXS")
    assert colour.curve().best == 2


def test_each_tile_has_its_best_plane() -> None:
    near, far = defocused([1.0, 6.0])
    stack = np.concatenate([near, far], axis=2)
    tiles = measured(stack, "ZYX", tile_size_px=48).best_tiles()
    np.testing.assert_array_equal(tiles, [[1, 1, 6, 6]] * 2)


def test_only_new_planes_of_a_grown_stack_are_read() -> None:
    stack = defocused([4.0])[0]
    result = StackFocus()
    first = Counted(stack[:3])
    list(iter_focus(first, "ZYX", result))
    assert (first.read, result.curve().best) == ([0, 1, 2], 2)
    grown = Counted(stack)
    updates = list(iter_focus(grown, "ZYX", result))
    assert grown.read == [3, 4, 5, 6, 7, 8]
    assert [(u.n_done, u.n_total) for u in updates] == [(i, 6) for i in range(1, 7)]
    assert result.curve().best == 4
    assert list(iter_focus(Counted(stack), "ZYX", result)) == []


def deep_stack() -> np.ndarray:
    """Sixteen bits, sharpest at plane 6; the first planes fill a small part of the range."""
    planes = defocused([6.0])[0].astype(np.uint16)
    return 1000 + planes * 100


def grown(stack: np.ndarray, *lengths: int, **options: Any) -> StackFocus:
    """Measured in calls of so many planes more."""
    result = StackFocus()
    for length in lengths:
        list(iter_focus(stack[:length], "ZYX", result, **options))
    return result


def test_a_stack_that_grows_is_measured_on_one_scale() -> None:
    stack = deep_stack()
    for lengths in ((2, 5, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        assert grown(stack, *lengths).curve().best == 6
    given = grown(stack, 2, 9, value_range=(0, 30_000))
    assert given.curve() == grown(stack, 9, value_range=(0, 30_000)).curve()
    # What was given once is kept, as what was estimated is.
    kept = grown(stack, 2, value_range=(0, 30_000))
    list(iter_focus(stack, "ZYX", kept))
    assert kept.curve() == given.curve()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_second_scale_is_refused(dtype: Any) -> None:
    stack = defocused([4.0])[0].astype(dtype)
    result = grown(stack, 3)
    with pytest.raises(ImageError, match=r"value_range \(0, 99\): the other planes were measured"):
        list(iter_focus(stack, "ZYX", result, value_range=(0, 99)))
    assert list(iter_focus(stack, "ZYX", result))


def test_channels_that_come_later_have_a_scale_of_their_own() -> None:
    stack = np.stack([deep_stack(), deep_stack() // 10], axis=1)
    result = StackFocus("ZC")
    list(iter_focus(stack[:, :1], "ZCYX", result))
    list(iter_focus(stack, "ZCYX", result))
    assert [result.curve((channel,)).best for channel in (0, 1)] == [6, 6]
    assert result.curve((1,)).scores == pytest.approx(result.curve((0,)).scores, rel=0.1)


def test_planes_are_read_when_they_are_asked_for() -> None:
    stack = Counted(defocused([4.0])[0])
    running = iter_focus(stack, "ZYX", StackFocus())
    next(running)
    running.close()
    assert stack.read == [0]


def test_sixteen_bits_are_measured_on_one_scale() -> None:
    """A plane stretched by itself would look as sharp as the one in focus."""
    stack = defocused([4.0])[0].astype(np.uint16) * 100
    assert measured(stack, "ZYX").curve().best == 4


@pytest.mark.parametrize(
    ("plane", "found"),
    [
        (np.full((40, 40), 900, np.uint16), "got uint16"),
        (np.full((40, 40), 1, np.int64), "got int64"),
        (np.linspace(0, 4095, 1600).reshape(40, 40), "got float64 of 0..4095"),
        (np.array([[np.nan, -0.5]], np.float32), r"got float32 of -0\.5\.\.-0\.5"),
        (np.array([[0.5, np.inf]], np.float32), r"got float32 of 0\.5\.\.inf"),
    ],
)
def test_planes_of_another_range_are_refused(plane: np.ndarray, found: str) -> None:
    expected = f"plane: expected uint8, bool or floats in 0..1, {found}; `io.to_unit_range` makes"
    for measure in ("tenengrad", "laplacian", "network"):
        how = focus_measure(measure, detector=ClassicalDetector("lbp"))
        with pytest.raises(ImageError, match=expected):
            plane_focus((0,), plane, how)


@pytest.mark.parametrize("measure", ["tenengrad", "laplacian", "network"])
def test_planes_in_the_unit_range_are_measured(measure: str) -> None:
    how = focus_measure(measure, detector=ClassicalDetector("lbp"))
    eight = defocused([0.0])[0, 0]
    wanted = plane_focus((0,), eight, how).score
    unit = eight / np.float32(255)
    unit[0, 0] = 1 + 5e-7  # a rounded sum
    assert plane_focus((0,), unit, how).score == pytest.approx(wanted, rel=0.02)
    assert plane_focus((0,), eight > 127, how).score > 0
    unit[5, 5] = np.nan
    plane_focus((0,), unit, how)


def compose(stack: np.ndarray, axes: str, **options: Any) -> Any:
    *_, last = all_in_focus(stack, axes, **options)
    return last


def tile_gradient(image: np.ndarray, side: int = 64) -> np.ndarray:
    grey = image @ np.array([0.299, 0.587, 0.114]) if image.ndim == 3 else image.astype(float)
    height, width = (n // side * side for n in grey.shape)
    gradient = np.hypot(*np.gradient(grey))[:height, :width]
    tiles: np.ndarray = gradient.reshape(height // side, side, width // side, side).mean((1, 3))
    return tiles


def test_the_composite_is_as_sharp_as_the_best_plane_everywhere() -> None:
    made = focal_stack(n_planes=11, size_px=256)
    result = compose(made.images, "ZYX")
    assert (result.composite.dtype, result.depth.dtype) == (np.uint8, np.int16)
    best = np.max([tile_gradient(plane) for plane in made.images], axis=0)
    assert (tile_gradient(result.composite) >= 0.95 * best).all()
    # The slope is in focus from left to right; noise leaves a plane or so.
    wanted = np.linspace(0, 10, 256)[None]
    assert np.mean(np.abs(result.depth - wanted) <= 1.5) > 0.9
    lone = np.abs(result.depth - ndimage.median_filter(result.depth, 7)) > 1
    assert lone.mean() < 0.01


def test_planes_that_are_alike_compose_to_themselves(rng: np.random.Generator) -> None:
    for shape, axes in (((40, 50), "ZYX"), ((40, 50, 3), "ZYXS")):
        plane = rng.integers(0, 60_000, shape, np.uint16)
        result = compose(np.stack([plane] * 4), axes)
        assert result.composite.dtype == np.uint16
        np.testing.assert_allclose(result.composite.astype(int), plane, atol=1)
        assert not result.depth.any()


def test_one_time_and_channel_is_composed() -> None:
    stack = np.stack([defocused([2.0])[0], defocused([6.0])[0]])[:, None]
    result = compose(stack, "TCZYX", at=(1, 0))
    assert np.median(result.depth) == 6
    with pytest.raises(ImageError, match="expected an index along TC, got"):
        compose(stack, "TCZYX")


def test_files_are_a_stack_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["z-10.png", "z-09.png", "z-01.png", "z+00.png", "z+02.png", "z+11.png"]
    for i, name in enumerate(names):
        Image.fromarray(np.full((6, 7), i, np.uint8)).save(tmp_path / name)
    ordered = in_stack_order(list(tmp_path.iterdir()))
    assert [path.name for path in ordered] == names
    assert in_stack_order([str(path) for path in tmp_path.iterdir()]) == ordered
    stack = FileStack([str(path) for path in ordered])
    assert (stack.shape, stack.axes) == ((6, 6, 7), "ZYX")
    assert stack[2, 0, 0] == 2
    assert [p.name for p in in_stack_order([Path("a-10.png"), Path("a-9.png")])] == [
        "a-9.png",
        "a-10.png",
    ]
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(ordered[3])
    with pytest.raises(ImageError, match=re.escape("z+00.png: uint8 (6, 8), but z-10.png is")):
        stack[3]


def test_the_range_of_files_meets_every_colour_of_a_mosaic(tmp_path: Path) -> None:
    mosaic = np.zeros((600, 600), np.uint16)
    mosaic[1::2, 1::2] = 25_400
    paths = [tmp_path / f"{z}.png" for z in range(4)]
    for path in paths:
        Image.fromarray(mosaic).save(path)
    assert FileStack(paths).estimate_range() == (0, 25_400)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ImageError, match="no axis Z to look along: the planes have T"):
        StackFocus("T")
    with pytest.raises(ConfigError, match="expected one of tenengrad, laplacian, network"):
        focus_measure("sobel")
    with pytest.raises(ConfigError, match="needs a detector"):
        focus_measure("network")
    with pytest.raises(ImageError, match="no plane at"):
        StackFocus().curve()
    with pytest.raises(ImageError, match="needs two times"):
        measured(defocused([2.0]), "TZYX").drift()


def test_the_best_plane_of_a_stained_smear_is_that_of_its_authors(data_dir: Path) -> None:
    files = in_stack_order(list((data_dir / "microscopy" / "smear-stack").iterdir()))
    z = np.array([int(path.stem.split("z")[1]) for path in files])
    assert z.tolist() == list(range(-9, 10))
    result = StackFocus()
    for i, path in enumerate(files):  # they are of slightly different sizes
        result.add(plane_focus((i,), io.read_image(path), focus_measure()))
    curve = result.curve()
    assert z[curve.best] == 0
    assert stats.spearmanr(curve.scores, -np.abs(z)).statistic >= 0.9


def test_the_composite_of_a_real_stack_is_sharp(data_dir: Path) -> None:
    part = np.s_[:448, 384:960]  # all of it takes a few seconds more
    planes = [io.read_image(data_dir / "stack-balls" / f"{z:02}.jpg")[part] for z in range(25)]
    result = compose(np.stack(planes), "ZYXS")
    best = np.max([tile_gradient(plane) for plane in planes], axis=0)
    assert (tile_gradient(result.composite) >= 0.95 * best).mean() >= 0.99


@pytest.mark.parametrize("positions", [[], [0, 0, 1], [2, 1], [1, 5], [-1, 0]])
def test_positions_that_are_no_stack_are_refused(positions: list[int]) -> None:
    with pytest.raises(ImageError, match="positions: expected rising indices along Z, from 0 to 4"):
        list(all_in_focus(np.zeros((5, 20, 20), np.uint8), "ZYX", positions=positions))


def test_a_composite_keeps_the_ends_of_a_type() -> None:
    top = np.iinfo(np.uint32).max
    composite = list(all_in_focus(np.full((2, 40, 40), top, np.uint32), "ZYX"))[-1].composite
    assert composite is not None
    assert (composite == top).all()


def test_large_whole_numbers_compose_to_themselves(rng: np.random.Generator) -> None:
    plane = rng.integers(3_999_999_000, 4_000_000_000, (40, 50), np.uint32)
    for n_planes in (1, 3):
        composite = compose(np.stack([plane] * n_planes), "ZYX").composite
        np.testing.assert_array_equal(composite, plane)


def test_a_pixel_beyond_single_precision_spoils_no_other(rng: np.random.Generator) -> None:
    stack = rng.normal(100, 10, (2, 60, 60))
    stack[0, 20, 20] = -1e300
    result = compose(stack, "ZYX")
    assert result.composite.dtype == np.float64
    assert (np.abs(result.composite - 100) < 60).all()


def test_planes_far_along_a_stack_keep_their_index() -> None:
    stack = np.broadcast_to(np.zeros((20, 20), np.uint8), (40_000, 20, 20))
    result = compose(stack, "ZYX", positions=[39_998, 39_999])
    assert result.depth.dtype == np.int32
    assert (result.depth == 39_998).all()
    far = StackFocus()
    far.add(PlaneFocus((39_999,), 1.0, np.ones((1, 1), np.float32)))
    assert far.best_tiles().tolist() == [[39_999]]


def test_what_no_plane_shows_is_nan_and_spreads_no_further(rng: np.random.Generator) -> None:
    stack = rng.normal(100, 10, (3, 60, 60)).astype(np.float32)
    stack[:, 20:30, 20:30] = np.nan
    stack[1, 40, 40] = np.inf
    *_, last = all_in_focus(stack, "ZYX")
    assert last.composite is not None
    expected = np.isfinite(stack).any(axis=0)
    assert np.array_equal(np.isfinite(last.composite), expected)
