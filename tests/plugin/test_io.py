"""Blur maps and masks, to files and back through napari's plugin engine."""

from pathlib import Path

import numpy as np
import pytest

from napari_semanticblur import _io
from semanticblur_core import io
from semanticblur_core.errors import DataError, ImageError


@pytest.mark.parametrize(("suffix", "tolerance"), [(".tif", 0), (".npy", 0), (".png", 0.5 / 255)])
def test_a_map_comes_back(tmp_path: Path, suffix: str, tolerance: float) -> None:
    blur = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    path = str(tmp_path / f"cat_blur{suffix}")
    assert _io.write_map(path, blur, {}) == [path]
    reader = _io.get_reader(path)
    assert reader is not None
    [(data, attributes, kind)] = reader(path)
    np.testing.assert_allclose(data, blur, atol=tolerance + 1e-7)
    assert (kind, attributes["name"], attributes["contrast_limits"]) == (
        "image",
        "cat_blur",
        (0, 1),
    )


def test_only_files_named_as_maps_are_read() -> None:
    assert _io.get_reader("cat.png") is None
    assert _io.get_reader(["a_blur.png", "b.png"]) is None


def test_labels_are_written_as_a_mask(tmp_path: Path) -> None:
    codes = np.array([[1, 2], [2, 1]], np.uint8)
    path = tmp_path / "mask.png"
    assert _io.write_mask(str(path), codes, {}) == [str(path)]
    np.testing.assert_array_equal(io.read_mask(path), codes == 2)


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "x_blur.png")
    with pytest.raises(DataError, match="50% of the pixels are unlabelled"):
        _io.write_mask(path, np.array([[0, 2]], np.uint8), {})
    with pytest.raises(ImageError, match="holds one plane"):
        _io.write_map(path, np.zeros((3, 4, 5), np.float32), {})
    with pytest.raises(ImageError, match=r"in 0\.\.1, got 0\.\.2"):
        _io.write_map(path, np.array([[0, 2]], np.float32), {})
    with pytest.raises(ImageError, match="expected a blur map of floats, got uint8"):
        _io.write_map(path, np.zeros((4, 5), np.uint8), {})
    assert not list(tmp_path.iterdir())
