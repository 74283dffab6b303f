"""What finds blur, and how many images it is given at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.inference.jobs import DetectOptions
from semanticblur_core.inference.planes import BATCH_PIXELS, Channels, DetectUpdate

_T = TypeVar("_T")


class MapMaker(Protocol):
    """What finds blur: the network's `Detector`, or a hand-crafted method."""

    @property
    def name(self) -> str:
        """The model or method, for people."""
        ...

    def detect(
        self,
        image: NDArray[Any],
        *,
        size: int | Literal["native"],
        value_range: tuple[float, float] | None,
    ) -> NDArray[np.float32]:
        """Blur map of one image, see `semanticblur_core.Detector.detect`."""
        ...

    def iter_planes(
        self,
        array: Any,
        axes: str,
        *,
        indices: Sequence[Sequence[int]] | None,
        channels: Channels,
        size: int | Literal["native"],
        value_range: tuple[float, float] | Sequence[tuple[float, float]] | None,
    ) -> Iterator[DetectUpdate]:
        """Maps of planes, see `semanticblur_core.Detector.iter_planes`."""
        ...


def images_at_once(detector: MapMaker, options: DetectOptions) -> int:
    """How many images the detector computes in one pass; at native size it takes tiles of one."""
    return 1 if options.size == "native" else int(getattr(detector, "batch_size", 1))


def batched(items: Iterable[_T], n: int, n_pixels: Callable[[_T], float]) -> Iterator[list[_T]]:
    """Up to ``n`` items at a time, in order, that hold at most `BATCH_PIXELS` unless it is one."""
    held: list[_T] = []
    total = 0.0
    for item in items:
        if held and total + n_pixels(item) > BATCH_PIXELS:
            yield held
            held, total = [], 0.0
        held.append(item)
        total += n_pixels(item)
        if len(held) >= n or total >= BATCH_PIXELS:
            yield held
            held, total = [], 0.0
    if held:
        yield held
