"""What the driver makes of the answers of processes that work as one: a result, an error of them all, or a group that
is of no use any more. No Ray.

Such processes wait for each other, so one that fails alone leaves the others waiting: then all of them are ended, and
what it failed with is the reason.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from selfplay.group import GroupBroken, GroupLost

MOMENT = 5.0
"""Seconds after the first bad news of a call in which its other ranks may answer: they are well then, or know more of
the cause."""


class Died(RuntimeError):
    """A process of the group has ended."""


class CrewLost(RuntimeError):
    """The processes are of no use any more, for the reason that it says, and have been ended."""


@dataclass(slots=True, eq=False)
class _Call:
    size: int
    missing: int
    """Ranks that have not answered."""
    result: Future[Any] = field(default_factory=Future)
    news: dict[int, BaseException] = field(default_factory=dict)
    """Errors by rank."""
    due: float = math.inf
    """When it is judged at the latest."""

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class Crew:
    """Processes that are sent each call together. `end` ends them all; it is called from a thread of the crew's, which
    completes the results too."""

    def __init__(self, end: Callable[[], None], *, moment: float = MOMENT) -> None:
        self._end = end
        self._moment = moment
        self._lock = threading.Lock()
        self._calls: list[_Call] = []
        self._answered: queue.SimpleQueue[tuple[_Call, int, Future[Any]] | None] = queue.SimpleQueue()
        self.lost: str | None = None
        """Why the processes are of no use any more; None while they are."""
        self._thread = threading.Thread(target=self._listen, name="crew", daemon=True)
        self._thread.start()

    def call(self, answers: Sequence[Future[Any]]) -> Future[Any]:
        """What comes of a call, given each rank's answer: rank 0's result, or the error as soon as there is one.

        An error that the ranks told each other, or that is meant for users, is raised as it is; CrewLost where a rank
        died, or failed and could not tell the others.
        """
        call = _Call(len(answers), len(answers))
        with self._lock:
            if self.lost is not None:
                call.fail(CrewLost(self.lost))
                return call.result
            self._calls.append(call)
        for rank, answer in enumerate(answers):
            answer.add_done_callback(partial(self._arrived, call, rank))
        return call.result

    def _arrived(self, call: _Call, rank: int, answer: Future[Any]) -> None:
        self._answered.put((call, rank, answer))

    def close(self) -> None:
        """Take no notice of the processes any more; what has no result yet gets none."""
        self._answered.put(None)
        self._thread.join()

    def _listen(self) -> None:
        while self.lost is None:
            due = min((call.due for call in self._calls), default=math.inf)
            try:
                arrived = self._answered.get(timeout=None if due == math.inf else max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._judge(next(call for call in self._calls if call.due == due))
                continue
            if arrived is None:
                return
            self._take(*arrived)

    def _take(self, call: _Call, rank: int, answer: Future[Any]) -> None:
        call.missing -= 1
        error = answer.exception()
        if error is not None:
            call.news[rank] = error
            call.due = min(call.due, time.monotonic() + self._moment)
        elif rank == 0:
            call.result.set_result(answer.result())
        if not call.missing:
            self._judge(call)

    def _judge(self, call: _Call) -> None:
        """All that will be known of a call is known."""
        with self._lock:
            self._calls.remove(call)
        if not call.news:
            return
        error, lost = judge(call.news, size=call.size, waiting=call.missing)
        if lost:
            with self._lock:
                self.lost = str(error)
            self._end()
        call.fail(error)
        for other in self._calls if lost else ():
            other.fail(CrewLost(self.lost))


def judge(news: Mapping[int, BaseException], *, size: int, waiting: int) -> tuple[BaseException, bool]:
    """The error of a call, given the errors of its ranks and how many of all have not answered, and whether the group
    is lost with it."""
    errors = sorted(news.items())
    broken = [error for _, error in errors if isinstance(error, GroupBroken)]
    if len(broken) == size and len({error.what for error in broken}) == 1:
        return broken[0], True  # every rank's own error: another group would fare no better
    died = [f"learner {rank} died: {error}" for rank, error in errors if isinstance(error, Died)]
    if broken or died:
        return CrewLost("; ".join([*map(str, broken), *died])), True
    own = [error for _, error in errors if not isinstance(error, GroupLost)]
    if own:
        return own[0], waiting > 0
    return CrewLost("; ".join(f"learner {rank} lost the others: {error}" for rank, error in errors)), True
