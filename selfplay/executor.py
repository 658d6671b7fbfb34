"""Where the work is done. The loop knows this protocol only; `InlineExecutor` runs everything in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mcts.engines.model import check_folder
from mcts.strategies import build as build_strategy
from mcts.tasks import load_task
from selfplay.config import Config
from selfplay.errors import UserError
from selfplay.fresh import check_architecture
from selfplay.objectives import Need, build_objective
from selfplay.trainer import Trainer
from selfplay.worker import Answered, EvaluationJob, Played, Unit, Worker

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with (done, total, facts) while a phase goes on."""


class Executor(Protocol):
    """Runs the phases of an iteration somewhere. Every call is a function of its arguments and the run folder, so
    a phase that died can be run again."""

    def load(self, checkpoint: Path, version: int) -> None:
        """Give every worker the weights of a checkpoint."""
        ...

    def play(self, units: Sequence[Unit]) -> Iterator[Played]:
        """Play units, in any order; each is yielded once its pending shard is written."""
        ...

    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[list[Answered]]:
        """Answers per job, in the order of the jobs."""
        ...

    def warm_up(self, progress: Progress) -> dict[str, Any]:
        """Build or load the policy, warm it up, and keep it in the learner; the metrics."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights and optimiser state into the learner."""
        ...

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> dict[str, Any]:
        """One learning phase; the metrics. Raises NonFiniteLoss."""
        ...

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the learner's checkpoint; its folder."""
        ...

    def close(self) -> None: ...


class InlineExecutor:
    """One worker and the learner in this process, by turns. No Ray."""

    def __init__(self, config: Config, run: Path) -> None:
        self._config = config
        self._run = run
        self._worker: Worker | None = None
        self._trainer: Trainer | None = None

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._config, self._run)
        return self._worker

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._config, self._run)
        return self._trainer

    def load(self, checkpoint: Path, version: int) -> None:
        self.worker.load(checkpoint, version)

    def play(self, units: Sequence[Unit]) -> Iterator[Played]:
        waiting = list(units)[::-1]
        under_way = 0
        while waiting or under_way:
            while waiting and under_way < 2:
                self.worker.enqueue(waiting.pop())
                under_way += 1
            yield self.worker.finish()
            under_way -= 1

    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[list[Answered]]:
        return [self.worker.evaluate(job) for job in jobs]

    def warm_up(self, progress: Progress) -> dict[str, Any]:
        return self.trainer.warm_up(progress)

    def restore(self, checkpoint: Path) -> None:
        self.trainer.restore(checkpoint)

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> dict[str, Any]:
        return self.trainer.learn(iteration, shards, progress)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        return self.trainer.save(iteration, state)

    def close(self) -> None:
        self._worker = None
        self._trainer = None


def check_parts(config: Config) -> None:
    """Build every part that the config names by hand, so that a wrong name or setting is found before anything is
    written. Raises SettingError."""
    task = load_task(config.task.name, **config.task.settings)
    for split in ("heldout", "dev"):
        task.problems(split)  # a bad problem file is found here too
    if config.warmup.steps or config.learn.replay:
        task.warmup(config.seed)
    build_strategy(config.play.search.strategy.name, **config.play.search.strategy.settings)
    objective = build_objective(config.learn.objective.name, **config.learn.objective.settings)
    search = config.play.search
    if (
        Need.BEHAVIOR in objective.needs
        and config.engine.kind == "server"
        and (search.temperature not in (0.0, 1.0) or (search.temperature and search.top_p != 1.0))
    ):
        raise UserError(
            "a server does not say how likely its draws were under another temperature or top_p, and importance ratios "
            "need it: set play.search.temperature and top_p to 1, or the objective's importance to none"
        )
    if config.model.path is not None:
        check_folder(config.model.path, config.engine.max_context)
    else:
        task.vocabulary()
        check_architecture(config.model.fresh)


def make_executor(config: Config, run: Path) -> Executor:
    """The executor that the config names."""
    if config.cluster.executor == "inline":
        return InlineExecutor(config, run)
    from selfplay.cluster import RayExecutor

    return RayExecutor(config, run)
