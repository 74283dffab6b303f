"""Dask in, dask out: the maps of `iter_planes`, and only what is wanted is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core import Detector, detect_dask
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.planes import Planes

da = pytest.importorskip("dask.array")


@pytest.fixture(scope="module")
def model(random_weights: Path) -> dict[str, Any]:
    return {"model": str(random_weights), "device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def detector(model: dict[str, Any]) -> Detector:
    return Detector(model["model"], device="cpu", precision="float32")


class Watched:
    """An array that remembers which planes of its first two axes were read."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.read = data, set[tuple[int, int]]()
        self.shape, self.dtype, self.ndim = data.shape, data.dtype, data.ndim

    def __getitem__(self, key: Any) -> np.ndarray:
        for t in range(self.shape[0])[key[0]]:
            for z in range(self.shape[1])[key[1]]:
                self.read.add((t, z))
        return self.data[key]


def lazy(data: np.ndarray) -> tuple[Any, Watched]:
    watched = Watched(data)
    chunks = (1, 1, *data.shape[2:])
    return da.from_array(
        watched, chunks=chunks, asarray=False, meta=np.empty((0,) * data.ndim, data.dtype)
    ), watched


def expected(detector: Detector, data: Any, axes: str, **options: Any) -> np.ndarray:
    planes = [u.blur for u in detector.iter_planes(data, axes, size=64, **options) if u.plane_done]
    return np.stack(planes)


def test_one_plane_reads_that_plane_only(
    rng: np.random.Generator, detector: Detector, model: dict[str, Any]
) -> None:
    data = rng.integers(0, 60_000, (2, 3, 40, 50), np.uint16)
    array, watched = lazy(data)
    maps = detect_dask(array, "TZYX", size=64, value_range=(0, 50_000), **model)
    assert (maps.shape, maps.dtype, maps.chunks[2:]) == (data.shape, np.float32, ((40,), (50,)))
    assert watched.read == set()
    plane = maps[1, 2].compute()
    assert watched.read == {(1, 2)}
    whole = expected(detector, data, "TZYX", value_range=(0, 50_000))
    np.testing.assert_allclose(plane, whole[5], atol=1e-5)
    np.testing.assert_allclose(maps.compute().reshape(whole.shape), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "shape", "channels"),
    [
        ("ZYX", (20, 40, 50), "each"),
        ("CZYX", (2, 3, 40, 50), "mean"),
        ("ZCYX", (3, 2, 40, 50), 1),
        ("ZCYX", (3, 2, 40, 50), np.int64(1)),
        ("CZYX", (2, 2, 40, 50), "each"),
        ("YXZ", (40, 50, 2), "each"),
        ("TYXS", (2, 40, 50, 4), "each"),
        ("YX", (700, 800), "each"),
    ],
)
def test_the_range_is_estimated_for_the_whole_stack(
    rng: np.random.Generator,
    detector: Detector,
    model: dict[str, Any],
    axes: str,
    shape: tuple[int, ...],
    channels: Any,
) -> None:
    data = rng.normal(size=shape).astype(np.float32) * np.arange(1, shape[-1] + 1)
    maps = detect_dask(da.from_array(data, chunks=16), axes, size=64, channels=channels, **model)
    whole = expected(detector, data, axes, channels=channels)
    assert maps.shape == (*Planes(data, axes, channels).lengths, *whole.shape[1:])
    np.testing.assert_allclose(maps.compute().reshape(whole.shape), whole, atol=1e-5)


def test_eight_bits_need_no_estimate_and_native_size_works(
    rng: np.random.Generator, detector: Detector, model: dict[str, Any]
) -> None:
    data = rng.integers(0, 255, (2, 2, 40, 600), np.uint8)
    array, watched = lazy(data)
    plane = detect_dask(array, "TZYX", size="native", **model)[0, 1].compute()
    assert watched.read == {(0, 1)}
    np.testing.assert_allclose(plane, detector.detect(data[0, 1], size="native"), atol=1e-5)


def test_torch_computes_whatever_was_measured_to_be_faster(
    rng: np.random.Generator, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's request is no good to several threads, which is what dask runs by default."""

    def pick(*_: object) -> None:
        raise AssertionError("the fastest back end was asked for")

    monkeypatch.setattr("semanticblur_core.inference.detector.pick_backend", pick)
    data = da.from_array(rng.integers(0, 255, (8, 40, 50), np.uint8), chunks=(1, 40, 50))
    # Another device than in the other tests, so that no detector is there already.
    maps = detect_dask(data, "ZYX", size=64, **{**model, "device": "auto"})
    assert maps.compute(scheduler="threads", num_workers=4).shape == (8, 40, 50)


def test_axes_that_do_not_fit_are_refused(model: dict[str, Any]) -> None:
    array = da.zeros((3, 40, 50))
    with pytest.raises(ImageError, match="expected 3 different letters"):
        detect_dask(array, "TZYX", **model)
    with pytest.raises(ImageError, match="name no channels"):
        detect_dask(array, "ZYX", channels=0, **model)


def test_what_cannot_be_is_refused_before_anything_is_computed(model: dict[str, Any]) -> None:
    array: Any = da.zeros((2, 40, 40), np.uint8)
    for wrong, message in (
        ({"size": 0}, "size: expected at least 33 px"),
        ({"backend": "x"}, "backend 'x': expected auto"),
        ({"model": "nope"}, "nope"),
        ({"model": "nope.onnx"}, "nope.onnx: no such file"),
    ):
        with pytest.raises(SemanticBlurError, match=message):
            detect_dask(array, "ZYX", **(model | wrong))


def test_what_is_masked_counts_as_in_memory(
    rng: np.random.Generator, detector: Detector, model: dict[str, Any]
) -> None:
    array = np.ma.masked_less(rng.integers(0, 4000, (2, 50, 60), dtype=np.uint16), 900)
    maps = detect_dask(da.from_array(array, chunks=(1, 50, 60)), "ZYX", size=64, **model)
    np.testing.assert_allclose(maps.compute(), expected(detector, array, "ZYX"), atol=1e-5)


def test_on_a_cluster(rng: np.random.Generator, detector: Detector, model: dict[str, Any]) -> None:
    distributed = pytest.importorskip("distributed")
    data = rng.integers(0, 60_000, (3, 40, 50), np.uint16)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, dashboard_address=None, memory_limit=0
        ) as cluster,
        distributed.Client(cluster),
    ):
        maps = detect_dask(da.from_array(data, chunks=(1, 40, 50)), "ZYX", size=64, **model)
        computed = maps.compute()
    np.testing.assert_allclose(computed, expected(detector, data, "ZYX"), atol=1e-4)
