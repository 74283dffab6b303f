"""Export, and the back ends that run what was exported."""

import functools
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch.nn import functional as F
from worker_detectors import named_by_threads, session_threads

from semanticblur_core import (
    DetectionCluster,
    DetectOptions,
    Detector,
    detect_dask,
    find_jobs,
    weights,
)
from semanticblur_core.cli import cli
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ConfigError, SemanticBlurError, WeightsError
from semanticblur_core.inference import backends, choice, export
from semanticblur_core.inference.backends import (
    BackendName,
    Resizing,
    Upsampling,
    is_own_export,
    resize_map,
)
from semanticblur_core.inference.choice import BackendSpeed, pick_backend
from semanticblur_core.network import SemanticBlur

SIZES = [(320, 320), (64, 200), (223, 131)]


@pytest.fixture(scope="module")
def exported(random_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random network as a bioimage.io package, made by the command line."""
    folder = tmp_path_factory.mktemp("export") / "package"
    arguments = ["export", f"--model={random_weights}", "--format=bioimageio", f"--output={folder}"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "opset 18, largest difference from torch" in result.output
    return folder / "weights.onnx"


@pytest.fixture(scope="module")
def in_torch(random_weights: Path) -> Detector:
    return Detector(str(random_weights), device="cpu", precision="float32", backend="torch")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_gives_the_maps_of_torch(
    exported: Path, in_torch: Detector, backend: str, size: tuple[int, int]
) -> None:
    pytest.importorskip(backend)
    images = np.random.default_rng(3).random((2, *size, 3), np.float32)
    detector = Detector(str(exported), backend=backend, precision="float32", device="cpu")
    assert (detector.backend, detector.precision) == (backend, "float32")
    np.testing.assert_allclose(
        detector.engine.run(images), in_torch.engine.run(images), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_detector_can_be_sent_elsewhere(
    exported: Path, backend: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.chdir(exported.parent)
    detector = Detector(exported.name, backend=backend, precision="float32", device="cpu")
    detector.engine.reason = "measured"
    pickled = pickle.dumps(detector)
    monkeypatch.chdir("/")
    sent = pickle.loads(pickled)
    assert (sent.backend, sent.precision, sent.reason) == (backend, "float32", "measured")
    image = rng.integers(0, 256, (90, 140, 3), np.uint8)
    np.testing.assert_array_equal(sent.detect(image), detector.detect(image))


def test_models_info_tells_what_an_exported_file_says(
    exported: Path, random_weights: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["models", "info", str(exported)], catch_exceptions=False)
    told, origin = json.loads(result.output), weights.read_info(random_weights)
    assert (told["sha256"], told["licence"]) == (origin.sha256, origin.licence)
    assert told["size_bytes"] == exported.stat().st_size
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported.read_bytes()[:1000])
    result = CliRunner().invoke(cli, ["models", "info", str(damaged)])
    assert isinstance(result.exception, WeightsError)
    assert "damaged.onnx: not a readable ONNX network" in str(result.exception)


@pytest.mark.parametrize(("offset", "agrees"), [(20.0, True), (20.1, False)])
def test_a_saturated_map_hides_no_difference(
    exported: Path, random_weights: Path, tmp_path: Path, offset: float, agrees: bool
) -> None:
    """Where every map is 1, only the logits tell that file and network are not the same."""
    import onnx

    proto = onnx.load(exported)
    name = "network.decoder.conv3.bias"
    [bias] = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 20, name))
    onnx.save(proto, tmp_path / "saturated.onnx")
    form = export._ExportForm(weights.load(str(random_weights))[0]).eval()
    with torch.no_grad():
        form.network.decoder.conv3.bias += offset
    difference = export._largest_difference(form, tmp_path / "saturated.onnx")
    assert (difference <= export.TOLERANCE) == agrees


def test_the_whole_way_of_an_image(
    exported: Path, in_torch: Detector, random_weights: Path, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (90, 140, 3), np.uint8)
    detector = Detector(str(exported))
    assert detector.sha256 == weights.read_info(random_weights).sha256
    assert detector.config == in_torch.config
    modes: tuple[Upsampling, ...] = ("bilinear", "nearest-exact", "guided")
    for upsampling in modes:
        ours = detector.detect(image, upsampling=upsampling)
        assert (ours.shape, ours.dtype) == ((90, 140), np.float32)
        expected = in_torch.detect(image, upsampling=upsampling)
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        detector.detect(image, size="native"), in_torch.detect(image, size="native"), atol=1e-4
    )
    with pytest.raises(ConfigError, match="tensors come from torch"):
        detector.detect_tensors([image])


def test_torch_is_not_imported(exported: Path) -> None:
    code = (
        "import sys, numpy as np; from semanticblur_core import Detector; "
        f"Detector({str(exported)!r}).detect(np.zeros((70, 80), np.uint8)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bioimageio_package(exported: Path) -> None:
    pytest.importorskip("bioimageio.spec")
    # In a process of its own: the validator leaves files open.
    code = (
        "import sys, yaml; from pathlib import Path; import bioimageio.spec as spec\n"
        "folder = Path(sys.argv[1])\n"
        "with spec.ValidationContext(root=folder, perform_io_checks=True):\n"
        "    found = spec.validate_format(yaml.safe_load((folder / 'rdf.yaml').read_text()))\n"
        "print(found.format()); sys.exit(found.status != 'valid-format')"
    )
    command = [sys.executable, "-c", code, str(exported.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    image = np.load(exported.parent / "test_input.npy").transpose(0, 2, 3, 1)
    blur = Detector(str(exported), precision="float32").engine.run(image)
    np.testing.assert_allclose(blur[:, None], np.load(exported.parent / "test_output.npy"), 1e-4)


def test_files_that_were_not_exported_are_refused(exported: Path, tmp_path: Path) -> None:
    import onnx

    foreign = onnx.load(exported)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert is_own_export(exported)  # eval scores it as the model that it is
    assert not is_own_export(tmp_path / "foreign.onnx")
    with pytest.raises(WeightsError, match=r"not written by semanticblur-core export.*eval"):
        Detector(str(tmp_path / "foreign.onnx"))
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cut\.onnx: not a readable ONNX network"):
        Detector(str(tmp_path / "cut.onnx"))
    with pytest.raises(ConfigError, match="runs in onnxruntime or openvino, not torch"):
        Detector(str(exported), backend="torch")
    with pytest.raises(ConfigError, match="onnxruntime computes in float32"):
        Detector(str(exported), backend="onnxruntime", precision="bfloat16")
    with pytest.raises(ConfigError, match="backend 'abacus'"):
        Detector("default", backend="abacus")


def test_onnxruntime_that_falls_back_to_the_cpu_does_not_claim_the_gpu(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    on_the_cpu = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: on_the_cpu)
    assert Detector(str(exported), backend="onnxruntime").device == "cpu"
    with pytest.raises(ConfigError, match="device 'cuda': ONNX Runtime fails to use the GPU"):
        Detector(str(exported), backend="onnxruntime", device="cuda")


@pytest.mark.parametrize(
    ("device", "index", "named"),
    [("auto", 0, "cuda"), ("cuda", 0, "cuda"), ("cuda:0", 0, "cuda:0"), ("cuda:1", 1, "cuda:1")],
)
def test_onnxruntime_takes_the_gpu_that_is_asked_for(
    exported: Path, monkeypatch: pytest.MonkeyPatch, device: str, index: int, named: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    asked: list[object] = []

    def open_session(*_: object, providers: list[object]) -> object:
        asked[:] = providers
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(session, "get_providers", lambda: available)
    assert Detector(str(exported), backend="onnxruntime", device=device).device == named
    assert asked == [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:", "cuda:x", "cuda:-1", "cuda1", "CPU"])
def test_onnxruntime_refuses_devices_that_it_does_not_know(
    exported: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(ConfigError, match=f"device '{device}': onnxruntime takes auto, cpu, cuda"):
        Detector(str(exported), backend="onnxruntime", device=device)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_sessions_keep_to_the_threads_that_torch_would_take(
    exported: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("OMP_NUM_THREADS", "1,4")
    assert session_threads(Detector(str(exported), backend=backend)) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert session_threads(Detector(str(exported), backend=backend)) >= 0  # its own choice


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of dask's own event loop
def test_workers_share_the_cores_in_onnxruntime_too(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("semanticblur_core.inference.cluster.count_cores", lambda: 6)
    make = functools.partial(named_by_threads, str(exported), "onnxruntime")
    jobs, _ = find_jobs(["sample:cat"], tmp_path)
    with DetectionCluster(make, n_workers=2) as cluster:
        [result] = cluster.detect_files(jobs, DetectOptions(tmp_path, size=64))
        assert (result.error, cluster.detector.name) == (None, "3")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_exported_file_in_workers(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    arguments = ["detect", "--input=sample:cat", "--size=64", f"--output={tmp_path}"]
    arguments += [f"--model={exported}", "--workers=2", f"--json={tmp_path / 'j.json'}"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "j.json").read_text())
    assert report["protocol"]["backend"] == "onnxruntime"


@pytest.mark.parametrize("how", [{}, {"backend": "openvino", "precision": "float32"}])
def test_an_exported_file_on_dask_arrays_and_threads(
    exported: Path, in_torch: Detector, how: dict[str, str], rng: np.random.Generator
) -> None:
    da = pytest.importorskip("dask.array")
    pytest.importorskip("openvino")
    data = rng.integers(0, 255, (6, 70, 80), np.uint8)
    array = da.from_array(data, chunks=(1, 70, 80))
    maps = detect_dask(array, "ZYX", size=64, model=str(exported), **how)  # type: ignore[arg-type]
    expected = [in_torch.detect(plane, size=64) for plane in data]
    found = maps.compute(scheduler="threads", num_workers=4)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_export_replaces_nothing_unasked(tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_bytes(b"precious")
    result = CliRunner().invoke(cli, ["export", f"--output={tmp_path / 'there.onnx'}"])
    assert "--overwrite replaces it" in str(result.exception)
    assert (tmp_path / "there.onnx").read_bytes() == b"precious"


def test_an_export_has_a_name_that_detect_takes(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["export", f"--output={tmp_path / 'mymodel'}"])
    assert "mymodel: expected a file named .onnx" in str(result.exception)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SemanticBlurError, match=r"mymodel: expected a file named \.onnx"):
        export.export_onnx("default", str(tmp_path / "mymodel"))
    export.require_onnx_name("mymodel.onnx")
    with pytest.raises(SemanticBlurError, match="exists already; name a new folder"):
        export.export_bioimageio("default", str(tmp_path))


@pytest.mark.parametrize("shape", [(90, 140), (20, 33), (31, 7), (64, 64)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest-exact"])
def test_resizing_is_that_of_torch(
    shape: tuple[int, int], mode: Resizing, rng: np.random.Generator
) -> None:
    blur: NDArray[np.float32] = rng.random((31, 33), np.float32)
    keywords = {"align_corners": False} if mode == "bilinear" else {}
    expected = F.interpolate(torch.from_numpy(blur)[None, None], size=shape, mode=mode, **keywords)
    np.testing.assert_allclose(resize_map(blur, shape, mode), expected[0, 0], atol=1e-5)


@pytest.fixture
def info(random_weights: Path) -> weights.WeightsInfo:
    """Of a model that nothing is known of yet."""
    return replace(weights.read_info(random_weights), sha256="0" * 64)


def test_the_pick_counts_start_up(
    info: weights.WeightsInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pick_backend(info) == (
        "torch", "semanticblur-core bench backends finds out whether another is faster",
    )  # fmt: skip
    speeds = {
        "torch": BackendSpeed("torch", 3.0, 0.1, "float32", "cpu"),
        "openvino": BackendSpeed("openvino", 2.9, 0.05, "bfloat16", "cpu"),
    }
    monkeypatch.setattr(choice, "remembered", lambda *_: speeds)
    # The exported file is not there, so that it would have to be made first.
    assert pick_backend(info, 100)[0] == "torch"
    name, why = pick_backend(info, 1000)
    assert (name, why) == ("openvino", "openvino, measured: 50 ms an image, torch 100 ms")
    exported_file = choice.exported_file("0" * 64)
    exported_file.parent.mkdir(parents=True)
    exported_file.touch()
    assert pick_backend(info, 100)[0] == "openvino"
    assert pick_backend(info, 1)[0] == "torch"  # less than a tenth is gained
    assert pick_backend(info, 100, "bfloat16")[0] == "openvino"
    assert pick_backend(info, 100, "float32")[0] == "torch"  # openvino was faster in another
    exported_file.unlink()


def test_speeds_are_measured_and_remembered(
    random_weights: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "BACKENDS", ("torch", "onnxruntime"))
    monkeypatch.setattr(choice, "ensure_exported", lambda model: exported)
    monkeypatch.setattr(choice, "REMEMBERED_SIZE_PX", 64)
    monkeypatch.setattr(choice, "MOST_SCATTER", math.inf)
    home = choice.exported_file(weights.read_info(random_weights).sha256)
    home.parent.mkdir(parents=True, exist_ok=True)
    home.write_bytes(exported.read_bytes())
    # What lies in the folder that one happens to be in is not run.
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    found = list(choice.measure_backends(str(random_weights), size_px=64, n_rounds=3))
    assert not [speed for speed in found if isinstance(speed, SemanticBlurError)]
    speeds = choice.remembered(ModelConfig(), "cpu")
    assert list(speeds.values()) == found
    assert all(speed.startup_s > 0 and speed.seconds_per_image > 0 for speed in speeds.values())
    # A detector takes what is fastest for so many images.
    fastest = min(speeds.values(), key=lambda speed: speed.seconds_per_image).backend
    slowest = max(speeds.values(), key=lambda speed: speed.seconds_per_image)
    if speeds[fastest].seconds_per_image < 0.8 * slowest.seconds_per_image:
        many = Detector(str(random_weights), device="cpu", n_images=10**6)
        assert many.backend == fastest
    choice._record_file().unlink()
    assert choice.remembered(ModelConfig(), "cpu") == {}


def test_speeds_that_scatter_are_not_remembered(
    random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scatter = 0.5

    def measure(backend: BackendName, *_: object) -> BackendSpeed:
        return BackendSpeed(backend, 1.0, 0.1, "float32", "cpu", scatter)

    monkeypatch.setattr(choice, "_measure_apart", measure)
    assert list(choice.measure_backends(str(random_weights)))
    assert choice.remembered(ModelConfig()) == {}
    scatter = 0.1
    list(choice.measure_backends(str(random_weights)))
    assert choice.remembered(ModelConfig()) != {}
    choice._record_file().unlink()


def test_speeds_of_another_size_architecture_or_device_do_not_count(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(backbone="resnet34")
    other = tmp_path / "other.safetensors"
    weights.save(other, SemanticBlur(config).eval(), provenance={}, metrics={}, licence="test")
    gpu_of_torch = True

    def measure(backend: BackendName, model: str, device: str, *_: int) -> BackendSpeed:
        on_gpu = gpu_of_torch and device == "auto" and backend == "torch"
        return BackendSpeed(backend, 1.0, 0.1, "float32", "cuda" if on_gpu else "cpu")

    monkeypatch.setattr(choice, "_measure_apart", measure)
    list(choice.measure_backends(str(random_weights), size_px=1024))
    list(choice.measure_backends(str(other)))
    assert choice.remembered(ModelConfig()) == {}
    assert choice.remembered(config)["torch"].device == "cuda"
    assert choice.remembered(config, "cpu") == {}
    command = "semanticblur-core bench backends --device=cpu"
    assert pick_backend(weights.read_info(other), 10, device="cpu")[1].startswith(command)
    list(choice.measure_backends(str(other), device="cpu"))
    assert choice.remembered(config)["torch"].device == "cuda"
    assert choice.remembered(config, "cpu")["torch"].device == "cpu"
    gpu_of_torch = False  # of a machine without one, auto is the CPU
    list(choice.measure_backends(str(random_weights)))
    assert choice.remembered(ModelConfig()) == choice.remembered(ModelConfig(), "cpu") != {}
    choice._record_file().unlink()


def test_flips_and_scales_are_more_to_compute(
    random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pick(info: weights.WeightsInfo, *how: object) -> tuple[str, str]:
        asked.append(how)
        return "torch", ""

    monkeypatch.setattr("semanticblur_core.inference.detector.pick_backend", pick)
    Detector(str(random_weights), device="cpu", n_images=10)
    Detector(str(random_weights), device="cpu", n_images=10, flip=True, scales=(1, 2))
    assert asked == [(10, "auto", "cpu"), (100, "auto", "cpu")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Exception from src/a.cpp:224:\n\nthe reason\n", "OpenVINO failed: the reason"),
        ("Exception from src/a.cpp:224:\nstd::bad_alloc", "OpenVINO failed: out of memory; a"),
        ("", "OpenVINO failed: RuntimeError"),
    ],
)
def test_why_another_library_fails(text: str, told: str) -> None:
    assert str(backends._failed("OpenVINO", RuntimeError(text))).startswith(told)
