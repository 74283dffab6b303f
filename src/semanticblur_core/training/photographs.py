"""Photographs that a network must not forget while it learns from a few images.

They ship inside scikit-image. Some are replayed in training; defocus generated on others is looked
at while it runs, and other defocus on these is what the result is reported on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core import io
from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.defocus import Example, SharpImages, synthesise
from semanticblur_core.data.squash import squash
from semanticblur_core.errors import DataError
from semanticblur_core.inference.detector import Detector

# Camera and chelsea are the first to be forgotten.
_REPLAYED = ("brick", "camera", "chelsea", "grass", "motorcycle_left", "rocket")
_CHECKED = ("astronaut", "coffee", "gravel")
_UNTOUCHED = ("astronaut", "camera", "chelsea", "coffee", "motorcycle_left", "rocket")
_N_CHECKED = 6
# What the smallest of them give sharp; for larger sizes it is enlarged.
_LARGEST_PX = 640


def replayed(config: FinetuneConfig) -> list[Tensor]:
    """Photographs ``(3, S, S)``: a third as they are, whole, the rest with generated defocus."""
    files = _photographs(_REPLAYED)
    n_whole = config.n_replay // 3
    whole = []
    for i in range(n_whole):
        image = _squashed(files[i % len(files)], config)
        whole.append(image.flip(-1) if i // len(files) % 2 else image)
    rng = np.random.default_rng(77)
    made = _generated(_REPLAYED, config.n_replay - n_whole, config, rng)
    return whole + [example.image[0] for example in made]


def untouched(config: FinetuneConfig) -> list[Tensor]:
    """Photographs ``(3, S, S)`` as they are, on which the maps are to stay much the same."""
    return [_squashed(file, config) for file in _photographs(_UNTOUCHED)]


def checked(config: FinetuneConfig) -> list[Example]:
    """What is reported on at the end."""
    return _generated(_CHECKED, _N_CHECKED, config, np.random.default_rng(78))


def watched(config: FinetuneConfig) -> list[Example]:
    """What is looked at during training: the same photographs, out of focus elsewhere."""
    return _generated(_CHECKED, _N_CHECKED, config, np.random.default_rng(79))


def _squashed(file: Path, config: FinetuneConfig) -> Tensor:
    rgb = squash(io.read_rgb8(file), config.image_size_px, config.image_size_px)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _generated(
    names: Sequence[str], n: int, config: FinetuneConfig, rng: np.random.Generator
) -> list[Example]:
    """Photographs that ship inside scikit-image, partly out of focus."""
    if n == 0:
        return []
    sources = SharpImages(_photographs(names))
    size = min(config.image_size_px, _LARGEST_PX)
    made = [synthesise(sources, 1, size, rng) for _ in range(n)]
    return made if size == config.image_size_px else [_enlarged(e, config) for e in made]


def _enlarged(example: Example, config: FinetuneConfig) -> Example:
    """As the photographs are that are enlarged to that size for the network."""
    size = (config.image_size_px, config.image_size_px)
    blurred, labelled = (
        F.interpolate(truth.float(), size, mode="nearest-exact") > 0
        for truth in (example.blurred, example.labelled)
    )
    radius = F.interpolate(example.radius_px, size, mode="nearest-exact")
    factor = size[0] / example.image.shape[-1]
    image = F.interpolate(example.image, size, mode="bilinear")
    return Example(image, blurred, labelled, radius * factor)


def _photographs(names: Sequence[str]) -> list[Path]:
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    files = [next(folder.glob(f"{name}.*"), None) for name in names]
    found = [path for path in files if path is not None and path.is_file()]
    if not found:
        raise DataError(f"{folder}: the photographs of scikit-image are missing; reinstall it")
    return found


def error_on(detector: Detector, examples: Sequence[Example]) -> float:
    """MAE where the truth of generated photographs is known."""
    errors = []
    for example in examples:
        image = example.image[0].permute(1, 2, 0).numpy()
        blur = detector.detect(image, size=image.shape[0], value_range=(0.0, 1.0))
        labelled = example.labelled[0, 0].numpy()
        if labelled.any():
            errors.append(float(np.abs(blur - example.blurred[0, 0].numpy())[labelled].mean()))
    return float(np.mean(errors))
