"""Choice of device and precision, with the reason."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from semanticblur_core import disk
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.machine import processor_name

# What torch, CUDA's libraries, Apple's and C++ say when memory runs out, in small letters.
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "alloc_failed",
    "allocation_failed",
    "allocation failed",
    "invalid buffer size",
    "bad_alloc",
)


class DeviceChoice(NamedTuple):
    """A device, a floating-point type, and why they were chosen (one line for people)."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, a GPU's or the computer's, which is no kind of its own."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    message = str(error).lower()
    return any(words in message for words in _OUT_OF_MEMORY)


def choose_device(device: str = "auto", precision: str = "auto") -> DeviceChoice:
    """Device and precision to compute on.

    Parameters
    ----------
    device
        ``auto`` (CUDA, else Apple's MPS, else CPU), ``cpu``, ``cuda`` (or ``cuda:1`` ...), ``mps``.
    precision
        ``auto``: bfloat16 where the device is faster with it, else float32. ``float16`` is for
        CUDA only.

    Raises
    ------
    ConfigError
        If the device is unknown or not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            chosen, why = torch.device("cuda"), "CUDA GPU found"
        elif torch.backends.mps.is_available():
            chosen, why = torch.device("mps"), "Apple GPU found"
        else:
            chosen, why = torch.device("cpu"), "no GPU found"
    else:
        chosen, why = _named_device(device), f"{device} as asked"
    if precision == "float32":
        return DeviceChoice(chosen, torch.float32, f"{why}; float32")
    if precision == "bfloat16":
        return DeviceChoice(chosen, torch.bfloat16, f"{why}; bfloat16")
    if precision == "float16":
        if chosen.type != "cuda":
            raise ConfigError(f"precision float16: needs a CUDA GPU, not {chosen.type}")
        return DeviceChoice(chosen, torch.float16, f"{why}; float16")
    if precision != "auto":
        raise ConfigError(f"precision {precision!r}: expected auto, float32, bfloat16 or float16")
    if bfloat16_pays(chosen):
        return DeviceChoice(chosen, torch.bfloat16, f"{why}; bfloat16 is faster here")
    return DeviceChoice(chosen, torch.float32, f"{why}; bfloat16 is not faster here")


def _named_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or mps")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(f"device {name!r}: there is no such GPU here; choose cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps': there is no Apple GPU here; choose cpu or auto")
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: always the same answer, unlike a stopwatch.

    False where torch does not say: on Arm processors, and in versions that know no capabilities.
    """
    if device.type == "cuda":
        return _gpu_computes_bfloat16(device)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(
        capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16")
    )


def _gpu_computes_bfloat16(device: torch.device) -> bool:
    if torch.version.hip is not None:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Of this GPU: torch's own function asks the current one.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def settle_precision(device: str, precision: str) -> str:
    """Precision for several processes on this machine: a CPU's is found here, not by each.

    That of GPUs is left to them: what they find is always the same.
    """
    if precision != "auto" or device.startswith("cuda"):
        return precision
    if device == "auto" and torch.cuda.is_available():
        return precision
    return str(choose_device(device, precision).dtype).removeprefix("torch.")


@lru_cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions run at least 1.2 times as fast in bfloat16 on a device.

    On a CPU it is timed once and remembered in the user's folder: a stopwatch does not give the
    same answer twice, and what it says changes the maps.
    """
    if device.type == "cuda":
        return _gpu_computes_bfloat16(device)
    mkldnn_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not mkldnn_available:
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    path = disk.user_folder() / "precision.json"
    key = f"{processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    known = _read_remembered(path)
    if key not in known:
        pays = _bfloat16_is_faster()
        known = {key: pays} | _read_remembered(path)  # of two processes the first one counts
        with suppress(ImageError):  # a folder that cannot be written: measured again next time
            disk.write_text(path, json.dumps(known, indent=1) + "\n")
    return known[key]


def _read_remembered(path: Path) -> dict[str, bool]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): bool(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _bfloat16_is_faster() -> bool:
    n_rounds = 20
    seconds = {torch.float32: [0.0] * n_rounds, torch.bfloat16: [0.0] * n_rounds}
    layers = {dtype: nn.Conv2d(128, 128, 3, padding=1).to(dtype) for dtype in seconds}
    inputs = {
        dtype: torch.ones(1, 128, 40, 40, dtype=dtype).to(memory_format=torch.channels_last)
        for dtype in seconds
    }
    # In one thread: several wait for each other, on a busy machine for tens of milliseconds.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for i in range(n_rounds):
                for dtype, layer in layers.items():
                    start = time.perf_counter()
                    layer(inputs[dtype])
                    seconds[dtype][i] = time.perf_counter() - start
    finally:
        torch.set_num_threads(n_threads)
    return min(seconds[torch.bfloat16]) * 1.2 < min(seconds[torch.float32])


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for reuse instead of returning them at once.

    Feature maps are tens of megabytes; mapping and zeroing them anew for each layer took up to 40 %
    of a training step on the CPU. Called by the command line, never on import; no effect elsewhere
    than on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
