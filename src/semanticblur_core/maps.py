"""Maps on disk while they are made, in pieces that outlive a process that is stopped."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk
from semanticblur_core.errors import ImageError

# What a process that is killed loses of its work, at most, beside the strip or plane it was at.
KEEP_S = 20.0
_KEPT = re.compile(r"^(\d+)-(\d+)\.json$")
_COPIED_BYTES = 2**22
_ANY_KEY = "[0-9a-f]" * 8


class KeepClock:
    """Tells when it is time to keep what was made."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """It was kept now."""
        self._kept_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._kept_at >= KEEP_S


@dataclass(frozen=True)
class _Piece:
    """Rows that are made, and what was noted of them."""

    start: int
    stop: int
    path: Path
    notes: Any


@dataclass
class MapFile:
    """A float32 map in a folder, made of pieces of whole rows; see `new_map` and `kept_map`.

    Rows are counted over all planes. Plain reading and writing, no memory map, whose pages would
    count as memory in use.

    Attributes
    ----------
    folder
        Where the pieces are.
    shape
        Walked axes, then rows and columns.
    """

    folder: Path
    shape: tuple[int, ...]
    _pieces: list[_Piece] = field(default_factory=list)
    _stream: BinaryIO | None = None
    _start: int | None = None
    _n_bytes: int = 0

    def __post_init__(self) -> None:
        for piece in sorted(self._found(), key=lambda piece: (piece.start, -piece.stop)):
            # Two runs may have cut it in different places.
            if piece.start >= (self._pieces[-1].stop if self._pieces else 0):
                self._pieces.append(piece)

    @property
    def n_rows(self) -> int:
        """Of all planes."""
        return math.prod(self.shape[:-1])

    @property
    def next_row(self) -> int:
        """The row that `append` adds next."""
        if self._start is None:
            return next((rows.start for rows in self.missing()), self.n_rows)
        return self._start + self._n_bytes // self._row_bytes

    def missing(self, wanted: range | None = None) -> list[range]:
        """Rows that are still to be made, of those that are wanted: of all."""
        wanted = range(self.n_rows) if wanted is None else wanted
        gaps, start = [], wanted.start
        for piece in self._pieces:
            gaps.append(range(start, min(piece.start, wanted.stop)))
            start = max(start, piece.stop)
        gaps.append(range(start, wanted.stop))
        return [gap for gap in gaps if len(gap)]

    def begin(self, row: int) -> None:
        """Make `append` go on at a row."""
        self.end()
        self._start = row

    def append(self, rows: NDArray[np.float32]) -> None:
        """Add the next rows, ``(n, W)``; a plane follows the one before."""
        if self._start is None:
            self._start = self.next_row
        if self._stream is None:
            temporary = disk.temporary_name(self.folder / f"{self._start}.rows")
            self._stream = temporary.open("wb")
        self._n_bytes += self._stream.write(np.ascontiguousarray(rows, dtype=np.float32).data)

    def end(self, notes: Any = None, *, keep: bool = False) -> None:
        """End a piece: what is appended next is another one.

        Parameters
        ----------
        notes
            Of what is in it, for `notes`; numbers, text, lists and dicts of them.
        keep
            It is on the disk for good, whatever becomes of this process.
        """
        if self._stream is None or self._start is None:
            self._start = None
            return
        stream, start, stop = self._stream, self._start, self.next_row
        stream.flush()
        if keep:
            os.fsync(stream.fileno())
        stream.close()
        self._stream, self._start, self._n_bytes = None, None, 0
        path = Path(stream.name).replace(self.folder / f"{start}-{stop}.rows")
        if keep:
            disk.write_text(path.with_suffix(".json"), json.dumps(notes), durable=True)
        self._pieces.append(_Piece(start, stop, path, notes))
        self._pieces.sort(key=lambda piece: piece.start)

    def notes(self) -> list[Any]:
        """Those of the pieces, in the order of their rows."""
        return [piece.notes for piece in self._pieces]

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """What was found out about the map before; made, and remembered, where it was not."""
        path = self.folder / f"{name}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        found = make()
        disk.write_text(path, json.dumps(found))
        return found

    def read(self, index: Sequence[int], rows: slice) -> NDArray[np.float32]:
        """Rows of one plane, ``(n, W)``."""
        self.end()
        height, width = self.shape[-2:]
        first, stop, _ = rows.indices(height)
        plane = int(np.ravel_multi_index(tuple(index), self.shape[:-2])) if len(index) else 0
        first, stop = plane * height + first, plane * height + stop
        found = np.empty((stop - first, width), np.float32)
        n_read = 0
        for piece in self._pieces[bisect(self._pieces, first, key=lambda p: p.start) - 1 :]:
            begin, end = max(first, piece.start), min(stop, piece.stop)
            if begin >= end:
                break
            with piece.path.open("rb") as stream:
                stream.seek((begin - piece.start) * self._row_bytes)
                n_read += stream.readinto(found[begin - first : end - first].data.cast("B"))
        if n_read != found.nbytes:
            raise OSError(f"{self.folder}: {found.nbytes - n_read} bytes of a map are gone")
        return found

    def copy_to(self, stream: BinaryIO) -> None:
        """All values, as bytes."""
        self.end()
        for piece in self._pieces:
            with piece.path.open("rb") as source:
                shutil.copyfileobj(source, stream, _COPIED_BYTES)

    def close(self) -> None:
        """Delete the piece that is being made."""
        if self._stream is not None:
            with suppress(OSError):  # a full disk, of which the writer was told
                self._stream.close()
            Path(self._stream.name).unlink(missing_ok=True)
            self._stream = None

    @property
    def _row_bytes(self) -> int:
        return self.shape[-1] * 4

    def _found(self) -> Iterator[_Piece]:
        """Pieces that were kept, by this process or another."""
        for path in self.folder.iterdir():
            match = _KEPT.match(path.name)
            if match is None:
                continue
            start, stop = map(int, match.groups())
            data = path.with_suffix(".rows")
            with suppress(OSError, ValueError):
                notes = json.loads(path.read_text(encoding="utf-8"))
                is_whole = data.stat().st_size == (stop - start) * self._row_bytes
                if is_whole and 0 <= start < stop <= self.n_rows:
                    yield _Piece(start, stop, data, notes)


@contextmanager
def new_map(path: Path, shape: tuple[int, ...]) -> Iterator[MapFile]:
    """A map on disk beside ``path``, gone when the block ends.

    Raises
    ------
    ImageError
        If there is no room for it.
    """
    folder = disk.temporary_name(path, "map.part")
    try:
        with _used(folder, path), _map_in(folder, path, shape) as maps:
            yield maps
    finally:
        disk.remove_unused(folder, own=True)


@contextmanager
def kept_map(
    path: Path, shape: tuple[int, ...], key: str, *, stays: bool = False, fresh: bool = False
) -> Iterator[MapFile]:
    """A map on disk beside ``path``, of which pieces may be there; several may make it at once.

    Parameters
    ----------
    path, key, stays, fresh
        As of `kept`.
    shape
        Of the map.

    Raises
    ------
    ImageError
        If there is no room for it.
    """
    with (
        kept(path, key, stays=stays, fresh=fresh) as folder,
        _map_in(folder, path, shape) as maps,
    ):
        yield maps


@contextmanager
def kept(path: Path, key: str, *, stays: bool = False, fresh: bool = False) -> Iterator[Path]:
    """A hidden folder beside ``path`` for pieces of work that outlive a block that fails.

    Parameters
    ----------
    path
        Where the result is to be, of any suffix.
    key
        Eight hexadecimal digits: others where the result would be another.
    stays
        Whether what was kept is to be there when the block ends well, too.
    fresh
        Forget what was kept before.

    Raises
    ------
    ImageError
        If nothing can be written there.
    """
    folder = kept_folder(path, key)
    is_over = False
    try:
        with _used(folder, path):
            for piece in _kept_in(folder) if fresh else ():
                piece.unlink()
            yield folder
            is_over = not stays
    finally:
        if is_over:
            disk.remove_unused(folder, own=True)
            if disk.shortened(path.stem) == path.stem:  # else it may be another's
                # Nor will anybody go on with what was kept of other settings.
                for other in folder.parent.glob(kept_folder(path, _ANY_KEY, escaped=True).name):
                    disk.remove_unused(other)
        elif not is_kept(folder):
            disk.remove_unused(folder, own=True)


def kept_folder(path: Path, key: str, *, escaped: bool = False) -> Path:
    """Folder of the pieces of what is to be ``path``, whatever its suffix."""
    stem = disk.shortened(path.stem)
    return path.with_name(f".{glob.escape(stem) if escaped else stem}.{key}.map.part")


def is_kept(folder: Path) -> bool:
    """Whether a folder holds pieces that were kept."""
    return bool(_kept_in(folder))


def tidy(folder: Path) -> None:
    """Delete pieces that processes were ended in, of a folder that no process uses."""
    kept_rows = {path.with_suffix(".rows") for path in _kept_in(folder)}
    for path in folder.iterdir():
        if path.suffix == ".part" or (path.suffix == ".rows" and path not in kept_rows):
            path.unlink(missing_ok=True)


def tidy_unused(folder: Path) -> None:
    """As `tidy`, where no process uses it."""
    with suppress(OSError), disk.in_use(folder, tidy):
        pass


def _kept_in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if _KEPT.match(path.name)]
    return []


@contextmanager
def _used(folder: Path, path: Path) -> Iterator[None]:
    """A folder, made if it is not there, that nobody else deletes."""
    with ExitStack() as resources:
        try:
            resources.enter_context(disk.in_use(folder, tidy))
        except OSError as error:  # one that is there may be another user's
            raise disk.unwritable(folder if folder.is_dir() else path, error) from error
        try:
            yield
        except OSError as error:
            raise disk.unwritable(path, error) from error


@contextmanager
def _map_in(folder: Path, path: Path, shape: tuple[int, ...]) -> Iterator[MapFile]:
    maps = MapFile(folder, shape)
    missing = sum(map(len, maps.missing())) * shape[-1] * 4
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ImageError(
            f"{path}: a map of {missing / 2**20:,.1f} MiB does not fit on the disk, "
            f"{free / 2**20:,.1f} MiB are free"
        )
    try:
        yield maps
    finally:
        maps.close()
