"""Reports of focus: JSON, CSV, and one HTML file that works offline.

The HTML holds its rows as JSON and makes only those in sight into a table, so that ten thousand
images stay usable; it is written image by image, so memory does not grow with their number.
"""

from __future__ import annotations

import csv
import io as streams
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from semanticblur_core import disk
from semanticblur_core.focus.check import ImageFocus
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER
from semanticblur_core.focus.stack import StackFocus
from semanticblur_core.inference.inputs import OF_FORMULAS

_TEMPLATE = "report.html"
# What a file's name stands in.
_NAMING = ("name", "source", "plane", "error")
_ROWS_HERE, _SUMMARY_HERE = "@ROWS@", "@SUMMARY@"


class HtmlReport:
    """The HTML file while it is written; leaving the context completes it.

    After an error, too, if it holds an image that is new by then; otherwise an earlier file stays.

    Parameters
    ----------
    path
        File to write or replace.

    Attributes
    ----------
    summary
        What the page shows beside the rows.

    Raises
    ------
    ImageError
        If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._resources = ExitStack()
        self._n_rows = self._n_new = 0
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Self:
        template = resources.files("semanticblur_core.focus").joinpath(_TEMPLATE)
        head, _, rest = template.read_text(encoding="utf-8").partition(_ROWS_HERE)
        self._between, _, self._tail = rest.partition(_SUMMARY_HERE)
        temporary = self._resources.enter_context(disk.replacing(self._path))
        self._stream = self._resources.enter_context(
            temporary.open("w", encoding="utf-8", newline="\n")
        )
        self._stream.write(head)
        return self

    def add(self, image: ImageFocus, *, is_new: bool = True) -> None:
        """Write one image, new or taken over from an earlier report."""
        row = to_row(image) | {"thumbnail": image.thumbnail, "overlay": image.overlay}
        self._stream.write((",\n" if self._n_rows else "") + _script_json(row))
        self._n_rows += 1
        self._n_new += is_new

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._n_new == 0:  # what an earlier run wrote stays
            self._resources.__exit__(kind, error, trace)
            return
        # What was measured before an interruption is worth a report: closed without the error.
        try:
            self._stream.write(self._between + _script_json(self.summary) + self._tail)
            self._stream.flush()
        except OSError as full:
            if not self._resources.__exit__(type(full), full, full.__traceback__):
                raise
        else:
            self._resources.close()


def write_html(path: Path, images: Iterable[ImageFocus], summary: dict[str, Any]) -> None:
    """Write the HTML page of images that are checked already."""
    with HtmlReport(path) as html:
        for image in images:
            html.add(image)
        html.summary = summary


def to_row(image: ImageFocus) -> dict[str, Any]:
    """Plain JSON values of one image; scores that are NaN are null."""
    row: dict[str, Any] = {"name": image.name, "source": image.source}
    if image.field_of_view is not None:
        row |= asdict(image.field_of_view)
    if image.error is not None or image.scores is None:
        return row | {"passed": False, "error": image.error}
    row |= {name: _number(value) for name, value in image.scores.to_dict().items()}
    row |= {
        "passed": image.passed,
        "failed_gates": list(image.failed_gates),
        "height": image.height,
        "width": image.width,
        "elapsed_s": round(image.elapsed_s, 4),
    }
    if image.stamp is not None:
        row["file_bytes"], row["modified_ns"] = image.stamp
    if image.has_mask:
        row["has_mask"] = True
    if image.mask_error is not None:
        row["mask_error"] = image.mask_error
    if image.plane is not None:
        row["plane_score"] = _number(image.plane.score)
    if image.tiles is not None:
        row["tile_size_px"] = image.tile_size_px
        row["tiles"] = [[_number(round(float(tile), 4)) for tile in line] for line in image.tiles]
    return row


def stack_rows(
    stack: StackFocus,
    names: dict[tuple[int, ...], str],
    *,
    step_um: float | None = None,
    low_is_sharp: bool = False,
) -> dict[str, Any]:
    """Plain JSON values of a stack: best plane, curve and best tiles at each time and channel.

    Parameters
    ----------
    stack
        What was measured.
    names
        Name of each plane, by its index.
    step_um
        Distance of planes in micrometres, where it is known.
    low_is_sharp
        Whether the stack holds scores whose sign was turned, to be turned back.
    """
    sign = -1 if low_is_sharp else 1
    place = stack.walked_axes.index(stack.along)
    series: list[dict[str, Any]] = []
    for at in stack.series():
        curve = stack.curve(at)
        shapes = {
            plane.tiles.shape
            for index, plane in stack.planes.items()
            if index[:place] + index[place + 1 :] == at
        }
        best = (*at[:place], curve.best, *at[place:])
        series.append(
            {
                "at": dict(zip(stack.walked_axes.replace(stack.along, ""), at, strict=True)),
                "best_plane": {"index": curve.best, "name": names[best]},
                "peak": curve.peak,
                "curve": {
                    "index": list(curve.positions),
                    "score": [_number(sign * score) for score in curve.scores],
                },
                "best_tiles": stack.best_tiles(at).tolist() if len(shapes) == 1 else None,
            }
        )
    scored = [
        max((sign * s for s in one["curve"]["score"] if s is not None), default=-math.inf)
        for one in series
    ]
    top = max(range(len(series)), key=lambda i: scored[i])
    document: dict[str, Any] = {"best_plane": series[top]["best_plane"], "stacks": series}
    others = stack.walked_axes.replace(stack.along, "")
    if others == "T" and len(series) > 1:
        drift = stack.drift(step_um=step_um)
        document["drift"] = {
            "planes_per_step": drift.planes_per_step,
            "um_per_step": drift.um_per_step,
            "peaks": list(drift.peaks),
        }
    return document


def ranked(
    images: Iterable[ImageFocus], score: str, *, best_first: bool = False
) -> list[ImageFocus]:
    """Images by one score, worst first unless asked; those without a value are the worst.

    Parameters
    ----------
    images
        What was checked.
    score
        One of `semanticblur_core.focus.scores.HIGHER_IS_SHARPER`, or ``name`` (alphabetical).
    best_first
        The other direction.
    """
    if score == "name":
        return sorted(images, key=lambda image: image.name)
    sign = 1 if HIGHER_IS_SHARPER[score] else -1

    def key(image: ImageFocus) -> float:
        value = math.nan if image.scores is None else image.scores.to_dict()[score]
        return sign * value if math.isfinite(value) else -math.inf

    return sorted(images, key=key, reverse=best_first)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document of plain values."""
    disk.write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a line an image, `to_row` without tiles."""
    columns = ["name", "passed", *HIGHER_IS_SHARPER, "region_fraction", "plane_score"]
    columns += ["failed_gates", "error", "height", "width", "elapsed_s", "source"]
    for more in (["kept"], ["plane", "top", "left"]):
        columns += more * any(more[0] in row for row in rows)
    text = streams.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # A spreadsheet would take such names for formulas.
        named = {key: str(row.get(key) or "") for key in _NAMING}
        safe = {key: f"./{text}" for key, text in named.items() if text.startswith(OF_FORMULAS)}
        writer.writerow(row | safe | {"failed_gates": "; ".join(row.get("failed_gates", ()))})
    disk.write_text(path, text.getvalue())


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element whatever file names hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
