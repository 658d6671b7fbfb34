"""Pieces of work: what a worker is leased, how it is cut where a problem in it may kill, and how its parts come
together again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise

from selfplay.fleet import Alone, Evaluated, Order, Part, Record, Work, work_of
from selfplay.worker import EvaluationJob, Played, Unit

DEATHS_TOGETHER = 2
"""Deaths under a whole unit or evaluation before it is cut: one may be chance, or the fault of what was played beside
it."""


@dataclass(frozen=True, slots=True)
class Complete:
    """A unit is played: its pending parts, in the order of its problems (one, unless it was cut)."""

    unit: Unit
    parts: tuple[Played, ...]

    @property
    def seconds(self) -> float:
        return max(part.seconds for part in self.parts)


@dataclass(slots=True)
class Whole:
    """A unit or an evaluation as it was handed in, and what has come of its parts."""

    work: Work
    parts: dict[int, tuple[int, Part]] = field(default_factory=dict)
    """Place of a part's first problem: number of its problems, result."""

    def take(self, job: Job, result: Part) -> Complete | Evaluated | None:
        """Keep the result of one of its pieces; all of it, once no other is missing."""
        self.parts[job.first] = len(work_of(job.order).problems), result
        if sum(count for count, _ in self.parts.values()) < len(self.work.problems):
            return None
        found = [part for _, (_, part) in sorted(self.parts.items(), key=lambda entry: entry[0])]
        if isinstance(self.work, Unit):
            return Complete(self.work, tuple(part for part in found if isinstance(part, Played)))
        return Evaluated(self.work, [answered for part in found if isinstance(part, list) for answered in part])


@dataclass(slots=True)
class Job:
    """A piece of work that waits or is leased."""

    order: Order
    whole: Whole
    first: int = 0
    """Place of its first problem in `whole`."""
    cut: bool = False
    """A part of something that may kill; it is searched with the weights that the whole was leased with."""
    deaths: int = 0
    """Of workers that held it."""
    own_deaths: int = 0
    outside_deaths: int = 0

    @property
    def exclusive(self) -> bool:
        """Its worker holds nothing else."""
        return self.cut or not isinstance(self.order, Unit)


def isolate(job: Job, killers: Collection[str]) -> list[Job]:
    """The job itself; of an evaluation the problems apart that are among `killers` (ids), which another one found."""
    if not isinstance(job.order, EvaluationJob):
        return [job]
    known = [place for place, problem in enumerate(job.order.problems) if problem.id in killers]
    if not known:
        return [job]
    bounds = sorted({0, len(job.order.problems), *known, *(place + 1 for place in known)})
    return [_piece(job, first, last, alone=first in known, cut=job.cut) for first, last in pairwise(bounds)]


def cut(job: Job) -> list[Job]:
    """The job itself, or its halves where it is suspected of killing; half of one problem is the problem alone."""
    if isinstance(job.order, Alone | Record) or job.deaths < (1 if job.cut else DEATHS_TOGETHER):
        return [job]
    count = len(job.order.problems)
    bounds = sorted({0, count // 2, count})
    return [_piece(job, first, last, alone=last - first == 1, cut=True) for first, last in pairwise(bounds)]


def _piece(job: Job, first: int, last: int, *, alone: bool, cut: bool) -> Job:
    """Of the job's problems those from `first` to before `last`."""
    work = work_of(job.order)
    work = replace(work, problems=work.problems[first:last])
    return Job(Alone(work) if alone else work, job.whole, job.first + first, cut=cut or alone)
