"""The network in torch, eager or compiled."""

from __future__ import annotations

import copy
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial

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
from semanticblur_core.network import SemanticBlur, fused

# What runs a network, where, and in which numbers.
_Running = tuple[Callable[[torch.Tensor], torch.Tensor], torch.device, torch.dtype]
_MOVE_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    # The threads that torch shares its work with are not forked with it, and a process that is
    # forked after the first parallel work would wait for them for ever.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class TorchBackend:
    """Runs a network on a device; see `semanticblur_core.inference.backends.Backend`.

    On the CPU, with a warning, where a GPU's memory does not hold the network, or not one image.

    Parameters
    ----------
    network
        As trained; a copy is made for inference.
    device, precision
        See `semanticblur_core.device.choose_device`.
    compiled
        Through ``torch.compile``, and as one graph on a CUDA GPU: faster, after half a minute for
        each new size. Batches are filled up to 1, 2, 4, 8 ... images, so that few are compiled.
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
        self._network = network.for_inference(dtype)
        forward = compile_forward(self._network, where) if compiled else self._network.__call__
        # One value, which changes at once: another thread may be computing.
        self._running: _Running = forward, where, dtype
        # Images that fit at once, by their height and width, where memory ran out before.
        self._most: dict[tuple[int, ...], int] = {}
        if not self._fits_on(where):
            self._move_to_cpu(self.device)

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
        where, shape = self.device, images.shape[1:3]
        most = self._most.get(shape, len(images))
        if len(images) <= most:
            try:
                return self._infer(images)
            except RuntimeError as error:  # torch's out of memory is one
                if not is_out_of_memory(error):
                    raise
            if len(images) == 1:
                if where == "cpu":
                    raise SemanticBlurError(
                        f"out of memory for {shape[0]} x {shape[1]} px at once; a smaller size or "
                        "native tiles need less"
                    )
                self._move_to_cpu(where)
                return self.tensors(images)
            most = self._most[shape] = len(images) // 2
        parts = [self.tensors(images[i : i + most]) for i in range(0, len(images), most)]
        return torch.cat([part.to(parts[-1].device) for part in parts])  # the last may be the CPU's

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
        batch = torch.from_numpy(images).to(device)
        if self.name == "compile":
            batch = _fill_up(batch)
        # Whatever precision the program computes in around this.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            try:
                logits = forward(normalise(batch.permute(0, 3, 1, 2)).to(dtype))
            except RuntimeError as error:
                if not is_out_of_memory(error) and _is_of_compiler(error):
                    raise _uncompiled(error) from error
                raise
            return torch.sigmoid(logits.float())[: len(images), 0]

    def _fits_on(self, where: torch.device) -> bool:
        """Move the network; False, with a part of it moved, if a GPU has no memory for it."""
        try:
            self._network.to(where)
        except RuntimeError as error:
            if where.type == "cpu" or not is_out_of_memory(error):
                raise
            return False
        return True

    def _move_to_cpu(self, was: str) -> None:
        with _MOVE_LOCK:
            if self.device != was:  # another thread was faster
                return
            held = self._running[1]
            self._network = _copy_on_cpu(self._network)
            self._running = self._network.__call__, torch.device("cpu"), torch.float32
            self.device, self.precision, self.name = "cpu", "float32", "torch"
            self.reason = f"{was} ran out of memory"
            self._most.clear()
            fused.release(held)
            if held.type == "cuda":
                torch.cuda.empty_cache()
        warnings.warn(f"{was} ran out of memory; going on with the CPU", stacklevel=2)


def _is_of_compiler(error: RuntimeError) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _uncompiled(error: RuntimeError) -> SemanticBlurError:
    """No compiler, say, or a kept library that a full disk cut off."""
    reason = str(error).strip().splitlines()[0]
    kept = re.search(r"\S*[/\\]torchinductor_\w+", reason)
    deleted = f", and what torch keeps in {kept[0]} can be deleted" if kept else ""
    return SemanticBlurError(
        f"torch.compile failed: {reason}; --backend=torch does without{deleted}"
    )


def _fill_up(images: torch.Tensor) -> torch.Tensor:
    """The last of ``(N, ...)`` repeated up to the next power of two: each number is compiled."""
    n_more = (1 << (len(images) - 1).bit_length()) - len(images)
    return torch.cat([images, *[images[-1:]] * n_more]) if n_more else images


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
