"""One learning phase: the state of a call of `Learner.learn`, step by step, alone or as one of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mcts.rng import generator
from mcts.tasks.base import Example
from selfplay.errors import Interrupted, NonFiniteLoss
from selfplay.feed import Feed
from selfplay.forward import Outputs, batches, fit, forward
from selfplay.group import shares, unheard
from selfplay.metrics import Means, RunningAuc
from selfplay.objectives.base import Need
from selfplay.objectives.loss import Totals, composite_loss
from selfplay.optimizers import Schedule
from selfplay.packing import Item, Packed, pack
from selfplay.sharded import ShardedPolicy, backward, drop_unreached

if TYPE_CHECKING:
    from selfplay.learner import Learner


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a phase learns. The first limit that is reached ends it; seconds are none, they would not repeat."""

    steps: int | None = None
    tokens: int | None = None
    """Tokens of the items trained on, each counted as often as it was trained on."""
    epochs: float | None = None
    """Passes over the items made from traces."""

    def __post_init__(self) -> None:
        if self.steps is None and self.tokens is None and self.epochs is None:
            raise ValueError("a phase needs a limit: give steps, tokens or epochs")


Progress = Callable[[int, Mapping[str, float]], None]
"""Called after each step with the number of steps made and that step's figures."""


class Keeper(Protocol):
    """Lets the work of a long phase outlive its process."""

    def due(self) -> str:
        """Asked in every step: "save", "stop" (save and raise Interrupted), or "" for neither. Of a group, rank 0
        says when to save and any rank may stop."""
        ...

    def save(self, phase: dict[str, Any]) -> None:
        """Called on every rank with what `Learner.learn` needs as `resume`, beside weights and optimiser: plain
        values and tensors, the same on every rank."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """One kind of material within a step."""

    items: list[Item]
    share: float
    traces: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One batch to be worked on."""

    source: _Source
    totals: Totals
    items: list[int]
    entropy: bool
    """Of the first batch, which stands for the step: it costs a pass over all logits."""
    idle: bool = False
    """Only keeps the others of a sharded policy company: its loss is zero and nothing of it is reported."""

    @property
    def tokens(self) -> int:
        return sum(len(self.source.items[i]) for i in self.items)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """What one forward and backward pass gives."""

    packed: Packed
    outputs: Outputs  # without gradient
    loss: float
    parts: dict[str, float]
    gradients: tuple[Tensor | None, ...]  # of the optimiser's parameters, in their order; empty: none at all
    reached: str = ""  # of a sharded policy, whose gradients are added already (`sharded.backward`)


class _Mean:
    """A mean over many tensors."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sum += float(values.double().sum())
        self.count += values.numel()


class Phase:
    """`items` are the traces', `fresh` the stream of worked examples (None: none are wanted); `key` is what the order
    of items depends on. `pool` works on up to `side_by_side` batches at once."""

    def __init__(
        self,
        learner: Learner,
        items: list[Item],
        fresh: Iterator[Example] | None,
        fresh_share: float,
        key: tuple[int, int, int],
        version: int | None,
        size: int,
        pool: Executor,
        side_by_side: int,
    ) -> None:
        self.learner = learner
        self.pool = pool
        self.side_by_side = side_by_side
        self.items = items
        self.n_fresh = 0 if fresh is None else (max(1, round(fresh_share * size)) if items else size)
        longest = learner.settings.max_length
        self.feed = None if fresh is None else Feed(fresh, learner.encode_examples, self.n_fresh, longest)
        self.n_traces = min(size - self.n_fresh, size) if items else 0
        self.key = key
        self.version = version
        self.order: list[int] = []
        self.epoch = 0
        self.means = Means()
        self.auc = RunningAuc()
        self.steps = 0
        self.trained = 0
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        """Between two steps: plain values and tensors."""
        return {
            "order": torch.tensor(self.order, dtype=torch.int64),
            "counts": {name: getattr(self, name) for name in ("epoch", "steps", "trained", "seen")}
            | {"drawn": 0 if self.feed is None else self.feed.drawn},
            "means": self.means.state_dict(),
            "auc": [torch.from_numpy(counts.copy()) for counts in self.auc.counts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"].tolist()
        counts = dict(state["counts"])
        drawn = counts.pop("drawn")
        for name, value in counts.items():
            setattr(self, name, value)
        self.means.load_state_dict(state["means"])
        for mine, saved in zip(self.auc.counts, state["auc"], strict=True):
            mine[:] = saved.cpu().numpy()
        if self.feed is not None:
            self.feed.skip(drawn)  # those were learned from already

    def run(
        self, budget: Budget, schedule: Schedule, progress: Progress | None, keeper: Keeper | None
    ) -> dict[str, float]:
        while self.n_fresh + self.n_traces and not self._spent(budget):
            sources = self._draw()
            if not sources:
                break
            if self.feed is not None and self._two_threads and self.steps + 1 != budget.steps:
                self.feed.look_ahead(self.pool)
            figures, wish = self._step(sources, schedule.scale(self.steps), keeper)
            self.steps += 1
            self.means.add(figures)
            if progress is not None:
                progress(self.steps, figures)
            if keeper is not None and wish and not self._spent(budget):
                keeper.save(self.state_dict())
                if wish == "stop":
                    raise Interrupted(f"learning was asked to stop and saved its state after {self.steps} steps")
        names = ("policy_loss", "value_loss", "entropy", "kl", "grad_norm", "cross_entropy", "target_kl", "nll")
        weighed = ("importance_ratio", "importance_capped") if Need.BEHAVIOR in self.learner.objective.needs else ()
        return {
            **{
                name: self.means.get(name)
                for name in (*names, *weighed, "replay_nll", "replay_value_loss", "logprob_gap")
            },
            "value_auc": self.auc.value(),
            "trained_per_path": float(not self.learner.tree_mask),
            "tokens": float(self.trained),
            "steps": float(self.steps),
            "items": float(len(self.items)),
            "epochs": self.seen / len(self.items) if self.items else 0.0,
        }

    @property
    def _two_threads(self) -> bool:
        """Whether a thread of the pool has time beside this one: on a GPU all wait for the device."""
        return self.side_by_side > 1 or self.learner.policy.device.type != "cpu"

    def _spent(self, budget: Budget) -> bool:
        if budget.steps is not None and self.steps >= budget.steps:
            return True
        if budget.tokens is not None and self.trained >= budget.tokens:
            return True
        return budget.epochs is not None and self.seen >= budget.epochs * len(self.items)

    def _draw(self) -> list[_Source]:
        """The items of the next step; passes over the traces' items in a new order each."""
        total = self.n_traces + self.n_fresh
        sources = []
        if self.n_traces:
            chosen = []
            for _ in range(self.n_traces):
                if not self.order:
                    self.epoch += 1
                    self.order = generator(*self.key, self.epoch).permutation(len(self.items)).tolist()
                chosen.append(self.items[self.order.pop()])
            self.seen += len(chosen)
            sources.append(_Source(chosen, self.n_traces / total, True))
        found = [] if self.feed is None else self.feed.take()
        if found:
            found = fit(found, self.learner.settings.max_length, tree_mask=self.learner.tree_mask)
            sources.append(_Source(found, self.n_fresh / total, False))
        return sources

    def _tasks(self, sources: list[_Source]) -> list[_Task]:
        """This rank's batches of a step, large ones first so that none waits alone."""
        learner, group = self.learner, self.learner.group
        tasks = []
        for source in sources:
            totals = Totals.of(source.items)
            for number, batch in enumerate(batches(source.items, learner.settings.batch_tokens)):
                tasks.append(_Task(source, totals, batch, number == 0))
        tasks.sort(key=lambda task: -task.tokens)
        if group.size == 1:
            return tasks
        given = shares([task.tokens for task in tasks], group.size)
        mine = [tasks[i] for i in given[group.rank]]
        if isinstance(learner.policy, ShardedPolicy):  # all make the same number of forwards
            mine += [replace(tasks[-1], idle=True)] * (max(map(len, given)) - len(mine))
        return mine

    def _step(self, sources: list[_Source], scale: float, keeper: Keeper | None) -> tuple[dict[str, float], str]:
        """One optimiser step over all batches of all sources, the same on every rank; its figures, and what is to be
        done after it (`Keeper.due`)."""
        learner, group = self.learner, self.learner.group
        auc = RunningAuc()
        told = learner.agree(
            lambda: {"wish": "" if keeper is None else keeper.due(), **self._accumulate(self._tasks(sources), auc)},
        )
        if not all(each["finite"] for each in told):
            learner.optimizer.zero_grad()
            raise NonFiniteLoss("the loss is not a finite number; lower the learning rate")
        with unheard(group):
            self._sum([each["reached"] for each in told], auc)
            norm = learner.optimizer.clip()
        self.auc.merge(auc)
        self.trained += sum(each["tokens"] for each in told)
        if not math.isfinite(norm):
            learner.optimizer.zero_grad()
            raise NonFiniteLoss("the gradient is not a finite number; lower the learning rate")
        learner.optimizer.step(scale)
        wish = "stop" if any(each["wish"] == "stop" for each in told) else told[0]["wish"]
        return self._figures(sources, told, norm), wish

    def _sum(self, reached: Sequence[str], auc: RunningAuc) -> None:
        """Add up what the ranks have each accumulated: gradients, and the counts of `auc`."""
        learner, group = self.learner, self.learner.group
        if group.size == 1:
            return
        counts = [torch.from_numpy(each) for each in auc.counts]
        if isinstance(learner.policy, ShardedPolicy):
            drop_unreached(learner.policy, reached)
            group.sum(counts)
        else:
            group.sum([*learner.optimizer.gradients(reached), *counts])

    def _accumulate(self, tasks: list[_Task], auc: RunningAuc) -> dict[str, Any]:
        """Forward and backward of the batches; their gradients are left in the optimiser. What the group must know.

        Batches are worked on side by side, each on one torch thread, and their gradients are added in order: small
        models gain far more from that than from operators on several threads, and the sum does not depend on how many
        work at it.
        """
        learner = self.learner
        parts: dict[str, float] = {}
        means = {"entropy": _Mean(), "logprob_gap": _Mean()}
        tokens, finite, reached = 0, True, ["00"]
        # one at a time where nothing is side by side: of a large model, only two sets of gradients fit
        results = self.pool.map(self._batch, tasks) if self.side_by_side > 1 else map(self._batch, tasks)
        for task in tasks:
            found = next(results)  # not by zip, which would hold the last ones while the next are made
            if not math.isfinite(found.loss):
                finite = False
                if found.reached:
                    continue  # the others of a sharded policy still count on this rank
                break
            if task.idle:
                continue
            reached.append(found.reached)
            learner.optimizer.accumulate(found.gradients)
            for name, value in found.parts.items():
                name = name if task.source.traces else f"replay_{name}"
                parts[name] = parts.get(name, 0.0) + value
            tokens += found.packed.tokens
            self._observe(task.source, found.outputs, found.packed, means, auc)
            del found
        sharded = isinstance(learner.policy, ShardedPolicy)
        return {
            "finite": finite,
            "tokens": tokens,
            "parts": parts,
            "means": {name: (mean.sum, mean.count) for name, mean in means.items()},
            "reached": _either(reached) if sharded else learner.optimizer.reached(),
        }

    def _batch(self, task: _Task) -> _Batch:
        """Forward and backward of one batch, touching nothing that other batches share."""
        learner, source = self.learner, task.source
        packed = pack([source.items[i] for i in task.items], share_rows=learner.tree_mask).to(learner.policy.device)
        with learner.autocast():
            outputs = forward(
                learner.policy, packed, tree_mask=learner.tree_mask, kernels=learner.kernels, entropy=task.entropy
            )
        gradients: tuple[Tensor | None, ...] = ()
        reached = ""
        if isinstance(learner.policy, ShardedPolicy):
            loss, parts, reached = backward(
                outputs,
                lambda found: self._loss(source, found, packed, task.totals),
                share=source.share,
                idle=task.idle,
            )
        else:
            loss, parts = self._loss(source, outputs, packed, task.totals)
            if loss.requires_grad:
                gradients = torch.autograd.grad(source.share * loss, learner.optimizer.parameters, allow_unused=True)
        outputs = Outputs(
            outputs.logprobs.detach(),
            None if outputs.value_logits is None else outputs.value_logits.detach(),
            outputs.entropy,
        )
        figures = {name: float(value) for name, value in parts.items()}
        return _Batch(packed, outputs, float(loss.detach()), figures, gradients, reached)

    def _loss(
        self, source: _Source, outputs: Outputs, packed: Packed, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if source.traces:
            return self.learner.objective.loss(outputs, packed, totals)
        return composite_loss(outputs, packed, totals, self.learner.objective.replay)

    def _observe(
        self, source: _Source, outputs: Outputs, packed: Packed, means: dict[str, _Mean], auc: RunningAuc
    ) -> None:
        if outputs.entropy is not None:
            means["entropy"].add(outputs.entropy)
        if outputs.value_logits is not None and source.traces == bool(self.n_traces):
            auc.add(outputs.value_logits.sigmoid(), packed.value_label)
        if self.steps == 0 and source.traces and self.version is not None:
            here = (packed.version == self.version) & ~torch.isnan(packed.logprobs)
            means["logprob_gap"].add((outputs.logprobs - packed.logprobs)[here].abs())

    def _figures(self, sources: list[_Source], told: Sequence[dict[str, Any]], norm: float) -> dict[str, float]:
        """A step's figures, from what all ranks told, in the order of ranks."""
        figures: dict[str, float] = {}
        for each in told:
            for name, value in each["parts"].items():
                figures[name] = figures.get(name, 0.0) + value
        own = "" if sources[0].traces else "replay_"
        for name in ("cross_entropy", "nll"):
            if own + name in figures:
                figures["policy_loss"] = figures[own + name]
                break
        if own + "value_loss" in figures:
            figures["value_loss"] = figures[own + "value_loss"]
        figures["grad_norm"] = norm
        for name in ("entropy", "logprob_gap"):
            found = np.array([each["means"][name] for each in told]).sum(axis=0)
            if found[1]:
                figures[name] = float(found[0] / found[1])
        return figures


def _either(flags: Sequence[str]) -> str:
    """Strings of 0 and 1 of one length: 1 where any has it."""
    return "".join("01"["1" in place] for place in zip(*flags, strict=True))
