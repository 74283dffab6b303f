"""Several workers and summary tables on the command line, Ctrl+C included."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from command_line import run
from PIL import Image
from rich.progress import Progress
from rich.text import Text
from worker_detectors import MeanIsBlur

from semanticblur_core import device
from semanticblur_core.cli import detect as detect_module
from semanticblur_core.cli._stop import Stop
from semanticblur_core.cli.detect import command
from semanticblur_core.errors import ConfigError
from semanticblur_core.inference import batch
from semanticblur_core.inference.batch import detect_files
from semanticblur_core.inference.results import FileResult

COMMAND = [sys.executable, "-m", "semanticblur_core", "detect"]
N_IMAGES = 60
COMMON = ("--input=in", "--output=out", "--size=96", "--device=cpu", "--precision=float32")


def detect(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, check=False
    )


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """In a group of its own, which can be interrupted as a terminal does."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    for i in range(N_IMAGES):
        pixels = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"photo{i:02}.png", compress_level=0)
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes started here heed SIGINT, which a shell ignores for what it starts with ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="no signals to process groups")
@pytest.mark.parametrize(
    ("workers", "stop"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_stopping_keeps_the_table_and_resume_does_the_rest(
    tmp_path: Path, folder: Path, workers: int, stop: signal.Signals
) -> None:
    if workers > 1:
        pytest.importorskip("distributed")
    arguments = (*COMMON, f"--workers={workers}", "--table=t.csv", "--json=j.json")
    process = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "out").glob("*_blur.png"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, stop)  # as terminals and batch systems do: the workers get it too
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "semanticblur-core: stopped")
    rows = rows_of(tmp_path / "t.csv")
    numbers = {row["input"]: row["mean_blur"] for row in rows}
    assert 0 < len(rows) < N_IMAGES
    assert {row["status"] for row in rows} == {"done"}
    # No map that is not told of, no temporary file.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        Path(row["outputs"]).name for row in rows
    }
    report = json.loads((tmp_path / "j.json").read_text())
    assert (report["model"], len(report["model_sha256"])) == ("default", 64)
    assert (report["protocol"]["device"], report["protocol"]["precision"]) == ("cpu", "float32")
    assert len(report["images"]) == len(rows)
    assert report["interrupted"]

    if workers == 1:
        return
    (folder / "zz_broken.png").write_bytes(b"no image")
    again = ("--resume", "--table=t.csv", "--json=j.json")
    done = detect(*COMMON, f"--workers={workers}", *again, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "semanticblur-core: in/zz_broken.png: not an image that can be read\n"
    assert f"{N_IMAGES} of {N_IMAGES + 1} images done" in done.stdout
    rows = rows_of(tmp_path / "t.csv")
    assert len({row["input"] for row in rows}) == len(rows) == N_IMAGES + 1
    skipped = [row for row in rows if row["status"] == "skipped"]
    assert {row["input"] for row in skipped} == set(numbers)
    assert sum(row["status"] == "failed" for row in rows) == 1
    assert numbers.items() <= {row["input"]: row["mean_blur"] for row in rows}.items()
    images = json.loads((tmp_path / "j.json").read_text())["images"]
    assert numbers.keys() <= {image["input"] for image in images}
    assert len(list((tmp_path / "out").glob("*_blur.png"))) == N_IMAGES


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="no signals to process groups")
def test_stopping_while_workers_start_prints_nothing_of_theirs(
    tmp_path: Path, folder: Path
) -> None:
    pytest.importorskip("distributed")
    psutil = pytest.importorskip("psutil")
    process = start(*COMMON, "--workers=2", "--json=j.json", cwd=tmp_path)
    deadline = time.monotonic() + 90
    # multiprocessing's tracker and two workers
    while process.poll() is None and time.monotonic() < deadline:
        if len(psutil.Process(process.pid).children()) >= 3:
            break
        time.sleep(0.02)
    time.sleep(0.2)  # amid their imports
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "semanticblur-core: stopped"), output
    assert json.loads((tmp_path / "j.json").read_text())["images"] == []


def test_workers_that_cannot_be_had_cost_no_earlier_report(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise ConfigError("scheduler tcp://x:1: cannot be reached")

    monkeypatch.setattr(detect_module, "_open_cluster", none)
    (tmp_path / "j.json").write_text("before")
    arguments = [f"--input={folder}", f"--output={tmp_path}/out", f"--json={tmp_path}/j.json"]
    done = CliRunner().invoke(command, [*arguments, "--overwrite", "--scheduler=tcp://x:1"])
    assert isinstance(done.exception, ConfigError)
    assert (tmp_path / "j.json").read_text() == "before"


def test_resume_keeps_what_the_json_says_of_images_done_before(
    tmp_path: Path, folder: Path
) -> None:
    common = ("--output=out", "--method=lbp", "--json=j.json")
    assert detect("--input=in/photo0[01].png", *common, cwd=tmp_path).returncode == 0
    first = json.loads((tmp_path / "j.json").read_text())["images"]
    done = detect("--input=in/photo0[12].png", *common, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "j.json").read_text())
    assert report["images"][0] == first[1]
    # What is no input any more is kept as well.
    names = ["in/photo01.png", "in/photo02.png", "in/photo00.png"]
    assert [image["input"] for image in report["images"]] == names
    # A report that is there is not replaced unasked, least of all by one of nothing.
    before = (tmp_path / "j.json").read_bytes()
    again = detect("--input=in/phot.png", *common, cwd=tmp_path)
    assert again.returncode == 2
    assert "j.json: exists already" in again.stderr
    assert (tmp_path / "j.json").read_bytes() == before
    assert report["skipped"] == ["in/photo01.png"]
    (tmp_path / "j.json").write_text("[]")
    assert detect("--input=in/photo01.png", *common, "--resume", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "j.json").read_text())["images"] == []


def test_resume_takes_no_result_of_another_input_but_other_spellings(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "card2").mkdir()
    shutil.copy(folder / "photo01.png", tmp_path / "card2" / "photo00.png")
    common = ("--method=lbp", "--json=j.json", "--table=t.csv")
    first = detect("--input=in/photo00.png", "--output=out", *common, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    other = ("--input=card2/photo00.png", "--output=out", "--resume")
    for reports in (common[:2], (common[0], common[2])):
        done = detect(*other, *reports, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            "semanticblur-core: card2/photo00.png: out/photo00_blur.png is the result of "
            "in/photo00.png; detect it into another output folder\n"
        )
    again = (f"--input={folder / 'photo00.png'}", f"--output={tmp_path / 'out'}", "--resume")
    assert detect(*again, *common, cwd=tmp_path).returncode == 0
    [row] = [row for row in rows_of(tmp_path / "t.csv") if row["mean_blur"]]
    assert row["input"] == str(folder / "photo00.png")
    [image] = json.loads((tmp_path / "j.json").read_text())["images"]
    assert image["input"] == str(folder / "photo00.png")
    # Told of beside its owner it costs that nothing, and is told of again.
    both = detect(other[0], "--input=in/photo00.png", *other[1:], *common, cwd=tmp_path)
    assert both.returncode == 2
    assert detect(*other, *common, cwd=tmp_path).returncode == 2
    # Once the result is its own, it stays so.
    shutil.rmtree(tmp_path / "out")
    for _ in range(2):
        assert detect(*other, *common, cwd=tmp_path).returncode == 0
    done = detect("--input=in/photo00.png", *other[1:], *common, cwd=tmp_path)
    assert "is the result of card2/photo00.png" in done.stderr
    (tmp_path / "card2" / "photo00.png").unlink()  # moved: its result is that of a former name
    assert detect("--input=in/photo00.png", *other[1:], *common, cwd=tmp_path).returncode == 0


def test_a_sample_and_a_file_of_its_name_are_not_each_other(tmp_path: Path, folder: Path) -> None:
    (folder / "photo00.png").rename(tmp_path / "cat.png")
    common = ("--output=out", "--method=lbp", "--json=j.json", "--resume")
    assert detect("--input=cat.png", *common, cwd=tmp_path).returncode == 0
    inputs = ("--input=sample:cat", f"--input={folder / 'photo01.png'}")
    done = detect(*inputs, *common, cwd=tmp_path)
    assert done.returncode == 2
    assert "sample:cat: out/cat_blur.png is the result of cat.png" in done.stderr
    assert (tmp_path / "out" / "photo01_blur.png").is_file()


def test_asked_to_stop_while_a_result_is_told_of_it_waits_for_those_that_are_there() -> None:
    def coming() -> Generator[FileResult]:
        try:
            yield FileResult("first")
            yield FileResult("never")
        except KeyboardInterrupt:
            yield FileResult("finished by then")
            raise

    stop, told = Stop(), []

    def tell() -> None:
        for result in stop.each(coming()):
            os.kill(os.getpid(), signal.SIGTERM)
            told.append(result.source)

    with stop.heeded(), pytest.raises(KeyboardInterrupt):
        tell()
    assert told == ["first", "finished by then"]
    assert signal.getsignal(signal.SIGTERM) is not stop


def test_no_report_takes_the_place_of_a_result(tmp_path: Path, folder: Path) -> None:
    report = "--table=out/photo00_blur.csv"
    done = detect("--input=in", "--output=out", "--method=lbp", report, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{report}: is the name of a result; give it another" in done.stderr
    too_large = ("--input=in", "--output=out", "--size=4096", "--scales=1,2")
    assert "is more than 4096 px" in detect(*too_large, cwd=tmp_path).stderr
    ranges = detect("--input=in", "--output=out", "--range=0,inf", cwd=tmp_path)
    assert "expected finite numbers, LOW below HIGH" in ranges.stderr


def test_resume_says_which_maps_were_made_with_other_settings(tmp_path: Path, folder: Path) -> None:
    common = [f"--output={tmp_path}/out", "--method=lbp", f"--json={tmp_path}/j.json"]
    runner = CliRunner()
    first = [f"--input={folder}/photo0[01].png", *common, "--threshold=0.25"]
    assert runner.invoke(command, first).exit_code == 0
    again = [f"--input={folder}/photo0[0-2].png", *common, "--resume"]
    for _ in range(2):  # what was kept once is kept again
        done = runner.invoke(command, again)
        assert "2 of the files done before were made with other settings" in done.output
        report = json.loads((tmp_path / "j.json").read_text())
        assert report["protocol"]["blurred_is"] == "map > 0.5"
        own = [image.get("protocol", {}).get("blurred_is") for image in report["images"]]
        assert own == ["map > 0.25", "map > 0.25", None]
    same = runner.invoke(command, [f"--input={folder}/photo02.png", *common, "--resume"])
    assert "other settings" not in same.output


def test_inputs_that_name_nothing_are_told_of_and_the_rest_is_done(
    tmp_path: Path, folder: Path
) -> None:
    inputs = [f"--input={folder}/{name}" for name in ("*.nothing", "photo00.png")]
    done = CliRunner().invoke(command, [*inputs, f"--output={tmp_path}/out", "--method=lbp"])
    assert done.exit_code == 2
    assert f"semanticblur-core: {folder}/*.nothing: no file matches" in done.output
    assert (tmp_path / "out" / "photo00_blur.png").is_file()


def test_workers_take_the_precision_that_was_found_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def remembering(make: Any, *others: object) -> Any:
        made.append(make.keywords["precision"])
        raise KeyboardInterrupt

    monkeypatch.setattr(detect_module, "_open_cluster", remembering)
    monkeypatch.setattr(device, "bfloat16_pays", lambda device_type: True)
    samples = ["--input=sample:cat", "--input=sample:coffee"]
    arguments = [*samples, f"--output={tmp_path}", "--device=cpu", "--workers=2"]
    for more in ([], ["--precision=float32"], ["--backend=openvino"], ["--model=some.onnx"]):
        CliRunner().invoke(command, [*arguments, *more])
    assert made == ["bfloat16", "float32", "auto", "auto"]


def test_a_resumed_run_that_is_stopped_keeps_the_images_it_did_not_come_to(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--input={folder}/photo0[0-2].png", f"--output={tmp_path}/out", "--method=lbp"]
    arguments += [f"--json={tmp_path}/j.json"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    first = json.loads((tmp_path / "j.json").read_text())["images"]

    def stopped(*arguments: Any, **how: Any) -> Iterator[FileResult]:
        yield next(detect_files(*arguments, **how))
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "detect_files", stopped)
    assert CliRunner().invoke(command, [*arguments, "--resume"]).exit_code != 0
    report = json.loads((tmp_path / "j.json").read_text())
    assert (report["images"], len(report["skipped"])) == (first, 1)


def test_a_parquet_table_holds_the_numbers_of_the_json(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.png").write_bytes(b"no image")
    done = detect(
        "--input=sample:cat", "--input=bad.png", "--output=out", "--table=t.parquet", cwd=tmp_path
    )
    assert done.returncode == 2
    cat, bad = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert (cat["input"], cat["status"], cat["outputs"]) == (
        "sample:cat",
        "done",
        "out/cat_blur.png",
    )
    assert (cat["height"], cat["width"], cat["n_planes"]) == (300, 451, 1)
    assert f"mean blur {cat['mean_blur']:.3f}" in done.stdout
    assert (bad["status"], bad["mean_blur"]) == ("failed", None)
    assert bad["error"] == "bad.png: not an image that can be read"


def test_a_classical_method_works_with_workers(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("distributed")
    arguments = ("--input=in/photo0[0-3].png", "--output=out", "--method=lbp", "--json=j.json")
    done = detect(*arguments, "--workers=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "j.json").read_text())
    assert (report["model"], len(report["images"])) == ("lbp", 4)


def test_bad_files_are_one_line_from_workers_too(
    tmp_path: Path, folder: Path, rng: np.random.Generator
) -> None:
    """What tifffile and Pillow log about them is not shown, as in one process."""
    pytest.importorskip("distributed")
    stack = rng.integers(0, 60_000, (4, 48, 64), np.uint16)
    tifffile.imwrite(tmp_path / "cut.ome.tif", stack, ome=True, metadata={"axes": "ZYX"})
    data = (tmp_path / "cut.ome.tif").read_bytes()
    (tmp_path / "cut.ome.tif").write_bytes(data[: len(data) * 6 // 10])
    lines = []
    for workers in (1, 2):
        done = detect(
            "--input=cut.ome.tif", "--input=in/photo00.png", f"--output=out{workers}",
            "--method=lbp", f"--workers={workers}", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2
        assert (tmp_path / f"out{workers}" / "photo00_blur.png").is_file()
        lines.append(done.stderr.splitlines())
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert "cut.ome.tif: truncated" in lines[0][0]


def test_what_cannot_be_done_is_said_before_the_work(tmp_path: Path) -> None:
    sample = ("--input=sample:cat", "--output=out")
    (tmp_path / "file").touch()
    for flags, message in (
        (("--workers=2", "--scheduler=tcp://127.0.0.1:1"), "--scheduler has workers of its own"),
        (("--table=t.xlsx",), "t.xlsx: expected a table named .csv or .parquet"),
        (("--json=file/below/j.json",), "j.json: cannot be written: Not a directory"),
        (("--every=2",), "--every: of videos, and no input is one"),
    ):
        done = detect(*sample, *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()


_DETECT = ["detect", "--input=sample:cat", "--input=sample:coffee", "--output=out"]


@pytest.mark.parametrize(
    ("module", "command", "flags", "message"),
    [
        ("distributed", _DETECT, ["--workers=2"], "pip install 'napari-semanticblur[cluster]'"),
        ("pyarrow", _DETECT, ["--table=t.parquet"], "Parquet needs pyarrow"),
        ("av", _DETECT, ["--input=clip.mp4"], "pip install 'napari-semanticblur[video]'"),
        ("matplotlib", ["eval", "--maps=.", "--masks=."], ["--plots=p"], "plots need matplotlib"),
    ],
)
def test_a_missing_extra_is_one_line(
    tmp_path: Path, module: str, command: list[str], flags: list[str], message: str
) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from semanticblur_core.cli import main;main()"
    )
    sample = [*command, *flags]
    done = subprocess.run(
        [sys.executable, "-c", code, *sample],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_maps_of_another_level_or_channel_are_told_of(tmp_path: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 4000, (2, 96, 96)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "s.ome.tif") as tiff:
        tiff.write(planes, subifds=1, metadata={"axes": "CYX"})
        tiff.write(planes[:, ::2, ::2], subfiletype=1)
    for report in ("--json=j.json", "--table=t.csv"):
        made = ("--input=s.ome.tif", f"--output={report[2]}", report, "--method=lbp")
        assert detect(*made, "--channels=0", cwd=tmp_path).returncode == 0
        for flags in (["--channels=1"], ["--level=1"], ["--channels=0", "--planes=:"], []):
            done = detect(*made, *flags, "--resume", cwd=tmp_path)
            assert "1 of the files done before were made with other settings" in done.stdout, flags
        assert "other" not in detect(*made, "--channels=0", "--resume", cwd=tmp_path).stdout


def test_files_that_no_report_tells_of_are_told_of(tmp_path: Path, folder: Path) -> None:
    made = (f"--input={folder}", "--output=out", "--method=lbp")
    assert detect(*made, cwd=tmp_path).returncode == 0
    n = len(list(folder.iterdir()))
    for report in ("--json=j.json", "--table=t.csv"):
        done = detect(*made, report, "--resume", cwd=tmp_path)
        assert f"{n} of the files done before have no numbers in" in done.stdout


def test_there_are_no_more_workers_than_files(tmp_path: Path) -> None:
    done = detect("--input=sample:cat", "--output=out", "--method=lbp", "--workers=8", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("workers needed: 1 of 8\n")


def test_a_stack_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    class Stops(MeanIsBlur):
        n_left = 2

        def made(self) -> None:
            if not self.n_left:
                raise KeyboardInterrupt
            self.n_left -= 1

    made: list[Stops] = []

    def make(*_: object, **__: object) -> Stops:
        made.append(Stops())
        return made[-1]

    monkeypatch.setattr(detect_module, "_make_detector", make)
    monkeypatch.setattr("semanticblur_core.maps.KEEP_S", 0.0)
    np.save(tmp_path / "s.npy", rng.integers(0, 200, (3, 400, 500), dtype=np.uint8))
    asked = ("detect", "--input=s.npy", "--output=out")
    stopped = run(*asked, cwd=tmp_path)
    assert stopped.returncode == 130
    [folder] = (tmp_path / "out").iterdir()
    assert (
        f"semanticblur-core: what is made of a map so far is kept, 1.5 MiB in out/{folder.name}: "
        "--resume goes on with it, a run without --resume deletes it\n"
    ) in stopped.stderr
    assert run(*asked, "--resume", cwd=tmp_path).returncode == 0
    assert made[-1].n_left == 1  # of three planes one was left to make
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s_blur.tif"]
    assert run(*asked, "--overwrite", cwd=tmp_path).returncode == 130
    made_anew = run(*asked, "--overwrite", cwd=tmp_path)
    assert made_anew.returncode == 130  # nothing is taken over without --resume
    assert made[-1].n_left == 0


def test_bars_of_files_that_take_long_come_and_go() -> None:
    with Progress(disable=True) as progress:
        progress.add_task("Detecting", total=2)
        bars = detect_module._FileBars(progress)
        bars.advance("in/[red]slide.tif", 1, 3)
        bars.advance("b.tif", 5, 5)
        bars.advance("in/[red]slide.tif", 2, 3)
        _, slide, other = progress.tasks
        assert (slide.completed, slide.total, other.completed) == (66, 100, 100)
        assert Text.from_markup(slide.description).plain == "  [red]slide.tif, %"
        bars.remove("in/[red]slide.tif")
        bars.remove("photo.jpg")  # too quick for one
        assert [task.description for task in progress.tasks] == ["Detecting", "  b.tif, %"]
