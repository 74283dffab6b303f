"""How much there is to compute is counted from headers: planes, frames and tiles, not files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from semanticblur_core import io, stacks
from semanticblur_core.cli import cli
from semanticblur_core.inference.jobs import DetectOptions, Job
from semanticblur_core.inference.workload import count_squares

TILE = (512 / 320) ** 2


@pytest.fixture
def options(tmp_path: Path) -> DetectOptions:
    return DetectOptions(tmp_path / "out")


def jobs_of(*sources: object) -> list[Job]:
    return [Job(str(source), "x") for source in sources]


def test_photographs_are_one_each_unopened(
    options: DetectOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "read_shape", None)
    jobs = jobs_of("a.jpg", "b.png", "sample:cat")
    assert count_squares(jobs, options) == 3
    assert count_squares(jobs, replace(options, size=640)) == 12


def test_planes_of_stacks_that_are_wanted(tmp_path: Path, options: DetectOptions) -> None:
    np.save(tmp_path / "s.npy", np.zeros((7, 5, 40, 50), np.uint8))
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((6, 40, 50), np.uint8))
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((40, 50, 3), np.uint8), photometric="rgb")
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    jobs = jobs_of(*(tmp_path / name for name in ("s.npy", "s.tif", "one.tif", "broken.tif")))
    assert count_squares(jobs, options) == 35 + 6 + 1 + 1
    assert count_squares(jobs[:1], replace(options, planes=(slice(1, 3),))) == 14
    assert count_squares([*jobs[:1] * 300, *jobs_of("a.jpg")], options) == 35 * 300 + 1


def test_counting_ends_no_batch(
    tmp_path: Path, options: DetectOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **how: object) -> None:
        raise AttributeError("of a kind nobody foresaw")

    monkeypatch.setattr(stacks, "open_stack", failing)
    assert count_squares(jobs_of(tmp_path / "s.tif", "a.jpg"), options) == 2


def test_an_array_within_a_zarr_is_looked_at(tmp_path: Path, options: DetectOptions) -> None:
    zarr.save(str(tmp_path / "scan" / "0"), np.zeros((7, 40, 50), np.uint8))
    assert count_squares(jobs_of(tmp_path / "scan" / "0"), options) == 7


def test_tiles_of_native_size(tmp_path: Path, options: DetectOptions) -> None:
    native = replace(options, size="native")
    Image.new("L", (960, 512)).save(tmp_path / "photo.jpg")
    np.save(tmp_path / "s.npy", np.zeros((3, 960, 960), np.uint8))
    assert count_squares(jobs_of(tmp_path / "photo.jpg"), native) == pytest.approx(2 * TILE)
    assert count_squares(jobs_of(tmp_path / "s.npy"), native) == pytest.approx(12 * TILE)
    assert count_squares(jobs_of("sample:cat"), native) == pytest.approx(300 * 451 / 320**2)
    assert count_squares(jobs_of("missing.jpg"), native) == 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_of_a_video(tmp_path: Path, options: DetectOptions, suffix: str) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 50, 66, "yuv420p"
        for _ in range(25):
            frame = av.VideoFrame.from_ndarray(np.zeros((50, 66, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert count_squares(jobs_of(path), options) == 25
    assert count_squares(jobs_of(path), replace(options, every=4)) == 7
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    assert count_squares(jobs_of(tmp_path / "noise.mp4"), options) == 1


def test_detect_chooses_by_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    asked: dict[str, Any] = {}

    class Chosen(Exception):  # noqa: N818
        pass

    def make(*_: object, **how: Any) -> None:
        asked.update(how)
        raise Chosen

    monkeypatch.setattr("semanticblur_core.cli.detect._make_detector", make)
    np.save(tmp_path / "s.npy", np.zeros((7, 5, 40, 50), np.uint8))
    arguments = ["detect", f"--input={tmp_path / 's.npy'}", f"--output={tmp_path / 'out'}"]
    assert isinstance(CliRunner().invoke(cli, arguments).exception, Chosen)
    assert asked["n_images"] == 35
