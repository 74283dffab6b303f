"""The table of a batch that is resumed keeps what was measured before."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from semanticblur_core import disk
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.results import FileResult
from semanticblur_core.inference.table import _CsvWriter, still_holds, summary_table

SUFFIXES = ("csv", "parquet")


def result(name: str, mean_blur: float = 0.25, formats: tuple[str, ...] = ("png",)) -> FileResult:
    outputs = [Path(f"out/{name}_blur.{one}") for one in formats]
    return FileResult(f"in/{name}.png", outputs, 4, 5, mean_blur=mean_blur, elapsed_s=7.0)


def skipped(name: str) -> FileResult:
    return FileResult(f"in/{name}.png", [Path(f"out/{name}_blur.png")], elapsed_s=0.0, skipped=True)


def write(path: Path, *results: FileResult, resume: bool = False) -> None:
    with summary_table(path, resume=resume) as table:
        for one in results:
            table.add(one)


def rows_of(path: Path) -> dict[str, tuple[str, float | None, float]]:
    """Status, mean blur and seconds by name."""
    if path.suffix == ".csv":
        with path.open(newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    names = [Path(row["input"]).stem for row in rows]
    assert len(set(names)) == len(names)
    means = [None if row["mean_blur"] in ("", None) else float(row["mean_blur"]) for row in rows]
    return {
        name: (row["status"], mean, float(row["elapsed_s"]))
        for name, row, mean in zip(names, rows, means, strict=True)
    }


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return tmp_path / f"t.{request.param}"


def test_on_resume_skipped_files_keep_their_numbers(path: Path) -> None:
    failed = FileResult("in/b.png", error="in/b.png: damaged")
    write(path, result("a"), failed, result("gone"), result("c", 0.5))
    again = result("c", 0.75)
    write(path, skipped("a"), skipped("b"), again, resume=True)
    expected = {"a": ("skipped", 0.25, 7.0), "b": ("skipped", None, 0.0), "c": ("done", 0.75, 7.0)}
    # What is no input any more keeps its row.
    expected |= {"gone": ("done", 0.25, 7.0)}
    assert rows_of(path) == expected
    write(path, skipped("a"), skipped("b"), skipped("c"), resume=True)
    assert rows_of(path) == expected | {"c": ("skipped", 0.75, 7.0)}
    write(path, skipped("a"))
    assert rows_of(path) == {"a": ("skipped", None, 0.0)}


def test_each_row_says_what_it_was_measured_with(path: Path) -> None:
    for threshold, results in ((0.5, [result("a")]), (0.25, [skipped("a"), result("b")])):
        settings = {"model": "default", "size": "320", "threshold": threshold}
        with summary_table(path, resume=True, settings=settings) as table:
            for one in results:
                table.add(one)
        assert table.n_of_other_settings == (threshold == 0.25)
    if path.suffix == ".csv":
        with path.open(newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    found = [(row["status"], row["model"], row["size"], float(row["threshold"])) for row in rows]
    assert found == [("skipped", "default", "320", 0.5), ("done", "default", "320", 0.25)]


def test_numbers_of_other_results_are_not_taken_over(path: Path) -> None:
    write(path, result("a"), result("b", formats=("png", "tif")))
    elsewhere = FileResult("in/a.png", [Path("other/a_blur.png")], skipped=True)
    write(path, elsewhere, skipped("b"), resume=True)
    assert rows_of(path) == {"a": ("skipped", None, 0.0), "b": ("skipped", 0.25, 7.0)}


def test_a_resumed_run_that_is_stopped_keeps_what_it_did_not_come_to(path: Path) -> None:
    write(path, result("a"), result("b"), result("c"))

    def stopped() -> None:
        with summary_table(path, resume=True) as table:
            table.add(skipped("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert rows_of(path) == {
        "a": ("skipped", 0.25, 7.0),
        "b": ("done", 0.25, 7.0),
        "c": ("done", 0.25, 7.0),
    }


def test_rows_of_a_run_that_was_killed_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with summary_table(path) as table:
        table.add(result("b", 0.5))
        table.add(result("c", 0.75))
        table.add(result("d"))
        [part] = disk.left_behind(path)
        left = part.read_bytes()[:-9]  # as a full disk or a power cut leaves the last row
    write(path, result("a"), result("b"))
    os.utime(path, (1, 1))
    disk.temporary_name(path).write_bytes(left)
    write(path, *(skipped(name) for name in "abcd"), resume=True)
    assert rows_of(path) == {
        "a": ("skipped", 0.25, 7.0),
        "b": ("skipped", 0.5, 7.0),
        "c": ("skipped", 0.75, 7.0),
        "d": ("skipped", None, 0.0),
    }
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_run_whose_disk_was_full_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    add = _CsvWriter.add

    def full(writer: _CsvWriter, row: dict[str, Any]) -> None:
        if "/c." in row["input"]:
            raise OSError(28, "No space left on device")
        add(writer, row)

    def close(writer: _CsvWriter) -> None:
        writer._stream.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_CsvWriter, "add", full)
    monkeypatch.setattr(_CsvWriter, "close", close)
    with pytest.raises(ImageError, match=r"t\.csv: cannot be written: No space left on device"):
        write(path, result("a", 0.5), result("b"), result("c"))
    monkeypatch.undo()
    assert not path.exists()
    write(path, skipped("a"), skipped("b"), result("c"), resume=True)
    assert rows_of(path) == {
        "a": ("skipped", 0.5, 7.0),
        "b": ("skipped", 0.25, 7.0),
        "c": ("done", 0.25, 7.0),
    }
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_is_deleted_by_one_that_begins_anew(path: Path) -> None:
    disk.temporary_name(path).write_bytes(b"input")
    write(path, result("a"))
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_table_is_not_replaced(path: Path) -> None:
    for content in (b"input,mean_blur\nin/a.png,0.5\n", b"\xff\x00PAR1"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"t{path.suffix}: not a table that --resume"):
            write(path, skipped("a"), resume=True)
        assert path.read_bytes() == content
        path.write_bytes(b"")
        disk.temporary_name(path).write_bytes(content)
        write(path, skipped("a"), resume=True)
        assert rows_of(path) == {"a": ("skipped", None, 0.0)}


def test_a_table_that_a_spreadsheet_saved_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write(path, result("a"))
    before = rows_of(path)["a"]
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    write(path, skipped("a"), resume=True)
    assert rows_of(path)["a"][1:] == before[1:]


def test_a_name_that_is_not_utf8_is_a_row_like_any_other(path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write(path, result(name), result("b"))
    write(path, skipped(name), skipped("b"), resume=True)
    if path.suffix == ".csv":
        assert b"in/caf\xe9.png,skipped" in path.read_bytes()
        content = path.read_text(encoding="utf-8", errors="surrogateescape")
        rows: list[dict[str, Any]] = list(csv.DictReader(content.splitlines()))
        assert rows[0]["input"] == f"in/{name}.png"
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
        assert rows[0]["input"] == "in/caf\\xe9.png"
    assert [float(row["mean_blur"]) for row in rows] == [0.25, 0.25]


@pytest.mark.parametrize("outputs", ["out/a;b_blur.png", ["out/a;b_blur.png"]])
def test_a_separator_in_a_name_loses_nothing(outputs: Any) -> None:
    skipped = FileResult("a;b.jpg", outputs=[Path("out/a;b_blur.png")], skipped=True)
    assert still_holds({"outputs": outputs}, skipped)
    assert not still_holds({"outputs": "out/c_blur.png"}, skipped)
