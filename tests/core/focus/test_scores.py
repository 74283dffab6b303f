"""Scores against values worked out by hand, other libraries, and properties that blur must have."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import label

from semanticblur_core.errors import ImageError
from semanticblur_core.focus import scores


@pytest.fixture
def quarter_sharp() -> np.ndarray:
    """8 x 8, in focus in one corner of 4 x 4 and in one lone pixel."""
    blur = np.ones((8, 8), np.float32)
    blur[:4, :4] = 0.25
    blur[7, 7] = 0.5
    return blur


def test_fractions_worked_out_by_hand(quarter_sharp: np.ndarray) -> None:
    assert scores.in_focus_fraction(quarter_sharp) == 17 / 64
    assert scores.in_focus_fraction(quarter_sharp, threshold=0.4) == 16 / 64
    assert scores.mean_blur(quarter_sharp) == (16 * 0.25 + 0.5 + 47) / 64
    share, box = scores.largest_in_focus(quarter_sharp)
    assert share == 16 / 64
    assert box == (slice(0, 4), slice(0, 4))


def test_a_region_is_all_that_counts(quarter_sharp: np.ndarray) -> None:
    region = np.zeros((8, 8), bool)
    region[:4, :8] = True
    assert scores.in_focus_fraction(quarter_sharp, region=region) == 0.5
    assert scores.mean_blur(quarter_sharp, region=region) == 0.625
    assert scores.largest_in_focus(quarter_sharp, region=region)[0] == 0.5


def test_an_empty_region_has_no_score(quarter_sharp: np.ndarray) -> None:
    nothing = np.zeros((8, 8), bool)
    assert math.isnan(scores.in_focus_fraction(quarter_sharp, region=nothing))
    assert math.isnan(scores.mean_blur(quarter_sharp, region=nothing))
    share, box = scores.largest_in_focus(quarter_sharp, region=nothing)
    assert math.isnan(share)
    assert box is None


def test_the_centre_weighs_more_than_the_corner() -> None:
    centre, corner = np.ones((2, 60, 80), np.float32)
    centre[25:35, 35:45] = 0
    corner[:10, :10] = 0
    weights = scores.centre_weights(60, 80)
    assert scores.in_focus_fraction(centre, weights=weights) > 5 * scores.in_focus_fraction(
        corner, weights=weights
    )


def test_labels_are_scored_one_by_one(quarter_sharp: np.ndarray) -> None:
    labels = np.zeros((8, 8), np.int32)
    labels[:4, :4] = 3
    labels[:4, 4:] = 7
    found = scores.label_scores(quarter_sharp, labels)
    assert found[3] == {"in_focus_fraction": 1.0, "mean_blur": 0.25, "n_pixels": 16}
    assert found[7] == {"in_focus_fraction": 0.0, "mean_blur": 1.0, "n_pixels": 16}
    assert set(found) == {3, 7}


def test_tiles_of_a_size_that_does_not_divide() -> None:
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    tiles = scores.tile_means(values, 2)
    assert tiles.tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]


def test_tiles_of_no_whole_number_of_pixels_do_not_drift() -> None:
    columns = np.broadcast_to(np.arange(1000), (8, 1000))
    tiles = scores.tile_means(columns, 61.54)[0]
    assert len(tiles) == math.ceil(1000 / 61.54)
    starts = [round(i * 61.54) for i in range(len(tiles))]
    ends = [*starts[1:], 1000]
    expected = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    np.testing.assert_allclose(tiles, expected)
    assert scores.tile_means(columns[:, :5], 4.9).shape == (2, 1)  # no tile begins at the end


def test_tiles_of_a_region() -> None:
    values = np.array([[1, 0, 1, 1], [0, 0, 1, 1]], bool)
    region = np.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
    np.testing.assert_allclose(
        scores.tile_means(values, 2, region=region), [[1 / 3, np.nan]], rtol=1e-6
    )


def test_tile_sizes_in_micrometres() -> None:
    assert scores.tile_size_in_px(20, 0.5) == 40
    assert scores.tile_size_in_px(20, 0.325) == pytest.approx(61.538, abs=1e-3)
    assert scores.tile_size_in_px(0.1, 0.5) == 1
    with pytest.raises(ImageError, match="names no pixel size"):
        scores.tile_size_in_px(20, None)


def test_tiny_images_have_an_answer() -> None:
    one = np.zeros((1, 1), np.float32)
    measured = scores.score_image(one, one)
    assert measured.in_focus_fraction == 1


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_content_is_found_blurred_or_not_on_dark_and_light_ground(
    dark: bool, sigma: float, rng: np.random.Generator
) -> None:
    image = np.zeros((300, 400), np.float32)
    truth = np.zeros(image.shape, bool)
    truth[60:180, 80:220] = truth[200:260, 260:380] = True
    image[truth] = rng.uniform(0.5, 0.9, int(truth.sum()))
    image = ndimage.gaussian_filter(image, sigma) + rng.normal(0, 0.01, image.shape)
    image = (image if dark else 1 - image).astype(np.float32)
    found = scores.content_mask(image)
    assert (found & truth).sum() / (found | truth).sum() > 0.8


def test_an_empty_field_has_no_content() -> None:
    assert not scores.content_mask(np.full((100, 100), 0.3, np.float32)).any()


@pytest.mark.parametrize("shape", [(1, 500), (2, 3000), (700, 1)])
def test_content_of_a_line_is_found(shape: tuple[int, int]) -> None:
    truth = np.resize(np.arange(max(shape)) < 100, shape)
    found = scores.content_mask(truth.astype(np.float32))
    assert np.mean(found == truth) > 0.9


def test_what_stands_out_is_salient(rng: np.random.Generator) -> None:
    image = np.full((120, 160), 0.5, np.float32)
    image[30:50, 100:125] = 1.0
    salient = scores.saliency(image)
    assert salient[25:55, 95:130].mean() > 3 * salient[70:, :80].mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_scores_of_any_map_keep_their_order(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    blur = rng.random(tuple(rng.integers(1, 24, 2)), dtype=np.float32)
    fraction = scores.in_focus_fraction(blur, threshold=threshold)
    largest, _ = scores.largest_in_focus(blur, threshold=threshold)
    assert 0 <= largest <= fraction <= 1
    parts = label(blur <= threshold, connectivity=1)
    biggest = np.bincount(parts.ravel())[1:].max(initial=0)
    assert largest == pytest.approx(biggest / blur.size)
    # Blurring everything more can only lower what is in focus.
    assert scores.in_focus_fraction(np.sqrt(blur), threshold=threshold) <= fraction
    whole = scores.tile_means(blur, 1000)
    assert float(whole[0, 0]) == pytest.approx(scores.mean_blur(blur), abs=1e-6)


def test_wrong_input_is_named() -> None:
    blur = np.zeros((4, 5), np.float32)
    with pytest.raises(ImageError, match=r"\(4, 5\) and \(5, 4\)"):
        scores.mean_blur(blur, region=np.ones((5, 4), bool))
    for scored in (scores.in_focus_fraction, scores.mean_blur, scores.largest_in_focus):
        with pytest.raises(ImageError, match="region: expected bool, got uint8; give region != 0"):
            scored(blur, region=np.ones((4, 5), np.uint8))  # type: ignore[operator]
    with pytest.raises(ImageError, match="expected whole numbers, got float32"):
        scores.label_scores(blur, blur)
    with pytest.raises(ImageError, match="at least 1 px, got 0"):
        scores.tile_means(blur, 0)
