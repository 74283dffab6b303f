"""What people say of an image: which pixels are sharp and which are blurred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.errors import DataError

Split = Literal["train", "val"]
UNLABELLED, SHARP, BLURRED = 0, 1, 2


@dataclass(frozen=True)
class LabelledImage:
    """One image or plane and what was painted on it.

    Attributes
    ----------
    name
        For tables and messages.
    image
        ``(H, W)`` or ``(H, W, 3)``, any real dtype.
    labels
        ``(H, W)`` uint8: 0 = unlabelled, 1 = sharp, 2 = blurred.
    value_range
        Intensities that count as black and white, of the whole stack it comes from, or of its
        channel in it; None as in `semanticblur_core.io.to_unit_range`.
    split
        ``"val"`` holds the image out, ``"train"`` never does, None leaves it open.
    """

    name: str
    image: NDArray[Any]
    labels: NDArray[np.uint8]
    value_range: tuple[float, float] | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.labels.shape != self.image.shape[:2] or self.labels.dtype != np.uint8:
            raise DataError(
                f"{self.name}: expected uint8 labels of {self.image.shape[:2]} px, got "
                f"{self.labels.dtype} {self.labels.shape}"
            )
        if self.image.ndim not in (2, 3) or self.image.shape[2:] not in ((), (3,)):
            raise DataError(
                f"{self.name}: expected an image (H, W) or (H, W, 3), got {self.image.shape}"
            )
        if self.split not in (None, *get_args(Split)):
            raise DataError(f"{self.name}: split: expected train or val, got {self.split!r}")
        if self.labels.size == 0:
            raise DataError(f"{self.name}: the image has no pixels, shape {self.image.shape}")
        if self.labels.max() > BLURRED:
            raise DataError(
                f"{self.name}: label {self.labels.max()}; expected 0 = unlabelled, 1 = sharp, "
                "2 = blurred"
            )
