"""Several worker processes: nothing lost when one is killed, nothing half there, one line each."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worker_detectors import IsSlow, KillsItsProcess, LeavesTracks, MeanIsBlur, no_such_model

from semanticblur_core import DetectionCluster, DetectOptions, Detector, detect_files, find_jobs
from semanticblur_core.errors import ConfigError, WeightsError
from semanticblur_core.focus.classical import ClassicalDetector
from semanticblur_core.inference.cluster import _detect_chunk, _Task
from semanticblur_core.inference.jobs import Job, find_kept
from semanticblur_core.inference.results import FileResult

pytest.importorskip("distributed")

pytestmark = [
    # Left open by dask's own event loop when processes are killed under it.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(120),
]

N_IMAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for i in range(N_IMAGES):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"photo{i:02}.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def make(random_weights: Path) -> functools.partial[Detector]:
    return functools.partial(Detector, str(random_weights), device="cpu", precision="float32")


def options(output: Path) -> DetectOptions:
    return DetectOptions(output, size=96, formats=("npy",))


@pytest.fixture(scope="module")
def serial(
    folder: Path, make: functools.partial[Detector], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FileResult]:
    out = tmp_path_factory.mktemp("serial")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers of two cores
    try:
        jobs, _ = find_jobs([str(folder)], out)
        return {r.source: r for r in detect_files(jobs, make(), options(out))}
    finally:
        torch.set_num_threads(n_threads)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticblur_core.inference.cluster.count_cores", lambda: 2)


def assert_same(results: list[FileResult], serial: dict[str, FileResult]) -> None:
    assert sorted(r.source for r in results) == sorted(serial)
    for result in results:
        expected = serial[result.source]
        assert result.error == expected.error
        # By their text: a failed one has NaN, which is not itself once it was sent.
        ours, theirs = (repr(replace(r, outputs=[], elapsed_s=0)) for r in (result, expected))
        assert ours == theirs
        for path, other in zip(result.outputs, expected.outputs, strict=True):
            np.testing.assert_array_equal(np.load(path), np.load(other))


def test_killing_one_of_two_workers_half_way_loses_no_image(
    folder: Path,
    make: functools.partial[Detector],
    serial: dict[str, FileResult],
    tmp_path: Path,
    one_thread: None,
) -> None:
    jobs, _ = find_jobs([str(folder)], tmp_path)
    results, killed = [], None
    environment = dict(os.environ)
    with DetectionCluster(make, n_workers=2) as cluster:
        for result in cluster.detect_files(jobs, options(tmp_path)):
            results.append(result)
            if killed is None and len(results) >= N_IMAGES // 2:
                pids = cluster._client.run(os.getpid)
                assert len(pids) == 2
                killed = next(iter(pids.values()))
                os.kill(killed, signal.SIGKILL)
        assert cluster._workers_lost
        assert cluster.detector.name == str(make.args[0])
        assert str(cluster.detector.device) == "cpu"
    assert killed is not None
    assert dict(os.environ) == environment
    assert_same(results, serial)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"photo{i:02}_blur.npy" for i in range(N_IMAGES)}  # no .part is left


def test_interrupted_it_tells_of_every_map_that_is_there(folder: Path, tmp_path: Path) -> None:
    jobs, _ = find_jobs([str(folder / "photo*.png")], tmp_path)
    make = functools.partial(ClassicalDetector, "lbp")
    with DetectionCluster(make, n_workers=2) as cluster:
        coming = cluster.detect_files(jobs, DetectOptions(tmp_path))
        results = [next(coming), next(coming)]
        results.append(coming.throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            results.extend(coming)
        told = {path.name for result in results for path in result.outputs}
        assert len(results) < N_IMAGES
        assert told == {path.name for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match="make another"):
            next(cluster.detect_files(jobs, DetectOptions(tmp_path)))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_what_a_stop_does_not_wait_for_is_not_made(
    stop: type[BaseException],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("semanticblur_core.inference.cluster.DRAIN_S", 0.1)
    jobs, _ = find_jobs([str(folder / "photo0*.png")], tmp_path)
    with DetectionCluster(IsSlow, n_workers=2) as cluster:
        coming = cluster.detect_files(jobs, DetectOptions(tmp_path))
        told = {path.name for path in next(coming).outputs}
        time.sleep(1.5)  # another is made meanwhile, and not told of
        start = time.monotonic()
        if stop is GeneratorExit:
            coming.close()
        else:
            told.update(path.name for path in coming.throw(stop).outputs)
            with pytest.raises(KeyboardInterrupt):
                next(coming)
        assert time.monotonic() - start < 5
        assert {path.name for path in tmp_path.iterdir()} == told
    time.sleep(2)
    assert {path.name for path in tmp_path.iterdir()} == told


def test_a_stop_leaves_results_whose_names_a_refused_file_has(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "photo00.png", tmp_path / "in" / "photo00.png")
    sources = [str(folder / "photo00.png"), str(tmp_path / "in" / "photo00.png")]
    out = tmp_path / "out"
    jobs, _ = find_jobs([*sources, str(folder / "photo01.png")], out)
    assert [bool(job.refusal) for job in jobs] == [False, True, False]
    with DetectionCluster(IsSlow, n_workers=1) as cluster:
        coming = cluster.detect_files(jobs, DetectOptions(out))
        [told] = next(coming).outputs
        coming.close()
    assert list(out.iterdir()) == [told]


def test_a_file_that_kills_its_worker_costs_no_other_one(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 41)).save(tmp_path / "killer.png")
    jobs, _ = find_jobs([str(folder / "photo0*.png"), str(tmp_path / "killer.png")], tmp_path)
    jobs.insert(3, jobs.pop())
    with DetectionCluster(KillsItsProcess, n_workers=1) as cluster:
        results = list(cluster.detect_files(jobs, DetectOptions(tmp_path / "out")))
    [failed] = [r for r in results if r.error is not None]
    assert failed.source == str(tmp_path / "killer.png")
    assert "killer.png: the worker process died each time" in str(failed.error)
    assert len(results) == 11
    assert len(list((tmp_path / "out").iterdir())) == 10


def write_stack(path: Path) -> np.ndarray:
    """Of as many planes as three workers are given."""
    stack = np.random.default_rng(5).integers(0, 200, (24, 40, 50), dtype=np.uint8)
    np.save(path, stack)
    return stack


def test_several_workers_make_one_stack_though_one_is_killed(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.npy")
    write_stack(tmp_path / "other.npy")
    jobs = [Job(str(tmp_path / f"{name}.npy"), name) for name in ("s", "other")]
    asked = DetectOptions(tmp_path / "out", formats=("npy",))
    expected = list(detect_files(jobs, MeanIsBlur(), replace(asked, output=tmp_path / "one")))
    tracks = tmp_path / "tracks"
    tracks.mkdir()
    told: list[tuple[str, int, int]] = []
    killed: list[int] = []

    def hear(source: str, n_done: int, n_all: int) -> None:
        told.append((source, n_done, n_all))
        if not killed and (begun := list(tracks.iterdir())):
            killed.append(int(begun[0].name))
            os.kill(killed[0], signal.SIGKILL)

    with DetectionCluster(functools.partial(LeavesTracks, str(tracks)), n_workers=2) as cluster:
        results = list(cluster.detect_files(jobs, asked, on_progress=hear))
        assert cluster._workers_lost
    results.sort(key=lambda result: result.source, reverse=True)
    for result, of_one in zip(results, expected, strict=True):
        assert result.error is None
        assert result.planes == of_one.planes
        np.testing.assert_array_equal(np.load(result.outputs[0]), np.load(of_one.outputs[0]))
        assert result.elapsed_s > 2  # what all workers took for it
    assert len(list(tracks.iterdir())) >= 3
    assert {source for source, _, _ in told} <= {job.source for job in jobs}
    assert {n_all for _, _, n_all in told} == {24 * 40}
    assert 0 < max(n_done for _, n_done, _ in told) <= 24 * 40
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "other_blur.npy",
        "s_blur.npy",
    ]


def test_a_plane_that_kills_its_worker_costs_the_stack_and_not_what_is_made(
    tmp_path: Path,
) -> None:
    stack = write_stack(tmp_path / "s.npy")
    stack[20, 0, 0] = 255
    np.save(tmp_path / "s.npy", stack)
    tracks = tmp_path / "tracks"
    tracks.mkdir()
    jobs = [Job(str(tmp_path / "s.npy"), "s")]
    asked = DetectOptions(tmp_path / "out", formats=("npy",))
    make = functools.partial(LeavesTracks, str(tracks), 255)
    with DetectionCluster(make, n_workers=2) as cluster:
        [result] = cluster.detect_files(jobs, asked)
    assert "the worker process died each time" in str(result.error)
    [kept] = find_kept(jobs, asked)
    assert {p.name for p in kept.glob("*.rows")} == {"0-320.rows", "320-640.rows"}
    [result] = detect_files(jobs, MeanIsBlur(), replace(asked, resume=True))
    assert result.error is None
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_parts_that_are_made_outlive_a_stop(tmp_path: Path) -> None:
    stack = write_stack(tmp_path / "s.npy")
    np.save(tmp_path / "small.npy", stack[:1])
    tracks = tmp_path / "tracks"
    tracks.mkdir()
    jobs = [Job(str(tmp_path / f"{name}.npy"), name) for name in ("small", "s")]
    asked = DetectOptions(tmp_path / "out", formats=("npy",))
    with DetectionCluster(functools.partial(LeavesTracks, str(tracks)), n_workers=2) as cluster:
        coming = cluster.detect_files(jobs, asked)
        assert next(coming).source == jobs[0].source
        deadline = time.monotonic() + 60
        while not find_kept(jobs, asked):
            assert time.monotonic() < deadline, "no part is made"
            time.sleep(0.05)
        coming.close()
    [kept] = find_kept(jobs, asked)
    assert not list(kept.glob(".*"))
    assert 1 <= len(list(kept.glob("*.rows"))) <= 3


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A running cluster with a worker whose working folder is another one."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "scheduler.json"
    started = []
    try:
        for name, *flags in (
            ("scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard"),
            ("worker", "--nthreads=2", "--no-nanny", "--no-dashboard"),
        ):
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}"]
            command += [f"--scheduler-file={file}", *flags]
            started.append(
                subprocess.Popen(command, cwd=tmp_path / "elsewhere", stderr=subprocess.DEVNULL)
            )
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline, "no scheduler"
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait(30)


def test_a_running_cluster_works_on_relative_paths(
    folder: Path,
    make: functools.partial[Detector],
    serial: dict[str, FileResult],
    tmp_path: Path,
    scheduler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    names = ["photo00.png", "photo01.png", "broken.png", "missing.png"]
    jobs = [Job(name, Path(name).stem) for name in names]
    out = Path(os.path.relpath(tmp_path / "out"))
    with DetectionCluster(make, scheduler=scheduler) as cluster:
        results = {r.source: r for r in cluster.detect_files(jobs, options(out))}
        again = list(cluster.detect_files(jobs[:1], options(out)))
        kept = list(cluster.detect_files(jobs[:1], replace(options(out), resume=True)))
    assert set(results) == set(names)
    assert results["broken.png"].error == "broken.png: not an image that can be read"
    assert results["missing.png"].error == "missing.png: no such file"
    for name in names[:2]:
        assert results[name].outputs == [out / f"{Path(name).stem}_blur.npy"]
        expected = serial[str(folder / name)]
        np.testing.assert_allclose(
            np.load(results[name].outputs[0]), np.load(expected.outputs[0]), atol=1e-4
        )
    assert (
        again[0].error == f"{out}/photo00_blur.npy: exists already; --overwrite replaces it, "
        "--resume keeps it"
    )
    assert kept[0].skipped


def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticblur_core.inference.cluster.CONNECT_S", 1)
    with pytest.raises(ConfigError, match=r"tcp://127\.0\.0\.1:1: cannot be reached") as caught:
        DetectionCluster(KillsItsProcess, scheduler="tcp://127.0.0.1:1")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="foo: cannot be reached: missing port number"):
        DetectionCluster(KillsItsProcess, scheduler="foo")
    with pytest.raises(ConfigError, match="either a number of workers or"):
        DetectionCluster(KillsItsProcess)


def test_a_model_that_cannot_be_loaded_ends_the_run(folder: Path, tmp_path: Path) -> None:
    jobs, _ = find_jobs([str(folder)], tmp_path / "out")
    make = functools.partial(no_such_model, "mine")
    with (
        DetectionCluster(make, n_workers=1) as cluster,
        pytest.raises(WeightsError, match="mine: no such model"),
    ):
        list(cluster.detect_files(jobs, options(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_result_whose_worker_died_after_writing_it_is_done_again(
    folder: Path, tmp_path: Path
) -> None:
    """Also where the same image has a result of another format."""
    lbp = ClassicalDetector("lbp")
    job = Job(str(folder / "photo00.png"), "photo00")
    (tmp_path / "photo00_blur.tif").write_bytes(b"of an earlier run")
    for resume in (False, True):
        asked = DetectOptions(tmp_path, resume=resume)
        task = _Task.of(job, asked)
        (tmp_path / "photo00_blur.png").write_bytes(b"of the worker that died")
        [result] = _detect_chunk(lbp, [task], asked)
        assert (result.error, result.skipped, result.height) == (None, False, 60)
        (tmp_path / "photo00_blur.png").unlink()
    (tmp_path / "photo00_blur.png").write_bytes(b"of an earlier run")
    task = _Task.of(job, DetectOptions(tmp_path))
    [result] = _detect_chunk(lbp, [task], DetectOptions(tmp_path))
    assert "exists already" in str(result.error)


def test_a_scheduler_that_is_lost_while_results_come_is_one_line() -> None:
    from distributed.comm.core import CommClosedError

    class Lost:
        def result(self) -> None:
            raise CommClosedError("in <TCP (closed)>: Stream is closed")

    cluster = object.__new__(DetectionCluster)
    with pytest.raises(ConfigError, match="scheduler was lost; --resume goes on"):
        cluster._results(Lost(), None, None, None)  # type: ignore[arg-type]
