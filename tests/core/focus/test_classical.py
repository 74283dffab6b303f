"""Hand-crafted maps: against literal transcriptions, skimage, the authors' maps, and properties."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage
from skimage import data
from skimage.feature import local_binary_pattern

from semanticblur_core import Detector
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus import classical
from semanticblur_core.focus.classical import ClassicalDetector
from semanticblur_core.inference.planes import DetectUpdate

METHODS = ("hifst", "lbp", "dbdf")


@pytest.fixture(scope="module")
def half_blurred() -> np.ndarray:
    """A photograph whose right half is out of focus."""
    photo = data.coffee()[:240, :320].copy()
    blurred = ndimage.gaussian_filter(photo, (5, 5, 0))
    photo[:, 160:] = blurred[:, 160:]
    return photo


@pytest.mark.parametrize("method", METHODS)
def test_the_blurred_half_is_found(method: str, half_blurred: np.ndarray) -> None:
    blur = ClassicalDetector(method).detect(half_blurred)
    assert (blur.shape, blur.dtype) == ((240, 320), np.float32)
    assert 0 <= blur.min() <= blur.max() <= 1
    left, right = blur[:, :120], blur[:, 200:]
    assert np.median(right) > np.median(left) + 0.3


@pytest.mark.parametrize("method", METHODS)
def test_any_shape_and_type_gives_a_map(method: str) -> None:
    rng = np.random.default_rng(0)
    detector = ClassicalDetector(method)
    for image in (
        rng.integers(0, 255, (1, 1), dtype=np.uint8),
        rng.integers(0, 255, (5, 90, 4), dtype=np.uint8),
        rng.integers(0, 60000, (33, 20), dtype=np.uint16),
        rng.random((17, 18, 3)),
        np.full((40, 50), 7, np.int16),
    ):
        blur = detector.detect(image)
        assert blur.shape == image.shape[:2]
        assert np.isfinite(blur).all()
        assert 0 <= blur.min() <= blur.max() <= 1
    assert (detector.detect(np.full((40, 50), 9, np.uint8)) > 0.9).all()


def test_high_frequencies_are_those_of_the_equation(rng: np.random.Generator) -> None:
    gradient = rng.random((40, 45)).astype(np.float32)
    layers = classical._hifst_layers(gradient, 4)
    padded = np.pad(gradient, 31)
    for y, x in ((0, 0), (20, 16), (36, 44)):
        coefficients: list[float] = []
        for size in (7, 15, 31, 63):
            top, left = y + 31 - size // 2, x + 31 - size // 2
            patch = padded[top : top + size, left : left + size].astype(np.float64)
            transform = fft.dctn(patch, norm="ortho")
            coefficients += [
                abs(transform[v, u]) for v in range(size) for u in range(size) if v + u >= size - 1
            ]
        expected = sorted(coefficients)[: 7 + 15 + 31 + 63 + 1]
        np.testing.assert_allclose(layers[y // 4, x // 4], expected, atol=2e-5)


def test_the_smallest_are_found_however_they_lie(rng: np.random.Generator) -> None:
    values = rng.random((50, 2660), dtype=np.float32)
    values[10:20] = np.sort(values[10:20], axis=1)
    values[20:30, 100:290] *= 0.001
    values[30] = 0.5
    found = classical._smallest(values, 117)
    np.testing.assert_array_equal(found, np.sort(values, axis=1)[:, :117])


def test_entropy_is_that_of_the_histogram(rng: np.random.Generator) -> None:
    image = rng.random((20, 23)).astype(np.float32) ** 4
    found = classical._local_entropy(image, 1)
    levels = np.pad(np.round(image * 255).astype(int), 3, mode="symmetric")
    for y, x in ((0, 0), (7, 9), (19, 22)):
        counts = np.unique(levels[y : y + 7, x : x + 7], return_counts=True)[1] / 49
        assert found[y, x] == pytest.approx(-(counts * np.log2(counts)).sum(), abs=1e-5)


def test_patterns_are_those_of_scikit_image(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = rng.integers(0, 2**31, (60, 70), dtype=np.int64)
    image = (levels / 2**31).astype(np.float32)
    plain = local_binary_pattern(levels, 8, 1, "uniform") >= 6
    windows = [ndimage.uniform_filter(plain.astype(float), size) for size in (11, 15, 21)]
    monkeypatch.setattr(classical, "LBP_THRESHOLD", 0.0)
    found = classical.lbp_sharpness(image)
    # scikit-image takes what lies beyond the border for black.
    inside = np.s_[12:-12, 12:-12]
    np.testing.assert_allclose(found[inside], np.mean(windows, axis=0)[inside], atol=3e-3)


def test_changes_below_the_threshold_are_no_pattern(rng: np.random.Generator) -> None:
    faint = (0.5 + 0.007 * rng.random((40, 40))).astype(np.float32)
    assert classical.lbp_sharpness(faint).max() == 0
    assert classical.lbp_sharpness(10 * (faint - 0.4)).max() > 0.3


def test_the_domain_transform_keeps_edges_and_means(rng: np.random.Generator) -> None:
    guide = np.zeros((60, 80), np.float32)
    guide[:, 40:] = 1
    noisy = (guide + rng.normal(0, 0.2, guide.shape)).astype(np.float32)
    smooth = classical.domain_transform(noisy, guide)
    assert smooth[:, :40].std() < 0.05
    assert smooth[:, 45:].mean() - smooth[:, :35].mean() == pytest.approx(1, abs=0.1)
    constant = np.full((9, 7), 0.3, np.float32)
    np.testing.assert_allclose(
        classical.domain_transform(constant, guide[:9, 37:44]), 0.3, rtol=1e-5
    )


def test_large_images_are_analysed_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(classical, "MAX_ANALYSIS_PIXELS", 5000)
    monkeypatch.setattr(classical, "lbp", lambda image: seen.append(image.shape) or image)
    assert ClassicalDetector("lbp").detect(np.zeros((200, 100), np.uint8)).shape == (200, 100)
    assert seen == [(100, 50)]


def test_the_interface_is_that_of_the_network(half_blurred: np.ndarray) -> None:
    detector = ClassicalDetector("lbp")
    stack = np.stack([half_blurred, half_blurred[:, ::-1]])
    updates = list(detector.iter_planes(stack, "ZYXS", indices=[(1,)]))
    assert [(u.index, u.n_done, u.n_total, u.plane_done) for u in updates] == [((1,), 1, 1, True)]
    assert isinstance(updates[0], DetectUpdate)
    np.testing.assert_array_equal(updates[0].blur, detector.detect(stack[1]))
    for name in ("detect", "iter_planes"):
        assert callable(getattr(Detector, name))


def test_wrong_input_is_named() -> None:
    with pytest.raises(ConfigError, match="expected one of network, hifst, lbp, dbdf"):
        ClassicalDetector("sobel")
    with pytest.raises(ImageError, match=r"got shape \(3, 4, 5, 6\)"):
        ClassicalDetector("lbp").detect(np.zeros((3, 4, 5, 6)))
    with pytest.raises(ImageError, match="no pixels"):
        ClassicalDetector("lbp").detect(np.zeros((0, 4)))


def test_hifst_agrees_with_its_authors_maps(data_dir: Path) -> None:
    published = sorted((data_dir / "hifst-tr1").glob("*.png"))
    assert len(published) == 40
    correlations = []
    for path in published:
        white_is_sharp = np.asarray(Image.open(path), np.float64)
        photo = np.asarray(Image.open(data_dir / "cuhk-tr1" / "images" / f"{path.stem}.jpg"))
        blur = ClassicalDetector("hifst").detect(photo)
        correlations.append(np.corrcoef(-blur.ravel(), white_is_sharp.ravel())[0, 1])
    assert np.mean(correlations) >= 0.95
