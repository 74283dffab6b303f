"""A forward pass on a CUDA GPU as one graph, instead of some two hundred launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Each holds its input, output and whatever lies between.
_MAX_GRAPHS = 4


def compile_forward(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A module through ``torch.compile`` and, on a CUDA GPU, as a graph; for inference only.

    Each new size and number of images is compiled, and captured, when it first comes.
    """
    forward: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=False)
    return _GraphedForward(forward) if device.type == "cuda" else forward


class _GraphedForward:
    """Records what a function launches for an input of some shape, and launches that at once.

    Parameters
    ----------
    forward
        Of one tensor on a CUDA GPU, with nothing in it that waits for the GPU once it is warm.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._lock = threading.Lock()  # a graph has one input and one output

    def __call__(self, images: Tensor) -> Tensor:
        key = (images.shape, images.dtype, images.device)
        with self._lock, torch.cuda.device(images.device):
            if key not in self._graphs:
                while len(self._graphs) >= _MAX_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = self._capture(images)
            graph, given, result = self._graphs[key]
            given.copy_(images)
            graph.replay()
            return result.clone()

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = images.clone()
        # What is done once (compiling, workspaces, the choice of kernels) has to be done before.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._forward(given)
        return graph, given, result
