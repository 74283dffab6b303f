"""Pictures of the napari guide, taken of the real application.

$ xvfb-run -a -s "-screen 0 1400x900x24" python docs/make_guide.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import napari
import numpy as np
from measure_gui import PLUGIN, TITLE, until, until_idle
from skimage.data import coffee

IMAGES = Path(__file__).parent / "images"
SIZE = (1100, 700)


def main() -> None:
    """Drive the application and write the pictures."""
    for name, scene in {
        "photo": photo,
        "stack": stack,
        "rotated": rotated,
        "error": error,
        "progress": progress,
    }.items():
        viewer = napari.Viewer()
        viewer.window.resize(*SIZE)
        _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, TITLE)
        frames = scene(viewer, widget)
        until_idle()
        if frames:
            iio.imwrite(IMAGES / f"napari_{name}.gif", frames, duration=400, loop=0)
        else:
            iio.imwrite(IMAGES / f"napari_{name}.png", shot(viewer))
        viewer.close()
        print(name, flush=True)


def shot(viewer: Any) -> np.ndarray:
    picture: np.ndarray = viewer.screenshot(canvas_only=False, flash=False)[..., :3]
    return picture


def run(widget: Any) -> None:
    widget.run()
    until(lambda: not widget.is_running)


def photo(viewer: Any, widget: Any) -> None:
    viewer.open_sample(PLUGIN, "cat")
    run(widget)


def stack(viewer: Any, widget: Any) -> None:
    viewer.open_sample(PLUGIN, "focal_stack")
    viewer.layers["focal stack"].scale = (2, 1, 1)
    widget.layer.value = viewer.layers["focal stack"]
    widget.planes.value = "all"
    run(widget)
    viewer.dims.set_point(0, 10)
    viewer.reset_view()


def rotated(viewer: Any, widget: Any) -> None:
    viewer.add_image(coffee(), rgb=True, name="coffee", scale=(1, 0.7), rotate=25, units="um")
    viewer.scale_bar.visible = True
    run(widget)
    viewer.reset_view()


def error(viewer: Any, widget: Any) -> None:
    viewer.add_image(np.full((200, 300), np.nan), name="broken", contrast_limits=(0, 1))
    run(widget)


def progress(viewer: Any, widget: Any) -> list[np.ndarray]:
    image = np.tile(coffee(), (4, 3, 1))
    viewer.add_image(image, rgb=True, name="tiles")
    widget.size.value = widget.size.choices[1]
    viewer.window._qt_window._activity_dialog.show()
    widget.run()
    frames = []
    for step in (1, 4, 8, 12):
        until(reached(widget, step))
        frames.append(shot(viewer))
    widget.cancel()
    until(lambda: not widget.is_running)
    until_idle()
    frames.append(shot(viewer))
    return [frame[::2, ::2] for frame in frames]


def reached(widget: Any, step: int) -> Callable[[], bool]:
    return lambda: not widget.is_running or widget.progress.value >= step


if __name__ == "__main__":
    main()
