"""A map that takes long: taken up again where it was stopped, and made by several."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from worker_detectors import MeanIsBlur

from semanticblur_core import DetectOptions, Detector, SemanticBlur, detect_files, stacks
from semanticblur_core.errors import ImageError
from semanticblur_core.inference import rows
from semanticblur_core.inference.batch import detect_rows, divide
from semanticblur_core.inference.jobs import Job, find_kept, remove_stale_parts
from semanticblur_core.inference.planes import Planes
from semanticblur_core.inference.results import FileResult
from semanticblur_core.inference.rows import RowMaker
from semanticblur_core.inference.tiling import TileGrid


class StopsAfter(MeanIsBlur):
    """Is interrupted when it has made so many planes or strips."""

    def __init__(self, n: int) -> None:
        self.n_left = n

    def made(self) -> None:
        if not self.n_left:
            raise KeyboardInterrupt
        self.n_left -= 1


@pytest.fixture
def kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticblur_core.maps.KEEP_S", 0.0)


def detect(path: Path, detector: Any, options: DetectOptions) -> FileResult:
    [result] = detect_files([Job(str(path), path.stem)], detector, options)
    return result


def write_stack(path: Path, rng: np.random.Generator, *lost: tuple[int, int]) -> Path:
    """Three planes of three rows of two tiles of the grid, some strips of them damaged."""
    stack = rng.integers(0, 60000, (3, 1300, 900), dtype=np.uint16)
    how: dict[str, Any] = {"photometric": "minisblack", "compression": "zlib"}
    tifffile.imwrite(path, stack, rowsperstrip=100, **how)
    with tifffile.TiffFile(path) as tiff:
        places = [(page.dataoffsets, page.databytecounts) for page in tiff.pages]
    data = bytearray(path.read_bytes())
    for plane, strip in lost:
        at, n_bytes = (numbers[strip] for numbers in places[plane])
        data[at : at + n_bytes] = bytes(n_bytes)
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("kept_at_once")
@pytest.mark.parametrize(("size", "n_pieces"), [(64, 3), ("native", 9)])
@pytest.mark.parametrize("lost", [(), ((0, 12), (1, 7))])
def test_resumed_anywhere_it_is_the_same(
    tmp_path: Path, rng: np.random.Generator, size: Any, n_pieces: int, lost: Any
) -> None:
    path = write_stack(tmp_path / "s.tif", rng, *lost)
    options = DetectOptions(tmp_path / "whole", size, formats=("npy",), axes="ZYX")
    whole = detect(path, MeanIsBlur(), options)
    expected = np.load(whole.outputs[0])
    assert whole.error is None
    n_made = n_pieces - (len(lost) if size == 64 else 0)
    for n in range(n_made):
        options = replace(options, output=tmp_path / f"stopped{n}", resume=True)
        with pytest.raises(KeyboardInterrupt):
            detect(path, StopsAfter(n), options)
        jobs = [Job(str(path), "s")]
        assert len(find_kept(jobs, options)) == (n > 0)
        rest = StopsAfter(n_made - n)
        result = detect(path, rest, options)
        assert rest.n_left == 0  # nothing was made twice
        assert [p.name for p in options.output.iterdir()] == ["s_blur.npy"]
        np.testing.assert_array_equal(np.load(result.outputs[0]), expected)
        same: dict[str, Any] = {"outputs": whole.outputs, "elapsed_s": whole.elapsed_s}
        one, other = replace(result, **same), replace(whole, **same)
        assert one.mean_blur == pytest.approx(other.mean_blur, rel=1e-12)
        assert repr(replace(one, mean_blur=0.0, planes=[])) == repr(
            replace(other, mean_blur=0.0, planes=[])
        )
        for plane, of_whole in zip(one.planes, other.planes, strict=True):
            assert plane.index == of_whole.index
            assert plane.error == of_whole.error
            assert plane.n_pixels == of_whole.n_pixels
            if plane.n_pixels:
                assert plane.mean_blur == pytest.approx(of_whole.mean_blur, rel=1e-9)
                assert plane.blurred_fraction == pytest.approx(of_whole.blurred_fraction)


OTHER_OPTIONS: list[dict[str, Any]] = [
    {"size": 96},
    {"threshold": 0.4},
    {"value_range": (0, 1000)},
    {"channel_ranges": ((0, 1000),)},
    {"axes": "TYX"},
    {"channels": "mean"},
    {"planes": (slice(0, 2),)},
    {"level": 1},
    {"series": 1},
    {"every": 2},
]


def test_another_source_setting_or_model_is_another_map(tmp_path: Path) -> None:
    path = tmp_path / "s.npy"
    np.save(path, np.zeros((3, 40, 50), np.uint8))
    options, job = DetectOptions(tmp_path, axes="ZYX"), Job(str(path), "s")
    detector = mock.Mock(
        identity="0" * 64, scales=(1.0,), upsampling="guided", flip=False, backend="torch"
    )
    detector.name = "default"

    def key(of: Any = detector, asked: DetectOptions = options, *more: object) -> str:
        return rows.result_key(job, of, asked, *more)

    same = key()
    assert len(same) == 8
    keys = {same, key(detector, options, (3, 40, 50))}
    asked = {name for each in OTHER_OPTIONS for name in each}
    assert asked == set(rows._OF_OPTIONS)
    keys |= {key(detector, replace(options, **each)) for each in OTHER_OPTIONS}
    for name, other in [
        ("name", "mine"),
        ("identity", "1" * 64),
        ("scales", (1.0, 1.4)),
        ("upsampling", "bilinear"),
        ("flip", True),
    ]:
        with mock.patch.object(detector, name, other):
            keys.add(key())
    assert len(keys) == 2 + len(OTHER_OPTIONS) + 5
    for harmless in (
        {"formats": ("npy",)}, {"overwrite": True}, {"resume": True}, {"output": tmp_path / "o"}
    ):  # fmt: skip
        assert key(detector, replace(options, **harmless)) == same
    with mock.patch.object(detector, "backend", "openvino"):
        assert key() == same
    with path.open("ab") as stream:
        stream.write(b"more")
    larger = key()
    os.utime(path, ns=(0, 0))
    assert len({same, larger, key()}) == 3


def test_an_array_of_another_shape_in_the_same_place_is_another_map(tmp_path: Path) -> None:
    keys = set()
    for shape, dtype in [((3, 40, 50), np.uint8), ((3, 48, 50), np.uint8), ((3, 40, 50), np.int8)]:
        planes = Planes(np.zeros(shape, dtype), "ZYX")
        for wanted in (None, (slice(1, 3),)):
            maker = RowMaker(planes, planes.box(wanted), DetectOptions(tmp_path))
            keys.add(maker.key(Job(str(tmp_path), "s"), MeanIsBlur()))
    assert len(keys) == 6


def test_networks_without_a_file_are_told_apart() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(SemanticBlur())
    one, same, other = (Detector(m, device="cpu", precision="float32").identity for m in models)
    assert one == same != other


@pytest.mark.usefixtures("kept_at_once")
def test_without_resume_nothing_goes_on(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_stack(tmp_path / "s.tif", rng)
    jobs = [Job(str(path), "s")]
    options = DetectOptions(tmp_path / "out", 64, formats=("npy",), axes="ZYX", resume=True)

    def stop_after_two(name: str = "mean") -> None:
        stops = StopsAfter(2)
        stops.name = name
        with pytest.raises(KeyboardInterrupt):
            detect(path, stops, options)
        assert find_kept(jobs, options)

    stop_after_two()
    rest = StopsAfter(1)
    [result] = detect_files(jobs, rest, replace(options, formats=("tif",)))
    assert rest.n_left == 0
    assert list((tmp_path / "out").iterdir()) == result.outputs
    stop_after_two()
    anew = StopsAfter(3)
    detect(path, anew, replace(options, resume=False))
    assert anew.n_left == 0
    (tmp_path / "out" / "s_blur.npy").unlink()
    for name in ("mean", "other"):
        stop_after_two(name)
    assert len(find_kept(jobs, options)) == 2
    assert find_kept(jobs, options, since=time.time() + 5) == []
    remove_stale_parts(jobs, options, keep=True)
    assert len(find_kept(jobs, options)) == 2
    (tmp_path / "out" / "s_blur.npy").touch()  # the run was killed when this was there
    remove_stale_parts(jobs, options, keep=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["s_blur.npy", "s_blur.tif"]
    (tmp_path / "out" / "s_blur.npy").unlink()
    stop_after_two()
    remove_stale_parts(jobs, options)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["s_blur.tif"]


@pytest.mark.usefixtures("kept_at_once")
def test_a_full_disk_costs_the_results_and_not_the_map(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_stack(tmp_path / "s.tif", rng)
    options = DetectOptions(tmp_path / "out", 64, formats=("npy",), axes="ZYX")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stacks, "write_npy", full)
        failed = detect(path, MeanIsBlur(), options)
    assert failed.error == f"{tmp_path}/out/s_blur.npy: cannot be written: No space left on device"
    rest = StopsAfter(0)
    assert detect(path, rest, replace(options, resume=True)).error is None


def test_what_took_no_time_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_stack(tmp_path / "s.tif", rng)
    options = DetectOptions(tmp_path / "out", 64, axes="ZYX")
    with pytest.raises(KeyboardInterrupt):
        detect(path, StopsAfter(2), options)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [64, "native"])
@pytest.mark.parametrize("lost", [(), ((0, 12), (1, 0))])
def test_parts_make_the_whole(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: Any, lost: Any
) -> None:
    monkeypatch.setattr(rows, "FEWEST_PLANES", 1)
    monkeypatch.setattr(rows, "FEWEST_TILE_ROWS", 2)
    path = write_stack(tmp_path / "s.tif", rng, *lost)
    options = DetectOptions(tmp_path / "whole", size, formats=("npy",), axes="ZYX")
    one = detect(path, MeanIsBlur(), options)
    expected = np.load(one.outputs[0])
    options, job = replace(options, output=tmp_path / "parts"), Job(str(path), "s")
    parts = divide(job, options, 4)
    assert len(parts) == (3 if size == 64 else 4)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    told = []
    for part in reversed(parts):
        detect_rows(job, MeanIsBlur(), options, part, lambda *n: told.append(n))
        assert told[-1] == (len(part), len(part))
    result = detect(path, StopsAfter(0), replace(options, resume=True))
    found = np.load(result.outputs[0])
    if size == "native" and lost:
        # What is below the first rows of a plane, which cannot be read, is another part here.
        assert np.isnan(expected[1]).all()
        assert np.isfinite(found[1]).any()
        found[1] = np.nan
        assert result.unreadable_part is not None
    else:
        assert result.unreadable_part == one.unreadable_part
        assert [p.n_pixels for p in result.planes] == [p.n_pixels for p in one.planes]
        means = np.array([[p.mean_blur for p in each.planes] for each in (result, one)])
        np.testing.assert_allclose(means[0], means[1], rtol=1e-9)
        assert result.blurred_fraction == one.blurred_fraction
    np.testing.assert_array_equal(found, expected)
    assert divide(job, replace(options, resume=True), 4) == []  # done before
    assert divide(job, options, 4) == []  # in the way
    assert len(divide(job, replace(options, overwrite=True), 4)) == len(parts)


@given(
    st.lists(st.integers(1, 40), min_size=0, max_size=2),
    st.integers(33, 5000),
    st.sampled_from([320, "native"]),
    st.integers(1, 20),
)
def test_parts_cover_all_rows_and_are_worth_a_worker(
    lengths: list[int], height: int, size: Any, n_workers: int
) -> None:
    array = np.broadcast_to(np.uint8(0), (*lengths, height, 40))
    planes = Planes(array, "TZ"[: len(lengths)] + "YX")
    maker = RowMaker(planes, planes.box(None), DetectOptions(Path("out"), size))
    parts = maker.divide(n_workers)
    assert len(parts) <= 2 * n_workers
    if not parts:
        return
    n_planes = int(np.prod(lengths))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == n_planes * height
    grid = TileGrid(height, 40)
    strips = {p * height + start for p in range(n_planes) for start in grid.row_starts}
    starts = {part.start for part in parts}
    whole_planes = {p * height for p in range(n_planes)}
    assert starts <= (strips if size == "native" else whole_planes)
    if size != "native":
        assert min(map(len, parts)) >= rows.FEWEST_PLANES * height
    else:
        n_strips = [sum(1 for start in strips if start in part) for part in parts]
        assert min(n_strips) >= min(rows.FEWEST_TILE_ROWS, rows.FEWEST_PLANES)


@given(st.integers(33, 400), st.integers(33, 120), st.floats(0, 0.5), st.data())
def test_strips_that_are_wanted_are_those_of_all(
    height: int, tile: int, share: float, data: st.DataObject
) -> None:
    grid = TileGrid(height, 40, tile, int(tile * share))
    values = np.random.default_rng(height).random((height, 40)).astype(np.float32)
    detector = Detector.__new__(Detector)
    detector._run = lambda images: images[..., 0]  # type: ignore[method-assign]
    detector._batch_size = 1
    read = lambda r, c: values[r, c]  # noqa: E731
    whole = [strip for _, strip in detector.iter_strips(read, grid)]
    n = len(whole)
    first = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(first + 1, n))
    found = list(detector.iter_strips(read, grid, wanted=range(first, stop)))
    assert [rows.start for rows, _ in found] == grid.row_starts[first:stop]
    for (_, strip), expected in zip(found, whole[first:stop], strict=True):
        np.testing.assert_array_equal(strip, expected)


def test_progress_is_told_of_tiles_planes_and_rows(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    torch.manual_seed(0)
    detector = Detector(SemanticBlur(), device="cpu", precision="float32", backend="torch")
    tifffile.imwrite(tmp_path / "photo.tif", rng.integers(0, 256, (600, 500), dtype=np.uint8))
    np.save(tmp_path / "stack.npy", rng.integers(0, 256, (2, 40, 50), dtype=np.uint8))
    told: list[tuple[str, int, int]] = []
    jobs = [Job(str(tmp_path / name), name) for name in ("photo.tif", "stack.npy")]
    options = DetectOptions(tmp_path / "out", "native", formats=("npy",))
    results = list(detect_files(jobs, detector, options, on_progress=lambda *n: told.append(n)))
    assert [result.error for result in results] == [None, None]
    by_source = itertools.groupby(told, key=lambda one: one[0])
    counts = {Path(source).name: [n[1:] for n in group] for source, group in by_source}
    assert counts == {"photo.tif": [(1, 2), (2, 2)], "stack.npy": [(0, 80), (40, 80), (80, 80)]}


def test_what_cannot_be_opened_is_not_divided(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"x")
    options = DetectOptions(tmp_path / "out")
    names = ["a.npy", "gone.tif", "clip.mp4", "sample:cat"]
    for job in (Job(str(tmp_path / name), "a") for name in names):
        assert divide(job, options, 8) == []
    with pytest.raises(ImageError):
        detect_rows(Job(str(tmp_path / "a.npy"), "a"), MeanIsBlur(), options, range(5))
