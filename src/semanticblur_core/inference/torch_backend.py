"""The network in torch, eager or compiled."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from semanticblur_core.data.transforms import normalise
from semanticblur_core.device import choose_device, is_out_of_memory
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.backends import Resizing
from semanticblur_core.inference.graphed import compile_forward
from semanticblur_core.network import SemanticBlur

# What runs a network, where, and in which numbers.
_Running = tuple[Callable[[torch.Tensor], torch.Tensor], torch.device, torch.dtype]
_MOVE_LOCK = threading.Lock()


class TorchBackend:
    """Runs a network on a device; see `semanticblur_core.inference.backends.Backend`.

    Parameters
    ----------
    network
        As trained; a copy is made for inference.
    device, precision
        See `semanticblur_core.device.choose_device`.
    compiled
        Through ``torch.compile``, and as one graph on a CUDA GPU: faster, after half a minute for
        each new size.
    """

    def __init__(
        self,
        network: SemanticBlur,
        *,
        device: str = "auto",
        precision: str = "auto",
        compiled: bool = False,
    ) -> None:
        where, dtype, self.reason = choose_device(device, precision)
        self.device = str(where)
        self.precision = str(dtype).removeprefix("torch.")
        self.name = "compile" if compiled else "torch"
        self._network = network.for_inference(dtype).to(where)
        forward = compile_forward(self._network, where) if compiled else self._network.__call__
        # One value, which changes at once: another thread may be computing.
        self._running: _Running = forward, where, dtype

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(N, H, W)`` maps of ``(N, H, W, 3)`` images in 0..1."""
        maps: NDArray[np.float32] = self.tensors(images).cpu().numpy()
        return maps

    def tensors(self, images: NDArray[np.float32]) -> torch.Tensor:
        """Maps as `run`, left on the device. Out of memory, the batch is halved, then the CPU used.

        Raises
        ------
        SemanticBlurError
            If not even one image fits into the CPU's memory.
        """
        where = self.device
        try:
            return self._infer(images)
        except RuntimeError as error:  # torch's out of memory is one
            if not is_out_of_memory(error):
                raise
        if len(images) > 1:
            half = len(images) // 2
            first, second = self.tensors(images[:half]), self.tensors(images[half:])
            return torch.cat([first.to(second.device), second])  # the second may be the CPU's
        if where == "cpu":
            height, width = images.shape[1:3]
            raise SemanticBlurError(
                f"out of memory for {height} x {width} px at once; a smaller size or native tiles "
                "need less"
            )
        self._move_to_cpu(where)
        return self.tensors(images)

    def run_resized(
        self, images: NDArray[np.float32], shapes: Sequence[tuple[int, ...]], mode: Resizing
    ) -> list[NDArray[np.float32]]:
        """Maps of images ``(N, H, W, 3)``, each brought to the rows and columns in ``shapes``."""
        return [blur.cpu().numpy() for blur in self.tensors_resized(images, shapes, mode)]

    def tensors_resized(
        self, images: NDArray[np.float32], shapes: Sequence[tuple[int, ...]], mode: Resizing
    ) -> list[torch.Tensor]:
        """Maps as `run_resized`, left on the device."""
        maps = self.tensors(images)
        return [
            _upsample(maps[i : i + 1], shape[:2], mode)
            for i, shape in enumerate(shapes)
        ]  # fmt: skip

    def _infer(self, images: NDArray[np.float32]) -> torch.Tensor:
        forward, device, dtype = self._running
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = forward(normalise(batch).to(dtype))
            return torch.sigmoid(logits.float())[:, 0]

    def _move_to_cpu(self, was: str) -> None:
        with _MOVE_LOCK:
            if self.device != was:  # another thread was faster
                return
            self._network = _copy_on_cpu(self._network)
            self._running = self._network.__call__, torch.device("cpu"), torch.float32
            self.device, self.precision, self.name = "cpu", "float32", "torch"
            self.reason = f"{was} ran out of memory"
        warnings.warn(f"{was} ran out of memory; going on with the CPU", stacklevel=2)


def _copy_on_cpu(network: SemanticBlur) -> SemanticBlur:
    """A copy in float32 that takes no memory where the network is."""
    tensors = [*network.parameters(), *network.buffers()]
    moved = {id(tensor): tensor.detach().to("cpu", torch.float32) for tensor in tensors}
    for parameter in network.parameters():
        moved[id(parameter)] = nn.Parameter(moved[id(parameter)], requires_grad=False)
    return copy.deepcopy(network, moved)


def _upsample(blur: torch.Tensor, shape: tuple[int, ...], mode: Resizing) -> torch.Tensor:
    """``(1, h, w)`` to ``(H, W)``."""
    if blur.shape[-2:] != shape:
        keywords = {"align_corners": False} if mode == "bilinear" else {}
        blur = F.interpolate(blur[None], size=shape, mode=mode, **keywords)[0]
    return blur[0]
