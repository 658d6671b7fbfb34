"""Workers and learner as actors of Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from selfplay.config import Config
from selfplay.executor import Progress
from selfplay.run_folder import RunError
from selfplay.trainer import Trainer
from selfplay.worker import Answered, EvaluationJob, Played, Unit, Worker

log = logging.getLogger(__name__)
UNITS_PER_WORKER = 2
"""Units that a worker holds at once: the next one's searches start while the last ones of a unit finish."""


def _get(call: Any) -> Any:
    """The result of an actor's call, or the error that it raised itself, without Ray's wrapping."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, config: Config, run: Path) -> None:
        self._worker = Worker(config, run)

    def load(self, checkpoint: Path, version: int) -> None:
        self._worker.load(checkpoint, version)

    def enqueue(self, unit: Unit) -> None:
        self._worker.enqueue(unit)

    def finish(self) -> Played:
        return self._worker.finish()

    def evaluate(self, job: EvaluationJob) -> list[Answered]:
        return self._worker.evaluate(job)

    def process_id(self) -> int:
        return os.getpid()


class LearnerActor:
    """The learner in a process of its own. Its progress is asked for by the driver between two chunks of work."""

    def __init__(self, config: Config, run: Path) -> None:
        self._trainer = Trainer(config, run)
        self._progress: tuple[int, int, dict[str, Any]] = (0, 0, {})

    def _note(self, done: int, total: int, facts: dict[str, Any]) -> None:
        self._progress = (done, total, facts)

    def progress(self) -> tuple[int, int, dict[str, Any]]:
        return self._progress

    def warm_up(self) -> dict[str, Any]:
        return self._trainer.warm_up(self._note)

    def restore(self, checkpoint: Path) -> None:
        self._trainer.restore(checkpoint)

    def learn(self, iteration: int, shards: Sequence[Path]) -> dict[str, Any]:
        return self._trainer.learn(iteration, shards, self._note)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        return self._trainer.save(iteration, state)

    def process_id(self) -> int:
        return os.getpid()


class RayExecutor:
    """Workers and learner as actors of a local Ray that this process starts and ends."""

    def __init__(self, config: Config, run: Path) -> None:
        self._config = config
        self._run = run
        self._restarts = config.cluster.restarts
        self._checkpoint: tuple[Path, int] | None = None
        start_local_ray(config)
        self._learner = ray.remote(LearnerActor).options(num_cpus=0, max_concurrency=2).remote(config, run)
        self._workers = [self._new_worker() for _ in range(_count(config))]

    def _new_worker(self) -> Any:
        actor = ray.remote(WorkerActor).options(num_cpus=0).remote(self._config, self._run)
        if self._checkpoint is not None:
            actor.load.remote(*self._checkpoint)
        return actor

    def load(self, checkpoint: Path, version: int) -> None:
        self._checkpoint = (checkpoint, version)
        for i, worker in enumerate(self._workers):
            try:
                _get(worker.load.remote(checkpoint, version))
            except RayActorError:
                self._replace(i)

    def _replace(self, index: int) -> None:
        """A new actor in the place of a dead one, within the budget of restarts."""
        if self._restarts == 0:
            raise RunError(
                "workers keep dying and the budget cluster.restarts is used up; see Ray's logs, then `selfplay resume`"
            )
        self._restarts -= 1
        log.warning("worker %d died; %d restarts left", index, self._restarts)
        self._workers[index] = self._new_worker()

    def play(self, units: Sequence[Unit]) -> Iterator[Played]:
        waiting = list(units)[::-1]
        held: list[dict[str, Unit]] = [{} for _ in self._workers]
        under_way: dict[Any, int] = {}  # finish() call -> worker

        def feed(index: int) -> None:
            while waiting and len(held[index]) < UNITS_PER_WORKER:
                unit = waiting.pop()
                held[index][unit.name] = unit
                self._workers[index].enqueue.remote(unit)
            if held[index]:
                under_way[self._workers[index].finish.remote()] = index

        for i in range(len(self._workers)):
            feed(i)
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            index = under_way.pop(done)
            try:
                played: Played = _get(done)
            except RayActorError:
                self._replace(index)
                waiting.extend(held[index].values())
                held[index].clear()
                feed(index)
                continue
            del held[index][played.unit.name]
            feed(index)
            yield played

    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[list[Answered]]:
        waiting = list(enumerate(jobs))[::-1]
        answers: dict[int, list[Answered]] = {}
        under_way: dict[Any, tuple[int, tuple[int, EvaluationJob]]] = {}

        def feed(index: int) -> None:
            if waiting:
                item = waiting.pop()
                under_way[self._workers[index].evaluate.remote(item[1])] = (index, item)

        for i in range(len(self._workers)):
            feed(i)
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            index, item = under_way.pop(done)
            try:
                answers[item[0]] = _get(done)
            except RayActorError:
                self._replace(index)
                waiting.append(item)
            feed(index)
        return [answers[i] for i in range(len(jobs))]

    def _follow(self, call: Any, progress: Progress) -> dict[str, Any]:
        """Wait for a learner call, passing its progress on."""
        while True:
            done, _ = ray.wait([call], timeout=0.5)
            if done:
                result: dict[str, Any] = _get(call)
                return result
            progress(*_get(self._learner.progress.remote()))

    def warm_up(self, progress: Progress) -> dict[str, Any]:
        return self._follow(self._learner.warm_up.remote(), progress)

    def restore(self, checkpoint: Path) -> None:
        _get(self._learner.restore.remote(checkpoint))

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> dict[str, Any]:
        return self._follow(self._learner.learn.remote(iteration, shards), progress)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        path: Path = _get(self._learner.save.remote(iteration, state))
        return path

    def close(self) -> None:
        ray.shutdown()


def _count(config: Config) -> int:
    return 2 if config.cluster.workers == "fit" else config.cluster.workers


def start_local_ray(config: Config) -> None:
    """A Ray of our own on this machine, without dashboard; its processes die with this one."""
    threads = str(max(config.cluster.worker_threads, config.cluster.learner_threads))
    if config.cluster.address is not None:
        ray.init(
            address=config.cluster.address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}},
        )
        return
    ray.init(
        num_cpus=_count(config) + 1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _system_config={"worker_niceness": 0},  # ours is the job that this machine is for
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}},
    )
