"""A core generator in a napari worker: progress in the activity dock, cancel, errors as lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from semanticblur_core.errors import SemanticBlurError

_log = logging.getLogger(__name__)
# With a window it ends the runs that began while that was the one in front, of whichever viewer.
_BY_NAPARI = "napari ended it because a window was closed; run it again"


@dataclass(frozen=True)
class Announcement:
    """A word on what is happening before the first result."""

    text: str


@dataclass(frozen=True)
class Failure:
    """Why a run ended early, in one line."""

    text: str


def guarded(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What ``make`` yields; an error becomes a last `Failure`.

    None may leave the generator. The worker takes a RuntimeError, which torch raises when memory
    runs out, for its own deletion and ends in silence; any other is raised again in Qt's event
    loop, which shows it twice or, without napari's hook for exceptions, ends the process.
    """
    try:
        yield from make()
    except Exception as error:
        if isinstance(error.__context__, GeneratorExit):  # of clearing up: nobody waits for it
            _log.exception("error at the end of a run")
            return
        yield Failure(_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, SemanticBlurError):
        return str(error)
    if isinstance(error, (MemoryError, OSError, RuntimeError)):
        return (str(error) or type(error).__name__).splitlines()[0]
    _log.error("unforeseen error in the background", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _each(steps: Iterator[Any]) -> Iterator[Any]:
    yield from steps


class Run:
    """One run in the background.

    Parameters
    ----------
    make
        Makes the generator; called in the worker's thread, so imports in it do not block.
    title
        Name in the activity dock; None for none there. While anything is, napari draws its window
        20 times a second, half a core's work where no graphics card does it.
    n_steps
        Steps for the progress bar.
    on_update
        Called in the main thread with each thing yielded, but for failures.
    on_end
        Called once in the main thread with "done", "cancelled" or a `Failure`.
    on_cancel
        Called by the button beside the bar in the activity dock; None gives none.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        *,
        title: str | None,
        n_steps: int,
        on_update: Callable[[Any], int],
        on_end: Callable[[str | Failure], None],
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        from napari.qt.threading import create_worker
        from qtpy.QtCore import Qt

        self._make_bar = partial(_progress_bar, title, n_steps, on_cancel)
        self._on_update, self._on_end = on_update, on_end
        self._outcome: str | Failure = "cancelled"
        self._progress: Any = None
        self._is_cancelled = False
        steps: Any = guarded(make)
        self._worker = create_worker(_each, steps, _start_thread=False)
        # Qt keeps workers, but not with them what they were to tell: a dock that was closed. In
        # their own thread, since what is under way may take a while to end.
        self._worker.aborted.connect(steps.close, Qt.ConnectionType.DirectConnection)
        self._worker.yielded.connect(self._yielded)
        self._worker.returned.connect(self._returned)
        self._worker.finished.connect(self._finished)
        self._ended = self._advancing = False

    def start(self) -> None:
        """Start the thread; call it last, when it is noted that this runs.

        napari handles events as it makes its bar: a second click on a button, a window that closes.
        """
        self._progress = self._make_bar()
        self._worker.start()

    def cancel(self) -> None:
        """Ask to stop at the next tile or plane."""
        self._is_cancelled = True
        self._worker.quit()

    @property
    def why_cancelled(self) -> str:
        """Reason for people where it was not `cancel` that ended a run that was cancelled."""
        return "" if self._is_cancelled else _BY_NAPARI

    def _yielded(self, update: Any) -> None:
        if isinstance(update, Failure):
            self._outcome = update
        elif not self._worker.abort_requested:
            self._advance(self._on_update(update))

    def _advance(self, n_done: int) -> None:
        """Move napari's bar, which handles events as it draws: updates that wait come in nested.

        Those must not draw in turn, or quick steps nest until Python gives up.
        """
        if self._advancing or self._progress is None or n_done <= self._progress.n:
            return
        self._advancing = True
        try:
            self._progress.update(n_done - self._progress.n)
        finally:
            self._advancing = False

    def _returned(self, _: Any) -> None:
        if not isinstance(self._outcome, Failure):
            self._outcome = "done"

    def _finished(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._progress is not None:
            self._progress.close()
        try:
            self._on_end(self._outcome)
        finally:
            self._progress = None
            del self._on_update, self._on_end, self._make_bar


def _progress_bar(title: str | None, n_steps: int, on_cancel: Callable[[], None] | None) -> Any:
    """A bar in the activity dock, with a button to cancel if that does something; or None."""
    from napari.utils import cancelable_progress, progress

    if title is None:
        return None
    if on_cancel is None:
        return progress(total=n_steps, desc=title)
    act = on_cancel

    class Bar(cancelable_progress):  # type: ignore[misc]
        def cancel(self) -> None:
            super().cancel()
            act()

    return Bar(total=n_steps, desc=title)
