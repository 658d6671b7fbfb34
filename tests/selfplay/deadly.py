"""A task whose every seventh problem of some splits ends the process that searches it."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from mcts.tasks.countdown import Countdown
from mcts.types import Problem, Verdict

EVERY = 7


def kills(problem: Problem) -> bool:
    return sum(problem.id.encode()) % EVERY == 0


class Deadly(Countdown):
    """Countdown of three numbers with few problems."""

    def __init__(self, splits: Sequence[str] = ("train",)) -> None:
        super().__init__(numbers=3, heldout_problems=24, dev_problems=16)
        self._deadly = {p.id for split in splits for p in super(Deadly, self).problems(split) if kills(p)}

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:
        if problem.id in self._deadly:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a fault would
        return super().check_step(problem, steps)
