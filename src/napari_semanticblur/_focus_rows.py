"""Lines of the table of focus: planes of all layers, or tiles of one plane."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from napari_semanticblur._focus_table import Row
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.check import ImageFocus, judge
from semanticblur_core.focus.scores import MAP_SCORES
from semanticblur_core.focus.session import ArrayFocus

SCORE_NAMES = {
    "in focus": "in_focus_fraction",
    "mean blur": "mean_blur",
    "largest part in focus": "largest_in_focus_fraction",
    "subject in focus": "subject_in_focus",
    "Tenengrad": "tenengrad",
    "variance of Laplacian": "variance_of_laplacian",
    "normalised variance": "normalised_variance",
    "slope of spectrum": "spectrum_slope",
    "blur effect": "blur_effect",
}
TILE_HEADERS = ("layer", "row, column", "result", "in focus", "Tenengrad")


class PlaneRows:
    """Lines of planes, made once for each plane and set of gates.

    Attributes
    ----------
    headers
        Of the columns, the chosen score before the others.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...]], tuple[ImageFocus, Row]] = {}
        self._gates: tuple[Gate, ...] = ()
        self.headers: tuple[str, ...] = ()

    def rows(
        self,
        sessions: Iterable[tuple[Any, ArrayFocus]],
        gates: Sequence[Gate],
        *,
        first: str = "in focus",
    ) -> list[Row]:
        """Lines of all planes that are known, in the order that they were checked in."""
        others = (name for name in SCORE_NAMES if name != first)
        headers = ("layer", "plane", "result", first, *others)
        if (tuple(gates), headers) != (self._gates, self.headers):
            self._gates, self.headers = tuple(gates), headers
            self._made.clear()
        made = {}
        for layer, session in sessions:
            for index, image in list(session.images.items()):
                key = (id(layer), index)
                known = self._made.get(key)
                if known is None or known[0] is not image or known[1].cells[0] != layer.name:
                    known = image, self._row(layer, session, index, image)
                made[key] = known
        self._made = made  # nothing of layers that are gone
        return [row for _, row in made.values()]

    def _row(
        self, layer: Any, session: ArrayFocus, index: tuple[int, ...], image: ImageFocus
    ) -> Row:
        values = image.scores.to_dict() if image.scores else {}
        judged = judge(image, self._gates)
        verdict = judged.passed if self._gates else None
        # Without a map there is nothing to judge.
        lacks_map = image.tiles is None and any(g.score in MAP_SCORES for g in self._gates)
        if lacks_map:
            verdict = None
        if judged.error:
            verdict = False
        places = zip(session.walked_axes.lower(), index, strict=True)
        return Row(
            cells=(
                layer.name,
                ", ".join(f"{axis} {i}" for axis, i in places),
                "unreadable" if judged.error else "not measured" if lacks_map else _said(verdict),
                *(values.get(SCORE_NAMES[name], math.nan) for name in self.headers[3:]),
            ),
            passed=verdict,
            why=judged.error or "; ".join(judged.failed_gates),
            order=index,
            target=(layer, index, None),
        )


def tile_rows(
    layer: Any, index: tuple[int, ...], image: ImageFocus, gates: Sequence[Gate]
) -> list[Row]:
    """Lines of the tiles of one plane; gates on other scores than a tile has judge none."""
    if image.plane is None:
        return []
    rows = []
    for tile in np.ndindex(image.plane.tiles.shape):
        share = math.nan if image.tiles is None else float(image.tiles[tile])
        tenengrad = float(image.plane.tiles[tile])
        values = {"in_focus_fraction": share, "tenengrad": tenengrad}
        nothing = image.tiles is not None and math.isnan(share)  # of the region, to be judged
        mine = [gate for gate in gates if gate.score in values and not nothing]
        verdict = all(gate.passes(values) for gate in mine) if mine else None
        place = f"{tile[0]}, {tile[1]}"
        cells = (layer.name, place, _said(verdict), share, tenengrad)
        rows.append(Row(cells, verdict, "", tile, (layer, index, tile)))
    return rows


def _said(verdict: bool | None) -> str:
    return "" if verdict is None else "passed" if verdict else "failed"
