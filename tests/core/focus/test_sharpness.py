"""Classical scores against other libraries, made images, and what blur must do to them."""

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import data
from skimage.filters import sobel_h, sobel_v
from skimage.measure import blur_effect

from semanticblur_core.focus import sharpness
from semanticblur_core.focus.classical import grey
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return grey(data.astronaut())


def test_classical_scores_agree_with_other_libraries(photo: np.ndarray) -> None:
    cv2 = pytest.importorskip("cv2")
    as_cv = cv2.Laplacian(photo.astype(np.float64), cv2.CV_64F, borderType=cv2.BORDER_REPLICATE)
    assert sharpness.variance_of_laplacian(photo) == pytest.approx(as_cv.var(), rel=1e-4)
    # scikit-image divides its Sobel by 4, and this package's by 8, a unit gradient being 1.
    inside = np.s_[1:-1, 1:-1]
    square = (sobel_h(photo) ** 2 + sobel_v(photo) ** 2)[inside].mean() / 4
    assert sharpness.tenengrad_map(photo)[inside].mean() == pytest.approx(square, rel=1e-4)
    assert sharpness.blur_effect(photo) == pytest.approx(blur_effect(photo), abs=1e-6)


def test_a_ramp_has_the_gradient_it_was_made_with() -> None:
    ramp = np.tile(np.arange(20, dtype=np.float32) * 0.01, (20, 1))
    assert sharpness.tenengrad_map(ramp)[5, 5] == pytest.approx(1e-4, rel=1e-4)


def test_the_slope_of_made_spectra_is_found(rng: np.random.Generator) -> None:
    side = 256
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    for slope in (-1.0, -2.0, -3.0):
        found = []
        for _ in range(6):
            white = np.fft.fft2(rng.standard_normal((side, side)))
            made = np.fft.ifft2(white * frequency ** (slope / 2)).real.astype(np.float32)
            found.append(sharpness.spectrum_slope(made))
        assert np.mean(found) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("name", ["variance_of_laplacian", "tenengrad", "normalised_variance",
                                  "spectrum_slope", "blur_effect"])  # fmt: skip
def test_more_blur_is_a_worse_score(name: str, photo: np.ndarray) -> None:
    sign = 1 if HIGHER_IS_SHARPER[name] else -1
    found = [
        sign * getattr(sharpness, name)(ndimage.gaussian_filter(photo, sigma))
        for sigma in (0.0, 1.0, 2.0, 4.0)
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_constant_and_tiny_images_have_an_answer() -> None:
    constant = np.full((40, 40), 0.5, np.float32)
    assert sharpness.variance_of_laplacian(constant) == 0
    assert sharpness.tenengrad(constant) == 0
    assert math.isnan(sharpness.spectrum_slope(constant))
    assert math.isnan(sharpness.spectrum_slope(np.full((50, 70), 0.3, np.float32)))
    assert math.isnan(sharpness.blur_effect(constant))
    assert math.isnan(sharpness.spectrum_slope(np.zeros((4, 40), np.float32)))
    assert sharpness.normalised_variance(np.zeros((4, 4), np.float32)) == 0


@pytest.mark.parametrize("shape", [(4, 9), (7, 300), (64, 5), (65, 20), (70, 64), (130, 33)])
def test_strips_leave_no_trace(shape: tuple[int, int], rng: np.random.Generator) -> None:
    image = rng.random(shape, dtype=np.float32)
    exact = image.astype(np.float64)
    laplacian = ndimage.laplace(exact, mode="nearest")
    assert sharpness.variance_of_laplacian(image) == pytest.approx(laplacian.var(), rel=1e-5)
    squares = sum((ndimage.sobel(exact, axis, mode="nearest") / 8) ** 2 for axis in (0, 1))
    np.testing.assert_allclose(sharpness.tenengrad_map(image), squares, atol=1e-6)
    assert sharpness.tenengrad(image) == pytest.approx(squares.mean(), rel=1e-5)
    assert sharpness.blur_effect(image) == pytest.approx(blur_effect(exact), abs=1e-5)


def test_stripes_are_blurred_along_themselves() -> None:
    stripes = np.tile(np.arange(40, dtype=np.float32) % 2, (40, 1))
    assert sharpness.blur_effect(stripes) == blur_effect(stripes) == 1
