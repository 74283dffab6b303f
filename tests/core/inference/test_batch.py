"""Files in, files out: results, and that one bad file is no end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from worker_detectors import MeanIsBlur

from semanticblur_core import Detector, io, stacks
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ImageError
from semanticblur_core.inference import batch, map_maker, overlay
from semanticblur_core.inference.batch import detect_files
from semanticblur_core.inference.jobs import DetectOptions, Job, find_jobs
from semanticblur_core.inference.overlay import draw_overlay
from semanticblur_core.inference.planes import ALL, DetectUpdate, PlaneView
from semanticblur_core.inference.tiling import TileGrid
from semanticblur_core.network import SemanticBlur
from semanticblur_core.scale import Scale


def test_formats_agree_and_have_the_size_of_the_image(folder: Path, detector: Detector) -> None:
    out = folder.parent / "out"
    options = DetectOptions(out, size=64, formats=("png", "tif", "npy"), overlay=True)
    (result,) = detect_files(find_jobs([f"{folder}/a.png"], out)[0], detector, options)
    assert result.error is None
    assert sorted(p.name for p in result.outputs) == sorted(p.name for p in out.iterdir())
    blur = np.load(out / "a_blur.npy")
    assert blur.dtype == np.float32
    assert blur.shape == (40, 50)
    np.testing.assert_array_equal(tifffile.imread(out / "a_blur.tif"), blur)
    png = np.asarray(Image.open(out / "a_blur.png"))
    assert png.dtype == np.uint8
    assert np.abs(png / 255 - blur).max() <= 0.5 / 255 + 1e-6
    assert np.asarray(Image.open(out / "a_overlay.png")).shape == (40, 50, 3)
    assert result.mean_blur == pytest.approx(float(blur.mean()), abs=1e-6)
    assert result.blurred_fraction == pytest.approx(float((blur > 0.5).mean()))


def test_bad_files_are_reported_and_the_rest_is_done(folder: Path, detector: Detector) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "zero.jpg").touch()
    out = folder.parent / "out"
    results = list(detect_files(find_jobs([str(folder)], out)[0], detector, DetectOptions(out, 64)))
    errors = {Path(r.source).name: r.error for r in results if r.error}
    assert set(errors) == {"broken.png", "zero.jpg"}
    assert all(str(folder) in error and "\n" not in error for error in errors.values())
    names = {p.name for p in out.iterdir()}
    assert names == {"a_blur.png", "b.jpg_blur.png", "b.png_blur.png"}


def test_results_are_kept_unless_overwriting_is_asked_for(folder: Path, detector: Detector) -> None:
    out = folder.parent / "out"
    jobs, _ = find_jobs([f"{folder}/a.png"], out)
    list(detect_files(jobs, detector, DetectOptions(out, 64)))
    before = (out / "a_blur.png").stat().st_mtime_ns
    (again,) = detect_files(jobs, detector, DetectOptions(out, 64))
    assert again.error is not None
    assert "exists already; --overwrite" in again.error
    assert (out / "a_blur.png").stat().st_mtime_ns == before
    (forced,) = detect_files(jobs, detector, DetectOptions(out, 64, overwrite=True))
    assert forced.error is None


def test_overlay_tints_what_is_blurred_and_only_that() -> None:
    image = np.full((60, 80, 3), 90, np.uint8)
    blur = np.zeros((60, 80), np.float32)
    blur[:, 40:] = 1
    drawn = draw_overlay(image, blur)
    np.testing.assert_array_equal(drawn[:, :36], image[:, :36])
    red, _, blue = drawn[30, 70].astype(int)
    assert red - blue > 80  # orange
    assert (drawn[:, 38:42] == 255).all(axis=2).any()


def test_running_out_of_memory_on_one_image_does_not_end_the_batch(
    folder: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = detector.detect

    def failing(image: np.ndarray, **keywords: object) -> np.ndarray:
        if image.shape[0] == 41:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")
        return detect(image, **keywords)

    monkeypatch.setattr(detector, "detect", failing)
    Image.new("RGB", (50, 41)).save(folder / "c.png")
    out = folder.parent / "out"
    results = list(detect_files(find_jobs([str(folder)], out)[0], detector, DetectOptions(out, 64)))
    (error,) = [r.error for r in results if r.error]
    assert "c.png: [enforce fail] DefaultCPUAllocator" in error
    assert "\n" not in error
    assert len(results) == 4


def test_a_stack_becomes_a_stack_of_maps(
    tmp_path: Path, detector: Detector, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 60_000, (2, 3, 40, 50), np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", data, imagej=True, metadata={"axes": "TZYX"})
    np.save(tmp_path / "n.npy", data)
    options = DetectOptions(tmp_path / "out", size=64, planes=(slice(1, 3),))
    jobs = [Job(str(tmp_path / name), name) for name in ("s.tif", "n.npy")]
    for result in detect_files(jobs, detector, options):
        assert result.error is None
        assert [plane.index for plane in result.planes] == [(0, 1), (0, 2), (1, 1), (1, 2)]
        [path] = result.outputs
        with tifffile.TiffFile(path) as tiff:
            assert (tiff.series[0].axes, tiff.series[0].shape) == ("TZYX", (2, 2, 40, 50))
            maps = tiff.asarray()
        whole = [update.blur for update in detector.iter_planes(data, "TZYX", size=64)]
        np.testing.assert_allclose(maps.reshape(4, 40, 50), np.stack(whole)[[1, 2, 4, 5]])
        assert result.mean_blur == pytest.approx(float(maps.mean()), abs=1e-5)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_stacks_that_cannot_be_done_as_asked_are_one_line(
    tmp_path: Path, detector: Detector
) -> None:
    np.save(tmp_path / "n.npy", np.zeros((3, 40, 50), np.uint8))
    job = Job(str(tmp_path / "n.npy"), "n")
    for asked, message in (
        ({"formats": ("png",)}, "pictures hold one plane in memory"),
        ({"overlay": True}, "pictures hold one plane in memory"),
        ({"planes": (slice(7, 9),)}, "planes: none is chosen along"),
        ({"planes": (slice(0, 1),) * 3}, "3 ranges for 1 axes"),
        ({"axes": "TCZYX"}, "do not fit an array of shape"),
        ({"channels": "mean"}, "name no channels"),
        ({"size": "native", "axes": "YZX"}, "at least 33 x 33 px"),
    ):
        options = DetectOptions(tmp_path / "out", **asked)  # type: ignore[arg-type]
        [result] = detect_files([job], detector, options)
        assert result.error is not None
        assert message in result.error
        assert "n.npy" in result.error
        assert not list((tmp_path / "out").glob("**/*"))


def test_tiles_that_cannot_be_read_cost_no_others(
    tmp_path: Path, rng: np.random.Generator, detector: Detector
) -> None:
    slide, sound = rng.integers(0, 60000, (700, 1200), dtype=np.uint16), tmp_path / "sound.tif"
    tifffile.imwrite(sound, slide, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(sound) as tiff:
        at, n_bytes = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    data = bytearray(sound.read_bytes())
    data[at : at + n_bytes] = bytes(n_bytes)
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(data)
    options = DetectOptions(tmp_path / "out", "native", formats=("tif",), axes="YX")
    whole, lacking = detect_files(
        [Job(str(path), path.stem) for path in (sound, damaged)], detector, options
    )
    lost = list(TileGrid(*slide.shape))[-1]
    assert lacking.error is None
    assert lacking.unreadable_part is not None
    assert lacking.unreadable_part.startswith(f"{damaged}: NaN where it cannot be read: ")
    where = f"rows {lost.rows.start}:700, columns {lost.columns.start}:1200"
    assert lacking.unreadable_part.endswith(f" (1 of 6 tiles, the first in {where})")
    made = tifffile.imread(lacking.outputs[0])
    nan = np.isnan(made)
    assert nan[lost.rows, lost.columns].all()
    assert np.count_nonzero(nan) == 512 * 512
    assert lacking.mean_blur == pytest.approx(made[~nan].mean(), abs=1e-6)
    [one] = lacking.planes
    assert one.n_pixels == np.count_nonzero(~nan)
    # The range is that of what can be read, which differs a little.
    np.testing.assert_allclose(made[~nan], tifffile.imread(whole.outputs[0])[~nan], atol=0.05)


def damaged_stack(path: Path, stack: np.ndarray, *places: tuple[int, int], side: int) -> Path:
    """A TIFF in tiles, of some of which (plane, number) the data mean nothing."""
    tifffile.imwrite(path, stack, tile=(side, side), compression="zlib", photometric="minisblack")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for plane, tile in places:
            page = tiff.pages[plane]
            at, n_bytes = page.dataoffsets[tile], page.databytecounts[tile]
            data[at : at + n_bytes] = bytes(n_bytes)
    path.write_bytes(data)
    return path


def test_means_are_of_the_pixels_that_could_be_read(tmp_path: Path) -> None:
    stack = np.zeros((3, 1024, 1024), np.uint8)
    stack[1] = 200
    # Of plane 1 all tiles but those of the upper left, of plane 2 all of the first row.
    others = [(1, tile) for tile in range(16) if tile not in (0, 1, 4, 5)]
    path = damaged_stack(tmp_path / "a.tif", stack, *others, *((2, i) for i in range(4)), side=256)
    options = DetectOptions(tmp_path, "native", formats=("npy",))
    [result] = detect_files([Job(str(path), "a")], MeanIsBlur(), options)
    assert result.error is None
    made = np.load(result.outputs[0])
    assert np.isnan(made[2]).all()  # though one row of tiles could be read
    assert np.isfinite(made[0]).all()
    assert 0 < np.isfinite(made[1]).sum() < made[1].size
    assert result.mean_blur == pytest.approx(np.nanmean(made), rel=1e-5)
    measured = [plane.n_pixels for plane in result.planes]
    assert measured == np.isfinite(made).sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("size", [64, "native"])
def test_a_disk_that_fails_costs_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: Detector, size: Any
) -> None:
    path = damaged_stack(tmp_path / "a.tif", np.zeros((3, 600, 600), np.uint8), side=256)
    read = PlaneView.read

    def failing(view: PlaneView, *region: slice) -> np.ndarray:
        if view.index == (1,):
            raise ImageError("plane Z=1: cannot be read: stale handle") from OSError("stale handle")
        return read(view, *region)

    monkeypatch.setattr(PlaneView, "read", failing)
    options = DetectOptions(tmp_path / "out", size, formats=("npy",))
    [result] = detect_files([Job(str(path), "a")], detector, options)
    assert "stale handle" in str(result.error)
    assert not list((tmp_path / "out").iterdir())


def test_a_map_without_numbers_is_no_plane_that_cannot_be_read(tmp_path: Path) -> None:
    class Overflows(MeanIsBlur):
        def iter_strips(self, *arguments: Any, **how: Any) -> Iterator[tuple[slice, np.ndarray]]:
            for rows, strip in super().iter_strips(*arguments, **how):
                yield rows, np.where(strip > 100, np.nan, strip)

    stack = np.zeros((3, 600, 600), np.uint8)
    stack[1] = 200
    path = damaged_stack(tmp_path / "a.tif", stack, side=256)
    options = DetectOptions(tmp_path / "out", "native", formats=("npy",))
    [result] = detect_files([Job(str(path), "a")], Overflows(), options)
    assert result.error == f"{path}: the map that was made has no numbers"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [64, "native"])
def test_planes_that_cannot_be_read_cost_no_others(
    tmp_path: Path, rng: np.random.Generator, detector: Detector, size: Any
) -> None:
    stack = rng.integers(0, 60000, (2, 3, 48, 64), dtype=np.uint16)
    sound, damaged = tmp_path / "sound.tif", tmp_path / "damaged.tif"
    for path in (sound, damaged):
        tifffile.imwrite(path, stack, photometric="minisblack", compression="zlib", rowsperstrip=40)
    with tifffile.TiffFile(sound) as tiff:
        strips = [
            tuple(zip(page.dataoffsets, page.databytecounts, strict=True)) for page in tiff.pages
        ]

    def damage(*places: tuple[int, int]) -> None:
        data = bytearray(sound.read_bytes())
        for page, strip in places:
            at, n_bytes = strips[page][strip]
            data[at : at + n_bytes] = bytes(n_bytes)
        damaged.write_bytes(data)

    damage((1, 0), (5, 1))
    options = DetectOptions(
        tmp_path / "out", size, formats=("tif", "zarr"), axes="TZYX", value_range=(0, 60000)
    )
    whole, lacking = detect_files(
        [Job(str(path), path.stem) for path in (sound, damaged)], detector, options
    )
    assert (whole.unreadable_part, lacking.error) == (None, None)
    line = f"{damaged}: NaN in 2 of 6 planes, the first of them plane T=0, Z=1: cannot be read: "
    assert lacking.unreadable_part is not None
    assert lacking.unreadable_part.startswith(line)
    expected = tifffile.imread(whole.outputs[0]).reshape(6, 48, 64)
    expected[[1, 5]] = np.nan
    for output in lacking.outputs:
        with stacks.open_stack(output) as made:
            found = np.asarray(made.array).reshape(6, 48, 64)
        np.testing.assert_array_equal(found, expected)
    read = [plane for plane in whole.planes if plane.index not in ((0, 1), (1, 2))]
    assert [plane for plane in lacking.planes if plane.error is None] == read
    assert lacking.mean_blur == pytest.approx(np.mean([plane.mean_blur for plane in read]))
    damage(*((page, 1) for page in range(6)))
    [none] = detect_files(
        [Job(str(damaged), "damaged")], detector, replace(options, overwrite=True)
    )
    assert none.error is not None
    assert "plane T=1, Z=2: cannot be read" in none.error
    assert lacking.outputs[0].exists()  # the earlier result


@pytest.mark.parametrize(
    ("samples", "how"),
    [
        (3, {"photometric": "rgb"}),
        (3, {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 50}),
        (1, {"photometric": "miniswhite"}),
    ],
)
def test_a_large_image_streams_to_the_map_of_one_in_memory(
    tmp_path: Path,
    detector: Detector,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    how: dict[str, Any],
) -> None:
    pixels = rng.integers(0, 256, (700, 600, samples), np.uint8).squeeze()
    tifffile.imwrite(tmp_path / "large.tif", pixels, **how)
    image = io.read_image(tmp_path / "large.tif")
    jobs = [Job(str(tmp_path / "large.tif"), "large")]
    options = DetectOptions(tmp_path / "out", size="native", formats=("tif", "zarr", "npy"))
    monkeypatch.setattr(batch, "STREAMED_PIXELS", 1000)
    [result] = detect_files(jobs, detector, options)
    assert result.error is None
    expected = detector.detect(image, size="native")
    for path in result.outputs:
        with stacks.open_stack(path) as stack:
            assert stack.axes == "YX"
            np.testing.assert_allclose(stack.array[:], expected, atol=1e-6)
    assert result.mean_blur == pytest.approx(float(expected.mean()), abs=1e-5)


def test_resume_skips_what_is_whole_and_does_the_rest(folder: Path, detector: Detector) -> None:
    jobs, _ = find_jobs([str(folder)], folder.parent / "out")
    options = DetectOptions(folder.parent / "out", size=64)
    list(detect_files(jobs[:2], detector, options))
    [again] = detect_files(jobs[:1], detector, options)
    assert again.error is not None
    assert "--resume keeps it" in again.error
    resumed = list(detect_files(jobs, detector, replace(options, resume=True)))
    assert [result.skipped for result in resumed] == [True, True, False]
    assert [np.isnan(result.mean_blur) for result in resumed] == [True, True, False]
    assert all(result.error is None for result in resumed)
    both = replace(options, resume=True, formats=("png", "npy"))
    assert [result.skipped for result in detect_files(jobs, detector, both)] == [False] * 3


class SeveralAtOnce:
    """A detector that takes three images at once, and remembers how many it was given."""

    name, batch_size = "several", 3

    def __init__(self) -> None:
        self.given: list[int] = []

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        return self.detect_batch([image])[0]

    def detect_batch(self, images: list[np.ndarray], **keywords: object) -> list[np.ndarray]:
        self.given.append(len(images))
        if any(image.shape[1] == 51 for image in images):
            raise ImageError("what a width")
        return [np.full(image.shape[:2], image.mean() / 255, np.float32) for image in images]


def test_a_detector_gets_as_many_photographs_as_it_takes(
    tmp_path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        Image.new("L", (50, 40), 20 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    jobs, _ = find_jobs([str(tmp_path)], tmp_path / "out")
    np.save(tmp_path / "stack.npy", np.zeros((2, 40, 50), np.uint8))
    jobs.insert(6, Job(str(tmp_path / "stack.npy"), "stack"))
    several, options = SeveralAtOnce(), DetectOptions(tmp_path / "out", resume=True)
    monkeypatch.setattr(batch, "_detect_stack", lambda job, *_: batch.FileResult(job.source))
    results = list(detect_files(jobs, several, options))  # type: ignore[arg-type]
    assert [r.source for r in results] == [job.source for job in jobs]
    # Two and a broken one; three; then a stack, for which nothing waits; two.
    assert several.given == [2, 3, 2]
    assert [r.error is None for r in results] == [True, False, *[True] * 7]
    means = [r.mean_blur for r in results if r.error is None and "stack" not in r.source]
    np.testing.assert_allclose(means, np.array([0, 2, 3, 4, 5, 6, 7]) * 20 / 255, atol=1e-6)
    again = list(detect_files(jobs[2:6], several, options))  # type: ignore[arg-type]
    assert all(result.skipped for result in again)
    monkeypatch.setattr(map_maker, "BATCH_PIXELS", 4000)
    anew = replace(options, overwrite=True, resume=False)
    list(detect_files(jobs[2:6], several, anew))  # type: ignore[arg-type]
    assert several.given[3:] == [2, 2]


def test_a_photograph_that_fails_in_a_batch_costs_no_other(tmp_path: Path) -> None:
    for i, width in enumerate((50, 51, 52)):
        Image.new("L", (width, 40)).save(tmp_path / f"{i}.png")
    jobs, _ = find_jobs([str(tmp_path)], tmp_path / "out")
    several = SeveralAtOnce()
    results = list(detect_files(jobs, several, DetectOptions(tmp_path / "out")))  # type: ignore[arg-type]
    assert several.given == [3, 1, 1, 1]
    assert [result.error for result in results] == [None, f"{jobs[1].source}: what a width", None]


def test_what_is_stopped_leaves_no_result_unreported(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (50, 40)).save(tmp_path / f"{i}.png")
    jobs, _ = find_jobs([str(tmp_path)], tmp_path / "out")
    coming = detect_files(jobs, SeveralAtOnce(), DetectOptions(tmp_path / "out"))  # type: ignore[arg-type]
    next(coming)
    coming.close()  # type: ignore[attr-defined]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0_blur.png"]


def test_one_at_a_time_is_read_when_it_is_due(
    folder: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU: no second photograph is in memory."""
    read: list[str] = []

    def load(source: str, **how: int) -> np.ndarray:
        read.append(source)
        return np.zeros((40, 50), np.uint8)

    monkeypatch.setattr(batch, "load", load)
    jobs, _ = find_jobs([str(folder)], folder.parent / "out")
    coming = detect_files(jobs, detector, DetectOptions(folder.parent / "out", 64))
    for n_done, _ in enumerate(coming, start=1):
        assert len(read) == n_done


def test_several_at_once_give_the_same_results(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    torch.manual_seed(1)
    network = SemanticBlur(ModelConfig(backbone="resnet34"))
    np.save(tmp_path / "stack.npy", rng.integers(0, 60_000, (5, 40, 50), np.uint16))
    inputs = [str(folder), str(tmp_path / "stack.npy")]
    found = []
    for batch_size in (1, 3):
        detector = Detector(network, device="cpu", precision="float32", batch_size=batch_size)
        run, given = detector.engine.run, []

        def counted(images: np.ndarray, run=run, given=given) -> np.ndarray:  # type: ignore[no-untyped-def]
            given.append(len(images))
            return run(images)

        detector.engine.run = counted  # type: ignore[method-assign]
        options = DetectOptions(tmp_path / f"out{batch_size}", size=34)
        found.append(list(detect_files(find_jobs(inputs, options.output)[0], detector, options)))
        assert given == ([1] * 8 if batch_size == 1 else [3, 3, 2])
    for one, several in zip(*found, strict=True):
        assert one.error is several.error is None
        assert several.mean_blur == pytest.approx(one.mean_blur, abs=1e-4)
        assert [p.index for p in several.planes] == [p.index for p in one.planes]


class DividesByZero:
    """A detector with a bug that one image brings out."""

    name = "buggy"

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        return np.full(image.shape[:2], 1 / (image.shape[1] - 51), np.float32)


def test_an_error_that_nobody_foresaw_costs_its_file_only(tmp_path: Path) -> None:
    for i, width in enumerate((50, 51, 52)):
        Image.new("L", (width, 40)).save(tmp_path / f"{i}.png")
    jobs, _ = find_jobs([str(tmp_path)], tmp_path / "out")
    results = list(detect_files(jobs, DividesByZero(), DetectOptions(tmp_path / "out")))  # type: ignore[arg-type]
    assert [result.error is None for result in results] == [True, False, True]
    assert "1.png: unexpected ZeroDivisionError: " in str(results[1].error)


class Grey:
    """A map that is the image's own grey, which tells what image was given."""

    name = "grey"

    def detect(self, image: np.ndarray, **how: object) -> np.ndarray:
        return (image if image.ndim == 2 else image.mean(axis=2)).astype(np.float32) / 255

    def iter_planes(
        self, array: Any, axes: str, *, indices: list[tuple[int, ...]], **how: object
    ) -> Iterator[DetectUpdate]:
        planes = batch.Planes(array, axes)
        for n_done, index in enumerate(indices, start=1):
            blur = self.detect(planes.view(index).read())
            whole = np.ones(blur.shape, np.bool_)
            yield DetectUpdate(index, n_done, len(indices), blur, whole, ALL, True)


def detect_one(path: Path, **how: Any) -> batch.FileResult:
    options = DetectOptions(path.parent / "out", overwrite=True, **how)
    [result] = detect_files([Job(str(path), "r")], Grey(), options)  # type: ignore[arg-type]
    return result


def write_pyramid(path: Path, data: np.ndarray) -> None:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        metadata = {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
        tiff.write(data, subifds=1, tile=(32, 32), metadata=metadata)
        tiff.write(data[::2, ::2], subfiletype=1, tile=(32, 32))


def test_a_level_of_a_pyramid_of_one_image(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, (64, 96), np.uint8)
    write_pyramid(tmp_path / "p.ome.tif", data)
    for level, step in enumerate((1, 2)):
        result = detect_one(tmp_path / "p.ome.tif", level=level, formats=("tif", "zarr", "png"))
        assert result.error is None
        assert len(result.outputs) == 3
        for path in result.outputs[:2]:
            with stacks.open_stack(path) as stack:
                np.testing.assert_allclose(stack.array[:], data[::step, ::step] / 255, atol=1e-6)
                assert stack.axes == "YX"
                assert stack.scale.pixel_size_um == {"X": 0.25 * step, "Y": 0.5 * step}
        np.testing.assert_array_equal(
            np.asarray(Image.open(result.outputs[2])), data[::step, ::step]
        )


def test_the_pixel_size_of_a_turned_image_is_turned(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "t.tif", np.zeros((40, 50), np.uint8), imagej=True, resolution=(4, 2),
        metadata={"unit": "um"}, extratags=[(274, 3, 1, 6, True)],
    )  # fmt: skip
    result = detect_one(tmp_path / "t.tif", formats=("tif",))
    assert (result.error, result.height, result.width) == (None, 50, 40)
    assert stacks.read_scale(result.outputs[0]).pixel_size_um == pytest.approx(
        {"X": 0.5, "Y": 0.25}
    )


def test_maps_of_some_planes_lie_where_these_do_and_keep_their_names(tmp_path: Path) -> None:
    metadata = {"axes": "CZYX", "PhysicalSizeZ": 2.0, "Channel": {"Name": ["DAPI", "GFP"]}}
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, np.zeros((2, 5, 40, 40), np.uint8), ome=True, metadata=metadata)
    chosen = (slice(3, None),)
    result = detect_one(path, planes=chosen, formats=("tif", "zarr"))
    for output in result.outputs:
        with stacks.open_stack(output) as stack:
            assert stack.array.shape == (2, 2, 40, 40)
            found = Scale({"Z": 2.0}, origin={"Z": 6.0}, channel_names=("DAPI", "GFP"))
            assert stack.scale == found


@pytest.mark.parametrize(
    ("how", "flag"),
    [
        ({"axes": "ZYX"}, "--axes"),
        ({"planes": (slice(0, 1),)}, "--planes"),
        ({"channels": 1}, "--channels"),
        ({"level": 1}, "--level"),
    ],
)
@pytest.mark.parametrize("name", ["photo.png", "clip.mp4"])
def test_what_is_of_stacks_is_refused_for_what_is_none(
    tmp_path: Path, name: str, how: dict[str, Any], flag: str
) -> None:
    Image.new("L", (50, 40)).save(tmp_path / name, format="png")
    error = str(detect_one(tmp_path / name, **how).error)
    assert f"{name}: {flag}: of stacks and pyramids" in error
    assert "\n" not in error


def test_an_array_of_one_plane_is_drawn_like_a_photograph(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 256, (1, 40, 50), np.uint8)
    Image.fromarray(data[0]).save(tmp_path / "photo.png")
    drawn = {}
    for name, array in (("flat.npy", data[0]), ("stack.npy", data), ("photo.png", None)):
        if array is not None:
            np.save(tmp_path / name, array)
        result = detect_one(tmp_path / name, formats=("png",), overlay=True)
        assert result.error is None
        assert [path.name for path in result.outputs] == ["r_blur.png", "r_overlay.png"]
        drawn[name] = [np.asarray(Image.open(path)) for path in result.outputs]
    np.testing.assert_array_equal(drawn["flat.npy"][0], data[0])
    for name in ("flat.npy", "stack.npy"):
        for picture, expected in zip(drawn[name], drawn["photo.png"], strict=True):
            np.testing.assert_array_equal(picture, expected)


def test_an_overlay_of_what_is_constant_but_for_nan() -> None:
    image = np.full((700, 60), np.nan, np.float32)
    image[600:] = 5
    drawn = draw_overlay(image, np.zeros((700, 60), np.float32))
    assert not drawn.any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_overlay_is_drawn_in_bands_without_seams(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    image = rng.integers(0, 255, (90, 70, 3)).astype(dtype)
    blur = gaussian_filter(rng.random((90, 70)), 5).astype(np.float32)
    blur = (blur - blur.min()) / np.ptp(blur)
    whole = draw_overlay(image, blur)
    monkeypatch.setattr(overlay, "_BAND_ROWS", 7)
    np.testing.assert_array_equal(draw_overlay(image, blur), whole)
