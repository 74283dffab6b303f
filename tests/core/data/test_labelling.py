"""Labels from maps, superpixels, and where to label next."""

import numpy as np
import pytest

from semanticblur_core.data.labelling import labels_of_map, superpixel, uncertain_places
from semanticblur_core.errors import ConfigError, ImageError


def test_only_pixels_that_are_sure_enough_are_labelled() -> None:
    blur = np.array([0, 0.1, 0.3, 0.5, 0.6, 0.9, 1, np.nan], np.float32)
    assert labels_of_map(blur, confidence=0.8).tolist() == [1, 1, 0, 0, 0, 2, 2, 0]
    assert labels_of_map(blur).tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    with pytest.raises(ConfigError, match=r"confidence 0\.3"):
        labels_of_map(blur, confidence=0.3)


@pytest.mark.parametrize("kind", ["rgb8", "grey16", "float"])
def test_a_superpixel_keeps_to_the_edges_of_the_image(kind: str) -> None:
    image = np.full((200, 300), 50, np.uint8)
    image[:, 150:] = 200
    picture = {
        "rgb8": np.repeat(image[..., None], 3, 2),
        "grey16": image.astype(np.uint16) * 30,
        "float": image / 7,
    }[kind]
    for column, side in ((145, np.s_[:, :151]), (155, np.s_[:, 149:])):
        box, mask = superpixel(picture, 100, column, size_px=32)
        whole = np.zeros(image.shape, bool)
        whole[box] = mask
        assert whole[100, column]
        assert whole[side].sum() == whole.sum()
        assert 300 < whole.sum() < 4000


@pytest.mark.parametrize("point", [(0, 0), (199, 299), (0, 150)])
def test_superpixels_reach_the_border(point: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 300), np.uint8)
    (rows, columns), mask = superpixel(image, *point, size_px=20)
    assert mask.shape == (rows.stop - rows.start, columns.stop - columns.start)
    assert mask[point[0] - rows.start, point[1] - columns.start]


def test_a_superpixel_beside_and_amid_pixels_that_are_no_numbers() -> None:
    image = np.random.default_rng(0).random((100, 100))
    image[:, 50:] = np.nan
    box, mask = superpixel(image, 50, 40, size_px=40)
    whole = np.zeros(image.shape, np.bool_)
    whole[box] = mask
    assert whole[50, 40]
    assert whole[:, :50].sum() > 200
    with pytest.raises(ImageError, match="no finite value"):
        superpixel(np.full((300, 300), np.nan), 150, 150, size_px=16)


def test_a_constant_image_and_a_tiny_one_have_superpixels() -> None:
    for shape in ((1, 1), (3, 200), (100, 100)):
        _, mask = superpixel(np.full(shape, 7.0), 0, 0)
        assert mask[0, 0]


def test_places_are_ranked_by_doubt_where_nothing_is_labelled() -> None:
    blur = np.zeros((150, 192), np.float32)
    blur[:64, :64] = 0.5
    blur[64:128, 64:128] = 0.6
    blur[128:, 128:] = 0.5  # a third of a window
    blur[0, 0] = np.nan
    labels = np.zeros(blur.shape, np.uint8)
    places = uncertain_places(blur, labels)
    assert [(place.row, place.column) for place in places] == [(32, 32), (96, 96), (139, 160)]
    assert [place.uncertainty for place in places] == pytest.approx([1, 0.8, 22 / 32], abs=1e-3)
    labels[:64, :64] = 1
    assert uncertain_places(blur, labels)[0].row == 96
    labels[:] = 2
    assert uncertain_places(blur, labels) == []


def test_a_plane_smaller_than_a_window_has_one_place() -> None:
    blur = np.full((20, 30), 0.5, np.float32)
    [place] = uncertain_places(blur, np.zeros((20, 30), np.uint8))
    assert (place.row, place.column, place.uncertainty) == (10, 15, 1)
