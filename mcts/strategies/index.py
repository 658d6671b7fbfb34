"""Best-first search by an index: the chance that one more draw below a node leads to a win, over its cost."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.policy import MIN_UNSEEN, PriorRule
from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.strategies.pick import choose, pick_rule
from mcts.tree import ROOT
from mcts.types import Ended


@dataclass(frozen=True, slots=True)
class Index:
    """Draw next where gain / cost is largest, until the first verified win. Drawing again at a node competes in
    the same queue as drawing below its children.

    gain, prior rule `exact`: max(0, v - sum p_i v_i) over the steps i drawn so far, i.e. the value of what is
    not yet drawn (a lost step has v_i = 0, so it only narrows what can still be found once v is calibrated).
    gain, prior rule `draws`: v * kappa / (kappa + misses) with misses = sum draws_i (1 - v_i), the posterior
    mean of a win rate believed with the weight of `kappa` draws.
    cost: expected tokens from the node to the end, (max_steps - depth) * mean tokens of a step. The mean is
    the same for all nodes of a tree and cancels in the order, so it is left out.
    Where gains are equal (0 for all, say), the value v * (1 - sum p_i) over cost decides, then the age.
    """

    expand: int = 1
    """Steps drawn at a time at one node."""
    leaves: int = 1
    """Nodes drawn at in one wave."""
    patience: int = 8
    """Draws in a row without anything new after which a node is closed."""
    kappa: float = 2.0
    pick: str = "weighted"
    """Choice among answers where no win was verified."""
    c_visit: float = 50.0
    c_scale: float = 0.1
    """Scale of values in the policy targets."""
    name: ClassVar[str] = "index"

    def __post_init__(self) -> None:
        if min(self.expand, self.leaves, self.patience) < 1 or self.kappa <= 0.0:
            raise ValueError(f"expand, leaves and patience must be at least 1, kappa positive: {self}")
        pick_rule(self.pick)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        queue = Queue(ctx, self.kappa, self.patience)
        tree = ctx.tree
        if not ctx.source.immediate:
            yield from ctx.evaluate([ROOT])
        nodes = [ROOT]
        while nodes and not ctx.spent:
            replies = yield [Expand(node, self.expand, new=True) for node in nodes]
            fresh: list[int] = []
            for node, reply in zip(nodes, replies, strict=True):
                if reply is None:
                    continue
                if node == ROOT:
                    tree.raw_value[ROOT] = reply.prefix_value
                for step in reply.steps:
                    child, new = ctx.add(node, step)
                    queue.drawn(node, new)
                    if new:
                        fresh.append(child)
            if ctx.source.immediate:
                values = [ctx.value(child) for child in fresh]
            else:
                values = yield from ctx.evaluate(fresh)
            for child, value in zip(fresh, values, strict=True):
                if value == value:  # NaN: the budget ended during its rollouts
                    tree.backup(child, value)
                    queue.push(child)
            if ctx.spent or ctx.wins:
                break
            for node in nodes:
                queue.push(node)
            nodes = queue.pop(self.leaves)
        ctx.set_targets(c_visit=self.c_visit, c_scale=self.c_scale)
        if ctx.wins:
            ended = Ended.SOLVED
        else:
            ended = Ended.BUDGET if ctx.spent else Ended.EXHAUSTED
        return Outcome(ended, choose(ctx, ctx.candidates, pick_rule(self.pick)), oracle=ctx.oracle)


class Queue:
    """Open nodes by index, best first. A node is in it at most once: `pop` takes it out until it is pushed."""

    def __init__(self, ctx: SearchContext, kappa: float, patience: int) -> None:
        self.ctx = ctx
        self.kappa = kappa
        self.patience = patience
        self._heap: list[tuple[float, float, int]] = []
        self._misses: dict[int, int] = {}  # draws in a row without anything new

    def drawn(self, node: int, new: bool) -> None:
        """Note a draw at `node`."""
        self._misses[node] = 0 if new else self._misses.get(node, 0) + 1

    def index(self, node: int) -> tuple[float, float]:
        """(gain / cost, tie-break) of a node that is not terminal; cost in steps."""
        ctx, tree = self.ctx, self.ctx.tree
        cost = ctx.max_steps - tree.depth[node]
        value = ctx.value(node)
        children = tree.children[node]
        if ctx.prior_rule is PriorRule.EXACT:
            found, mass = 0.0, 0.0
            for child in children:
                prior = tree.prior[child]
                if prior == prior:  # NaN: a rollout, no drawn step
                    mass += prior
                    found += prior * ctx.value(child)
            return max(0.0, value - found) / cost, value * max(0.0, 1.0 - mass) / cost
        misses = 0.0
        for child in children:
            if tree.prior[child] == tree.prior[child]:
                misses += tree.draws[child] * (1.0 - ctx.value(child))
        gain = value * self.kappa / (self.kappa + misses) / cost
        return gain, gain

    def push(self, node: int) -> None:
        """Put `node` into the queue unless it is terminal or closed."""
        tree = self.ctx.tree
        if tree.terminal[node] or self._misses.get(node, 0) >= self.patience:
            return
        if self.ctx.prior_rule is PriorRule.EXACT:
            mass = sum(p for child in tree.children[node] if (p := tree.prior[child]) == p)
            if 1.0 - mass <= MIN_UNSEEN:
                return
        gain, tie = self.index(node)
        heapq.heappush(self._heap, (-gain, -tie, node))

    def pop(self, count: int) -> list[int]:
        """Take out up to `count` nodes, best first."""
        return [heapq.heappop(self._heap)[2] for _ in range(min(count, len(self._heap)))]
