"""What an earlier run of ``focus`` measured, taken over for files that have not changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from semanticblur_core import disk
from semanticblur_core.errors import DataError
from semanticblur_core.focus.check import Field, ImageFocus, Source, mask_path
from semanticblur_core.focus.scores import FocusScores
from semanticblur_core.inference.table import place

_Row = dict[str, Any]
_Key = tuple[str, str]
# What a report's row and the same image's in the JSON file may differ in.
_OF_A_REPORT = (
    *("thumbnail", "overlay", "passed", "failed_gates", "kept", "has_mask", "mask_error"),
)


class EarlierRun:
    """The images of an earlier run's JSON file, with their pictures of its report; close it.

    Parameters
    ----------
    json_file
        What `semanticblur_core.focus.report.write_json` wrote; one that is not there holds nothing.
    settings
        What this run measures with, as it is written into its document.
    masks
        Where masks are wanted and with which margin, likewise; None if none are. An image that has
        none there is to be measured again.
    reports
        HTML reports, or what a killed run left of them, to take pictures from; an image that has
        none there is to be measured again. None if no pictures are wanted.

    Attributes
    ----------
    n_lacking
        Images that are to be measured again for want of a picture or a mask alone.
    masks, mask_names
        Where its masks are and with which margin, as ``masks``, and of which images there are any.

    Raises
    ------
    DataError
        If the file is no result of ``focus``, or was measured with other settings.
    """

    def __init__(
        self,
        json_file: Path,
        settings: Mapping[str, Any],
        *,
        masks: Mapping[str, Any] | None = None,
        reports: list[Path] | None = None,
    ) -> None:
        self.n_lacking = 0
        self.masks: dict[str, Any] | None = None
        self.mask_names: set[str] = set()
        self._rows: dict[_Key, _Row] = {}
        self._mask_folder = None if masks is None else Path(masks["folder"])
        self._has_masks = True
        self._pictures: dict[_Key, tuple[BinaryIO, int, int]] | None = None
        self._resources = ExitStack()
        if not json_file.is_file():
            return
        document = _read(json_file)
        _require_same(json_file, document, json.loads(json.dumps(settings)))
        self._rows = {_key(row): row for row in (*document["not_checked"], *document["images"])}
        found = document.get("masks")
        self.masks = found if isinstance(found, dict) else None
        self.mask_names = _mask_names(document)
        self._has_masks = masks is None or self.masks == masks
        if reports is not None:
            self._pictures = {}
            with ExitStack() as opened:
                for report in reports:
                    self._find_pictures(report, opened)
                self._resources = opened.pop_all()

    def close(self) -> None:
        """Close the reports."""
        self._resources.close()

    def take(self, source: Source) -> ImageFocus | None:
        """What was measured on a file, without a verdict; None if it is to be measured."""
        key = (source.name, place(source.path))
        row = self._rows.get(key)
        if row is None or source.stamp is None or _stamp(row) != source.stamp:
            return None
        image = replace(_from_row(row), source=str(source.path))
        if self._mask_folder is not None and not (
            self._has_masks
            and image.has_mask
            and mask_path(self._mask_folder, source.name).is_file()
        ):
            self.n_lacking += 1
            return None
        if self._pictures is None:
            return image
        try:
            stream, offset, n_bytes = self._pictures[key]
            stream.seek(offset)
            found = json.loads(stream.read(n_bytes))
            return replace(image, thumbnail=found["thumbnail"], overlay=found["overlay"])
        except (LookupError, OSError, ValueError):
            self.n_lacking += 1
            return None

    def rows_besides(self, images: Iterable[ImageFocus]) -> list[_Row]:
        """Rows of files that this run did not come to, was not asked for or could not read."""
        measured = [image for image in images if image.error is None]
        done = {(image.name, place(image.source)) for image in measured}
        # Planes and fields of a file that has changed since are of it no more.
        stamps = {place(image.source): image.stamp for image in measured}
        others = [
            row
            for (name, source), row in self._rows.items()
            if (name, source) not in done and stamps.get(source, _stamp(row)) == _stamp(row)
        ]
        if self._has_masks:
            return others
        # Their masks, if they have any, are of another folder or margin than this run tells of.
        return [{name: row[name] for name in row if name != "has_mask"} for row in others]

    def _find_pictures(self, report: Path, opened: ExitStack) -> None:
        """Where the rows of a report are that say of an image what is known, in file and bytes."""
        assert self._pictures is not None
        if not report.is_file() or disk.is_special(report):
            return
        with suppress(OSError):
            # Held open: another run may put a new report in its place.
            stream = opened.enter_context(report.open("rb"))
            offset = 0
            for line in stream:
                text = line.rstrip(b",\r\n")
                # Other lines are no rows; the last one of a run that was killed may be cut.
                with suppress(ValueError, LookupError, TypeError):
                    row = json.loads(text) if text.startswith(b'{"name"') else {}
                    has_pictures = isinstance(row["thumbnail"], str)
                    has_pictures &= isinstance(row["overlay"], str | None)
                    if has_pictures and _measured(row) == _measured(self._rows[_key(row)]):
                        self._pictures[_key(row)] = (stream, offset, len(text))
                offset += len(line)


def earlier_masks(json_file: Path, folder: Path) -> set[str]:
    """Names of images whose masks a run wrote into a folder, or had begun to when it ended."""
    try:
        document = json.loads(json_file.read_text(encoding="utf-8"))
        if place(document["masks"]["folder"]) != place(folder):
            return set()
        return _mask_names(document)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _mask_names(document: Mapping[str, Any]) -> set[str]:
    rows = (*document["images"], *document.get("not_checked", ()))
    names = {row["name"] for row in rows if row.get("has_mask")}
    return names | set(document.get("masks_begun", ()))


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        document = json.loads(path.read_text(encoding="utf-8"))
        document.setdefault("not_checked", [])
        for row in (*document["images"], *document["not_checked"]):
            _from_row(row)
        if isinstance(document["protocol"], dict):
            return dict(document)
    raise DataError(f"{path}: no result of focus to go on from; give another file, or no --resume")


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    told = {**before, **before["protocol"]}
    for name, value in {**now["protocol"], **now}.items():  # what is chosen before what follows
        if name != "protocol" and told.get(name) != value:
            raise DataError(
                f"{path}: measured with {name} {_said(told.get(name))}, and this run has "
                f"{_said(value)}; without --resume all is measured anew"
            )


def _said(value: object) -> str:
    """A setting as one says it: ``16 px``, ``none``."""
    if isinstance(value, list | tuple):
        return " ".join(map(_said, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _from_row(row: Mapping[str, Any]) -> ImageFocus:
    """The inverse of `semanticblur_core.focus.report.to_row`.

    Raises
    ------
    LookupError, TypeError, ValueError
        If it is no such row.
    """
    if not (isinstance(row["name"], str) and isinstance(row["source"], str)):
        raise TypeError("names are text")
    values = {field.name: row[field.name] for field in fields(FocusScores)}
    return ImageFocus(
        name=row["name"],
        source=row["source"],
        height=_number(row["height"]),
        width=_number(row["width"]),
        scores=FocusScores(
            **{name: math.nan if v is None else _number(v) for name, v in values.items()}
        ),
        passed=True,
        tiles=np.asarray(row["tiles"], np.float32) if "tiles" in row else None,
        tile_size_px=_number(row["tile_size_px"]) if row.get("tile_size_px") else None,
        stamp=_stamp(row),
        field_of_view=_field(row),
        elapsed_s=_number(row["elapsed_s"]),
        has_mask=row.get("has_mask") is True,
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def _stamp(row: Mapping[str, Any]) -> tuple[int, int] | None:
    if "file_bytes" not in row:
        return None
    return _number(row["file_bytes"]), _number(row["modified_ns"])


def _field(row: Mapping[str, Any]) -> Field | None:
    if "plane" not in row:
        return None
    places = (_number(row[name]) for name in ("top", "left", "height", "width"))
    return Field(str(row["plane"]), *places)


def _key(row: Mapping[str, Any]) -> _Key:
    return row["name"], place(row["source"])


def _measured(row: Mapping[str, Any]) -> _Row:
    measured = {name: value for name, value in row.items() if name not in _OF_A_REPORT}
    return measured | {"source": place(row["source"])}
