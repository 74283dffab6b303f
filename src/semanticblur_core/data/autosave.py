"""Autosave of labels while they are painted: differences found by looking, journals, and saving.

The main thread calls `Autosave.poll` about once a second; it compares planes with what is known
and never waits for the disk. Another thread compresses, writes and syncs.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk
from semanticblur_core.data.journal import (
    Change,
    JournalWriter,
    Lock,
    changed_box,
    journal_files,
    new_facts,
    next_journal,
)
from semanticblur_core.data.labels import BLURRED, SHARP
from semanticblur_core.data.store import is_store
from semanticblur_core.errors import DataError

_T = TypeVar("_T")
Plane = tuple[int, ...]
JOURNALS = "journal"
N_RECENT = 20


def user_journals() -> Path:
    """Folder of journals of what is painted outside any store."""
    return disk.user_folder() / JOURNALS


def submit(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> Future[_T]:
    """Work for a thread of the pool; done here and now where Python ends and starts none."""
    try:
        return pool.submit(work)
    except RuntimeError:
        done: Future[_T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done


def _require_fitting(name: str, labels: NDArray[np.uint8], saved: NDArray[np.uint8] | None) -> None:
    if labels.dtype != np.uint8 or labels.ndim < 2:
        raise DataError(f"{name}: expected labels (..., H, W) of uint8, got {labels.dtype}")
    if saved is not None and saved.shape != labels.shape:
        raise DataError(f"{name}: labels of {saved.shape} saved, of {labels.shape} painted")


class Autosave:
    """Keeps the journal of one array of labels.

    Parameters
    ----------
    folder
        Of the journals of this image; made and locked.
    labels
        ``(..., H, W)`` uint8, changed by others meanwhile. Reading it is all that is done here.
    saved
        The same as it is on disk already, journals included; None where nothing is.
    name
        Of the image, for who finds the journals.
    facts
        More JSON values that help to find the image again.
    lock
        On ``folder``, if it is held already: what is on the disk can only be known under it. It is
        let go here at the end, also where this fails.
    store
        Store that ``folder`` is in. Where that is deleted, or its disk unmounted, it is waited for
        and not made again.

    Attributes
    ----------
    labels
        Set it where the array is replaced by another one of that shape.
    counts
        Labelled pixels of each plane, ``(..., 2)``: sharp, blurred. As of the last look.
    error
        Why the last attempt to write failed; empty when all is well.

    Raises
    ------
    LockedError
        If another program, or another viewer, has the image open.
    DataError
        If the folder cannot be made, or the arrays do not fit.
    """

    def __init__(
        self,
        folder: Path,
        labels: NDArray[np.uint8],
        *,
        saved: NDArray[np.uint8] | None = None,
        name: str,
        facts: dict[str, Any] | None = None,
        lock: Lock | None = None,
        store: Path | None = None,
    ) -> None:
        self._lock = lock or Lock(folder)
        try:
            _require_fitting(name, labels, saved)
        except DataError:
            self._lock.close()
            raise
        self.folder, self.labels, self.error = folder, labels, ""
        self._facts = new_facts(labels.shape, name, **(facts or {}))
        # np.zeros takes memory only where it is written, so empty planes cost nothing.
        self._known = np.zeros(labels.shape, np.uint8) if saved is None else saved.copy()
        self.counts = np.zeros((*labels.shape[:-2], 2), np.int64)
        if saved is not None:
            for plane in self._planes():
                self.counts[plane] = [np.count_nonzero(saved[plane] == c) for c in (SHARP, BLURRED)]
        self._unchecked: deque[Plane] = deque()
        self._changed: dict[Plane, None] = {}  # the last one is the latest
        self._round = itertools.cycle(self._planes()) if labels.ndim > 2 else iter(())
        self._n_strokes = 0
        # None ends a file. Only the writing thread takes from the left.
        self._queue: deque[Change | bytes | None] = deque()
        self._writer: JournalWriter | None = None
        self._finished = set(journal_files(folder))  # nothing is appended to these any more
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="semanticblur-autosave")
        self._writing: Future[None] | None = None
        self._store = store
        self._is_lost = False  # the journals were deleted, with their folder perhaps
        self._is_closed = False

    def stroke_ended(self) -> None:
        """Note that a stroke was painted, for the count that a recovery shows."""
        self._n_strokes += 1

    def look_everywhere(self) -> None:
        """Let `poll` go through all planes: any may have changed, as by undo.

        Those that changed last come first. Planes that wait already keep their turn, or a slider
        that moves would starve the last.
        """
        recent = list(self._changed)[: -N_RECENT - 1 : -1]
        self._unchecked = deque(dict.fromkeys((*recent, *self._unchecked, *self._planes())))

    def poll(self, shown: Plane | None = None, *, budget_s: float = 0.02) -> bool:
        """Find changes and have them written.

        Parameters
        ----------
        shown
            Plane to look at first; None looks everywhere.
        budget_s
            Time after which the rest is left to the next call.

        Returns
        -------
        bool
            Whether planes are left to look at: call again soon.
        """
        until = time.perf_counter() + budget_s
        if shown is None:
            if not self._unchecked:
                self.look_everywhere()
        else:
            self._look_at(shown)
        while self._unchecked:
            self._look_at(self._unchecked.popleft())
            if time.perf_counter() > until:
                break
        else:
            for plane in itertools.islice(self._round, 1):
                self._look_at(plane)
        self._write_soon()
        return bool(self._unchecked)

    def finish_looking(self) -> None:
        """Look everywhere, now, however long it takes."""
        self.look_everywhere()
        while self.poll((0,) * (self.labels.ndim - 2), budget_s=1):
            pass

    @property
    def has_unsaved(self) -> bool:
        """Whether anything was changed that is only in memory or in journals."""
        return bool(self._queue or self._finished or self._writer)

    @property
    def is_written(self) -> bool:
        """Whether all that was found is on the disk, in journals."""
        return not self._queue and (self._writing is None or self._writing.done())

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Wait until all that was found is on the disk; whether it is."""
        until = time.monotonic() + timeout_s
        self._write_soon(if_there=True)
        while not self.is_written and time.monotonic() < until:
            self._write_soon()
            if self._writing is not None:
                with suppress(TimeoutError):
                    self._writing.result(max(0.0, until - time.monotonic()))
            if self.error:
                break
        return self.is_written

    def save(self, write: Callable[[NDArray[np.uint8]], Any]) -> Callable[[], None]:
        """Prepare saving: call the result, in a thread of your own.

        Parameters
        ----------
        write
            Gets a copy of the labels and writes them elsewhere, durably. What was in journals
            until now is deleted when it returns, and kept when it raises.
        """
        self.finish_looking()
        self._queue.append(None)
        self._write_soon()

        def run() -> None:
            self.flush(timeout_s=30)
            finished = set(self._finished)
            # Planes are copied while others may come to be known. Those changes are also in the
            # next journal, and replaying it on labels that have them already does no harm.
            write(self._known.copy())
            # The oldest first: one that is left behind alone would bring its strokes back.
            for path in sorted(finished):
                path.unlink(missing_ok=True)
            self._finished -= finished

        return run

    def discard(self) -> None:
        """Let go of the lock and delete the journals: what was in them is elsewhere now."""
        self.close()
        for path in journal_files(self.folder):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Let go of the lock; journals that were not saved stay."""
        if self._is_closed:
            return
        self.flush(timeout_s)
        self._is_closed = True
        self._thread.shutdown(wait=False)
        if self._writer is not None and (self._writing is None or self._writing.done()):
            self._writer.close()
        self._lock.close(delete=not journal_files(self.folder))

    def _planes(self) -> Iterator[Plane]:
        return iter(np.ndindex(self.labels.shape[:-2]))

    def _look_at(self, plane: Plane) -> None:
        now, known = self.labels[plane], self._known[plane]
        box = changed_box(known, now)
        if box is None:
            return
        self._changed.pop(plane, None)
        self._changed[plane] = None
        content = now[box].copy()
        for i, code in enumerate((SHARP, BLURRED)):
            more = np.count_nonzero(content == code) - np.count_nonzero(known[box] == code)
            self.counts[(*plane, i)] += more
        known[box] = content
        top, left = (part.start for part in box)
        self._queue.append(Change(plane, top, left, content, self._n_strokes))
        self._n_strokes = 0

    def _write_soon(self, *, if_there: bool = False) -> None:
        """Write what is queued; ``if_there`` also sees whether what was written is still there."""
        idle = self._writing is None or self._writing.done()
        due = self._queue or (if_there and self.has_unsaved)
        if due and idle and not self._is_closed:
            self._writing = submit(self._thread, self._write)

    # The writing thread.

    def _write(self) -> None:
        """Write what is queued; what cannot be written stays queued for the next attempt."""
        try:
            self._require_place()
            while self._queue:
                if self._queue[0] is None:
                    self._end_file()
                else:
                    self._write_batch()
        except Exception as error:  # nobody else would tell of it
            self.error = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            self.error = ""

    def _require_place(self) -> None:
        """Begin again where the journals are gone: all labels are queued before what waits.

        Raises
        ------
        DataError
            If the store is gone too, or the folder cannot be made and locked.
        """
        is_there = self._lock.is_in_place and (self._writer is None or self._writer.is_in_place)
        if not is_there and not self._is_lost:
            self._is_lost = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            # What is painted meanwhile comes after these, and is replayed after them.
            self._queue.extendleft(
                Change(plane, 0, 0, self._known[plane].copy())
                for plane in self._planes()
                if self.counts[plane].any() or plane in self._changed
            )
        if not self._is_lost:
            return
        if self._store is not None and not is_store(self._store):
            raise DataError(f"{self._store} is gone; bring it back, or save in another store")
        if not self._lock.is_in_place:
            self._lock.close()
            self._lock = Lock(self.folder)
        self._finished = set(journal_files(self.folder))
        self._is_lost = False

    def _write_batch(self) -> None:
        batch: list[bytes] = []
        for i in range(len(self._queue)):
            item = self._queue[i]
            if item is None:
                break
            if isinstance(item, Change):
                item = self._queue[i] = item.to_bytes()
            batch.append(item)
        if self._writer is None:
            self._writer = JournalWriter(next_journal(self.folder), self._facts)
        self._writer.append(batch)
        for _ in batch:
            self._queue.popleft()

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._finished.add(self._writer.path)
            self._writer = None
        self._queue.popleft()
