"""Figures of the napari guide, from the real application, on a quiet machine.

$ xvfb-run -a python docs/measure_gui.py
"""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

import napari
import numpy as np
import psutil
from qtpy.QtCore import QEventLoop, QTimer
from skimage.data import chelsea
from skimage.transform import resize

PLUGIN, TITLE = "napari-semanticblur", "Detect defocus blur"


class Pulse:
    """The longest time between two turns of the event loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last = time.perf_counter()
        self._timer = QTimer()
        self._timer.timeout.connect(self._beat)
        self._timer.start(1)

    def _beat(self) -> None:
        now = time.perf_counter()
        self.longest_s = max(self.longest_s, now - self._last)
        self._last = now

    def stop(self) -> float:
        """Longest gap in seconds."""
        self._beat()
        self._timer.stop()
        return self.longest_s


def until(condition: Callable[[], bool], limit_s: float = 300) -> float:
    """Run the event loop until it holds; seconds that took.

    A loop of its own, as in the application: `processEvents` alone deletes nothing that is to be
    deleted later, and napari's busy sign, which costs half a core in software, would go on.
    """
    start = time.perf_counter()
    if condition():
        return 0.0
    loop, timer = QEventLoop(), QTimer()
    late: list[bool] = []

    def look() -> None:
        late[:] = [time.perf_counter() - start > limit_s]
        if late[0] or condition():
            loop.quit()

    timer.timeout.connect(look)
    timer.start(2)
    loop.exec()
    timer.stop()
    if late and late[0]:
        raise TimeoutError
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    viewer = napari.Viewer()
    until(lambda: True)
    start = time.perf_counter()
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, TITLE)
    rows: list[tuple[str, str]] = [
        ("the widget opens (torch is not imported)", f"{time.perf_counter() - start:.2f} s")
    ]
    assert "torch" not in sys.modules

    def run() -> tuple[float, float]:
        pulse = Pulse()
        widget.run()
        seconds = until(lambda: not widget.is_running)
        return seconds, pulse.stop()

    photo = (resize(chelsea(), (1000, 1000)) * 255).astype(np.uint8)
    layer = viewer.add_image(photo, rgb=True, name="photo")
    seconds, gap = run()
    rows.append(("1-megapixel photograph, cold: import, model, result", f"{seconds:.2f} s"))
    rows.append(("longest block of the window meanwhile", f"{gap * 1000:.0f} ms"))
    viewer.layers.clear()
    until_idle()
    layer = viewer.add_image(photo, rgb=True, name="again")
    until_idle()
    seconds, gap = run()
    rows.append(("1-megapixel photograph, warm, two new layers", f"{seconds:.2f} s"))
    rows.append(("longest block of the window meanwhile", f"{gap * 1000:.0f} ms"))
    viewer.layers.clear()
    until_idle()

    stack = np.repeat(photo[None, ..., 1], 20, axis=0)
    layer = viewer.add_image(stack, name="stack")
    until_idle()
    widget.planes.value = "all"
    process = psutil.Process()
    peak, sampling = [0], [True]

    def sample() -> None:
        while sampling[0]:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.02)

    _give_back_freed()
    before = process.memory_info().rss
    sampler = threading.Thread(target=sample)
    sampler.start()
    seconds, gap = run()
    sampling[0] = False
    sampler.join()
    rows.append(("20 planes of 1 megapixel, all", f"{seconds:.1f} s"))
    rows.append(("longest block of the window meanwhile", f"{gap * 1000:.0f} ms"))
    result_mib = stack.size * 5 / 2**20
    what = f"memory grew at most by (the result alone is {result_mib:.0f} MiB)"
    rows.append((what, f"{(peak[0] - before) / 2**20:.0f} MiB"))
    widget.run()
    until(lambda: widget.progress.value >= 3)
    widget.cancel()
    rows.append(("cancel returns within", f"{until(lambda: not widget.is_running):.2f} s"))
    del layer
    for name, value in rows:
        print(f"| {name} | {value} |", flush=True)
    viewer.close()


def _give_back_freed() -> None:
    """Memory that earlier runs freed would be used again, and hide what this one takes."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def until_idle(seconds: float = 1.0) -> None:
    """Let napari draw what is pending."""
    end = time.perf_counter() + seconds
    until(lambda: time.perf_counter() > end)


if __name__ == "__main__":
    main()
