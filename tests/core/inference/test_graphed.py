"""A GPU's work recorded once and launched at once."""

import pickle
import threading
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from semanticblur_core.inference.graphed import _MAX_GRAPHS, _GraphedForward


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.inference_mode()
def test_each_input_gets_its_own_result() -> None:
    module = nn.Conv2d(3, 4, 3).cuda()
    forward = _GraphedForward(module)
    given = [torch.randn(2, 3, size, 20, device="cuda") for size in range(8, 8 + _MAX_GRAPHS + 2)]
    found = [forward(images) for images in given]
    found += [forward(images * 2) for images in given]
    for images, result in zip([*given, *(images * 2 for images in given)], found, strict=True):
        torch.testing.assert_close(result, module(images), atol=1e-3, rtol=1e-3)
    assert len(forward._graphs) == _MAX_GRAPHS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_threads_share_a_graph() -> None:
    module = nn.Conv2d(3, 4, 3).cuda()
    forward = _GraphedForward(module)
    images = [torch.randn(2, 3, 20, 20, device="cuda") for _ in range(4)]
    found: dict[int, torch.Tensor] = {}

    def run(k: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found[k] = forward(images[k])
            torch.cuda.synchronize()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        for k, given in enumerate(images):
            torch.testing.assert_close(found[k], module(given), atol=1e-3, rtol=1e-3)


class Recorder(_GraphedForward):
    """Runs on the processor; what is recorded is a function."""

    recorded: list[int]

    def _record(self, images: Tensor) -> Any:
        self.recorded.append(len(images))
        given = images.clone()
        result = torch.empty_like(images)

        class Graph:
            def replay(_) -> None:  # noqa: N805
                result.copy_(self._forward(given))

        return Graph(), given, result


def test_the_sizes_used_last_are_kept() -> None:
    recorder = Recorder(lambda x: x * 2)
    recorder.recorded = []
    for size in (1, 2, 3, 4, 1, 5, 1, 2):
        images = torch.full((size,), float(size))
        result = recorder._run(images)
        assert result is not None
        assert torch.equal(result, images * 2)
    assert recorder.recorded == [1, 2, 3, 4, 5, 2]


def test_a_detector_s_forward_can_be_pickled() -> None:
    copied = pickle.loads(pickle.dumps(_GraphedForward(torch.neg)))
    assert isinstance(copied, _GraphedForward)
    assert copied._forward is torch.neg


class Streams:
    """Stands for CUDA's, on the processor; what the allocator is told of is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Tensor] = []
        self.entered = 0
        for name in ("Stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, Mock())
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self.enter)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, _: self.told.append(tensor))

    def enter(self, _: object) -> Any:
        self.entered += 1
        return nullcontext()


class Refuses(Recorder):
    """Whose recording of two images fails."""

    def _record(self, images: Tensor) -> Any:
        recorded = super()._record(images)
        return None if len(images) == 2 else recorded


def test_after_a_failed_recording_all_runs_on_the_caller_s_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams, refuses = Streams(monkeypatch), Refuses(lambda x: x * 2)
    refuses.recorded = []
    for size in (1, 2, 1, 2, 3):
        images = torch.full((size,), float(size))
        assert torch.equal(refuses(images), images * 2)
    assert refuses.recorded == [1, 2]
    assert streams.entered == 2
    assert len(streams.told) == 2  # the first input and its result
    assert not refuses._graphs  # which are of no use any more


def test_an_error_of_the_network_is_no_failed_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is too small says nothing of those to come."""

    def forward(x: Tensor) -> Tensor:
        if len(x) < 2:
            raise RuntimeError("too small")
        return x * 2

    Streams(monkeypatch)
    graphed = _GraphedForward(forward)
    with pytest.raises(RuntimeError, match="too small"):
        graphed(torch.zeros(1))
    assert graphed._records
    recorded = []
    monkeypatch.setattr(graphed, "_capture", lambda given: recorded.append(len(given)))
    assert torch.equal(graphed(torch.ones(2)), torch.full((2,), 2.0))
    assert recorded == [2]
