"""Journal of changes to labels: an append-only file that a crash can cut short but not spoil.

A file begins with `MAGIC`, then come records: length and CRC-32 of a payload, then the payload. A
payload is a line of JSON and bytes. The first record says what was painted on; each other one
holds a box of one plane as it was after a change, so that replaying a record twice, or on labels
that have it already, does no harm. A record that is cut short or damaged ends the file.

Each run of a program writes files of its own into the folder of its image, numbered on; a lock in
that folder, which the system frees when the program dies, keeps others out.
"""

from __future__ import annotations

import errno
import json
import operator
import os
import socket
import stat
import struct
import sys
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk
from semanticblur_core.data.labels import BLURRED
from semanticblur_core.errors import DataError

MAGIC = b"SBJ1"
_FRAME = struct.Struct("<II")
_SUFFIX = ".journal"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class Change:
    """A box of a plane after a change.

    Attributes
    ----------
    plane
        Index along the axes before rows and columns.
    top, left
        First row and column.
    labels
        ``(h, w)`` uint8.
    n_strokes
        Strokes that ended since the change before.
    """

    plane: tuple[int, ...]
    top: int
    left: int
    labels: NDArray[np.uint8]
    n_strokes: int = 0

    def to_bytes(self) -> bytes:
        """Payload of its record."""
        height, width = self.labels.shape
        box = [self.top, self.left, height, width]
        facts = {"plane": list(self.plane), "box": box, "strokes": self.n_strokes}
        return _payload(facts, zlib.compress(self.labels.tobytes(), 1))

    def apply(self, labels: NDArray[np.uint8]) -> None:
        """Write it into labels ``(..., H, W)``."""
        height, width = self.labels.shape
        rows, columns = slice(self.top, self.top + height), slice(self.left, self.left + width)
        labels[self.plane][rows, columns] = self.labels


@dataclass(frozen=True)
class Journal:
    """What a journal file holds.

    Attributes
    ----------
    facts
        Of the first record: ``shape`` of the labels, ``time`` and whatever the writer added.
    changes
        In their order.
    is_cut_short
        Whether something at the end could not be read: the writer was interrupted.
    """

    facts: dict[str, Any]
    changes: list[Change]
    is_cut_short: bool


def read_journal(path: Path) -> Journal:
    """Read a journal as far as it is whole.

    Raises
    ------
    DataError
        If it cannot be opened, or is of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not content.startswith(MAGIC[: len(content)]):
        raise DataError(f"{path}: not a journal of labels")
    facts: dict[str, Any] = {}
    changes: list[Change] = []
    position = len(MAGIC)
    while True:
        frame = content[position : position + _FRAME.size]
        if len(frame) < _FRAME.size:
            return Journal(facts, changes, bool(frame) or not facts)
        length, checksum = _FRAME.unpack(frame)
        start = position + _FRAME.size
        payload = content[start : start + length]
        # Zeros, which a power cut may leave, have the checksum of an empty payload.
        if not payload or len(payload) < length or zlib.crc32(payload) != checksum:
            return Journal(facts, changes, True)
        try:
            line, _, packed = payload.partition(b"\n")
            values = json.loads(line)
            if facts:
                changes.append(_change(values, packed))
            else:
                tuple(map(operator.index, values["shape"]))
                facts = values
        except (ValueError, LookupError, TypeError, AttributeError, zlib.error) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise DataError(
                f"{path}: a journal of another release, or changed: {reason}"
            ) from error
        position = start + length


def _change(values: dict[str, Any], packed: bytes) -> Change:
    top, left, height, width = map(operator.index, values["box"])
    plane = tuple(map(operator.index, values["plane"]))
    box = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, width)
    if min(top, left, *plane) < 0 or box.max(initial=0) > BLURRED:
        raise ValueError("places below 0, or labels that are none")
    return Change(plane, top, left, box, operator.index(values["strokes"]))


class JournalWriter:
    """Appends records to a new journal; each call returns when they are on the disk.

    Parameters
    ----------
    path
        File to make.
    facts
        JSON values of the first record.

    Raises
    ------
    OSError
        If it cannot be made.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._stream: BinaryIO = path.open("xb", buffering=0)
        self._good_bytes = 0
        try:
            self._write(MAGIC + _framed(_payload(facts, b"")))
        except OSError:
            self.close()
            with suppress(OSError):
                path.unlink()
            raise
        disk.sync_folder(path.parent)

    def append(self, payloads: Iterable[bytes]) -> None:
        """Append records; all of them or, where an OSError is raised, none."""
        self._write(b"".join(map(_framed, payloads)))

    @property
    def is_in_place(self) -> bool:
        """Whether the file still is where it was made: a deleted one can be appended to."""
        return _is_same_file(self._stream.fileno(), self.path)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _write(self, content: bytes) -> None:
        try:
            view = memoryview(content)
            while view:  # an unbuffered write may take less than all
                view = view[self._stream.write(view) :]
            os.fsync(self._stream.fileno())
        except OSError:
            # Half a record would hide those that follow once there is room again.
            with suppress(OSError):
                self._stream.truncate(self._good_bytes)
                self._stream.seek(self._good_bytes)
            raise
        self._good_bytes += len(content)


def replay(changes: Iterable[Change], labels: NDArray[np.uint8]) -> None:
    """Write changes into labels ``(..., H, W)``, in their order.

    Raises
    ------
    DataError
        If they are of labels of another shape.
    """
    for change in changes:
        ends = (change.top + change.labels.shape[0], change.left + change.labels.shape[1])
        lengths = labels.shape[:-2]
        fits = len(change.plane) == len(lengths) and all(
            index < length for index, length in zip((*change.plane, *ends), (
                *lengths, *(n + 1 for n in labels.shape[-2:])), strict=True)
        )  # fmt: skip
        if not fits:
            raise DataError(
                f"the journal is of an image of another size than {labels.shape}: "
                f"plane {change.plane}, {ends[0]} rows, {ends[1]} columns"
            )
        change.apply(labels)


def journal_files(folder: Path) -> list[Path]:
    """Journals in the folder of an image, oldest first."""
    # Others are no journals: copies by a program that syncs, or what macOS puts beside files.
    found = (path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())
    return sorted(found, key=lambda path: int(path.stem))


def next_journal(folder: Path) -> Path:
    """Path of the journal that comes after those there are."""
    files = journal_files(folder)
    number = int(files[-1].stem) + 1 if files else 1
    return folder / f"{number:06d}{_SUFFIX}"


@dataclass(frozen=True)
class Leftover:
    """Changes that were made and not saved.

    Attributes
    ----------
    folder
        Where their journals are.
    name
        Of the image.
    facts
        Of the newest journal, see `Journal`.
    changes
        In their order.
    time
        When the last one was written.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    changes: list[Change] = field(repr=False)
    time: datetime

    @property
    def n_strokes(self) -> int:
        """Strokes in it; a change that was not painted by hand counts as one."""
        return sum(max(change.n_strokes, 1) for change in self.changes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the labels."""
        return tuple(self.facts["shape"])

    def discard(self) -> None:
        """Delete the journals.

        Raises
        ------
        LockedError
            If somebody goes on with them.
        """
        lock = Lock(self.folder)
        for path in journal_files(self.folder):
            path.unlink(missing_ok=True)
        lock.close(delete=True)


def read_leftover(folder: Path) -> Leftover | None:
    """Unsaved changes in the folder of an image, or None.

    Without the lock on the folder it may be that they are being saved: journals that go while
    they are read are none any more.

    Raises
    ------
    DataError
        If a journal cannot be read.
    """
    facts: dict[str, Any] = {}
    changes: list[Change] = []
    last = 0.0
    for path in journal_files(folder):
        try:
            journal, time = read_journal(path), path.stat().st_mtime
        except (DataError, FileNotFoundError):
            if path.exists():
                raise
            continue
        changes += journal.changes
        facts = journal.facts or facts
        last = max(last, time)
    if not changes:
        return None
    name = str(facts.get("name", folder.name))
    return Leftover(folder, name, facts, changes, datetime.fromtimestamp(last, UTC))


def find_leftovers(root: Path) -> tuple[list[Leftover], list[str]]:
    """Unsaved changes below a folder that no running program holds, newest first; and problems."""
    found: list[Leftover] = []
    problems: list[str] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not journal_files(folder):
            continue
        try:
            with Lock(folder):
                leftover = read_leftover(folder)
        except DataError as error:
            if not isinstance(error, LockedError):
                problems.append(str(error))
            continue
        if leftover is not None:
            found.append(leftover)
    return sorted(found, key=lambda leftover: leftover.time, reverse=True), problems


class LockedError(DataError):
    """Somebody else holds the lock."""


class Lock:
    """Lock on a folder, held until it is closed or the process ends, however it ends.

    Where the file system knows no locks nobody is kept out.

    Parameters
    ----------
    folder
        Made if it is not there.
    name
        Of the file in it that is locked.
    what
        Is done to it by whoever holds the lock, for messages.

    Raises
    ------
    LockedError
        If somebody else holds it, in this process or another.
    DataError
        If the file cannot be made.
    """

    def __init__(
        self, folder: Path, name: str = "lock", *, what: str = "is being annotated"
    ) -> None:
        path = folder / name
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Not what a link leads to, which would be written over.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
            except OSError as error:
                raise DataError(f"{path}: cannot be written: {error.strerror}") from error
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise DataError(f"{path}: no file; take it away")
                if not _lock_file(descriptor):
                    raise LockedError(f"{folder.name}: {what} by {_holder(path)}")
                # Whoever held it before may have deleted the file between opening and locking.
                if _is_same_file(descriptor, path):
                    break
            except DataError:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._descriptor: int | None = descriptor
        self._path = path
        with suppress(OSError):  # the disk may be full; who holds it is only for messages
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    @property
    def is_in_place(self) -> bool:
        """Whether the file still is where it was made, and held."""
        return self._descriptor is not None and _is_same_file(self._descriptor, self._path)

    def close(self, *, delete: bool = False) -> None:
        """Let go; ``delete`` removes the file and, if it is empty, the folder."""
        if self._descriptor is None:
            return
        if delete:
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def new_facts(shape: Sequence[int], name: str, **more: Any) -> dict[str, Any]:
    """First record of a journal."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"shape": list(shape), "name": name, "time": time, **more}


def changed_box(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[slice, slice] | None:
    """Smallest box outside which two planes are equal; None where they are equal everywhere."""
    differs = before != after
    rows = np.flatnonzero(differs.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(differs[rows[0] : rows[-1] + 1].any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _payload(facts: dict[str, Any], packed: bytes) -> bytes:
    return json.dumps(facts).encode() + b"\n" + packed


def _framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _holder(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip() or "another program"
    except (OSError, UnicodeDecodeError):
        return "another program"


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


if sys.platform == "win32":

    def _lock_file(descriptor: int) -> bool:
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # past the text, which others are to read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:

    def _lock_file(descriptor: int) -> bool:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True
