"""A forward pass on a CUDA GPU as one graph, instead of some two hundred launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from semanticblur_core.device import is_out_of_memory

# Each holds an input and an output.
_MAX_GRAPHS = 4
# CUDA records one graph at a time in a process.
_RECORDING = threading.Lock()

Forward = Callable[[Tensor], Tensor]


def compile_forward(module: nn.Module, device: torch.device) -> Forward:
    """A module through ``torch.compile`` and, on a CUDA GPU, as a graph; for inference only.

    Each new size and number of images is compiled, and recorded, when it first comes; from the
    ninth on ``torch.compile`` lets the module run as it is.
    """
    forward: Forward = torch.compile(module, dynamic=False)
    return _GraphedForward(forward) if device.type == "cuda" else forward


class _GraphedForward:
    """Records what a function launches for an input of some shape, and launches that at once.

    What cannot be recorded runs as it is.

    Parameters
    ----------
    forward
        Of one tensor on a CUDA GPU, with nothing in it that waits for the GPU once it is warm.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = {}
        self._lock = threading.Lock()
        # One for all: each replay overwrites what the one before was given and gave.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _GraphedForward, (self._forward,)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        with self._lock, torch.cuda.device(images.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            asked_from = torch.cuda.current_stream()
            self._stream.wait_stream(asked_from)
            with torch.cuda.stream(self._stream):
                result = self._run(images)
            asked_from.wait_stream(self._stream)
        # The allocator is to know that the other stream uses them.
        images.record_stream(self._stream)
        result.record_stream(asked_from)
        return result

    def _run(self, images: Tensor) -> Tensor:
        key = (images.shape, images.dtype)
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # the one that was used last
        else:
            while len(self._graphs) >= _MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._record(images)
        recorded = self._graphs[key]
        if recorded is None:
            return self._forward(images)
        graph, given, result = recorded
        given.copy_(images)
        graph.replay()
        return result.clone()

    def _record(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None:
        given = images.clone()
        try:
            # What is done once (compiling, workspaces, choosing kernels) has to be done before.
            for _ in range(3):
                self._forward(given)
            graph = torch.cuda.CUDAGraph()
            how = {"pool": self._pool, "stream": self._stream}
            # Other threads may go on launching meanwhile.
            with _RECORDING, torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                result = self._forward(given)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._graphs.clear()
                raise
            return None
        return graph, given, result
