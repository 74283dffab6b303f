"""Classical maps tell sharp from blurred, and agree with their authors' maps."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from semanticblur_core import io
from semanticblur_core.data.focal_stack import focal_stack
from semanticblur_core.errors import ConfigError
from semanticblur_core.focus.classical import ClassicalDetector


@pytest.mark.parametrize("method", ["hifst", "lbp", "dbdf"])
def test_the_blurred_half_is_told_from_the_sharp_one(method: str) -> None:
    image = focal_stack(n_planes=1, size_px=200, largest_radius_px=0.1).images[0]
    soft = gaussian_filter(image.astype(float), 4)
    image[:, 100:] = soft[:, 100:].astype(np.uint8)
    blur = ClassicalDetector(method).detect(image)
    assert blur.shape == image.shape
    assert blur.dtype == np.float32
    assert 0 <= blur.min() <= blur.max() <= 1
    assert blur[:, 120:].mean() > blur[:, :80].mean() + 0.2
    flipped = ClassicalDetector(method).detect(image[:, ::-1].copy())[:, ::-1]
    assert np.corrcoef(blur.ravel(), flipped.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("method", ["hifst", "lbp", "dbdf"])
def test_a_constant_image_has_a_map(method: str) -> None:
    blur = ClassicalDetector(method).detect(np.full((60, 70), 128, np.uint8))
    assert np.isfinite(blur).all()
    assert blur.min() > 0.5


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of network, hifst, lbp, dbdf"):
        ClassicalDetector("magic")


def test_hifst_is_that_of_its_authors(data_dir: Path) -> None:
    photos = {path.stem: path for path in (data_dir / "cuhk-tr1" / "images").iterdir()}
    maps = sorted((data_dir / "hifst-tr1").glob("*.png"))[::8]
    correlations = []
    for path in maps:
        blur = ClassicalDetector("hifst").detect(io.read_rgb8(photos[path.stem]))
        published = 1 - io.read_map(path)  # white = sharp there
        correlations.append(np.corrcoef(blur.ravel(), published.ravel())[0, 1])
    assert len(correlations) == 5
    assert min(correlations) > 0.97
