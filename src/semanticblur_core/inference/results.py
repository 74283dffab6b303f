"""What became of an input."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FileResult:
    """What became of one input; ``error`` is None where it was done.

    ``mean_blur`` and ``blurred_fraction`` are in 0..1, NaN where nothing was analysed;
    ``elapsed_s`` covers reading, analysis (of several at once its share) and writing. ``planes``
    are those of a stack, ``value_range`` its intensities that counted as 0 and 1, by channel (None:
    those of the type), ``n_frames`` the analysed frames of a video. ``skipped`` says that all of it
    was there before. ``unreadable_part`` says in one line what of a stack could not be
    read where the rest was done; the means are those of the rest.
    """

    source: str
    outputs: list[Path] = field(default_factory=list)
    height: int = 0
    width: int = 0
    blurred_fraction: float = math.nan
    mean_blur: float = math.nan
    elapsed_s: float = 0.0
    error: str | None = None
    planes: list[PlaneResult] = field(default_factory=list)
    skipped: bool = False
    n_frames: int = 0
    value_range: list[tuple[float, float]] | None = None
    unreadable_part: str | None = None


@dataclass(frozen=True)
class PlaneResult:
    """One plane of a stack: its index along the walked axes, and what was measured on it.

    ``error`` says why it, or tiles of it, could not be read; its map is NaN there, and what was
    measured is of the rest, ``n_pixels``.
    """

    index: tuple[int, ...]
    blurred_fraction: float = math.nan
    mean_blur: float = math.nan
    n_pixels: int = 0
    error: str | None = None
