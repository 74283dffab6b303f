"""Which back end is fastest on this machine: measured once in processes of their own, kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from semanticblur_core import disk, weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.backends import BACKENDS, BackendName, installed
from semanticblur_core.machine import processor_name

_log = logging.getLogger(__name__)

# Speeds are remembered for squares of this size only; other sizes count by their area.
REMEMBERED_SIZE_PX = 320
# Beyond it other work slowed some rounds down, and perhaps not each back end's alike.
MOST_SCATTER = 0.3
# Below this gain another back end is not worth a second code path.
WORTHWHILE = 0.9
_Records = dict[str, dict[str, dict[str, Any]]]
# Of the exported graph; raised when that changes: files and times of a former one are not used.
EXPORTED_FORM = 2
_PACKAGES = ("torch", "openvino", "onnxruntime")
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class BackendSpeed:
    """Seconds from the start of a process to its first map, and for each further one.

    ``scatter`` is the middle half of the latter's range, as a share of their median.
    """

    backend: BackendName
    startup_s: float
    seconds_per_image: float
    precision: str
    device: str
    scatter: float = 0.0


def measure_backends(
    model: str = "default",
    *,
    device: str = "auto",
    size_px: int = REMEMBERED_SIZE_PX,
    n_rounds: int = 10,
) -> Iterator[BackendSpeed | SemanticBlurError]:
    """Time each back end that is installed; remember the results if the size is 320 px.

    They count for this machine, the model's architecture and the device that was asked for. Times
    that scatter by more than `MOST_SCATTER`, as beside other work, are not remembered.

    Parameters
    ----------
    model
        Packaged model, own model or file of weights.
    device
        ``auto`` or ``cpu``, as it will be asked for.
    size_px
        Side of the square images.
    n_rounds
        Images timed; the median counts.

    Yields
    ------
    BackendSpeed or SemanticBlurError
        For each in turn: its speed, or why it cannot run.
    """
    speeds = []
    for backend in BACKENDS:
        if not installed(backend):
            yield SemanticBlurError(f"{backend}: not installed")
            continue
        found = _measure_apart(backend, model, device, size_px, n_rounds)
        if isinstance(found, BackendSpeed):
            speeds.append(found)
        yield found
    if size_px != REMEMBERED_SIZE_PX or any(speed.scatter > MOST_SCATTER for speed in speeds):
        return
    config = weights.read_info(weights.resolve(model)).architecture
    asked = {device}
    if all(speed.device == "cpu" for speed in speeds):
        asked.add("cpu")  # no GPU was taken, so that auto is the CPU here
    records = _read()
    for name in asked:
        records[_key(config, name)] = {speed.backend: asdict(speed) for speed in speeds}
    disk.write_text(_record_file(), json.dumps(records, indent=1) + "\n")


def remembered(config: ModelConfig, device: str = "auto") -> dict[str, BackendSpeed]:
    """Speeds of an architecture on this machine with the packages of now; empty if none is known.

    ``device`` is the one asked for, ``auto`` or ``cpu``.
    """
    try:
        found = _read().get(_key(config, device), {})
        return {name: BackendSpeed(**values) for name, values in found.items()}
    except (TypeError, AttributeError):  # written by another version
        return {}


def pick_backend(
    info: weights.WeightsInfo,
    n_images: float = 1,
    precision: str = "auto",
    device: str = "auto",
) -> tuple[BackendName, str]:
    """Back end that finishes first, start-up included, and why (one line for people).

    Parameters
    ----------
    info
        Of the weights; an exported file that must first be made counts against a back end.
    n_images
        How many are to come, as squares of 320 px.
    precision
        Other than ``auto``: only torch and those that were measured in it.
    device
        As asked for, ``auto`` or ``cpu``: speeds measured for the other one do not count.
    """
    speeds = {
        name: speed
        for name, speed in remembered(info.architecture, device).items()
        if precision in ("auto", speed.precision) or name == "torch"
    }
    if "torch" not in speeds:
        flag = " --device=cpu" if device == "cpu" else ""
        command = f"semanticblur-core bench backends{flag}"
        return "torch", f"{command} finds out whether another is faster"

    is_exported = exported_file(info.sha256).is_file()

    def total_s(speed: BackendSpeed) -> float:
        making = 0.0
        if speed.backend in ("onnxruntime", "openvino") and not is_exported:
            making = _EXPORT_S
        return making + speed.startup_s + n_images * speed.seconds_per_image

    ours = total_s(speeds["torch"])
    best = min(speeds.values(), key=total_s)
    if best.backend == "torch" or total_s(best) > WORTHWHILE * ours:
        return "torch", "measured: no other is faster by a tenth for so many images"
    ms = {name: f"{speeds[name].seconds_per_image * 1e3:.0f} ms" for name in speeds}
    reason = f"{best.backend}, measured: {ms[best.backend]} an image, torch {ms['torch']}"
    return best.backend, reason


# Roughly what an export takes.
_EXPORT_S = 20.0


def exported_file(sha256: str) -> Path:
    """Where the exported form of weights is kept between runs."""
    return disk.user_folder() / "exported" / f"{sha256[:32]}-{EXPORTED_FORM}.onnx"


def ensure_exported(model: str) -> Path:
    """The exported form of a model, made if it is not there.

    Raises
    ------
    SemanticBlurError
        As `semanticblur_core.inference.export.export_onnx`.
    """
    # By what the tensors are, not by what the file says: it stands for all weights of that name.
    path = exported_file(weights.read_verified(model).sha256)
    if not path.is_file():
        from semanticblur_core.inference.export import export_onnx

        _log.info("%s: its exported form is made, once; about %.0f s", model, _EXPORT_S)
        export_onnx(model, path)
    return path


def _measure_apart(
    backend: BackendName, model: str, device: str, size_px: int, n_rounds: int
) -> BackendSpeed | SemanticBlurError:
    if backend in ("onnxruntime", "openvino"):
        try:
            ensure_exported(model)
        except SemanticBlurError as error:
            return SemanticBlurError(f"{backend}: {error}")
    # -P: not the files of the folder that one happens to be in.
    command = [sys.executable, "-P", "-m", "semanticblur_core.inference.timing"]
    start = time.time()
    try:
        done = subprocess.run(
            [*command, backend, model, device, str(size_px), str(n_rounds)],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return SemanticBlurError(f"{backend}: took more than {_TIMEOUT_S:.0f} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return SemanticBlurError(f"{backend}: {lines[-1]}")
    values = json.loads(done.stdout.splitlines()[-1])
    startup_s = values.pop("first_map_at") - start
    return BackendSpeed(backend=backend, startup_s=startup_s, **values)


def _record_file() -> Path:
    return disk.user_folder() / "backends.json"


def _read() -> _Records:
    try:
        found = json.loads(_record_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("_Records", found if isinstance(found, dict) else {})


def _key(config: ModelConfig, device: str) -> str:
    """What the speeds depend on; a change of any part asks for a new measurement."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    gpu = "GPU" if shutil.which("nvidia-smi") else "no GPU"
    machine = [processor_name(), f"{os.cpu_count()} cores", gpu, *versions]
    machine.append(f"exported form {EXPORTED_FORM}")
    architecture = json.dumps(config.to_dict(), sort_keys=True)
    return ", ".join([*machine, f"device {device}", architecture])
