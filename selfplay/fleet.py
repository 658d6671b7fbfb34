"""What a fleet of workers is asked to do and what it says: orders, events, and the protocol between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from selfplay.worker import Answered, EvaluationJob, Played, Unit


class Cause(StrEnum):
    """Why a worker was lost."""

    DIED = "its process ended"
    NODE = "its node is gone"
    SILENT = "it gave no sign of life"
    EXPIRED = "its lease ran out"
    UNREACHABLE = "it cannot be reached"
    BLIND = "its node does not see the run"


Work = Unit | EvaluationJob
"""Problems to be searched with the weights of one version."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Search one problem in a process of its own."""

    work: Work


@dataclass(frozen=True, slots=True)
class Record:
    """Write the row, or give the answer, of a problem that could not be searched, without searching it."""

    work: Work
    reason: str


Order = Work | Alone | Record
"""What a worker is asked to do."""


@dataclass(frozen=True, slots=True)
class Casualty:
    """The process of a lone problem ended without a result."""

    reason: str
    own: bool
    """Whether it brought that on itself."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation is done: one search per problem of `job`, in their order."""

    job: EvaluationJob
    answers: list[Answered]


Part = Played | list[Answered]
"""What comes of a unit or an evaluation, or of a part of one."""
Result = Part | Casualty


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker is up."""

    worker: int
    node: str


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life."""

    worker: int


@dataclass(frozen=True, slots=True)
class Finished:
    worker: int
    lease: int
    result: Result


@dataclass(frozen=True, slots=True)
class Lost:
    worker: int
    cause: Cause
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Raised:
    """The worker's own error: a wrong config or a damaged file, which no other worker would fare better with."""

    worker: int
    error: Exception


FleetEvent = Ready | Alive | Finished | Lost | Raised


class Fleet(Protocol):
    """Workers somewhere. Calls return at once; what comes of them arrives as events."""

    def wanted(self) -> int:
        """How many workers there should be now."""
        ...

    def start(self) -> int:
        """Begin to start a worker and return its number; Ready, Lost or Raised follows."""
        ...

    def send(self, worker: int, lease: int, order: Order) -> None:
        """Hand over work; the worker first takes the weights of `order`'s version. Orders are done in turn, but units
        that were sent together are played together."""
        ...

    def kill(self, worker: int) -> None:
        """End a worker; no event follows."""
        ...

    def events(self, seconds: float) -> Sequence[FleetEvent]:
        """What has happened, waiting up to `seconds` for the first."""
        ...


def work_of(order: Order) -> Work:
    """The problems in an order."""
    return order.work if isinstance(order, Alone | Record) else order
