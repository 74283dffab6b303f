"""Stopping in order."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

_T = TypeVar("_T")


class Stop:
    """Ctrl+C, and what ends a batch job or a container (SIGTERM): both stop in order.

    While a result is told of, they wait, so that no report lacks it.

    Parameters
    ----------
    at_steps
        The first of them is only noted in `is_asked_for`, for a loop that looks at each step.
    one_asking_s
        What comes so soon after it counts as the same: ``torchrun`` passes on what its processes
        got already.
    """

    def __init__(self, *, at_steps: bool = False, one_asking_s: float = 0.0) -> None:
        self._is_busy = self.is_asked_for = False
        self._at_steps, self._one_asking_s = at_steps, one_asking_s
        self._asked_at = -math.inf

    def __call__(self, *_: object) -> None:
        if self._at_steps and not self.is_asked_for:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at < self._one_asking_s:
            return
        elif not self._is_busy:
            raise KeyboardInterrupt
        self.is_asked_for = True

    @contextmanager
    def heeded(self) -> Iterator[None]:
        names = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not what runs under `&`
            names.append(signal.SIGINT)
        before = {name: signal.signal(name, self) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def each(self, coming: Generator[_T]) -> Iterator[_T]:
        """The results, and when it is asked to stop, those that are there already."""
        with suppress(StopIteration):
            while True:
                self._is_busy = False
                if self.is_asked_for:
                    self.is_asked_for = False
                    result = coming.throw(KeyboardInterrupt)
                else:
                    result = next(coming)
                self._is_busy = True
                yield result
