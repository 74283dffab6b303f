"""Fixtures shared by all tests. Everything is generated or ships inside scikit-image."""

import os
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):  # two processes share two cores; before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from semanticblur_core import weights
from semanticblur_core.network import SemanticBlur

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of research data; tests that need it skip where it is absent."""
    value = os.environ.get("SEMANTICBLUR_DATA")
    if not value:
        pytest.skip("SEMANTICBLUR_DATA is not set")
    path = Path(value)
    if not path.is_dir():
        pytest.skip(f"SEMANTICBLUR_DATA={path} is not a folder")
    return path


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the models nor the measured speeds of whoever runs the tests count in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMANTICBLUR_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of the default architecture, randomly initialised.

    Maps of photographs lie on both sides of 0.4.
    """
    torch.manual_seed(21)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    weights.save(
        path,
        SemanticBlur().eval(),
        provenance={"recipe": "none"},
        metrics={"mae": 0.5, "f_beta": 0.5, "iou": 0.5, "n_images": 1},
        licence="test",
    )
    return path


@pytest.fixture
def pair_folders(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Eight photographs of noise whose left or right half is smooth, and their masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(8):
        image = rng.integers(0, 256, (72, 96, 3), dtype=np.uint8)
        mask = np.zeros((72, 96), np.uint8)
        half = np.s_[:, :48] if i % 2 else np.s_[:, 48:]
        image[half] = 128
        mask[half] = 255
        Image.fromarray(image).save(images / f"photo{i}.png")
        Image.fromarray(mask).save(masks / f"photo{i}.png")
    return images, masks
