"""Networks of other methods, as ONNX files: one image in, one map out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.data.squash import IMAGENET_MEAN, IMAGENET_STD, squash
from semanticblur_core.errors import SemanticBlurError, WeightsError

InputScale = Literal["imagenet", "unit", "255"]
OutputKind = Literal["probability", "logits"]
DEFAULT_SIZE_PX = 320


class OnnxDetector:
    """A network from an ONNX file that can be evaluated as the package's own are.

    Parameters
    ----------
    path
        ONNX file. Its one input is ``(N, 3, H, W)`` or ``(N, 1, H, W)`` float32.
    input_scale
        What its pixels are: ImageNet-normalised, 0..1, or 0..255, always RGB.
    output_kind
        ``probability`` is a map in 0..1, ``logits`` goes through a sigmoid.
    output
        Name of the output that is the map; needed if there are several.
    size_px
        Side of the square an image is squashed to where the file leaves it open.

    Attributes
    ----------
    height_px, width_px
        Size of the network's input.

    Raises
    ------
    SemanticBlurError
        If onnxruntime is not installed.
    WeightsError
        If the file cannot be loaded or is not such a network.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        input_scale: InputScale = "imagenet",
        output_kind: OutputKind = "probability",
        output: str | None = None,
        size_px: int = DEFAULT_SIZE_PX,
    ) -> None:
        path = Path(path)
        try:
            import onnxruntime
        except ImportError as error:
            raise SemanticBlurError(
                f'{path}: ONNX files need onnxruntime: pip install "napari-semanticblur[all]"'
            ) from error
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        # onnxruntime's exceptions share no base but Exception.
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise WeightsError(f"{path}: not a readable ONNX network: {reason}") from error
        self.path, self.input_scale, self.output_kind = path, input_scale, output_kind
        inputs = self._session.get_inputs()
        names = [found.name for found in self._session.get_outputs()]
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] not in (1, 3):
            shapes = ", ".join(f"{found.name} {found.shape}" for found in inputs)
            raise WeightsError(
                f"{path}: expected one input of shape (N, 3, H, W) or (N, 1, H, W), got {shapes}"
            )
        if inputs[0].type != "tensor(float)":
            raise WeightsError(f"{path}: expected a float32 input, got {inputs[0].type}")
        if output is None and len(names) > 1:
            raise WeightsError(f"{path}: has several outputs, name one: {', '.join(names)}")
        if output is not None and output not in names:
            raise WeightsError(f"{path}: has no output {output}, but {', '.join(names)}")
        self._input, self._output = inputs[0].name, output or names[0]
        _, self._n_channels, height, width = inputs[0].shape
        self.height_px = height if isinstance(height, int) else size_px
        self.width_px = width if isinstance(width, int) else size_px

    def detect(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """The network's map of an image, at the network's own output size.

        Parameters
        ----------
        image
            ``(H, W)`` or ``(H, W, 3)``, any real dtype.

        Returns
        -------
        ndarray
            ``(h, w)`` float32 in 0..1.

        Raises
        ------
        WeightsError
            If the network fails, or what comes out is no map in 0..1.
        """
        rgb: NDArray[Any] = squash(
            io.as_rgb(io.to_unit_range(image)), self.height_px, self.width_px
        )
        if self.input_scale == "imagenet":
            rgb = (rgb - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
        elif self.input_scale == "255":
            rgb = rgb * np.float32(255)
        if self._n_channels == 1:
            rgb = rgb.mean(axis=2, keepdims=True)
        batch = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None], np.float32)
        try:
            (found,) = self._session.run([self._output], {self._input: batch})
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise WeightsError(f"{self.path}: the network failed: {reason}") from error
        blur: NDArray[np.float32] = np.asarray(found, np.float32)
        if blur.ndim < 2 or blur.size != blur.shape[-1] * blur.shape[-2]:
            raise WeightsError(f"{self.path}: expected one map, got an output of {blur.shape}")
        blur = blur.reshape(blur.shape[-2:])
        if self.output_kind == "logits":
            blur = np.float32(0.5) * (1 + np.tanh(blur / 2))
        low, high = float(blur.min()), float(blur.max())
        if not 0 <= low <= high <= 1:
            raise WeightsError(
                f"{self.path}: its output {self._output} reaches from {low:g} to {high:g}; "
                "if these are logits, say so (--onnx-output-kind=logits)"
            )
        return blur
