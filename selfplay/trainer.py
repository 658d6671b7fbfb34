"""The learner with its policy, its sources and its checkpoints: what the loop calls in its learning phases."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcts.engines.model import Policy, copy_weights, load_policy
from mcts.engines.value_head import ValueHead
from mcts.tasks import Example, Task, load_task
from selfplay import checkpoint as checkpoints
from selfplay import lora
from selfplay.config import Config, OptimizerConfig
from selfplay.fresh import build_fresh_model
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import build_objective
from selfplay.optimizers import OptimizerSettings, Schedule
from selfplay.reanalyse import Scorer, fresh_traces
from selfplay.shards import iter_traces
from selfplay.store import Place, guard, on_this_node
from selfplay.traces import Trace
from selfplay.worker import stream_seed

Progress = Callable[[int, int, dict[str, Any]], None]
SHOWN = ("policy_loss", "value_loss")
"""Figures of a step that progress shows."""


class Trainer:
    """Holds the policy that learns. Each phase is a function of the config, the weights at its start and the shards
    it is given, so a phase that died is done again from the last checkpoint with the same result."""

    def __init__(self, config: Config, place: Place) -> None:
        self.config = config
        self.store = place.open()
        self.task: Task = load_task(config.task.name, **config.task.settings)
        self._learner: Learner | None = None
        self._version: int | None = None
        """Checkpoint that holds the learner's weights; None while they are on none."""

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("warm up or restore a checkpoint before learning")
        return self._learner

    def stop(self) -> None:
        """Nothing yet."""

    def _new_learner(self, policy: Policy, reference: Policy | None) -> Learner:
        config = self.config
        settings = LearnerSettings(
            optimizer=_optimizer_settings(config.learn.optimizer),
            items_per_step=config.learn.items_per_step,
            batch_tokens=config.learn.batch_tokens,
            max_length=config.engine.max_context,
            threads=config.cluster.learner_threads,
            seed=config.seed,
            precision=config.learn.precision,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
        objective = build_objective(config.learn.objective.name, **config.learn.objective.settings)
        if config.model.freeze_trunk:
            lora.freeze(policy)
        return Learner(policy, objective, settings, reference=reference)

    def warm_up(self, progress: Progress) -> dict[str, Any]:
        """A fresh or given policy, trained on the task's worked examples; metrics of that phase."""
        config = self.config.warmup
        policy = self._first_policy()
        reference = copy.deepcopy(policy) if self._has_kl else None
        self._learner = self._new_learner(policy, reference)
        found = self._warm_up(progress) if config.steps else {}
        if reference is not None:  # the KL is measured against the policy as warm-up leaves it
            copy_weights(policy.model, reference.model, "reference")
        return found

    def _warm_up(self, progress: Progress) -> dict[str, Any]:
        config = self.config.warmup
        schedule = Schedule(
            warmup_steps=config.lr_warmup_steps, total_steps=config.steps, final_scale=config.final_lr_scale
        )
        return self._run(
            0,
            [],
            config.steps,
            schedule,
            progress,
            fresh=self._examples("warm-up", 0),
            fresh_share=1.0,
            purpose="warm-up",
            items_per_step=config.examples_per_step,
        )

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> dict[str, Any]:
        """One learning phase on the traces in `shards`; its metrics. Raises NonFiniteLoss."""
        config = self.config
        steps = config.learn.steps
        schedule = Schedule(
            warmup_steps=0,
            total_steps=steps * config.iterations,
            final_scale=config.learn.final_lr_scale,
            peak=config.learn.lr_scale,
            offset=steps * (iteration - 1),
        )
        for folder in {shard.parent for shard in shards}:
            on_this_node(self.store, folder)
        traces = self._traces([self.store.root / shard for shard in shards])
        self._version = None
        return self._run(
            iteration,
            traces,
            steps,
            schedule,
            progress,
            fresh=self._examples("replay", iteration) if config.learn.replay else None,
            fresh_share=config.learn.replay,
            purpose="learn",
            items_per_step=config.learn.items_per_step,
        )

    def _traces(self, shards: Sequence[Path]) -> list[Trace]:
        """What the phase learns from. Side files are committed once, so a phase done again reads the same."""
        if not self.config.learn.reanalyse:
            return [trace for shard in shards for trace in iter_traces(shard)]
        if self._version is None:
            raise RuntimeError("save or restore a checkpoint before learning from reanalysed traces")
        base = on_this_node(self.store, checkpoints.path_of(Path("checkpoints"), self._version))
        weights = checkpoints.weights_digest(base)
        settings = self.learner.settings
        threads = settings.threads if self.learner.policy.device.type == "cpu" else 1
        return list(fresh_traces(self.store, shards, Scorer(self.learner.models, self._version, weights, threads)))

    def _run(
        self,
        iteration: int,
        traces: list[Any],
        steps: int,
        schedule: Schedule,
        progress: Progress,
        *,
        fresh: Iterator[Example] | None,
        fresh_share: float,
        purpose: str,
        items_per_step: int,
    ) -> dict[str, Any]:
        def report(done: int, figures: Mapping[str, float]) -> None:
            if done % 10 == 0 or done == steps:
                progress(done, steps, {name: figures[name] for name in SHOWN if name in figures})

        found = self.learner.learn(
            iteration,
            traces,
            Budget(steps=steps),
            fresh=fresh,
            fresh_share=fresh_share,
            schedule=schedule,
            version=iteration - 1 if iteration else None,
            purpose=purpose,
            items_per_step=items_per_step,
            progress=report,
        )
        return {name: None if math.isnan(value) else value for name, value in found.items()}

    def _examples(self, purpose: str, iteration: int) -> Iterator[Example]:
        """The task's stream of worked examples, with only a share of its negatives kept: they cost as much as the
        positives and teach the value head alone."""
        share = self.config.warmup.negative_share
        owed = 0.0
        for example in self.task.warmup(stream_seed(self.config.seed, purpose, iteration) >> 1):
            if not example.imitate:
                owed += share
                if owed < 1.0:
                    continue
                owed -= 1.0
            yield example

    def _first_policy(self) -> Policy:
        model = self.config.model
        if model.path is not None:
            policy = load_policy(model.path, device=model.device, dtype=model.dtype, attn=model.attention)
        else:
            folder = self.store.workshop("fresh")
            build_fresh_model(folder, self.task.vocabulary(), model.fresh, seed=self.config.seed)
            policy = load_policy(folder, device=model.device, dtype=model.dtype, attn=model.attention)
            shutil.rmtree(folder)
        if policy.head is None:
            head = ValueHead(policy.model.config.hidden_size, model.value_width, seed=self.config.seed)
            policy.head = head.to(policy.device)
        if model.lora is not None:
            assert model.path is not None  # the config says so
            lora.add(policy, model.path, model.lora, seed=self.config.seed)
        return policy

    @property
    def _has_kl(self) -> bool:
        return bool(self.config.learn.objective.settings.get("kl"))

    def restore(self, checkpoint: Path) -> None:
        """Weights and optimiser state of a checkpoint, after its checksums were verified. Raises CheckpointError."""
        model = self.config.model
        policy, optimizer, _ = checkpoints.load(
            on_this_node(self.store, checkpoint),
            device=model.device,
            dtype=model.dtype,
            attn=model.attention,
            merge=False,
        )
        reference = None
        if self._has_kl:
            first = on_this_node(self.store, checkpoints.path_of(Path("checkpoints"), 0))
            reference = load_policy(first, device=model.device, dtype=model.dtype, attn=model.attention)
        self._learner = self._new_learner(policy, reference)
        self._version = int(checkpoint.name)
        if optimizer is not None:
            self._learner.load_state_dict(optimizer)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `iteration`; its folder. Raises CheckpointError, RunError."""
        learner = self.learner
        with guard(self.store):
            building = self.store.workshop(f"{iteration:05d}")
            checkpoints.write(building, iteration, learner.policy, learner.state_dict(), state)
        saved = self.store.publish(building, f"checkpoints/{iteration:05d}")
        self._version = iteration
        return saved


def _optimizer_settings(config: OptimizerConfig) -> OptimizerSettings:
    return OptimizerSettings(**config.model_dump())
