"""The summary table of a batch, a row a file, written as results come."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from semanticblur_core import io
from semanticblur_core.errors import ConfigError
from semanticblur_core.inference.batch import FileResult

TABLE_SUFFIXES = (".csv", ".parquet")
ROWS_PER_GROUP = 10_000
_COLUMNS = {
    "input": "string",
    "status": "string",
    "outputs": "string",
    "height": "int64",
    "width": "int64",
    "n_planes": "int64",
    "mean_blur": "float64",
    "blurred_fraction": "float64",
    "elapsed_s": "float64",
    "error": "string",
}


class SummaryTable(Protocol):
    """What `summary_table` gives."""

    def add(self, result: FileResult) -> None:
        """Add the row of a file."""
        ...


def require_table_format(path: Path) -> None:
    """Refuse a table that cannot be written, before the work.

    Raises
    ------
    ConfigError
        If the name ends otherwise than in .csv or .parquet, or pyarrow is missing for the latter.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ConfigError(f"{path}: expected a table named .csv or .parquet")
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"{path}: Parquet needs pyarrow (pip install pyarrow); .csv needs nothing"
            ) from None


@contextmanager
def summary_table(path: Path) -> Iterator[SummaryTable]:
    """A table on disk that takes its place when the block ends, by an exception too.

    Columns: ``input``, ``status`` (done, skipped, failed), ``outputs`` (separated by ``;``),
    ``height`` and ``width`` in pixels, ``n_planes``, ``mean_blur`` and ``blurred_fraction`` in
    0..1, ``elapsed_s``, ``error``. What was not measured is empty. Rows are in the order in which
    files were finished; none is held in memory.

    Raises
    ------
    ConfigError, ImageError
        If the format is not known, or the file cannot be written.
    """
    require_table_format(path)
    stopped: BaseException | None = None
    with io.replacing(path) as temporary:
        table: _CsvTable | _ParquetTable
        table = _CsvTable(temporary) if path.suffix.lower() == ".csv" else _ParquetTable(temporary)
        try:
            yield table
        except BaseException as error:  # what was done until then is kept, also after Ctrl+C
            stopped = error
        finally:
            table.close()
    if stopped is not None:
        raise stopped


class _CsvTable:
    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._stream, list(_COLUMNS))
        self._writer.writeheader()

    def add(self, result: FileResult) -> None:
        self._writer.writerow(_row(result))

    def close(self) -> None:
        self._stream.close()


class _ParquetTable:
    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self._schema = pyarrow.schema(
            [(name, getattr(pyarrow, kind)()) for name, kind in _COLUMNS.items()]
        )
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, result: FileResult) -> None:
        self._rows.append(_row(result))
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _row(result: FileResult) -> dict[str, Any]:
    status = "failed" if result.error is not None else "skipped" if result.skipped else "done"
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    row |= {"input": result.source, "status": status, "elapsed_s": result.elapsed_s}
    if result.error is not None:
        return row | {"error": result.error}
    row["outputs"] = ";".join(str(path) for path in result.outputs)
    if not result.skipped:
        row |= {
            "height": result.height,
            "width": result.width,
            "n_planes": result.n_frames or len(result.planes) or 1,
            "mean_blur": result.mean_blur,
            "blurred_fraction": result.blurred_fraction,
        }
    return row
