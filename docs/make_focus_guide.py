"""Pictures of the focus guide, taken of the real application and of the report in a browser.

$ xvfb-run -a -s "-screen 0 1600x1000x24" python docs/make_focus_guide.py
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import napari
import numpy as np
from measure_gui import PLUGIN, until, until_idle
from scipy import ndimage
from skimage.data import chelsea, coffee

from napari_semanticblur import _focus

IMAGES = Path(__file__).parent / "images"
TITLE = "Focus quality"


def main() -> None:
    """Drive the application and write the pictures."""
    for name, scene in {"stack": stack, "photos": photos}.items():
        viewer = napari.Viewer()
        viewer.window.resize(1280, 860)
        dock, widget = viewer.window.add_plugin_dock_widget(PLUGIN, TITLE)
        viewer.window._qt_window.resizeDocks([dock], [430], _horizontal())
        scene(viewer, widget)
        until_idle()
        viewer.reset_view()
        until_idle()
        picture = viewer.screenshot(canvas_only=False, flash=False)[..., :3]
        iio.imwrite(IMAGES / f"focus_{name}.png", picture)
        viewer.close()
        print(name, flush=True)


def _horizontal() -> Any:
    from qtpy.QtCore import Qt

    return Qt.Orientation.Horizontal


def check(widget: Any) -> None:
    widget.check()
    until(lambda: not widget.is_running)
    until(lambda: not widget._refresh_timer.isActive())


def stack(viewer: Any, widget: Any) -> None:
    viewer.open_sample(PLUGIN, "focal_stack")
    viewer.layers["focal stack"].scale = (2, 1, 1)
    widget.layer.value = viewer.layers["focal stack"]
    widget.method.value = "classical scores, no map"
    widget.score.value = "Tenengrad"
    widget.tile_size_px.value = 32
    widget.gate.value = _focus.LIMIT
    check(widget)
    widget.go_to_best_plane()
    widget.show_heat_map()
    viewer.layers["truth"].visible = False
    viewer.reset_view()


def photos(viewer: Any, widget: Any) -> None:
    cat, cup = chelsea(), coffee()
    blurred = ndimage.gaussian_filter(cup, (5, 5, 0))
    for name, photo in (("soft cup", blurred), ("cup", cup), ("cat", cat)):
        viewer.add_image(photo, rgb=True, name=name)
    viewer.layers["soft cup"].visible = viewer.layers["cup"].visible = False
    widget.planes.value = _focus.LAYERS
    widget.layer.value = viewer.layers["cat"]
    widget.gate.value = _focus.LIMIT
    widget.limit.value = 0.2
    check(widget)
    widget.show_heat_map()
    viewer.reset_view()
    if shutil.which("chromium") is None:
        print("no chromium: the picture of the report stays as it is", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        widget.export(page)
        report(page)


def report(page: Path) -> None:
    """The page as Chromium shows it."""
    shown = IMAGES / "focus_report.png"
    subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--window-size=1280,620", "--virtual-time-budget=3000"),
            *(f"--screenshot={shown}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
    )
    iio.imwrite(shown, np.asarray(iio.imread(shown))[..., :3])


if __name__ == "__main__":
    main()
