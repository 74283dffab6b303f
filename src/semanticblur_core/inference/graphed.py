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
# A graph, its input and its output.
_Recorded = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]


def compile_forward(module: nn.Module, device: torch.device) -> Forward:
    """A module through ``torch.compile`` and, on a CUDA GPU, as a graph; for inference only.

    Each new size and number of images is compiled, and recorded, when it first comes; from the
    ninth on ``torch.compile`` lets the module run as it is.
    """
    forward: Forward = torch.compile(module, dynamic=False)
    return _GraphedForward(forward) if device.type == "cuda" else forward


class _GraphedForward:
    """Records what a function launches for an input of some shape, and launches that at once.

    Once something could not be recorded, all runs as it is, on the stream that it is asked from: a
    failed recording leaves torch's allocator in a state in which it never frees what another stream
    was said to use.

    Parameters
    ----------
    forward
        Of one tensor on a CUDA GPU, with nothing in it that waits for the GPU once it is warm.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[Any, _Recorded] = {}
        self._records = True
        self._lock = threading.Lock()
        # One for all: each replay overwrites what the one before was given and gave.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _GraphedForward, (self._forward,)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        result = self._replayed(images)
        return self._forward(images) if result is None else result

    def _replayed(self, images: Tensor) -> Tensor | None:
        """Result on the stream asked from; None if it cannot be recorded."""
        with self._lock, torch.cuda.device(images.device):
            if not self._records:
                return None
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            asked_from = torch.cuda.current_stream()
            self._stream.wait_stream(asked_from)
            with torch.cuda.stream(self._stream):
                result = self._run(images)
            asked_from.wait_stream(self._stream)
        if result is None:
            return None
        # The allocator is to know that the other stream uses them.
        images.record_stream(self._stream)
        result.record_stream(asked_from)
        return result

    def _run(self, images: Tensor) -> Tensor | None:
        key = (images.shape, images.dtype)
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # the one that was used last
        else:
            while len(self._graphs) >= _MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            recorded = self._record(images)
            if recorded is None:
                self._records = False
                self._graphs.clear()
                return None
            self._graphs[key] = recorded
        graph, given, result = self._graphs[key]
        given.copy_(images)
        graph.replay()
        return result.clone()

    def _record(self, images: Tensor) -> _Recorded | None:
        given = images.clone()
        try:
            # What is done once (compiling, workspaces, choosing kernels) has to be done before.
            for _ in range(3):
                self._forward(given)
            return self._capture(given)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._graphs.clear()
            raise

    def _capture(self, given: Tensor) -> _Recorded | None:
        graph = torch.cuda.CUDAGraph()
        try:
            how = {"pool": self._pool, "stream": self._stream}
            # Other threads may go on launching meanwhile.
            with _RECORDING, torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                result = self._forward(given)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return None
        return graph, given, result
