"""Where the work of an iteration happens: in this process, or in the actors of selfplay/cluster/."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mcts.engines.kinds import check_kind
from mcts.engines.model import check_device, check_folder
from mcts.tasks import load_task
from selfplay.config import Config
from selfplay.errors import Interrupted, NonFiniteLoss, UserError
from selfplay.fits import check_prompts
from selfplay.fleet import Evaluated
from selfplay.fresh import check_architecture
from selfplay.rules import check_rules
from selfplay.store import Place
from selfplay.trainer import Trainer
from selfplay.worker import EvaluationJob, Played, Unit, Worker

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with (done, total, facts) while a phase goes on."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A learning phase has ended; its metrics, or the error that ended it (`NonFiniteLoss`, `Interrupted`)."""

    metrics: dict[str, Any]
    error: Exception | None = None


Done = Played | Evaluated | Learned


class Executor(Protocol):
    """Works somewhere on what it is given; what is done comes out of `poll`. Every piece of work is a function of
    its arguments and the run, so one that died with its process is done again, here or elsewhere. Paths of checkpoints
    and shards are relative to the run: each node has its own way to it."""

    inline: bool
    """Whether `poll` itself does the work; otherwise it only waits for it."""

    @property
    def learning(self) -> bool:
        """Whether a learning phase has begun whose checkpoint is not saved yet."""
        ...

    def publish(self, checkpoint: Path, version: int, *, play: bool) -> None:
        """The weights in `checkpoint` are those of `version`; with `play`, units that begin from now on are played
        with them."""
        ...

    def submit(self, work: Unit | EvaluationJob) -> None:
        """Play a unit with the weights that units are played with when it begins (its `policy_version` says so
        then), or evaluate with those of the job's version. Evaluations go first."""
        ...

    def warm_up(self, progress: Progress) -> None:
        """Begin to build or load the policy and warm it up; it stays in the learner. `Learned` follows."""
        ...

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> None:
        """Begin a learning phase on the weights that the learner holds. `Learned` follows."""
        ...

    def poll(self, seconds: float) -> list[Done]:
        """What has been done since; waits up to `seconds` for the first. Raises the errors that no other worker would
        fare better with."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights and optimiser state into the learner."""
        ...

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the learner's checkpoint; its folder."""
        ...

    def stop(self) -> None:
        """A learning phase saves its state and ends with `Interrupted` as soon as it can. Only sets a flag: a signal
        handler calls it."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `status` shows of it: workers, restarts, what failed lately."""
        ...

    def costs(self) -> dict[str, float]:
        """Timing columns since the last call: what handing weights over has cost."""
        ...

    def show(self, figures: Mapping[str, Any]) -> None:
        """Numbers of the run, for whoever watches it from outside."""
        ...

    def close(self) -> None: ...


class InlineExecutor:
    """One worker and the learner in this process, by turns. No Ray.

    With `play.max_staleness` above 0 it plays ahead as far as that allows and then learns: the same loop, with no time
    gained.
    """

    inline = True

    def __init__(self, config: Config, place: Place) -> None:
        self._config = config
        self._place = place
        self._worker: Worker | None = None
        self._trainer: Trainer | None = None
        self._folders: dict[int, Path] = {}
        self._version: int | None = None
        self._units: deque[Unit] = deque()
        self._playing = 0
        self._jobs: deque[EvaluationJob] = deque()
        self._phase: Callable[[], dict[str, Any]] | None = None
        self._unsaved = False

    @property
    def learning(self) -> bool:
        return self._unsaved

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._config, self._place)
        return self._worker

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._config, self._place)
        return self._trainer

    def publish(self, checkpoint: Path, version: int, *, play: bool) -> None:
        self._folders[version] = checkpoint
        if play:
            self._version = version

    def submit(self, work: Unit | EvaluationJob) -> None:
        if isinstance(work, Unit):
            self._units.append(work)
        else:
            self._jobs.append(work)

    def warm_up(self, progress: Progress) -> None:
        self._phase, self._unsaved = lambda: self.trainer.warm_up(progress), True

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> None:
        self._phase, self._unsaved = lambda: self.trainer.learn(iteration, shards, progress), True

    def poll(self, seconds: float) -> list[Done]:  # noqa: ARG002 - it never waits
        if self._jobs and not self._playing:
            job = self._jobs.popleft()
            self._load(job.policy_version)
            return [Evaluated(job, self.worker.evaluate(job))]
        if self._units or self._playing:
            return [self._play()]
        if self._phase is not None:
            work, self._phase = self._phase, None
            if self._config.cluster.by_turns and self._worker is not None:
                self._worker.rest()
            try:
                return [Learned(work())]
            except (NonFiniteLoss, Interrupted) as error:
                return [Learned({}, error)]
        return []

    def _play(self) -> Played:
        assert self._version is not None
        while self._units and self._playing < 2 and not self._jobs:
            if self._playing and self.worker.engine.version != self._version:
                break  # what is under way ends with the weights that it began with
            self._load(self._version)
            self.worker.enqueue(replace(self._units.popleft(), policy_version=self._version))
            self._playing += 1
        self._playing -= 1
        return self.worker.finish()

    def _load(self, version: int) -> None:
        self.worker.load(self._folders[version], version)

    def restore(self, checkpoint: Path) -> None:
        self.trainer.restore(checkpoint)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        path = self.trainer.save(iteration, state)
        self._unsaved = False
        return path

    def stop(self) -> None:
        if self._trainer is not None:
            self._trainer.stop()

    def facts(self) -> dict[str, Any]:
        return {"workers": {"alive": 1, "wanted": 1}}

    def costs(self) -> dict[str, float]:
        return {}

    def show(self, figures: Mapping[str, Any]) -> None:
        """Nobody asks a single process."""

    def close(self) -> None:
        self._worker = None
        self._trainer = None


def check_parts(config: Config) -> None:
    """Build every part that the config names by hand, so that a wrong name or setting, or two that do not go together,
    is found before anything is written. Raises SettingError."""
    check_rules(config)
    task = load_task(config.task.name, **config.task.settings)
    for split in ("heldout", "dev"):  # a bad problem file is found here too
        if not task.problems(split):
            raise UserError(
                f"task {config.task.name} has no {split} problem, and a run is evaluated on them: keep some"
            )
    if config.warmup.steps or config.learn.replay:
        task.warmup(config.seed)
    if config.cluster.executor == "inline":  # others know of their own devices
        check_device(config.model.device)
    if config.model.path is not None:
        served = config.engine.max_context if config.engine.kind == "torch" else None
        check_kind(config.model.path, attention=config.model.attention, served=served)
        check_folder(config.model.path, config.engine.max_context)
        check_prompts(config, task)
    else:
        task.vocabulary()
        check_architecture(config.model.fresh, config.engine.max_context)


def join_cluster(config: Config) -> None:
    """Join the running Ray cluster that the config names, if any: a launch does so before it writes anything, so that
    one that cannot be joined leaves no run. Raises RunError."""
    if config.cluster.executor == "ray" and config.cluster.address is not None:
        from selfplay.cluster.nodes import connect

        connect(config)


def make_executor(config: Config, place: Place) -> Executor:
    """The executor that the config names."""
    if config.cluster.executor == "inline":
        return InlineExecutor(config, place)
    from selfplay.cluster.executor import RayExecutor

    return RayExecutor(config, place)
