"""What computes the network: torch, or an exported file in ONNX Runtime or OpenVINO.

Which is fastest depends on the processor, so it is measured once and remembered
(`semanticblur_core.inference.choice`). Nothing here imports torch until torch is what computes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ConfigError, SemanticBlurError, WeightsError
from semanticblur_core.inference.upsampling import upsample_bilinear, upsample_nearest

BackendName = Literal["torch", "compile", "onnxruntime", "openvino"]
Resizing = Literal["bilinear", "nearest-exact"]
Upsampling = Literal["guided", "bilinear", "nearest-exact"]
BACKENDS: tuple[BackendName, ...] = ("torch", "compile", "onnxruntime", "openvino")
_CUDA = "CUDAExecutionProvider"
# What they say when memory runs out, in small letters.
_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "can't allocate")


class Backend(Protocol):
    """Runs the network.

    Attributes
    ----------
    name, device, precision
        What it is: one of `BACKENDS`, ``cpu`` or ``cuda:0`` ..., ``float32`` ...
    reason
        Why, one line for people.
    """

    name: str
    device: str
    precision: str
    reason: str

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(N, H, W)`` maps of ``(N, H, W, 3)`` images in 0..1."""
        ...

    def run_resized(
        self, images: NDArray[np.float32], shapes: Sequence[tuple[int, ...]], mode: Resizing
    ) -> list[NDArray[np.float32]]:
        """Maps of images ``(N, H, W, 3)``, each brought to the rows and columns in ``shapes``."""
        ...


@dataclass(frozen=True)
class ExportedInfo:
    """What an exported file says of itself; see `semanticblur_core.inference.export`."""

    architecture: ModelConfig
    sha256: str
    metadata: dict[str, Any]


class _ExportedBackend:
    """What ONNX Runtime and OpenVINO share: maps come as arrays and Pillow resizes them."""

    name: str
    device = "cpu"
    precision = "float32"
    reason: str
    # What it was opened with: a session cannot be pickled, but opened again elsewhere.
    _opened: tuple[Path, str, str]

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (type(self), *self._opened, self.reason)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(N, H, W)`` maps of ``(N, H, W, 3)`` images in 0..1."""
        batch = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        # A sigmoid in vector instructions may end a last bit above 1.
        return self._infer(batch)[:, 0].clip(0, 1)

    def run_resized(
        self, images: NDArray[np.float32], shapes: Sequence[tuple[int, ...]], mode: Resizing
    ) -> list[NDArray[np.float32]]:
        """Maps of images ``(N, H, W, 3)``, each brought to the rows and columns in ``shapes``."""
        return [
            resize_map(blur, shape[:2], mode)
            for blur, shape in zip(self.run(images), shapes, strict=True)
        ]  # fmt: skip

    def _infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        raise NotImplementedError


class OnnxRuntimeBackend(_ExportedBackend):
    """An exported file in ONNX Runtime, float32; on a CUDA GPU where its package has one."""

    def __init__(self, path: Path, *, device: str = "auto", precision: str = "auto") -> None:
        self._opened = (path.absolute(), device, precision)
        onnxruntime = _require("onnxruntime")
        self.name = "onnxruntime"
        if precision not in ("auto", "float32"):
            raise ConfigError(f"precision {precision}: onnxruntime computes in float32")
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device, re.ASCII) is None:
            raise ConfigError(f"device {device!r}: onnxruntime takes auto, cpu, cuda or cuda:N")
        providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
        if device != "cpu" and _CUDA in onnxruntime.get_available_providers():
            index = int(device.partition(":")[2] or 0)
            providers.insert(0, (_CUDA, {"device_id": index}))
        elif device not in ("auto", "cpu"):
            raise ConfigError(f"device {device!r}: this ONNX Runtime has the CPU only")
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = _n_threads()
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        # Its exceptions share no base but Exception.
        except Exception as error:
            raise _unreadable(path, error) from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.info = _read_info(path, metadata.get(weights.METADATA_KEY))
        # It goes on with the CPU where CUDA's libraries are missing, and only logs that.
        self.device = "cpu"
        if _CUDA in self._session.get_providers():
            self.device = "cuda" if device == "auto" else device
        if self.device == "cpu" and device not in ("auto", "cpu"):
            raise ConfigError(f"device {device!r}: ONNX Runtime fails to use the GPU")
        self.reason = f"{path.name} in ONNX Runtime"

    def _infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            [maps] = self._session.run(None, {"image": batch})
        except Exception as error:
            raise _failed("ONNX Runtime", error) from error
        return np.asarray(maps, np.float32)


class OpenVinoBackend(_ExportedBackend):
    """An exported file in OpenVINO, on the CPU; bfloat16 where the processor has it."""

    def __init__(self, path: Path, *, device: str = "auto", precision: str = "auto") -> None:
        self._opened = (path.absolute(), device, precision)
        openvino = _require("openvino")
        self.name = "openvino"
        if device not in ("auto", "cpu"):
            raise ConfigError(f"device {device!r}: the back end openvino runs on the CPU")
        core = openvino.Core()
        has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision {precision}: openvino takes float32 or bfloat16")
        use_bfloat16 = has_bfloat16 if precision == "auto" else precision == "bfloat16"
        self.precision = "bfloat16" if use_bfloat16 else "float32"
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if use_bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": _n_threads(),
        }
        try:
            model = core.read_model(str(path))
            where = ["framework", weights.METADATA_KEY]
            metadata = model.get_rt_info(where).astype(str) if model.has_rt_info(where) else None
            self.info = _read_info(path, metadata)
            compiled = core.compile_model(model, "CPU", hints)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request serves one thread at a time
        self.reason = f"{path.name} in OpenVINO; {self.precision}"

    def _infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._lock:
            try:
                found = self._request.infer({0: batch}, share_inputs=True)
            except RuntimeError as error:
                raise _failed("OpenVINO", error) from error
            return np.array(found[0], np.float32)


def _open_again(
    kind: type[_ExportedBackend], path: Path, device: str, precision: str, reason: str
) -> _ExportedBackend:
    opened: _ExportedBackend = kind(path, device=device, precision=precision)  # type: ignore[call-arg]
    opened.reason = reason
    return opened


def open_exported(
    path: Path, *, backend: str = "auto", device: str = "auto", precision: str = "auto"
) -> OnnxRuntimeBackend | OpenVinoBackend:
    """Back end for a file that ``semanticblur-core export`` wrote.

    Parameters
    ----------
    path
        ONNX file.
    backend
        ``onnxruntime``, ``openvino``, or ``auto``: ONNX Runtime, unless it is not installed or
        bfloat16 is asked for.
    device, precision
        See `semanticblur_core.Detector`.

    Raises
    ------
    WeightsError
        If it is no such file.
    ConfigError
        If the back end, device or precision does not fit.
    SemanticBlurError
        If the back end is not installed.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if backend == "auto":
        backend = "onnxruntime"
        if precision == "bfloat16" or (not installed(backend) and installed("openvino")):
            backend = "openvino"
    if backend == "onnxruntime":
        return OnnxRuntimeBackend(path, device=device, precision=precision)
    if backend == "openvino":
        return OpenVinoBackend(path, device=device, precision=precision)
    raise ConfigError(f"{path}: runs in onnxruntime or openvino, not {backend}")


def is_exported(model: str) -> bool:
    """Whether a model is an exported file by its name, for which torch is no back end."""
    return model.lower().endswith(".onnx")


def is_own_export(path: Path) -> bool:
    """Whether an ONNX file was written by `semanticblur_core.inference.export`; False if damaged.

    Its metadata are looked for in the bytes of the file, which needs no back end.
    """
    key = weights.METADATA_KEY.encode()  # field 1 of a property, with its length before it
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(2**20)
            stream.seek(max(0, size - 2**20))
            return bytes([10, len(key)]) + key in start + stream.read()
    except OSError:
        return False


def installed(backend: str) -> bool:
    """Whether the package of a back end can be imported."""
    return find_spec({"compile": "torch"}.get(backend, backend)) is not None


def resize_map(
    blur: NDArray[np.float32], shape: tuple[int, ...], mode: Resizing
) -> NDArray[np.float32]:
    """``(h, w)`` to ``(H, W)``, as torch's ``interpolate`` does it."""
    resize = upsample_bilinear if mode == "bilinear" else upsample_nearest
    return resize(blur, shape)


def _n_threads() -> int:
    """Threads of a session: ``OMP_NUM_THREADS``, as torch takes it; else 0, its own choice."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _read_info(path: Path, text: str | None) -> ExportedInfo:
    """Metadata of an exported file."""
    if text is None:
        raise WeightsError(
            f"{path}: not written by semanticblur-core export; other networks are scored by "
            "eval --model=FILE.onnx"
        )
    try:
        values = json.loads(text)
        architecture = ModelConfig.from_dict(values["architecture"])
        sha256 = str(values["sha256"])
        if not weights.is_sha256(sha256):
            raise ValueError("its sha256 is none")
        return ExportedInfo(architecture, sha256, values)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise WeightsError(f"{path}: damaged metadata: {error}") from error


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SemanticBlurError(
            f'back end {name}: not installed: pip install "napari-semanticblur[fast]"'
        ) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: not a readable ONNX network: {_first_line(error)}")


def _failed(name: str, error: Exception) -> SemanticBlurError:
    """Of a computation; OpenVINO says the reason last, after places in its code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        reason = "out of memory; a smaller size or native tiles need less"
    return SemanticBlurError(f"{name} failed: {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
