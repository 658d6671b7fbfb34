"""The worker as an actor: a thin shell around `selfplay.worker.Worker`."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path

import ray

from selfplay.cluster.weights import Fetched, Weights, fetch, forget
from selfplay.config import Config
from selfplay.fleet import Casualty, Part, Work
from selfplay.lone import Errand, search_alone
from selfplay.store import Place
from selfplay.worker import Answered, EvaluationJob, Played, Unit, Worker

LIFE = "life"
"""Concurrency group of the calls that are answered while the worker works."""


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, config: Config, place: Place) -> None:
        faulthandler.enable()
        self._config = config
        self._place = place
        self._node: str = ray.get_runtime_context().get_node_id()
        self._folder: Path | None = None

    def hello(self) -> tuple[str, int]:
        """(node, process id), once the worker is up. The first call. Raises RunError where its node does not see the
        run."""
        self._worker = Worker(self._config, self._place)
        self._worker.store.check()
        return self._node, os.getpid()

    @ray.method(concurrency_group=LIFE)  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        """A sign of life."""

    def load(self, weights: Weights) -> Fetched:
        self._folder, fetched = fetch(weights, self._node)
        self._worker.load(self._folder, weights.version)
        return fetched

    def enqueue(self, unit: Unit) -> None:
        self._worker.enqueue(unit)

    def finish(self) -> Played:
        return self._worker.finish()

    def evaluate(self, job: EvaluationJob) -> list[Answered]:
        return self._worker.evaluate(job)

    def alone(self, work: Work) -> Part | Casualty:
        assert self._folder is not None  # weights come before any order
        errand = Errand(self._config, self._place, self._folder, work, os.getpid())
        return search_alone(errand, self._config.cluster.lease_seconds / 2)

    def record(self, work: Work, reason: str) -> Part:
        return self._worker.record(work, reason)

    def rest(self) -> None:
        """Free the device's memory until the next `load`."""
        self._worker.rest()

    def forget(self) -> None:
        """Delete what this node keeps of the run's weights."""
        forget(self._place.run_id, self._node)
