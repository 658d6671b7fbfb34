"""Best-first search by an index: the chance that one more draw at a node leads to a win, over its cost."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.policy import MIN_UNSEEN, PriorRule
from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.strategies.pick import choose, pick_rule
from mcts.tree import NO_PARENT, ROOT
from mcts.types import Ended, Kind


@dataclass(frozen=True, slots=True)
class Index:
    """Draw next where gain / cost is largest, until the first verified win. Drawing again at a node competes in
    the same queue as drawing below its children.

    Every value v is taken as the chance that a win lies below, kept within [1 - trust, trust]. A win below a node
    lies below a drawn step i with the step's share s_i of the draws, or below a step not yet drawn with the share
    u that is left (prior rule `exact`: s_i is the step's probability; `draws`: s_i = draws_i / (kappa + K) after K
    draws, u = kappa / (kappa + K)). Bayes' rule turns that into odds that a win lies below,

        odds(n) = u v / (1 - v) + sum_i s_i odds(i),      v / (1 - v) at a node without steps, 0 where it is lost,

    and into the gain of one more draw, the chance that the win lies below a step not yet drawn:

        gain(n) = u v / (1 - v) / (1 + odds(n)).

    So a promising step makes it pointless to draw again beside it, and failures below it give its siblings back
    their chance. The cost is counted in steps from the node to the end: the mean tokens of a step are the same for
    all nodes of a tree and cancel in the order. Where gains are equal the older node comes first.
    """

    expand: int = 1
    """Steps drawn at a time at one node."""
    leaves: int = 1
    """Nodes drawn at in one wave."""
    patience: int = 8
    """Draws in a row without anything new after which a node is closed."""
    trust: float = 0.99
    """Highest value that is believed: an overconfident value head must not keep a search at a barren node."""
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
        if not 0.5 < self.trust < 1.0:
            raise ValueError(f"trust must lie between 0.5 and 1, not {self.trust}")
        pick_rule(self.pick)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        queue = Queue(ctx, self.trust, self.kappa, self.patience)
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
                    queue.add(child, value)
            if ctx.spent or ctx.wins:
                break
            for node in nodes:
                queue.update(node)
            nodes = queue.best(self.leaves)
        ctx.set_targets(c_visit=self.c_visit, c_scale=self.c_scale)
        if ctx.wins:
            ended = Ended.SOLVED
        else:
            ended = Ended.BUDGET if ctx.spent else Ended.EXHAUSTED
        return Outcome(ended, choose(ctx, ctx.candidates, pick_rule(self.pick)), oracle=ctx.oracle)


class Queue:
    """The nodes at which a further step may be drawn, each with its odds and its index."""

    def __init__(self, ctx: SearchContext, trust: float, kappa: float, patience: int) -> None:
        self.ctx = ctx
        self.trust = trust
        self.kappa = kappa
        self.patience = patience
        self.odds: dict[int, float] = {}
        """That a win lies below, for every node with a value."""
        self.indices: dict[int, float] = {}
        """gain / cost of every open node, cost in steps."""
        self._own: dict[int, float] = {}  # odds by the node's own value
        self._misses: dict[int, int] = {}  # draws in a row without anything new

    def drawn(self, node: int, new: bool) -> None:
        """Note a draw at `node`."""
        self._misses[node] = 0 if new else self._misses.get(node, 0) + 1

    def add(self, node: int, value: float) -> None:
        """A new node and its value (a terminal's: its reward)."""
        if self.ctx.tree.terminal[node]:
            self.odds[node] = 0.0  # a win ends the search before this matters
            return
        value = min(max(value, 1.0 - self.trust), self.trust)
        self._own[node] = self.odds[node] = value / (1.0 - value)
        self._index(node, 1.0)

    def update(self, node: int) -> None:
        """Work out `node` and its ancestors again after draws at `node`."""
        if ROOT not in self._own:
            self.add(ROOT, self.ctx.value(ROOT))
        tree = self.ctx.tree
        while node != NO_PARENT:
            left, found = self._shares(node)
            self.odds[node] = left * self._own[node] + found
            self._index(node, left)
            node = tree.parent[node]

    def best(self, count: int) -> list[int]:
        """Up to `count` open nodes of highest index, best first, the older of equals first."""
        if count == 1:
            return [max(self.indices, key=lambda node: (self.indices[node], -node))] if self.indices else []
        return sorted(self.indices, key=lambda node: (-self.indices[node], node))[:count]

    def _shares(self, node: int) -> tuple[float, float]:
        """(share of the draws left for new steps, odds of the drawn steps weighted by their shares)."""
        tree = self.ctx.tree
        steps = [child for child in tree.children[node] if tree.kind[child] is Kind.STEP]
        if self.ctx.prior_rule is PriorRule.EXACT:
            shares = [tree.prior[child] for child in steps]
            left = max(0.0, 1.0 - sum(shares))
        else:
            total = self.kappa + sum(tree.draws[child] for child in steps)
            shares = [tree.draws[child] / total for child in steps]
            left = self.kappa / total
        found = sum(share * self.odds.get(child, 0.0) for share, child in zip(shares, steps, strict=True))
        return left, found

    def _index(self, node: int, left: float) -> None:
        ctx = self.ctx
        if left <= MIN_UNSEEN or self._misses.get(node, 0) >= self.patience:
            self.indices.pop(node, None)
            return
        gain = left * self._own[node] / (1.0 + self.odds[node])
        self.indices[node] = gain / (ctx.max_steps - ctx.tree.depth[node])
