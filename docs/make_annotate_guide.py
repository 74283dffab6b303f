"""Pictures of the annotation guide, taken of the real application.

$ xvfb-run -a -s "-screen 0 1600x1000x24" python docs/make_annotate_guide.py
"""

import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import napari
import numpy as np
from make_guide import IMAGES, shot
from measure_gui import PLUGIN, until, until_idle
from PIL import Image
from skimage.data import chelsea, coffee, rocket

SIZE = (1250, 900)


def main() -> None:
    """Drive the application and write the pictures."""
    scenes = {"paint": paint, "map": start_from_map, "recovered": recovered, "folder": walk}
    folder = Path(tempfile.gettempdir()) / "guide"  # its name is in the pictures
    for name, scene in scenes.items():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.environ["SEMANTICBLUR_HOME"] = str(folder / "home")
        viewer = napari.Viewer()
        viewer.window.resize(*SIZE)
        _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Annotate blur")
        until_idle(0.5)
        scene(viewer, widget, folder)
        viewer.reset_view()
        until_idle()
        picture = Image.fromarray(shot(viewer)).quantize(256)
        picture.save(IMAGES / f"annotate_{name}.png", optimize=True)
        viewer.close()
        print(name, flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def stroke(layer: Any, code: int, points: list[tuple[int, int]]) -> None:
    """Paint along a line of points, as one item of napari's history."""
    layer.selected_label = code
    with layer.block_history():
        for start, end in pairwise(points):
            layer._draw(code, start, end)


def paint(viewer: Any, widget: Any, folder: Path) -> None:
    viewer.add_image(chelsea(), rgb=True, name="cat")
    widget.store.value = folder / "store"
    widget.annotate()
    layer = widget.current.layer
    layer.brush_size = 14
    stroke(layer, 1, [(100, 140), (130, 190), (170, 230), (200, 250)])
    stroke(layer, 1, [(90, 250), (130, 270)])
    stroke(layer, 2, [(30, 330), (90, 400), (180, 430)])
    stroke(layer, 2, [(30, 20), (140, 30)])
    widget._tick()


def start_from_map(viewer: Any, widget: Any, folder: Path) -> None:
    viewer.add_image(coffee(), rgb=True, name="coffee")
    widget.annotate()
    widget.start_from_map()
    until(lambda: widget._detection is None)
    widget._tick()


def recovered(viewer: Any, widget: Any, folder: Path) -> None:
    image = viewer.add_image(rocket(), rgb=True, name="rocket")
    widget.annotate()
    layer = widget.current.layer
    stroke(layer, 1, [(150, 320), (330, 320)])
    viewer.layers.remove(layer)  # as after a crash: the journal is what is left
    widget.layer.value = image


def walk(viewer: Any, widget: Any, folder: Path) -> None:
    images = folder / "photographs"
    images.mkdir()
    for name, image in {"a cup": coffee(), "a cat": chelsea(), "a rocket": rocket()}.items():
        iio.imwrite(images / f"{name}.png", np.asarray(image))
    widget.folder.value = images
    until(lambda: widget.current is not None)
    layer = widget.current.layer
    stroke(layer, 1, [(100, 140), (200, 250)])
    widget.step(1)
    layer = widget.current.layer
    layer.brush_size = 20
    stroke(layer, 1, [(120, 200), (120, 330), (200, 400)])
    widget._tick()


if __name__ == "__main__":
    main()
