"""The learner as actors: one or several processes that learn as one, in one group for as long as they live."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from selfplay.config import Config
from selfplay.group import Alone, Group, GroupLost, TorchGroup, agree, open_door
from selfplay.store import Place
from selfplay.trainer import Trainer

log = logging.getLogger(__name__)
T = TypeVar("T")

Progress = tuple[int, int, dict[str, Any]]
Where = tuple[str, int]
LIFE = "life"
"""Concurrency group of the calls that are answered while the learner learns."""
WAIT_SECONDS = 1800.0
"""Longest that a learner waits for another, which may be saving. Deaths are noticed long before."""
LOOK_SECONDS = 1.0
"""How often the driver looks whether the learners that it does not wait for are well."""


class LearnerActor:
    """One rank of the learner, in a process of its own.

    An error of one rank is raised on all of them. A rank whose group is broken dies: it could do nothing more.
    """

    def __init__(self, config: Config, place: Place, rank: int) -> None:
        self._config = config
        self._place = place
        self._rank = rank
        self._door: socket.socket | None = None
        self._group: Group = Alone()
        self._trainer: Trainer | None = None
        self._stopped = False
        self._progress: Progress = (0, 0, {})

    def open(self) -> Where:
        """Rank 0 opens the door at which the others meet it."""
        self._door, where = open_door(ray.util.get_node_ip_address())
        return where

    def join(self, where: Where | None) -> None:
        """Form the group; where there is nobody else (None), be alone. The first call."""
        if where is not None:
            size, host = self._config.cluster.learners, ray.util.get_node_ip_address()
            self._group = self._or_die(
                lambda: TorchGroup(self._rank, size, where, host=host, door=self._door, timeout=WAIT_SECONDS)
            )

    def _or_die(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except GroupLost as error:
            log.error("learner %d lost its group and ends: %s", self._rank, error)
            os._exit(1)

    def _together(self, work: Callable[[Trainer], T]) -> T:
        """Do it as one of the group: done once every rank has done it, and failed if one has."""
        done: list[T] = []
        self._or_die(lambda: agree(self._group, lambda: done.append(work(self._ready()))))
        return done[0]

    def _ready(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._config, self._place, self._group)
        if self._stopped:
            self._trainer.stop()
        return self._trainer

    def _note(self, done: int, total: int, facts: dict[str, Any]) -> None:
        self._progress = (done, total, facts)

    def warm_up(self) -> dict[str, Any]:
        self._note(0, 0, {})
        return self._together(lambda trainer: trainer.warm_up(self._note))

    def restore(self, checkpoint: Path) -> None:
        self._together(lambda trainer: trainer.restore(checkpoint))

    def learn(self, iteration: int, shards: Sequence[Path]) -> dict[str, Any]:
        self._note(0, 0, {})
        return self._together(lambda trainer: trainer.learn(iteration, shards, self._note))

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        return self._together(lambda trainer: trainer.save(iteration, state))

    def rest(self) -> None:
        self._together(lambda trainer: trainer.rest())

    @ray.method(concurrency_group=LIFE)  # type: ignore[untyped-decorator]
    def progress(self) -> Progress:
        return self._progress

    @ray.method(concurrency_group=LIFE)  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        self._stopped = True
        if self._trainer is not None:
            self._trainer.stop()

    @ray.method(concurrency_group=LIFE)  # type: ignore[untyped-decorator]
    def process_id(self) -> int:
        return os.getpid()


class Learners:
    """The learners as the driver sees them: each call returns at once with an ObjectRef for the result of rank 0.

    That result is an error if any rank fails: the trainer's own (as the cause of a RayTaskError), or a RayActorError
    where a rank died; then all of them are killed, and `restart` and `restore` make new ones.
    """

    def __init__(self, config: Config, place: Place) -> None:
        self._config = config
        self._place = place
        cluster = config.cluster
        seat = {"CPU": cluster.learner_cpus, **({"GPU": cluster.learner_gpus} if cluster.learner_gpus else {})}
        self._seats = placement_group([seat] * cluster.learners, strategy="PACK")
        self._actors: list[Any] = []
        self._others: list[Any] = []
        """Calls whose results nobody else waits for."""
        self._lock = threading.Lock()
        self._lost = False
        self._stopping = False
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look, name="learners", daemon=True)
        self.restart()
        self._looking.start()

    @property
    def alive(self) -> bool:
        """False once a rank is known to have died."""
        return not self._lost

    def restart(self) -> None:
        """New actors for all ranks, without weights; those that still live are killed."""
        self._kill()
        cluster = self._config.cluster
        kind = ray.remote(num_cpus=cluster.learner_cpus, num_gpus=cluster.learner_gpus, concurrency_groups={LIFE: 1})(
            LearnerActor
        )
        actors = [
            kind.options(scheduling_strategy=self._seat(rank)).remote(self._config, self._place, rank)
            for rank in range(cluster.learners)
        ]
        where = actors[0].open.remote() if len(actors) > 1 else None
        joining = [actor.join.remote(where) for actor in actors]
        if self._stopping:
            actors[0].stop.remote()
        with self._lock:
            self._actors, self._others, self._lost = actors, joining, False

    def _seat(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """The place that is kept for a rank while its actor is dead, so that no worker takes it."""
        return PlacementGroupSchedulingStrategy(self._seats, placement_group_bundle_index=rank)

    def _call(self, name: str, *arguments: Any) -> Any:
        first, *others = [getattr(actor, name).remote(*arguments) for actor in self._actors]
        with self._lock:
            self._others += others
        return first

    def warm_up(self) -> Any:
        return self._call("warm_up")

    def restore(self, checkpoint: Path) -> Any:
        return self._call("restore", checkpoint)

    def learn(self, iteration: int, shards: Sequence[Path]) -> Any:
        return self._call("learn", iteration, shards)

    def save(self, iteration: int, state: dict[str, Any]) -> Any:
        return self._call("save", iteration, state)

    def rest(self) -> Any:
        """Free the devices' memory until the next call."""
        return self._call("rest")

    def stop(self) -> None:
        """The phase that runs, or the next one, saves its state and raises Interrupted."""
        self._stopping = True
        self._actors[0].stop.remote()

    def progress(self) -> Progress | None:
        """How far the phase is; None where a learner does not answer right now."""
        try:
            found: list[Progress] = ray.get([actor.progress.remote() for actor in self._actors], timeout=LOOK_SECONDS)
        except RayError:
            return None
        return found[0]

    def process_ids(self) -> list[int]:
        """Of every rank. Raises RayError where one is dead."""
        found: list[int] = ray.get([actor.process_id.remote() for actor in self._actors])
        return found

    def kill(self) -> None:
        """For good."""
        self._ended.set()
        self._kill()
        remove_placement_group(self._seats)
        self._looking.join()

    def _kill(self) -> None:
        with self._lock:
            self._lost, self._others = True, []
            for actor in self._actors:
                ray.kill(actor)

    def _look(self) -> None:
        """In a thread of its own: a group in which one died is ended, so that nobody waits for the dead."""
        while not self._ended.is_set():
            with self._lock:
                waiting = list(self._others)
            if not waiting:
                self._ended.wait(LOOK_SECONDS)
                continue
            for call in ray.wait(waiting, timeout=LOOK_SECONDS)[0]:
                self._take(call)

    def _take(self, call: Any) -> None:
        cause = ""
        try:
            ray.get(call)
        except RayTaskError:
            pass  # its own error: rank 0 fails with it too
        except RayError as error:
            cause = str(error).splitlines()[0]
        with self._lock:
            if call not in self._others:
                return  # of actors that were replaced meanwhile
            self._others.remove(call)
        if cause:
            log.warning("a learner died: %s", cause)
            self._kill()
