"""Planes cut into fields of view: where they lie, what counts of them, verdicts of the whole."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core.errors import ImageError
from semanticblur_core.focus import fields
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.check import FocusOptions, ImageFocus, Source, focus_report
from semanticblur_core.focus.classical import as_grey
from semanticblur_core.focus.fields import (
    COARSE_SIDE_PX,
    coarse_view,
    content_of,
    cut,
    cut_array,
    cuts,
    plane_rows,
)
from semanticblur_core.focus.scores import content_mask
from semanticblur_core.inference.planes import Planes


@pytest.mark.parametrize(("length", "side"), [(1000, 300), (999, 1000), (64, 64), (2049, 512.5)])
def test_parts_are_the_fewest_and_nearly_equal(length: int, side: float) -> None:
    parts = cuts(length, side)
    lengths = [end - first for first, end in parts]
    assert len(parts) == math.ceil(length / side)
    assert (parts[0][0], parts[-1][1], sum(lengths)) == (0, length, length)
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= math.ceil(side)


@pytest.mark.parametrize("side", [0.0, 63.0, math.inf, math.nan])
def test_a_side_that_is_none_is_refused(side: float) -> None:
    with pytest.raises(ImageError, match="at least 64 px"):
        cuts(1000, side)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("axes", ["YX", "YXS"])
def test_a_coarse_view_is_of_means(
    dtype: Any, axes: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "_BAND_PIXELS", 50_000)  # several bands, a last one that is smaller
    shape = (1500, 2 * COARSE_SIDE_PX, 3)[: len(axes)]
    top = np.iinfo(dtype).max
    image = rng.integers(0, top, shape, dtype, endpoint=True)
    planes = Planes(image, axes)
    limits = None if dtype == np.uint8 else planes.as_limits((0, top))
    view = coarse_view(planes.view(()), limits)
    wanted = image.reshape(750, 2, COARSE_SIDE_PX, 2, -1).mean((1, 3)).squeeze() / top
    np.testing.assert_allclose(view, wanted, atol=1e-6)


@pytest.fixture
def slide(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Texture in a quarter of an even background."""
    image = np.full((1024, 1024), 230, np.uint8)
    image[:512, :512] = rng.integers(0, 120, (512, 512))
    return image


def _cut(image: np.ndarray[Any, Any], side: float, *, by_content: bool) -> fields.CutPlane:
    view = coarse_view(Planes(image, "YX").view(()), None)
    return cut(
        "s.tif[C=1]",
        Path("s.tif"),
        (1024, 1024),
        side,
        lambda rows, columns: image[rows, columns],
        content=content_of(view) if by_content else None,
    )


def test_empty_fields_are_left_out_and_content_is_that_of_the_plane(
    slide: np.ndarray[Any, Any],
) -> None:
    plane = _cut(slide, 256, by_content=True)
    assert [source.name for source in plane.sources] == [
        f"s.tif[C=1,y={y},x={x}]" for y in (0, 256) for x in (0, 256)
    ]
    assert plane.n_empty == 12
    # Of a field that is full of it, all is content: alone it would have no background.
    images = [update.image for update in focus_report(plane.sources, None)]
    assert [image.scores.region_fraction for image in images if image.scores] == [1] * 4
    assert len(_cut(slide, 256, by_content=False).sources) == 16


def test_a_field_that_holds_some_content_counts_by_it(slide: np.ndarray[Any, Any]) -> None:
    [source] = _cut(slide, 1024, by_content=True).sources
    assert source.region is not None
    assert source.region().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("end", "n_fields"), [(256, 1), (258, 1), (260, 2), (400, 2)])
def test_slivers_of_content_are_no_fields(end: int, n_fields: int) -> None:
    content = np.zeros((1024, 1024), np.bool_)
    content[:256, :end] = True
    plane = cut("s", Path("s"), (2048, 2048), 512, lambda *_: np.zeros((512, 512)), content=content)
    assert (len(plane.sources), plane.n_empty) == (n_fields, 16 - n_fields)
    regions = [source.region().mean() for source in plane.sources if source.region]
    assert regions == [1, (end - 256) / 256][:n_fields]


@pytest.mark.parametrize("radius", [4, 12])
def test_sparse_content_is_content(radius: int) -> None:
    image = np.full((1024, 1024), 20, np.uint8)
    rows, columns = np.ogrid[:1024, :1024]
    for y, x in ((100, 100), (900, 900)):
        image[np.hypot(rows - y, columns - x) < radius] = 200
    plane = _cut(image, 512, by_content=True)
    assert [source.name for source in plane.sources] == [
        "s.tif[C=1,y=0,x=0]",
        "s.tif[C=1,y=512,x=512]",
    ]


@pytest.mark.parametrize("background", [0.0, 1.0])
@pytest.mark.parametrize("axes", ["YX", "YXS", "CYX"])
def test_pixels_without_a_value_are_no_content(
    background: float, axes: str, rng: np.random.Generator
) -> None:
    grey = np.full((1024, 1024), background, np.float32)
    grey[100:300, 100:300] = rng.uniform(0.3, 0.7, (200, 200))
    grey[400:] = np.nan
    array = {"YX": grey, "YXS": np.stack([grey] * 3, -1), "CYX": np.stack([grey] * 2)}[axes]
    planes = Planes(array, axes, "mean" if axes == "CYX" else "each")
    view = coarse_view(planes.view(()), planes.as_limits((0, 1)))
    assert np.isnan(view[400:]).all()
    content = content_of(view)
    assert content.mean() == pytest.approx(200**2 / 1024**2, rel=0.1)
    assert not content[400:].any()
    images = [
        update.image
        for update in focus_report(
            [Source("a", Path("a"), lambda: grey, value_range=(0, 1))],
            None,
            FocusOptions(region="content"),
        )
    ]
    assert images[0].scores is not None
    assert images[0].scores.region_fraction == pytest.approx(200**2 / 1024**2, rel=0.2)


@pytest.mark.parametrize("side_px", [256, COARSE_SIDE_PX])
def test_tissue_is_content_whatever_part_of_a_mosaic_is_missing(
    side_px: int, rng: np.random.Generator
) -> None:
    image = np.full((1000, 1000), 0.9, np.float32)
    image[:, :410] = rng.normal(0.5, 0.12, (1000, 410))
    image[:, 600:] = np.nan
    content = content_mask(image, side_px=side_px)
    assert content[:, :400].mean() > 0.9
    assert content[:, 420:].mean() < 0.01


def test_an_array_with_pixels_without_a_value(rng: np.random.Generator) -> None:
    image = np.full((256, 256), 0.9, np.float32)
    image[:128, :128] = rng.uniform(0, 0.5, (128, 128))
    image[:128, 64:128][rng.random((128, 64)) < 0.5] = np.nan
    plane = cut_array(image, "YX", 256, value_range=(0, 1), by_content=True)
    [update] = focus_report(plane.sources, None)
    assert update.image.scores is not None
    assert update.image.scores.region_fraction == pytest.approx(0.25 * 0.75, abs=0.02)


def test_where_nothing_has_a_value_nothing_is_content() -> None:
    assert not content_mask(np.full((50, 60), np.nan, np.float32)).any()


def _measured(plane: fields.CutPlane, shares: list[float]) -> list[ImageFocus]:
    """Fields with these shares in focus, judged at one half."""

    class Blurred:
        name = "blurred"

        def detect(self, image: Any, **_: Any) -> Any:
            blur = np.zeros(image.shape[:2], np.float32)
            blur[: round(len(blur) * (1 - shares.pop(0)))] = 1
            return blur

        def iter_planes(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    options = FocusOptions(gates=(Gate("in_focus_fraction", 0.5),))
    return [update.image for update in focus_report(plane.sources, Blurred(), options)]


@pytest.mark.parametrize(("min_fields", "passed"), [(1.0, False), (0.75, True), (0.8, False)])
def test_a_plane_passes_with_so_many_of_its_fields(
    slide: np.ndarray[Any, Any], min_fields: float, passed: bool
) -> None:
    plane = _cut(slide, 256, by_content=True)
    images = _measured(plane, [1, 1, 0.75, 0.25])
    [row] = plane_rows([plane], images, min_fields=min_fields, gated=True)
    assert (row["n_fields"], row["n_fields_passed"], row["passed"]) == (4, 3, passed)
    assert row["in_focus_fraction"] == pytest.approx(0.75)
    assert row["mean_blur"] == pytest.approx(0.25)


def test_fields_weigh_by_what_counts_of_them(slide: np.ndarray[Any, Any]) -> None:
    slide[512:576, :256] = slide[:64, :256]  # a field of which a quarter is content
    plane = _cut(slide, 256, by_content=True)
    images = _measured(plane, [1, 1, 1, 1, 0])
    [row] = plane_rows([plane], images, min_fields=1, gated=True)
    assert row["in_focus_fraction"] == pytest.approx(4 / 4.25, abs=0.02)


def test_fields_weigh_by_their_size() -> None:
    plane = cut(
        "s", Path("s"), (300, 100), 200, lambda rows, columns: np.zeros((150, 100), np.uint8)
    )
    images = _measured(plane, [1, 0])
    images[1] = replace(images[1], height=50)
    [row] = plane_rows([plane], images, min_fields=1, gated=True)
    assert row["in_focus_fraction"] == pytest.approx(0.75)


@pytest.mark.parametrize(("share", "n"), [(0.35, 20), (0.7, 10), (0.55, 100), (0.29, 100)])
def test_a_share_of_fields_is_kept_exactly(share: float, n: int) -> None:
    plane = cut("s", Path("s"), (100 * n, 100), 100, lambda *_: np.zeros((100, 100), np.uint8))
    n_passed = round(share * n)
    images = _measured(plane, [1.0] * n_passed + [0.0] * (n - n_passed))
    [row] = plane_rows([plane], images, min_fields=share, gated=True)
    assert row["passed"]
    [row] = plane_rows([plane], images, min_fields=share + 1e-9, gated=True)
    assert not row["passed"]


def test_what_is_unreadable_or_missing_passes_nothing(slide: np.ndarray[Any, Any]) -> None:
    plane = _cut(slide, 256, by_content=True)
    images = _measured(plane, [1, 1, 1, 1])
    damaged = [*images[:3], replace(images[3], scores=None, error="damaged", passed=False)]
    for some, n_unreadable in ((damaged, 1), (images[:3], 0)):
        for gated in (True, False):
            [row] = plane_rows([plane], some, min_fields=0.5, gated=gated)
            assert (row["passed"], row["n_fields_unreadable"]) == (False, n_unreadable)


def test_a_plane_without_content_keeps_no_gate() -> None:
    plane = _cut(np.full((1024, 1024), 200, np.uint8), 256, by_content=True)
    assert (plane.sources, plane.n_empty) == ([], 16)
    [row] = plane_rows([plane], [], min_fields=0, gated=True)
    assert (row["passed"], row["in_focus_fraction"]) == (False, None)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_array_is_cut_on_one_scale(dtype: Any, rng: np.random.Generator) -> None:
    array = rng.integers(0, 200, (2, 300, 200)).astype(dtype)
    array[1, :150] //= 2  # a field that is darker stays so
    plane = cut_array(array, "ZYX", 150, at=(1,), value_range=(0, 200))
    upper, lower = (
        np.mean(
            [as_grey(source.read()).mean() for source in plane.sources[i : i + 2] if source.read]
        )
        for i in (0, 2)
    )
    assert upper == pytest.approx(lower / 2, rel=0.05)
    images = [update.image for update in focus_report(plane.sources, None)]
    assert [image.error for image in images] == [None] * 4
    darker, other = (image.scores.tenengrad for image in images[::2] if image.scores)
    assert darker == pytest.approx(other / 4, rel=0.1)
