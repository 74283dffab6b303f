"""The loop of the fine-tuning guide in the real application: pictures, times and scores.

$ xvfb-run -a -s "-screen 0 1400x1100x24" python docs/make_finetune_guide.py [MODELS_FOLDER]

Opens a generated stack of cells, detects, paints five strokes on two of its seven planes,
fine-tunes with the budget quick, detects again, and prints what changed on the planes that were
not painted on. The model stays in MODELS_FOLDER/models if one is given.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import napari
import numpy as np
from make_guide import IMAGES, shot
from measure_gui import PLUGIN, TITLE, Pulse, until, until_idle
from numpy.typing import NDArray
from qtpy.QtCore import QTimer

from semanticblur_core.data.focal_stack import focal_stack

SIZE = (1250, 1000)
PAINTED = (2, 4)


class Work:
    """The longest that the window's thread computed in one turn of the event loop, in seconds."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last = time.thread_time()
        self._timer = QTimer()
        self._timer.timeout.connect(self._beat)
        self._timer.start(1)

    def _beat(self) -> None:
        now = time.thread_time()
        self.longest_s = max(self.longest_s, now - self._last)
        self._last = now

    def stop(self) -> float:
        self._timer.stop()
        return self.longest_s


def paint(layer: Any) -> None:
    """Five strokes nine pixels wide, well inside of what is sharp and what is blurred."""
    layer.brush_size = 9
    for plane, column, code in ((2, 120, 1), (2, 250, 2), (2, 290, 2), (4, 70, 2), (4, 200, 1)):
        layer.selected_label = code
        with layer.block_history():
            layer._draw(code, (plane, 16, column), (plane, 300, column))


def f_beta(blurred: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    hits = np.count_nonzero(blurred & truth)
    if not hits:
        return 0.0
    precision, recall = hits / np.count_nonzero(blurred), hits / np.count_nonzero(truth)
    return float(1.3 * precision * recall / (0.3 * precision + recall))


def run(widget: Any) -> float:
    widget.run()
    return until(lambda: not widget.is_running, 1200)


def main() -> None:
    """Drive the application, write the pictures, print the figures."""
    stack = focal_stack(n_planes=7, size_px=320, kind="cells", largest_radius_px=5.0, noise=20)
    viewer = napari.Viewer()
    viewer.window.resize(*SIZE)
    layer = viewer.add_image(stack.images, name="cells")
    _, detect = viewer.window.add_plugin_dock_widget(PLUGIN, TITLE)
    detect.planes.value = "all"
    viewer.dims.set_point(0, 3)
    until_idle()
    begin = time.perf_counter()
    seconds = {"detect, seven planes, cold": run(detect)}
    result = viewer.layers["cells blur"]
    before = result.data.copy()
    result.visible = False
    detect.native.parent().hide()
    dock, annotate = viewer.window.add_plugin_dock_widget(PLUGIN, "Annotate blur")
    annotate.layer.value = layer
    annotate.annotate()
    paint(annotate.current.layer)
    dock.hide()
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Fine-tune blur model")
    widget.layers.value = ["cells annotation"]
    widget.output.value = "my microscope"
    viewer.layers.selection.active = layer
    until_idle(0.3)
    started = time.perf_counter()
    widget.run()  # adds the preview's layer, as a click does
    pulse, work = Pulse(), Work()
    until(lambda: widget.progress.value >= 16 and "Step" in widget.status.value, 1200)
    gap_s, work_s = pulse.stop(), work.stop()
    iio.imwrite(IMAGES / "finetune_running.png", shot(viewer))
    pulse, work = Pulse(), Work()
    until(lambda: not widget.is_running, 1200)
    seconds["fine-tune, budget quick"] = time.perf_counter() - started
    gap_s, work_s = max(gap_s, pulse.stop()), max(work_s, work.stop())
    times = os.times()
    cpu_s = times.children_user + times.children_system
    print(widget.status.value, flush=True)
    preview = next(x for x in viewer.layers if "my microscope" in x.name)
    preview.visible = False
    detect.model.value = "my microscope"
    seconds["detect again"] = run(detect)
    whole_s = time.perf_counter() - begin
    after = result.data.copy()
    result.visible = True
    until_idle()
    iio.imwrite(IMAGES / "finetune_done.png", shot(viewer))
    others = [z for z in range(len(stack.images)) if z not in PAINTED]
    truth = stack.blurred[others]
    print(f"| the whole loop | {whole_s:.0f} s |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} s |")
    print(f"| processor time of the training process | {cpu_s:.0f} s |")
    print(f"| longest wait of the window for its turn | {gap_s * 1000:.0f} ms |")
    print(f"| longest work of the window in a turn | {work_s * 1000:.0f} ms |")
    for name, measure in (("F, all pixels", np.asarray), ("F, mean of planes", None)):
        scores = [
            f_beta(codes[others] == 2, truth)
            if measure
            else float(np.mean([f_beta(codes[z] == 2, stack.blurred[z]) for z in others]))
            for codes in (before, after)
        ]
        print(f"| {name} of the five other planes | {scores[0]:.3f} to {scores[1]:.3f} |")
    print(widget._last_tuning.last.result)
    viewer.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(sys.argv[1] if sys.argv[1:] else folder)
        os.environ["SEMANTICBLUR_HOME"] = str(chosen)
        main()
