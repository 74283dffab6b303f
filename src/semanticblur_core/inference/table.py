"""The summary table of a batch, a row a file, written as results come."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from semanticblur_core import disk
from semanticblur_core.errors import ConfigError
from semanticblur_core.inference.inputs import is_sample
from semanticblur_core.inference.results import FileResult

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
    "model": "string",
    "size": "string",
    "threshold": "float64",
    "planes": "string",
    "error": "string",  # last: of a row that is cut it or its comma is missing
}
_NEEDED = {"input", "outputs", "mean_blur"}

# By the place of an output, the inputs that an earlier run names for it, by theirs.
Owners = dict[str, dict[str, str]]


# Done, but for a part that could not be read, of which ``error`` tells.
_PARTIAL = "partial"


class SummaryTable:
    """What `summary_table` gives.

    Attributes
    ----------
    claims
        Of the rows of earlier runs.
    n_of_other_settings
        Files that are skipped and were measured with other settings before.
    n_unknown
        Files that are skipped and of which no row tells.
    """

    def __init__(
        self,
        path: Path,
        writer: _CsvWriter | _ParquetWriter,
        earlier: dict[str, dict[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        self._path = path
        self._writer = writer
        self._earlier = earlier
        self._settings = settings
        self.claims = owners(earlier)
        self.n_of_other_settings = 0
        self.n_unknown = 0

    def add(self, result: FileResult) -> None:
        """Add the row of a file; what is known of a skipped one from before is kept.

        Raises
        ------
        ImageError
            If it cannot be written.
        """
        row = _row(result)
        if result.error is None and not result.skipped:
            row |= self._settings
        before = self._earlier.pop(place(result.source), None)
        if before is not None and still_holds(before, result):
            told = "error" if result.error is not None else "outputs"
            row = before | {name: row[name] for name in ("input", "status", told)}
            told_before = {name: row[name] for name in self._settings}
            self.n_of_other_settings += result.skipped and any(
                (value not in (None, "") or name == "planes")
                and str("" if value is None else value) != str(self._settings[name])
                for name, value in told_before.items()
            )
        else:
            self.n_unknown += result.skipped
        try:
            self._writer.add(row)
        except OSError as error:
            raise disk.unwritable(self._path, error) from error
        if self._earlier and not result.skipped:  # what was another's results is this one's now
            for output in result.outputs:
                for other in self.claims.get(place(output), {}):
                    self._earlier.pop(other, None)

    def unreadable_part(self, source: str) -> str | None:
        """What an earlier run could not read of a file that it did otherwise."""
        before = self._earlier.get(place(source), {})
        return before["error"] if before.get("status") == _PARTIAL else None

    def add_unreached(self) -> None:
        """Add the earlier rows of files that this run did not come to, or was not asked for."""
        for row in self._earlier.values():
            self._writer.add(row)


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


def still_holds(before: Mapping[str, Any], result: FileResult) -> bool:
    """Whether what an earlier run tells of an input is still so: the results there are the same.

    Parameters
    ----------
    before
        The earlier run's row or entry of the input.
    result
        What this run made of it.
    """
    if result.skipped:
        ours: Iterable[str | Path] = result.outputs
        if isinstance(before["outputs"], str):  # of a table, where they are joined
            ours = ";".join(map(str, ours)).split(";")
        return set(map(place, ours)) <= set(map(place, _outputs(before)))
    return result.error is not None and all(Path(output).exists() for output in _outputs(before))


def place(path: str | Path) -> str:
    """One spelling of the path of an input or output, as tables can hold it."""
    text = str(path)
    # Links are not followed: they are inputs of their own.
    return str(_printable(text if is_sample(text) else os.path.abspath(text)))  # noqa: PTH100


def owners(rows: Mapping[str, Mapping[str, Any]]) -> Owners:
    """Inputs by the `place` of each output, of rows of an earlier run."""
    found: Owners = {}
    for row in rows.values():
        for output in _outputs(row):
            found.setdefault(place(output), {})[place(row["input"])] = row["input"]
    return found


def _outputs(row: Mapping[str, Any]) -> Iterable[str]:
    outputs = row["outputs"] or ()
    return outputs.split(";") if isinstance(outputs, str) else outputs


def other_owner(result: FileResult, claims: Owners) -> tuple[Path, str] | None:
    """An output that is there before, and the input of which it was made, if that is another.

    An input that is gone may be this one under a former name, so it is not counted.
    """
    own = place(result.source)
    for output in result.outputs:
        named = claims.get(place(output), {})
        for other in () if own in named else named.values():
            if _is_another(other, result.source):
                return output, other
    return None


def _is_another(one: str, other: str) -> bool:
    if is_sample(one) or is_sample(other):
        return True
    with suppress(OSError):
        return not Path(one).samefile(other)
    return False


@contextmanager
def summary_table(
    path: Path, *, resume: bool = False, settings: Mapping[str, Any] | None = None
) -> Iterator[SummaryTable]:
    """A table on disk that takes its place when the block ends, by an exception too.

    Columns: ``input``, ``status`` (done, partial, skipped, failed), ``outputs`` (separated by
    ``;``), ``height`` and ``width`` in pixels, ``n_planes``, ``mean_blur`` and
    ``blurred_fraction`` in 0..1, ``elapsed_s``, ``model``, ``size``, ``threshold`` and, of stacks,
    ``planes`` (axes, channels, planes, level, series, step) that it was measured with, as rows of
    earlier runs may have others, and ``error``. What was not measured is empty. Rows are in the
    order in which files were finished; none is held in memory, but those of earlier runs with
    ``resume``.

    Parameters
    ----------
    path
        Table to write or replace, .csv or .parquet.
    resume
        Take over what the table that is there, and those of runs that were killed, say of files
        that are skipped now, and of those that this run does not come to.
    settings
        ``model``, ``size``, ``threshold`` and ``planes`` of what this run measures.

    Raises
    ------
    ConfigError, ImageError
        If the format is not known, the file cannot be written, or what is there is no such table.
    """
    require_table_format(path)
    is_csv = path.suffix.lower() == ".csv"
    parts = disk.left_behind(path)
    if not resume:  # what killed runs left
        for part in parts:
            disk.remove_if_stale(part)
        parts = []
    if resume:
        _require_table(path, is_csv)
    earlier = _read_rows([*parts, path], is_csv) if resume else {}
    stopped: BaseException | None = None
    with disk.replacing(path) as temporary:
        writer = _CsvWriter(temporary) if is_csv else _ParquetWriter(temporary)
        table = SummaryTable(path, writer, earlier, settings or {})
        try:
            yield table
        except BaseException as error:  # what was done until then is kept, also after Ctrl+C
            stopped = error
        try:
            with closing(writer):
                table.add_unreached()
        except OSError:
            if is_csv:  # what stands there is found by the next run that resumes
                disk.leave_behind(temporary)
            raise
    for part in parts:  # taken over
        with suppress(OSError):
            part.unlink()
    if stopped is not None:
        raise stopped


def _require_table(path: Path, is_csv: bool) -> None:
    """Refuse to go on from, and so to replace, what is there and is no table of ours."""
    if not path.is_file() or not path.stat().st_size:
        return
    names: Iterable[str] = ()
    if is_csv:
        with suppress(ValueError, csv.Error), _csv_stream(path) as stream:
            names = csv.DictReader(stream).fieldnames or ()
    else:
        import pyarrow
        from pyarrow import parquet

        with suppress(ValueError, pyarrow.ArrowException):
            names = parquet.read_schema(path).names
    if not set(names) >= _NEEDED:
        raise ConfigError(
            f"{path}: not a table that --resume can go on from, or saved by another program with "
            "other separators; move it away"
        )


def _csv_stream(path: Path) -> TextIO:
    # As UTF-8 with a mark at its beginning, as spreadsheets save it, too.
    return path.open(newline="", encoding="utf-8-sig", errors="surrogateescape")


def _read_rows(paths: list[Path], is_csv: bool) -> dict[str, dict[str, Any]]:
    """Rows with numbers by input, the latest one of each; what cannot be read is left out."""
    existing = sorted((p for p in paths if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    rows: dict[str, dict[str, Any]] = {}
    for path in existing:
        for row in _csv_rows(path) if is_csv else _parquet_rows(path):
            if row["mean_blur"] not in (None, ""):
                rows[place(row["input"])] = row
    return rows


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with suppress(OSError, ValueError, csv.Error), _csv_stream(path) as stream:
        for row in csv.DictReader(stream):
            # The last row of a run that was killed may be cut.
            if set(row) >= _NEEDED and None not in row.values():
                yield {name: row.get(name) for name in _COLUMNS}


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    # Without its end, as of a run that was killed, such a file cannot be read.
    with (
        suppress(OSError, ValueError, pyarrow.ArrowException),
        parquet.ParquetFile(path) as file,
    ):
        if set(file.schema_arrow.names) >= _NEEDED:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield {name: row.get(name) for name in _COLUMNS}


class _CsvWriter:
    def __init__(self, path: Path) -> None:
        # Line by line, so that a run that is killed leaves the rows it wrote.
        # Names of files that are not UTF-8 keep their bytes.
        self._stream = path.open(
            "w", buffering=1, newline="", encoding="utf-8", errors="surrogateescape"
        )
        self._writer = csv.DictWriter(self._stream, list(_COLUMNS))
        self._writer.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)

    def close(self) -> None:
        self._stream.close()


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self._schema = pyarrow.schema(
            [(name, getattr(pyarrow, kind)()) for name, kind in _COLUMNS.items()]
        )
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append({name: _printable(value) for name, value in row.items()})
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


def _printable(value: Any) -> Any:
    """Text that Parquet can hold: bytes of a name that are not UTF-8 are written in hexadecimal."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return value


def _row(result: FileResult) -> dict[str, Any]:
    status = "skipped" if result.skipped else "done"
    if result.error is not None:
        status = "failed"
    elif result.unreadable_part is not None:
        status = _PARTIAL
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
        row["error"] = result.unreadable_part
    return row
