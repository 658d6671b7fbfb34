"""Beam search against the value (Snell et al., arXiv 2408.03314, section 5.2)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.strategies.pick import choose, pick_rule
from mcts.tree import ROOT
from mcts.types import Ended


@dataclass(frozen=True, slots=True)
class Beam:
    """Draw `n` first steps, keep the n / m of highest value, draw `m` next steps below each, and so on; paths
    that finish leave the beam and wait for the pick. Equal steps share a node and one place in the beam.
    `m` = 1 keeps every path (independent chains), `m` = n is best-of-n step by step."""

    n: int = 16
    m: int = 4
    pick: str = "weighted"
    stop_at_win: bool = True
    """Stop at the first verified win; False: let the beam finish."""
    temperature: float | None = None
    """None: the search's own."""
    name: ClassVar[str] = "beam"

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1 or self.n % self.m:
            raise ValueError(f"beam needs n and m of at least 1 and n a multiple of m, not n={self.n}, m={self.m}")
        if self.temperature is not None and self.temperature < 0.0:
            raise ValueError(f"temperature must be >= 0, not {self.temperature}")
        pick_rule(self.pick)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        tree = ctx.tree
        beam = [ROOT]
        ends: list[int] = []
        while beam and not ctx.spent and not (self.stop_at_win and ctx.wins):
            count = self.n if beam == [ROOT] else self.m
            missing = dict.fromkeys(beam, count)
            reached: list[int] = []  # distinct, in order of arrival
            while missing and not ctx.spent:  # a tight budget grants a wave in pieces
                wave = [Expand(node, n, temperature=self.temperature) for node, n in missing.items()]
                replies = yield wave
                fresh: list[int] = []
                for wish, reply in zip(wave, replies, strict=True):
                    if reply is None:
                        continue
                    if wish.node == ROOT:
                        tree.raw_value[ROOT] = reply.prefix_value
                    missing[wish.node] -= reply.request.n
                    if missing[wish.node] < 1:
                        del missing[wish.node]
                    for step in reply.steps:
                        node, new = ctx.add(wish.node, step)
                        reached.append(node)
                        if new:
                            fresh.append(node)
                values = yield from ctx.evaluate(fresh)
                for node, value in zip(fresh, values, strict=True):
                    if value == value:  # NaN: the budget ended during its rollouts
                        tree.backup(node, value)
            ends += [node for node in reached if tree.terminal[node]]
            going = [node for node in dict.fromkeys(reached) if not tree.terminal[node] and tree.visits[node]]
            best = sorted(going, key=lambda node: (-ctx.value(node), node))[: self.n // self.m]
            beam = sorted(best)
        chosen = choose(ctx, ends, pick_rule(self.pick))
        if ctx.wins:
            ended = Ended.SOLVED
        else:
            ended = Ended.BUDGET if ctx.spent else Ended.EXHAUSTED
        return Outcome(ended, chosen, oracle=ctx.oracle)
