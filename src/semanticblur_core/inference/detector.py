"""From one image to its blur map."""

from __future__ import annotations

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
from semanticblur_core.network import SemanticBlur
from semanticblur_core.network.semanticblur import MIN_SIZE_PX

PAPER_SIZE_PX = 320


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

    Attributes
    ----------
    device, dtype, reason
        What it computes on, and why.
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
    ) -> None:
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
            protocol); ``"native"`` analyses it at its own size, whole.
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
        if size == "native" and len({image.shape[:2] for image in images}) > 1:
            return [self.detect(image, size=size, value_range=value_range) for image in images]
        maps = self.detect_tensors(
            images, size=size, value_range=value_range, upsampling=upsampling
        )
        return [blur.cpu().numpy() for blur in maps]

    def detect_tensors(
        self,
        images: list[NDArray[Any]],
        *,
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Literal["bilinear", "nearest-exact"] = "bilinear",
    ) -> list[torch.Tensor]:
        """Blur maps as `detect_batch`, ``(H, W)`` float32, left on the device.

        At native size all images have to be of one size.
        """
        if size != "native" and size < MIN_SIZE_PX:
            raise ConfigError(f"size: expected at least {MIN_SIZE_PX} px or native, got {size}")
        side = None if size == "native" else size
        prepared = [_prepare(image, value_range, side) for image in images]
        batch = torch.from_numpy(np.stack(prepared)).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = self._network(normalise(batch).to(self.dtype))
            blur = torch.sigmoid(logits.float())
            return [
                _upsample(blur[i : i + 1], image.shape[:2], upsampling)
                for i, image in enumerate(images)
            ]


def _upsample(blur: torch.Tensor, shape: tuple[int, ...], mode: str) -> torch.Tensor:
    if blur.shape[-2:] != shape:
        keywords = {"align_corners": False} if mode == "bilinear" else {}
        blur = F.interpolate(blur, size=shape, mode=mode, **keywords)
    return blur[0, 0]


def _prepare(
    image: NDArray[Any], value_range: tuple[float, float] | None, size: int | None
) -> NDArray[np.float32]:
    """``(H, W, 3)`` float32 in 0..1 at the analysis size."""
    image = io.without_alpha(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ImageError(f"expected an image (H, W) or (H, W, 3), got shape {image.shape}")
    height, width = image.shape[:2]
    if min(height, width) == 0:
        raise ImageError(f"the image has no pixels, shape {image.shape}")
    if size is None and min(height, width) < MIN_SIZE_PX:
        raise ImageError(
            f"native size needs at least {MIN_SIZE_PX} x {MIN_SIZE_PX} px, got {height} x {width}"
        )
    rgb = io.as_rgb(io.to_unit_range(image, limits=value_range))
    if size is not None:
        return squash(rgb, size, size)
    if rgb.dtype == np.uint8:
        return rgb.astype(np.float32) / np.float32(255)
    return rgb
