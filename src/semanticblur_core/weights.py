"""Files of weights: safetensors with JSON metadata, the packaged default, verification.

The metadata of a file holds, as JSON text under the key ``semanticblur``: ``format_version``,
``architecture`` (a `ModelConfig`), ``provenance`` (data, recipe, seed, date, software), ``metrics``
(with their protocol), ``licence`` and ``sha256`` of the tensors. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semanticblur_core import io
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from semanticblur_core.network import SemanticBlur

FORMAT_VERSION = 1
METADATA_KEY = "semanticblur"
PACKAGED = {"default": "semanticblur-resnet50.safetensors"}


@dataclass(frozen=True)
class WeightsInfo:
    """What a file of weights says of itself, and its size in bytes."""

    path: Path
    architecture: ModelConfig
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    licence: str
    sha256: str
    size_bytes: int


def resolve(name: str) -> Path:
    """Path of a packaged model's name, or of a file.

    Raises
    ------
    WeightsError
        If it is neither.
    """
    if name in PACKAGED:
        path = Path(str(resources.files("semanticblur_core.assets") / PACKAGED[name]))
        if not path.is_file():
            raise WeightsError(f"model {name}: {path} is missing; reinstall the package")
        return path
    path = Path(name)
    if path.is_file():
        return path
    raise WeightsError(f"model {name}: neither a packaged model ({', '.join(PACKAGED)}) nor a file")


def read_info(path: Path) -> WeightsInfo:
    """Metadata of a file of weights, without reading the tensors.

    Raises
    ------
    WeightsError
        If the file is missing, not safetensors, truncated, or not made by this package.
    """
    with _open(path) as handle:
        metadata = handle.metadata() or {}
    if METADATA_KEY not in metadata:
        raise WeightsError(f"{path}: a safetensors file, but not of SemanticBlur weights")
    try:
        values = json.loads(metadata[METADATA_KEY])
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise WeightsError(
                f"{path}: weights of format version {version}; this release reads "
                f"{FORMAT_VERSION}, so another release of napari-semanticblur is needed"
            )
        return WeightsInfo(
            path=path,
            architecture=ModelConfig.from_dict(values["architecture"]),
            provenance=dict(values["provenance"]),
            metrics=dict(values["metrics"]),
            licence=str(values["licence"]),
            sha256=str(values["sha256"]),
            size_bytes=path.stat().st_size,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise WeightsError(f"{path}: damaged metadata: {error}") from error


def load(name: str) -> tuple[SemanticBlur, WeightsInfo]:
    """Network with the weights of a packaged model or a file, in float32 on the CPU.

    Raises
    ------
    WeightsError
        If the file is missing, damaged or of another kind or architecture.
    """
    info = read_info(resolve(name))
    return _build(info, _read_tensors(info)), info


def _build(info: WeightsInfo, tensors: dict[str, Tensor]) -> SemanticBlur:
    """Network of the file's architecture holding its tensors."""
    import torch

    from semanticblur_core.network import SemanticBlur

    with torch.device("meta"):
        model = SemanticBlur(info.architecture)
    foreign = sorted(set(tensors) - set(model.state_dict()))
    if foreign:
        raise WeightsError(
            f"{info.path}: {len(foreign)} tensors do not belong to a "
            f"{info.architecture.backbone} network, first {foreign[0]}"
        )
    try:
        model.load_state_dict({k: t.float() for k, t in tensors.items()}, strict=False, assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{info.path}: tensors do not fit the architecture in its metadata: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    counters = {k: torch.zeros((), dtype=torch.long) for k in model.state_dict() if _is_counter(k)}
    model.load_state_dict(counters, strict=False, assign=True)
    missing = [k for k, t in model.state_dict().items() if t.is_meta]
    if missing:
        raise WeightsError(f"{info.path}: {len(missing)} tensors are missing, first {missing[0]}")
    return model.eval()


def save(
    path: Path,
    model: SemanticBlur,
    *,
    provenance: dict[str, Any],
    metrics: dict[str, Any],
    licence: str,
    half: bool = True,
) -> None:
    """Write a network's weights.

    Parameters
    ----------
    path
        File to write; replaced as a whole.
    model
        Network, on any device.
    provenance, metrics, licence
        See the module's text.
    half
        Store convolutions and linear layers as float16; vectors (batch normalisation, biases,
        fusion weights) always stay float32, because running variances leave float16's range.

    Raises
    ------
    WeightsError
        If a tensor is not finite or leaves float16's range, or the file cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if model.fixed is not None:
        raise WeightsError(f"{path}: a network made for inference cannot be saved; save its origin")
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if _is_counter(key):
            continue
        stored = (
            tensor.detach().cpu().to(torch.float16 if half and tensor.ndim > 1 else torch.float32)
        )
        if not torch.isfinite(stored).all():
            raise WeightsError(f"{path}: {key} is not finite; the weights are not written")
        tensors[key] = stored.contiguous()
    metadata = {
        "format_version": FORMAT_VERSION,
        "architecture": model.config.to_dict(),
        "provenance": provenance,
        "metrics": metrics,
        "licence": licence,
        "sha256": digest(tensors),
    }
    with io.replacing(path, durable=True) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(metadata)})
        except SafetensorError as error:
            raise WeightsError(f"{path}: cannot be written: {error}") from error


def verify(name: str) -> WeightsInfo:
    """Check the tensors of a model against the sha256 in its metadata.

    Raises
    ------
    WeightsError
        If they differ, or as in `load`.
    """
    info = read_info(resolve(name))
    tensors = _read_tensors(info)
    found = digest(tensors)
    if found != info.sha256:
        raise WeightsError(
            f"{info.path}: the tensors do not match their sha256 (expected {info.sha256[:12]}..., "
            f"got {found[:12]}...): the file was changed or damaged"
        )
    _build(info, tensors)
    return info


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    import torch

    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        sha.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _read_tensors(info: WeightsInfo) -> dict[str, Tensor]:
    with _open(info.path) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({str(error).splitlines()[0]}); "
            "it is truncated, or of another kind"
        ) from error
