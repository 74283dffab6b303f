"""What inputs stand for, how results are named, and what is refused before the work."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from PIL import Image

from semanticblur_core import Detector, disk
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.batch import detect_files
from semanticblur_core.inference.inputs import expand_input, load
from semanticblur_core.inference.jobs import (
    DetectOptions,
    Job,
    find_jobs,
    made_of,
    remove_stale_parts,
)
from semanticblur_core.maps import new_map


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


def test_a_sample_that_is_none_is_told() -> None:
    with pytest.raises(ImageError, match="sample:dog: expected one of sample:cat"):
        load("sample:dog")


def test_links_to_nothing_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lost.png").symlink_to("nowhere.png")
    for text in (str(tmp_path / "in"), str(tmp_path / "in" / "*.png")):
        jobs, _ = find_jobs([text], tmp_path / "out")
        assert [Path(job.source).name for job in jobs] == ["lost.png"]
    with pytest.raises(ImageError, match="a link to a file that is not there"):
        load(jobs[0].source)


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


def test_levels_are_named_after_the_zarr_that_they_are_of(tmp_path: Path) -> None:
    names = ("a", "b.ome")
    for name in names:
        group = zarr.open_group(str(tmp_path / f"{name}.zarr"), mode="w")
        group.create_group("labels").create_array("1", data=np.zeros((40, 50), np.uint8))
        group.create_array("1", data=np.zeros((40, 50), np.uint8))
    inputs = [f"{tmp_path}/{name}.zarr/{level}" for name in names for level in ("1", "labels/1")]
    jobs, _ = find_jobs(inputs, tmp_path / "out")
    expected = ["a_1", "a_labels_1", "b.ome_1", "b.ome_labels_1"]
    assert stems(jobs) == expected
    assert not any(job.refusal for job in jobs)
    # Whatever else is named.
    assert [find_jobs([text], tmp_path / "out")[0][0].output_stem for text in inputs] == expected


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_plate_is_its_fields(tmp_path: Path, zarr_format: Literal[2, 3]) -> None:
    plate = zarr.open_group(str(tmp_path / "in" / "p.ome.zarr"), mode="w", zarr_format=zarr_format)

    def describe(group: zarr.Group, **attributes: Any) -> None:
        group.attrs.update({"ome": attributes} if zarr_format == 3 else attributes)

    describe(plate, plate={"wells": [{"path": "A/1"}, {"path": "B/2"}, {"path": "lost"}]})
    for well in ("A/1", "B/2"):
        group = plate.create_group(well)
        describe(group, well={"images": [{"path": "0"}, {"path": "1"}]})
        for field in "01":
            group.create_array(field, data=np.zeros((40, 50), np.uint8))
    for text in ("in/p.ome.zarr", "in", "in/*.zarr"):
        jobs, _ = find_jobs([str(tmp_path / text)], tmp_path / "out")
        fields = [f"p.ome_{well}_{field}" for well in ("A_1", "B_2") for field in "01"]
        assert stems(jobs) == [*fields, "p.ome_lost"]  # which its reader tells of
    for name in (".zgroup", "zarr.json"):  # rows need not be groups
        (tmp_path / "in" / "p.ome.zarr" / "A" / name).unlink(missing_ok=True)
    [job], _ = find_jobs([str(tmp_path / "in" / "p.ome.zarr" / "A" / "1" / "0")], tmp_path / "out")
    assert job.output_stem == "p.ome_A_1_0"


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


def test_formats_that_are_not_wanted_take_no_place(folder: Path) -> None:
    inputs = [f"{folder}/a.png", f"{folder}/a_blur.png"]
    (folder / "b.jpg").rename(folder / "a_blur.png")
    for formats, is_refused in ((("tif", "npy"), False), (("npy", "png"), True), (None, True)):
        jobs, _ = find_jobs(inputs, folder, options=DetectOptions(folder, formats=formats))
        assert (jobs[0].refusal is not None) == is_refused


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
    long = Job("long.tif", 215 * "l")
    disk.temporary_name(out / f"{long.output_stem}_blur.tif").touch()
    jobs.append(long)
    options = DetectOptions(out, formats=("tif", "zarr"))
    with new_map(out / "a_blur.tif", (40, 50)):  # of a run that lives
        remove_stale_parts(jobs, options)
        assert len(list(out.glob(".a_blur.tif.*.map.part"))) == 1
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    assert left == set(names["other"])
    assert not (out / ".a_blur.zarr.01234567.part").exists()


def test_what_is_named_as_a_map_or_mask_of_another_is_left_out() -> None:
    photographs = ["q/a.jpg", "q/s.tif", "top.jpg", "A/0001.png"]
    made = ["q/a_blur.png", "q/maps/a.jpg_blur.tif", "masks/a.jpg.png", "m/s.tif[Z=1,C=0].png"]
    made += ["maps/top_blur.png", "top_overlay.png", "q/s_series12_blur.tif"]
    own = ["B/0001_blur.png", "r/a_blur.png", "q/b_blur.png", "q/a.png"]
    is_made = made_of([*photographs, *made, *own])
    assert [path for path in (*photographs, *made, *own) if is_made(path)] == made
