"""Photographs in folders, and a small network; modules with others define their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semanticblur_core import Detector
from semanticblur_core.config import ModelConfig
from semanticblur_core.network import SemanticBlur


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(1)
    return Detector(SemanticBlur(ModelConfig(backbone="resnet34")), device="cpu")


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    root = tmp_path / "in"
    for name in ("a.png", "b.jpg", "b.png", "sub/a.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (root / "notes.txt").write_text("no image")
    return root
