"""A focal stack whose truth is known: one scene, focused at one depth after another."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class FocalStack(NamedTuple):
    """A generated stack.

    Attributes
    ----------
    images
        ``(Z, H, W)`` uint8.
    radius_px
        ``(Z, H, W)`` float32, radius of the circle of confusion.
    blurred
        ``(Z, H, W)`` bool, the radius is above ``blurred_above_px``.
    """

    images: NDArray[np.uint8]
    radius_px: NDArray[np.float32]
    blurred: NDArray[np.bool_]


def focal_stack(
    *,
    n_planes: int = 11,
    size_px: int = 256,
    largest_radius_px: float = 8.0,
    blurred_above_px: float = 2.0,
    seed: int = 0,
    kind: Literal["discs", "cells"] = "discs",
    noise: float = 1.5,
) -> FocalStack:
    """A textured slope, near at the left and far at the right, focused from left to right.

    The circle of confusion grows with the distance from the plane in focus. A pixel takes its value
    from the scene convolved with the disc of its own radius, so nothing occludes anything.

    Parameters
    ----------
    n_planes, size_px
        Number of planes and side of each.
    largest_radius_px
        Radius at the right edge when the left edge is in focus.
    blurred_above_px
        Radius from which a pixel counts as blurred.
    seed
        Of the texture.
    kind
        ``discs`` of all sizes, or grainy ``cells`` on an even ground as in a bright-field
        microscope.
    noise
        Standard deviation of the camera's noise in grey levels; 20 is a dim image.
    """
    rng = np.random.default_rng(seed)
    scene = _texture(size_px, rng) if kind == "discs" else _cells(size_px, rng)
    depth = np.linspace(0, 1, size_px, dtype=np.float32)
    radii = np.linspace(0, largest_radius_px, 33)
    blurred = np.stack([_defocus(scene, radius) for radius in radii])
    images = np.empty((n_planes, size_px, size_px), np.uint8)
    radius = np.empty((n_planes, size_px, size_px), np.float32)
    columns = np.arange(size_px)
    for z, focus in enumerate(np.linspace(0, 1, n_planes)):
        here = np.abs(depth - focus) * largest_radius_px
        position = here / largest_radius_px * (len(radii) - 1)
        low = np.minimum(position.astype(int), len(radii) - 2)
        share = position - low
        plane = blurred[low, :, columns] * (1 - share)[:, None]
        plane += blurred[low + 1, :, columns] * share[:, None]
        noisy = plane.T + rng.normal(0, noise, (size_px, size_px))
        images[z] = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
        radius[z] = here
    return FocalStack(images, radius, radius > blurred_above_px)


def _texture(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Discs of all sizes over each other, grey levels 20 to 235."""
    rows, columns = np.mgrid[:size, :size]
    scene = np.full((size, size), 128.0)
    for radius in np.geomspace(size / 8, 1.5, 900):
        row, column = rng.uniform(0, size, 2)
        scene[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = rng.uniform(20, 235)
    return scene


def _cells(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Ellipses of 8 to 26 px with a dark rim and grain inside, grey levels 40 to 205."""
    scene = np.full((size, size), 0.8)
    rows, columns = np.mgrid[:size, :size]
    for _ in range(round(90 * (size / 480) ** 2)):
        row, column = rng.uniform(0, size, 2)
        a, b, turn = rng.uniform(10, 26), rng.uniform(8, 16), rng.uniform(0, np.pi)
        u = (columns - column) * np.cos(turn) + (rows - row) * np.sin(turn)
        v = (rows - row) * np.cos(turn) - (columns - column) * np.sin(turn)
        reach = (u / a) ** 2 + (v / b) ** 2
        scene = np.where(reach < 1, scene * rng.uniform(0.6, 0.85), scene)
        scene = np.where((reach > 0.85) & (reach < 1), scene * 0.7, scene)
    grain = ndimage.gaussian_filter(rng.standard_normal((size, size)), 0.8)
    scene = scene * (1 + 0.25 * grain / grain.std() * (scene < 0.75))
    grey: NDArray[np.float64] = np.clip(scene, 0.1, 1) * 255
    return grey


def _defocus(scene: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Convolution with a disc whose rim is antialiased."""
    from scipy.signal import fftconvolve

    if radius < 0.25:
        return scene
    reach = int(np.ceil(radius + 1))
    offsets = np.arange(-reach, reach + 1)
    distance = np.hypot(offsets[:, None], offsets[None])
    disc = np.clip(radius + 0.5 - distance, 0, 1)
    padded = np.pad(scene, reach, mode="reflect")
    blurred: NDArray[np.float64] = fftconvolve(padded, disc / disc.sum(), mode="valid")
    return blurred
