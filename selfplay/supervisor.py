"""Who plays what: leases of work to workers that may die, fall silent or be cut off. No Ray, and no clock of its own.

Every piece of work is leased to one worker at a time. A lease ends with its result, with its worker's end, or at its
deadline; what was lost goes to another worker, and a result that comes from a lease that ended is dropped, so each
piece is delivered exactly once.

A unit or an evaluation whose worker died, or did not end in time, may hold a problem that kills. After the second such
death it is cut in half, each half goes to a worker that holds nothing else, and a half that kills is cut again
(`pieces`). A single problem is searched in a process of its own, so that what ended it is known: only deaths that the
process brought on itself count, never the loss of a node, an ended lease, or a signal from outside. After
`deaths_alone` of them the problem is recorded as failed, with the reason, and the run goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from selfplay.fleet import (
    Casualty,
    Cause,
    Evaluated,
    Finished,
    Fleet,
    FleetEvent,
    Lost,
    Order,
    Raised,
    Ready,
    Record,
    Result,
    Work,
    work_of,
)
from selfplay.pieces import Complete, Job, Whole, cut, isolate
from selfplay.run_folder import RunError
from selfplay.worker import EvaluationJob, Played, Unit

log = logging.getLogger(__name__)
UNITS_PER_WORKER = 2
"""Units that a worker holds at once: the next one's searches start while the last ones of a unit finish."""
SUSPICIOUS = (Cause.DIED, Cause.EXPIRED)
"""What a problem can do to its worker."""
OUTSIDE_DEATHS = 20
"""Times that a lone problem's process may be killed from outside before the run stops and says so."""
LOOKS = 20
"""So many times in the shortest of its patiences the supervisor looks whether one is over: with a thousand workers a
look costs more than what happens between two of them."""


@dataclass(slots=True)
class Lease:
    job: Job
    worker: int
    deadline: float
    version: int


@dataclass(slots=True)
class _Worker:
    node: str | None = None
    """None until it is up."""
    seen: float = 0.0
    leases: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Counts:
    """What went wrong so far, and was mended."""

    restarts: int = 0
    leases_lost: int = 0
    late_results: int = 0
    cuts: int = 0
    failed_problems: int = 0


class Supervisor:
    """Hands work to a fleet until it is done. Not thread-safe: one thread submits and polls.

    `clock` gives seconds from any zero, of this machine alone. Raises RunError from `poll` when more workers were
    lost than the budget `restarts` allows, which each finished piece of work refills by one.
    """

    def __init__(
        self,
        fleet: Fleet,
        clock: Callable[[], float],
        *,
        restarts: int,
        lease_seconds: float,
        silence_seconds: float,
        deaths_alone: int,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._limit = self.restarts_left = restarts
        self._lease_seconds = lease_seconds
        self._silence_seconds = silence_seconds
        self._deaths_alone = deaths_alone
        self._note = note
        self._workers: dict[int, _Worker] = {}
        self._idle: dict[int, None] = {}
        """Workers that are up and hold nothing."""
        self._half: dict[int, dict[int, None]] = {}
        """Version -> workers that hold units of it and have room for one more."""
        self._leases: dict[int, Lease] = {}
        self._next_lease = 0
        self._next_look = clock()
        self._waiting: deque[Job] = deque()
        self._killers: set[str] = set()
        """Ids of problems that were recorded as failed: evaluations ask the same ones again."""
        self._delivered: list[Complete | Evaluated] = []
        self.strays: list[str] = []
        """Pending files of leases that had ended; nobody will commit them."""
        self.version: int | None = None
        """Weights that units are played with from now on."""
        self.counts = Counts()

    @property
    def alive(self) -> int:
        return sum(worker.node is not None for worker in self._workers.values())

    @property
    def outstanding(self) -> int:
        """Pieces of work that wait or are leased."""
        return len(self._waiting) + len(self._leases)

    def submit(self, work: Work) -> None:
        """Evaluations go before units: the learner may wait for them."""
        pieces = isolate(Job(work, Whole(work)), self._killers)
        if isinstance(work, EvaluationJob):
            self._waiting.extendleft(reversed(pieces))
        else:
            self._waiting.extend(pieces)

    def poll(self, seconds: float) -> list[Complete | Evaluated]:
        """What has been completed, waiting up to `seconds` for something to happen."""
        self._staff()
        self._hand_out()
        for event in self._fleet.events(seconds):
            self._take(event)
        self._look_at_the_clock()
        self._staff()
        self._hand_out()
        delivered, self._delivered = self._delivered, []
        return delivered

    def _staff(self) -> None:
        """As many workers as there should be. Those too many go once they hold nothing, the ones not yet up first."""
        wanted = self._fleet.wanted()
        for _ in range(wanted - len(self._workers)):
            self._workers[self._fleet.start()] = _Worker(seen=self._clock())
        if len(self._workers) > wanted:
            starting = [number for number, worker in self._workers.items() if worker.node is None]
            for number in [*starting[::-1], *self._idle][: len(self._workers) - wanted]:
                del self._workers[number]
                self._note_room(number)
                self._fleet.kill(number)

    def _hand_out(self) -> None:
        """Give waiting work to workers with room, the emptiest first."""
        while self._waiting:
            found = self._place(self._waiting[0])
            if found is None:
                return
            self._lease(found, self._waiting.popleft())

    def _place(self, job: Job) -> int | None:
        if self._idle:
            return next(iter(self._idle))
        if job.exclusive:
            return None
        return next(iter(self._half.get(self._version_of(job), ())), None)

    def _note_room(self, number: int) -> None:
        """Keep in mind what a worker has room for; after each change of what it holds."""
        self._idle.pop(number, None)
        for version, workers in list(self._half.items()):
            workers.pop(number, None)
            if not workers:
                del self._half[version]
        worker = self._workers.get(number)
        if worker is None or worker.node is None or len(worker.leases) >= UNITS_PER_WORKER:
            return
        held = [self._leases[lease] for lease in worker.leases]
        if not held:
            self._idle[number] = None
        elif not any(lease.job.exclusive for lease in held):
            self._half.setdefault(held[0].version, {})[number] = None

    def _version_of(self, job: Job) -> int:
        work = work_of(job.order)
        if isinstance(work, EvaluationJob) or job.cut:
            return work.policy_version  # parts of a unit are played with the same weights
        if self.version is None:
            raise RuntimeError("publish weights before units are played")
        return self.version

    def _lease(self, worker: int, job: Job) -> None:
        version = self._version_of(job)
        if isinstance(job.order, Unit) and not job.cut:
            job.order = job.whole.work = replace(job.order, policy_version=version)
        lease, self._next_lease = self._next_lease, self._next_lease + 1
        self._leases[lease] = Lease(job, worker, self._clock() + self._lease_seconds, version)
        self._workers[worker].leases.append(lease)
        self._note_room(worker)
        self._fleet.send(worker, lease, job.order)

    def _take(self, event: FleetEvent) -> None:
        worker = self._workers.get(event.worker)
        if isinstance(event, Finished) and event.lease not in self._leases:
            self.counts.late_results += 1
            if isinstance(event.result, Played):
                self.strays.append(event.result.pending)
        if worker is None:
            return  # it was given up before
        worker.seen = self._clock()
        match event:
            case Ready():
                worker.node = event.node
                self._note_room(event.worker)
            case Finished() if event.lease in worker.leases:
                worker.leases.remove(event.lease)
                lease = self._leases.pop(event.lease)
                self._note_room(event.worker)
                self._finish(lease, event.result)
            case Lost():
                self._lose(event.worker, event.cause, event.detail)
            case Raised():
                raise event.error

    def _finish(self, lease: Lease, result: Result) -> None:
        if isinstance(result, Casualty):
            self._casualty(lease.job, result)
            return
        self.restarts_left = min(self._limit, self.restarts_left + 1)
        done = lease.job.whole.take(lease.job, result)
        if done is not None:
            self._delivered.append(done)

    def _casualty(self, job: Job, found: Casualty) -> None:
        work = work_of(job.order)
        problem = f"problem {work.problems[0].id} of {job.whole.work.name}"
        if found.own:
            job.own_deaths += 1
        else:
            job.outside_deaths += 1
        self._say(f"{problem}, alone in its process: {found.reason}")
        if job.own_deaths >= self._deaths_alone:
            self.counts.failed_problems += 1
            self._killers.add(work.problems[0].id)
            self._waiting = deque(piece for waiting in self._waiting for piece in isolate(waiting, self._killers))
            self._say(f"{problem} is recorded as failed: {found.reason}")
            job.order = Record(work, f"it ended its process {job.own_deaths} times when it was alone: {found.reason}")
        elif job.outside_deaths >= OUTSIDE_DEATHS:
            raise RunError(
                f"{problem} was killed from outside {OUTSIDE_DEATHS} times, last so: {found.reason}; find out "
                "what kills it (memory?), then `selfplay resume`"
            )
        self._waiting.appendleft(job)

    def _look_at_the_clock(self) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + min(self._silence_seconds, self._lease_seconds) / LOOKS
        for number, worker in list(self._workers.items()):
            if worker.node is None:
                continue  # starting, or waiting for room: the fleet says when that fails
            if now - worker.seen > self._silence_seconds:
                self._lose(number, Cause.SILENT, f"for {now - worker.seen:.0f} s")
            elif any(now > self._leases[lease].deadline for lease in worker.leases):
                self._lose(number, Cause.EXPIRED, f"after {self._lease_seconds:.0f} s")

    def _lose(self, number: int, cause: Cause, detail: str) -> None:
        """A worker is gone, or given up: its work goes to others."""
        worker = self._workers.pop(number)
        self._note_room(number)
        self._fleet.kill(number)
        jobs = [self._leases.pop(lease).job for lease in worker.leases]
        self.counts.leases_lost += len(jobs)
        costs = cause is not Cause.NODE  # a node that leaves is no fault of the run's
        held = ", ".join(_name(job.order) for job in jobs) or "nothing"
        self._say(
            f"worker {number} lost ({cause.value}{': ' + detail if detail else ''}); it held {held}; "
            f"{max(0, self.restarts_left - costs)} restarts left"
        )
        if costs:
            self.spend_restart(
                f"workers keep dying, the last one since {cause.value} ({detail or 'no further detail'})"
            )
        self.counts.restarts += 1
        for job in reversed(jobs):
            job.deaths += cause in SUSPICIOUS
            pieces = cut(job)
            if len(pieces) > 1:
                self.counts.cuts += 1
                self._say(f"{_name(job.order)}: cut in half, a problem in it may end its workers")
            self._waiting.extendleft(reversed(pieces))

    def spend_restart(self, why: str) -> None:
        """Take one restart from the budget. Raises RunError, which begins with `why`, where none is left."""
        if self.restarts_left == 0:
            raise RunError(
                f"{why}, and the budget cluster.restarts is used up; see the lines above and Ray's logs, then "
                "`selfplay resume`"
            )
        self.restarts_left -= 1

    def _say(self, line: str) -> None:
        log.warning(line)
        self._note(line)


def _name(order: Order) -> str:
    work = work_of(order)
    return f"{len(work.problems)} problem{'s' * (len(work.problems) != 1)} of {work.name}"
