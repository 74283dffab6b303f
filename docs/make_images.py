"""Draw the pictures of the README and the documentation with the packaged weights.

    python docs/make_images.py

Only photographs that ship inside scikit-image are used.
"""

from pathlib import Path

import numpy as np
from skimage import data
from skimage.transform import resize

from semanticblur_core import Detector
from semanticblur_core.inference.overlay import draw_overlay
from semanticblur_core.io import write_png

FOLDER = Path(__file__).parent / "images"
GAP_PX = 8


def main() -> None:
    """Write photograph, blur map and overlay side by side for each sample."""
    detector = Detector("default", device="cpu", precision="float32")
    for name, photograph in (
        ("cat", data.chelsea()),
        ("coffee", data.coffee()),
        ("astronaut", data.astronaut()),
    ):
        blur = detector.detect(photograph)
        grey = np.repeat(np.round(blur * 255).astype(np.uint8)[..., None], 3, axis=2)
        panels = [photograph, grey, draw_overlay(photograph, blur)]
        gap = np.full((photograph.shape[0], GAP_PX, 3), 255, np.uint8)
        row = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
        scale = 1200 / row.shape[1]
        small = resize(row, (round(row.shape[0] * scale), 1200), anti_aliasing=scale < 1)
        write_png(FOLDER / f"{name}.png", np.round(small * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
