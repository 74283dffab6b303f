"""Files in, files out: what is found, how results are named, and that one bad file is no end."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

from semanticblur_core import Detector, io, stacks
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ImageError
from semanticblur_core.inference import batch
from semanticblur_core.inference.batch import (
    DetectOptions,
    Job,
    detect_files,
    expand_input,
    find_jobs,
)
from semanticblur_core.inference.overlay import draw_overlay
from semanticblur_core.inference.planes import ALL, DetectUpdate
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


def stems(jobs: list[Job]) -> list[str]:
    return [Path(job.output_stem).as_posix() for job in jobs]


def test_a_folder_gives_its_images_and_equal_stems_keep_their_extension(folder: Path) -> None:
    out = folder.parent / "out"
    assert stems(find_jobs([str(folder)], out)[0]) == ["a", "b.jpg", "b.png"]
    deep, _ = find_jobs([str(folder)], out, recursive=True)
    assert stems(deep) == ["a", "b.jpg", "b.png", "sub/a"]


def test_globs_keep_the_folders_below_their_first_wildcard(folder: Path) -> None:
    jobs, _ = find_jobs([f"{folder}/**/a.png"], folder.parent / "out")
    assert stems(jobs) == ["a", "sub/a"]


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """A folder of a Zarr that holds what looks like an image, one further down, a npy file."""
    root = tmp_path / "slides"
    for name in ("s.zarr", "sub/t.zarr"):
        zarr.save(str(root / name), np.zeros((3, 40, 50), np.uint8))
        (root / name / "thumbnail.png").touch()
    np.save(root / "n.npy", np.zeros((3, 40, 50), np.uint8))
    (root / "plain").mkdir()
    (root / "file.zarr").touch()
    return root


def test_links_to_nothing_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lost.png").symlink_to("nowhere.png")
    for text in (str(tmp_path / "in"), str(tmp_path / "in" / "*.png")):
        jobs, _ = find_jobs([text], tmp_path / "out")
        assert [Path(job.source).name for job in jobs] == ["lost.png"]
    with pytest.raises(ImageError, match="a link to a file that is not there"):
        batch.load(jobs[0].source)


def test_folders_and_globs_give_zarr_and_npy_too(arrays: Path) -> None:
    out = arrays.parent / "out"
    for text, recursive, expected in (
        ("", False, ["n", "s"]),
        ("", True, ["n", "s", "sub/t"]),
        ("/*.zarr", False, ["file", "s"]),
        ("/*.npy", False, ["n"]),
        ("/**/*.zarr", False, ["file", "s", "sub/t"]),
        ("/**/[nt]*", False, ["n", "sub/t"]),
    ):
        jobs, left_out = find_jobs([f"{arrays}{text}"], out, recursive=recursive)
        assert (text, stems(jobs), left_out) == (text, expected, [])


def test_earlier_results_that_are_zarr_and_npy_are_not_taken_as_input(
    arrays: Path, detector: Detector
) -> None:
    (arrays / "file.zarr").unlink()
    options = DetectOptions(arrays, size=64, formats=("zarr", "npy"))
    first, _ = find_jobs([f"{arrays}/*.zarr"], arrays)
    assert [result.error for result in detect_files(first, detector, options)] == [None]
    for text in (str(arrays), f"{arrays}/*"):
        jobs, left_out = find_jobs([text], arrays)
        assert stems(jobs) == ["n", "s"]
        assert sorted(left_out) == [f"{arrays}/s_blur.npy", f"{arrays}/s_blur.zarr"]


def test_a_check_of_photographs_is_given_no_arrays(arrays: Path) -> None:
    Image.new("RGB", (50, 40)).save(arrays / "p.png")
    assert [name for name, _, _ in expand_input(str(arrays), True)] == [f"{arrays}/p.png"]


def test_an_input_named_twice_is_done_once(folder: Path) -> None:
    again = f"{folder}/sub/../a.png"
    inputs = [f"{folder}/a.png", f"{folder}/a.*", again, "sample:cat"]
    jobs, _ = find_jobs(inputs, folder.parent / "out")
    assert stems(jobs) == ["a", "cat"]


def test_of_two_inputs_of_one_name_the_second_is_refused(folder: Path, detector: Detector) -> None:
    (folder / "other").mkdir()
    Image.new("RGB", (50, 40)).save(folder / "other" / "a.png")
    inputs = [f"{folder}/a.png", f"{folder}/other", f"{folder}/b.jpg"]
    out = folder.parent / "out"
    jobs, _ = find_jobs(inputs, out)
    assert stems(jobs) == ["a", "a", "b"]
    done = list(detect_files(jobs, detector, DetectOptions(out, size=64)))
    assert [result.error for result in done] == [
        None,
        f"{folder}/other/a.png: would write the same a_blur file as {folder}/a.png; detect it "
        "into another output folder",
        None,
    ]


def test_no_result_takes_the_place_of_an_input(folder: Path, detector: Detector) -> None:
    (folder / "b.jpg").rename(folder / "a_blur.png")
    before = (folder / "a_blur.png").read_bytes()
    jobs, _ = find_jobs([f"{folder}/a.png", f"{folder}/a_blur.png"], folder)
    options = DetectOptions(folder, size=64, overwrite=True)
    errors = [result.error for result in detect_files(jobs, detector, options)]
    assert errors[1] is None
    assert f"would take the place of {folder}/a_blur.png, an input" in str(errors[0])
    assert (folder / "a_blur.png").read_bytes() == before
    assert (folder / "a_blur_blur.png").is_file()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "elsewhere" / "e.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "sub")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "best").mkdir()
    (folder / "best" / "one.png").symlink_to(folder / "a.png")
    (folder / "loop.png").symlink_to("loop.png")
    jobs, _ = find_jobs([str(folder)], tmp_path / "out", recursive=True)
    found = stems(jobs)
    assert {"link/e", "best/one", "loop", "a"} <= set(found)
    assert len(found) == len(set(found))
    assert not [stem for stem in found if stem.startswith(("again", "link/back"))]
    (folder / "up").symlink_to(tmp_path)
    assert find_jobs([str(folder)], tmp_path / "out", recursive=True)[0] == jobs
    for name in ("up", "link", "again"):
        (folder / name).unlink()
    (folder / "circle").symlink_to(folder)
    matches, _ = find_jobs([f"{folder}/**/a.png"], tmp_path / "out")
    assert stems(matches) == ["a", "sub/a"]


def test_odd_names_stay_in_the_output_folder(
    folder: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("..png", "sample:cat.png", "~nobody.png"):
        shutil.copy("a.png", name)
    out = folder.parent / "out" / "deep"
    jobs, _ = find_jobs(["..png", "./sample:cat.png", "~nobody.png"], out)
    done = list(detect_files(jobs, detector, DetectOptions(out, size=64)))
    assert [result.error for result in done] == [None, None, None]
    assert sorted(path.name for path in out.iterdir()) == [
        "..png_blur.png", "sample:cat_blur.png", "~nobody_blur.png"
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["deep"]


def test_what_python_users_give_is_understood(folder: Path) -> None:
    assert find_jobs(folder, folder.parent)[0] == find_jobs([str(folder)], folder.parent)[0]
    assert DetectOptions("maps").output == Path("maps")  # type: ignore[arg-type]


def test_a_raw_file_does_not_rename_the_result_of_its_jpeg(folder: Path) -> None:
    (folder / "a.nef").write_bytes(b"raw")
    jobs, _ = find_jobs([str(folder)], folder.parent / "out")
    assert stems(jobs) == ["a.nef", "a", "b.jpg", "b.png"]


def test_earlier_results_are_not_taken_as_input(folder: Path, detector: Detector) -> None:
    options = DetectOptions(folder, size=64, overlay=True)
    first, _ = find_jobs([str(folder)], folder)
    assert all(result.error is None for result in detect_files(first, detector, options))
    assert (folder / "a_overlay.png").is_file()
    jobs, left_out = find_jobs([str(folder)], folder)
    assert jobs == first
    assert f"{folder}/a_overlay.png" in left_out
    named, left_out = find_jobs([f"{folder}/a_blur.png"], folder)
    assert stems(named) == ["a_blur"]
    assert left_out == []


def test_a_photograph_called_blur_is_not_taken_for_a_result(folder: Path) -> None:
    (folder / "b.jpg").rename(folder / "motion_blur.jpg")
    jobs, left_out = find_jobs([str(folder)], folder)
    assert "motion_blur" in stems(jobs)
    assert left_out == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sample:dog", "expected one of sample:cat, sample:coffee, sample:astronaut"),
        ("*.nothing", "no file matches"),
        ("EMPTY", "no images in this folder"),
        ("", "an input is empty"),
    ],
)
def test_inputs_that_name_nothing_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(ImageError, match=message):
        find_jobs([str(tmp_path / name) if name == "EMPTY" else name], tmp_path / "out")


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
        ({"planes": (slice(7, 9),)}, "names no plane"),
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
    monkeypatch.setattr(batch, "BATCH_PIXELS", 4000)
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
                assert stack.pixel_size_um == {"X": 0.25 * step, "Y": 0.5 * step}
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
    assert stacks.read_pixel_size(result.outputs[0]) == pytest.approx({"X": 0.5, "Y": 0.25})


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


def test_an_input_that_names_nothing_does_not_stop_the_others(folder: Path) -> None:
    out = folder.parent / "out"
    problems: list[str] = []
    inputs = [f"{folder}/*.nothing", f"{folder}/a.png", "sample:dog"]
    jobs, _ = find_jobs(inputs, out, on_problem=problems.append)
    assert stems(jobs) == ["a"]
    assert [problem.split(": ", 1)[1][:8] for problem in problems] == ["no file ", "expected"]
    with pytest.raises(ImageError, match="no file matches"):
        find_jobs(inputs, out)
    with pytest.raises(ImageError, match="no file matches"):
        find_jobs(inputs[:1], out, on_problem=problems.append)


def test_a_subfolder_that_cannot_be_read_is_told_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    out, problems = folder.parent / "out", list[str]()
    jobs, _ = find_jobs([str(folder)], out, recursive=True, on_problem=problems.append)
    assert stems(jobs) == ["a", "b.jpg", "b.png", "sub/a"]
    assert problems == [f"{folder}/locked: cannot be read: Permission denied"]
    with pytest.raises(ImageError, match="locked: cannot be read: Permission denied"):
        find_jobs([str(folder)], out, recursive=True)
    with pytest.raises(PermissionError):
        list(expand_input(str(folder), True))


@pytest.mark.skipif(os.name == "nt", reason="no locks that tell what is stale")
def test_what_killed_runs_left_of_these_results_is_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    names = {
        "stale": (".a_blur.tif.01234567.map.part", "sub/.b_blur.tif.01234567.part"),
        "other": (".c_blur.tif.01234567.part", ".a_blur.npy.01234567.part", "a_blur.tif"),
    }
    for name in (*names["stale"], *names["other"]):
        (out / name).touch()
    (out / ".a_blur.zarr.01234567.part" / "0").mkdir(parents=True)
    jobs = [Job("a.tif", "a"), Job("sub/b.tif", "sub/b"), Job("gone/d.tif", "gone/d")]
    options = DetectOptions(out, formats=("tif", "zarr"))
    with stacks.new_map(out / "a_blur.tif", (40, 50)):  # of a run that lives
        batch.remove_stale_parts(jobs, options)
        assert len(list(out.glob(".a_blur.tif.*.map.part"))) == 1
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    assert left == set(names["other"])
    assert not (out / ".a_blur.zarr.01234567.part").exists()
