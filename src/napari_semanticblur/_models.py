"""Loaded detectors, kept so that the second click does not load again."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from psygnal import Signal

from semanticblur_core import weights
from semanticblur_core.config import Method
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.focus.classical import ClassicalDetector

if TYPE_CHECKING:
    from semanticblur_core.inference.detector import Detector

# Hand-crafted methods stand among the models: they need no weights and no torch.
METHODS: tuple[str, ...] = get_args(Method)
# What networks are computed in here, whatever was measured to be fastest for files.
BACKEND = "torch"


class _ModelEvents:
    """Tells open widgets of models.

    ``changed``: one was made, renamed or deleted; ``recommended``: it is to be chosen. Both say its
    name and version.
    """

    changed = Signal(str)
    recommended = Signal(str)


models = _ModelEvents()
_recommended: list[str] = []
_KEPT = 2
_lock = threading.Lock()
_detectors: OrderedDict[tuple[str, str, int], Detector] = OrderedDict()


def recommend(name: str) -> None:
    """Say that a model is to be chosen from now on: a better one was made."""
    _recommended[:] = [name]
    models.recommended.emit(name)


def recommended() -> str | None:
    """Model that was recommended last since the program started, if it is still there."""
    for name in _recommended:
        with suppress(SemanticBlurError):
            weights.resolve(name)
            return name
    return None


def detector(model: str, device: str) -> Detector | ClassicalDetector:
    """Detector for a model and a device; called off the main thread, the first call is slow."""
    if model in METHODS:
        return ClassicalDetector(model)
    _keep_triton_out()
    from semanticblur_core.inference.detector import Detector

    key = _key(model, device)
    with _lock:
        found = _kept(key)
        if found is None:
            found = _detectors[key] = Detector(model, device=device, backend=BACKEND)
            while len(_detectors) > _KEPT:
                _detectors.popitem(last=False)
        _detectors.move_to_end(key)
        return found


def identity(model: str) -> tuple[str, int]:
    """Name that stands for this very version of a model, and the time of its file.

    Raises
    ------
    WeightsError
        If there is no such model.
    """
    if model in METHODS:
        return model, 0
    path = weights.resolve(model)
    name = path.stem if path.parent == weights.models_folder() else model
    return name, path.stat().st_mtime_ns


def exists(model: str) -> bool:
    """Whether there is a model of this name or file."""
    with suppress(SemanticBlurError):
        weights.resolve(model)
        return True
    return False


def is_loaded(model: str, device: str) -> bool:
    """Whether `detector` will answer at once."""
    if model in METHODS:
        return True
    try:
        return _kept(_key(model, device)) is not None
    except SemanticBlurError:
        return False


def _kept(key: tuple[str, str, int]) -> Detector | None:
    """Detector that is kept, unless it is on the CPU since a GPU had no memory left then."""
    found = _detectors.get(key)
    if found is None:
        return None
    from semanticblur_core.device import choose_device

    is_where_asked = found.device == str(choose_device(key[1], "float32").device)
    return found if is_where_asked else None


def _key(model: str, device: str) -> tuple[str, str, int]:
    """File and its time: a name stands for a newer file once a model is fine-tuned again."""
    path = weights.resolve(model)
    return str(path), device, path.stat().st_mtime_ns


def _keep_triton_out() -> None:
    """Let torch find no triton where the process would crash on it.

    Mesa's software and AMD drivers, which draw the window, bring an LLVM of their own. Loading
    triton's afterwards, as importing torchvision does, ends in a segmentation fault. Triton
    compiles GPU kernels for `torch.compile`, which nothing here uses.
    """
    if "triton" in sys.modules or not sys.platform.startswith("linux"):
        return
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    if "libLLVM" in maps:
        sys.modules["triton"] = None  # type: ignore[assignment]
