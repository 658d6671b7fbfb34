"""Traces and worked examples -> items -> packed batches -> loss -> optimiser -> metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mcts.engines.model import turn_end
from mcts.rng import generator, hash64
from mcts.tasks.base import Example
from selfplay.errors import UserError
from selfplay.forward import check_kernels, check_logits, check_tree_mask, checkpoint_layers
from selfplay.group import Alone, Group, agree, unheard
from selfplay.items import Encode, ExampleEncoder
from selfplay.objectives.base import Models, Need, Objective, TraceLike
from selfplay.optimizers import Optimizer, OptimizerSettings, Schedule
from selfplay.packing import Item
from selfplay.phase import Budget, Keeper, Phase, Progress
from selfplay.sharded import ShardedPolicy, complete, gather, shard, spread

if TYPE_CHECKING:
    from mcts.engines.model import Policy

T = TypeVar("T")

__all__ = ["Budget", "Keeper", "Learner", "LearnerSettings", "Progress"]


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
    shard_on: str | None = None
    """Spread the model over the group's devices of this kind (`sharded`); the policy is then given on CPU. None: every
    process holds all of it."""


class Learner:
    """Trains a policy in place. Same policy, state, settings and inputs: same weights, bit for bit (on CPU).

    As one of a `group`, every rank is given the same and calls the same; each works on its share of every step, and
    all make the same optimiser step on the sum of their gradients. What the objective prepares, every rank prepares.
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
        group: Group | None = None,
    ) -> None:
        if settings.items_per_step < 1 or settings.batch_tokens < 1:
            raise ValueError("items_per_step and batch_tokens must be at least 1")
        if Need.REFERENCE in objective.needs and reference is None:
            raise ValueError(f"objective {objective.name} needs a reference model; give one or set its kl to 0")
        if Need.VALUE_HEAD in objective.needs and policy.head is None:
            raise ValueError(f"objective {objective.name} trains a value head and the policy has none; add one")
        if settings.shard_on is not None and settings.optimizer.name == "muon":
            raise UserError("muon needs whole matrices and cluster.sharding: fsdp2 has none: use learn.optimizer adamw")
        self.objective = objective
        self.settings = settings
        self.group: Group = Alone() if group is None else group
        policy.model.eval()  # no dropout: a tree must be the same as its paths
        check_logits(policy)
        self.encode_examples = ExampleEncoder(policy.tokenizer, encode_prompt, turn_end=turn_end(policy.tokenizer))
        self.tree_mask = check_tree_mask(policy, max_length=settings.max_length)
        plain = settings.kernels and settings.precision == "float32" and not settings.gradient_checkpointing
        trained = any(parameter.requires_grad for parameter in policy.model.parameters())
        self.kernels = self.tree_mask and plain and trained and settings.shard_on is None and check_kernels(policy)
        if settings.gradient_checkpointing:
            checkpoint_layers(policy)
        if settings.shard_on is not None:
            policy = shard(policy, settings.shard_on)
            if reference is not None and not isinstance(reference, ShardedPolicy):
                reference = shard(reference, settings.shard_on)
        self.policy = policy
        self.reference = reference
        self.optimizer = Optimizer(policy.model, policy.head, settings.optimizer)
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
        keeper: Keeper | None = None,
        resume: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """One phase. `fresh_share` of each step's items are examples drawn from `fresh` (all of them where no trace
        teaches anything); their loss and that of the traces are mixed by the same share.

        The order of items is a function of (seed, iteration, purpose). `version` is the version of the weights at the
        start: at the first step, tokens drawn by it give `logprob_gap`. With `resume`, what `keeper` was given in a
        phase of the same arguments, and the weights and the optimiser's state of that moment, it goes on from there.
        Returns the metrics, NaN for what was not measured. Raises NonFiniteLoss, and Interrupted where `keeper` stops
        it.
        """
        if not 0.0 <= fresh_share <= 1.0:
            raise ValueError(f"the share of worked examples must lie in [0, 1], not {fresh_share}")
        if fresh_share and fresh is None:
            raise ValueError("a share of worked examples needs a stream of them")
        key = (self.settings.seed, iteration, hash64(*purpose.encode()))
        alone = self.policy.device.type != "cpu" or self.settings.shard_on is not None
        side_by_side = 1 if alone else self.settings.threads
        with self._unheard(), _one_torch_thread(), ThreadPoolExecutor(side_by_side) as pool:
            if self.settings.shard_on is not None:
                self.agree(lambda: None)  # all are here and well, before they wait for each other's tensors
            items: list[Item] = []
            if traces:
                self.agree(lambda: items.extend(self.objective.prepare(traces, self.models, generator(*key, 0))))
            size = items_per_step or self.settings.items_per_step
            phase = Phase(
                self, items, fresh if fresh_share else None, fresh_share, key, version, size, pool, side_by_side
            )
            if resume is not None:
                phase.load_state_dict(resume)
            found = phase.run(budget, schedule or Schedule(), progress, keeper)
        if traces:
            found["trained_staleness"] = sum(iteration - 1 - trace.policy_version for trace in traces) / len(traces)
        return found

    def agree(self, work: Callable[[], T]) -> list[T]:
        """`group.agree`, for work that runs the model."""
        if self.settings.shard_on is None:
            return agree(self.group, work)
        found = work()  # while the others may wait within a layer: see `_unheard`
        return agree(self.group, lambda: found)

    def _unheard(self) -> AbstractContextManager[None]:
        """Around work in which the ranks of a sharded policy wait for each other."""
        return nullcontext() if self.settings.shard_on is None else unheard(self.group)

    def autocast(self) -> torch.autocast:
        """The arithmetic of a training forward."""
        low = self.settings.precision == "bfloat16"
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=low)

    def move(self, device: str) -> None:
        """Move weights and the optimiser's state to another device."""
        for policy in (self.policy, self.reference):
            if policy is not None:
                policy.model.to(device)
                if policy.head is not None:
                    policy.head.to(device)
        self.optimizer.move(device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def state_dict(self) -> dict[str, Any]:
        """What the optimiser must remember; the weights are the policy's."""
        return self.complete()[1]

    def complete(self) -> tuple[Policy, dict[str, Any]]:
        """(policy, the optimiser's state) as they are saved. Of a sharded policy they are gathered on rank 0, and every
        rank must call."""
        state = self.optimizer.state_dict()
        if not isinstance(self.policy, ShardedPolicy):
            return self.policy, state
        keep = self.group.rank == 0
        with self._unheard():
            return gather(self.policy, keep=keep), complete(state, keep=keep)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.policy, ShardedPolicy):
            state = {name: spread(each, self.optimizer.parameters) for name, each in state.items()}
        self.optimizer.load_state_dict(state)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
