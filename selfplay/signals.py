"""Ctrl-C and SIGTERM: what is under way is saved first, within the grace time; a second signal ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(BaseException):
    """The process was asked to end. No Exception: nothing but the command itself answers it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stoppable(Protocol):
    def stop(self) -> bool:
        """Ask for an end that saves first. False: there is nothing to save. Only sets flags: a signal handler calls
        it."""
        ...


class Grace:
    """The number of the signal that asked for the end; None: none did."""

    asked: int | None = None


@contextmanager
def graceful(work: Stoppable, grace_seconds: float) -> Iterator[Grace]:
    """Inside, SIGINT and SIGTERM ask `work` to stop. `Stopped` is raised where it has nothing to save, at a second
    signal, and when the grace time is over; otherwise `work` ends by itself."""
    grace = Grace()

    def asked(number: int, _frame: FrameType | None) -> None:
        again = grace.asked is not None
        grace.asked = number
        if again or not work.stop():
            raise Stopped(number)
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    def late(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(grace.asked or signal.SIGTERM)

    before = {number: signal.signal(number, asked) for number in EXIT_CODES}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, late)
    try:
        yield grace
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
