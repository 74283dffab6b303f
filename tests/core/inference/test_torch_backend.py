"""Batches, and what happens when memory runs out."""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo.exc import TorchDynamoException

from semanticblur_core import Detector, SemanticBlur
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference import torch_backend
from semanticblur_core.inference.torch_backend import TorchBackend, _copy_on_cpu
from semanticblur_core.network import fused


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
    assert tried == [5, 2, 2, 1]
    # What fits is known then, of images of that size.
    tried.clear()
    np.testing.assert_allclose(backend.run(images), expected, atol=1e-5)
    backend.run(images[:, :48])
    assert tried == [2, 2, 1, 5, 2, 2, 1]


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


def test_what_a_full_gpu_held_is_given_back(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network, the zeros that are kept beside it, and what torch's allocator keeps of both."""
    gpus = [torch.device("cuda", i) for i in range(2)]
    zeros = {(gpu, torch.float32): torch.zeros(1) for gpu in gpus}
    monkeypatch.setattr(fused, "_ZEROS", zeros)
    backend = TorchBackend(network, device="cpu", precision="float32")
    images = np.random.default_rng(2).random((3, 64, 64, 3), np.float32)
    expected = backend.run(images)
    held = weakref.ref(backend._network)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held() is None))
    infer, tried = backend._infer, []

    def only_on_the_cpu(images: NDArray[np.float32]) -> torch.Tensor:
        tried.append(len(images))
        if backend.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(images)

    monkeypatch.setattr(backend, "_infer", only_on_the_cpu)
    backend.device = "cuda:1"  # as far as it knows
    backend._running = backend._running[0], gpus[1], torch.float32
    with pytest.warns(UserWarning, match="cuda:1 ran out of memory; going on with the CPU"):
        np.testing.assert_allclose(backend.run(images), expected, atol=1e-5)
    assert list(zeros) == [(gpus[0], torch.float32)]
    assert emptied == [True]
    # What fitted on the GPU says nothing of the CPU.
    tried.clear()
    backend.run(images)
    assert tried == [3]


class Gpu:
    """Where networks are to go, and why they cannot."""

    def __init__(self, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        where, move = torch.device("cuda", 0), SemanticBlur.to

        def to(network: SemanticBlur, *given: object, **keywords: object) -> SemanticBlur:
            if where in given:
                raise RuntimeError(message)
            return move(network, *given, **keywords)  # type: ignore[call-overload,no-any-return]

        choice = DeviceChoice(where, torch.bfloat16, "test")
        monkeypatch.setattr(torch_backend, "choose_device", lambda *_: choice)
        monkeypatch.setattr(SemanticBlur, "to", to)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_too_full_for_the_network_hands_over_to_the_cpu(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    Gpu("CUDA error: out of memory", monkeypatch)
    with pytest.warns(UserWarning, match="cuda:0 ran out of memory; going on with the CPU"):
        backend = TorchBackend(network, compiled=compiled)
    assert (backend.device, backend.precision, backend.name) == ("cpu", "float32", "torch")
    maps = backend.tensors(np.zeros((1, 64, 64, 3), np.float32))
    assert (maps.shape, maps.device.type) == ((1, 64, 64), "cpu")


def test_a_gpu_that_fails_otherwise_is_an_error(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu("CUDA error: no kernel image is available", monkeypatch)
    with pytest.raises(RuntimeError, match="no kernel image"):
        TorchBackend(network)


def test_few_numbers_of_images_are_compiled(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compile_(module: SemanticBlur, **_: object) -> object:
        def forward(images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return module(images)  # type: ignore[no-any-return]

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    how = {"device": "cpu", "precision": "float32"}
    plain, compiled = TorchBackend(network, **how), TorchBackend(network, **how, compiled=True)  # type: ignore[arg-type]
    images = np.random.default_rng(2).random((9, 40, 40, 3), np.float32)
    expected = plain.run(images)
    for n in range(1, 10):
        np.testing.assert_allclose(compiled.run(images[:n]), expected[:n], atol=1e-5)
    assert seen == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_mixed_precision_around_it_changes_no_map(network: SemanticBlur) -> None:
    backend = TorchBackend(network, device="cpu", precision="float32")
    images = np.random.default_rng(2).random((1, 64, 64, 3), np.float32)
    expected = backend.run(images)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(backend.run(images), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as on Unix")
def test_a_forked_process_does_not_wait_for_threads_that_were_not_forked() -> None:
    code = """
import multiprocessing, os
import numpy as np
from semanticblur_core import Detector

detector = Detector(device="cpu", precision="float32", backend="torch")
image = np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8)
expected = detector.detect(image)

def work():
    again = Detector(device="cpu", precision="float32", backend="torch")
    for each in (detector, again):
        assert abs(each.detect(image) - expected).max() < 1e-4

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join(90)
os._exit(process.exitcode if process.exitcode is not None else 9)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=150, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_compiled_is_one_line_that_says_what_would_do(
    network: SemanticBlur, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a compiler is missing, or a full disk cut off a library that torch keeps."""

    def compile_(module: SemanticBlur, **_: object) -> object:
        def forward(images: torch.Tensor) -> torch.Tensor:
            raise TorchDynamoException("ImportError: /tmp/torchinductor_me/a.so: file too short\n?")

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = TorchBackend(network, device="cpu", precision="float32", compiled=True)
    with pytest.raises(SemanticBlurError) as caught:
        compiled.run(np.zeros((1, 64, 64, 3), np.float32))
    assert str(caught.value) == (
        "torch.compile failed: ImportError: /tmp/torchinductor_me/a.so: file too short; "
        "--backend=torch does without, and what torch keeps in /tmp/torchinductor_me can be deleted"
    )
