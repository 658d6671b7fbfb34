"""What the learner asks of an objective (DESIGN.md, decision 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from mcts.tree import Tree
from selfplay.forward import Outputs
from selfplay.objectives.loss import Coefficients, Totals
from selfplay.packing import Item, Packed

if TYPE_CHECKING:
    from mcts.engines.model import Policy


class Need(StrEnum):
    """What an objective needs beside traces; the learner checks it before any work is done."""

    REFERENCE = "reference"
    """A frozen reference model."""
    VALUE_HEAD = "value_head"
    BEHAVIOR = "behavior"
    """The log-probabilities of every imitated step when it was drawn; `prepare` raises UserError where one lacks."""


class TraceLike(Protocol):
    """The part of a trace that objectives read (`selfplay.traces.Trace`)."""

    @property
    def problem_id(self) -> str: ...
    @property
    def iteration(self) -> int: ...
    @property
    def policy_version(self) -> int: ...
    @property
    def path(self) -> list[int]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def tree(self) -> Tree: ...


@dataclass(frozen=True, slots=True)
class Models:
    """The models that `prepare` may run forwards with."""

    policy: Policy
    reference: Policy | None = None
    tokens: int = 4096
    """Tokens per forward."""
    max_length: int = 4096
    """Longest segment, in tokens."""
    row_length: int | None = None
    """Where trees are cut for speed (`forward.fit`); None: only at `max_length`."""
    tree_mask: bool = True


class Objective(Protocol):
    """A way of learning."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def replay(self) -> Coefficients:
        """What worked examples are trained with."""
        ...

    def prepare(self, traces: Sequence[TraceLike], models: Models, rng: np.random.Generator) -> list[Item]:
        """The training items of all traces of a phase. May run forwards and see whole groups. Sequences without any
        loss are left out. Items fit the model (`forward.fit`)."""
        ...

    def loss(self, outputs: Outputs, packed: Packed, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch's share of the step's loss, and its parts (`loss.composite_loss`)."""
        ...
