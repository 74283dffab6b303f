"""Layers become arrays with axes, and results lie where their pixels came from."""

from typing import Any

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Image, Labels

from napari_semanticblur._annotation_source import shown_plane
from napari_semanticblur._layers import (
    axis_letters,
    coarse_level,
    find_result,
    plane_index,
    read_source,
    result_placement,
    show_plane,
    slider_index,
    visible_region,
)
from semanticblur_core.errors import ImageError

# napari shows such layers, and says that it cannot slice them exactly.
pytestmark = pytest.mark.filterwarnings("ignore:Non-orthogonal slicing:UserWarning")

TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": (2, 0.5, 0.25)},
    "flip": {"scale": (1, -1, 1)},
    "translate": {"translate": (5, -7, 11)},
    "rotate": {"rotate": (10, 20, 30)},
    "shear": {"shear": (0.1, 0.2, 0.3)},
    "affine": {"affine": np.array([[1, 0, 0, 3], [0, 0, 1, 4], [0, -1, 0.2, 5], [0, 0, 0, 1]])},
    "units": {"units": ("second", "micrometer", "micrometer"), "axis_labels": ("t", "y", "x")},
    "all": {
        "scale": (2, -0.5, 0.25),
        "translate": (5, -7, 11),
        "rotate": (10, 20, 30),
        "shear": (0.1, 0.2, 0.3),
        "affine": np.array([[1, 0, 0, 3], [0, 0, 1, 4], [0, -1, 0.2, 5], [0, 0, 0, 1]]),
    },
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_whole_result_has_the_source_s_transforms(name: str) -> None:
    layer = Image(np.zeros((4, 40, 50)), **TRANSFORMS[name])
    placed = Labels(
        np.zeros((4, 40, 50), np.uint8), **result_placement(read_source(layer), (0, 0, 0))
    )
    for attribute in ("scale", "translate", "rotate", "shear"):
        np.testing.assert_allclose(getattr(placed, attribute), getattr(layer, attribute))
    np.testing.assert_allclose(placed.affine.affine_matrix, layer.affine.affine_matrix)
    assert (placed.units, placed.axis_labels) == (layer.units, layer.axis_labels)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_single_plane_lies_at_its_place_in_the_stack(name: str) -> None:
    layer = Image(np.zeros((4, 40, 50)), **TRANSFORMS[name])
    placed = Labels(
        np.zeros((1, 40, 50), np.uint8), **result_placement(read_source(layer), (2, 0, 0))
    )
    assert placed.ndim == layer.ndim
    for pixel in ((0, 0, 0), (0, 39, 0), (0, 7, 49)):
        in_stack = (pixel[0] + 2, *pixel[1:])
        np.testing.assert_allclose(
            placed.data_to_world(pixel), layer.data_to_world(in_stack), atol=1e-9
        )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_coarse_level_covers_the_same_area(name: str) -> None:
    levels = [np.zeros((4, 80, 100)), np.zeros((4, 40, 50)), np.zeros((4, 10, 10))]
    layer = Image(levels, multiscale=True, **TRANSFORMS[name])
    source = read_source(layer, level=1)
    assert source.factors == (1, 2, 2)
    placement = result_placement(source, (0, 0, 0))
    np.testing.assert_allclose(placement["scale"], np.asarray(layer.scale) * (1, 2, 2))
    placed = Labels(np.zeros((4, 40, 50), np.uint8), **placement)
    for corner in ((0, -0.5, -0.5), (0, 39.5, 49.5), (3, 39.5, -0.5)):
        fine = (corner[0], corner[1] * 2 + 0.5, corner[2] * 2 + 0.5)
        np.testing.assert_allclose(
            placed.data_to_world(corner), layer.data_to_world(fine), atol=1e-9
        )


def test_rgb_loses_its_samples_and_nothing_else() -> None:
    layer = Image(np.zeros((3, 40, 50, 3)), rgb=True, scale=(2, 0.5, 0.5), translate=(1, 2, 3))
    source = read_source(layer)
    assert (source.axes, source.layer_axes) == ("ZYXS", "ZYX")
    placement = result_placement(source, (0, 0, 0))
    np.testing.assert_allclose(placement["scale"], (2, 0.5, 0.5))


@pytest.mark.parametrize(
    ("labels", "rgb", "axes"),
    [
        (("y", "x"), False, "YX"),
        (("-2", "-1"), True, "YXS"),
        (("-3", "-2", "-1"), False, "ZYX"),
        (("c", "z", "y", "x"), False, "CZYX"),
        (("time", "channel", "depth", "y", "x"), False, "TCDYX"),
        (("-5", "-4", "-3", "-2", "-1"), False, "TCZYX"),
        (("x", "y", "z"), False, "ZYX"),
        (("t", "t", "y", "x"), False, "TZYX"),
        (("slice", "y", "x"), False, "ZYX"),
        (("slice", "c", "y", "x"), False, "ZCYX"),
        (("time", "tile", "channel", "y", "x"), False, "TZCYX"),
        (("cycle", "round", "y", "x"), False, "ZRYX"),
        (("c", "channel", "z", "y", "x"), False, "CTZYX"),
        (("-5", "ch", "-3", "-2", "-1"), False, "ZCTYX"),
    ],
)
def test_axis_labels_become_letters(labels: tuple[str, ...], rgb: bool, axes: str) -> None:
    assert axis_letters(labels, rgb=rgb) == axes


def test_the_plane_shown_is_found_through_transforms() -> None:
    viewer = ViewerModel()
    layer = viewer.add_image(np.zeros((5, 40, 50)), scale=(3, 1, 1), translate=(100, 0, 0))
    source = read_source(layer)
    for z in (0, 2, 4):
        viewer.dims.set_point(0, 100 + 3 * z)
        assert plane_index(source, viewer, source.planes()) == (z,)
    other = viewer.add_image(np.zeros((40, 50)))
    assert plane_index(read_source(other), viewer, read_source(other).planes()) == ()


TILTED: dict[str, dict[str, Any]] = {
    **TRANSFORMS,
    "y follows z": {"affine": np.eye(4) + 1.5 * np.eye(4)[[1]].T @ np.eye(4)[[0]]},
    "z follows y": {"affine": np.eye(4) + 0.3 * np.eye(4)[[0]].T @ np.eye(4)[[1]]},
    "z mirrored": {"scale": (-2, 1, 1)},
}


def planes_of_their_number(n_planes: int) -> np.ndarray:
    return np.broadcast_to(np.arange(n_planes, dtype=np.uint8)[:, None, None], (n_planes, 40, 50))


def number_shown(layer: Any) -> int:
    """Of `planes_of_their_number`: what napari has sliced for the canvas."""
    [number] = np.unique(np.asarray(layer._slice.image.raw)).tolist()
    return int(number)


@pytest.mark.parametrize("name", TILTED)
def test_the_plane_analysed_is_the_one_that_napari_shows(name: str) -> None:
    viewer = ViewerModel()
    layer = viewer.add_image(planes_of_their_number(9), **TILTED[name])
    labels = viewer.add_labels(np.zeros((9, 40, 50), np.uint8), **TILTED[name])
    source = read_source(layer)
    start, stop, _ = viewer.dims.range[0]
    n_shown = 0
    for point in np.linspace(start, stop, 25):
        viewer.dims.set_point(0, float(point))
        [z] = slider_index(source, viewer, source.planes())
        # What is painted on is that plane too.
        assert shown_plane(viewer, labels) == ((z,) if 0 <= z < 9 else None)
        if 0 <= z < 9:
            n_shown += 1
            assert number_shown(layer) == z
        else:
            with pytest.raises(ImageError, match="nothing of it is shown"):
                plane_index(source, viewer, source.planes())
    assert n_shown > 3
    show_plane(source, viewer, source.planes(), (6,))
    assert number_shown(layer) == 6


def test_half_steps_are_rounded_as_napari_does() -> None:
    viewer = ViewerModel()
    layer = viewer.add_image(planes_of_their_number(9))
    for half in (0.5, 1.5, 2.5, 3.5, 6.5):
        viewer.dims.set_point(0, half)
        source = read_source(layer)
        assert plane_index(source, viewer, source.planes()) == (number_shown(layer),)


def test_sliders_in_other_units_than_the_layer_s() -> None:
    viewer = ViewerModel()
    if not hasattr(viewer.dims, "units"):
        pytest.skip("layers of this napari do not share units")
    layer = viewer.add_image(planes_of_their_number(9), scale=(2, 1, 1), units=("um",) * 3)
    viewer.add_image(np.zeros((9, 40, 50)), scale=(2000, 1000, 1000), units=("nm",) * 3)
    source = read_source(layer)
    show_plane(source, viewer, source.planes(), (7,))
    assert number_shown(layer) == 7
    assert plane_index(source, viewer, source.planes()) == (7,)


def test_axes_without_names_have_those_of_the_sliders() -> None:
    viewer = ViewerModel()
    layer = viewer.add_image(np.zeros((2, 3, 40, 50)))
    viewer.add_image(np.zeros((5, 2, 3, 40, 50)))
    viewer.dims.axis_labels = ("t", "c", "z", "y", "x")
    assert read_source(layer, viewer=viewer).axes == "CZYX"
    assert read_source(layer).axes == "TZYX"
    layer.axis_labels = ("z", "c", "y", "x")
    assert read_source(layer, viewer=viewer).axes == "ZCYX"


def test_layers_that_cannot_be_analysed_are_refused() -> None:
    with pytest.raises(ImageError, match="expected an image layer, got Labels"):
        read_source(Labels(np.zeros((9, 9), np.uint8)))  # type: ignore[arg-type]


def test_the_level_is_the_coarsest_that_is_large_enough() -> None:
    levels = [np.zeros((n, n)) for n in (1600, 800, 400)]
    layer = Image(levels, multiscale=True)
    assert [coarse_level(layer, at_least_px=n) for n in (300, 401, 1024, 5000)] == [2, 1, 0, 0]
    assert coarse_level(Image(levels[0]), at_least_px=5) == 0


def test_the_visible_region_is_what_the_canvas_shows() -> None:
    viewer = ViewerModel()
    layer = viewer.add_image(np.zeros((200, 300)))
    layer.corner_pixels = np.array([[10, 20], [60, 90]])
    assert visible_region(read_source(layer), viewer) == (slice(10, 61), slice(20, 91))
    viewer.dims.order = (1, 0)
    assert visible_region(read_source(layer), viewer) is None


def test_results_are_found_by_their_source_not_their_name() -> None:
    viewer = ViewerModel()
    first = viewer.add_image(np.zeros((9, 9)), name="a")
    second = viewer.add_image(np.zeros((9, 9)), name="b")
    record = {"kind": "map", "source_id": str(first.unique_id)}
    result = viewer.add_image(np.zeros((9, 9)), name="renamed", metadata={"semanticblur": record})
    assert find_result(viewer, first, "map") is result
    assert find_result(viewer, first, "labels") is None
    assert find_result(viewer, second, "map") is None
