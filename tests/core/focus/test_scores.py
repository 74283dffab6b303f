"""Scores against values worked out by hand, other libraries, and properties that blur must have."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import data
from skimage.filters import sobel_h, sobel_v
from skimage.measure import blur_effect, label

from semanticblur_core.errors import ImageError
from semanticblur_core.focus import scores
from semanticblur_core.focus.classical import grey


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return grey(data.astronaut())


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


def test_tile_sizes_in_micrometres() -> None:
    assert scores.tile_size_in_px(20, 0.5) == 40
    assert scores.tile_size_in_px(0.1, 0.5) == 1
    with pytest.raises(ImageError, match="names no pixel size"):
        scores.tile_size_in_px(20, None)


def test_classical_scores_agree_with_other_libraries(photo: np.ndarray) -> None:
    cv2 = pytest.importorskip("cv2")
    as_cv = cv2.Laplacian(photo.astype(np.float64), cv2.CV_64F, borderType=cv2.BORDER_REPLICATE)
    assert scores.variance_of_laplacian(photo) == pytest.approx(as_cv.var(), rel=1e-4)
    # scikit-image divides its Sobel by 4, and this package's by 8, a unit gradient being 1.
    inside = np.s_[1:-1, 1:-1]
    square = (sobel_h(photo) ** 2 + sobel_v(photo) ** 2)[inside].mean() / 4
    assert scores.tenengrad_map(photo)[inside].mean() == pytest.approx(square, rel=1e-4)
    assert scores.blur_effect(photo) == pytest.approx(blur_effect(photo), abs=1e-6)


def test_a_ramp_has_the_gradient_it_was_made_with() -> None:
    ramp = np.tile(np.arange(20, dtype=np.float32) * 0.01, (20, 1))
    assert scores.tenengrad_map(ramp)[5, 5] == pytest.approx(1e-4, rel=1e-4)


def test_the_slope_of_made_spectra_is_found(rng: np.random.Generator) -> None:
    side = 256
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    for slope in (-1.0, -2.0, -3.0):
        found = []
        for _ in range(6):
            white = np.fft.fft2(rng.standard_normal((side, side)))
            made = np.fft.ifft2(white * frequency ** (slope / 2)).real.astype(np.float32)
            found.append(scores.spectrum_slope(made))
        assert np.mean(found) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("name", ["variance_of_laplacian", "tenengrad", "normalised_variance",
                                  "spectrum_slope", "blur_effect"])  # fmt: skip
def test_more_blur_is_a_worse_score(name: str, photo: np.ndarray) -> None:
    sign = 1 if scores.HIGHER_IS_SHARPER[name] else -1
    found = [
        sign * getattr(scores, name)(ndimage.gaussian_filter(photo, sigma))
        for sigma in (0.0, 1.0, 2.0, 4.0)
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_constant_and_tiny_images_have_an_answer() -> None:
    constant = np.full((40, 40), 0.5, np.float32)
    assert scores.variance_of_laplacian(constant) == 0
    assert scores.tenengrad(constant) == 0
    assert math.isnan(scores.spectrum_slope(constant))
    assert math.isnan(scores.blur_effect(constant))
    assert math.isnan(scores.spectrum_slope(np.zeros((4, 40), np.float32)))
    assert scores.normalised_variance(np.zeros((4, 4), np.float32)) == 0
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
    with pytest.raises(ImageError, match="expected whole numbers, got float32"):
        scores.label_scores(blur, blur)
    with pytest.raises(ImageError, match="at least 1 px, got 0"):
        scores.tile_means(blur, 0)
