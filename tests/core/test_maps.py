"""Maps in pieces: read as one, kept for whoever goes on, gone where they are whole."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core import disk
from semanticblur_core.errors import ImageError
from semanticblur_core.maps import MapFile, is_kept, kept_folder, kept_map, new_map, tidy_unused

SHAPE = (2, 5, 3)
VALUES = np.arange(30, dtype=np.float32).reshape(10, 3)


class StoppedError(Exception):
    """What ends a block."""


def stop() -> None:
    raise StoppedError


def keep(path: Path, *pieces: range, key: str = "01234567") -> None:
    """Make pieces of a map, then stop while another one is begun."""
    with suppress(StoppedError), kept_map(path, SHAPE, key) as maps:
        for rows in pieces:
            maps.begin(rows.start)
            maps.append(VALUES[rows.start : rows.stop])
            maps.end([rows.start], keep=True)
        maps.append(np.zeros((1, 3), np.float32))
        stop()


def test_a_map_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "a_blur.tif"
    keep(path, range(4), range(6, 7))
    assert is_kept(kept_folder(path, "01234567"))
    with kept_map(tmp_path / "a_blur.npy", SHAPE, "01234567", stays=True) as maps:  # any format
        assert maps.missing() == [range(4, 6), range(7, 10)]
        assert maps.missing(range(3, 8)) == [range(4, 6), range(7, 8)]
        assert maps.missing(range(1, 4)) == []
        maps.append(VALUES[4:6])
        assert maps.next_row == 6
        maps.end([4], keep=True)
        assert maps.next_row == 7
    with kept_map(path, SHAPE, "01234567") as maps:
        maps.append(VALUES[7:9])
        maps.append(VALUES[9:])
        maps.end([7])
        assert maps.notes() == [[0], [4], [6], [7]]
        for plane in range(2):
            for rows in (slice(None), slice(1, 4), slice(2, 2), slice(3, 9)):
                expected = VALUES.reshape(SHAPE)[plane, rows]
                np.testing.assert_array_equal(maps.read([plane], rows), expected)
        with (tmp_path / "all").open("wb") as stream:
            maps.copy_to(stream)
    assert (tmp_path / "all").read_bytes() == VALUES.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


def test_pieces_of_another_map_or_that_are_not_whole_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    keep(path, range(4), range(6, 8), range(8, 10))
    folder = kept_folder(path, "01234567")
    (folder / "0-4.rows").write_bytes(b"cut off")
    (folder / "6-8.json").write_text("[")
    (folder / "3-9.json").write_text("[]")  # without its rows
    (folder / "3-9.txt").touch()
    (folder / "9-11.json").write_text("[]")  # of a map that is larger
    (folder / "9-11.rows").write_bytes(bytes(24))
    with kept_map(path, SHAPE, "01234567", stays=True) as maps:
        assert maps.missing() == [range(8)]
    with suppress(StoppedError), kept_map(path, SHAPE, "89abcdef") as maps:
        assert maps.missing() == [range(10)]
        stop()
    assert [p for p in tmp_path.iterdir() if is_kept(p)] == [folder]
    with kept_map(path, SHAPE, "89abcdef"):
        pass
    assert list(tmp_path.iterdir()) == []  # nobody goes on with the others


def test_pieces_that_overlap_count_once(tmp_path: Path) -> None:
    folder = tmp_path / "map"
    folder.mkdir()
    for rows in (range(4), range(2), range(2, 6), range(5, 8)):
        (folder / f"{rows.start}-{rows.stop}.rows").write_bytes(
            VALUES[rows.start : rows.stop].tobytes()
        )
        (folder / f"{rows.start}-{rows.stop}.json").write_text(json.dumps([rows.start]))
    maps = MapFile(folder, SHAPE)
    assert maps.notes() == [[0], [5]]
    assert maps.missing() == [range(4, 5), range(8, 10)]
    maps.close()


def test_what_nothing_is_kept_of_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    keep(path)
    assert list(tmp_path.iterdir()) == []
    with suppress(StoppedError), new_map(path, SHAPE) as maps:
        maps.append(VALUES)
        maps.end(keep=True)
        stop()
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_out_is_found_out_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with kept_map(path, SHAPE, "01234567", stays=True) as maps:
        assert maps.remembered("limits", lambda: [[0.0, 1.5]]) == [[0.0, 1.5]]
        assert maps.remembered("limits", lambda: pytest.fail("again")) == [[0.0, 1.5]]
        (maps.folder / "limits.json").write_text("[[0")
        assert maps.remembered("limits", lambda: None) is None


@pytest.mark.skipif(os.name == "nt", reason="no locks that tell what is stale")
def test_several_make_one_map(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    folder = kept_folder(path, "01234567")
    folder.mkdir()
    for left in (".9.rows.01234567.part", "4-5.rows"):  # of one that was killed
        (folder / left).touch()
    with kept_map(path, SHAPE, "01234567", stays=True) as first:
        assert [p.name for p in folder.iterdir()] == ["in-use"]
        first.append(VALUES[:2])
        first.end()
        with suppress(StoppedError), kept_map(path, SHAPE, "01234567", stays=True) as second:
            second.begin(5)
            second.append(VALUES[5:])
            assert len(list(folder.glob("*.rows"))) == 1  # which the first still needs
            stop()
        tidy_unused(folder)
        with kept_map(path, SHAPE, "01234567"):
            pass  # a third, that is whole, as it has the result
        disk.remove_unused(folder)
        np.testing.assert_array_equal(first.read([0], slice(0, 2)), VALUES[:2])
        first.append(VALUES[2:4])
        first.end(keep=True)
    assert is_kept(folder)
    disk.remove_unused(folder)
    assert not folder.exists()


def test_who_comes_while_a_folder_is_deleted_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "f"
    lock, n_calls = disk._flock, 0

    def slow(stream: Any, *, shared: bool = False) -> bool | None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:  # it is deleted between opening and locking
            shutil.rmtree(folder)
        return lock(stream, shared=shared)

    monkeypatch.setattr(disk, "_flock", slow)
    with disk.in_use(folder, lambda _: None):
        assert [p.name for p in folder.iterdir()] == ["in-use"]


def test_without_locks_ones_own_is_deleted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_flock", lambda *_, **__: None)
    path = tmp_path / "a.tif"
    keep(path, range(4), key="00000000")
    keep(path, range(4))
    with kept_map(path, SHAPE, "01234567") as maps:
        assert maps.missing() == [range(4, 10)]
    assert [p.name for p in tmp_path.iterdir()] == [".a.00000000.map.part"]


def test_long_names_that_begin_alike_are_others(tmp_path: Path) -> None:
    keep(tmp_path / f"{221 * 'l'}x.tif", range(4))
    with kept_map(tmp_path / f"{221 * 'l'}y.tif", SHAPE, "89abcdef"):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_names_that_look_like_patterns_or_that_begin_alike_are_others(tmp_path: Path) -> None:
    names = ["a*", "ab", "a", "a[b]", "a_blur.x", "a.tif"]
    for name in names:
        keep(tmp_path / f"{name}.tif", range(4))
    for i, name in enumerate(names, start=1):
        with kept_map(tmp_path / f"{name}.tif", SHAPE, "89abcdef"):
            pass
        assert len(list(tmp_path.iterdir())) == len(names) - i, name


def test_what_was_kept_is_forgotten_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    keep(path, range(4))
    with kept_map(path, SHAPE, "01234567", fresh=True) as maps:
        assert maps.missing() == [range(10)]


def test_bytes_that_are_gone_are_no_map(tmp_path: Path) -> None:
    with new_map(tmp_path / "a.tif", SHAPE) as maps:
        maps.append(VALUES)
        maps.end()
        [rows] = maps.folder.glob("*.rows")
        rows.write_bytes(VALUES.tobytes()[:-12])
        with pytest.raises(OSError, match="12 bytes of a map are gone"):
            maps.read([1], slice(None))


@pytest.mark.skipif(os.name == "nt", reason="no such limits")
def test_a_full_disk_is_told_of_the_result_and_leaves_no_piece(tmp_path: Path) -> None:
    import resource

    def fill() -> None:
        with kept_map(path, (2, 50_000, 3), "89abcdef") as maps:
            maps.append(np.zeros((3_000, 3), np.float32))
            maps.end(keep=True)
            maps.append(np.zeros((30_000, 3), np.float32))
            maps.end()

    path = tmp_path / "a.tif"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(ImageError, match=r"a.tif: cannot be written: File too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    [folder] = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {"in-use", "0-3000.json", "0-3000.rows"}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (kept_folder(tmp_path / "a.tif", "01234567") / "in-use").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"\.a\.01234567\.map\.part: cannot be written"):
        keep(tmp_path / "a.tif")


def test_of_a_map_that_is_there_in_part_only_the_rest_needs_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    keep(path, range(8))
    usage = type("Usage", (), {"free": 2 * 3 * 4})
    monkeypatch.setattr("semanticblur_core.maps.shutil.disk_usage", lambda _: usage)
    with kept_map(path, SHAPE, "01234567", stays=True) as maps:
        assert maps.next_row == 8
    with (
        pytest.raises(ImageError, match=r"a.tif: a map of 0.0 MiB does not fit on the disk"),
        kept_map(path, SHAPE, "89abcdef", stays=True),
    ):
        pass
