"""SemanticBlur: finds the out-of-focus part of an image.

The public names are imported when they are first used; importing the package loads neither torch
nor any image library.

>>> from semanticblur_core import Detector
>>> detector = Detector("default", device="auto")
>>> blur = detector.detect(image)  # (H, W) float32 in 0..1, 1 = out of focus
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from semanticblur_core.version import __version__ as __version__

if TYPE_CHECKING:
    from semanticblur_core.config import ModelConfig, TrainConfig
    from semanticblur_core.errors import SemanticBlurError
    from semanticblur_core.evaluation import evaluate
    from semanticblur_core.focus.check import FocusOptions, focus_report
    from semanticblur_core.focus.stack import StackFocus, all_in_focus
    from semanticblur_core.inference.batch import detect_files
    from semanticblur_core.inference.cluster import DetectionCluster
    from semanticblur_core.inference.dask_map import detect_dask
    from semanticblur_core.inference.detector import Detector
    from semanticblur_core.inference.jobs import DetectOptions, find_jobs
    from semanticblur_core.losses import blur_loss
    from semanticblur_core.metrics import BlurScorer
    from semanticblur_core.network import SemanticBlur
    from semanticblur_core.training.finetune import finetune
    from semanticblur_core.training.loop import train

__all__ = [
    "BlurScorer",
    "DetectOptions",
    "DetectionCluster",
    "Detector",
    "FocusOptions",
    "ModelConfig",
    "SemanticBlur",
    "SemanticBlurError",
    "StackFocus",
    "TrainConfig",
    "all_in_focus",
    "blur_loss",
    "detect_dask",
    "detect_files",
    "evaluate",
    "find_jobs",
    "finetune",
    "focus_report",
    "train",
]

_HOMES = {
    "BlurScorer": "semanticblur_core.metrics",
    "DetectOptions": "semanticblur_core.inference.jobs",
    "DetectionCluster": "semanticblur_core.inference.cluster",
    "Detector": "semanticblur_core.inference.detector",
    "FocusOptions": "semanticblur_core.focus.check",
    "ModelConfig": "semanticblur_core.config",
    "SemanticBlur": "semanticblur_core.network",
    "SemanticBlurError": "semanticblur_core.errors",
    "StackFocus": "semanticblur_core.focus.stack",
    "TrainConfig": "semanticblur_core.config",
    "all_in_focus": "semanticblur_core.focus.stack",
    "blur_loss": "semanticblur_core.losses",
    "detect_dask": "semanticblur_core.inference.dask_map",
    "detect_files": "semanticblur_core.inference.batch",
    "evaluate": "semanticblur_core.evaluation",
    "find_jobs": "semanticblur_core.inference.jobs",
    "finetune": "semanticblur_core.training.finetune",
    "focus_report": "semanticblur_core.focus.check",
    "train": "semanticblur_core.training.loop",
}


if not TYPE_CHECKING:  # or type checkers would take any name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
