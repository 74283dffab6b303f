"""Files of weights: safetensors with JSON metadata, the packaged default, verification.

The metadata of a file holds, as JSON text under the key ``semanticblur``: ``format_version``,
``architecture`` (a `ModelConfig`), ``provenance`` (data, recipe, seed, date, software), ``metrics``
(with their protocol), ``licence`` and ``sha256`` of the tensors. Never pickle.

Models of one's own lie in a folder of the user's (``SEMANTICBLUR_HOME`` moves it) as
``models/NAME@VERSION.safetensors``; ``NAME`` is the newest version, ``NAME@2`` the second.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from semanticblur_core import disk
from semanticblur_core.config import Method, ModelConfig
from semanticblur_core.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from semanticblur_core.network import SemanticBlur

FORMAT_VERSION = 1
METADATA_KEY = "semanticblur"
PACKAGED = {"default": "semanticblur-resnet50.safetensors"}
MAX_NAME = 100
# Of a name, rather mistaken for the ending of a file of weights.
_FOREIGN_SUFFIXES = (".bin", ".ckpt", ".h5", ".json", ".npz", ".onnx", ".pt", ".pth", ".txt")


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


def resolve(name: str | Path) -> Path:
    """Path of a packaged model, of a file, or of a model of one's own (``NAME`` or ``NAME@2``).

    Raises
    ------
    WeightsError
        If it is none of these.
    """
    name = str(name)
    if name in PACKAGED:
        path = Path(str(resources.files("semanticblur_core.assets") / PACKAGED[name]))
        if not path.is_file():
            raise WeightsError(f"model {name}: {path} is missing; reinstall the package")
        return path
    path = Path(name)
    if _is_file(path):
        return path
    stem, _, number = name.partition("@")
    versions = model_versions(stem)
    if versions and not number:
        return versions[-1]
    for version in versions:
        if version.stem == name:
            return version
    known = ", ".join((*PACKAGED, *own_models()))
    raise WeightsError(f"model {_shortened(name)}: neither a model ({known}) nor a file")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise WeightsError(f"{_shortened(str(path))}: {error.strerror}") from error


def _shortened(name: str) -> str:
    """A name for a line of text; paths are that long at times, and longer by mistake alone."""
    return name if len(name) <= 300 else f"{name[:20]}..."


def models_folder() -> Path:
    """Folder of the user's own models; it need not exist."""
    return disk.user_folder() / "models"


def own_models() -> list[str]:
    """Names of the user's own models, sorted; each has at least one version."""
    return sorted({path.stem.partition("@")[0] for path in _own_files()})


def model_versions(name: str) -> list[Path]:
    """Files of a model of one's own, oldest version first; empty if there is none."""
    found = [path for path in _own_files() if path.stem.partition("@")[0] == name]
    return sorted(found, key=_version)


def next_version(name: str) -> Path:
    """File that a new version of a model of one's own is to be written to.

    Raises
    ------
    WeightsError
        If the name is a packaged model's or a method's, or cannot be one.
    """
    if name in PACKAGED:
        raise WeightsError(f"model {name}: is packaged and cannot be replaced; take another name")
    if name in get_args(Method):
        raise WeightsError(f"model {name}: is a method without weights; take another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ -]*", name) or name.endswith((".", " ")):
        raise WeightsError(
            f"model {name!r}: a name is of letters, digits, dots, dashes, underscores and spaces, "
            "and starts with a letter or digit"
        )
    if len(name) > MAX_NAME:
        raise WeightsError(f"model {name[:20]}...: a name has at most {MAX_NAME} characters")
    if Path(name).suffix.lower() in _FOREIGN_SUFFIXES:
        raise WeightsError(
            f"model {name}: looks like a file; a file of weights ends in .safetensors, a name of a "
            f"model not in {Path(name).suffix}"
        )
    versions = model_versions(name)
    for other in () if versions else own_models():
        if other.casefold() == name.casefold():
            raise WeightsError(
                f"model {name}: there is one called {other}, the same name to some disks; take "
                "another name, or that"
            )
    number = _version(versions[-1]) + 1 if versions else 1
    return models_folder() / f"{name}@{number}.safetensors"


def rename_model(name: str, new_name: str) -> None:
    """Rename a model of one's own, all its versions.

    Raises
    ------
    WeightsError
        If there is no such model, or the new name is taken or cannot be one.
    """
    versions = _versions_or_error(name)
    if model_versions(new_name):
        raise WeightsError(f"model {new_name}: there is one already; take another name")
    next_version(new_name)
    for path in versions:
        path.rename(path.with_name(f"{new_name}@{_version(path)}.safetensors"))


def delete_model(name: str) -> None:
    """Delete a model of one's own: all versions of ``NAME``, or ``NAME@2`` alone.

    Raises
    ------
    WeightsError
        If there is no such model.
    """
    stem = name.partition("@")[0]
    versions = [p for p in _versions_or_error(stem) if name in (stem, p.stem)]
    if not versions:
        raise WeightsError(f"model {name}: there is no such version")
    gone = {_sha256_of(path) for path in versions}
    for path in versions:
        path.unlink()
    kept = {_sha256_of(path) for path in (*map(resolve, PACKAGED), *_own_files())}
    for sha256 in gone - kept - {None}:
        # Exported forms, of any version of this package.
        for exported in (disk.user_folder() / "exported").glob(f"{str(sha256)[:32]}-*.onnx"):
            with suppress(OSError):
                exported.unlink()


def _sha256_of(path: Path) -> str | None:
    with suppress(WeightsError):  # damaged, and never exported
        return read_info(path).sha256
    return None


def _own_files() -> list[Path]:
    found = models_folder().glob("*@*.safetensors")
    return [path for path in found if path.stem.partition("@")[2].isdecimal() and path.is_file()]


def _version(path: Path) -> int:
    return int(path.stem.partition("@")[2])


def _versions_or_error(name: str) -> list[Path]:
    versions = model_versions(name)
    if not versions:
        raise WeightsError(f"model {name}: none of your own models ({', '.join(own_models())})")
    return versions


def read_info(path: str | Path) -> WeightsInfo:
    """Metadata of a file of weights, without reading the tensors.

    Raises
    ------
    WeightsError
        If the file is missing, not safetensors, truncated, or not made by this package.
    """
    path = Path(path)
    with _open(path, framework="np") as handle:
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
        sha256 = str(values["sha256"])
        if not is_sha256(sha256):  # it names files
            raise ValueError("its sha256 is none")
        return WeightsInfo(
            path=path,
            architecture=ModelConfig.from_dict(values["architecture"]),
            provenance=dict(values["provenance"]),
            metrics=dict(values["metrics"]),
            licence=str(values["licence"]),
            sha256=sha256,
            size_bytes=path.stat().st_size,
        )
    except (
        KeyError, TypeError, ValueError, AttributeError, RecursionError, ConfigError
    ) as error:  # fmt: skip
        raise WeightsError(f"{path}: damaged metadata: {error}") from error


def is_sha256(text: str) -> bool:
    """Whether it is a sha256 in hexadecimal."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def load(name: str | Path) -> tuple[SemanticBlur, WeightsInfo]:
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

    try:
        with torch.device("meta"):
            model = SemanticBlur(info.architecture)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:  # no memory holds it
        raise WeightsError(
            f"{info.path}: damaged metadata: {str(error).splitlines()[0]}"
        ) from error
    foreign = sorted(set(tensors) - set(model.state_dict()))
    if foreign:
        raise WeightsError(
            f"{info.path}: {len(foreign)} tensors do not belong to a "
            f"{info.architecture.backbone} network, first {foreign[0]}"
        )
    # A copy, also of float32: the file is to be free to change.
    single = {key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}
    try:
        model.load_state_dict(single, strict=False, assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{info.path}: tensors do not fit the architecture in its metadata: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    counters = {k: torch.zeros((), dtype=torch.long) for k in model.state_dict() if _is_counter(k)}
    model.load_state_dict(counters, strict=False, assign=True)
    for key, tensor in single.items():
        if not (tensors[key].is_floating_point() and bool(torch.isfinite(tensor).all())):
            raise WeightsError(f"{info.path}: {key} holds values that are no finite numbers")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise WeightsError(f"{info.path}: {key} holds negative variances")
    missing = [k for k, t in model.state_dict().items() if t.is_meta]
    if missing:
        raise WeightsError(f"{info.path}: {len(missing)} tensors are missing, first {missing[0]}")
    return model.eval()


def save(
    path: str | Path,
    model: SemanticBlur,
    *,
    provenance: dict[str, Any],
    metrics: dict[str, Any],
    licence: str,
    half: bool = True,
    new: bool = False,
) -> None:
    """Write a network's weights.

    Parameters
    ----------
    path
        File to write; replaced as a whole.
    model
        Network, on any device.
    provenance, metrics, licence
        See the module's text; plain JSON values.
    half
        Store convolutions and linear layers as float16; vectors (batch normalisation, biases,
        fusion weights) always stay float32, because running variances leave float16's range.
    new
        Replace nothing.

    Raises
    ------
    disk.TakenError
        If the file is not to be replaced, and is there.
    WeightsError
        If a tensor is not finite or leaves float16's range, or what is said of it is no JSON.
    ImageError
        If the file cannot be written.
    """
    import torch
    from safetensors.torch import save as serialised

    path = Path(path)
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
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: provenance, metrics or licence cannot be written as JSON: {error}"
        ) from error
    with disk.replacing(path, durable=True, new=new) as temporary:
        # Not save_file: it makes a file that nobody else may read.
        temporary.write_bytes(serialised(tensors, metadata={METADATA_KEY: text}))


def verify(name: str | Path) -> WeightsInfo:
    """Check the tensors of a model against the sha256 in its metadata.

    Raises
    ------
    WeightsError
        If they differ, or as in `load`.
    """
    info = read_verified(name)
    _build(info, _read_tensors(info))
    return info


def read_verified(name: str | Path) -> WeightsInfo:
    """Metadata of a model whose tensors are those of its sha256; loads no torch.

    Raises
    ------
    WeightsError
        If they are not, or as in `read_info`.
    """
    info = read_info(resolve(name))
    sha = hashlib.sha256()
    with _open(info.path, framework="np") as handle:
        try:
            for key in sorted(handle.keys()):
                array = handle.get_tensor(key)
                _add_to_digest(sha, key, f"torch.{array.dtype}", array.shape, array.tobytes())
        except (TypeError, ValueError, AttributeError) as error:  # of a type that numpy lacks
            raise WeightsError(f"{info.path}: not tensors of this package: {error}") from error
    found = sha.hexdigest()
    if found != info.sha256:
        raise WeightsError(
            f"{info.path}: the tensors do not match their sha256 (expected {info.sha256[:12]}..., "
            f"got {found[:12]}...): the file was changed or damaged"
        )
    return info


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    import torch

    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        _add_to_digest(sha, key, str(tensor.dtype), tuple(tensor.shape), content)
    return sha.hexdigest()


def _add_to_digest(sha: Any, key: str, dtype: str, shape: tuple[int, ...], content: bytes) -> None:
    sha.update(f"{key}|{dtype}|{shape}|".encode())
    sha.update(content)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _read_tensors(info: WeightsInfo) -> dict[str, Tensor]:
    with _open(info.path) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


def _open(path: Path, *, framework: str = "pt") -> Any:
    from safetensors import SafetensorError, safe_open

    if not _is_file(path):
        raise WeightsError(f"{path}: no such file")
    if path.suffix.lower() == ".onnx":
        raise WeightsError(f"{path}: an exported network; expected weights (.safetensors)")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({str(error).splitlines()[0]}); "
            "it is truncated, or of another kind"
        ) from error
