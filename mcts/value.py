"""Where a node's value comes from: the engine's value head, a constant, or rollouts. No torch."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from mcts.types import SearchError
from mcts.waves import Expand, Replies, Wave

if TYPE_CHECKING:
    from mcts.context import SearchContext


class ValueSource(Protocol):
    """Estimates how likely a path is to end in a win, in [0, 1]."""

    name: ClassVar[str]
    immediate: ClassVar[bool]
    """True: `value` answers at once, without a wave."""

    def value(self, ctx: SearchContext, node: int) -> float:
        """Estimate of one node that is not judged yet. NaN: this source has none so far."""
        ...

    def evaluate(self, ctx: SearchContext, nodes: Sequence[int]) -> Generator[Wave, Replies, list[float]]:
        """Estimates of several nodes [len(nodes)], with waves where they are needed."""
        ...


@dataclass(frozen=True, slots=True)
class HeadValue:
    """The value head, read at the step's last token when the step was drawn: it costs no token."""

    name: ClassVar[str] = "head"
    immediate: ClassVar[bool] = True

    def value(self, ctx: SearchContext, node: int) -> float:
        return ctx.tree.raw_value[node]

    def evaluate(self, ctx: SearchContext, nodes: Sequence[int]) -> Generator[Wave, Replies, list[float]]:
        yield from ()
        return [self.value(ctx, node) for node in nodes]


@dataclass(frozen=True, slots=True)
class ConstantValue:
    """The same value everywhere: what a search does without any judgement."""

    constant: float = 0.5
    name: ClassVar[str] = "constant"
    immediate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.constant <= 1.0:
            raise ValueError(f"a constant value must lie in [0, 1], not {self.constant}")

    def value(self, ctx: SearchContext, node: int) -> float:  # noqa: ARG002 - part of the protocol
        return self.constant

    def evaluate(self, ctx: SearchContext, nodes: Sequence[int]) -> Generator[Wave, Replies, list[float]]:
        yield from ()
        return [self.value(ctx, node) for node in nodes]


@dataclass(frozen=True, slots=True)
class RolloutValue:
    """Mean reward of `n` completions of the path. They stay in the tree as nodes of kind `rollout`, so a win
    among them is kept and their tokens are counted like any other."""

    n: int = 1
    temperature: float = 0.0
    name: ClassVar[str] = "rollout"
    immediate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature < 0.0:
            raise ValueError("rollouts need n >= 1 and temperature >= 0")

    def value(self, ctx: SearchContext, node: int) -> float:  # noqa: ARG002 - known only after `evaluate`
        return math.nan

    def evaluate(self, ctx: SearchContext, nodes: Sequence[int]) -> Generator[Wave, Replies, list[float]]:
        """NaN for a node of which no completion ended before the budget did."""
        ends: list[list[int]] = [[node] for node in nodes]
        rewards: list[list[float]] = [[] for _ in nodes]
        first = True
        while True:
            asked = [(slot, end) for slot, slot_ends in enumerate(ends) for end in slot_ends]
            if not asked:
                break
            wave = [Expand(end, self.n if first else 1, temperature=self.temperature) for _, end in asked]
            first = False
            replies = yield wave
            if ctx.spent:
                break
            for (slot, end), reply in zip(asked, replies, strict=True):
                if reply is None:
                    continue
                ends[slot].remove(end)
                for step in reply.steps:
                    child = ctx.add_rollout(end, step)
                    if not ctx.tree.terminal[child]:
                        ends[slot].append(child)
                        continue
                    reward = ctx.tree.reward[child]
                    if math.isnan(reward):
                        raise SearchError(
                            f"value source 'rollout': a completion of problem {ctx.problem.id!r} got no verdict; "
                            "this task cannot check answers without gold, choose value head or constant"
                        )
                    rewards[slot].append(reward)
        return [sum(r) / len(r) if r else math.nan for r in rewards]


SOURCES: dict[str, type[HeadValue] | type[ConstantValue] | type[RolloutValue]] = {
    source.name: source for source in (HeadValue, ConstantValue, RolloutValue)
}
