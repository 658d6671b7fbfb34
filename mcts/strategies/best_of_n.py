"""Best-of-n: independent chains from the prompt, all in one star-shaped tree; also the early-stopped sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.strategies.pick import choose, pick_rule
from mcts.tree import ROOT
from mcts.types import Ended


@dataclass(frozen=True, slots=True)
class BestOfN:
    """`n` chains, or with `until_win` one after the other (`batch` at a time) until a check awards a win.

    Chains are sampled independently of each other; where two drew the same step they share its node (`draws`
    counts them), and each still has its own vote. A finished chain whose reward is known backs it up, so that
    a node's mean value is the win rate seen below it.
    """

    n: int = 16
    """Chains; with `until_win` the largest number of them, 0 for as many as the budget pays."""
    until_win: bool = False
    batch: int = 0
    """Chains under way at a time; 0: all `n`, and 1 with `until_win`."""
    pick: str = "majority"
    temperature: float | None = None
    """None: the search's own."""
    name: ClassVar[str] = "best_of_n"

    def __post_init__(self) -> None:
        if self.n < 0 or self.batch < 0 or (self.n == 0 and not self.until_win):
            raise ValueError(f"best_of_n needs n >= 1 (0 only with until_win) and batch >= 0, not {self}")
        if self.temperature is not None and self.temperature < 0.0:
            raise ValueError(f"temperature must be >= 0, not {self.temperature}")
        pick_rule(self.pick)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        tree = ctx.tree
        batch = self.batch or (1 if self.until_win else self.n)
        chains: list[int] = []  # where each chain under way stands
        ends: list[int] = []  # where each finished chain ended
        started = 0
        while not ctx.spent and not (self.until_win and ctx.wins):
            fresh = batch - len(chains)
            if self.n:
                fresh = min(fresh, self.n - started)
            started += fresh
            chains += [ROOT] * fresh
            if not chains:
                break
            # the deepest first: when the budget runs short, some chains finish instead of none
            chains.sort(key=lambda node: -tree.depth[node])
            standing = Counter(chains)
            wave = [Expand(node, count, temperature=self.temperature) for node, count in standing.items()]
            replies = yield wave
            for wish, reply in zip(wave, replies, strict=True):
                if reply is None:
                    continue
                if wish.node == ROOT:
                    tree.raw_value[ROOT] = reply.prefix_value
                for step in reply.steps:
                    chains.remove(wish.node)
                    node, _ = ctx.add(wish.node, step)
                    if not tree.terminal[node]:
                        chains.append(node)
                        continue
                    ends.append(node)
                    reward = tree.reward[node]
                    if reward == reward:  # known
                        tree.backup(node, reward)
        chosen = choose(ctx, ends, pick_rule(self.pick))
        if ctx.wins:
            ended = Ended.SOLVED
        else:
            ended = Ended.BUDGET if ctx.spent else Ended.EXHAUSTED
        return Outcome(ended, chosen, oracle=ctx.oracle)


@dataclass(frozen=True, slots=True)
class Greedy:
    """One chain at temperature 0."""

    name: ClassVar[str] = "greedy"

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        return (yield from BestOfN(n=1, temperature=0.0).run(ctx))
