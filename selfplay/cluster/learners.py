"""The learner as an actor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from selfplay.config import Config
from selfplay.store import Place
from selfplay.trainer import Trainer

Progress = tuple[int, int, dict[str, Any]]


class LearnerActor:
    """The learner in a process of its own."""

    def __init__(self, config: Config, place: Place) -> None:
        self._trainer = Trainer(config, place)
        self._progress: Progress = (0, 0, {})

    def _note(self, done: int, total: int, facts: dict[str, Any]) -> None:
        self._progress = (done, total, facts)

    def progress(self) -> Progress:
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


class Learners:
    def __init__(self, config: Config, place: Place) -> None:
        self._config, self._place = config, place
        self.restart()

    def restart(self) -> None:
        self._actor = (
            ray.remote(LearnerActor)
            .options(num_cpus=self._config.cluster.learner_cpus, max_concurrency=2)
            .remote(self._config, self._place)
        )

    def warm_up(self) -> Any:
        return self._actor.warm_up.remote()

    def restore(self, checkpoint: Path | None) -> Any:
        return self._actor.restore.remote(checkpoint)

    def learn(self, iteration: int, shards: Sequence[Path]) -> Any:
        return self._actor.learn.remote(iteration, shards)

    def save(self, iteration: int, state: dict[str, Any]) -> Any:
        return self._actor.save.remote(iteration, state)

    def progress(self) -> Progress | None:
        try:
            found: Progress = ray.get(self._actor.progress.remote(), timeout=1.0)
        except ray.exceptions.RayError:
            return None
        return found

    def stop(self) -> None: ...

    def rest(self) -> None: ...

    def kill(self) -> None:
        ray.kill(self._actor)
