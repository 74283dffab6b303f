"""The generated stack is as sharp where it says so."""

import numpy as np
from scipy.ndimage import gaussian_filter, laplace

from semanticblur_core.data.focal_stack import focal_stack


def test_detail_falls_with_the_circle_of_confusion() -> None:
    stack = focal_stack(n_planes=5, size_px=128)
    assert stack.images.shape == stack.radius_px.shape == stack.blurred.shape == (5, 128, 128)
    detail = gaussian_filter(laplace(stack.images.astype(float), axes=(1, 2)) ** 2, (0, 6, 6))
    for column in range(8, 120, 16):
        order = np.argsort(stack.radius_px[:, 0, column])
        energies = detail[order, :, column].mean(axis=1)
        assert energies[0] > 2 * energies[-1]
    np.testing.assert_array_equal(stack.blurred, stack.radius_px > 2)


def test_a_seed_gives_the_same_stack() -> None:
    first, second = focal_stack(n_planes=2, size_px=64), focal_stack(n_planes=2, size_px=64)
    np.testing.assert_array_equal(first.images, second.images)
    assert (focal_stack(n_planes=2, size_px=64, seed=1).images != first.images).any()
