"""Batches, and what happens when memory runs out."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from semanticblur_core import Detector, SemanticBlur
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.torch_backend import TorchBackend, _copy_on_cpu


@pytest.fixture(scope="module")
def network() -> SemanticBlur:
    torch.manual_seed(4)
    return SemanticBlur()


@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_map_does_not_depend_on_the_batch(network: SemanticBlur, batch_size: int) -> None:
    stack = np.random.default_rng(1).integers(0, 256, (5, 90, 150), np.uint8)
    how = {"device": "cpu", "precision": "float32"}
    one, many = Detector(network, **how), Detector(network, **how, batch_size=batch_size)
    for size in ("native", 64):
        ours, theirs = (
            {u.index: u.blur.copy() for u in d.iter_planes(stack, "ZYX", size=size, tile_size_px=64,
             overlap_px=16) if u.plane_done}
            for d in (one, many)
        )  # fmt: skip
        assert list(ours) == list(theirs) == [(z,) for z in range(5)]
        for index, blur in ours.items():
            np.testing.assert_allclose(theirs[index], blur, atol=1e-3, rtol=0)


def fail_above(n_images: int, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Out of memory for more images at once; the batches that were tried."""
    infer, tried = backend._infer, []

    def limited(images: NDArray[np.float32]) -> torch.Tensor:
        tried.append(len(images))
        if len(images) > n_images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(images)

    monkeypatch.setattr(backend, "_infer", limited)
    return tried


def test_out_of_memory_halves_the_batch(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(network, device="cpu", precision="float32")
    images = np.random.default_rng(2).random((5, 64, 64, 3), np.float32)
    expected = backend.run(images)
    tried = fail_above(2, backend, monkeypatch)
    np.testing.assert_allclose(backend.run(images), expected, atol=1e-5)
    assert tried == [5, 2, 3, 1, 2]


def test_a_gpu_without_memory_hands_over_to_the_cpu(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(network, device="cpu", precision="float32")
    images = np.random.default_rng(2).random((1, 64, 64, 3), np.float32)
    expected = backend.run(images)
    backend.device = "cuda:0"  # as far as it knows
    infer = backend._infer

    def only_on_the_cpu(images: NDArray[np.float32]) -> torch.Tensor:
        if backend.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(images)

    monkeypatch.setattr(backend, "_infer", only_on_the_cpu)
    with pytest.warns(UserWarning, match="cuda:0 ran out of memory; going on with the CPU"):
        np.testing.assert_allclose(backend.run(images), expected, atol=1e-5)
    assert (backend.device, backend.reason) == ("cpu", "cuda:0 ran out of memory")


def test_halves_on_two_devices_come_together(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half still fitted on the GPU; "meta" stands for the device of the second."""
    backend = TorchBackend(network, device="cpu", precision="float32")
    devices = iter(["cpu", "meta"])

    def infer(images: NDArray[np.float32]) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(images.shape[:3], device=next(devices))

    monkeypatch.setattr(backend, "_infer", infer)
    maps = backend.tensors(np.zeros((4, 64, 80, 3), np.float32))
    assert (maps.shape, maps.device.type) == ((4, 64, 80), "meta")


def test_a_cpu_without_memory_says_what_would_do(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(network, device="cpu", precision="float32")
    fail_above(0, backend, monkeypatch)
    with pytest.raises(SemanticBlurError, match=r"out of memory for 64 x 80 px.*native tiles"):
        backend.run(np.zeros((2, 64, 80, 3), np.float32))


def test_the_copy_on_the_cpu_leaves_the_network_to_other_threads(network: SemanticBlur) -> None:
    half = network.for_inference(torch.bfloat16)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = half(x.bfloat16())
        torch.testing.assert_close(
            _copy_on_cpu(half)(x), half.float()(x)
        )  # of the same rounded weights
        assert torch.equal(half.bfloat16()(x.bfloat16()), before)
