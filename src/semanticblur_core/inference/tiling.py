"""Overlapping tiles whose tapered weights add up to one everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.errors import ConfigError

TILE_SIZE_PX = 512
OVERLAP_PX = 64


@dataclass(frozen=True)
class Tile:
    """One tile: its place in the grid and the pixels it covers."""

    row: int
    column: int
    rows: slice
    columns: slice


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one size that cover a plane, neighbours overlapping by at least ``overlap_px``.

    Parameters
    ----------
    height, width
        Of the plane in pixels.
    tile_size_px
        Side of a tile; a plane smaller than that along an axis is covered whole along it.
    overlap_px
        Least overlap of neighbours, over which one fades into the next.

    Raises
    ------
    ConfigError
        If tiles are smaller than 33 px, overlap by more than half, or the plane has no pixels.
    """

    height: int
    width: int
    tile_size_px: int = TILE_SIZE_PX
    overlap_px: int = OVERLAP_PX

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"the plane has no pixels, {self.height} x {self.width}")
        if self.tile_size_px < 33:
            raise ConfigError(f"tile size: expected at least 33 px, got {self.tile_size_px}")
        if not 0 <= self.overlap_px <= self.tile_size_px // 2:
            raise ConfigError(
                f"tile overlap: expected 0 to half the tile ({self.tile_size_px // 2} px), "
                f"got {self.overlap_px}"
            )

    @cached_property
    def row_starts(self) -> list[int]:
        """First pixel row of each row of tiles."""
        return self._starts(self.height)

    @cached_property
    def column_starts(self) -> list[int]:
        """First pixel column of each column of tiles."""
        return self._starts(self.width)

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Height and width of every tile."""
        return min(self.height, self.tile_size_px), min(self.width, self.tile_size_px)

    def __len__(self) -> int:
        return len(self.row_starts) * len(self.column_starts)

    def __iter__(self) -> Iterator[Tile]:
        """Tiles row by row."""
        height, width = self.tile_shape
        for row, top in enumerate(self.row_starts):
            for column, left in enumerate(self.column_starts):
                yield Tile(row, column, slice(top, top + height), slice(left, left + width))

    def weights(self, tile: Tile) -> NDArray[np.float32]:
        """Share of a tile in each of its pixels: over all tiles they add up to one."""
        rows = self._row_windows[tile.row]
        return rows[:, None] * self._column_windows[tile.column]

    def tiles_over(self) -> NDArray[np.uint8]:
        """``(H, W)``: how many tiles each pixel lies in."""
        height, width = self.tile_shape
        rows = _coverage(self.row_starts, height, self.height)
        return rows[:, None] * _coverage(self.column_starts, width, self.width)

    @cached_property
    def _row_windows(self) -> list[NDArray[np.float32]]:
        return _windows(self.row_starts, self.tile_shape[0], self.height, self.overlap_px)

    @cached_property
    def _column_windows(self) -> list[NDArray[np.float32]]:
        return _windows(self.column_starts, self.tile_shape[1], self.width, self.overlap_px)

    def _starts(self, length: int) -> list[int]:
        if length <= self.tile_size_px:
            return [0]
        step = self.tile_size_px - self.overlap_px
        count = math.ceil((length - self.overlap_px) / step)
        last = length - self.tile_size_px
        return [round(i * last / (count - 1)) for i in range(count)]


def _coverage(starts: list[int], size: int, length: int) -> NDArray[np.uint8]:
    """How many tiles lie over each pixel along one axis."""
    count = np.zeros(length, np.uint8)
    for start in starts:
        count[start : start + size] += 1
    return count


def _windows(starts: list[int], size: int, length: int, overlap: int) -> list[NDArray[np.float32]]:
    """One window a tile along one axis: linear ramps inside the plane, normalised to one."""
    ramp = np.minimum(1.0, (np.arange(size) + 0.5) / max(overlap, 1))
    total = np.zeros(length)
    raw = []
    for start in starts:
        window = np.ones(size)
        if start > 0:
            window *= ramp
        if start + size < length:
            window *= ramp[::-1]
        total[start : start + size] += window
        raw.append(window)
    return [
        (window / total[start : start + size]).astype(np.float32)
        for start, window in zip(starts, raw, strict=True)
    ]
