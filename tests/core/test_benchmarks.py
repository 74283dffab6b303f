"""Benchmarks: what they compare and how they count; that they are fast is no test's affair."""

from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from semanticblur_core import benchmarks, benchmarks_inference
from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.inputs import sample_photographs


def result_of(measuring: Generator[tuple[int, int], None, dict[str, Any]]) -> dict[str, Any]:
    while True:
        try:
            next(measuring)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]


def test_back_ends_are_compared_on_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On noise the sigmoid is saturated and hides nearly all of what differs."""
    seen: dict[str, list[NDArray[np.float32]]] = {"float32": [], "auto": []}

    class Engine:
        def __init__(self, precision: str) -> None:
            self.precision = precision

        def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            if self.precision == "compile":
                raise SemanticBlurError("torch.compile failed")
            seen[self.precision].append(images[0])
            return images.mean(axis=3) + (0.25 if self.precision == "auto" else 0)

    def make(model: str, *, backend: str, precision: str = "auto", **_: object) -> SimpleNamespace:
        return SimpleNamespace(engine=Engine("compile" if backend == "compile" else precision))

    monkeypatch.setattr(benchmarks_inference, "Detector", make)
    monkeypatch.setattr(benchmarks_inference, "BACKENDS", ("torch", "compile"))
    found = result_of(benchmarks_inference.bench_backends(size_px=64, n_rounds=3))
    photographs = sample_photographs(64, 64)
    assert photographs.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(seen["float32"], photographs)
    np.testing.assert_array_equal(seen["auto"][:4], photographs[[0, 0, 1, 2]])
    assert found["backends"]["compile"] == {"error": "torch.compile failed"}
    assert found["backends"]["torch"]["mean_difference"] == pytest.approx(0.25, abs=1e-6)
    assert found["backends"]["torch"]["largest_difference"] == pytest.approx(0.25, abs=1e-6)


def test_operations_are_those_that_torchvision_states_for_resnet50() -> None:
    """4.089 thousand million multiply-adds at 224 px, 2.05 million of them the classifier's."""
    count = benchmarks.count_flops(benchmarks.bare_backbone(), 224)
    assert count / 2 == pytest.approx(4.089e9 - 2.05e6, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_compiled_or_not(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    made: list[str] = []

    def time_forward(module: nn.Module, images: torch.Tensor) -> float:
        seen.append((type(module).__name__, len(images)))
        return 0.5 if isinstance(module, nn.Sequential) else 2.0

    def compile_(module: nn.Module, **_: object) -> nn.Module:
        made.append(type(module).__name__)
        return module

    monkeypatch.setattr(benchmarks, "_time_forward", time_forward)
    monkeypatch.setattr(benchmarks, "_matrix_flops_per_s", lambda *_: 1e12)
    monkeypatch.setattr(torch, "compile", compile_)
    measuring = benchmarks.bench_model(
        size_px=64, n_rounds=3, n_threads=1, precisions=("float32",), batch_size=4,
        compiled=compiled,
    )  # fmt: skip
    result = result_of(measuring)
    assert set(seen) == {("Sequential", 4), ("SemanticBlur", 4)}
    assert sorted(made) == (["SemanticBlur", "Sequential"] if compiled else [])
    [timing] = result["timings"]
    assert (timing["network_images_per_s"], timing["backbone_images_per_s"]) == (2, 8)
    assert (timing["ratio"], timing["share_of_backbone"]) == (4, 0.25)
    gflop = result["gflop_per_image"]
    assert timing["network_tflops"] == pytest.approx(2 * gflop["network"] / 1e3)
    assert timing["backbone_tflops"] == pytest.approx(8 * gflop["backbone"] / 1e3)
    assert timing["share_of_limit"] == pytest.approx(timing["network_tflops"])
    assert 1.2 < gflop["network"] / gflop["backbone"] < 1.6  # in the docs, 1.41 at 320 px


def test_a_matrix_product_has_a_rate() -> None:
    rate = benchmarks._matrix_flops_per_s(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15


@pytest.mark.parametrize("compile_model", [False, True])
def test_a_timed_step_is_one_of_training(
    pair_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, compile_model: bool
) -> None:
    """Gradients are clipped, and parts that turned out to be too large are not tried again."""
    config = TrainConfig(batch_size=4, image_size_px=64, gradient_clip_norm=0.25, accumulate=2)
    done: list[object] = []
    compiled: list[str] = []

    def backward(*given: Any) -> tuple[float, int]:
        done.append(given[-1])
        return 0.5, 4  # as after running out of memory

    def clip(*_: object, max_norm: float, error_if_nonfinite: bool) -> torch.Tensor:
        done.append(("clipped", max_norm, error_if_nonfinite))
        return torch.tensor(1.0)

    def compile_(module: nn.Module) -> nn.Module:
        compiled.append(type(module).__name__)
        return module

    monkeypatch.setattr(benchmarks, "backward", backward)
    monkeypatch.setattr(benchmarks, "n_loader_threads", lambda _: 1)
    monkeypatch.setattr(Fabric, "clip_gradients", clip)
    monkeypatch.setattr(torch, "compile", compile_)
    measuring = benchmarks.bench_train(
        DecodedPairs(find_pairs(*pair_folders)),
        config,
        sharp={},
        n_rounds=1,
        device=DeviceChoice(torch.device("cpu"), torch.float32, "test"),
        compile_model=compile_model,
    )
    result = result_of(measuring)
    assert result["compiled"] is compile_model
    assert compiled == ["SemanticBlur"] * compile_model
    # In each of two rounds: one step on one batch, one to begin with, and one on a fresh batch.
    assert done == [n for parts in (2, 4, 4, 4, 4, 4) for n in (parts, ("clipped", 0.25, False))]
