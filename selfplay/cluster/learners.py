"""The learner as actors: one or several processes that learn as one, in one group for as long as they live."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from selfplay.cluster.nodes import own_error
from selfplay.config import Config
from selfplay.crew import Crew, Died
from selfplay.group import Alone, Group, GroupBroken, GroupLost, TorchGroup, agree, described, open_door
from selfplay.store import Place
from selfplay.trainer import Trainer

log = logging.getLogger(__name__)
T = TypeVar("T")

Progress = tuple[int, int, dict[str, Any]]
Where = tuple[str, int]
LIFE = "life"
"""Concurrency group of the calls that are answered while the learner learns."""
WAIT_SECONDS = 1800.0
"""Longest that a learner waits for another between two steps, which may be saving. Errors are told then, and deaths
noticed, long before."""
ANSWER_SECONDS = 1.0
"""Longest that the driver waits to hear how far a phase is."""


class LearnerActor:
    """One rank of the learner, in a process of its own.

    An error of one rank is raised on all of them, where it can be told; otherwise there as GroupBroken.
    """

    def __init__(self, config: Config, place: Place, rank: int) -> None:
        self._config = config
        self._place = place
        self._rank = rank
        self._door: socket.socket | None = None
        self._group: Group | None = None
        """None until it has formed."""
        self._trainer: Trainer | None = None
        self._stopped = False
        self._progress: Progress = (0, 0, {})

    def open(self) -> Where:
        """Rank 0 opens the door at which the others meet it."""
        with self._failing_alone():
            self._door, where = open_door(ray.util.get_node_ip_address())
        return where

    def join(self, where: Where | None) -> None:
        """Form the group; where there is nobody else (None), be alone. The first call."""
        if where is None:
            self._group = Alone()
            return
        cluster, host = self._config.cluster, ray.util.get_node_ip_address()
        with self._failing_alone():
            self._group = TorchGroup(
                self._rank,
                cluster.learners,
                where,
                host=host,
                door=self._door,
                timeout=WAIT_SECONDS,
                patience=cluster.peer_seconds,
            )

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except GroupLost:
            raise
        except Exception as error:
            raise GroupBroken(self._rank, described(error)) from error

    def _together(self, work: Callable[[Trainer], T]) -> T:
        """Do it as one of the group: done once every rank has done it, and failed if one has."""
        done: list[T] = []
        if (group := self._group) is None:
            raise GroupLost("the group never formed")
        try:
            agree(group, lambda: done.append(work(self._ready(group))))
        except (GroupBroken, GroupLost):
            log.exception("learner %d can go on no more", self._rank)
            raise
        return done[0]

    def _ready(self, group: Group) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._config, self._place, group)
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
    """The learners as the driver sees them: each call returns at once with a future for the result of rank 0.

    That result is an error if any rank fails: the trainer's own, or CrewLost where a rank died or failed alone; then
    all of them are killed, and `restart` and `restore` make new ones.
    """

    def __init__(self, config: Config, place: Place) -> None:
        self._config = config
        self._place = place
        cluster = config.cluster
        seat = {"CPU": cluster.learner_cpus, **({"GPU": cluster.learner_gpus} if cluster.learner_gpus else {})}
        self._seats = placement_group([seat] * cluster.learners, strategy="PACK")
        self._stopping = False
        self._begin()

    @property
    def alive(self) -> bool:
        """False once they are known to be of no use any more."""
        return self._crew.lost is None

    def restart(self) -> None:
        """New actors for all ranks, without weights; those that still live are killed."""
        self._end()
        self._begin()

    def _begin(self) -> None:
        cluster = self._config.cluster
        kind = ray.remote(num_cpus=cluster.learner_cpus, num_gpus=cluster.learner_gpus, concurrency_groups={LIFE: 1})(
            LearnerActor
        )
        actors = [
            kind.options(scheduling_strategy=self._seat(rank)).remote(self._config, self._place, rank)
            for rank in range(cluster.learners)
        ]
        self._actors: list[Any] = actors
        self._crew = Crew(partial(_kill, actors))
        self._call("join", actors[0].open.remote() if len(actors) > 1 else None)
        if self._stopping:
            actors[0].stop.remote()

    def _seat(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """The place that is kept for a rank while its actor is dead, so that no worker takes it."""
        return PlacementGroupSchedulingStrategy(self._seats, placement_group_bundle_index=rank)

    def _call(self, name: str, *arguments: Any) -> Future[Any]:
        return self._crew.call([_answer(getattr(actor, name).remote(*arguments)) for actor in self._actors])

    def warm_up(self) -> Future[Any]:
        return self._call("warm_up")

    def restore(self, checkpoint: Path) -> Future[Any]:
        return self._call("restore", checkpoint)

    def learn(self, iteration: int, shards: Sequence[Path]) -> Future[Any]:
        return self._call("learn", iteration, shards)

    def save(self, iteration: int, state: dict[str, Any]) -> Future[Any]:
        return self._call("save", iteration, state)

    def rest(self) -> Future[Any]:
        """Free the devices' memory until the next call."""
        return self._call("rest")

    def stop(self) -> None:
        """The phase that runs, or the next one, saves its state and raises Interrupted."""
        self._stopping = True
        self._actors[0].stop.remote()

    def progress(self) -> Progress | None:
        """How far the phase is; None where a learner does not answer right now."""
        try:
            found: list[Progress] = ray.get([actor.progress.remote() for actor in self._actors], timeout=ANSWER_SECONDS)
        except RayError:
            return None
        return found[0]

    def process_ids(self) -> list[int]:
        """Of every rank. Raises RayError where one is dead."""
        found: list[int] = ray.get([actor.process_id.remote() for actor in self._actors])
        return found

    def kill(self) -> None:
        """For good."""
        self._end()
        remove_placement_group(self._seats)

    def _end(self) -> None:
        self._crew.close()
        _kill(self._actors)


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _answer(call: Any) -> Future[Any]:
    """A call's result or own error; Died where its actor is no more."""
    answer: Future[Any] = Future()

    def arrived(future: Any) -> None:
        error = future.exception()
        if error is None:
            answer.set_result(future.result())
        elif isinstance(error, RayTaskError):
            answer.set_exception(own_error(error))
        else:
            answer.set_exception(Died(str(error).strip().splitlines()[0]))

    call.future().add_done_callback(arrived)
    return answer
