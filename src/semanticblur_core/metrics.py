"""Scores of a predicted blur map against a mask, under the protocol of the field.

Blur is the positive class; b is the blur map in 0..1, g the mask (1 = blurred), both at the mask's
own resolution:

* MAE: mean over images of mean ``|b - g|``;
* F-beta: mean over images of ``1.3 P R / (0.3 P + R)``, binary at ``b > threshold``, with P = 0 if
  nothing was predicted blurred, R = 0 if nothing is, F = 0 where both are;
* IoU: ``sum TP / sum (TP + FP + FN)``, pooled over all pixels of all images.

On the published maps of HiFST for the 100 CUHK test images this gives MAE 0.22277 and F 0.80303
(published: 0.223 and 0.803). Other papers use other thresholds and polarities, so a number means
nothing without `protocol`, and is never printed without it.

A wholly sharp mask has recall 0 and so F 0 whatever the map; MAE is the number that says
something about it. A wholly blurred mask needs no exception.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core.io import ROUNDING

if TYPE_CHECKING:
    from torch import Tensor

BETA_SQUARED = 0.3


@dataclass(frozen=True)
class Protocol:
    """What was compared and how; printed and saved with every score."""

    positive_class: str = "blur"
    threshold: float = 0.5
    beta_squared: float = BETA_SQUARED
    mae: str = "mean over images"
    f_beta: str = "mean over images, binary at map > threshold"
    iou: str = "pooled over all pixels, blurred class"
    resolution: str = "the mask's own"
    analysis: str = "maps as given"

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.positive_class} positive, map > {self.threshold:g}, "
            f"beta^2 {self.beta_squared:g}, MAE and F {self.mae}, IoU pooled, "
            f"at {self.resolution} resolution; {self.analysis}"
        )


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image; ``tp``, ``fp``, ``fn``, ``tn`` count pixels.

    ``beta_squared`` is the protocol's, for `f_beta`.
    """

    name: str
    h: int
    w: int
    mae: float
    tp: int
    fp: int
    fn: int
    tn: int
    beta_squared: float = BETA_SQUARED

    @property
    def precision(self) -> float:
        """TP / (TP + FP), 0 where nothing was predicted blurred."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN), 0 where nothing is blurred."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f_beta(self) -> float:
        """F-measure with the protocol's beta squared."""
        p, r = self.precision, self.recall
        return _ratio((1 + self.beta_squared) * p * r, self.beta_squared * p + r)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN) of this image alone."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    def to_dict(self) -> dict[str, Any]:
        """Columns of a per-image table."""
        columns = asdict(self)
        del columns["beta_squared"]  # the same for every image
        return columns | {
            "precision": self.precision,
            "recall": self.recall,
            "f_beta": self.f_beta,
            "iou": self.iou,
        }


@dataclass(frozen=True)
class Scores:
    """Scores of a set of images under `protocol`."""

    mae: float
    f_beta: float
    iou: float
    n_images: int
    protocol: Protocol

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class BlurScorer:
    """Collects scores one image at a time.

    Parameters
    ----------
    protocol
        What is compared and how; printed with the scores.
    """

    def __init__(self, protocol: Protocol | None = None) -> None:
        self.protocol = protocol or Protocol()
        self.images: list[ImageScore] = []

    def add(self, blur: NDArray[Any], mask: NDArray[Any], *, name: str = "") -> ImageScore:
        """Score one blur map.

        Parameters
        ----------
        blur
            ``(H, W)`` float in 0..1, 1 = out of focus.
        mask
            ``(H, W)`` bool, True = blurred.
        name
            Kept with the score.

        Raises
        ------
        ValueError
            If shapes differ, the map leaves 0..1 by more than rounding or is not finite, or the
            mask is not bool.
        """
        _require_same_shape(tuple(blur.shape), tuple(mask.shape), name)
        if not (isinstance(blur, np.ndarray) and isinstance(mask, np.ndarray)):
            raise ValueError(f"{name!r}: expected arrays; add_tensor takes tensors")
        if mask.dtype != np.bool_:
            raise ValueError(f"mask {name!r}: expected bool, got {mask.dtype}")
        _require_unit_range(float(blur.min()), float(blur.max()), name)
        predicted = blur > self.protocol.threshold
        return self._keep(
            name,
            tuple(mask.shape),
            tp=int(np.count_nonzero(predicted & mask)),
            n_predicted=int(np.count_nonzero(predicted)),
            n_blurred=int(np.count_nonzero(mask)),
            mae=float(np.abs(blur.astype(np.float32) - mask).mean(dtype=np.float64)),
        )

    def add_tensor(self, blur: Tensor, mask: Tensor, *, name: str = "") -> ImageScore:
        """Score one blur map where it lies, on a GPU for one; the numbers are those of `add`.

        Parameters
        ----------
        blur
            ``(H, W)`` floating point in 0..1, 1 = out of focus, on any device.
        mask
            ``(H, W)`` bool, True = blurred, on the same device.
        name
            Kept with the score.

        Raises
        ------
        ValueError
            As `add`.
        """
        import torch

        _require_same_shape(tuple(blur.shape), tuple(mask.shape), name)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r}: expected bool, got {mask.dtype}")
        blur = blur.float()
        low, high = torch.aminmax(blur)
        _require_unit_range(float(low), float(high), name)
        predicted = blur > self.protocol.threshold
        counts = torch.stack([(predicted & mask).sum(), predicted.sum(), mask.sum()]).tolist()
        # Rows in float32, their sum in float64 on the host: not every device has float64.
        rows = (blur - mask.float()).abs().mean(dim=1).cpu().double()
        return self._keep(
            name,
            tuple(mask.shape),
            tp=counts[0],
            n_predicted=counts[1],
            n_blurred=counts[2],
            mae=float(rows.mean()),
        )

    def _keep(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        tp: int,
        n_predicted: int,
        n_blurred: int,
        mae: float,
    ) -> ImageScore:
        height, width = shape
        fp, fn = n_predicted - tp, n_blurred - tp
        tn = height * width - tp - fp - fn
        beta_squared = self.protocol.beta_squared
        score = ImageScore(name, height, width, mae, tp, fp, fn, tn, beta_squared)
        self.images.append(score)
        return score

    def result(self) -> Scores:
        """Scores of everything added so far.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        if not self.images:
            raise ValueError("no images were scored")
        tp = sum(image.tp for image in self.images)
        union = sum(image.tp + image.fp + image.fn for image in self.images)
        return Scores(
            mae=float(np.mean([image.mae for image in self.images])),
            f_beta=float(np.mean([image.f_beta for image in self.images])),
            iou=_ratio(tp, union),
            n_images=len(self.images),
            protocol=self.protocol,
        )


def _require_same_shape(blur: tuple[int, ...], mask: tuple[int, ...], name: str) -> None:
    if len(mask) != 2:
        raise ValueError(f"{name!r}: expected one mask (H, W), got one of shape {mask}")
    if blur != mask:
        raise ValueError(f"{name!r}: expected a map of the mask's shape {mask}, got {blur}")
    if 0 in mask:
        raise ValueError(f"{name!r}: the mask is empty, shape {mask}")


def _require_unit_range(low: float, high: float, name: str) -> None:
    if not -ROUNDING <= low <= high <= 1 + ROUNDING:
        raise ValueError(f"{name!r}: expected a map in 0..1, got {low:.7g}..{high:.7g}")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
