"""From images and stacks to blur maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semanticblur_core import io, weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.data.transforms import normalise, squash
from semanticblur_core.device import choose_device
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.planes import ALL, Channels, DetectUpdate, Planes, Region
from semanticblur_core.inference.tiling import OVERLAP_PX, TILE_SIZE_PX, Tile, TileGrid
from semanticblur_core.network import SemanticBlur
from semanticblur_core.network.semanticblur import MIN_SIZE_PX

PAPER_SIZE_PX = 320

Reader = Callable[[slice, slice], NDArray[Any]]


class Detector:
    """Finds what is out of focus; loads the network once.

    Parameters
    ----------
    model
        ``"default"`` (the packaged weights), the path of a file of weights, or a network.
    device
        ``auto``, ``cpu``, ``cuda`` or ``mps``.
    precision
        ``auto``, ``float32`` or ``bfloat16``.
    flip
        Average the map with that of the mirrored image: twice the time.

    Attributes
    ----------
    device, dtype, reason
        What it computes on, and why.
    flip
        As given.
    name
        The model as it was asked for, or ``"network"``.

    Raises
    ------
    WeightsError, ConfigError
        If the weights or the device cannot be had.

    Examples
    --------
    >>> from skimage.data import chelsea
    >>> from semanticblur_core import Detector
    >>> blur = Detector().detect(chelsea())  # (300, 451) float32, 1 = out of focus
    """

    def __init__(
        self,
        model: str | SemanticBlur = "default",
        *,
        device: str = "auto",
        precision: str = "auto",
        flip: bool = False,
    ) -> None:
        self.flip = flip
        self.device, self.dtype, self.reason = choose_device(device, precision)
        if isinstance(model, SemanticBlur):
            network, self.name = model, "network"
            self.info: weights.WeightsInfo | None = None
        else:
            self.name = model
            network, self.info = weights.load(model)
        self.config: ModelConfig = network.config
        self._network = network.for_inference(self.dtype).to(self.device)

    def detect(
        self,
        image: NDArray[Any],
        *,
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Literal["bilinear", "nearest-exact"] = "bilinear",
    ) -> NDArray[np.float32]:
        """Blur map of one image.

        Parameters
        ----------
        image
            ``(H, W)`` or ``(H, W, 3)``, any real dtype; a fourth channel (alpha) is dropped.
        size
            The image is squashed to ``size`` x ``size`` pixels for the network (320 is the paper's
            protocol); ``"native"`` analyses it at its own size, in overlapping tiles of 512 px.
        value_range
            Intensities that count as black and white, see `semanticblur_core.io.to_unit_range`.
        upsampling
            How the map is brought to the image's size; the evaluation protocol uses
            ``nearest-exact``.

        Returns
        -------
        ndarray
            ``(H, W)`` float32 in 0..1, 1 = out of focus.

        Raises
        ------
        ImageError
            If the image is not one grey or RGB image, or is smaller than 33 px at native size.
        """
        return self.detect_batch(
            [image], size=size, value_range=value_range, upsampling=upsampling
        )[0]

    def detect_batch(
        self,
        images: list[NDArray[Any]],
        *,
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Literal["bilinear", "nearest-exact"] = "bilinear",
    ) -> list[NDArray[np.float32]]:
        """Blur maps of several images, as `detect`; one pass unless the size is native."""
        if size == "native":
            return [self._detect_native(image, value_range) for image in images]
        maps = self.detect_tensors(
            images, size=size, value_range=value_range, upsampling=upsampling
        )
        return [blur.cpu().numpy() for blur in maps]

    def detect_tensors(
        self,
        images: list[NDArray[Any]],
        *,
        size: int = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Literal["bilinear", "nearest-exact"] = "bilinear",
    ) -> list[torch.Tensor]:
        """Blur maps as `detect_batch`, ``(H, W)`` float32, left on the device."""
        _require_size(size)
        prepared = [squash(_prepare(image, value_range), size, size) for image in images]
        blur = self._run(prepared)
        return [
            _upsample(blur[i : i + 1], image.shape[:2], upsampling)
            for i, image in enumerate(images)
        ]

    def iter_planes(
        self,
        array: Any,
        axes: str,
        *,
        indices: Sequence[Sequence[int]] | None = None,
        channels: Channels = "each",
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        tile_size_px: int = TILE_SIZE_PX,
        overlap_px: int = OVERLAP_PX,
        visible: Region | None = None,
    ) -> Iterator[DetectUpdate]:
        """Detect an array of any number of axes, plane by plane, tile by tile; close it to stop.

        Parameters
        ----------
        array, axes, channels
            See `semanticblur_core.inference.planes.Planes`: read only where a plane or tile is due.
        indices
            Planes, as indices along the walked axes, in the order wanted; by default all.
        size
            As in `detect`: one piece a plane, or ``"native"`` tiles.
        value_range
            Intensities that become 0 and 1, or a pair for each channel of a mean. By default, and
            unless the type is 8-bit, percentiles estimated from planes spread over the whole array.
        tile_size_px, overlap_px
            Of native tiles.
        visible
            Rows and columns whose tiles come first.

        Yields
        ------
        DetectUpdate
            After every tile at native size, else after every plane.

        Raises
        ------
        ImageError, ConfigError
            If axes, indices or sizes do not fit.
        """
        if size != "native":
            _require_size(size)
        planes = Planes(array, axes, channels)
        limits = planes.estimate_range() if value_range is None else planes.as_limits(value_range)
        views = [planes.view(i) for i in (planes.indices() if indices is None else indices)]
        if size != "native":
            for n_done, view in enumerate(views, start=1):
                pixels = io.as_rgb(view.read_unit(limits=limits))
                small = self._run([squash(pixels, size, size)])
                whole = _upsample(small, view.shape, "bilinear").cpu().numpy()
                yield DetectUpdate(view.index, n_done, len(views), whole, ALL, True)
            return
        grid = TileGrid(*planes.plane_shape, tile_size_px, overlap_px)
        n_done, n_total = 0, len(views) * len(grid)
        for view in views:
            read = functools.partial(view.read_unit, limits=limits)
            blur = np.zeros(view.shape, np.float32)
            for i, (tile, part) in enumerate(self.iter_tiles(read, grid, visible=visible)):
                blur[tile.rows, tile.columns] += part
                n_done += 1
                region = (tile.rows, tile.columns)
                yield DetectUpdate(view.index, n_done, n_total, blur, region, i + 1 == len(grid))

    def iter_tiles(
        self, read: Reader, grid: TileGrid, *, visible: Region | None = None
    ) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
        """Weighted blur maps of the tiles of a plane at native size; their sum is the map.

        Parameters
        ----------
        read
            Function of a slice of rows and one of columns: uint8, or float32 in 0..1, grey or RGB.
        grid
            Tiles to walk.
        visible
            Rows and columns whose tiles come first.
        """
        _require_native(grid.height, grid.width)
        tiles = list(grid)
        if visible is not None:
            rows, columns = visible
            tiles.sort(
                key=lambda tile: not (_overlap(tile.rows, rows) and _overlap(tile.columns, columns))
            )
        for tile in tiles:
            [blur] = self._run([_as_unit_float(io.as_rgb(read(tile.rows, tile.columns)))])
            yield tile, blur[0].cpu().numpy() * grid.weights(tile)

    def iter_strips(
        self, read: Reader, grid: TileGrid
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Finished rows of a plane's map at native size, from the top, in constant memory.

        Yields
        ------
        tuple
            A slice of rows and their map, ``(rows, W)`` float32.
        """
        height = grid.tile_shape[0]
        starts = [*grid.row_starts, grid.height]
        pending = np.zeros((height, grid.width), np.float32)
        for tile, part in self.iter_tiles(read, grid):
            pending[:, tile.columns] += part
            if tile.column + 1 < len(grid.column_starts):
                continue
            top, following = starts[tile.row], starts[tile.row + 1]
            n_finished = following - top
            yield slice(top, following), pending[:n_finished].copy()
            pending[: height - n_finished] = pending[n_finished:].copy()
            pending[height - n_finished :] = 0

    def _detect_native(
        self, image: NDArray[Any], value_range: tuple[float, float] | None
    ) -> NDArray[np.float32]:
        pixels = _prepare(image, value_range)
        grid = TileGrid(*pixels.shape[:2])
        blur = np.zeros(pixels.shape[:2], np.float32)
        for tile, part in self.iter_tiles(lambda rows, columns: pixels[rows, columns], grid):
            blur[tile.rows, tile.columns] += part
        return blur

    def _run(self, images: list[NDArray[np.float32]]) -> torch.Tensor:
        """``(N, H, W)`` maps of ``(H, W, 3)`` float32 in 0..1, all of one size."""
        batch = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            blur = self._maps(batch)
            if self.flip:
                blur = (blur + self._maps(batch.flip(-1)).flip(-1)) / 2
            return blur

    def _maps(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self._network(normalise(batch).to(self.dtype))
        return torch.sigmoid(logits.float())[:, 0]


def _upsample(blur: torch.Tensor, shape: tuple[int, ...], mode: str) -> torch.Tensor:
    """``(1, h, w)`` to ``(H, W)``."""
    if blur.shape[-2:] != shape:
        keywords = {"align_corners": False} if mode == "bilinear" else {}
        blur = F.interpolate(blur[None], size=shape, mode=mode, **keywords)[0]
    return blur[0]


def _prepare(image: NDArray[Any], value_range: tuple[float, float] | None) -> NDArray[Any]:
    """``(H, W, 3)`` uint8, or float32 in 0..1."""
    image = io.without_alpha(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ImageError(f"expected an image (H, W) or (H, W, 3), got shape {image.shape}")
    if 0 in image.shape:
        raise ImageError(f"the image has no pixels, shape {image.shape}")
    return io.as_rgb(io.to_unit_range(image, limits=value_range))


def _as_unit_float(pixels: NDArray[Any]) -> NDArray[np.float32]:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels


def _require_size(size: int) -> None:
    if size < MIN_SIZE_PX:
        raise ConfigError(f"size: expected at least {MIN_SIZE_PX} px or native, got {size}")


def _require_native(height: int, width: int) -> None:
    if min(height, width) < MIN_SIZE_PX:
        raise ImageError(
            f"native size needs at least {MIN_SIZE_PX} x {MIN_SIZE_PX} px, got {height} x {width}"
        )


def _overlap(a: slice, b: slice) -> bool:
    """Whether two slices share an index; open ends reach all the way."""
    low, high = b.start or 0, math.inf if b.stop is None else b.stop
    return bool(a.start < high and low < a.stop)
