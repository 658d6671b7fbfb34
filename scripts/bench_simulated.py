"""Make-believe workers and learners around the real driver: what they write is real, what they do takes no time.

`SimulatedFleet` lives in make-believe time, for the loop and the supervisor alone; `SimulatedWorker` is a Ray actor
that answers as late as a real one would.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from selfplay import checkpoint as checkpoints
from selfplay.cluster.actors import LIFE
from selfplay.cluster.weights import Fetched, Weights
from selfplay.config import Config
from selfplay.executor import Done, Learned, Progress
from selfplay.fleet import Alive, Finished, FleetEvent, Order, Ready
from selfplay.pieces import Complete
from selfplay.store import Place, Store
from selfplay.supervisor import Supervisor
from selfplay.units import join
from selfplay.worker import Answered, EvaluationJob, Played, Unit

SPREAD = 0.2
"""Units take their seconds, give or take this share."""
JOB_SECONDS = 5.0
"""An evaluation's."""
ANSWER_SECONDS = 0.02
"""A sign of life's way back, at most."""


def offer(store: Store, sample: Played, unit: Unit) -> Played:
    """A pending shard for `unit`: another name of `sample`, whose rows were played for other problems."""
    scratch = store.scratch(unit.name)
    os.link(sample.pending, scratch)
    return replace(sample, unit=unit, pending=store.offer(scratch))


def answers(job: EvaluationJob) -> list[Answered]:
    return [Answered(p.id, True, "correct", False, 8, 1, 1, 2, 2, None, 0.1) for p in job.problems]


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class SimulatedFleet:
    """See `selfplay.fleet.Fleet`. Workers play two units side by side, so each is done `seconds` after the one before
    it; they are asked for signs of life as RayFleet asks. One event at a time: a driver that falls behind takes several
    at once, and spends less on each."""

    def __init__(self, workers: int, seconds: float, store: Store, sample: Played, silence_seconds: float) -> None:
        self.now = 0.0
        self._workers = workers
        self._seconds = seconds
        self._store = store
        self._sample = sample
        self._pause = silence_seconds / 5
        self._random = random.Random(0)
        self._heap: list[tuple[float, int, FleetEvent | tuple[int, int, Order]]] = []
        self._made = 0
        self._started = 0
        self._held: dict[int, deque[tuple[int, Order]]] = {}
        self._next_beats = 0.0
        self._beat_due: dict[int, float] = {}

    def clock(self) -> float:
        return self.now

    def wanted(self) -> int:
        return self._workers

    def start(self) -> int:
        number, self._started = self._started, self._started + 1
        self._held[number] = deque()
        self._later(self._random.uniform(0.0, self._seconds), Ready(number, f"node-{number % 32}"))
        self._beat_due[number] = self._random.uniform(0.0, self._pause)
        return number

    def _later(self, seconds: float, event: FleetEvent | tuple[int, int, Order]) -> None:
        self._made += 1
        heapq.heappush(self._heap, (self.now + seconds, self._made, event))

    def send(self, worker: int, lease: int, order: Order) -> None:
        held = self._held[worker]
        held.append((lease, order))
        if len(held) == 1:
            self._begin(worker)

    def _begin(self, worker: int) -> None:
        lease, order = self._held[worker][0]
        mean = self._seconds if isinstance(order, Unit) else JOB_SECONDS
        self._later(mean * self._random.uniform(1 - SPREAD, 1 + SPREAD), (worker, lease, order))

    def kill(self, worker: int) -> None:
        raise RuntimeError(f"worker {worker} was given up, and no simulated worker fails")

    def events(self, seconds: float) -> Sequence[FleetEvent]:
        if self.now >= self._next_beats:
            self._next_beats = self.now + self._pause / 5
            for worker, due in self._beat_due.items():
                if due <= self.now:
                    self._later(self._random.uniform(0.0, ANSWER_SECONDS), Alive(worker))
                    self._beat_due[worker] = self.now + self._pause
        if not self._heap or self._heap[0][0] > self.now + seconds:
            self.now += seconds
            return []
        self.now = max(self.now, self._heap[0][0])
        event = heapq.heappop(self._heap)[2]
        return [self._end(*event)] if isinstance(event, tuple) else [event]

    def _end(self, worker: int, lease: int, order: Order) -> FleetEvent:
        held = self._held[worker]
        held.popleft()
        if held:
            self._begin(worker)
        if isinstance(order, EvaluationJob):
            return Finished(worker, lease, answers(order))
        assert isinstance(order, Unit)
        return Finished(worker, lease, offer(self._store, self._sample, order))


class SimulatedExecutor:
    """`RayExecutor` without Ray: the same supervisor over a simulated fleet, and a learner that learns at once."""

    def __init__(self, fleet: SimulatedFleet, store: Store, config: Config, checkpoint: Path) -> None:
        self._fleet = fleet
        self._store = store
        self._config = config
        self._learners = SimulatedLearners(store, checkpoint)
        self._learned: list[Learned] = []
        cluster = config.cluster
        self.supervisor = Supervisor(
            fleet,
            fleet.clock,
            restarts=cluster.restarts,
            lease_seconds=cluster.lease_seconds,
            silence_seconds=cluster.silence_seconds,
            deaths_alone=cluster.deaths_alone,
        )

    learning = False

    def publish(self, checkpoint: Path, version: int, *, play: bool) -> None:
        del checkpoint
        if play:
            self.supervisor.version = version

    def submit(self, work: Unit | EvaluationJob) -> None:
        self.supervisor.submit(work)

    def warm_up(self, progress: Progress) -> None:
        del progress
        self._learned.append(Learned({}))

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> None:
        del iteration, shards, progress
        self._learned.append(Learned({}))

    def poll(self, seconds: float) -> list[Done]:
        done: list[Done] = [
            join(self._store, self._config, found) if isinstance(found, Complete) else found
            for found in self.supervisor.poll(0.0 if self._learned else seconds)
        ]
        done += self._learned
        self._learned = []
        return done

    def restore(self, checkpoint: Path) -> None:
        del checkpoint

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        return self._learners.write(iteration, state)

    def stop(self) -> None:
        raise RuntimeError("nobody stops a benchmark")

    def facts(self) -> dict[str, Any]:
        counts = self.supervisor.counts
        return {
            "workers": {"alive": self.supervisor.alive, "wanted": self._fleet.wanted()},
            "restarts": counts.restarts,
            "leases_lost": counts.leases_lost,
        }

    def costs(self) -> dict[str, float]:
        return {}

    def show(self, figures: Mapping[str, Any]) -> None:
        del figures

    def close(self) -> None:
        pass


class SimulatedLearners:
    """Checkpoints with the same weights again and again."""

    def __init__(self, store: Store, checkpoint: Path) -> None:
        self._store = store
        self._checkpoint = checkpoint

    def write(self, iteration: int, state: dict[str, Any]) -> Path:
        folder = self._store.workshop(f"{iteration:05d}")
        shutil.copytree(self._checkpoint, folder, copy_function=os.link)
        manifest = json.loads((folder / checkpoints.STATE).read_text(encoding="utf-8"))
        (folder / checkpoints.STATE).unlink()  # one name of the sample's: written anew
        text = json.dumps({**manifest, "iteration": iteration, "state": state})
        (folder / checkpoints.STATE).write_text(text, encoding="utf-8")
        return self._store.publish(folder, f"checkpoints/{iteration:05d}")


class RayLearners(SimulatedLearners):
    """In the place of `selfplay.cluster.learners.Learners`: done at once, in this process."""

    def warm_up(self) -> Future[Any]:
        return done({})

    def learn(self, iteration: int, shards: Sequence[Path]) -> Future[Any]:
        del iteration, shards
        return done({})

    def restore(self, checkpoint: Path) -> Future[Any]:
        return done(checkpoint)

    def save(self, iteration: int, state: dict[str, Any]) -> Future[Any]:
        return done(self.write(iteration, state))

    def progress(self) -> tuple[int, int, dict[str, Any]]:
        return 0, 0, {}

    def kill(self) -> None:
        pass


class SimulatedWorker:
    """In the place of `WorkerActor`: the same calls, answered by the clock."""

    seconds = 60.0
    sample: Played

    def __init__(self, config: Config, place: Place) -> None:
        del config
        self._store = place.open()
        self._node: str = ray.get_runtime_context().get_node_id()
        self._random = random.Random(self._node)
        self._units: deque[Unit] = deque()
        self._done = time.monotonic()

    def hello(self) -> tuple[str, int]:
        return self._node, os.getpid()

    @ray.method(concurrency_group=LIFE)  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        """A sign of life."""

    def load(self, weights: Weights) -> Fetched:
        del weights
        return Fetched(self._node, 0, 0.0)

    def enqueue(self, unit: Unit) -> None:
        self._units.append(unit)

    def finish(self) -> Played:
        due = self._done + self.seconds * self._random.uniform(1 - SPREAD, 1 + SPREAD)
        time.sleep(max(0.0, due - time.monotonic()))
        self._done = time.monotonic()
        return offer(self._store, self.sample, self._units.popleft())

    def evaluate(self, job: EvaluationJob) -> list[Answered]:
        return answers(job)

    def forget(self) -> None:
        pass
