"""Videos: a row a frame, the right frames and times, maps as a video, truncated ones refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch

from semanticblur_core import Detector
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.batch import detect_files
from semanticblur_core.inference.jobs import DetectOptions, Job, find_kept
from semanticblur_core.inference.results import FileResult
from semanticblur_core.inference.video import iter_frames
from semanticblur_core.network import SemanticBlur

av = pytest.importorskip("av")

N_FRAMES = 12


class MeanIsBlur:
    """A map of the mean of what it is given: it tells which frame that was."""

    name = "mean"

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        return np.full(image.shape[:2], image.mean() / 255, np.float32)


def make_clip(path: Path, *, noise: bool = False, **keywords: object) -> Path:
    """Frames of grey level 20 i (or of noise, which does not compress), ten a second."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", **keywords) as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 50, 66, "yuv420p"
        for i in range(N_FRAMES):
            pixels = np.full((50, 66, 3), 20 * i, np.uint8)
            if noise:
                pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def run(path: Path, output: str = "out", **options: object) -> FileResult:
    jobs = [Job(str(path), path.stem)]
    [result] = detect_files(jobs, MeanIsBlur(), DetectOptions(path.parent / output, **options))  # type: ignore[arg-type]
    return result


def test_each_frame_is_a_row_with_its_time(tmp_path: Path) -> None:
    result = run(make_clip(tmp_path / "clip.mp4"))
    assert result.error is None
    assert (result.height, result.width, result.n_frames) == (50, 66, N_FRAMES)
    assert result.outputs == [tmp_path / "out" / "clip_blur.csv"]
    with result.outputs[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["frame", "time_s", "mean_blur", "blurred_fraction"]
    assert [int(row["frame"]) for row in rows] == list(range(N_FRAMES))
    assert [float(row["time_s"]) for row in rows] == [i / 10 for i in range(N_FRAMES)]
    means = [float(row["mean_blur"]) for row in rows]
    np.testing.assert_allclose(means, np.arange(N_FRAMES) * 20 / 255, atol=3 / 255)
    assert [float(row["blurred_fraction"]) for row in rows] == [0.0] * 7 + [1.0] * 5
    assert result.blurred_fraction == pytest.approx(5 / 12)
    assert result.mean_blur == pytest.approx(np.mean(means))


def test_every_third_frame_as_json_and_as_a_video_of_maps(tmp_path: Path) -> None:
    result = run(make_clip(tmp_path / "clip.mkv"), every=3, formats=("json", "mp4"))
    assert result.error is None
    rows = json.loads((tmp_path / "out" / "clip_blur.json").read_text())
    assert [row["frame"] for row in rows] == [0, 3, 6, 9]
    assert [row["time_s"] for row in rows] == [0, 0.3, 0.6, 0.9]
    maps = [frame for frame, _ in iter_frames(tmp_path / "out" / "clip_blur.mp4")]
    assert [round(frame.time_s, 3) for frame in maps] == [0, 0.3, 0.6, 0.9]
    levels = [float(frame.pixels.mean()) / 255 for frame in maps]
    np.testing.assert_allclose(levels, [row["mean_blur"] for row in rows], atol=3 / 255)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "clip_blur.json",
        "clip_blur.mp4",
    }
    again = run(tmp_path / "clip.mkv", formats=("json", "mp4"))
    assert "exists already" in str(again.error)
    assert run(tmp_path / "clip.mkv", formats=("json", "mp4"), resume=True).skipped


def test_frames_go_through_the_network(tmp_path: Path) -> None:
    torch.manual_seed(1)
    detector = Detector(SemanticBlur(ModelConfig(backbone="resnet34")), device="cpu")
    path = make_clip(tmp_path / "clip.mp4", noise=True)
    options = DetectOptions(tmp_path / "out", size=64, every=5)
    [result] = detect_files([Job(str(path), "clip")], detector, options)
    frames = [frame.pixels for frame, _ in iter_frames(path, every=5)]
    assert len(frames) == 3
    expected = np.mean([detector.detect(pixels, size=64).mean() for pixels in frames])
    assert result.mean_blur == pytest.approx(float(expected), abs=1e-6)


def test_frames_are_computed_as_many_at_once_as_the_detector_takes(tmp_path: Path) -> None:
    class FiveAtOnce(MeanIsBlur):
        batch_size = 5
        given: ClassVar[list[int]] = []

        def detect_batch(self, images: list[np.ndarray], **keywords: object) -> list[np.ndarray]:
            self.given.append(len(images))
            return [self.detect(image) for image in images]

    path = make_clip(tmp_path / "clip.mp4")
    tables = []
    for detector in (MeanIsBlur(), FiveAtOnce()):
        options = DetectOptions(tmp_path / detector.__class__.__name__)
        [result] = detect_files([Job(str(path), "clip")], detector, options)  # type: ignore[arg-type]
        assert result.error is None
        tables.append(result.outputs[0].read_text())
    assert FiveAtOnce.given == [5, 5, 2]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain.mp4", "Invalid data found"),
        ("fast.mp4", "truncated: ends after"),
        ("clip.mkv", "truncated: ends after"),
        ("clip.avi", "truncated: ends after"),
    ],
)
def test_a_truncated_video_is_one_line_and_no_table(
    tmp_path: Path, name: str, message: str
) -> None:
    flags = {"options": {"movflags": "faststart"}} if name == "fast.mp4" else {}
    path = make_clip(tmp_path / name, noise=True, **flags)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    result = run(path, formats=("csv", "json", "mp4"))
    assert message in str(result.error)
    assert name in str(result.error)
    assert "\n" not in str(result.error)
    assert not list((tmp_path / "out").glob("**/*"))


def test_a_title_that_is_not_utf8_is_no_reason_to_refuse_a_video(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", options={"movflags": "faststart"})
    tagged = tmp_path / "tagged.mp4"
    with av.open(str(path)) as source, av.open(str(tagged), "w") as target:
        target.metadata["title"] = "cafXX"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = tagged.read_bytes()
    assert data.count(b"cafXX") == 1
    tagged.write_bytes(data.replace(b"cafXX", b"caf\xe9 "))  # Latin-1
    result = run(tagged)
    assert (result.error, result.n_frames) == (None, N_FRAMES)


def test_an_unknown_codec_is_one_line(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    data = path.read_bytes()
    assert data.count(b"avc1") >= 1
    path.write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    result = run(path)
    assert "clip.mp4: its pictures are of a codec that FFmpeg does not know" in str(result.error)
    assert "\n" not in str(result.error)


def test_what_is_no_video_or_too_large_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "empty.mov").touch()
    assert "noise.mp4: damaged or unreadable" in str(run(tmp_path / "noise.mp4").error)
    assert "empty.mov: the file is empty" in str(run(tmp_path / "empty.mov").error)
    assert "gone.mp4: no such file" in str(run(tmp_path / "gone.mp4").error)
    clip = make_clip(tmp_path / "clip.mp4")
    assert "more than the limit of 0.0032 million" in str(run(clip, max_pixels=3200).error)
    assert "--format=tif: expected of csv, json, mp4" in str(run(clip, formats=("tif",)).error)
    assert "--overlay is for photographs" in str(run(clip, overlay=True).error)
    photo = run(tmp_path / "photo.png", formats=("csv", "mp4"))
    assert "--format=csv,mp4: expected of png, tif, npy, zarr" in str(photo.error)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match="no video track"):
        next(iter_frames(tmp_path / "sound.mp4"))


@pytest.mark.parametrize("n", [1, 5, 11])
def test_stopped_anywhere_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    class StopsAfter(MeanIsBlur):
        def __init__(self, n: int) -> None:
            self.n_left = n

        def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
            if not self.n_left:
                raise KeyboardInterrupt
            self.n_left -= 1
            return super().detect(image)

    monkeypatch.setattr("semanticblur_core.maps.KEEP_S", 0.0)
    clip = make_clip(tmp_path / "clip.mp4")
    jobs = [Job(str(clip), "clip")]
    whole = run(clip)
    options = DetectOptions(tmp_path / "again", resume=True)
    for formats in (("csv", "mp4"), ("csv",)):
        with pytest.raises(KeyboardInterrupt):
            list(detect_files(jobs, StopsAfter(n), replace(options, formats=formats)))
        # A video of maps begins anew.
        assert len(find_kept(jobs, options)) == (formats == ("csv",))
    told: list[tuple[str, int, int]] = []
    rest = StopsAfter(N_FRAMES - n)
    changed = replace(options, formats=("csv", "json"))
    [result] = detect_files(jobs, rest, changed, on_progress=lambda *at: told.append(at))
    assert rest.n_left == 0
    assert told[0] == (str(clip), n + 1, N_FRAMES)
    assert [path.read_bytes() for path in result.outputs[:1]] == [whole.outputs[0].read_bytes()]
    rows = json.loads(result.outputs[1].read_text())
    assert [row["frame"] for row in rows] == list(range(N_FRAMES))
    same: dict[str, Any] = {"outputs": whole.outputs, "elapsed_s": whole.elapsed_s}
    assert replace(result, **same) == whole
    assert len(list((tmp_path / "again").iterdir())) == 2


def test_rows_that_are_damaged_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semanticblur_core.maps.KEEP_S", 0.0)
    clip = make_clip(tmp_path / "clip.mp4")
    jobs, options = [Job(str(clip), "clip")], DetectOptions(tmp_path / "out", resume=True)
    truncated = KeyboardInterrupt()
    monkeypatch.setattr(
        "semanticblur_core.inference.video._refuse_truncated", mock.Mock(side_effect=truncated)
    )
    with pytest.raises(KeyboardInterrupt):  # when all frames are done
        list(detect_files(jobs, MeanIsBlur(), options))
    [folder] = find_kept(jobs, options)
    assert len(list(folder.glob("*.json"))) == N_FRAMES
    (folder / "3-4.json").write_text("[]")
    monkeypatch.undo()
    [result] = detect_files(jobs, MeanIsBlur(), options)
    whole = run(clip, "other")
    assert result.outputs[0].read_bytes() == whole.outputs[0].read_bytes()
