"""Journals survive being cut short, damaged, and written by two at a time."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core.data import journal
from semanticblur_core.data.journal import (
    Change,
    JournalWriter,
    Lock,
    LockedError,
    changed_box,
    find_leftovers,
    journal_files,
    new_facts,
    next_journal,
    read_journal,
    replay,
)
from semanticblur_core.errors import DataError

SHAPE = (2, 30, 40)


def random_changes(rng: np.random.Generator, n: int = 20) -> list[Change]:
    changes = []
    for _ in range(n):
        top, left = int(rng.integers(0, 29)), int(rng.integers(0, 39))
        height, width = int(rng.integers(1, 31 - top)), int(rng.integers(1, 41 - left))
        labels = rng.integers(0, 3, (height, width), np.uint8)
        changes.append(Change((int(rng.integers(2)),), top, left, labels, 1))
    return changes


def write(folder: Path, changes: list[Change]) -> Path:
    folder.mkdir(exist_ok=True)
    writer = JournalWriter(next_journal(folder), new_facts(SHAPE, "photo"))
    for change in changes:
        writer.append([change.to_bytes()])
    writer.close()
    return writer.path


def replayed(changes: list[Change]) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    replay(changes, labels)
    return labels


def test_what_is_written_comes_back(tmp_path: Path, rng: np.random.Generator) -> None:
    changes = random_changes(rng)
    journal = read_journal(write(tmp_path, changes))
    assert not journal.is_cut_short
    assert journal.facts["name"] == "photo"
    expected = np.zeros(SHAPE, np.uint8)
    for change in changes:
        box = np.s_[change.top : change.top + len(change.labels), change.left :]
        expected[change.plane][box][:, : change.labels.shape[1]] = change.labels
    np.testing.assert_array_equal(replayed(journal.changes), expected)


def test_any_truncation_keeps_every_whole_record(tmp_path: Path, rng: np.random.Generator) -> None:
    changes = random_changes(rng, 4)
    path = write(tmp_path, changes)
    content = path.read_bytes()
    ends = [len(read_bytes) for read_bytes in _prefixes(content, changes)]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        journal = read_journal(path)
        whole = sum(end <= length for end in ends)
        assert len(journal.changes) == whole
        np.testing.assert_array_equal(replayed(journal.changes), replayed(changes[:whole]))
        assert journal.is_cut_short == (length not in (_start(content, changes), *ends))


def _start(content: bytes, changes: list[Change]) -> int:
    return len(content) - sum(8 + len(change.to_bytes()) for change in changes)


def _prefixes(content: bytes, changes: list[Change]) -> list[bytes]:
    position, prefixes = _start(content, changes), []
    for change in changes:
        position += 8 + len(change.to_bytes())
        prefixes.append(content[:position])
    return prefixes


def test_a_damaged_record_ends_the_journal(tmp_path: Path, rng: np.random.Generator) -> None:
    changes = random_changes(rng, 6)
    path = write(tmp_path, changes)
    content = bytearray(path.read_bytes())
    third = len(_prefixes(bytes(content), changes)[2])
    content[third + 30] ^= 1
    path.write_bytes(content)
    journal = read_journal(path)
    assert journal.is_cut_short
    assert len(journal.changes) == 3
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a journal"):
        read_journal(path)


def test_zeros_end_the_journal_and_are_not_copied_for_each_record(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    n_zeros = 10_000_000
    changes = random_changes(rng, 3)
    path = write(tmp_path, changes)
    with path.open("ab") as stream:  # as a power cut leaves them
        stream.write(bytes(n_zeros))
    tracemalloc.start()
    journal = read_journal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert journal.is_cut_short
    assert len(journal.changes) == 3
    assert peak < 1.5 * n_zeros


def test_replaying_over_what_is_saved_already_changes_nothing(rng: np.random.Generator) -> None:
    changes = random_changes(rng)
    labels = replayed(changes)
    again = labels.copy()
    replay(changes, again)
    np.testing.assert_array_equal(again, labels)


def test_a_journal_of_another_image_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="another size"):
        replay(random_changes(rng), np.zeros((2, 10, 10), np.uint8))
    with pytest.raises(DataError, match="another size"):
        replay(random_changes(rng), np.zeros((30, 40), np.uint8))


def test_the_smallest_box_that_changed() -> None:
    before = np.zeros((20, 30), np.uint8)
    after = before.copy()
    assert changed_box(before, after) is None
    after[3, 4] = after[17, 9] = 2
    assert changed_box(before, after) == (slice(3, 18), slice(4, 10))


def test_a_lock_keeps_others_out_in_this_process_and_in_others(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "photo")
    with pytest.raises(LockedError, match=r"photo: is being annotated by process \d+ on "):
        Lock(tmp_path / "photo")
    lock.close(delete=True)
    assert not (tmp_path / "photo").exists()

    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, tmp_path / "photo"], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    with other.stdout:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {other.pid} on "):
            Lock(tmp_path / "photo")
        other.kill()
        other.wait(30)
    Lock(tmp_path / "photo").close()


_HOLD = """
import sys, time
from pathlib import Path
from semanticblur_core.data.journal import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_only_one_of_many_writers_gets_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "photo"
    command = [sys.executable, "-c", _WRITE_IN_TURN, folder]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    written = sum(int(writer.communicate(timeout=60)[0]) for writer in writers)
    files = journal_files(folder)
    assert written == len(files) >= 1
    for path in files:
        journal = read_journal(path)
        assert (len(journal.changes), journal.is_cut_short) == (3, False)


# Each tries thirty times to take the folder and to write a journal of three records into it.
_WRITE_IN_TURN = """
import sys, time
from pathlib import Path
import numpy as np
from semanticblur_core.data import journal

folder, n_written = Path(sys.argv[1]), 0
for _ in range(30):
    try:
        lock = journal.Lock(folder)
    except journal.LockedError:
        time.sleep(0.001)
        continue
    writer = journal.JournalWriter(journal.next_journal(folder), journal.new_facts((9, 9), "a"))
    for i in range(3):
        writer.append([journal.Change((), i, i, np.ones((2, 2), np.uint8)).to_bytes()])
    writer.close()
    lock.close(delete=True)
    n_written += 1
print(n_written)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_journal_that_is_saved_while_it_is_read_is_none(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    changes = random_changes(rng, 6)
    write(tmp_path / "photo", changes[:3])
    saved = write(tmp_path / "photo", changes[3:])

    def read(path: Path) -> journal.Journal:
        if path == saved and when == "before":
            path.unlink()
        found = read_journal(path)
        if path == saved:
            path.unlink()
        return found

    monkeypatch.setattr(journal, "read_journal", read)
    leftover = journal.read_leftover(tmp_path / "photo")
    assert leftover is not None
    assert len(leftover.changes) == 3
    saved.write_bytes(b"no journal")
    monkeypatch.undo()
    with pytest.raises(DataError, match="not a journal"):
        journal.read_leftover(tmp_path / "photo")


@pytest.mark.parametrize(
    "name", ["000001 (conflicted copy).journal", "._000001.journal", "notes.journal"]
)
def test_what_others_leave_in_the_folder_is_no_journal(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    changes = random_changes(rng, 2)
    written = [write(tmp_path, changes[:1])]
    (tmp_path / name).write_bytes(b"something else")
    written.append(write(tmp_path, changes[1:]))
    assert journal_files(tmp_path) == written
    leftover = journal.read_leftover(tmp_path)
    assert leftover is not None
    assert leftover.n_strokes == 2


def test_leftovers_are_found_but_not_those_in_use(tmp_path: Path, rng: np.random.Generator) -> None:
    changes = random_changes(rng, 6)
    write(tmp_path / "a", changes[:4])
    write(tmp_path / "a", changes[4:])
    write(tmp_path / "b", changes)
    write(tmp_path / "empty", [])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "000001.journal").write_bytes(b"something else")
    with Lock(tmp_path / "b"):
        found, problems = find_leftovers(tmp_path)
    [leftover] = found
    assert (leftover.name, leftover.shape, leftover.n_strokes) == ("photo", SHAPE, 6)
    np.testing.assert_array_equal(replayed(leftover.changes), replayed(changes))
    assert len(problems) == 1
    assert "not a journal" in problems[0]
    leftover.discard()
    assert [found.folder.name for found in find_leftovers(tmp_path)[0]] == ["b"]
    assert find_leftovers(tmp_path / "none") == ([], [])


@pytest.mark.skipif(sys.platform == "win32", reason="other links")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_writes_over_nothing_that_a_link_leads_to(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (tmp_path / "a").mkdir()
    if kind == "link":
        (tmp_path / "a" / "lock").symlink_to(victim)
    else:
        os.mkfifo(tmp_path / "a" / "lock")
    with pytest.raises(DataError):
        Lock(tmp_path / "a")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{}], "KeyError 'shape'"),
        ([{"shape": "x"}], "TypeError"),
        ([{"shape": [2, 30, 40]}, {}], "KeyError 'box'"),
        ([{"shape": [2, 30, 40]}, {"box": [-4, 0, 2, 2], "plane": [0], "strokes": 1}], "below 0"),
        ([{"shape": [2, 30, 40]}, {"box": [0, 0, 2, 2], "plane": [-1], "strokes": 1}], "below 0"),
        (
            [{"shape": [2, 30, 40]}, {"box": [0, 0, 2, 2], "plane": [0], "strokes": "x"}],
            "TypeError",
        ),
        ([{"shape": [2, 30, 40]}, {"box": [0, 0, 3, 2], "plane": [0], "strokes": 1}], "reshape"),
    ],
)
def test_what_a_journal_cannot_mean_is_one_line(
    tmp_path: Path, records: list[dict[str, Any]], message: str
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    packed = zlib.compress(np.ones((2, 2), np.uint8).tobytes())
    payloads = [json.dumps(values).encode() + b"\n" + packed for values in records]
    frames = [struct.pack("<II", len(p), zlib.crc32(p)) + p for p in payloads]
    (folder / "000001.journal").write_bytes(journal.MAGIC + b"".join(frames))
    found, problems = find_leftovers(tmp_path)
    assert found == []
    assert len(problems) == 1
    assert "of another release, or changed" in problems[0]
    assert message in problems[0]
