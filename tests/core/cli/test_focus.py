"""The focus command from outside: verdicts, exit codes, the best plane."""

import csv
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import tifffile
import zarr
from command_line import Done
from command_line import run as run_command
from PIL import Image
from scipy.ndimage import gaussian_filter

from semanticblur_core.cli import _focus_inputs, _focus_results
from semanticblur_core.cli._focus_inputs import Part
from semanticblur_core.cli.focus import command
from semanticblur_core.data.focal_stack import focal_stack
from semanticblur_core.errors import ImageError
from semanticblur_core.focus import check, fields, report
from semanticblur_core.inference.planes import PlaneView


def run(*arguments: str, cwd: Path) -> Done:
    return run_command("focus", *arguments, cwd=cwd)


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A sharp and a blurred picture of the same scene, and a file that is none."""
    scene = rng.integers(0, 256, (160, 200), np.uint8)  # texture everywhere
    root = tmp_path / "shoot"
    root.mkdir()
    Image.fromarray(scene).save(root / "sharp.png")
    soft = gaussian_filter(scene.astype(float), 5)
    Image.fromarray(soft.astype(np.uint8)).save(root / "soft.png")
    return root


def test_gates_masks_and_tables(tmp_path: Path, folder: Path) -> None:
    done = run(
        f"--input={folder}",
        "--method=lbp",
        "--min-in-focus=0.5",
        "--json=r.json",
        "--csv=r.csv",
        "--report=r.html",
        "--mask-output=masks",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    images = {i["name"]: i for i in json.loads((tmp_path / "r.json").read_text())["images"]}
    assert set(images) == {"sharp.png", "soft.png"}
    assert images["sharp.png"]["passed"]
    assert not images["soft.png"]["passed"]
    assert images["sharp.png"]["in_focus_fraction"] > 0.8
    assert images["soft.png"]["mean_blur"] > images["sharp.png"]["mean_blur"] + 0.3
    with (tmp_path / "r.csv").open(newline="") as stream:
        assert {row["name"] for row in csv.DictReader(stream)} == set(images)
    page = (tmp_path / "r.html").read_text()
    assert "sharp.png" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    masks = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "masks").iterdir()}
    assert set(masks) == {"sharp.png.png", "soft.png.png"}
    assert (masks["sharp.png.png"] > 127).mean() > (masks["soft.png.png"] > 127).mean() + 0.3


def test_an_unreadable_image_is_reported_and_beats_a_failed_gate(
    tmp_path: Path, folder: Path
) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    done = run(
        f"--input={folder}", "--method=lbp", "--min-in-focus=0.5", "--json=r.json", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "broken.png" in done.stderr
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) >= 2


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_best_plane_of_a_stack_is_the_sharp_one(tmp_path: Path, kind: str) -> None:
    scene = focal_stack(n_planes=1, size_px=160, largest_radius_px=0.1).images[0].astype(float)
    planes = [gaussian_filter(scene, 1e-3 + abs(z - 3)).astype(np.uint8) for z in range(8)]
    if kind == "folder":
        (tmp_path / "stack").mkdir()
        for z, plane in enumerate(planes):
            Image.fromarray(plane).save(tmp_path / "stack" / f"z{z}.png")
        source = "stack"
    else:
        tifffile.imwrite(tmp_path / "stack.tif", np.stack(planes), photometric="minisblack")
        source = "stack.tif"
    done = run(f"--input={source}", "--stack", "--method=lbp", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "r.json").read_text())["best_plane"]
    assert best["index"] == 3
    if kind == "folder":
        assert best["name"] == "z3.png"


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("--input=empty", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "empty" in done.stderr


def test_a_gate_set_from_examples_judges_others(tmp_path: Path, rng: np.random.Generator) -> None:
    for kind, sigma in (("good", 0.3), ("bad", 4.0), ("new", 0.3)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            scene = rng.integers(0, 256, (96, 96)).astype(float)
            pixels = gaussian_filter(scene, sigma + 0.2 * i).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    Image.fromarray(np.full((96, 96), 90, np.uint8)).save(tmp_path / "new" / "flat.png")
    measured = ("--method=lbp", "--threshold=0.4")
    done = run("calibrate", "--good=good", "--bad=bad", *measured, "--output=c.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from 3 good and 3 bad examples: AUC 1.000" in done.stdout
    gated = ("--input=new", "--calibration=c.json", "--json=r.json")
    done = run(*gated, *measured, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    images = json.loads((tmp_path / "r.json").read_text())["images"]
    assert {i["name"]: i["passed"] for i in images} == {
        "0.png": True,
        "1.png": True,
        "2.png": True,
        "flat.png": False,
    }


def test_a_stack_is_composed_and_the_best_of_a_burst_are_kept(tmp_path: Path, folder: Path) -> None:
    stack = focal_stack(n_planes=5, size_px=128).images
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    made = ("--composite=sharp.png", "--depth=depth.tif")
    done = run("--input=stack.tif", "--stack", "--method=lbp", *made, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "sharp.png")).shape == (128, 128)
    depth = tifffile.imread(tmp_path / "depth.tif")
    assert depth[:, :20].mean() < 1 < 3 < depth[:, -20:].mean()
    done = run("--input=stack.tif", "--stack", "--method=lbp", *made, cwd=tmp_path)
    assert done.returncode == 2
    assert "sharp.png: exists already; --overwrite replaces it" in done.stderr
    done = run("--input=stack.tif", "--stack", "--method=lbp", "--overwrite", *made, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    burst = ("--method=lbp", "--sort=tenengrad", "--keep-best=1", "--json=r.json", "--csv=r.csv")
    done = run(f"--input={folder}", *burst, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    images = json.loads((tmp_path / "r.json").read_text())["images"]
    assert [(i["name"], i["kept"]) for i in images] == [("sharp.png", True), ("soft.png", False)]
    assert "kept: sharp.png" in done.stdout
    rows = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    kept = [row["kept"] for row in rows]
    assert kept == ["True", "False"]


def test_one_stack_of_several_is_composed(tmp_path: Path) -> None:
    sharp_left = focal_stack(n_planes=6, size_px=128).images
    times = np.stack([sharp_left[:, :, ::-1], sharp_left])
    tifffile.imwrite(tmp_path / "film.ome.tif", times, metadata={"axes": "TZYX"})
    asked = ("--input=film.ome.tif", "--stack", "--method=lbp", "--depth=depth.tif")
    done = run(*asked, cwd=tmp_path)
    assert done.returncode == 2
    assert "several along its other axes, of TZ: --planes takes one, such as 0,:" in done.stderr
    done = run(*asked, "--planes=1,1:5", "--composite=c.tif", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    depth = tifffile.imread(tmp_path / "depth.tif")
    assert (depth.min(), depth.max()) == (1, 4)
    assert depth[:, :20].mean() < 2 < 3 < depth[:, -20:].mean()
    names = [one["name"] for one in json.loads((tmp_path / "r.json").read_text())["images"]]
    assert names == [f"film.ome.tif[T=1,Z={z}]" for z in range(1, 5)]
    for arguments, message in (
        (("--planes=7,:",), "film.ome.tif: planes: none is chosen along T, which has 2, counted"),
        (("--level=3",), "film.ome.tif: expected a level of 0 to 0, got 3"),
    ):
        done = run(*asked, "--overwrite", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr, done.stderr


def test_planes_of_a_folder_that_is_a_stack(tmp_path: Path) -> None:
    (tmp_path / "planes").mkdir()
    for z, plane in enumerate(focal_stack(n_planes=5, size_px=96).images):
        Image.fromarray(plane).save(tmp_path / "planes" / f"z{z}.png")
    asked = ("--input=planes", "--stack", "--method=lbp", "--planes=2:4", "--json=r.json")
    done = run(*asked, "--depth=depth.tif", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [one["name"] for one in json.loads((tmp_path / "r.json").read_text())["images"]]
    assert names == ["z2.png", "z3.png"]
    assert set(np.unique(tifffile.imread(tmp_path / "depth.tif"))) <= {2, 3}


def test_an_interrupted_run_passes_nothing_and_replaces_nothing_with_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("r.json", "r.csv", "r.html")]
    for path in files:
        path.write_text("earlier")
    arguments = [f"--input={folder}", "--method=lbp", "--min-in-focus=0"]
    arguments += [f"--json={files[0]}", f"--csv={files[1]}", f"--report={files[2]}"]
    measured = check.focus_report

    def stopped_after(n: int) -> Callable[..., Iterator[check.FocusUpdate]]:
        def updates(*given: Any) -> Iterator[check.FocusUpdate]:
            yield from islice(measured(*given), n)
            raise KeyboardInterrupt

        return updates

    monkeypatch.setattr(check, "focus_report", stopped_after(0))
    with pytest.raises(click.Abort):
        command.main(arguments, standalone_mode=False)
    assert [path.read_text() for path in files] == ["earlier"] * 3
    monkeypatch.setattr(check, "focus_report", stopped_after(1))
    with pytest.raises(click.Abort):
        command.main(arguments, standalone_mode=False)
    told = json.loads(files[0].read_text())
    assert (len(told["images"]), told["passed"], told["interrupted"]) == (1, False, True)
    assert "earlier" not in files[2].read_text()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_masks_that_it_wrote_are_regions(tmp_path: Path, folder: Path, orientation: int) -> None:
    """Each photograph looked at where it was found to be in focus, as turned as it is."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    half = np.array(Image.open(folder / "sharp.png"))
    half[:, :90] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(half).save(tmp_path / "in" / "sub" / "half.png", exif=exif)
    asked = ("--input=in", "--recursive", "--method=lbp", "--json=r.json")
    done = run(*asked, "--mask-output=m", "--mask-margin=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(*asked, "--region=m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [image] = json.loads((tmp_path / "r.json").read_text())["images"]
    assert image["in_focus_fraction"] == 1
    (tmp_path / "in" / "sub" / "half.png").rename(tmp_path / "in" / "half.png")
    (tmp_path / "m" / "sub" / "half.png.png").rename(tmp_path / "m" / "half.png.png")
    done = run("--input=in", *asked[2:], "--region=m", "--stack", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [image] = json.loads((tmp_path / "r.json").read_text())["images"]
    assert image["in_focus_fraction"] == 1
    done = run(*asked, "--region=nowhere", cwd=tmp_path)
    assert (done.returncode, "nowhere: no such folder" in done.stderr) == (2, True)


def test_what_is_of_stacks_or_of_files_is_refused_elsewhere(tmp_path: Path, folder: Path) -> None:
    for arguments, words in (
        (
            ("--channels=mean",),
            "soft.png: --axes, --channels, --planes, --level, --series: of stacks and",
        ),
        (("--along=T",), "--along: goes with --stack"),
        (("--depth=d.tif",), "--depth: goes with --stack"),
        (("--stack", "--channels=mean"), "are of a stack's file, not of a folder"),
        (("--stack", "--planes=7"), f"{folder}: planes: none is chosen along Z"),
        (("--stack", f"--input={folder}"), "--stack takes one --input"),
    ):
        done = run(f"--input={folder}", "--method=lbp", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr, done.stderr


def test_outputs_are_never_an_input_nor_each_other(tmp_path: Path, folder: Path) -> None:
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(stack, np.zeros((2, 40, 40), np.uint8), metadata={"axes": "ZYX"})
    before = stack.read_bytes()
    for arguments, words in (
        (("--composite=stack.tif",), "is an input"),
        (("--composite=a.tif", "--depth=a.tif"), "name the same file"),
        (("--depth=a.png",), "is written as"),
        (("--max-mean-blur=30",), "0<=x<=1"),
    ):
        done = run("--input=stack.tif", "--stack", "--method=lbp", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr
    assert stack.read_bytes() == before
    assert not (tmp_path / "a.tif").exists()

    other = tmp_path / "other"
    other.mkdir()
    Image.open(folder / "soft.png").save(other / "sharp.png")
    done = run(
        f"--input={folder}", f"--input={other}", "--method=lbp", "--mask-output=m", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "would have the same mask" in done.stderr
    assert not (tmp_path / "m").exists()


def test_tiles_in_micrometres_go_by_each_files_own_pixels(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for name, size_um in (("a", 1.0), ("b", 0.5)):
        tifffile.imwrite(
            tmp_path / f"{name}.ome.tif",
            rng.integers(0, 256, (80, 80), np.uint8),
            metadata={"axes": "YX", "PhysicalSizeX": size_um, "PhysicalSizeY": size_um},
        )
    tifffile.imwrite(tmp_path / "none.tif", rng.integers(0, 256, (80, 80), np.uint8))
    done = run("--input=*.tif", "--method=lbp", "--tile-size=20um", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 2  # the one without a pixel size
    assert "none.tif" in done.stderr
    tiles = {i["name"]: i["tiles"] for i in json.loads((tmp_path / "r.json").read_text())["images"]}
    assert {name: len(rows) for name, rows in tiles.items()} == {"a.ome.tif": 4, "b.ome.tif": 2}


@pytest.mark.parametrize("sort", ["tenengrad", None])
def test_of_many_images_some_are_printed(
    tmp_path: Path, rng: np.random.Generator, sort: str | None
) -> None:
    (tmp_path / "in").mkdir()
    scene = rng.integers(0, 256, (80, 80)).astype(float)
    for i in range(24):
        soft = gaussian_filter(scene, i / 4) if i else scene
        Image.fromarray(soft.astype(np.uint8)).save(tmp_path / "in" / f"{i:02}.png")
    sorting = [f"--sort={sort}", "--report=r.html"] if sort else []
    done = run("--input=in", "--method=lbp", *sorting, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert last == "24 images, 0 unreadable"
    names = [line.split(".")[0] for line in lines]
    if sort:
        assert first == "the first 20 by tenengrad:"
        assert names == [f"{i:02}" for i in range(20)]
        assert '"sort":"tenengrad","descending":true' in (tmp_path / "r.html").read_text()
    else:
        assert (first, len(names)) == ("the 20 with the least in focus:", 20)
        assert "00" not in names


def test_planes_of_other_types_are_not_measured_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    scene = focal_stack(n_planes=1, size_px=96, largest_radius_px=0.1).images[0]
    for z, plane in enumerate((scene, scene.astype(np.uint16) * 200, scene)):
        tifffile.imwrite(tmp_path / "stack" / f"z{z}.tif", plane)
    done = run("--input=stack", "--stack", "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    wanted = "stack/z1.tif: uint16 (96, 96), but z0.tif is uint8 (96, 96); planes of one stack must"
    assert done.stderr == f"semanticblur-core: {wanted} be alike\n"
    assert "2 planes, 1 unreadable" in done.stdout


def test_a_file_of_one_plane_is_no_stack(tmp_path: Path) -> None:
    plane = np.zeros((1, 40, 40), np.uint8)
    tifffile.imwrite(tmp_path / "one.ome.tif", plane, metadata={"axes": "ZYX"})
    done = run("--input=one.ome.tif", "--stack", "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    wanted = "one.ome.tif: holds one plane and is no stack; check it without --stack"
    assert done.stderr == f"semanticblur-core: {wanted}\n"


def test_max_pixels_is_the_limit(tmp_path: Path, folder: Path) -> None:
    done = run(f"--input={folder}", "--method=lbp", "--max-pixels=40", cwd=tmp_path)
    assert done.returncode == 2
    assert "more than the limit of 4e-05 million; --max-pixels of detect and focus" in done.stderr
    for source in (str(folder), "stack.tif"):
        tifffile.imwrite(tmp_path / "stack.tif", np.zeros((2, 40, 40), np.uint8), imagej=True)
        done = run(f"--input={source}", "--stack", "--method=lbp", "--max-pixels=40", cwd=tmp_path)
        assert (done.returncode, "more than the limit" in done.stderr) == (2, True)


def test_a_bad_plane_of_a_16_bit_stack_spoils_no_other(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    root = tmp_path / "planes"
    root.mkdir()
    for z in range(4):
        tifffile.imwrite(root / f"z{z}.tif", rng.integers(0, 4000, (64, 64), np.uint16))
    (root / "z0.tif").write_bytes(b"II*\0")
    done = run("--input=planes", "--stack", "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    assert "z0.tif" in done.stderr
    assert "3 planes, 1 unreadable" in done.stdout
    assert "best plane" in done.stdout
    done = run("--input=planes", "--stack", "--method=lbp", "--composite=c.tif", cwd=tmp_path)
    assert done.returncode == 2
    assert "composed without what cannot be read (1 of 4 planes)" in done.stderr
    assert tifffile.imread(tmp_path / "c.tif").shape == (64, 64)


def test_complex_numbers_are_refused_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((2, 40, 40), np.complex64))
    done = run("--input=c.npy", "--stack", "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    assert "expected real numbers, got complex64" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_input_that_names_nothing_does_not_stop_the_rest(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(
        f"--input={folder}", "--input=empty", "--input=no*.jpg", "--method=lbp", "--csv=r.csv",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "semanticblur-core: empty: no images in this folder; --recursive looks into its subfolders",
        "semanticblur-core: no*.jpg: no file matches",
    ]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path, folder: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    (folder / "soft.png").rename(folder / name)
    done = run(f"--input={folder}", "--method=lbp", "--csv=r.csv", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"\xff\xfe.png" in (tmp_path / "r.csv").read_bytes()
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) == 2


def test_masks_and_maps_are_not_measured_beside_their_photographs(
    tmp_path: Path, folder: Path
) -> None:
    Image.open(folder / "soft.png").save(folder / "sharp_blur.png")
    Image.open(folder / "soft.png").save(folder / "my_blur.png")
    Image.open(folder / "soft.png").save(folder / "soft.png_blur.png")
    made = ("--method=lbp", f"--mask-output={folder}", "--json=r.json", "--overwrite")
    for n_left_out in (2, 5):
        done = run(f"--input={folder}", *made, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files = f"{n_left_out} file{'s' * (n_left_out > 1)}"
        assert f"{files} left out as masks or maps of the others" in done.stderr
        names = {image["name"] for image in json.loads((tmp_path / "r.json").read_text())["images"]}
        assert names == {"sharp.png", "soft.png", "my_blur.png"}
    named = run(f"--input={folder / 'sharp_blur.png'}", *made[:1], cwd=tmp_path)
    assert named.returncode == 0
    assert "sharp_blur.png" in named.stdout


def test_resume_measures_what_is_new_or_changed_and_judges_all_anew(
    tmp_path: Path, folder: Path
) -> None:
    made = ("--method=lbp", "--json=r.json", "--csv=r.csv", "--report=r.html", "--mask-output=m")
    (folder / "bad.png").write_bytes(b"")
    done = run(f"--input={folder}", *made, cwd=tmp_path)
    assert done.returncode == 2
    before = images_of(tmp_path / "r.json")
    pictures = pictures_of(tmp_path / "r.html")

    Image.open(folder / "soft.png").save(folder / "bad.png")  # now it can be read
    resumed = (f"--input={folder}", *made, "--resume")
    done = run(*resumed, "--min-in-focus=0.5", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "3 images, 0 unreadable, 2 measured before; 1 of 3 images passed" in done.stdout
    after = images_of(tmp_path / "r.json")
    assert list(after) == ["bad.png", "sharp.png", "soft.png"]
    assert after["sharp.png"] == before["sharp.png"]
    assert after["soft.png"]["failed_gates"]
    assert pictures_of(tmp_path / "r.html").items() > pictures.items()
    with (tmp_path / "r.csv").open(newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == list(after)

    Image.open(folder / "soft.png").save(folder / "sharp.png")  # another picture
    (tmp_path / "m" / "bad.png.png").unlink()
    done = run(*resumed, cwd=tmp_path)
    assert "3 images, 0 unreadable, 1 measured before" in done.stdout
    now = images_of(tmp_path / "r.json")
    assert now["sharp.png"]["in_focus_fraction"] == now["soft.png"]["in_focus_fraction"]
    (tmp_path / "r.html").unlink()
    done = run(*resumed, cwd=tmp_path)  # without pictures no page can be made of them
    assert "measured before" not in done.stdout
    assert len(pictures_of(tmp_path / "r.html")) == 3


def test_a_run_that_was_stopped_is_resumed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json", "--report=r.html")
    whole = check.focus_report

    def stopped(*arguments: Any) -> Iterator[Any]:
        yield from islice(whole(*arguments), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "focus_report", stopped)
    assert run(*made, cwd=tmp_path).returncode == 130
    monkeypatch.undo()
    done = run(*made, "--resume", cwd=tmp_path)
    assert "2 images, 0 unreadable, 1 measured before" in done.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    assert (len(document["images"]), document["interrupted"]) == (2, False)


def test_a_killed_run_leaves_what_it_had_saved(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_focus_results, "_SAVED_EVERY_S", -1)
    monkeypatch.setattr(_focus_results, "_SAVES_WAIT", 0)
    made = (f"--input={folder}", "--method=lbp", "--json=r.json", "--report=r.html")
    whole, seen = check.focus_report, []

    def looked_at(*arguments: Any) -> Iterator[Any]:
        for update in whole(*arguments):
            yield update
            seen.append(json.loads((tmp_path / "r.json").read_text()))
            part = next(tmp_path.glob(".r.html.*.part"))  # as a killed run leaves it
            (tmp_path / "left").write_bytes(part.read_bytes())

    monkeypatch.setattr(check, "focus_report", looked_at)
    assert run(*made, cwd=tmp_path).returncode == 0
    monkeypatch.undo()
    assert [len(document["images"]) for document in seen] == [1, 2]
    assert all(document["interrupted"] for document in seen)

    (tmp_path / "r.json").write_text(json.dumps(seen[0]))
    (tmp_path / "r.html").unlink()
    (tmp_path / "left").rename(tmp_path / ".r.html.0123abcd.part")
    done = run(*made, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 images, 0 unreadable, 1 measured before" in done.stdout
    assert not list(tmp_path.glob(".r.html.*"))


def test_what_was_measured_is_kept_whatever_a_resumed_run_comes_to(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ("--method=lbp", "--json=r.json", "--report=r.html")
    assert run(f"--input={folder}", *made, cwd=tmp_path).returncode == 0
    before, page = images_of(tmp_path / "r.json"), (tmp_path / "r.html").read_bytes()

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    add, added = report.HtmlReport.add, []

    def stopped_at_the_second(*of: Any, **how: Any) -> None:
        added.append(of)
        if len(added) == 2:
            raise KeyboardInterrupt
        add(*of, **how)

    with monkeypatch.context() as patch:  # while the second is taken over
        patch.setattr(report.HtmlReport, "add", stopped_at_the_second)
        assert run(f"--input={folder}", *made, "--resume", cwd=tmp_path).returncode == 130
    assert images_of(tmp_path / "r.json") == before
    assert (tmp_path / "r.html").read_bytes() == page

    with monkeypatch.context() as patch:  # where all is measured again, for another report
        patch.setattr(check, "focus_report", stopped)
        again = (*made[:2], "--report=other.html", "--resume")
        done = run(f"--input={folder}", *again, cwd=tmp_path)
    assert done.returncode == 130
    assert "2 measured again: without a picture in the report that is there" in done.stderr

    one = f"--input={folder / 'soft.png'}"
    done = run(one, *made, "--resume", cwd=tmp_path)
    assert "1 image, 0 unreadable, 1 measured before" in done.stdout
    assert list(images_of(tmp_path / "r.json")) == ["soft.png"]
    done = run(f"--input={folder}", *made[:2], "--resume", cwd=tmp_path)
    assert "2 images, 0 unreadable, 2 measured before" in done.stdout
    assert images_of(tmp_path / "r.json") == before
    monkeypatch.chdir(folder)  # another spelling of the same files
    done = run("--input=.", made[0], "--json=../r.json", "--resume", cwd=folder)
    assert "2 measured before" in done.stdout


def test_pictures_of_another_run_are_not_taken(tmp_path: Path, folder: Path) -> None:
    images = (f"--input={folder}", "--json=r.json")
    assert run(*images, "--method=lbp", cwd=tmp_path).returncode == 0
    other = (f"--input={folder}", "--method=dbdf", "--report=r.html")
    assert run(*other, cwd=tmp_path).returncode == 0
    done = run(*images, "--method=lbp", "--report=r.html", "--resume", cwd=tmp_path)
    assert "measured before" not in done.stdout


def test_masks_of_another_folder_or_margin_are_made_again(tmp_path: Path, folder: Path) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json")
    assert run(*made, "--mask-output=m", cwd=tmp_path).returncode == 0
    before = (tmp_path / "m" / "soft.png.png").read_bytes()
    for flags, n_before in (
        (["--mask-output=m", "--mask-margin=30"], 0),
        (["--mask-output=m", "--mask-margin=30"], 2),
        ([], 2),
        (["--mask-output=m"], 0),
    ):
        done = run(*made, *flags, "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (f"{n_before} measured before" in done.stdout) == (n_before > 0)
    assert (tmp_path / "m" / "soft.png.png").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="pipes as on Unix")
def test_a_pipe_gets_one_document(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_focus_results, "_SAVED_EVERY_S", -1)
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert run(f"--input={folder}", "--method=lbp", "--json=pipe", cwd=tmp_path).returncode == 0
    reader.join()
    assert len(json.loads(read[0])["images"]) == 2


def test_a_save_that_fails_on_the_way_does_not_end_the_run(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_focus_results, "_SAVED_EVERY_S", -1)
    whole, calls = report.write_json, []

    def full_at_first(path: Path, document: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise ImageError(f"{path}: cannot be written: No space left on device")
        whole(path, document)

    monkeypatch.setattr(report, "write_json", full_at_first)
    done = run(f"--input={folder}", "--method=lbp", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 0
    assert "No space left on device; going on" in done.stderr
    assert len(images_of(tmp_path / "r.json")) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("name", ["a"]), ("tenengrad", "much"), ("elapsed_s", None), ("width", {})]
)
def test_a_json_that_somebody_edited_is_refused(
    name: str, value: object, tmp_path: Path, folder: Path
) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json")
    assert run(*made, cwd=tmp_path).returncode == 0
    document = json.loads((tmp_path / "r.json").read_text())
    document["images"][-1][name] = value
    (tmp_path / "r.json").write_text(json.dumps(document))
    done = run(*made, "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("semanticblur-core: r.json: no result of focus to go on from")


@pytest.mark.skipif(os.name == "nt", reason="signals as on Unix")
def test_what_ends_a_batch_job_stops_in_order(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check.focus_report

    def asked_to_stop(*arguments: Any) -> Iterator[Any]:
        for update in whole(*arguments):
            yield update
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(check, "focus_report", asked_to_stop)
    done = run(f"--input={folder}", "--method=lbp", "--json=r.json", cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[0].endswith("stopped after 1 of 2 images; --resume goes on")
    assert done.stderr.strip().endswith("\nsemanticblur-core: stopped")
    document = json.loads((tmp_path / "r.json").read_text())
    assert (len(document["images"]), document["interrupted"]) == (1, True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--threshold=0.4"], "measured with threshold 0.5, and this run has 0.4"),
        (["--tile-size=16"], "measured with tile_size none, and this run has 16 px;"),
        (["--method=network"], "measured with method lbp, and this run has network;"),
        (["--region=content"], "measured with region image, and this run has content"),
    ],
)
def test_resume_refuses_other_settings(
    changed: list[str], said: str, tmp_path: Path, folder: Path
) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json")
    assert run(*made, cwd=tmp_path).returncode == 0
    before = (tmp_path / "r.json").read_bytes()
    done = run(*made, *changed, "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert (tmp_path / "r.json").read_bytes() == before


def test_resume_refuses_what_it_cannot_go_on_from(tmp_path: Path, folder: Path) -> None:
    done = run(f"--input={folder}", "--method=lbp", "--resume", cwd=tmp_path)
    assert "--resume goes with --json" in done.stderr
    (tmp_path / "r.json").write_text('{"images": []}')
    done = run(f"--input={folder}", "--method=lbp", "--json=r.json", "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "r.json: no result of focus to go on from" in done.stderr
    assert (tmp_path / "r.json").read_text() == '{"images": []}'


def images_of(path: Path) -> dict[str, dict[str, Any]]:
    return {image["name"]: image for image in json.loads(path.read_text())["images"]}


def pictures_of(path: Path) -> dict[str, str]:
    rows = path.read_text().partition('type="application/json">')[2].partition("</script>")[0]
    return {row["name"]: row["thumbnail"] for row in json.loads(rows) if row["thumbnail"]}


def test_arrays_of_one_plane_are_images(tmp_path: Path, rng: np.random.Generator) -> None:
    plane = rng.integers(0, 256, (60, 70), np.uint8)
    np.save(tmp_path / "a.npy", plane)
    zarr.save(str(tmp_path / "b.zarr"), plane[None])
    np.save(tmp_path / "c.npy", np.stack([plane] * 20))
    inputs = [f"--input={name}" for name in ("a.npy", "b.zarr", "c.npy")]
    done = run(*inputs, "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    assert "c.npy: a stack; --stack finds its best plane, --planes=: checks each" in done.stderr
    assert "2 images, 1 unreadable" in done.stdout


def test_masks_take_the_place_of_nothing_unasked(tmp_path: Path, folder: Path) -> None:
    Image.open(folder / "soft.png").save(folder / "sharp.png.png")
    photographs = {path: path.read_bytes() for path in folder.iterdir()}
    lbp = ("--method=lbp", "--json=r.json")
    files = [f"--input={folder / name}" for name in ("sharp.png", "sharp.png.png")]
    for inputs in (files, [f"--input={folder}"]):
        done = run(*inputs, f"--mask-output={folder}", *lbp, cwd=tmp_path)
        assert done.returncode == 2
        assert "sharp.png.png: exists already" in done.stderr or "is an input" in done.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == photographs
    done = run(*files, f"--mask-output={folder}", "--overwrite", *lbp, cwd=tmp_path)
    assert "sharp.png.png is an input" in done.stderr

    one = (files[0], "--mask-output=m", *lbp)
    assert run(*one, cwd=tmp_path).returncode == 0
    edited = tmp_path / "m" / "sharp.png.png"
    Image.new("L", (200, 160), 255).save(edited)
    before = edited.read_bytes()
    done = run(*one, cwd=tmp_path)
    assert (done.returncode, edited.read_bytes()) == (2, before)
    assert "m/sharp.png.png: exists already; --overwrite replaces masks" in done.stderr
    done = run(*one, "--region=m", "--overwrite", cwd=tmp_path)
    assert "is read by --region" in done.stderr
    done = run(*one, "--overwrite", "--csv=m/sharp.png.png", cwd=tmp_path)
    assert "is the name of a result" in done.stderr
    assert edited.read_bytes() == before
    assert run(*one, "--resume", cwd=tmp_path).returncode == 0  # taken over as it is
    assert edited.read_bytes() == before
    assert run(*one, "--overwrite", cwd=tmp_path).returncode == 0
    assert edited.read_bytes() != before


def test_masks_outlast_a_run_without_them(tmp_path: Path, folder: Path) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json")
    assert run(*made, "--mask-output=m", cwd=tmp_path).returncode == 0
    soft = folder / "soft.png"
    Image.open(soft).transpose(Image.Transpose.ROTATE_90).save(soft)
    done = run(*made, "--resume", cwd=tmp_path)
    assert "1 measured before" in done.stdout
    # The one that was measured without a mask has one that is stale.
    done = run(*made, "--resume", "--mask-output=m", cwd=tmp_path)
    assert "1 measured before" in done.stdout, done.stderr
    with Image.open(tmp_path / "m" / "soft.png.png") as mask:
        assert mask.size == (160, 200)


def test_a_mask_that_cannot_be_written_costs_no_scores(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    done = run(f"--input={folder}", "--method=lbp", "--mask-output=file/m", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")  # before the work
    whole = check.io.write_png

    def full(path: Path, pixels: np.ndarray) -> None:
        if path.name == "soft.png.png":
            raise ImageError(f"{path}: cannot be written: no space left")
        whole(path, pixels)

    monkeypatch.setattr(check.io, "write_png", full)
    made = (f"--input={folder}", "--method=lbp", "--mask-output=m", "--json=r.json")
    done = run(*made, cwd=tmp_path)
    assert done.returncode == 2
    assert "soft.png.png: cannot be written: no space left" in done.stderr
    assert "2 images, 0 unreadable" in done.stdout
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) == 2
    monkeypatch.undo()
    done = run(*made, "--resume", cwd=tmp_path)
    assert (done.returncode, "1 measured before" in done.stdout) == (0, True), done.stderr


def test_a_frame_that_lies_there_twice_counts_once(tmp_path: Path, folder: Path) -> None:
    (folder / "SHARP.dng").write_bytes(b"raw")
    (folder / "alone.dng").write_bytes(b"raw")
    done = run(f"--input={folder}", "--method=lbp", "--keep-best=2", cwd=tmp_path)
    assert "1 file left out as raw or HEIC of a frame" in done.stderr
    assert "SHARP.dng; named" in done.stderr
    assert "2 images, 1 unreadable" in done.stdout
    assert "alone.dng" in done.stderr
    named = run(f"--input={folder / 'SHARP.dng'}", "--method=lbp", cwd=tmp_path)
    assert "SHARP.dng" in named.stderr


def test_only_what_passed_is_kept(tmp_path: Path, folder: Path) -> None:
    made = (f"--input={folder}", "--method=lbp", "--keep-best=2", "--csv=r.csv", "--report=r.html")
    done = run(*made, "--min-in-focus=0.5", cwd=tmp_path)
    assert "kept: sharp.png (no others passed)" in done.stdout
    with (tmp_path / "r.csv").open(newline="") as stream:
        assert [row["kept"] for row in csv.DictReader(stream)] == ["True", "False"]
    assert "kept: none" in run(*made, "--gate=tenengrad=9", cwd=tmp_path).stdout


def test_regions_lie_as_the_photographs_do(tmp_path: Path, folder: Path) -> None:
    for camera, columns in (("100", slice(0, 50)), ("101", slice(0, 100))):
        for root in ("in", "masks"):
            (tmp_path / root / camera).mkdir(parents=True)
        Image.open(folder / "sharp.png").save(tmp_path / "in" / camera / "a.jpg")
        mask = np.zeros((160, 200), np.uint8)
        mask[:, columns] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / camera / "a.png")
    made = ("--recursive", "--method=lbp", "--json=r.json")
    assert run("--input=in", "--region=masks", *made, cwd=tmp_path).returncode == 0
    images = json.loads((tmp_path / "r.json").read_text())["images"]
    assert [image["region_fraction"] for image in images] == [0.25, 0.5]

    flat = tmp_path / "masks" / "100"
    done = run("--input=in", f"--region={flat}", *made, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("might be of 2 images; masks lie in folders") == 2
    both = ("--input=in/100", "--input=in/101")
    done = run(*both, f"--region={flat}", *made, cwd=tmp_path)
    assert done.stderr.count("other images of this name have the same mask") == 2


def test_two_of_one_name_are_told_apart(tmp_path: Path, folder: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.open(folder / "sharp.png").save(tmp_path / name / "i.png")
        (tmp_path / name / "bad.png").write_bytes(b"")
    done = run("--input=a", "--input=b", "--method=lbp", "--json=r.json", cwd=tmp_path)
    assert {line.partition(":")[0] for line in done.stdout.splitlines()[:2]} == {
        os.path.join("a", "i.png"), os.path.join("b", "i.png")  # noqa: PTH118
    }  # fmt: skip
    failures = json.loads((tmp_path / "r.json").read_text())["failures"]
    assert [Path(row["source"]).parts[0] for row in failures] == ["a", "b"]


def test_what_a_shell_made_of_a_pattern(tmp_path: Path, folder: Path) -> None:
    files = [str(path) for path in sorted(folder.glob("*.png"))]
    done = run("--input", *files, "--method=lbp", cwd=tmp_path)
    assert done.returncode == 2
    assert "quote a pattern, or give --input several times" in done.stderr


def test_long_images_are_told_of(tmp_path: Path, folder: Path) -> None:
    wide = np.tile(np.asarray(Image.open(folder / "sharp.png")), (1, 6))
    Image.fromarray(wide).save(folder / "wide.png")
    done = run(f"--input={folder}", cwd=tmp_path)
    assert "wide.png: 1200 x 160 px are squashed to a square" in done.stderr
    assert done.stderr.count("squashed") == 1
    assert "squashed" not in run(f"--input={folder}", "--method=lbp", cwd=tmp_path).stderr


def test_planes_channels_and_levels_are_images_of_their_own(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).integers(0, 4000, (192, 192)).astype(np.uint16)
    soft = gaussian_filter(scene.astype(float), 4).astype(np.uint16)
    planes = np.stack([scene, soft])
    with tifffile.TiffWriter(tmp_path / "s.ome.tif") as tiff:
        sizes = {f"PhysicalSize{axis}": 0.325 for axis in "XY"}
        names = {"Channel": {"Name": ["DAPI", "GFP"]}}
        tiff.write(planes, subifds=1, metadata={"axes": "CYX", **names, **sizes})
        tiff.write(planes[:, ::2, ::2], subfiletype=1)

    def checked(*flags: str) -> dict[str, Any]:
        made = ("--input=s.ome.tif", "--method=lbp", "--json=r.json", *flags)
        done = run(*made, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["images"]}

    each = checked("--planes=:")
    assert list(each) == ["s.ome.tif[C=0]", "s.ome.tif[C=1]"]
    sharp, soft_row = each.values()
    assert sharp["in_focus_fraction"] > soft_row["in_focus_fraction"] + 0.5
    [gfp] = checked("--channels=gfp").values()
    assert gfp["tenengrad"] == soft_row["tenengrad"] < sharp["tenengrad"] / 5
    [at_level] = checked("--channels=0", "--level=1", "--tile-size=10um").values()
    assert (at_level["height"], at_level["tile_size_px"]) == (96, pytest.approx(10 / 0.65))
    assert len(at_level["tiles"]) == 7


def test_resuming_replaces_no_mask_but_its_own(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (f"--input={folder}", "--method=lbp", "--json=r.json", "--mask-output=m")
    one = (f"--input={folder / 'sharp.png'}", *made[1:])
    assert run(*one, cwd=tmp_path).returncode == 0
    by_hand = tmp_path / "m" / "soft.png.png"
    by_hand.write_bytes(b"by hand")
    done = run(*made, "--resume", cwd=tmp_path)
    assert (done.returncode, "soft.png.png: exists already" in done.stderr) == (2, True)
    by_hand.unlink()

    (tmp_path / "r.json").unlink()
    (tmp_path / "m" / "sharp.png.png").unlink()
    whole = check.focus_report

    def killed(*arguments: Any) -> Iterator[Any]:
        yield next(whole(*arguments))
        assert json.loads((tmp_path / "r.json").read_text())["masks_begun"] == ["soft.png"]
        by_hand.write_bytes(b"of the killed run")
        monkeypatch.setattr(_focus_results.Results, "_write", lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "focus_report", killed)
    assert run(*made, cwd=tmp_path).returncode == 130
    monkeypatch.undo()
    done = run(*made, "--resume", cwd=tmp_path)
    assert "1 measured before" in done.stdout, done.stderr
    assert by_hand.read_bytes() != b"of the killed run"
    assert "masks_begun" not in json.loads((tmp_path / "r.json").read_text())


def test_masks_of_another_margin_are_not_taken_for_new_ones(tmp_path: Path, folder: Path) -> None:
    made = ("--method=lbp", "--json=r.json", "--mask-output=m")
    assert run(f"--input={folder}", *made, "--mask-margin=0", cwd=tmp_path).returncode == 0
    wide = (*made, "--mask-margin=20", "--resume")
    assert run(f"--input={folder / 'sharp.png'}", *wide, cwd=tmp_path).returncode == 0
    done = run(f"--input={folder}", *wide, cwd=tmp_path)
    assert "1 measured before" in done.stdout, done.stderr


def test_planes_are_resumed_and_their_masks_are_none_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    planes = np.random.default_rng(0).integers(0, 4000, (3, 64, 64)).astype(np.uint16)
    how = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "in" / "s.tif", planes, **how)
    made = ("--input=in", "--method=lbp", "--planes=:", "--json=r.json")
    assert run(*made, "--mask-output=in", cwd=tmp_path).returncode == 0
    done = run(*made, cwd=tmp_path)
    assert (done.returncode, "3 images" in done.stdout) == (0, True), done.stderr
    assert "3 files left out as masks" in done.stderr
    before = json.loads((tmp_path / "r.json").read_text())
    assert before["part"] == {"planes": [[0, None]]}
    done = run(*made, "--resume", cwd=tmp_path)
    assert "3 measured before" in done.stdout, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["images"] == before["images"]
    other = (*made[:2], "--planes=0:2", "--json=r.json", "--resume")
    assert "measured with part" in run(*other, cwd=tmp_path).stderr
    tifffile.imwrite(tmp_path / "in" / "s.tif", planes[:2], **how)
    assert "measured before" not in run(*made, "--resume", cwd=tmp_path).stdout


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A pyramid: background, with texture on the left half, out of focus in its lower part."""
    noise = np.random.default_rng(0).integers(0, 200, (1024, 512, 3)).astype(np.uint8)
    soft = gaussian_filter(noise.astype(float), (4, 4, 0)).astype(np.uint8)
    image = np.full((1024, 1024, 3), 240, np.uint8)
    image[:, :512] = np.where(np.arange(1024)[:, None, None] < 512, noise, soft)
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        how = {"tile": (128, 128), "compression": "zlib", "photometric": "rgb"}
        resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
        tiff.write(image, subifds=1, **how, **resolution)
        tiff.write(image[::4, ::4], subfiletype=1, **how)
    return path


@pytest.mark.parametrize("fields", ["--fields=256", "--fields=64um"])
def test_a_slide_is_checked_field_by_field(tmp_path: Path, slide: Path, fields: str) -> None:
    made = (f"--input={slide}", "--method=lbp", fields, "--json=r.json", "--csv=r.csv")
    gate = ("--region=content", "--min-in-focus=0.5")
    done = run(*made, *gate, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "slide.tif: FAILED, " in done.stdout
    assert "8 fields, 4 passed, 8 without content left out" in done.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    assert {(row["top"], row["left"]): row["passed"] for row in document["images"]} == {
        (y, x): y < 512 for y in (0, 256, 512, 768) for x in (0, 256)
    }
    [plane] = document["planes"]
    assert plane["in_focus_fraction"] == pytest.approx(0.5, abs=0.1)
    table = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert (table[3]["plane"], table[3]["top"], table[3]["left"]) == ("slide.tif", "256", "256")

    done = run(*made, *gate, "--min-fields=0.5", "--resume", cwd=tmp_path)
    assert (done.returncode, "8 measured before" in done.stdout) == (0, True), done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    coarser = ("--level=1", "--method=lbp", "--fields=128", "--json=r.json")
    assert run(f"--input={slide}", *coarser, cwd=tmp_path).returncode == 0
    rows = json.loads((tmp_path / "r.json").read_text())["images"]
    assert [(row["height"], row["width"]) for row in rows] == [(128, 128)] * 4


@pytest.mark.parametrize("kind", ["strips.tif", "photo.png", "stack.npy", "z.zarr"])
def test_fields_are_those_of_the_whole(
    tmp_path: Path, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = rng.integers(0, 4000, (2, 300, 500)).astype(np.uint16)
    if kind == "photo.png":
        image = image[:1] // 16
        Image.fromarray(image[0].astype(np.uint8)).save(tmp_path / kind)
    elif kind == "stack.npy":
        np.save(tmp_path / kind, image)
    elif kind == "z.zarr":
        zarr.save_array(tmp_path / kind, image, zarr_format=2)
    else:
        how = {"metadata": {"axes": "CYX"}, "photometric": "minisblack", "compression": "zlib"}
        tifffile.imwrite(tmp_path / kind, image, rowsperstrip=20, **how)
    seen: dict[str, np.ndarray[Any, Any]] = {}
    whole = check.focus_report

    def look(sources: list[check.Source], *rest: Any) -> Any:
        seen.update({source.name: np.asarray(source.read()) for source in sources if source.read})
        return whole(sources, *rest)

    monkeypatch.setattr(check, "focus_report", look)
    flags = ("--range=0,4000",) if kind != "photo.png" else ()
    done = run(f"--input={kind}", "--method=lbp", "--fields=170", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for channel, plane in enumerate(image):
        at = f"C={channel}," if kind == "strips.tif" else f"Z={channel}," * (len(image) > 1)
        names = [f"{kind}[{at}y={y},x={x}]" for y in (0, 150) for x in (0, 167, 333)]
        rows = [np.hstack([seen[name] for name in names[i : i + 3]]) for i in (0, 3)]
        top = 255 if kind == "photo.png" else 4000
        read = np.vstack(rows) / (255 if rows[0].dtype == np.uint8 else 1)
        np.testing.assert_allclose(read, plane / top, atol=1e-6)
    assert len(seen) == 6 * len(image)


@pytest.mark.parametrize("how", ["--planes=:", "--fields=64", "--stack"])
def test_planes_with_pixels_without_a_value(
    tmp_path: Path, how: str, rng: np.random.Generator
) -> None:
    stack = np.full((3, 128, 128), 900, np.float32)
    stack[:, 32:96, 32:96] = rng.uniform(0, 500, (3, 64, 64))
    stack[1, :, 100:] = np.nan
    layout = {"photometric": "minisblack", "metadata": {"axes": "ZYX"}}
    tifffile.imwrite(tmp_path / "s.tif", stack, **layout)
    made = ("--input=s.tif", "--method=lbp", how, "--region=content", "--json=r.json")
    done = run(*made, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads((tmp_path / "r.json").read_text())["images"]
    shares = [row["region_fraction"] for row in rows]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.08)


def test_where_content_lies_is_told_from_a_coarser_level(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"tile": (256, 256), "photometric": "minisblack"}
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        image = np.full((4096, 2048), 240, np.uint8)
        image[:1000, :1000] = rng.integers(0, 200, (1000, 1000))
        tiff.write(image, subifds=2, **how)
        tiff.write(image[::2, ::2], subfiletype=1, **how)
        tiff.write(image[::8, ::8], subfiletype=1, **how)  # too coarse
    looked_at = []
    whole = fields.coarse_view

    def look(view: PlaneView, *rest: Any) -> Any:
        looked_at.append(view.shape)
        return whole(view, *rest)

    monkeypatch.setattr(fields, "coarse_view", look)
    done = run(
        *("--input=s.tif", "--fields=1024", "--method=lbp", "--region=content"), cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 field, 7 without content" in done.stdout
    assert looked_at == [(2048, 1024)]


def _strips(path: Path, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    image = rng.integers(0, 200, shape).astype(np.uint8)
    photometric = "rgb" if shape[-1] == 3 else "minisblack"
    tifffile.imwrite(path, image, rowsperstrip=20, compression="zlib", photometric=photometric)


@pytest.mark.parametrize("shape", [(300, 500), (300, 500, 3)])
def test_strips_are_decoded_once_for_all_fields_beside_each_other(
    tmp_path: Path,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _strips(tmp_path / "s.tif", shape, rng)
    reads = []
    whole = PlaneView.read

    def read(self: PlaneView, *part: slice) -> Any:
        reads.append(part)
        return whole(self, *part)

    monkeypatch.setattr(PlaneView, "read", read)
    made = ("--input=s.tif", "--fields=100", "--method=lbp")
    assert "15 fields" in run(*made, cwd=tmp_path).stdout
    assert reads == [(slice(top, top + 100),) for top in (0, 100, 200)]
    monkeypatch.setattr(_focus_inputs, "_BAND_BYTES", 100)
    del reads[:]
    assert "15 fields" in run(*made, cwd=tmp_path).stdout
    assert len(reads) == 15


def test_fields_of_many_files_are_read_in_threads(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in "ab":
        _strips(tmp_path / f"{name}.tif", (300, 500), rng)
    part = Part(None, "each", None, 0, None, (100.0, "px"), None, max_pixels=10**9)
    sources = [
        source
        for name in "ab"
        for source in part.sources_of(tmp_path / f"{name}.tif", f"{name}.tif")
    ]
    whole = {name: tifffile.imread(tmp_path / f"{name}.tif") for name in "ab"}
    order = rng.permutation(np.tile(np.arange(len(sources)), 4))

    def is_right(i: int) -> bool:
        source = sources[i]
        place = source.field_of_view
        assert source.read is not None
        assert place is not None
        rows = slice(place.top, place.top + place.height)
        wanted = whole[source.name[0]][rows, place.left : place.left + place.width]
        return np.array_equal(source.read(), wanted)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, order.tolist()))
    part.close()


def test_one_plane_that_fails_fails_all(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 200, (2, 200, 200)).astype(np.uint8)
    noise[1] = gaussian_filter(noise[1].astype(float), 5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        how = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack"}
        tifffile.imwrite(tmp_path / name / "[s].tif", noise, **how)
    made = ("--input=a", "--input=b", "--fields=100", "--method=lbp", "--min-in-focus=0.5")
    done = run(*made, "--json=r.json", cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads((tmp_path / "r.json").read_text())
    assert [row["passed"] for row in document["planes"]] == [True, False] * 2
    # Names that two files have in common are told with their paths.
    lines = done.stdout.splitlines()
    assert lines[3].startswith(f"a{os.sep}[s].tif[Z=0,y=100,x=100]: passed")
    assert lines[-2].startswith(f"b{os.sep}[s].tif[Z=1]: FAILED, ")


def test_looking_over_is_shown_whatever_the_name_and_can_be_stopped(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "[").mkdir()
    _strips(tmp_path / "[" / "red].tif", (300, 500), rng)
    made = ("--input=.", "--recursive", "--fields=100", "--method=lbp", "--region=content")
    done = run(*made, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Looking over [/red].tif" in done.stderr
    monkeypatch.undo()
    whole = PlaneView.read

    def stopped(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(PlaneView, "read", stopped)
    done = run(*made, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (130, "semanticblur-core: stopped")


@pytest.mark.parametrize("n_planes", [3, 30])
def test_a_report_shows_the_first_planes_alone(
    tmp_path: Path, n_planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = np.random.default_rng(0).integers(0, 200, (n_planes, 64, 64)).astype(np.uint8)
    np.save(tmp_path / "s.npy", planes)
    n_views = []
    whole = fields.coarse_view
    monkeypatch.setattr(fields, "coarse_view", lambda *a: n_views.append(1) or whole(*a))
    made = ("--input=s.npy", "--fields=64", "--method=lbp")
    assert run(*made, "--report=r.html", cwd=tmp_path).returncode == 0
    n_shown = min(n_planes, 24)
    assert (tmp_path / "r.html").read_text().count('"picture":') == n_shown
    assert len(n_views) == n_shown


def test_rows_of_a_file_that_has_changed_are_dropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = ("--input=.", "--fields=64", "--method=lbp", "--json=../r.json", "--resume")
    (tmp_path / "in").mkdir()
    for name, side in (("a", 128), ("b", 128), ("a", 64)):
        image = rng.integers(0, 200, (side, side)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "in" / f"{name}.png")
        run(*made, cwd=tmp_path / "in")
    document = json.loads((tmp_path / "r.json").read_text())
    names = [row["name"] for row in document["images"]]
    assert sorted(name[0] for name in names) == ["a", "b", "b", "b", "b"]
    assert document["not_checked"] == []


def test_what_is_wrong_with_fields_is_one_line(tmp_path: Path, slide: Path, folder: Path) -> None:
    def refused(*flags: str, given: Path = slide) -> str:
        done = run(f"--input={given}", "--method=lbp", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 or "Usage" in done.stderr
        return done.stderr

    assert "--fields go without --stack" in refused("--fields=256", "--stack")
    assert "goes with --fields" in refused("--min-fields=0.5")
    assert "--mask-output goes without" in refused("--fields=256", "--mask-output=m")
    assert "--region=image or content" in refused("--fields=256", f"--region={folder}")
    assert "at least 64 px, got 20" in refused("--fields=20")
    assert "above 0, got 'inf'" in refused("--fields=inf")
    assert "names no pixel size" in refused("--fields=90um", given=folder / "sharp.png")
    assert "which it is not" in refused("--fields=64", "--level=1", given=folder / "sharp.png")
    blank = tmp_path / "blank.tif"
    tifffile.imwrite(blank, np.full((300, 300), 9, np.uint8))
    gated = ("--fields=100", "--region=content", "--min-in-focus=0.5", "--method=lbp")
    done = run("--input=blank.tif", *gated, cwd=tmp_path)
    assert done.returncode == 1
    assert "blank.tif: FAILED, no content, 0 fields, 0 passed, 9 without" in done.stdout


def test_one_of_several_images_of_a_file(tmp_path: Path, rng: np.random.Generator) -> None:
    sharp = rng.integers(0, 200, (128, 128)).astype(np.uint8)
    soft = gaussian_filter(sharp.astype(float), 5).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(np.stack([soft, sharp]), photometric="minisblack", metadata={"axes": "ZYX"})
        tiff.write(sharp[:100], photometric="minisblack")
    gate = ("--method=lbp", "--min-in-focus=0.5")
    done = run("--input=s.tif", *gate, cwd=tmp_path)
    assert (done.returncode, "--series=0 to 1" in done.stderr) == (2, True)
    assert run("--input=s.tif", *gate, "--series=1", cwd=tmp_path).returncode == 0
    done = run("--input=s.tif", *gate, "--series=1", "--fields=64", cwd=tmp_path)
    assert "s.tif[y=50,x=64]: passed" in done.stdout
    done = run("--input=s.tif", *gate, "--series=0", cwd=tmp_path)
    assert (done.returncode, "1 of 2 images passed" in done.stdout) == (1, True)
    done = run("--input=s.tif", *gate, "--series=0", "--stack", cwd=tmp_path)
    assert "best plane: s.tif[Z=1]" in done.stdout
    for series, shape in enumerate([(2, 128, 128), (100, 128)]):
        made = run_command(
            *("detect", "--input=s.tif", "--method=lbp", f"--series={series}", "--output=out"),
            f"--json=r{series}.json",
            cwd=tmp_path,
        )
        assert made.returncode == 0, made.stderr
        assert tifffile.imread(tmp_path / "out" / f"s_series{series}_blur.tif").shape == shape
        document = json.loads((tmp_path / f"r{series}.json").read_text())
        assert document["protocol"]["series"] == series


def test_two_photographs_of_one_stem_have_no_mask_in_common(tmp_path: Path, folder: Path) -> None:
    for name in ("a/i.jpg", "b/i.png"):
        (tmp_path / name).parent.mkdir()
        Image.open(folder / "sharp.png").save(tmp_path / name)
    (tmp_path / "m").mkdir()
    Image.new("L", (200, 160), 255).save(tmp_path / "m" / "i.png")
    done = run("--input=a", "--input=b", "--region=m", "--method=lbp", cwd=tmp_path)
    assert done.stderr.count("other images of this name have the same mask") == 2
    twice = ("--input=a", f"--input={tmp_path / 'a' / 'i.jpg'}")
    done = run(*twice, "--region=m", "--method=lbp", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
