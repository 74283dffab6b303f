"""Tiles cover the plane, add up to one, and the map does not depend on how they are walked."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semanticblur_core import Detector, SemanticBlur
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.tiling import TileGrid


@given(st.integers(1, 300), st.integers(1, 300), st.integers(33, 90), st.floats(0, 0.5))
def test_weights_add_up_to_one(height: int, width: int, tile: int, overlap: float) -> None:
    grid = TileGrid(height, width, tile, int(tile * overlap))
    total = np.zeros((height, width), np.float64)
    for part in grid:
        weights = grid.weights(part)
        assert weights.shape == grid.tile_shape == total[part.rows, part.columns].shape
        assert (weights > 0).all()
        total[part.rows, part.columns] += weights
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert len(list(grid)) == len(grid)


@given(st.integers(34, 500), st.integers(33, 90), st.floats(0, 0.5))
def test_neighbours_overlap_as_much_as_asked(length: int, tile: int, share: float) -> None:
    overlap = int(tile * share)
    starts = TileGrid(length, 33, tile, overlap).row_starts
    assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (64, 33), (64, -1)])
def test_impossible_grids_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"tile (size|overlap): expected"):
        TileGrid(100, 100, tile, overlap)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(3)
    return Detector(SemanticBlur(), device="cpu", precision="float32")


def test_strips_and_any_order_give_one_map(detector: Detector, rng: np.random.Generator) -> None:
    image = rng.random((150, 131, 3)).astype(np.float32)
    grid = TileGrid(150, 131, 64, 20)

    def read(rows: slice, columns: slice) -> np.ndarray:
        return image[rows, columns]

    maps = []
    for visible in (None, (slice(100, None), slice(None, 40))):
        blur = np.zeros((150, 131), np.float32)
        for tile, part in detector.iter_tiles(read, grid, visible=visible):
            blur[tile.rows, tile.columns] += part
        maps.append(blur)
    strips = list(detector.iter_strips(read, grid))
    assert [rows.start for rows, _ in strips] == [0, *(rows.stop for rows, _ in strips[:-1])]
    maps.append(np.concatenate([blur for _, blur in strips]))
    assert maps[0].shape == maps[2].shape
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-6)
    np.testing.assert_allclose(maps[2], maps[0], atol=1e-6)
    assert 0 <= maps[0].min() <= maps[0].max() <= 1


def test_rounding_lifts_no_map_above_one(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        detector, "_run", lambda images: np.ones(images.shape[:3], np.float32), raising=True
    )
    grid, image = TileGrid(290, 331, 64, 20), np.zeros((290, 331), np.uint8)
    plain = np.zeros((290, 331), np.float32)
    for tile, part in detector.iter_tiles(lambda r, c: image[r, c], grid):
        plain[tile.rows, tile.columns] += part
    assert plain.max() > 1  # so that there is something to round
    *_, update = detector.iter_planes(image, "YX", size="native", tile_size_px=64, overlap_px=20)
    strips = [blur for _, blur in detector.iter_strips(lambda r, c: image[r, c], grid)]
    for blur in (update.blur, np.concatenate(strips)):
        assert blur.max() == 1
        assert blur.min() > 1 - 1e-6


def test_visible_tiles_come_first(detector: Detector) -> None:
    grid = TileGrid(33, 200, 40, 0)
    image = np.zeros((33, 200), np.float32)
    visible = (slice(None), slice(150, 200))
    tiles = [
        tile for tile, _ in detector.iter_tiles(lambda r, c: image[r, c], grid, visible=visible)
    ]
    assert [tile.column for tile in tiles] == [3, 4, 0, 1, 2]


def test_one_tile_is_the_whole_image(detector: Detector, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (70, 90, 3), np.uint8)
    [update] = detector.iter_planes(image, "YXS", size="native")
    np.testing.assert_array_equal(update.blur, detector.detect(image, size="native"))
    with pytest.raises(ImageError, match="at least 33 x 33 px, got 20 x 90"):
        list(detector.iter_planes(image[:20], "YXS", size="native"))
