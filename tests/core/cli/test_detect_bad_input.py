"""Bad input on the command line: one line each, exit code 2, the rest done."""

import csv
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from command_line import Done, run
from PIL import Image

from semanticblur_core.inference.table import _CsvWriter


def detect(*arguments: str, cwd: Path) -> Done:
    return run("detect", "--device=cpu", "--precision=float32", *arguments, cwd=cwd)


def png_header_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def with_tag(source: Path, target: Path, tag: str, value: int) -> None:
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        found = tiff.pages.first.tags[tag]
    struct.pack_into({3: "<H", 4: "<I"}[int(found.dtype)], data, found.valueoffset, value)
    target.write_bytes(data)


def make_ring(path: Path) -> None:
    """Let the last image of a TIFF be followed by the second."""
    with tifffile.TiffFile(path) as tiff:
        n_pages, second = len(tiff.pages), tiff.pages[1].offset
        where = tiff.pages.next_page_offset
    assert n_pages > 2
    data = bytearray(path.read_bytes())
    assert data[where : where + 4] == bytes(4)
    struct.pack_into("<I", data, where, second)
    path.write_bytes(data)


def cut(source: Path, target: Path, share: float = 0.6) -> None:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / "good.png")
    return root


def test_each_kind_is_one_line_and_the_rest_is_done(
    tmp_path: Path, folder: Path, rng: np.random.Generator
) -> None:
    photo = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    stack = rng.integers(0, 60_000, (4, 48, 64), np.uint16)
    (folder / "bomb.png").write_bytes(png_header_of(40_000, 40_000))
    (folder / "liar.png").write_bytes(png_header_of(3000, 3000))
    (folder / "zero.png").write_bytes(png_header_of(0, 20))
    (folder / "liar.pgm").write_bytes(b"P5 3000 3000 255\nabc")
    Image.fromarray(photo).save(folder / "liar.jpg")
    jpeg = bytearray((folder / "liar.jpg").read_bytes())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 6000, 6000)
    (folder / "liar.jpg").write_bytes(jpeg)
    tifffile.imwrite(tmp_path / "photo.tif", photo, photometric="rgb", compression="zlib")
    cut(tmp_path / "photo.tif", folder / "cut.tif")
    with_tag(tmp_path / "photo.tif", folder / "tall.tif", "ImageLength", 60_000)
    with_tag(tmp_path / "photo.tif", folder / "zero.tif", "ImageLength", 0)
    tifffile.imwrite(tmp_path / "s.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    cut(tmp_path / "s.tif", folder / "cut_imagej.tif")
    tifffile.imwrite(tmp_path / "s.ome.tif", stack, ome=True, metadata={"axes": "ZYX"})
    cut(tmp_path / "s.ome.tif", folder / "cut_ome.ome.tif")
    tifffile.imwrite(folder / "ring.tif", stack, photometric="minisblack", metadata=None)
    make_ring(folder / "ring.tif")
    tifffile.imwrite(
        folder / "five.tif", np.zeros((48, 64, 5), np.uint8), photometric="minisblack",
        planarconfig="contig", extrasamples=[0] * 4,
    )  # fmt: skip
    two = np.zeros((48, 64, 2), np.uint8)
    tifffile.imwrite(folder / "two.tif", two, photometric="minisblack", planarconfig="contig")
    for name in ("lost.png", "lost.npy"):
        (folder / name).symlink_to(f"no{name}")
    tifffile.imwrite(folder / "channels.tif", np.zeros((48, 64, 5), np.uint8))
    tifffile.imwrite(folder / "nan.tif", np.full((48, 64), np.nan, np.float32))
    half = rng.normal(size=(48, 64)).astype(np.float32)
    half[:20] = np.nan
    tifffile.imwrite(folder / "half_nan.tif", half)
    np.save(folder / "five.npy", np.zeros((48, 64, 5), np.uint8))
    np.save(folder / "zero.npy", np.zeros((0, 7), np.uint8))
    np.save(folder / "short.npy", np.zeros((48, 64), np.uint8))
    short = (folder / "short.npy").read_bytes()
    (folder / "short.npy").write_bytes(short.replace(b"(48, 64)", b"(99, 99)"))
    zarr.open_array(folder / "vast.zarr", mode="w", shape=(9, 9), chunks=(4096, 4096), dtype="u1")
    described = json.loads((folder / "vast.zarr" / "zarr.json").read_text())
    described["shape"] = [40_000_000, 50_000_000]
    (folder / "vast.zarr" / "zarr.json").write_text(json.dumps(described))

    done = detect(
        "--input=in", "--input=in/*.npy", "--input=in/vast.zarr", "--output=out", "--size=64",
        "--table=out/t.csv", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    expected = {
        "bomb.png": "1600 million pixels, more than the limit of 1000 million; --max-pixels of ",
        "liar.png": "truncated",
        "zero.png": "not an image that can be read",
        "liar.pgm": "truncated",
        "liar.jpg": "truncated: 6000 x 6000 pixels do not fit in its",
        "cut.tif": "damaged or unreadable",
        "tall.tif": "truncated: its size needs 1250 strips or tiles, 1 are there",
        "zero.tif": "the image has no pixels, 0 x 64",
        "cut_imagej.tif": "truncated",
        "cut_ome.ome.tif": "truncated: ends after 1 images",
        "ring.tif": "damaged: its chain of images leads back to an earlier one",
        "five.tif": "expected one grey or RGB image, got an array of shape (48, 64, 5)",
        "two.tif": "2 channels that are not said to be colours; detect --axes=YXC takes each",
        "lost.png": "a link to a file that is not there",
        "lost.npy": "a link to a file that is not there",
        "channels.tif": "does not say the axes of an array of shape (48, 64, 5); --axes names them",
        "nan.tif": "no finite value (all NaN or infinite)",
        "five.npy": "does not say the axes of an array of shape (48, 64, 5); --axes names them",
        "zero.npy": "the image has no pixels, shape (0, 7)",
        "short.npy": "damaged or unreadable",
        "vast_blur.tif": "does not fit on the disk",
    }
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected), done.stderr
    for name, message in expected.items():
        [line] = [line for line in lines if f"/{name}: " in line]
        assert message in line
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["good_blur.png", "half_nan_blur.png", "t.csv"]
    assert "2 of 23 images done" in done.stdout
    assert (tmp_path / "out" / "t.csv").read_text().count(",failed,") == len(expected)


def test_folders_hidden_or_of_videos(tmp_path: Path, folder: Path) -> None:
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "good.png", folder / ".thumbnails" / "small.png")
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").touch()
    done = detect(
        "--input=in", "--input=films", "--recursive", "--output=out", "--size=64", cwd=tmp_path
    )
    assert done.returncode == 2
    wanted = "semanticblur-core: films: no images in this folder; videos are taken by name or by a "
    assert done.stderr == f"{wanted}glob, 'films/*.mp4'\n"
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["good_blur.png"]


def test_max_pixels_is_the_limit(tmp_path: Path, folder: Path) -> None:
    common = ("--input=in", "--output=out", "--size=64")
    low = detect(*common, "--max-pixels=3071", cwd=tmp_path)
    assert (low.returncode, low.stderr.count("\n")) == (2, 1), low.stderr
    assert "0.003072 million pixels, more than the limit of 0.003071" in low.stderr
    assert detect(*common, "--max-pixels=3072", cwd=tmp_path).returncode == 0


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = detect("--input=in", "--output=file/below", "--size=64", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot be written" in done.stderr


@pytest.fixture
def full_folder(tmp_path: Path, folder: Path) -> Iterator[Path]:
    """A folder on a disk of its own with no room for a map."""
    out = tmp_path / "out"
    out.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        yield out
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_full_disk_is_one_line_for_each_file_that_does_not_fit(
    tmp_path: Path, folder: Path, full_folder: Path, rng: np.random.Generator
) -> None:
    large = rng.integers(0, 256, (300, 400), dtype=np.uint8)
    Image.fromarray(large).save(folder / "a_large.png")
    np.save(folder / "stack.npy", rng.integers(0, 256, (4, 100, 100), np.uint8))
    done = detect(
        "--input=in", "--input=in/stack.npy", "--output=out", "--size=64", "--format=npy",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert "a_large_blur.npy: cannot be written: No space left on device" in lines[0]
    assert "stack_blur.npy: a map of" in lines[1]
    assert sorted(p.name for p in full_folder.iterdir()) == ["good_blur.npy"]
    again = detect(
        "--input=in/a_large.png", "--output=out", "--format=png,tif,zarr", "--overlay", cwd=tmp_path
    )
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert "No space left on device" in again.stderr or "does not fit" in again.stderr
    assert not [p.name for p in full_folder.iterdir() if p.name.endswith(".part")]


def test_a_disk_that_fills_up_under_the_table_loses_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "good.png", folder / "also.png")
    add = _CsvWriter.add

    def full(writer: _CsvWriter, row: dict[str, object]) -> None:
        if "good" in str(row["input"]):
            raise OSError(28, "No space left on device")
        add(writer, row)

    monkeypatch.setattr(_CsvWriter, "add", full)
    how = ("--input=in", "--output=out", "--size=64", "--table=t.csv", "--json=j.json")
    stopped = detect(*how, cwd=tmp_path)
    assert stopped.returncode == 2
    assert "t.csv: cannot be written: No space left on device" in stopped.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["also_blur.png"]
    report = json.loads((tmp_path / "j.json").read_text())
    assert report["interrupted"]
    monkeypatch.undo()
    (tmp_path / "out" / "also_blur.png").write_bytes(b"")  # as a power cut leaves it
    again = detect(*how, "--resume", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    report = json.loads((tmp_path / "j.json").read_text())
    assert not report["interrupted"]
    assert {Path(image["input"]).stem for image in report["images"]} == {"also", "good"}
    assert report["skipped"] == []
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["done", "done"]


def test_what_is_too_long_to_be_squashed_is_told(tmp_path: Path, folder: Path) -> None:
    Image.new("RGB", (500, 100)).save(folder / "long.png")
    done = detect("--input=in", "--output=out", "--size=64", cwd=tmp_path)
    assert done.returncode == 0
    assert "in/long.png: 500 x 100 px are squashed to a square" in done.stderr
    assert done.stderr.count("\n") == 1
    native = detect("--input=in/long.png", "--output=o2", "--size=native", cwd=tmp_path)
    assert (native.returncode, native.stderr) == (0, "")


def test_a_stack_that_is_damaged_in_part_is_told_of_everywhere(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stack = rng.integers(0, 60000, (4, 48, 64), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        at, n_bytes = tiff.pages[2].dataoffsets[0], tiff.pages[2].databytecounts[0]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[at : at + n_bytes] = bytes(n_bytes)
    (tmp_path / "a.tif").write_bytes(data)
    Image.fromarray(stack[0].astype(np.uint8)).save(tmp_path / "b.png")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    said = "a.tif: NaN in 1 of 4 planes, plane Z=2: cannot be read: "
    flags = ["--input=*.tif", "--input=b.png", "--method=lbp", "--json=r.json", "--table=t.csv"]
    for case in ([], ["--resume"], ["--workers=2", "--overwrite"]):
        done = run("detect", *flags, "--output=out", *case, cwd=tmp_path)
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if "a.tif" in line]
        assert [line.startswith(f"semanticblur-core: {said}") for line in lines] == [True]
        document = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
        [image] = [image for image in document["images"] if image["input"] == "a.tif"]
        assert image["unreadable_part"].startswith(said)
        assert [sorted(plane) for plane in image["planes"]] == [
            ["blurred_fraction", "index", "mean_blur"],
            ["blurred_fraction", "index", "mean_blur"],
            ["error", "index"],
            ["blurred_fraction", "index", "mean_blur"],
        ]
        assert str(tmp_path) not in image["planes"][2]["error"]
        with (tmp_path / "t.csv").open(newline="") as file:
            rows = {row["input"]: row for row in csv.DictReader(file)}
        assert rows["a.tif"]["status"] == "partial"
        assert rows["a.tif"]["error"].startswith(said)
        assert rows["b.png"]["status"] == ("skipped" if case == ["--resume"] else "done")
    kept = (tmp_path / "out" / "a_blur.tif").read_bytes()
    single = [*flags[2:3], "--input=a.tif", "--planes=2", "--format=png,tif"]
    done = run("detect", *single, "--output=out2", cwd=tmp_path)
    assert (done.returncode, list((tmp_path / "out2").iterdir())) == (2, [])
    assert (tmp_path / "out" / "a_blur.tif").read_bytes() == kept


def test_all_planes_may_be_said_of_what_is_one(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "in").mkdir()
    image = rng.integers(0, 255, (48, 64), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    tifffile.imwrite(tmp_path / "in" / "b.tif", image)
    tifffile.imwrite(tmp_path / "in" / "c.tif", np.stack([image] * 3), photometric="minisblack")
    done = run("detect", "--input=in", "--output=out", "--method=lbp", "--planes=:", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run("focus", "--input=in", "--method=lbp", "--planes=:", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 images, 0 unreadable" in done.stdout
    done = run(
        "detect", "--input=in/a.png", "--output=o", "--method=lbp", "--planes=0", cwd=tmp_path
    )
    assert "--planes: of stacks and pyramids, which it is not" in done.stderr
