"""Which precision is taken, and that it is the same the next time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from semanticblur_core import device


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a machine whose processor has bfloat16, of which nothing is remembered."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN has no bfloat16 to time")
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    device.bfloat16_pays.cache_clear()
    yield tmp_path
    device.bfloat16_pays.cache_clear()


def in_a_new_process() -> torch.dtype:
    device.bfloat16_pays.cache_clear()
    return device.choose_device("cpu", "auto").dtype


@pytest.mark.parametrize("pays", [False, True])
def test_a_stopwatch_decides_once(home: Path, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    answers = iter([pays, not pays])
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: next(answers))
    expected = torch.bfloat16 if pays else torch.float32
    assert [in_a_new_process() for _ in range(3)] == [expected] * 3
    assert device.settle_precision("cpu", "auto") == str(expected).removeprefix("torch.")
    assert device.settle_precision("cpu", "float32") == "float32"
    [path] = home.iterdir()
    assert list(json.loads(path.read_text()).values()) == [pays]
    path.write_text("[]")
    assert in_a_new_process() != expected


def test_of_two_processes_that_measure_at_once_the_first_one_counts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken() -> bool:
        monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: True)
        assert in_a_new_process() == torch.bfloat16
        return False

    monkeypatch.setattr(device, "_bfloat16_is_faster", overtaken)
    assert in_a_new_process() == torch.bfloat16


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(home / "file" / "below"))
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)
    assert in_a_new_process() == torch.float32


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 9.00 GB)",
        "Invalid buffer size: 13.73 GB",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "std::bad_alloc",
    ],
)
def test_memory_runs_out_in_many_words(message: str) -> None:
    assert device.is_out_of_memory(RuntimeError(message))


def test_other_errors_are_no_lack_of_memory() -> None:
    assert device.is_out_of_memory(torch.OutOfMemoryError("Allocation on device"))
    for message in (
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "The size of tensor a (3) must match the size of tensor b (4)",
    ):
        assert not device.is_out_of_memory(RuntimeError(message))


def test_bfloat16_is_that_of_the_gpu_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the current one, which torch's own function asks."""
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda which: (8, 0) if which == new else (7, 5)
    )
    device.bfloat16_pays.cache_clear()
    for _ in range(2):
        assert device.choose_device("cuda:0").dtype == torch.float32
        assert device.choose_device("cuda:1").dtype == torch.bfloat16
    assert [device.computes_bfloat16(gpu) for gpu in (old, new)] == [False, True]
    device.bfloat16_pays.cache_clear()
    # AMD's GPUs count their capabilities otherwise.
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert device.computes_bfloat16(old)
    assert device.choose_device("cuda:0").dtype == torch.bfloat16
    device.bfloat16_pays.cache_clear()
