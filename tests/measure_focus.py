"""The figures of the focus guide, measured on research data.

$ SEMANTICBLUR_DATA=... python tests/measure_focus.py
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from semanticblur_core import Detector, io
from semanticblur_core.focus.classical import as_grey
from semanticblur_core.focus.scores import in_focus_fraction, tile_means
from semanticblur_core.focus.sharpness import tenengrad_map
from semanticblur_core.focus.stack import (
    StackFocus,
    all_in_focus,
    focus_measure,
    in_stack_order,
    plane_focus,
)

TILE_PX = 64


def smear(data: Path) -> None:
    """Best plane, and how the score falls with the distance from it."""
    files = in_stack_order(list((data / "microscopy" / "smear-stack").iterdir()))
    z = np.array([int(path.stem.split("z")[1]) for path in files])
    result = StackFocus()
    for i, path in enumerate(files):
        result.add(plane_focus((i,), io.read_image(path), focus_measure()))
    curve = result.curve()
    rank = stats.spearmanr(curve.scores, -np.abs(z)).statistic
    print(f"smear: best plane z={z[curve.best]}, Spearman against -|z| {rank:.3f}")


def balls(data: Path) -> None:
    """The composite's gradient against the best single frame's, by tile; what its depth is like."""
    planes = [io.read_image(data / "stack-balls" / f"{z:02}.jpg") for z in range(25)]
    *_, last = all_in_focus(np.stack(planes), "ZYXS")
    assert last.composite is not None
    best = np.max([_gradient(plane) for plane in planes], axis=0)
    ratio = _gradient(last.composite) / best
    print(
        f"balls: composite over best frame, gradient of {ratio.size} tiles: lowest "
        f"{ratio.min():.3f}, at least 0.95 in {(ratio >= 0.95).mean():.1%}"
    )


def tiles_of_bbbc006(data: Path, detector: Detector) -> None:
    """Share in focus of tiles in focus and far out of focus."""
    kinds = ("bbbc006-sharp", "bbbc006-z00-defocused")
    sharp, blurred = (
        [
            in_focus_fraction(detector.detect(io.read_image(path)))
            for path in sorted((data / "microscopy" / kind).iterdir())
        ]
        for kind in kinds
    )
    wins = np.mean(np.asarray(sharp)[:, None] > np.asarray(blurred)[None])
    print(
        f"BBBC006: in focus {min(sharp):.3f} to {max(sharp):.3f}, out of focus "
        f"{min(blurred):.3f} to {max(blurred):.3f}, AUC {wins:.3f}"
    )


def pairs(data: Path, detector: Detector) -> None:
    """Whether the maps of two photographs focused apart agree on which is sharper where."""
    a, b, energy = [], [], []
    for i in range(1, 21):
        both = [io.read_image(data / "pairs-lytro" / f"lytro-{i:02}-{which}.jpg") for which in "AB"]
        for into, photo in zip((a, b), both, strict=True):
            into.append(tile_means(detector.detect(photo), TILE_PX).ravel())
        near, far = (tile_means(tenengrad_map(as_grey(photo)), TILE_PX) for photo in both)
        energy.append((near > far).ravel())
    blur_a, blur_b, a_is_sharper = (np.concatenate(each) for each in (a, b, energy))
    for margin in (0.25, 0.4):
        sure = (np.abs(blur_a - 0.5) > margin) & (np.abs(blur_b - 0.5) > margin)
        agree = (blur_a < 0.5) != (blur_b < 0.5)
        print(
            f"Lytro: each map by itself further than {margin} from 0.5 ({sure.mean():.1%} of "
            f"tiles): they agree in {agree[sure].mean():.1%}"
        )
    for margin in (0.25, 0.5):
        sure = np.abs(blur_a - blur_b) > margin
        agree = (blur_a < blur_b) == a_is_sharper
        print(
            f"Lytro: maps more than {margin} apart ({sure.mean():.1%} of tiles): the gradients say "
            f"the same in {agree[sure].mean():.1%}"
        )


def _gradient(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    height, width = (n // TILE_PX * TILE_PX for n in image.shape[:2])
    gradient = np.hypot(*np.gradient(image @ np.array([0.299, 0.587, 0.114])))
    return tile_means(gradient[:height, :width], TILE_PX)


def main() -> None:
    """Print all of it."""
    data = Path(os.environ["SEMANTICBLUR_DATA"])
    smear(data)
    balls(data)
    detector = Detector()
    tiles_of_bbbc006(data, detector)
    pairs(data, detector)


if __name__ == "__main__":
    main()
