"""Planes of an array that grows are measured once, judged and drawn as often as wanted."""

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from scipy import ndimage

from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus.calibration import Gate, calibrate
from semanticblur_core.focus.check import FocusOptions
from semanticblur_core.focus.classical import ClassicalDetector
from semanticblur_core.focus.report import to_row, write_html
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER
from semanticblur_core.focus.session import ArrayFocus
from semanticblur_core.inference.planes import Planes


def stack(n_planes: int = 7, peak: int = 4, dtype: Any = np.uint8) -> np.ndarray:
    scene = np.random.default_rng(0).random((64, 96)) * np.iinfo(dtype).max
    return np.stack(
        [ndimage.gaussian_filter(scene, 0.5 + abs(z - peak)) for z in range(n_planes)]
    ).astype(dtype)


def check(session: ArrayFocus, array: Any, axes: str = "ZYX", **options: Any) -> list[tuple]:
    """Indices of the planes that were measured."""
    session.adopt(array, axes)
    detector = options.pop("detector", None)
    done = []
    for update in session.check(array, axes, detector, FocusOptions(tile_size_px=32), **options):
        session.add(update)
        done.append(update.index)
    return done


def lazy(array: np.ndarray, read: list[int]) -> Any:
    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        read.append(z)
        return array[z : z + 1]

    n, *rest = array.shape
    return da.map_blocks(plane, chunks=((1,) * n, *((m,) for m in rest)), dtype=array.dtype)


@pytest.mark.parametrize("as_lazy", [False, True])
def test_a_grown_stack_has_only_its_new_planes_measured(as_lazy: bool) -> None:
    whole, read = stack(), list[int]()
    session = ArrayFocus("s")
    short = lazy(whole[:3], read) if as_lazy else whole[:3].copy()
    assert check(session, short) == [(0,), (1,), (2,)]
    read.clear()
    long = lazy(whole, read) if as_lazy else whole
    assert check(session, long) == [(3,), (4,), (5,), (6,)]
    assert sorted(set(read)) == ([3, 4, 5, 6] if as_lazy else [])
    curve = session.curve("tenengrad")
    assert curve is not None
    assert curve.best == 4
    assert check(session, long) == []


@pytest.mark.parametrize("as_lazy", [False, True])
def test_another_array_is_measured_anew(as_lazy: bool) -> None:
    session = ArrayFocus("s")
    make = (lambda a: lazy(a, [])) if as_lazy else (lambda a: a)
    check(session, make(stack()))
    other = make(stack(peak=1))
    assert len(check(session, other)) == 7
    assert len(check(session, make(stack(5)))) == 5
    assert len(check(session, make(stack(5).astype(np.float32)))) == 5
    with pytest.raises(ImageError, match="expected 2 different letters"):
        session.adopt(np.zeros((4, 5)), "ZYX")


def test_a_longer_array_of_other_pixels_is_no_growth() -> None:
    session = ArrayFocus("s")
    check(session, stack(5))
    assert len(check(session, stack(7, peak=2))) == 7


def test_new_planes_are_on_the_scale_of_the_first() -> None:
    """A faint plane that came later would look sharp if it were stretched by itself."""
    whole = stack(dtype=np.uint16)
    whole[-1] = 30_000 + whole[4] // 10
    session = ArrayFocus("s")
    check(session, whole[:5].copy())
    check(session, whole)
    tenengrad = [image.scores.tenengrad for _, image in session.judged([]) if image.scores]
    assert tenengrad[-1] == pytest.approx(tenengrad[4] / 100, rel=0.2)


def test_channels_that_come_later_are_measured() -> None:
    whole = np.stack([stack(dtype=np.uint16), stack(dtype=np.uint16) // 10], axis=1)
    session = ArrayFocus("s")
    check(session, whole[:, :1].copy(), "ZCYX")
    assert len(check(session, whole, "ZCYX")) == 7
    assert [image.error for _, image in session.judged([])] == [None] * 14
    curves = [session.curve("tenengrad", (channel,)) for channel in (0, 1)]
    assert [curve.best for curve in curves if curve] == [4, 4]


def test_a_score_that_is_none_is_named() -> None:
    session = ArrayFocus("s", path="folder/s.tif")
    assert session.path == Path("folder/s.tif")
    for ask in (session.curve, session.stack, session.values):
        with pytest.raises(ConfigError, match="score 'nosuch': expected one of in_focus_fraction,"):
            ask("nosuch")
    with pytest.raises(ConfigError, match="heat: expected one of in_focus, tenengrad"):
        session.heat_map("nosuch")  # type: ignore[arg-type]


def test_gates_are_judged_anew_without_measuring() -> None:
    session = ArrayFocus("s")
    check(session, stack(), detector=ClassicalDetector("lbp"))
    values = [image.scores.tenengrad for _, image in session.judged([]) if image.scores]
    passed = [image.passed for _, image in session.judged([Gate("tenengrad", max(values))])]
    assert passed == [z == 4 for z in range(7)]
    assert all(image.passed for _, image in session.judged([]))


@pytest.mark.parametrize("score", ["tenengrad", "mean_blur", "in_focus_fraction", "blur_effect"])
def test_the_curve_of_any_score_peaks_at_the_sharp_plane(score: str) -> None:
    session = ArrayFocus("s")
    check(session, stack(), detector=ClassicalDetector("lbp"))
    curve = session.curve(score)
    assert curve is not None
    assert curve.best == 4
    turn = max if HIGHER_IS_SHARPER[score] else min
    assert curve.scores[4] == turn(curve.scores)
    values = [image.scores.to_dict()[score] for _, image in session.judged([]) if image.scores]
    assert list(curve.scores) == values


def test_heat_maps_hold_the_planes_that_are_known() -> None:
    array = stack()[None].repeat(2, axis=0)
    session = ArrayFocus("s")
    assert check(session, array, "TZYX", indices=[(1, 4), (0, 0)]) == [(1, 4), (0, 0)]
    heat = session.heat_map("tenengrad")
    assert heat.shape == (2, 7, 2, 3)
    known = np.isfinite(heat).all(axis=(2, 3))
    assert [tuple(i) for i in np.argwhere(known)] == [(0, 0), (1, 4)]
    assert heat[1, 4].mean() > 4 * heat[0, 0].mean()
    assert session.curve("tenengrad", (1,)) is not None
    assert session.curve("mean_blur", (1,)) is None  # there was no map
    with pytest.raises(ImageError, match="checked with a map"):
        session.heat_map("in_focus")


def test_a_single_image_has_scores_and_no_curve(tmp_path: Path) -> None:
    session = ArrayFocus("photo")
    assert check(session, stack()[4], "YX") == [()]
    ((index, image),) = session.judged([])
    assert (index, image.name) == ((), "photo")
    assert session.curve("tenengrad") is None
    assert session.heat_map("tenengrad").shape == (2, 3)
    write_html(tmp_path / "r.html", [image], {"description": "one", "gated": False})
    assert '"photo"' in (tmp_path / "r.html").read_text()
    assert to_row(image)["mean_blur"] is None


def test_a_plane_that_cannot_be_read_is_named() -> None:
    def fails(block_info: Any = None) -> np.ndarray:
        if block_info[None]["chunk-location"][0] == 1:
            raise OSError("torn tape")
        return np.zeros((1, 64, 64), np.uint8)

    array = da.map_blocks(fails, chunks=((1,) * 3, (64,), (64,)), dtype=np.uint8)
    session = ArrayFocus("tape")
    check(session, array)
    errors = [image.error for _, image in session.judged([])]
    assert [error is None for error in errors] == [True, False, True]
    assert "torn tape" in (errors[1] or "")


def test_a_calibration_is_for_the_same_way_of_measuring() -> None:
    base = dict.fromkeys(HIGHER_IS_SHARPER, 0.5)
    made = [[{**base, "mean_blur": v}] * 2 for v in (0.1, 0.9)]
    of_map = calibrate(*made, protocol={"method": "lbp", "value_range": None})
    assert of_map.gate_for({"method": "lbp", "value_range": None}) == Gate("mean_blur", 0.5)
    with pytest.raises(ConfigError, match="measured with method lbp, this run has network"):
        of_map.gate_for({"method": "network", "value_range": None})
    made = [[{**base, "tenengrad": v}] * 2 for v in (0.9, 0.1)]
    classical = calibrate(*made, protocol={"method": "lbp", "value_range": None})
    assert classical.gate_for({"method": "network"}) == Gate("tenengrad", 0.5)


def test_a_plane_that_could_not_be_read_is_tried_again() -> None:
    broken = {1}

    def plane(block_info: Any = None) -> np.ndarray:
        if block_info[None]["chunk-location"][0] in broken:
            raise OSError("torn tape")
        return np.zeros((1, 64, 64), np.uint8)

    array = da.map_blocks(plane, chunks=((1,) * 3, (64,), (64,)), dtype=np.uint8)
    session = ArrayFocus("tape")
    assert check(session, array) == [(0,), (1,), (2,)]
    assert session.missing(Planes(array, "ZYX")) == [(1,)]
    broken.clear()
    assert check(session, array) == [(1,)]
    assert session.is_known((1,))
    assert check(session, array) == []
