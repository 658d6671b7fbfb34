"""What is measured: a config, a checkpoint that can play it, and its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcts.engines.model import Policy, load_policy
from mcts.engines.torch_engine import TorchEngine
from mcts.tasks import load_task
from mcts.tasks.base import Task
from mcts.types import Problem
from selfplay import checkpoint as checkpoints
from selfplay.config import Config, load_config
from selfplay.run_folder import RunFolder
from selfplay.source import find_source
from selfplay.trainer import Trainer
from selfplay.worker import make_engine

ONE_THREAD = ("cluster.worker_threads=1", "cluster.learner_threads=1")


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, its config and task. One thread everywhere: figures are per core."""

    config: Config
    checkpoint: Path
    task: Task

    @property
    def head(self) -> Path:
        return self.checkpoint / "value_head.safetensors"

    def policy(self, attention: str) -> Policy:
        """The weights with plain attention, for baselines."""
        return load_policy(self.checkpoint, head=self.head, attn=attention)

    @property
    def parameters(self) -> int:
        """Of the policy, without its value head."""
        return sum(p.numel() for p in self.policy(self.config.model.attention).model.parameters())

    def engine(self, clock: Callable[[], float]) -> TorchEngine:
        """A new engine, its seconds measured by `clock`."""
        engine = make_engine(self.config, self.checkpoint / "policy", self.head, 0, self.task)
        engine.batch.clock = clock
        return engine

    def problems(self, count: int) -> Sequence[Problem]:
        """`count` different training problems, or all where there are fewer."""
        return self.task.problems("train")[:count]


def of_run(run: Path) -> Subject:
    """A trained run's last checkpoint."""
    source = find_source(str(run))
    cluster = source.config.cluster.model_copy(update={"worker_threads": 1, "learner_threads": 1})
    config = source.config.model_copy(update={"cluster": cluster})
    return Subject(config, source.policy.parent, source.load_task())


def fresh(config_file: Path, folder: Path, warmup_steps: int, overrides: Sequence[str] = ()) -> Subject:
    """The config's model, built anew in `folder` and warmed up for some steps, so that it writes steps of the usual
    length."""
    short = (f"warmup.steps={warmup_steps}", f"warmup.lr_warmup_steps={min(10, warmup_steps)}")
    config = load_config(config_file, (*ONE_THREAD, *short, *overrides))
    run = RunFolder.create(folder, config)
    try:
        trainer = Trainer(config, run.place)
        trainer.warm_up(lambda _done, _total, _facts: None)
        saved = trainer.save(0, {})
    finally:
        run.close()
    return Subject(config, checkpoints.path_of(saved.parent, 0), load_task(config.task.name, **config.task.settings))
