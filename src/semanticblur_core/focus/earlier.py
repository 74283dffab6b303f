"""What an earlier run of ``focus`` measured, taken over for files that have not changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from semanticblur_core.errors import DataError
from semanticblur_core.focus.check import ImageFocus, Source, file_stamp
from semanticblur_core.focus.scores import FocusScores

_Key = tuple[str, str]


class EarlierRun:
    """The images of an earlier run's JSON file, with their pictures of its report.

    Parameters
    ----------
    json_file
        What `semanticblur_core.focus.report.write_json` wrote; one that is not there holds nothing.
    measured_with
        Settings of this run, as they are written into its document.
    reports
        HTML reports, or what a killed run left of them, to take pictures from; an image that has
        none there is to be measured again. Without reports no pictures are wanted.
    mask_folder
        Where masks are wanted; an image that has none there is to be measured again.

    Raises
    ------
    DataError
        If the file is no result of ``focus``, or was measured with other settings.
    """

    def __init__(
        self,
        json_file: Path,
        measured_with: Mapping[str, Any],
        *,
        reports: list[Path] | None = None,
        mask_folder: Path | None = None,
    ) -> None:
        self._mask_folder = mask_folder
        self._rows: dict[_Key, dict[str, Any]] = {}
        if json_file.is_file():
            document = _read(json_file)
            _require_same(json_file, document, json.loads(json.dumps(measured_with)))
            self._rows = {(row["name"], row["source"]): row for row in document["images"]}
        self._places: dict[_Key, tuple[Path, int, int]] | None = None
        if reports is not None:
            self._places = {
                (row["name"], row["source"]): place
                for report in reports
                for row, place in _rows_of_report(report)
                if row.get("thumbnail") and _stamp(row) is not None
                if _stamp(row) == _stamp(self._rows.get((row["name"], row["source"]), {}))
            }

    def holds(self, source: Source) -> bool:
        """Whether the file is as it was measured, and all that was made of it is there."""
        key = (source.name, str(source.path))
        row = self._rows.get(key)
        if row is None or source.read is not None or _stamp(row) != file_stamp(source.path):
            return False
        if self._mask_folder and not (self._mask_folder / f"{source.name}.png").is_file():
            return False
        return self._places is None or key in self._places

    def image(self, source: Source) -> ImageFocus:
        """What was measured on a file that it holds, without a verdict."""
        key = (source.name, str(source.path))
        image = _from_row(self._rows[key])
        if self._places is None:
            return image
        path, offset, length = self._places[key]
        with path.open("rb") as stream:
            stream.seek(offset)
            pictures = json.loads(stream.read(length))
        return replace(image, thumbnail=pictures["thumbnail"], overlay=pictures["overlay"])


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document["protocol"], dict) and all(_from_row(r) for r in document["images"]):
            return dict(document)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise DataError(f"{path}: no result of focus to go on from; give another file, or no --resume")


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    told = _flat(before)
    for name, value in _flat(now).items():
        if told.get(name) != value:
            raise DataError(
                f"{path}: measured with {name} {told.get(name)}, and this run has {value}; "
                "without --resume all is measured anew"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["protocol"], "protocol": None}


def _from_row(row: Mapping[str, Any]) -> ImageFocus:
    """The inverse of `semanticblur_core.focus.report.to_row`."""
    values = {field.name: row[field.name] for field in fields(FocusScores)}
    return ImageFocus(
        name=row["name"],
        source=row["source"],
        height=row["height"],
        width=row["width"],
        scores=FocusScores(**{k: math.nan if v is None else v for k, v in values.items()}),
        passed=True,
        tiles=np.asarray(row["tiles"], np.float32) if "tiles" in row else None,
        stamp=_stamp(row),
        elapsed_s=row["elapsed_s"],
    )


def _stamp(row: Mapping[str, Any]) -> tuple[int, int] | None:
    found = (row.get("file_bytes"), row.get("modified_ns"))
    return None if None in found else found  # type: ignore[return-value]


def _rows_of_report(path: Path) -> Iterator[tuple[dict[str, Any], tuple[Path, int, int]]]:
    """Rows of a report, whole or cut, each with its place: file, offset and bytes."""
    with suppress(OSError), path.open("rb") as stream:
        offset = 0
        for line in stream:
            text = line.rstrip(b",\n")
            if text.startswith(b'{"name"'):
                with suppress(ValueError):  # the last line of a run that was killed
                    yield json.loads(text), (path, offset, len(text))
            offset += len(line)
