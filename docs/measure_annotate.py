"""Figures of the annotation guide, from the real application, on a quiet machine.

$ xvfb-run -a python docs/measure_annotate.py
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import napari
import numpy as np
from measure_gui import PLUGIN, Pulse, until, until_idle

SIDE_PX, N_PLANES = 2000, 100


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEMANTICBLUR_HOME"] = folder
        for shape in ((SIDE_PX, SIDE_PX), (N_PLANES, SIDE_PX, SIDE_PX)):
            measure(shape, Path(folder) / f"store{len(shape)}")


def measure(shape: tuple[int, ...], store: Path) -> None:
    """Paint, undo and edit an image of that shape."""
    viewer = napari.Viewer()
    viewer.add_image(np.zeros(shape, np.uint8), name="image")
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Annotate blur")
    widget.store.value = store
    until_idle()
    start = time.perf_counter()
    widget.annotate()
    annotation = widget.current
    layer = annotation.layer
    row(shape, "the annotation layer opens", time.perf_counter() - start)
    until_idle()
    polls: list[float] = []
    poll = annotation.poll

    def timed() -> bool:
        begin = time.perf_counter()
        more: bool = poll()
        polls.append(time.perf_counter() - begin)
        return more

    annotation.poll = timed
    leading = (N_PLANES // 2,) if len(shape) > 2 else ()
    viewer.dims.set_point(0, leading[0]) if leading else None
    layer.brush_size = 40

    def paint() -> None:
        for i in range(40):
            with layer.block_history():
                layer._draw(1 + i % 2, (*leading, 40 * i, 50), (*leading, 40 * i + 40, 900))
            until_idle(0.1)

    def undo() -> None:
        for _ in range(20):
            layer.undo()
            until_idle(0.1)

    def slide() -> None:
        for i in range(30):
            viewer.dims.set_point(0, i)
            until_idle(0.1)

    steps: dict[str, Callable[[], None]] = {"40 strokes": paint, "20 undos": undo}
    if leading:
        steps["the slider moves through 30 planes"] = slide
    for name, action in steps.items():
        polls.clear()
        action()
        until_idle(2)
        row(shape, f"longest look for changes during {name}", max(polls))
    for name, edit in {
        "the rest is sharp": lambda: widget.fill_rest(1),
        "undo of that": layer.undo,
    }.items():
        start = time.perf_counter()
        edit()
        row(shape, name, time.perf_counter() - start)
        until_idle()
    start = time.perf_counter()
    pulse = Pulse()
    widget.save()
    seconds = until(lambda: not annotation.is_saving)
    row(shape, "a save takes", seconds)
    row(
        shape,
        "longest block of the window during a save",
        max(pulse.stop(), time.perf_counter() - start - seconds),
    )
    viewer.close()
    annotation.wait()


def row(shape: tuple[int, ...], name: str, seconds: float) -> None:
    print(f"| {' x '.join(map(str, shape))}: {name} | {seconds * 1000:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
