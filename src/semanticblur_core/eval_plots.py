"""Pictures of an evaluation: the precision-recall curve, and the best, median and worst images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk, io
from semanticblur_core.data.datasets import Pair
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.evaluation import Evaluation

_N_EXAMPLES = 3


def require_matplotlib() -> None:
    """Refuse to plot where matplotlib is not installed.

    Raises
    ------
    SemanticBlurError
        Saying how it is installed.
    """
    if find_spec("matplotlib") is None:
        raise SemanticBlurError('plots need matplotlib: pip install "napari-semanticblur[all]"')


def write_plots(
    folder: Path,
    result: Evaluation,
    pairs: Mapping[str, Pair],
    predict: Callable[[Pair], NDArray[np.float32]],
    *,
    mask_is_blur: bool = True,
    images: Mapping[str, Path],
) -> list[Path]:
    """Write ``pr_curve.png`` and ``examples.png``.

    Parameters
    ----------
    folder
        Made if need be.
    result
        What was measured.
    pairs
        Pairs by name.
    predict
        Gives the blur map of a pair, 1 = blurred.
    mask_is_blur
        Whether white in masks means blurred.
    images
        Files of the images by name, shown beside; those missing are left out.

    Raises
    ------
    SemanticBlurError
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    curve = Figure(figsize=(4.5, 4), layout="constrained")
    axes = curve.subplots()
    axes.plot(result.recall, result.precision, color="#0072B2")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"{result.protocol['positive_class']} positive, {result.n_images} images")
    by_error = sorted(result.images, key=lambda score: score.mae)
    n = min(_N_EXAMPLES, len(by_error))
    middle = max(0, (len(by_error) - n) // 2)
    chosen = {"best": by_error[:n], "median": by_error[middle : middle + n], "worst": by_error[-n:]}
    rows = [(kind, score) for kind, scores in chosen.items() for score in scores]
    titles = ["image", "truth", "map"] if images else ["truth", "map"]
    height = 1.9 * len(rows)
    examples = Figure((2.6 * len(titles), height), facecolor="#dddddd", layout="constrained")
    grid = examples.subplots(len(rows), len(titles), squeeze=False)
    for places, (kind, score) in zip(grid, rows, strict=True):
        pair = pairs[score.name]
        mask = io.read_mask(pair.mask)
        panels: list[NDArray[Any]] = [mask if mask_is_blur else ~mask, predict(pair)]
        if images:
            shown = images.get(score.name)
            panels.insert(0, io.read_rgb8(shown) if shown else np.zeros((*mask.shape, 3), np.uint8))
        for place, panel, title in zip(places, panels, titles, strict=True):
            place.imshow(panel, cmap="gray", vmin=0, vmax=1)
            place.set_axis_off()
            place.set_title(title, fontsize=7)
        places[0].set_title(f"{kind}: {score.name}, MAE {score.mae:.3f}", fontsize=7)
    written = [folder / "pr_curve.png", folder / "examples.png"]
    for figure, path in zip((curve, examples), written, strict=True):
        with disk.replacing(path) as part:
            figure.savefig(part, dpi=110, format="png")
    return written
