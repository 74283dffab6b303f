"""Blur maps and masks, to files and back through napari's plugin engine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from napari.layers import Image

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


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize("shape", [(5, 40, 50), (1, 40, 50), (2, 3, 40, 50), (7, 40, 4)])
def test_a_stack_of_maps_comes_back_with_what_was_not_analysed(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    blur = np.random.default_rng(0).random(shape).astype(np.float32)
    blur[0, ..., :5, :] = np.nan
    path = str(tmp_path / f"stack_blur{suffix}")
    _io.write_map(path, blur, {})
    [(data, _, _)] = _io.read_maps(path)
    np.testing.assert_array_equal(data, blur.reshape(data.shape))
    assert data.ndim == blur.ndim or shape[0] == 1  # a TIFF does not count axes of one


def test_a_tif_keeps_the_pixel_size_and_the_names_of_the_axes(tmp_path: Path) -> None:
    blur = np.random.default_rng(0).random((3, 40, 50)).astype(np.float32)
    layer = Image(
        blur, scale=(2, -0.5, 250), units=("um", "um", "nm"), axis_labels=("z", "y", "x"),
        translate=(3, 4, 500),
    )  # fmt: skip
    path = tmp_path / "cells_blur.tif"
    _io.write_map(str(path), *layer.as_layer_data_tuple()[:2])
    [(data, attributes, _)] = _io.read_maps(str(path))
    np.testing.assert_array_equal(data, blur)
    assert attributes["scale"] == [2.0, 0.5, 0.25]
    assert attributes["translate"] == [3.0, 0.0, 0.5]  # of what is mirrored no file holds the place
    assert attributes["units"] == ["um", "um", "um"]
    assert attributes["axis_labels"] == ["z", "y", "x"]
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
    _io.write_map(str(path), blur, {"scale": (2, 1, 1), "units": ("pixel",) * 3})
    assert "scale" not in _io.read_maps(str(path))[0][1]


def test_maps_of_the_command_open(tmp_path: Path, random_weights: Path) -> None:
    stack = np.zeros((3, 50, 60), np.uint16)
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "um"}
    source = tmp_path / "s.ome.tif"
    tifffile.imwrite(source, stack, metadata=metadata)
    command = [sys.executable, "-m", "semanticblur_core", "detect", f"--input={source}"]
    command += [f"--output={tmp_path}", "--format=zarr,tif", f"--model={random_weights}"]
    subprocess.run([*command, "--size=64", "--device=cpu"], check=True, timeout=120)
    written = sorted(tmp_path.glob("*_blur.*"))
    assert [path.suffix for path in written] == [".tif", ".zarr"]
    for path in written:
        reader = _io.get_reader(str(path))
        assert reader is not None
        [(data, attributes, _)] = reader(str(path))
        assert data.shape == stack.shape
        assert attributes["scale"] == [1.0, 1.0, 0.5]
        assert attributes["units"] == ["pixel", "pixel", "um"]


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
    with pytest.raises(DataError, match="label 7 is neither sharp"):
        _io.write_mask(path, np.array([[7, 2]], np.uint16), {})
    with pytest.raises(ImageError, match="was not analysed"):
        _io.write_map(path, np.array([[np.nan, 0.5]], np.float32), {})
    with pytest.raises(ImageError, match="holds one plane"):
        _io.write_map(path, np.zeros((3, 4, 5), np.float32), {})
    with pytest.raises(ImageError, match=r"in 0\.\.1, got 0\.\.2"):
        _io.write_map(path, np.array([[0, 2]], np.float32), {})
    with pytest.raises(ImageError, match="expected a blur map of floats, got uint8"):
        _io.write_map(path, np.zeros((4, 5), np.uint8), {})
    assert not list(tmp_path.iterdir())
