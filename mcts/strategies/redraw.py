"""The treeless twin of the index search: redraw a step while its value is poor, then go on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.strategies.pick import choose, pick_rule
from mcts.tree import ROOT
from mcts.types import Ended


@dataclass(slots=True)
class _Chain:
    node: int = ROOT
    best: int | None = None
    """The best step drawn at `node` so far."""
    draws: int = 0


@dataclass(frozen=True, slots=True)
class Redraw:
    """Chains that draw a step again while its value is below `ratio` times the base rate, at most `redraws`
    times, and go on from the best step drawn; a chain that ended starts again at the prompt. Until the first
    verified win, or `n` chains."""

    ratio: float = 1.0
    base: float | None = None
    """The base rate; None: the value of the prompt."""
    redraws: int = 4
    n: int = 0
    """Chains; 0: as many as the budget pays."""
    batch: int = 1
    """Chains under way at a time."""
    pick: str = "weighted"
    name: ClassVar[str] = "redraw"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.redraws < 0 or self.n < 0 or self.ratio < 0.0:
            raise ValueError(f"redraw needs batch >= 1 and redraws, n, ratio >= 0: {self}")
        if self.base is not None and not 0.0 <= self.base <= 1.0:
            raise ValueError(f"a base rate lies in [0, 1], not {self.base}")
        pick_rule(self.pick)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        tree = ctx.tree
        if not ctx.source.immediate:
            yield from ctx.evaluate([ROOT])
        chains: list[_Chain] = []
        ends: list[int] = []
        started = 0
        while not ctx.spent and not ctx.wins:
            fresh_chains = self.batch - len(chains)
            if self.n:
                fresh_chains = min(fresh_chains, self.n - started)
            started += fresh_chains
            chains += [_Chain() for _ in range(fresh_chains)]
            if not chains:
                break
            replies = yield [Expand(chain.node) for chain in chains]
            drawn: list[tuple[_Chain, int]] = []
            fresh: list[int] = []
            for chain, reply in zip(chains, replies, strict=True):
                if reply is None:
                    continue
                if chain.node == ROOT:
                    tree.raw_value[ROOT] = reply.prefix_value
                for step in reply.steps:
                    node, new = ctx.add(chain.node, step)
                    drawn.append((chain, node))
                    if new:
                        fresh.append(node)
            values = yield from ctx.evaluate(fresh)
            for node, value in zip(fresh, values, strict=True):
                if value == value:  # NaN: the budget ended during its rollouts
                    tree.backup(node, value)
            for chain, node in drawn:
                if tree.visits[node] and self._settled(ctx, chain, node):
                    ends.append(chain.node)
                    chains.remove(chain)
        if ctx.wins:
            ended = Ended.SOLVED
        else:
            ended = Ended.BUDGET if ctx.spent else Ended.EXHAUSTED
        return Outcome(ended, choose(ctx, ends, pick_rule(self.pick)), oracle=ctx.oracle)

    def _settled(self, ctx: SearchContext, chain: _Chain, node: int) -> bool:
        """Let `chain`, which drew `node`, redraw or go on; True where it has come to its end."""
        chain.draws += 1
        value = ctx.value(node)
        if chain.best is None or value > ctx.value(chain.best):
            chain.best = node
        base = self.base if self.base is not None else ctx.value(ROOT)
        if value < self.ratio * base and chain.draws <= self.redraws:
            return False
        chain.node, chain.best, chain.draws = chain.best, None, 0
        return ctx.tree.terminal[chain.node]
