"""A fleet of make-believe workers in make-believe time, for tests of the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mcts.types import Problem
from selfplay.config import Part, SearchConfig
from selfplay.fleet import (
    Alive,
    Alone,
    Casualty,
    Cause,
    Finished,
    FleetEvent,
    Lost,
    Order,
    Ready,
    Record,
    work_of,
)
from selfplay.supervisor import Supervisor
from selfplay.worker import Answered, EvaluationJob, Played, Unit

BEAT = 5.0


def make_unit(part: int, problems: int = 8, iteration: int = 1) -> Unit:
    names = [f"i{iteration}p{part}-{k}" for k in range(problems)]
    return Unit(iteration, part, tuple(Problem(id=name, prompt=name) for name in names), 0)


def make_evaluation(part: str, problems: int = 1, version: int = 0) -> EvaluationJob:
    search = SearchConfig(strategy=Part(name="best_of_n"), budget=8)
    names = [f"{part}-{k}" for k in range(problems)]
    return EvaluationJob(tuple(Problem(id=name, prompt=name) for name in names), search, 0, version, part)


def answer_of(problem: Problem, failed: str | None = None) -> Answered:
    won = failed is None
    status = "correct" if won else "none"
    return Answered(problem.id, won, status, False, 8, 1, won, 2, 2, failed, 0.1, given_up=not won)


class FakeFleet:
    """Each worker plays one order at a time, `seconds` per problem; `deadly` problems end the worker that plays them.

    Attributes may be changed while it runs: `size` for nodes that join and leave, `frozen` for workers that stop
    without ending; `strikes` for problems alone that are killed from outside before one ends by itself.
    """

    def __init__(self, size: int, *, seconds: float = 1.0, deadly: Sequence[str] = ()) -> None:
        self.size = size
        self.seconds = seconds
        self.deadly = set(deadly)
        self.now = 0.0
        self.living: dict[int, list[tuple[int, Order]]] = {}  # worker: its orders
        self.frozen: set[int] = set()
        self.strikes = 0
        self.busy: dict[int, float] = {}  # worker: when its first order is done
        self.queue: list[FleetEvent] = []
        self.sent: list[tuple[int, Order]] = []
        self.started = 0
        self.beaten = 0.0
        self.disturb: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def supervisor(self, **settings: Any) -> Supervisor:
        chosen = {"restarts": 8, "lease_seconds": 1000.0, "silence_seconds": 30.0, "deaths_alone": 2, **settings}
        supervisor = Supervisor(self, self.clock, **chosen)
        supervisor.version = 0
        return supervisor

    def wanted(self) -> int:
        return self.size

    def start(self) -> int:
        number, self.started = self.started, self.started + 1
        self.living[number] = []
        self.queue.append(Ready(number, f"node-{number % 3}"))
        return number

    def send(self, worker: int, lease: int, order: Order) -> None:
        self.sent.append((worker, order))
        if worker in self.living:
            self.living[worker].append((lease, order))
            self.busy.setdefault(worker, self.now + self._cost(order))

    def _cost(self, order: Order) -> float:
        if isinstance(order, Record):
            return 0.1
        return self.seconds * len(work_of(order).problems)

    def kill(self, worker: int) -> None:
        self.living.pop(worker, None)
        self.busy.pop(worker, None)
        self.frozen.discard(worker)

    def die(self, worker: int, cause: Cause = Cause.DIED) -> None:
        self.kill(worker)
        self.queue.append(Lost(worker, cause, "tested"))

    def events(self, seconds: float) -> Sequence[FleetEvent]:
        if not self.queue:
            self.now += seconds
            self.disturb()
            for worker in [w for w, due in self.busy.items() if due <= self.now and w not in self.frozen]:
                self._finish(worker)
            if self.now - self.beaten >= BEAT:
                self.beaten = self.now
                self.queue += [Alive(w) for w in self.living if w not in self.frozen]
        found, self.queue = self.queue, []
        return found

    def _finish(self, worker: int) -> None:
        lease, order = self.living[worker].pop(0)
        del self.busy[worker]
        if self.living[worker]:
            self.busy[worker] = self.now + self._cost(self.living[worker][0][1])
        work = work_of(order)
        kills = any(problem.id in self.deadly for problem in work.problems) and not isinstance(order, Record)
        if kills and isinstance(order, Alone):
            own, self.strikes = self.strikes == 0, max(0, self.strikes - 1)
            self.queue.append(Finished(worker, lease, Casualty("signal SIGSEGV" if own else "signal SIGKILL", own=own)))
        elif kills:
            self.die(worker)
        elif isinstance(work, EvaluationJob):
            reason = order.reason if isinstance(order, Record) else None
            self.queue.append(Finished(worker, lease, [answer_of(problem, reason) for problem in work.problems]))
        else:
            self.queue.append(Finished(worker, lease, Played(work, f"{work.name}-{lease}", 1.0)))
