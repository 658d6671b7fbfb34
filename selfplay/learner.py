"""Traces and worked examples -> items -> packed batches -> loss -> optimiser -> metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcts.engines.model import turn_end
from mcts.rng import generator, hash64
from mcts.tasks.base import Example
from selfplay.errors import NonFiniteLoss, UserError
from selfplay.forward import (
    Outputs,
    batches,
    check_kernels,
    check_logits,
    check_tree_mask,
    checkpoint_layers,
    fit,
    forward,
)
from selfplay.items import Encode, ExampleEncoder
from selfplay.metrics import Means, RunningAuc
from selfplay.objectives.base import Models, Need, Objective, TraceLike
from selfplay.objectives.loss import Totals, composite_loss
from selfplay.optimizers import Optimizer, OptimizerSettings, Schedule
from selfplay.packing import Item, Packed, pack

if TYPE_CHECKING:
    from mcts.engines.model import Policy


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    items_per_step: int = 256
    """Training sequences (trees or chains) per optimiser step, worked examples included."""
    batch_tokens: int = 1536
    """Tokens per forward and backward; a step is cut into such batches. It changes the speed, not the loss."""
    max_length: int = 4096
    """Longest sequence in tokens that the model is given; longer trees are cut, a longer path is an error."""
    row_length: int | None = None
    """Rows that trees are cut to for speed; None: the model's width, where attention begins to cost as much as all
    the rest. It changes the speed, not the loss."""
    kernels: bool = True
    """Train a small Llama on CPU with hand-written gradients where they agree with the model's own."""
    threads: int = 2
    """Batches worked on at once on CPU, each on one torch thread. It changes the speed, not the weights."""
    seed: int = 0
    precision: str = "float32"
    """bfloat16: the forwards of learning run under autocast; weights, gradients and optimiser stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, the same gradients."""


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


class Learner:
    """Trains a policy in place. Same policy, state, settings and inputs: same weights, bit for bit (on CPU).

    Raises ValueError where the objective needs what is not given.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        settings: LearnerSettings,
        *,
        encode_prompt: Encode | None = None,
        reference: Policy | None = None,
    ) -> None:
        if settings.items_per_step < 1 or settings.batch_tokens < 1:
            raise ValueError("items_per_step and batch_tokens must be at least 1")
        if Need.REFERENCE in objective.needs and reference is None:
            raise ValueError(f"objective {objective.name} needs a reference model; give one or set its kl to 0")
        if Need.VALUE_HEAD in objective.needs and policy.head is None:
            raise ValueError(f"objective {objective.name} trains a value head and the policy has none; add one")
        self.policy = policy
        self.objective = objective
        self.settings = settings
        policy.model.eval()  # no dropout: a tree must be the same as its paths
        check_logits(policy)
        self.optimizer = Optimizer(policy.model, policy.head, settings.optimizer)
        self.encode_examples = ExampleEncoder(policy.tokenizer, encode_prompt, turn_end=turn_end(policy.tokenizer))
        self.tree_mask = check_tree_mask(policy, max_length=settings.max_length)
        plain = settings.kernels and settings.precision == "float32" and not settings.gradient_checkpointing
        trained = any(parameter.requires_grad for parameter in policy.model.parameters())
        self.kernels = self.tree_mask and plain and trained and check_kernels(policy)
        if settings.gradient_checkpointing:
            checkpoint_layers(policy)
        row_length = settings.row_length or int(policy.model.config.hidden_size)
        self.models = Models(
            policy, reference, settings.batch_tokens, settings.max_length, row_length, tree_mask=self.tree_mask
        )

    def learn(
        self,
        iteration: int,
        traces: Sequence[TraceLike],
        budget: Budget,
        *,
        fresh: Iterator[Example] | None = None,
        fresh_share: float = 0.0,
        schedule: Schedule | None = None,
        version: int | None = None,
        purpose: str = "learn",
        items_per_step: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """One phase. `fresh_share` of each step's items are examples drawn from `fresh` (all of them where no trace
        teaches anything); their loss and that of the traces are mixed by the same share.

        The order of items is a function of (seed, iteration, purpose). `version` is the version of the weights at the
        start: at the first step, tokens drawn by it give `logprob_gap`. Returns the metrics, NaN for what was not
        measured. Raises NonFiniteLoss.
        """
        if not 0.0 <= fresh_share <= 1.0:
            raise ValueError(f"the share of worked examples must lie in [0, 1], not {fresh_share}")
        if fresh_share and fresh is None:
            raise ValueError("a share of worked examples needs a stream of them")
        key = (self.settings.seed, iteration, hash64(*purpose.encode()))
        side_by_side = self.settings.threads if self.policy.device.type == "cpu" else 1
        with _one_torch_thread(), ThreadPoolExecutor(side_by_side) as pool:
            items = self.objective.prepare(traces, self.models, generator(*key, 0)) if traces else []
            size = items_per_step or self.settings.items_per_step
            phase = _Phase(
                self, items, fresh if fresh_share else None, fresh_share, key, version, size, pool, side_by_side
            )
            found = phase.run(budget, schedule or Schedule(), progress)
        if traces:
            found["trained_staleness"] = sum(iteration - 1 - trace.policy_version for trace in traces) / len(traces)
        return found

    def autocast(self) -> torch.autocast:
        """The arithmetic of a training forward."""
        low = self.settings.precision == "bfloat16"
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=low)

    def state_dict(self) -> dict[str, Any]:
        """What the optimiser must remember; the weights are the policy's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """One kind of material within a step."""

    items: list[Item]
    share: float
    traces: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """What one forward and backward pass gives."""

    packed: Packed
    outputs: Outputs  # without gradient
    loss: float
    parts: dict[str, float]
    gradients: tuple[Tensor | None, ...]  # of the optimiser's parameters, in their order; empty: none at all


class _Phase:
    """The state of one call of `learn`."""

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
        self.fresh = fresh
        self.n_fresh = 0 if fresh is None else (max(1, round(fresh_share * size)) if items else size)
        self.n_traces = min(size - self.n_fresh, size) if items else 0
        self.key = key
        self.version = version
        self.order: list[int] = []
        self.epoch = 0
        self.means = Means()
        self.auc = RunningAuc()
        self.trained = 0
        self.seen = 0

    def run(self, budget: Budget, schedule: Schedule, progress: Progress | None) -> dict[str, float]:
        steps = 0
        while self.n_fresh + self.n_traces and not self._spent(budget, steps):
            sources = self._draw()
            if not sources:
                break
            figures = self._step(sources, schedule.scale(steps), first=steps == 0)
            steps += 1
            self.means.add(figures)
            if progress is not None:
                progress(steps, figures)
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
            "steps": float(steps),
            "items": float(len(self.items)),
            "epochs": self.seen / len(self.items) if self.items else 0.0,
        }

    def _spent(self, budget: Budget, steps: int) -> bool:
        if budget.steps is not None and steps >= budget.steps:
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
        if self.fresh is not None:
            settings = self.learner.settings
            examples = [example for _, example in zip(range(self.n_fresh), self.fresh, strict=False)]
            if examples:
                found = self.learner.encode_examples(examples)
                longest = max(map(len, found))
                if longest > settings.max_length:
                    raise UserError(
                        f"a worked example of {longest} tokens is longer than engine.max_context "
                        f"({settings.max_length}): raise it, or leave out such examples"
                    )
                found = fit(found, settings.max_length, tree_mask=self.learner.tree_mask)
                sources.append(_Source(found, self.n_fresh / total, False))
        return sources

    def _step(self, sources: list[_Source], scale: float, *, first: bool) -> dict[str, float]:
        """One optimiser step over all batches of all sources; its figures.

        Batches are worked on side by side, each on one torch thread, and their gradients are added in order: small
        models gain far more from that than from operators on several threads, and the sum does not depend on how many
        work at it.
        """
        learner = self.learner
        work = []
        for source in sources:
            totals = Totals.of(source.items)
            for number, batch in enumerate(batches(source.items, learner.settings.batch_tokens)):
                work.append((source, totals, batch, number == 0))
        work.sort(key=lambda task: -sum(len(task[0].items[i]) for i in task[2]))  # large ones first: none waits alone
        parts: dict[str, float] = {}
        entropies: list[Tensor] = []
        gaps: list[Tensor] = []
        # one at a time where nothing is side by side: of a large model, only two sets of gradients fit
        results = self.pool.map(self._work, work) if self.side_by_side > 1 else map(self._work, work)
        for source, *_ in work:
            found = next(results)  # not by zip, which would hold the last ones while the next are made
            if not math.isfinite(found.loss):
                learner.optimizer.zero_grad()
                raise NonFiniteLoss("the loss is not a finite number; lower the learning rate")
            learner.optimizer.accumulate(found.gradients)
            for name, value in found.parts.items():
                name = name if source.traces else f"replay_{name}"
                parts[name] = parts.get(name, 0.0) + value
            self._observe(source, found.outputs, found.packed, entropies, gaps, first=first)
            del found
        norm = learner.optimizer.clip()
        if not math.isfinite(norm):
            learner.optimizer.zero_grad()
            raise NonFiniteLoss("the gradient is not a finite number; lower the learning rate")
        learner.optimizer.step(scale)
        return self._figures(sources, parts, norm, entropies, gaps)

    def _work(self, task: tuple[_Source, Totals, list[int], bool]) -> _Batch:
        return self._batch(*task)

    def _batch(self, source: _Source, totals: Totals, batch: list[int], is_first: bool) -> _Batch:
        """Forward and backward of one batch, touching nothing that other batches share."""
        learner = self.learner
        packed = pack([source.items[i] for i in batch], share_rows=learner.tree_mask).to(learner.policy.device)
        # entropy of the first batch stands for the step: it costs a pass over all logits
        with learner.autocast():
            outputs = forward(
                learner.policy, packed, tree_mask=learner.tree_mask, kernels=learner.kernels, entropy=is_first
            )
        loss, parts = self._loss(source, outputs, packed, totals)
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(source.share * loss, learner.optimizer.parameters, allow_unused=True)
        outputs = Outputs(
            outputs.logprobs.detach(),
            None if outputs.value_logits is None else outputs.value_logits.detach(),
            outputs.entropy,
        )
        return _Batch(
            packed, outputs, float(loss.detach()), {name: float(value) for name, value in parts.items()}, gradients
        )

    def _loss(
        self, source: _Source, outputs: Outputs, packed: Packed, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if source.traces:
            return self.learner.objective.loss(outputs, packed, totals)
        return composite_loss(outputs, packed, totals, self.learner.objective.replay)

    def _observe(
        self,
        source: _Source,
        outputs: Outputs,
        packed: Packed,
        entropies: list[Tensor],
        gaps: list[Tensor],
        *,
        first: bool,
    ) -> None:
        self.trained += packed.tokens
        if outputs.entropy is not None:
            entropies.append(outputs.entropy)
        if outputs.value_logits is not None and source.traces == bool(self.n_traces):
            self.auc.add(outputs.value_logits.sigmoid(), packed.value_label)
        if first and source.traces and self.version is not None:
            here = (packed.version == self.version) & ~torch.isnan(packed.logprobs)
            gaps.append((outputs.logprobs.detach() - packed.logprobs)[here].abs())

    def _figures(
        self, sources: list[_Source], parts: dict[str, float], norm: float, entropies: list[Tensor], gaps: list[Tensor]
    ) -> dict[str, float]:
        figures = {**parts, "grad_norm": norm}
        own = "" if sources[0].traces else "replay_"
        for name in ("cross_entropy", "nll"):
            if own + name in parts:
                figures["policy_loss"] = parts[own + name]
                break
        if own + "value_loss" in parts:
            figures["value_loss"] = parts[own + "value_loss"]
        for name, values in (("entropy", entropies), ("logprob_gap", gaps)):
            joined = torch.cat(values) if values else torch.zeros(0)
            if len(joined):
                figures[name] = float(joined.mean())
        return figures


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
