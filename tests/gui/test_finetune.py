"""The fine-tune widget in a real viewer, driven as a person would."""

import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication

from napari_semanticblur import _detect, _finetune
from napari_semanticblur._layers import find_result
from napari_semanticblur._painted import annotated_layers
from napari_semanticblur._settings import Preferences, preferences
from semanticblur_core import weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.data.focal_stack import focal_stack
from semanticblur_core.data.store import AnnotationStore, read_store
from semanticblur_core.device import computes_bfloat16
from semanticblur_core.network import SemanticBlur

ANNOTATION = {"semanticblur": {"role": "annotation", "source": "image", "store": None}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr("napari.utils.notifications.show_error", shown.append)
    return shown


@pytest.fixture
def widget(viewer: Any, errors: list[str]) -> Any:
    """With the smallest network to start from, so that a run takes seconds."""
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Fine-tune blur model")
    widget.device.value = "cpu"
    widget.size.value = _detect.CUSTOM
    widget.custom_size.value = 64
    widget.budget.value = _finetune.CUSTOM_STEPS
    widget.n_steps.value = 2
    return widget


def test_a_size_of_the_preferences_beyond_its_limits_is_brought_within(
    viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_finetune, "preferences", lambda: Preferences(size="9999"))
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Fine-tune blur model")
    assert (widget.size.value, widget.custom_size.value) == (_detect.CUSTOM, 4096)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    model = SemanticBlur(ModelConfig(backbone="resnet34")).eval()
    weights.save(path, model, provenance={}, metrics={}, licence="test", half=False)
    return path


def start_from(widget: Any, path: Path) -> None:
    widget._opened.append(str(path))
    widget.base.reset_choices()
    widget.base.value = str(path)


def painted(viewer: Any, *, classes: tuple[int, ...] = (1, 2), store: str | None = None) -> Any:
    """An image, noise beside a smooth half, with four strokes of each class."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    image[:, 32:] = 128
    labels = np.zeros((64, 64), np.uint8)
    for row in range(6, 60, 14):
        for code, columns in ((1, slice(4, 28)), (2, slice(36, 60))):
            if code in classes:
                labels[row : row + 3, columns] = code
    viewer.add_image(image, name="image")
    record = {"semanticblur": ANNOTATION["semanticblur"] | {"store": store}}
    return viewer.add_labels(labels, name="image strokes", metadata=record)


def finish(qtbot: Any, widget: Any, timeout_ms: int = 180_000) -> None:
    widget.run()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=timeout_ms)


class Turns:
    """What the window's thread worked in each turn of the event loop, in seconds.

    Beside it the time on the clock, which on a busy machine is also waiting for a processor.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self._last, self._last_clock = time.thread_time(), time.perf_counter()
        self._timer = QTimer()
        self._timer.timeout.connect(self._beat)
        self._timer.start(5)

    def _beat(self) -> None:
        now, clock = time.thread_time(), time.perf_counter()
        self.seconds.append(now - self._last)
        self.waits.append(clock - self._last_clock)
        self._last, self._last_clock = now, clock

    def stop(self) -> list[float]:
        self._timer.stop()
        return self.seconds


def f_beta(blurred: np.ndarray, truth: np.ndarray) -> float:
    hits = np.count_nonzero(blurred & truth)
    precision = hits / max(1, np.count_nonzero(blurred))
    recall = hits / max(1, np.count_nonzero(truth))
    return 1.3 * precision * recall / max(1e-9, 0.3 * precision + recall)


def test_a_layer_that_is_renamed_stays_chosen(viewer: Any, widget: Any) -> None:
    first = painted(viewer)
    other = viewer.add_labels(np.zeros((64, 64), np.uint8), name="other")
    first.name = "strokes of mine"
    assert widget.layers.value == ["strokes of mine"]
    assert [each.labels for each in widget._chosen()] == [first]
    other.name = "others"
    assert widget.layers.value == ["strokes of mine"]
    widget.layers.value = ["others"]
    first.name, other.name = "a", "b"
    assert widget.layers.value == ["b"]
    viewer.layers.remove(other)
    assert widget.layers.value == []
    widget._choose_annotations()  # what was taken back stays so
    assert widget.layers.value == []


def paint_five_strokes(layer: Any) -> list[int]:
    """Down the planes 2 and 4, well inside of what is sharp and what is blurred there.

    As napari's own mouse callback paints. Returns the planes that were not painted on.
    """
    layer.brush_size = 9
    for plane, column, code in ((2, 120, 1), (2, 250, 2), (2, 290, 2), (4, 70, 2), (4, 200, 1)):
        layer.selected_label = code
        with layer.block_history():
            layer._draw(code, (plane, 16, column), (plane, 300, column))
    return [0, 1, 3, 5, 6]


@pytest.mark.timeout(900)
def test_the_whole_loop(qtbot: Any, viewer: Any, widget: Any) -> None:
    """Open, detect, paint five strokes, fine-tune, detect again.

    Planes that were never painted are right, photographs are not forgotten, and the time is short.
    In the noise of a dim camera the packaged model sees focus where there is none.
    """
    images, _, blurred = focal_stack(
        n_planes=7, size_px=320, kind="cells", largest_radius_px=5.0, noise=20
    )
    layer = viewer.add_image(images, name="stack")
    viewer.dims.set_point(0, 3)
    _, detect = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    detect.planes.value = _detect.ALL
    begin = time.perf_counter()
    finish(qtbot, detect)
    before = find_result(viewer, layer, "labels").data.copy()
    _, annotate = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Annotate blur")
    annotate.layer.value = layer
    annotate.annotate()
    untouched = paint_five_strokes(annotate.current.layer)
    widget.layers.value = ["stack annotation"]
    widget.size.value = _detect.PAPER
    widget.budget.value = _finetune.QUICK
    viewer.layers.selection.active = layer
    qtbot.wait(500)  # what the strokes and the new widgets left to draw
    gc.collect()
    gc.freeze()  # what the tests before left is not looked through while the window is timed
    clicked = time.thread_time()
    widget.run()  # napari adds the preview's layer, a tenth of a second and more of its own
    click_s = time.thread_time() - clicked
    turns = Turns()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=600_000)
    seconds = turns.stop()
    gc.unfreeze()
    print(f"the click {click_s:.3f} s, then the longest turn {max(seconds):.3f} s")
    print(f"by the clock {max(turns.waits):.3f} s")
    assert widget._last_tuning.kept == "my model@1"
    assert not widget._last_tuning.last.result["has_forgotten"]
    detect.model.value = "my model"
    finish(qtbot, detect)
    whole_s = time.perf_counter() - begin
    print(f"the whole loop took {whole_s:.0f} s")
    # 90 s on two cores that do nothing else, see docs/finetune.md; without bfloat16 170 s.
    assert whole_s < (180 if computes_bfloat16(torch.device("cpu")) else 600)
    after = find_result(viewer, layer, "labels").data
    truth = blurred[untouched]
    scores = [f_beta(codes[untouched] == 2, truth) for codes in (before, after)]
    assert scores[1] - scores[0] >= 0.1, scores
    assert len(seconds) > 100
    assert click_s < 0.5
    assert max(seconds) < 0.15
    assert max(turns.waits) < 1.5  # a turn that waits for a disk, a lock or a process
    preview = next(x for x in viewer.layers if "my model@1" in x.name)
    assert preview.data.shape == (1, 320, 320)
    np.testing.assert_allclose(preview.translate, (3, 0, 0))
    shown = preview.data.copy()
    widget.show_before.value = True
    assert f_beta(preview.data[0] > 0.5, blurred[3]) < f_beta(shown[0] > 0.5, truth[2])
    assert "before" in widget.table.value
    if os.environ.get("SEMANTICBLUR_DATA"):
        before_mae = weights.read_info(weights.resolve("default")).metrics["mae"]
        after_mae = photographs_mae(Path(os.environ["SEMANTICBLUR_DATA"]), "my model")
        print(f"validation photographs: MAE {before_mae:.4f} before, {after_mae:.4f} after")
        assert after_mae <= before_mae + 0.01


def photographs_mae(data_dir: Path, model: str) -> float:
    """Of the validation photographs, by the protocol."""
    table = Path(os.environ["SEMANTICBLUR_HOME"]) / "eval.json"
    subprocess.run(
        [
            sys.executable, "-m", "semanticblur_core", "eval", f"--model={model}",
            f"--images={data_dir / 'cuhk-tr1' / 'images'}",
            f"--masks={data_dir / 'cuhk-tr1' / 'masks'}", "--split=cuhk-val",
            f"--json={table}",
        ],
        check=True, capture_output=True, env=dict(os.environ),
    )  # fmt: skip
    return float(json.loads(table.read_text())["mae"])


def test_the_copied_command_gives_the_same_weights(
    qtbot: Any, viewer: Any, widget: Any, small_model: Path, home: Path
) -> None:
    start_from(widget, small_model)
    painted(viewer)
    assert list(widget.layers.value) == ["image strokes"]
    widget.seed.value = 7
    widget.copy_button.native.click()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=10_000)
    clipboard = QApplication.clipboard()
    assert clipboard is not None
    command = shlex.split(clipboard.text())
    assert command[:2] == ["semanticblur-core", "finetune"]
    assert [x.name for x in read_store(home / "annotations" / "my model")] == ["image"]
    finish(qtbot, widget)
    command = [part.replace("--output=my model", "--output=theirs") for part in command[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "semanticblur_core", *command], capture_output=True, timeout=200,
        check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    digests = [weights.read_info(weights.resolve(n)).sha256 for n in ("my model@1", "theirs@1")]
    assert digests[0] == digests[1]


def test_photographs_can_be_let_go(
    qtbot: Any, viewer: Any, widget: Any, small_model: Path, home: Path
) -> None:
    start_from(widget, small_model)
    painted(viewer)
    widget.keep_photographs.value = False
    finish(qtbot, widget)
    recipe = weights.read_info(weights.resolve("my model@1")).provenance["recipe"]
    guards = ("forgetting_limit", "drift_limit", "importance_damping")
    assert [recipe[key] for key in guards] == [1, 1, 0]


def test_cancel_keeps_the_best_within_two_seconds(
    qtbot: Any, viewer: Any, widget: Any, small_model: Path, home: Path
) -> None:
    start_from(widget, small_model)
    painted(viewer)
    widget.n_steps.value = 100_000
    widget.run()
    qtbot.waitUntil(lambda: bool(widget.plot.best_step), timeout=120_000)
    start = time.perf_counter()
    widget.cancel_button.native.click()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=10_000)
    assert time.perf_counter() - start < 2
    assert weights.own_models() == ["my model"]
    weights.verify("my model")
    assert "my model@1" in widget.status.value
    assert widget.base.value == "my model"
    assert widget.start_button.enabled
    assert [path.name for path in (home / "models").iterdir()] == ["my model@1.safetensors"]


def test_pause_and_resume(qtbot: Any, viewer: Any, widget: Any, small_model: Path) -> None:
    start_from(widget, small_model)
    painted(viewer)
    widget.n_steps.value = 100_000
    widget.run()
    qtbot.waitUntil(lambda: len(widget.plot.loss.points) > 1, timeout=120_000)
    widget.pause_button.native.click()
    assert widget.pause_button.text == "Resume"
    qtbot.wait(1000)
    n_steps = len(widget.plot.loss.points)
    qtbot.wait(1000)
    assert len(widget.plot.loss.points) == n_steps
    widget.pause_button.native.click()
    qtbot.waitUntil(lambda: len(widget.plot.loss.points) > n_steps, timeout=30_000)
    assert widget.pause_button.text == "Pause"
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=10_000)


def test_closing_the_viewer_ends_the_process_and_keeps_the_best(
    qtbot: Any, viewer: Any, widget: Any, small_model: Path, home: Path
) -> None:
    start_from(widget, small_model)
    painted(viewer)
    widget.n_steps.value = 100_000
    widget.run()
    qtbot.waitUntil(lambda: bool(widget.plot.best_step), timeout=120_000)
    process = widget._tuning._process._process
    viewer.close()
    qtbot.waitUntil(lambda: process.poll() is not None, timeout=20_000)
    assert [path.name for path in (home / "models").iterdir()] == ["my model@1.safetensors"]


def test_what_a_crash_left_becomes_a_version(
    qtbot: Any, viewer: Any, small_model: Path, home: Path
) -> None:
    left = home / "models" / ".run-my model-x"
    left.mkdir(parents=True)
    shutil.copyfile(small_model, left / "best.safetensors")
    _, widget = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Fine-tune blur model")
    assert "left my model@1" in widget.status.value
    assert "my model" in widget.base.choices
    assert not left.exists()


def test_errors_are_lines_a_person_can_act_on(
    qtbot: Any, viewer: Any, widget: Any, errors: list[str], home: Path, tmp_path: Path
) -> None:
    prefix = "Fine-tune blur model: "
    widget.run()
    assert errors.pop() == f"{prefix}choose a layer of labels, or the folder of an annotation store"
    labels = painted(viewer, classes=(1,))
    finish(qtbot, widget)
    assert errors.pop() == f"{prefix}nothing is labelled blurred (2): paint some of it"
    labels.data[:] = 0
    finish(qtbot, widget)
    assert errors.pop().endswith("nothing in it is labelled yet")
    labels.data[3, 3] = 7
    finish(qtbot, widget)
    assert errors.pop().startswith(f"{prefix}image strokes: label 7; expected 0 = unlabelled")
    labels.data[:] = np.where(np.arange(64) < 32, 1, 2)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    start_from(widget, broken)
    finish(qtbot, widget)
    assert "broken.safetensors: not a whole safetensors file" in errors.pop()
    widget.base.value = "default"
    widget.output.value = "default"
    widget.run()
    assert "is packaged and cannot be replaced" in errors.pop()
    widget.output.value = "../elsewhere"
    widget.copy_command()
    assert "a name is of letters" in errors.pop()
    assert widget.start_button.enabled
    assert weights.own_models() == []


def test_a_full_disk_is_said_before_the_training(
    qtbot: Any, viewer: Any, widget: Any, small_model: Path, errors: list[str], home: Path
) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    (home / "models").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home / "models")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        start_from(widget, small_model)
        painted(viewer)
        finish(qtbot, widget)
        assert "MB free" in errors.pop()
        assert len(widget.plot.loss.points) == 0
        assert list((home / "models").iterdir()) == []
    finally:
        subprocess.run(["umount", str(home / "models")], check=True)


def test_a_store_of_another_image_is_added_to(
    qtbot: Any, viewer: Any, widget: Any, tmp_path: Path, home: Path
) -> None:
    other = AnnotationStore(tmp_path / "store", create=True)
    other.write("image", np.full((8, 8), 1, np.uint8), image=np.zeros((8, 8), np.uint8))
    painted(viewer)
    stack = np.random.default_rng(1).integers(0, 60_000, (3, 40, 50), np.uint16)
    viewer.add_image(stack, name="stack")
    codes = np.zeros(stack.shape, np.int64)
    codes[2, :10], codes[0, :10] = 1, 2
    viewer.add_labels(codes, name="stack labels")
    widget.layers.value = ["image strokes", "stack labels"]
    widget.store.value = other.folder
    widget.copy_command()
    qtbot.waitUntil(lambda: not widget.is_running, timeout=10_000)
    assert not (home / "annotations").exists()
    found = {item.name: item for item in read_store(other.folder)}
    assert set(found) == {"image", "image 2", "stack[0]", "stack[2]"}
    np.testing.assert_array_equal(found["stack[2]"].image, stack[2])
    np.testing.assert_array_equal(found["stack[2]"].labels, codes[2])
    low, high = np.percentile(stack, (0.1, 99.9))
    assert found["stack[2]"].value_range == pytest.approx((low, high))


def test_which_labels_can_be_chosen(qtbot: Any, viewer: Any, widget: Any) -> None:
    painted(viewer)
    viewer.add_image(np.zeros((3, 20, 30, 3), np.uint8), rgb=True, name="rgb stack")
    viewer.add_labels(np.zeros((3, 20, 30), np.uint8), name="on rgb")
    viewer.add_labels(np.zeros((5, 5), np.uint8), name="on nothing")
    viewer.add_labels(
        np.ones((64, 64), np.uint8), name="detected", metadata={"semanticblur": {"kind": "labels"}}
    )
    found = {each.labels.name: each.source.layer.name for each in annotated_layers(viewer)}
    assert found == {"image strokes": "image", "on rgb": "rgb stack"}
    # Of images of one shape the one that is shown is meant, and the list says which.
    viewer.add_image(np.zeros((64, 64)), name="other", visible=False)
    viewer.add_labels(np.zeros((64, 64), np.uint8), name="cells")
    assert annotated_layers(viewer)[-1].source.layer.name == "image"
    assert ("cells (on image)", "cells") in widget.layers._widget._mgui_get_choices()
    viewer.layers["image"].visible = False  # to look at the other one
    viewer.layers["other"].visible = True
    assert annotated_layers(viewer)[-1].source.layer.name == "image"
    assert list(widget.layers.value) == ["image strokes"]
    late = viewer.add_labels(np.zeros((64, 64), np.uint8), name="image more")
    late.metadata = ANNOTATION
    qtbot.waitUntil(lambda: "image more" in widget.layers.value, timeout=5000)


def a_model(path: Path, template: Path, **report: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    model, _ = weights.load(str(template))
    metrics = {"finetune": report}
    weights.save(path, model, provenance={}, metrics=metrics, licence="test")


def test_a_worse_model_becomes_the_default_only_after_a_question(
    viewer: Any, widget: Any, small_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pytest.importorskip("napari.settings")
    if not hasattr(settings, "get_plugin_settings"):
        pytest.skip("this napari has no preferences of plugins")
    chosen = settings.get_plugin_settings("napari-semanticblur").detect
    monkeypatch.setattr(chosen, "model", "default")
    a_model(home / "models" / "a@1.safetensors", small_model, is_better=True, held_out="strokes")
    a_model(home / "models" / "a@2.safetensors", small_model, is_better=False, has_forgotten=True)
    _, detect = viewer.window.add_plugin_dock_widget("napari-semanticblur", "Detect defocus blur")
    asked: list[str] = []
    answer = False

    def ask(question: str) -> bool:
        asked.append(question)
        return answer

    actions = widget.actions
    actions.ask = ask
    actions.refresh("a@2")
    actions.default_button.native.click()
    assert "forgot photographs" in asked[0]
    assert preferences().model == "default"
    assert detect.model.value == "default"
    answer = True
    actions.default_button.native.click()
    assert preferences().model == "a@2"
    assert detect.model.value == "a"
    asked.clear()
    actions.own.value = None
    assert not actions.delete_button.enabled
    actions.own.value = "a@1"  # as a person chooses it
    assert actions.default_button.enabled
    actions.default_button.native.click()
    assert asked == []
    assert preferences().model == detect.model.value == "a@1"
    actions.ask_text = lambda question, proposal: "b"
    actions.rename_button.native.click()
    assert preferences().model == "b@1"
    answer = True
    actions.refresh("b@2")
    actions.delete_button.native.click()
    assert preferences().model == "b@1"
    actions.refresh("b@1")
    actions.delete_button.native.click()
    assert preferences().model == "default"


def test_rename_export_and_delete(
    viewer: Any, widget: Any, small_model: Path, home: Path, tmp_path: Path, errors: list[str]
) -> None:
    a_model(home / "models" / "a@1.safetensors", small_model, is_better=True)
    actions = widget.actions
    actions.refresh("a@1")
    actions.ask_text = lambda question, proposal: "b"
    actions.rename_button.native.click()
    assert weights.own_models() == ["b"]
    assert actions.own.value == "b@1"
    actions.ask_text = lambda question, proposal: "no/name"
    actions.rename_button.native.click()
    assert "a name is of letters" in errors.pop()
    target = tmp_path / "shared.safetensors"
    actions.ask_file = lambda proposal: target
    actions.export_button.native.click()
    assert weights.verify(str(target)).sha256 == weights.verify("b").sha256
    actions.ask = lambda question: False
    actions.delete_button.native.click()
    assert weights.own_models() == ["b"]
    actions.ask = lambda question: True
    actions.delete_button.native.click()
    assert weights.own_models() == []
    assert actions.own.value is None
    assert not actions.delete_button.enabled


def test_curves(qtbot: Any) -> None:
    from napari_semanticblur._colors import BLURRED_COLOR
    from napari_semanticblur._loss_plot import LossPlot

    plot = LossPlot()
    qtbot.addWidget(plot)
    plot.resize(300, 150)

    def n_pixels(color: str) -> int:
        image = plot.grab().toImage()
        wanted = color.lower()
        names = (image.pixelColor(x, y).name() for x in range(300) for y in range(20, 150))
        return sum(name == wanted for name in names)

    assert n_pixels(BLURRED_COLOR) == 0
    plot.add(0, n_steps=10, held_out=0.4)
    plot.add(5, n_steps=10, loss=0.7, held_out=0.1, photographs=0.05, is_best=True)
    plot.add(6, n_steps=10, loss=float("nan"))
    assert n_pixels(BLURRED_COLOR) > 20
    assert plot.held_out.points == [(0, 0.4), (5, 0.1)]
    assert plot.loss.points == [(5, 0.7)]
    assert (plot.best_step, plot.top) == (5, 0.5)
    plot.clear()
    assert n_pixels(BLURRED_COLOR) == 0


def test_opening_the_widget_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from napari.components import ViewerModel\n"
        "from qtpy.QtWidgets import QApplication\n"
        "app = QApplication([])\n"
        "from napari_semanticblur._finetune import FinetuneWidget\n"
        "widget = FinetuneWidget(ViewerModel())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
