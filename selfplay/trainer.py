"""The learner with its policy, its sources and its checkpoints: what the loop calls in its learning phases."""

from __future__ import annotations

import copy
import math
import shutil
import threading
import time
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
from selfplay.group import Alone, Group, agree
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import build_objective
from selfplay.optimizers import OptimizerSettings, Schedule
from selfplay.partial import PARTIAL, Partial, identity
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
    it is given, so a phase that died is done again from the last checkpoint with the same result; a long one goes on
    from where it saved its state.

    As one of a `group`, every rank has a trainer and calls the same; rank 0 writes.
    """

    def __init__(self, config: Config, place: Place, group: Group | None = None) -> None:
        self.config = config
        self.store = place.open()
        self.group: Group = Alone() if group is None else group
        self._stop = threading.Event()
        self._resting = False
        self._base = ""
        """Which weights the learner holds between two phases."""
        self._version: int | None = None
        """Checkpoint that holds those weights; None while they are on none."""
        self.task: Task = load_task(config.task.name, **config.task.settings)
        self._learner: Learner | None = None

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("warm up or restore a checkpoint before learning")
        if self._resting:
            self._resting = False
            self._learner.move(self.config.model.device)
        return self._learner

    def rest(self) -> None:
        """Free the device's memory until there is work again: weights and optimiser wait in the CPU's."""
        if self._learner is not None and self.config.model.device != "cpu":
            self._learner.move("cpu")
            self._resting = True

    def _new_learner(self, policy: Policy, reference: Policy | None) -> Learner:
        config = self.config
        self._resting = False
        settings = LearnerSettings(
            optimizer=_optimizer_settings(config.learn.optimizer),
            items_per_step=config.learn.items_per_step,
            batch_tokens=config.learn.batch_tokens,
            max_length=config.engine.max_context,
            threads=config.cluster.learner_threads,
            seed=config.seed,
            precision=config.learn.precision,
            gradient_checkpointing=config.model.gradient_checkpointing,
            shard_on=config.model.device if self._sharded else None,
        )
        objective = build_objective(config.learn.objective.name, **config.learn.objective.settings)
        if config.model.freeze_trunk:
            lora.freeze(policy)
        return Learner(policy, objective, settings, reference=reference, group=self.group)

    def stop(self) -> None:
        """End the phase that runs, or the next one: at its next step it saves its state and raises Interrupted. From
        any thread; one rank's is enough."""
        self._stop.set()

    def warm_up(self, progress: Progress) -> dict[str, Any]:
        """A fresh or given policy, trained on the task's worked examples; metrics of that phase."""
        config = self.config.warmup
        partial = Partial.of(self.config, 0, "first", [])
        resume = self._pick_up(partial)
        if resume is None:
            policy = self._first_policy()
            self._learner = self._new_learner(policy, copy.deepcopy(policy) if self._has_kl else None)
        found = self._warm_up(partial, resume, progress) if config.steps else {}
        self._base = "warmed up"
        policy, reference = self.learner.policy, self.learner.reference
        if reference is not None:  # the KL is measured against the policy as warm-up leaves it
            copy_weights(policy.model, reference.model, "reference")
        return found

    def _warm_up(self, partial: Partial, resume: dict[str, Any] | None, progress: Progress) -> dict[str, Any]:
        config = self.config.warmup
        schedule = Schedule(
            warmup_steps=config.lr_warmup_steps, total_steps=config.steps, final_scale=config.final_lr_scale
        )
        return self._run(
            partial,
            resume,
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
        """One learning phase on the traces in `shards`; its metrics. Raises NonFiniteLoss and Interrupted."""
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
        shards = [self.store.root / shard for shard in shards]
        partial = Partial.of(config, iteration, self._base, shards)
        traces: list[Any] = []
        agree(self.group, lambda: traces.extend(self._traces(shards)) if self.group.rank == 0 else None)
        agree(self.group, lambda: traces.extend(self._traces(shards)) if self.group.rank else None)
        self._version = None
        return self._run(
            partial,
            self._pick_up(partial),
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
        base = on_this_node(self.store, checkpoints.name_of(self._version))
        weights = checkpoints.weights_digest(base)
        settings = self.learner.settings
        threads = settings.threads if self.learner.policy.device.type == "cpu" else 1
        return list(fresh_traces(self.store, shards, Scorer(self.learner.models, self._version, weights, threads)))

    def _run(
        self,
        partial: Partial,
        resume: dict[str, Any] | None,
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

        iteration = partial.iteration
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
            keeper=_Keeper(self, partial),
            resume=resume,
        )
        return {name: None if math.isnan(value) else value for name, value in found.items()}

    def _pick_up(self, partial: Partial) -> dict[str, Any] | None:
        """Put what a phase saved into the learner; the state of the phase itself, None where nothing was saved."""

        if not agree(self.group, lambda: self.group.rank == 0 and partial.find(self.store.pull(partial.name)))[0]:
            return None
        policy, saved = self._load(self.store.pull(partial.name))
        assert saved is not None  # a partial state always has it
        reference = None if self._learner is None else self.learner.reference
        if reference is None and self._has_kl:  # in warm-up: it takes the weights as warm-up leaves them
            reference = copy.deepcopy(policy)
        self._learner = self._new_learner(policy, reference)
        self._learner.load_state_dict(saved["optimizer"])
        phase: dict[str, Any] = saved["phase"]
        return phase

    def save_partial(self, partial: Partial, phase: dict[str, Any]) -> None:
        """Save a phase that is under way. Raises CheckpointError."""
        self._write(partial.name, partial.iteration, {"phase": phase}, {"digest": partial.digest})

    def wish(self, began: float) -> str:
        """What a phase whose state was last saved at `began` is to do after a step (`Keeper.due`)."""
        if self._stop.is_set():
            return "stop"
        return "save" if time.monotonic() - began >= self.config.cluster.save_seconds else ""

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
            policy = load_policy(model.path, device=self._device, dtype=model.dtype, attn=model.attention)
        else:
            folder = self.store.workshop("fresh")
            build_fresh_model(folder, self.task.vocabulary(), model.fresh, seed=self.config.seed)
            policy = load_policy(folder, device=self._device, dtype=model.dtype, attn=model.attention)
            shutil.rmtree(folder)
        if policy.head is None:
            head = ValueHead(policy.model.config.hidden_size, model.value_width, seed=self.config.seed)
            policy.head = head.to(policy.device)
        if model.lora is not None:
            assert model.path is not None  # the config says so
            lora.add(policy, model.path, model.lora, seed=self.config.seed)
        return policy

    @property
    def _sharded(self) -> bool:
        return self.config.cluster.sharding == "fsdp2" and self.group.size > 1

    @property
    def _device(self) -> str:
        """Where a policy is loaded: a sharded one goes on to its devices in parts."""
        return "cpu" if self._sharded else self.config.model.device

    @property
    def _has_kl(self) -> bool:
        return bool(self.config.learn.objective.settings.get("kl"))

    def restore(self, checkpoint: Path) -> None:
        """Weights and optimiser state of a checkpoint, after its checksums were verified. Raises CheckpointError."""
        model = self.config.model
        policy, optimizer = self._load(on_this_node(self.store, checkpoint))
        reference = None
        if self._has_kl:
            first = on_this_node(self.store, checkpoints.name_of(0))
            reference = load_policy(first, device=self._device, dtype=model.dtype, attn=model.attention)
        self._learner = self._new_learner(policy, reference)
        if optimizer is not None:
            self._learner.load_state_dict(optimizer)
        self._base = identity(on_this_node(self.store, checkpoint))
        self._version = int(checkpoint.name)

    def _load(self, checkpoint: Path) -> tuple[Policy, dict[str, Any] | None]:
        model = self.config.model
        policy, optimizer, _ = checkpoints.load(
            checkpoint, device=self._device, dtype=model.dtype, attn=model.attention, merge=False
        )
        return policy, optimizer

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `iteration`; its folder. Raises CheckpointError, RunError."""
        name = checkpoints.name_of(iteration).as_posix()
        self._write(name, iteration, {}, state)
        checkpoint = self.store.pull(name)
        self._base = identity(checkpoint)
        self._version = iteration
        return checkpoint

    def _write(self, name: str, iteration: int, beside: dict[str, Any], state: dict[str, Any]) -> None:
        """Write weights and optimiser in the form of a checkpoint, from rank 0; the last of a phase ends its partial
        state."""
        policy, optimizer = self.learner.complete()
        optimizer = {"optimizer": optimizer, **beside} if beside else optimizer

        def write() -> None:
            if self.group.rank:
                return
            with guard(self.store):
                building = self.store.workshop(f"{iteration:05d}")
                checkpoints.write(building, iteration, policy, optimizer, state)
            self.store.publish(building, name)
            if not beside:
                self.store.remove(PARTIAL)

        agree(self.group, write)


class _Keeper:
    """Saves a phase every `cluster.save_seconds`, and when the trainer is to stop."""

    def __init__(self, trainer: Trainer, partial: Partial) -> None:
        self._trainer = trainer
        self._partial = partial
        self._began = time.monotonic()

    def due(self) -> str:
        return self._trainer.wish(self._began)

    def save(self, phase: dict[str, Any]) -> None:
        self._trainer.save_partial(self._partial, phase)
        self._began = time.monotonic()


def _optimizer_settings(config: OptimizerConfig) -> OptimizerSettings:
    return OptimizerSettings(**config.model_dump())
