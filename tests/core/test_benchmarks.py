"""Benchmarks: what they compare and how they count; that they are fast is no test's affair."""

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from semanticblur_core import benchmarks_inference
from semanticblur_core.inference.batch import sample_photographs


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
            seen[self.precision].append(images[0])
            return images.mean(axis=3) + (0.25 if self.precision == "auto" else 0)

    def make(model: str, *, precision: str = "auto", **_: object) -> SimpleNamespace:
        return SimpleNamespace(engine=Engine(precision))

    monkeypatch.setattr(benchmarks_inference, "Detector", make)
    monkeypatch.setattr(benchmarks_inference, "BACKENDS", ("torch",))
    found = result_of(benchmarks_inference.bench_backends(size_px=64, n_rounds=3))
    photographs = sample_photographs(64, 64)
    assert photographs.shape == (3, 64, 64, 3)
    for images in seen.values():
        np.testing.assert_array_equal(images[:3], photographs)
    assert found["backends"]["torch"]["mean_difference"] == pytest.approx(0.25, abs=1e-6)
    assert found["backends"]["torch"]["largest_difference"] == pytest.approx(0.25, abs=1e-6)
