"""Runs in the background, without a viewer."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from napari_semanticblur._worker import Failure, Run


def test_what_is_under_way_ends_in_the_thread_that_does_it(qtbot: Any) -> None:
    """Ending may take a while, and may fail; neither is the window's affair."""
    where: list[threading.Thread] = []

    def work() -> Iterator[int]:
        try:
            while True:
                time.sleep(0.01)
                yield 1
        finally:
            where.append(threading.current_thread())
            time.sleep(0.3)
            raise OSError("no more room")

    updates: list[int] = []
    outcomes: list[str | Failure] = []

    def update(given: int) -> int:
        updates.append(given)
        return len(updates)

    run = Run(work, title=None, n_steps=1, on_update=update, on_end=outcomes.append)
    run.start()
    qtbot.waitUntil(lambda: len(updates) > 2, timeout=5000)
    run.cancel()
    qtbot.waitUntil(lambda: bool(outcomes), timeout=5000)
    assert outcomes == ["cancelled"]
    assert len(where) == 1
    assert where[0] is not threading.main_thread()


def test_errors_are_failures_with_a_reason(qtbot: Any) -> None:
    outcomes: list[str | Failure] = []

    def work() -> Iterator[int]:
        yield 1
        raise RuntimeError("out of memory\nat length")

    run = Run(work, title=None, n_steps=1, on_update=lambda _: 1, on_end=outcomes.append)
    run.start()
    qtbot.waitUntil(lambda: bool(outcomes), timeout=5000)
    assert outcomes == [Failure("out of memory")]


@pytest.mark.parametrize("by_napari", [True, False])
def test_one_that_napari_ended_says_so(qtbot: Any, by_napari: bool) -> None:
    def work() -> Iterator[int]:
        while True:
            time.sleep(0.01)
            yield 1

    outcomes: list[str | Failure] = []
    run = Run(work, title=None, n_steps=1, on_update=lambda _: 1, on_end=outcomes.append)
    run.start()
    run._worker.quit() if by_napari else run.cancel()
    qtbot.waitUntil(lambda: bool(outcomes), timeout=5000)
    assert outcomes == ["cancelled"]
    assert run.why_cancelled.startswith("napari ended it because a window") == by_napari
