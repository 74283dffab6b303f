"""What finds blur, and how many images it is given at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.errors import ImageError
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


def iter_readable(
    detect: Callable[[list[tuple[int, ...]]], Iterable[DetectUpdate]],
    indices: Iterable[tuple[int, ...]],
    on_unreadable: Callable[[tuple[int, ...], ImageError], None],
    *,
    need_one: bool = True,
) -> Iterator[DetectUpdate]:
    """Maps of planes, all but of those that cannot be read.

    Parameters
    ----------
    detect
        Maps of the planes of some indices, in their order, as `MapMaker.iter_planes` makes them.
    indices
        Of all planes.
    on_unreadable
        Called with each that cannot be read, and why, when it is its turn.
    need_one
        Whether it is an error if none can be read.

    Raises
    ------
    ImageError
        That of the last plane, if none can be read.
    """
    left, one_by_one, is_any_done = list(indices), False, not need_one
    while left:
        now, after = (left[:1], left[1:]) if one_by_one else (left, [])
        n_done = 0
        try:
            for update in detect(now):
                yield update
                is_any_done = True
                n_done += update.plane_done
            left = after
        except ImageError as error:
            left = [*now[n_done:], *after]
            # Which one of a batch it is shows where they come one by one.
            if one_by_one or len(left) == 1:
                on_unreadable(left.pop(0), error)
                if not left and not is_any_done:
                    raise
            one_by_one = not one_by_one


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
