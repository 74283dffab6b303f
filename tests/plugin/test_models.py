"""Detectors that are kept for the next click."""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from napari_semanticblur import _models
from semanticblur_core.inference import detector as module


class Made(SimpleNamespace):
    """A detector where it was asked for, or on the CPU where the GPU is full."""

    gpu_is_full = False

    def __init__(self, model: str, *, device: str, backend: str) -> None:
        where = "cuda" if device == "auto" else device
        super().__init__(model=model, device="cpu" if self.gpu_is_full else where)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept yet, and as far as is known there is a GPU."""
    monkeypatch.setattr(_models, "_detectors", OrderedDict())
    monkeypatch.setattr(module, "Detector", Made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("device", ["auto", "cuda:1", "cpu"])
def test_the_second_click_does_not_load_again(random_weights: Path, device: str) -> None:
    model = str(random_weights)
    assert not _models.is_loaded(model, device)
    first = _models.detector(model, device)
    assert _models.is_loaded(model, device)
    assert _models.detector(model, device) is first


def test_a_detector_that_went_on_with_the_cpu_is_made_anew(random_weights: Path) -> None:
    model = str(random_weights)
    first = _models.detector(model, "auto")
    first.device = "cpu"  # type: ignore[misc,union-attr]
    assert not _models.is_loaded(model, "auto")
    second = _models.detector(model, "auto")
    assert second is not first
    assert second.device == "cuda"  # type: ignore[union-attr]
    assert _models.detector(model, "auto") is second


def test_one_that_began_on_the_cpu_for_lack_of_memory_too(
    random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(random_weights)
    monkeypatch.setattr(Made, "gpu_is_full", True)
    first = _models.detector(model, "cuda:1")
    monkeypatch.setattr(Made, "gpu_is_full", False)
    second = _models.detector(model, "cuda:1")
    assert second is not first
    assert second.device == "cuda:1"  # type: ignore[union-attr]


def test_two_are_kept(random_weights: Path) -> None:
    model = str(random_weights)
    for device in ("cpu", "auto", "cpu", "cuda:1"):
        _models.detector(model, device)
    assert [_models.is_loaded(model, device) for device in ("cpu", "auto", "cuda:1")] == [
        True, False, True,
    ]  # fmt: skip
