"""Upsampling along edges, and as torch does it."""

import numpy as np
import pytest
import torch
from skimage.data import chelsea
from torch.nn import functional as F

from semanticblur_core.data.squash import squash
from semanticblur_core.inference.upsampling import (
    upsample_bilinear,
    upsample_guided,
    upsample_nearest,
)


def test_a_boundary_follows_the_image() -> None:
    """A slanted edge: the small map knows it to a pixel of 10, the guided one to one of 1."""
    rows, columns = np.mgrid[:600, :800]
    truth = columns > 300 + rows / 3
    image = np.where(truth, 180, 60).astype(np.uint8)[..., None].repeat(3, 2)
    small = squash(image, 60, 80)
    blur = squash(np.where(truth, 242, 13).astype(np.uint8)[..., None].repeat(3, 2), 60, 80)[..., 0]
    guided = upsample_guided(blur, small, image)
    assert (guided.shape, guided.dtype) == ((600, 800), np.float32)
    wrong_guided = np.mean((guided > 0.5) != truth)
    wrong_bilinear = np.mean((upsample_bilinear(blur, (600, 800)) > 0.5) != truth)
    assert wrong_guided < 0.0005 < wrong_bilinear
    assert np.abs(guided - truth)[:, :200].max() < 0.08


def test_flat_and_constant_images_give_a_smooth_map(rng: np.random.Generator) -> None:
    blur = rng.random((32, 32), np.float32)
    for pixels in (np.zeros((100, 90), np.uint8), np.ones((100, 90, 3), np.float32)):
        small = np.zeros((32, 32, 3), np.float32) + pixels.max()
        guided = upsample_guided(blur, small, pixels)
        assert np.isfinite(guided).all()
        assert 0 <= guided.min() <= guided.max() <= 1
    certain = upsample_guided(np.ones((32, 32), np.float32), small, np.ones((99, 99), np.float32))
    assert certain.min() > 0.999


@pytest.mark.parametrize("chunk", [1, 451 * 7])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = chelsea()
    small = squash(image, 128, 128)
    blur = small[..., 1].copy()
    whole = upsample_guided(blur, small, image)
    monkeypatch.setattr("semanticblur_core.inference.upsampling._CHUNK_PIXELS", chunk)
    np.testing.assert_array_equal(upsample_guided(blur, small, image), whole)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch rounds twice here"
)
def test_nearest_is_that_of_torch(rng: np.random.Generator) -> None:
    """At the boundaries of pixels too, where the last bit decides."""
    lengths = [(40, 820), (256, 5248), (18, 963), *rng.integers(1, 700, (300, 2)).tolist()]
    lengths += [(320, n) for n in range(1, 2000, 7)]
    for n_in, n_out in lengths:
        blur = np.arange(2 * n_in, dtype=np.float32).reshape(2, n_in)
        for small, shape in ((blur, (3, n_out)), (blur.T.copy(), (n_out, 3))):
            wanted = F.interpolate(torch.from_numpy(small)[None, None], shape, mode="nearest-exact")
            np.testing.assert_array_equal(upsample_nearest(small, shape), wanted[0, 0].numpy())
