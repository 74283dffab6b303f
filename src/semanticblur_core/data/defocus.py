"""Synthetic defocus: partly blurred images with exact masks, made from sharp ones.

Two layers are blurred by the circle of confusion (CoC) of their depth and composited in linear
light: a back layer whose radius may vary from place to place, and a front layer (an object mask)
of one radius, whose edge is mixed with what lies behind it as a lens mixes it. A sharp front layer
leaves no halo, because the back layer is blurred without the pixels the object hides
(normalised convolution).

**What counts as blurred.** A pixel is blurred where the radius of its circle of confusion is above
`BLURRED_RADIUS_PX` (1 pixel, at the size the network sees). Pixels between `DOUBTFUL_RADIUS_PX`,
and those inside the soft edge of a defocused front layer, are left unlabelled: people disagree
about them. In microscopy, empty background of a partly defocused image is neither sharp nor blurred
and unlabelled too.
"""

from __future__ import annotations

import io as streams
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core import io
from semanticblur_core.config import SHARP_SHARE
from semanticblur_core.data.datasets import list_images, stem_of
from semanticblur_core.data.transforms import resize_bytes
from semanticblur_core.errors import DataError

BLURRED_RADIUS_PX = 1.0
DOUBTFUL_RADIUS_PX = (0.6, 1.5)
MAX_RADIUS_PX = 16.0
GAMMA = 2.2
# Of what is not wholly sharp.
_BLURRED_SHARE, _DEPTH_SHARE = 0.12 / 0.86, 0.26 / 0.86
_LEVELS_PX = (0.6, 1.0, 1.5, 2.2, 3.2, 5.0, 8.0, 12.0, 16.0)
_CONTENT_CONTRAST = 0.06
_CONTENT_REACH_PX = 9

Kind = Literal["photograph", "microscopy"]
_Map = NDArray[np.float32]


class Example(NamedTuple):
    """A batch of synthetic images.

    ``image`` is ``(N, 3, S, S)`` float32 in 0..1 as a camera would store it; ``blurred``
    ``(N, 1, S, S)`` bool; ``labelled`` ``(N, 1, S, S)`` bool, False where the truth is in doubt;
    ``radius_px`` ``(N, 1, S, S)`` float32, radius of the circle of confusion.
    """

    image: Tensor
    blurred: Tensor
    labelled: Tensor
    radius_px: Tensor


def aperture_kernels(
    radius_px: Tensor, *, n_blades: Tensor, rotation_rad: Tensor, size_px: int
) -> Tensor:
    """Point spread functions of a defocused lens, each of sum 1.

    Parameters
    ----------
    radius_px
        ``(N,)`` radius of the circle of confusion; 0 gives a point. Of a polygon, its
        circumscribed circle's.
    n_blades
        ``(N,)`` int, sides of the aperture; below 3 it is a disc.
    rotation_rad
        ``(N,)`` turn of the polygon.
    size_px
        Odd side of the kernels.

    Returns
    -------
    Tensor
        ``(N, size_px, size_px)`` float32; edges are antialiased, so that radii of fractions of a
        pixel differ.
    """
    axis = torch.arange(size_px, device=radius_px.device, dtype=torch.float32) - size_px // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = torch.hypot(x, y)
    angle = torch.atan2(y, x) - rotation_rad[:, None, None]
    sector = 2 * math.pi / n_blades.clamp(min=3)[:, None, None]
    to_middle = torch.remainder(angle, sector) - sector / 2
    polygon = distance * torch.cos(to_middle) / torch.cos(sector / 2)
    reach = torch.where(n_blades[:, None, None] < 3, distance, polygon)
    kernels = (radius_px[:, None, None] + 0.5 - reach).clamp(0, 1)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def blur_levels(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image with each of its kernels, edges mirrored.

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float32.
    kernels
        ``(N, K, P, P)``, P odd.

    Returns
    -------
    Tensor
        ``(N, K, C, H, W)`` float32.
    """
    pad = kernels.shape[-1] // 2
    height, width = images.shape[-2:]
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    # Lengths of small prime factors; on a GPU each other length also costs a plan of its own.
    shape = [next_fast_len(side, real=True) for side in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=shape)
    transfer = torch.fft.rfft2(kernels, s=shape)
    blurred = torch.fft.irfft2(spectrum[:, None] * transfer[:, :, None], s=shape)
    # The kernel's centre lies at (pad, pad), which shifts the result by as much.
    result: Tensor = blurred[..., 2 * pad : 2 * pad + height, 2 * pad : 2 * pad + width]
    return result


def defocus(
    back: Tensor,
    radius_px: Tensor,
    *,
    front: Tensor | None = None,
    alpha: Tensor | None = None,
    hidden: Tensor | None = None,
    front_radius_px: Tensor | None = None,
    n_blades: Tensor | None = None,
    rotation_rad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Blur two layers by their depth and composite them, in linear light.

    Parameters
    ----------
    back
        ``(N, 3, H, W)`` linear intensities.
    radius_px
        ``(N, 1, H, W)`` radius of the circle of confusion of the back layer, at most 16.
    front, alpha
        ``(N, 3, H, W)`` and ``(N, 1, H, W)`` in 0..1: the layer before it and where it is.
    hidden
        ``(N, 1, H, W)`` in 0..1: where ``back`` shows the object rather than what is behind it,
        and must not leak into the blurred background.
    front_radius_px
        ``(N,)`` radius of the front layer.
    n_blades, rotation_rad
        Aperture, as in `aperture_kernels`; None is a disc.

    Returns
    -------
    tuple of Tensor
        The image ``(N, 3, H, W)`` and the share of the front layer in each pixel ``(N, 1, H, W)``.

    Notes
    -----
    The back layer is interpolated between versions of radius 0, 0.6, 1, 1.5, 2.2, 3.2, 5, 8, 12 and
    its largest: dense where a pixel turns blurred, so that little of a sharper version shines
    through.
    """
    n = len(back)
    device = back.device
    if n_blades is None:
        n_blades = torch.zeros(n, dtype=torch.long, device=device)
    if rotation_rad is None:
        rotation_rad = torch.zeros(n, device=device)
    largest = radius_px.amax(dim=(1, 2, 3))
    reach = float(largest.max())
    n_below = sum(level < reach for level in _LEVELS_PX)
    steps = torch.tensor(_LEVELS_PX[: n_below + 1], device=device)
    levels = torch.minimum(steps, largest[:, None])
    if front_radius_px is not None:
        reach = max(reach, float(front_radius_px.max()))
    if reach > MAX_RADIUS_PX:
        raise ValueError(f"radius_px: at most {MAX_RADIUS_PX}, got {reach:.1f}")
    size = 2 * math.ceil(reach + 1) + 1
    kernels = aperture_kernels(
        levels.reshape(-1),
        n_blades=n_blades.repeat_interleave(len(steps)),
        rotation_rad=rotation_rad.repeat_interleave(len(steps)),
        size_px=size,
    ).view(n, len(steps), size, size)
    seen = torch.ones_like(back[:, :1]) if hidden is None else 1 - hidden
    # What is hidden everywhere around still needs some value.
    seen = seen.clamp(min=1e-3)
    layers = torch.cat([back * seen, seen], dim=1)
    blurred = blur_levels(layers, kernels)
    stack = torch.cat([layers[:, None], blurred], dim=1)
    stack = stack[:, :, :3] / stack[:, :, 3:].clamp(min=1e-6)
    image = stack[:, 0]
    edges = F.pad(levels, (1, 0))[:, :, None, None]
    weights = (radius_px - edges[:, :-1]) / edges.diff(dim=1).clamp(min=1e-6)
    for k, weight in enumerate(weights.clamp(0, 1).unbind(dim=1), start=1):
        image = torch.lerp(image, stack[:, k], weight[:, None])
    if front is None or alpha is None or front_radius_px is None:
        return image, torch.zeros_like(seen)
    front_kernels = aperture_kernels(
        front_radius_px, n_blades=n_blades, rotation_rad=rotation_rad, size_px=size
    )
    over = blur_levels(torch.cat([front * alpha, alpha], dim=1), front_kernels[:, None])[:, 0]
    share = over[:, 3:].clamp(0, 1)
    return image * (1 - share) + over[:, :3], share


def is_held_out(name: str) -> bool:
    """Whether a sharp image is kept out of training, by its name stem: about one in eight."""
    # Names of files that are not UTF-8 hold surrogates.
    return zlib.crc32(name.encode(errors="surrogatepass")) % 8 == 0


class SharpImages:
    """Sharp images, and masks of an object in some of them, decoded once.

    Parameters
    ----------
    images
        Files of sharp images.
    masks
        Folder of object masks (255 or True = object) named as the images; not every image needs
        one.
    kind
        What they are; microscopy is defocused in linear light without gamma and stretched like a
        16-bit image.
    """

    def __init__(
        self, images: Sequence[Path], *, masks: Path | None = None, kind: Kind = "photograph"
    ) -> None:
        if not images:
            raise DataError("no sharp images given")
        self.kind = kind
        self.paths = list(images)
        self._images: list[Tensor] = []
        self._masks: dict[int, Tensor] = {}
        by_stem = {stem_of(p): p for p in list_images(masks)} if masks is not None else {}
        for i, path in enumerate(self.paths):
            rgb = io.read_rgb8(path)
            self._images.append(torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))))
            if (stem := stem_of(path)) in by_stem:
                mask = io.read_mask(by_stem[stem])
                if mask.shape != rgb.shape[:2]:
                    raise DataError(f"{by_stem[stem]}: not of the size of {path}")
                self._masks[i] = torch.from_numpy(mask[None].astype(np.uint8) * 255)
        self.with_mask = sorted(self._masks)

    def at_least(self, side_px: float) -> list[int]:
        """Indices of the images no side of which is shorter."""
        return [i for i, image in enumerate(self._images) if min(image.shape[-2:]) >= side_px]

    def __len__(self) -> int:
        return len(self._images)

    def crop(
        self, index: int, size_px: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """A random part of an image at ``size_px``, and its object mask; uint8.

        Enlarged by no more than a quarter where the image has 0.8 times as many pixels a side, so
        that it stays sharp.
        """
        image, mask = self._images[index], self._masks.get(index)
        height, width = image.shape[-2:]
        box = []
        scale = rng.uniform(0.65, 1)
        for full in (height, width):
            side = min(full, max(round(full * scale), round(size_px * 0.8)))
            start = int(rng.integers(0, full - side + 1))
            box.append(slice(start, start + side))
        flip = rng.random() < 0.5
        upright = self.kind == "photograph" or rng.random() < 0.5

        def cut(tensor: Tensor) -> Tensor:
            part = tensor[:, box[0], box[1]]
            part = part.flip(-1) if flip else part
            part = part if upright else part.transpose(-1, -2)
            return resize_bytes(part, (size_px, size_px))

        return cut(image), None if mask is None else cut(mask)


def synthesise(
    sources: SharpImages,
    n: int,
    size_px: int,
    rng: np.random.Generator,
    device: torch.device | str = "cpu",
    *,
    sharp_share: float = SHARP_SHARE,
) -> Example:
    """Draw a batch of images of random defocus.

    Parameters
    ----------
    sources
        Where the sharp images come from.
    n, size_px
        Images in the batch and their side in pixels.
    rng
        Source of all randomness.
    device
        Where to compute; only what is cut out and resized, and the JPEG step, is on the CPU.
    sharp_share
        Share of images that are wholly sharp, in 0..1.

    Returns
    -------
    Example

    Notes
    -----
    Of what is not wholly sharp 14 % is wholly blurred; of photographs 30 % vary smoothly in depth,
    and the rest have an object or a random shape before a background at another depth. Microscopy
    varies in depth instead. Radii are log-uniform between 1.5 and 12 pixels.
    """
    large = sources.at_least(0.8 * size_px)
    if not large:
        raise DataError(f"no sharp image has sides of at least {0.8 * size_px:.0f} px")
    with_mask = sorted(set(large) & set(sources.with_mask))
    drawn = [_draw(sources, large, with_mask, size_px, rng, sharp_share) for _ in range(n)]
    back, front = (
        torch.stack([getattr(scene, name) for scene in drawn]).to(device).float() / 255
        for name in ("back", "front")
    )
    alpha, hidden, radius = (
        torch.from_numpy(np.stack([getattr(scene, name) for scene in drawn])).to(device)
        for name in ("alpha", "hidden", "radius_px")
    )
    front_radius = torch.tensor([scene.front_radius_px for scene in drawn], device=device)
    blades, rotation = _draw_apertures(n, rng, device)
    gamma = GAMMA if sources.kind == "photograph" else 1.0
    linear_back, linear_front = back**gamma, front**gamma
    if gamma != 1:
        # Clipped highlights were brighter than they look; only so do they become bokeh.
        boost = torch.from_numpy(rng.choice([0.0, 0.0, 1.0, 4.0], n)).float().to(device)
        boost = boost[:, None, None, None]
        linear_back, linear_front = (
            x * (1 + boost * ((x - 0.85) / 0.15).clamp(0, 1)) for x in (linear_back, linear_front)
        )
    image, share = defocus(
        linear_back,
        radius,
        front=linear_front,
        alpha=alpha,
        hidden=hidden,
        front_radius_px=front_radius,
        n_blades=blades,
        rotation_rad=rotation,
    )
    coc = torch.where(share > 0.5, front_radius[:, None, None, None], radius)
    low, high = DOUBTFUL_RADIUS_PX
    labelled = (coc <= low) | (coc >= high)
    soft_edge = (share > 0.1) & (share < 0.9) & (front_radius[:, None, None, None] > low)
    labelled &= ~soft_edge
    if sources.kind == "microscopy":
        whole = (coc == coc.amin(dim=(1, 2, 3), keepdim=True)).all(dim=3).all(dim=2)
        labelled &= _content(back) | whole[..., None, None]
    image = _develop(image, gamma, sources.kind, rng)
    return Example(image, coc > BLURRED_RADIUS_PX, labelled, coc)


def defocus_photographs(
    images: Tensor, targets: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Defocus photographs further that may be partly blurred already.

    Parameters
    ----------
    images
        ``(N, 3, S, S)`` float32 in 0..1.
    targets
        ``(N, 1, S, S)``, 1 = blurred; or ``(N, 2, S, S)``, then also what is labelled.
    rng
        Source of all randomness.

    Returns
    -------
    images, targets
        The targets are ``(N, 2, S, S)``: what was blurred stays so, what becomes blurred is, and
        what was sharp stays so where the radius that is added is too small to blur it.

    Notes
    -----
    Of three cases one (35 %) defocuses all of it, one (30 %) by a smooth depth, and one (35 %) all
    but a smooth region.
    """
    n, size_px, device = len(images), images.shape[-1], images.device
    drawn = [_draw_further(size_px, rng) for _ in range(n)]
    alpha, radius = (
        torch.from_numpy(np.stack(maps)).to(device) for maps in zip(*drawn, strict=True)
    )
    boost = torch.from_numpy(rng.choice([0.0, 0.0, 1.0, 4.0], n)).float().to(device)
    bright = ((images - 0.85) / 0.15).clamp(0, 1)
    linear = images**GAMMA * (1 + boost[:, None, None, None] * bright)
    blades, rotation = _draw_apertures(n, rng, device)
    made, share = defocus(
        linear,
        radius,
        front=linear,
        alpha=alpha,
        hidden=alpha,
        front_radius_px=torch.zeros(n, device=device),
        n_blades=blades,
        rotation_rad=rotation,
    )
    coc = torch.where(share > 0.5, 0.0, radius)
    low, high = DOUBTFUL_RADIUS_PX
    was_blurred, becomes_blurred = targets[:, :1] > 0, coc >= high
    labelled = (coc <= low) | becomes_blurred | was_blurred
    if targets.shape[1] == 2:
        labelled &= (targets[:, 1:] > 0) | becomes_blurred
    blurred = was_blurred | (coc > BLURRED_RADIUS_PX)
    made = _develop(made, GAMMA, "photograph", rng)
    return made, torch.cat([blurred, labelled], dim=1).float()


def _draw_apertures(
    n: int, rng: np.random.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Blades, below 3 for a disc, and turn of n apertures."""
    blades = torch.from_numpy(rng.choice([0, 0, 0, 5, 6, 7, 8], n)).to(device)
    return blades, torch.from_numpy(rng.uniform(0, math.pi, n)).float().to(device)


def _draw_further(size_px: int, rng: np.random.Generator) -> tuple[_Map, _Map]:
    """What stays as it is, 0..1, and the radius of the rest; each ``(1, S, S)``."""
    nothing = np.zeros((1, size_px, size_px), np.float32)
    kind = rng.random()
    everywhere = nothing + np.float32(np.exp(rng.uniform(np.log(1.5), np.log(9))))
    if kind < 0.35:
        return nothing, everywhere
    field = _depth_field(size_px, rng)
    if kind < 0.65:
        distance = np.abs(field - np.float32(rng.uniform(0, 1)))
        radius = distance * np.float32(rng.uniform(6, 18)) - np.float32(rng.uniform(0, 2.5))
        return nothing, radius.clip(0, 10)
    return _outline(field, rng), everywhere


@dataclass(frozen=True)
class _Scene:
    """What `defocus` takes: layers ``(3, S, S)`` uint8, the rest ``(1, S, S)``."""

    back: Tensor
    front: Tensor
    alpha: _Map
    hidden: _Map
    radius_px: _Map
    front_radius_px: float = 0.0


def _draw(
    sources: SharpImages,
    large: Sequence[int],
    with_mask: Sequence[int],
    size_px: int,
    rng: np.random.Generator,
    sharp_share: float,
) -> _Scene:
    """Choose the images (of the given indices), the geometry and the radii of one scene."""
    nothing = np.zeros((1, size_px, size_px), np.float32)

    def pick() -> tuple[Tensor, Tensor | None]:
        return sources.crop(large[int(rng.integers(len(large)))], size_px, rng)

    def uniform_radius() -> float:
        return float(np.exp(rng.uniform(np.log(1.5), np.log(12))))

    kind = rng.random()
    back, _ = pick()
    if kind < sharp_share:
        return _Scene(
            back, back, nothing, nothing, nothing + np.float32(rng.choice([0.0, 0.0, 0.5]))
        )
    kind = (kind - sharp_share) / (1 - sharp_share)
    if kind < _BLURRED_SHARE:
        return _Scene(back, back, nothing, nothing, nothing + np.float32(uniform_radius()))
    if kind < _BLURRED_SHARE + _DEPTH_SHARE or sources.kind == "microscopy":
        field = _depth_field(size_px, rng)
        focus = np.float32(rng.uniform(0, 1))
        radius = np.abs(field - focus) * np.float32(rng.uniform(6, 20))
        radius -= np.float32(rng.uniform(0, 2.5))
        return _Scene(back, back, nothing, nothing, radius.clip(0, 12))
    back_radius = rng.uniform(0, 0.5)
    front_radius = rng.uniform(0, 0.5)
    near, far = uniform_radius(), uniform_radius()
    if rng.random() < 0.6:
        back_radius = far
        if rng.random() < 0.15:
            front_radius = near
    else:
        front_radius = near
    behind = nothing + np.float32(back_radius)
    # A defocused layer before its own sharp photograph would let its sharp self shine through.
    own_photo = front_radius <= DOUBTFUL_RADIUS_PX[0]
    if with_mask and rng.random() < 0.7:
        object_index = with_mask[int(rng.integers(len(with_mask)))]
        front, mask = sources.crop(object_index, size_px, rng)
        assert mask is not None
        alpha: _Map = mask.numpy().astype(np.float32) / np.float32(255)
        if own_photo and rng.random() < 0.65:
            return _Scene(front, front, alpha, _grown(alpha), behind, front_radius)
        return _Scene(back, front, alpha, nothing, behind, front_radius)
    front, _ = pick()
    alpha = _outline(_depth_field(size_px, rng), rng)
    if own_photo and rng.random() < 0.4:
        return _Scene(back, back, alpha, alpha, behind, front_radius)
    return _Scene(back, front, alpha, nothing, behind, front_radius)


def _grown(alpha: _Map) -> _Map:
    """Object mask made larger by two pixels: hand-made masks cut off the object's rim."""
    grown: _Map = ndimage.maximum_filter(alpha, (1, 5, 5), mode="nearest")
    return grown


def _depth_field(size_px: int, rng: np.random.Generator) -> _Map:
    """Smooth relative depth ``(1, S, S)`` in 0..1: a tilted plane plus bumps, in random shares."""
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    plane = axis * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))
    cells = int(rng.integers(3, 8))
    weights = _bicubic_weights(cells, size_px)
    points = rng.standard_normal((cells, cells)).astype(np.float32)
    # Not by `@`: numpy's threads take ten times as long, and loaders wait for one another's.
    bumps = np.einsum("ik,kj->ij", weights, np.einsum("kl,jl->kj", points, weights))
    field: _Map = plane + bumps * np.float32(rng.choice([0.0, 0.3, 1.5]))
    field -= field.min()
    field /= field.max()
    return field[None]


@lru_cache(maxsize=64)
def _bicubic_weights(cells: int, size_px: int) -> NDArray[np.float32]:
    """What each of some points in a row counts at each of the pixels between them."""
    points = torch.eye(cells)[None, None]
    weights = F.interpolate(points, (size_px, cells), mode="bicubic", align_corners=True)[0, 0]
    found: NDArray[np.float32] = weights.numpy()
    return found


def _outline(field: _Map, rng: np.random.Generator) -> _Map:
    """One side of a contour of a field, with a soft edge of two pixels or so."""
    level = np.float32(np.quantile(field.ravel()[::7], rng.uniform(0.25, 0.75)))
    scaled: _Map = (field - level) * np.float32(field.shape[-1] / 2) + np.float32(0.5)
    return scaled.clip(0, 1)


def _content(sharp: Tensor) -> Tensor:
    """Where a sharp image ``(N, 3, H, W)`` holds something, and its neighbourhood."""
    grey = sharp.mean(dim=1, keepdim=True)
    low, high = grey.amin(dim=(1, 2, 3), keepdim=True), grey.amax(dim=(1, 2, 3), keepdim=True)
    grey = (grey - low) / (high - low).clamp(min=1e-3)
    contrast = F.max_pool2d(grey, 7, 1, 3) + F.max_pool2d(-grey, 7, 1, 3)
    side = 2 * _CONTENT_REACH_PX + 1
    found = (contrast > _CONTENT_CONTRAST).float()
    return F.max_pool2d(found, side, stride=1, padding=_CONTENT_REACH_PX) > 0


def _develop(linear: Tensor, gamma: float, kind: Kind, rng: np.random.Generator) -> Tensor:
    """What a camera makes of the light: exposure, colour, noise, stretch, JPEG."""
    n = len(linear)
    device = linear.device

    def draw(low: float, high: float, share: float = 1.0) -> NDArray[np.float64]:
        return rng.uniform(low, high, n) * (rng.random(n) < share)

    def sent(*drawn: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.stack(drawn)).float().to(device)[:, :, None, None, None]

    image = linear.clamp(min=0)
    seed = int(rng.integers(2**31))
    generator = torch.Generator(device=device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, device=device)
    is_grey = draw(1, 1, 0.12 if kind == "photograph" else 0.5)
    if kind == "microscopy":
        grey, haze, shot, read, is_stretched, gain = sent(
            is_grey,
            draw(0.0, 0.2, 0.3),
            draw(0.0, 0.05, 0.6),
            draw(0.0, 0.015, 0.6),
            draw(1, 1, 0.6),
            draw(0.6, 1.3),
        )
    else:
        grey, gain, shot, read, saturation = sent(
            is_grey,
            draw(0.6, 1.3),
            draw(0.0, 0.04, 0.4),
            draw(0.0, 0.02, 0.4),
            draw(0.6, 1.3),
        )
    image = torch.where(grey > 0, image.mean(dim=1, keepdim=True), image)
    noise = torch.where(grey > 0, noise[:, :1], noise)
    if kind == "microscopy":
        image = image * (1 - haze) + haze * image.mean(dim=(2, 3), keepdim=True)
        image = image + noise * (shot**2 * image + read**2).sqrt()
        flat = image.flatten(1)[:, ::5]
        low = torch.quantile(flat, 0.001, dim=1)[:, None, None, None]
        high = torch.quantile(flat, 0.999, dim=1)[:, None, None, None]
        stretched = (image - low) / (high - low).clamp(min=0.02)
        image = torch.where(is_stretched > 0, stretched, image * gain)
        return _jpeg(image.clamp(0, 1), rng, share=0.3)
    image = (image * gain).clamp(0, 1) ** (1 / gamma)
    image = (image + noise * (shot**2 * image + read**2).sqrt()).clamp(0, 1)
    mean = image.mean(dim=1, keepdim=True)
    image = (mean + (image - mean) * saturation).clamp(0, 1)
    return _jpeg(image, rng, share=0.6)


def _jpeg(images: Tensor, rng: np.random.Generator, *, share: float) -> Tensor:
    """Store some of the images as JPEG of quality 40 to 95 and read them back."""
    chosen = np.flatnonzero(rng.random(len(images)) < share)
    if not len(chosen):
        return images
    index = torch.from_numpy(chosen).to(images.device)
    pixels = (images[index].permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    decoded = []
    for image in pixels:
        stream = streams.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=int(rng.integers(40, 96)))
        decoded.append(np.asarray(Image.open(stream)))
    stored = torch.from_numpy(np.stack(decoded)).to(images.device).permute(0, 3, 1, 2)
    return images.index_copy(0, index, stored.to(images.dtype) / 255)
