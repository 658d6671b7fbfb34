"""The fleet of worker actors: where they run, what they are told, and what became of them."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from selfplay.cluster.actors import LIFE, WorkerActor
from selfplay.cluster.nodes import Nodes, own_error
from selfplay.cluster.weights import KEPT, Fetched, Weights
from selfplay.config import Config
from selfplay.fleet import (
    Alive,
    Alone,
    Cause,
    Finished,
    FleetEvent,
    Lost,
    Order,
    Raised,
    Ready,
    Record,
    Result,
    work_of,
)
from selfplay.run_folder import RunError
from selfplay.store import Place
from selfplay.worker import EvaluationJob, Played, Unit

log = logging.getLogger(__name__)
NODE_GONE = "its node has died"
"""What Ray's message about a dead actor says where it went with its node; the node's own state may follow later."""


@dataclass(slots=True)
class _Member:
    actor: Any
    node: str | None = None
    pid: int = 0
    version: int | None = None
    units: dict[str, int] = field(default_factory=dict)  # unit name: lease
    finishing: bool = False
    """A `finish` is under way: it returns the first of `units` that is done."""
    beat_due: float = 0.0


class RayFleet:
    """See `selfplay.fleet.Fleet`. Calls come back on Ray's own thread, into a queue that `events` reads."""

    actor: type = WorkerActor

    def __init__(self, config: Config, place: Place, nodes: Nodes) -> None:
        self._config = config
        self._place = place
        self._nodes = nodes
        self._members: dict[int, _Member] = {}
        self._born = 0
        self._queue: queue.SimpleQueue[Callable[[], FleetEvent | None]] = queue.SimpleQueue()
        self._weights: dict[int, Weights] = {}
        self._to_finish: set[int] = set()
        self._next_beats = 0.0
        self.fetched: list[Fetched] = []
        """What bringing weights to nodes has cost since somebody last looked."""

    def publish(self, weights: Weights) -> None:
        """From now on orders for `weights.version` are done with these. The oldest versions are let go."""
        self._weights[weights.version] = weights
        for old in list(self._weights)[:-KEPT]:
            del self._weights[old]

    def wanted(self) -> int:
        return self._nodes.workers_wanted()

    def start(self) -> int:
        number, self._born = self._born, self._born + 1
        actor_class = ray.remote(concurrency_groups={LIFE: 1})(self.actor)
        actor = self._nodes.place_worker(actor_class).remote(self._config, self._place)
        self._members[number] = _Member(actor)
        self._watch(number, actor.hello.remote(), self._is_up)
        return number

    def send(self, worker: int, lease: int, order: Order) -> None:
        member = self._members[worker]
        version = work_of(order).policy_version
        if member.version != version:
            member.version = version
            self._watch(worker, member.actor.load.remote(self._weights[version]), self._is_loaded)
        match order:
            case Unit():
                member.units[order.name] = lease
                self._watch(worker, member.actor.enqueue.remote(order), lambda *_: None)
                self._to_finish.add(worker)
            case EvaluationJob():
                self._watch(worker, member.actor.evaluate.remote(order), partial(self._is_done, lease=lease))
            case Alone(work):
                self._watch(worker, member.actor.alone.remote(work), partial(self._is_done, lease=lease))
            case Record(work, reason):
                self._watch(worker, member.actor.record.remote(work, reason), partial(self._is_done, lease=lease))

    def kill(self, worker: int) -> None:
        member = self._members.pop(worker, None)
        self._to_finish.discard(worker)
        if member is not None:
            ray.kill(member.actor, no_restart=True)

    def events(self, seconds: float) -> Sequence[FleetEvent]:
        self._ask_for_results()
        self._ask_for_life()
        found: list[FleetEvent] = []
        try:
            arrived = self._queue.get(timeout=seconds)
            while True:
                event = arrived()
                if event is not None:
                    found.append(event)
                arrived = self._queue.get_nowait()
        except queue.Empty:
            return found

    def wake(self, *_: Any) -> None:
        """Have `events` return now. May be called from any thread."""
        self._queue.put(lambda: None)

    def rest(self) -> None:
        """Have every worker free its device's memory; returns when all have."""
        for member in self._members.values():
            member.version = None
        calls = [member.actor.rest.remote() for member in self._members.values() if member.node is not None]
        ray.wait(calls, num_returns=len(calls), timeout=self._config.cluster.silence_seconds) if calls else None

    def process_ids(self) -> list[int]:
        return [member.pid for member in self._members.values() if member.node is not None]

    def close(self) -> None:
        """End all workers, and what their nodes keep of this run."""
        first_of_node = {member.node: member for member in self._members.values() if member.node is not None}
        calls = [member.actor.forget.remote() for member in first_of_node.values()]
        ray.wait(calls, num_returns=len(calls), timeout=2.0) if calls else None
        for number in list(self._members):
            self.kill(number)

    def _ask_for_results(self) -> None:
        for worker in list(self._to_finish):
            member = self._members[worker]
            if member.units and not member.finishing:
                member.finishing = True
                self._watch(worker, member.actor.finish.remote(), self._has_finished)
        self._to_finish.clear()

    def _ask_for_life(self) -> None:
        """One question at a time to each worker; its answer makes the next one due."""
        now = time.monotonic()
        if now < self._next_beats:
            return
        pause = self._config.cluster.silence_seconds / 5
        self._next_beats = now + pause / 5
        for worker, member in self._members.items():
            if member.node is not None and now >= member.beat_due:
                member.beat_due = float("inf")
                self._watch(worker, member.actor.beat.remote(), partial(self._lives, pause=pause))

    def _watch(self, worker: int, call: Any, then: Callable[[int, Any], FleetEvent | None]) -> None:
        """When `call` has come back, `then(worker, result)` runs in `events`; its failure is the worker's."""

        def arrived(future: Any) -> None:
            self._queue.put(partial(self._arrived, worker, future, then))

        call.future().add_done_callback(arrived)

    def _arrived(self, worker: int, future: Any, then: Callable[[int, Any], FleetEvent | None]) -> FleetEvent | None:
        error = future.exception()
        if error is None:
            return then(worker, future.result())
        if worker not in self._members:
            return None  # it was given up, or another call told of its end already
        if isinstance(error, RayTaskError):
            cause = own_error(error)
            starting = self._members[worker].node is None
            if not (starting and isinstance(cause, RunError)):
                return Raised(worker, cause)
            return Lost(worker, Cause.BLIND, str(cause))  # a node that joined: others may fare better
        self._members.pop(worker)
        self._to_finish.discard(worker)
        return Lost(worker, self._cause(error), _short(error))

    def _cause(self, error: BaseException) -> Cause:
        if isinstance(error, ActorUnavailableError):
            return Cause.UNREACHABLE
        if isinstance(error, RayActorError) and NODE_GONE in str(error):
            return Cause.NODE
        return Cause.DIED

    def _is_up(self, worker: int, found: tuple[str, int]) -> FleetEvent | None:
        member = self._members.get(worker)
        if member is None:
            return None
        member.node, member.pid = found
        return Ready(worker, member.node)

    def _is_loaded(self, worker: int, fetched: Fetched) -> FleetEvent:
        if fetched.bytes:
            self.fetched.append(fetched)
        return Alive(worker)

    def _lives(self, worker: int, _: None, *, pause: float) -> FleetEvent:
        member = self._members.get(worker)
        if member is not None:
            member.beat_due = time.monotonic() + pause
        return Alive(worker)

    def _is_done(self, worker: int, result: Result, *, lease: int) -> FleetEvent:
        return Finished(worker, lease, result)

    def _has_finished(self, worker: int, played: Played) -> FleetEvent | None:
        member = self._members.get(worker)
        if member is None:
            return None  # given up: what it wrote goes with the epoch's folder
        member.finishing = False
        self._to_finish.add(worker)
        return Finished(worker, member.units.pop(played.unit.name), played)


def _short(error: BaseException) -> str:
    """The first telling line of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
