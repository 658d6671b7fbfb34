"""What PUCT and Gumbel search share: simulations with widening, virtual loss and exact backups on one tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from mcts.policy import MIN_UNSEEN, PriorRule
from mcts.search import Expand, Replies, SearchContext, Wave
from mcts.selection import UNSEEN
from mcts.tree import NO_PARENT, ROOT
from mcts.types import Kind

Choose = Callable[["TreeSearch", int, list[int], float], int]
"""(search, node, arms, prior of the arm "a step not yet drawn"; 0 where that arm is closed) -> an arm (a node
index) or UNSEEN. Only called with at least one arm."""


class Course(Protocol):
    """Where the simulations of one move start, and when they are over."""

    def start(self) -> int:
        """The node from which the next simulation goes down."""
        ...

    def taken(self) -> None:
        """The simulation that `start` named last is under way."""
        ...

    def over(self, left: float) -> bool:
        """Stop here, with `left` simulations left? Asked between waves."""
        ...


@dataclass(frozen=True, slots=True)
class Widening:
    """When a node gets further draws."""

    expand: int = 4
    """Steps drawn when a node is expanded first."""
    widen: int = 1
    """Steps drawn each further time."""
    patience: int = 8
    """Draws in a row without anything new after which a node is closed to further ones."""
    width: float = 2.0
    power: float = 0.5
    """Under the prior rule `draws` a node has at most width * visits^power children."""

    def __post_init__(self) -> None:
        if min(self.expand, self.widen, self.patience) < 1 or self.width <= 0.0 or self.power < 0.0:
            raise ValueError(f"expand, widen and patience must be at least 1, width > 0, power >= 0: {self}")


class TreeSearch:
    """The search state of one tree beside the tree's own columns.

    A simulation goes down by `choose` until it meets a terminal node (its exact value is backed up again) or
    decides for a draw; every distinct new step is one evaluation: one visit, its value backed up. A repeated
    step backs up nothing. With `skip_done` finished subtrees are never entered again: a search that only looks
    for a win learns nothing there.
    """

    def __init__(self, ctx: SearchContext, widening: Widening, choose: Choose, *, leaves: int, skip_done: bool) -> None:
        self.ctx = ctx
        self.tree = ctx.tree
        self.widening = widening
        self.choose = choose
        self.leaves = leaves
        self.skip_done = skip_done
        self.exact = ctx.prior_rule is PriorRule.EXACT
        self.arms: dict[int, list[int]] = {}
        """Children that were drawn as next steps (rollouts are no arms)."""
        self.unseen: dict[int, float] = {}
        """Prior mass of steps not yet drawn, under `exact`."""
        self.misses: dict[int, int] = {}
        """Draws in a row that brought nothing new."""
        self.done: set[int] = set()
        """Nodes below which nothing is left to find: terminal, or closed with every child done."""

    def is_open(self, node: int) -> bool:
        """May a further step be drawn here?"""
        if self.misses.get(node, 0) >= self.widening.patience:
            return False
        return not self.exact or self.unseen.get(node, 1.0) > MIN_UNSEEN

    def descend(self, node: int) -> int:
        """The node where a simulation from `node` ends: a terminal, or one that wants a draw."""
        tree = self.tree
        while not tree.terminal[node]:
            arms = self.arms.get(node)
            if not arms:
                return node
            if self.skip_done:
                arms = [arm for arm in arms if arm not in self.done]
                if not arms:
                    return node
            is_open = self.is_open(node)
            if is_open and not self.exact:
                cap = max(1.0, self.widening.width * tree.visits[node] ** self.widening.power)
                if len(arms) < math.floor(cap):
                    return node
            arm = self.choose(self, node, arms, self.unseen[node] if is_open and self.exact else 0.0)
            if arm == UNSEEN:
                return node
            node = arm
        return node

    def wish(self, node: int) -> Expand:
        """What to draw at a node where a simulation ended."""
        return Expand(node, self.widening.widen if self.arms.get(node) else self.widening.expand, new=True)

    def simulate(self, course: Course, simulations: float) -> Generator[Wave, Replies, None]:
        """Run `simulations` simulations of a course, up to `leaves` at a time; fewer when the budget is spent
        or the course is over. A wave is sent early when a simulation ends where one is under way already."""
        tree, ctx = self.tree, self.ctx
        left = simulations
        while left > 0 and not ctx.spent and not course.over(left):
            wave: list[Expand] = []
            pending: set[int] = set()
            while len(wave) < self.leaves and left > 0:
                leaf = self.descend(course.start())
                if leaf in pending:
                    break
                left -= 1
                course.taken()
                if tree.terminal[leaf]:
                    tree.backup(leaf, ctx.value(leaf))
                    if not wave:
                        break  # nothing to send: let the course look
                    continue
                pending.add(leaf)
                tree.fly(leaf, 1)
                wave.append(self.wish(leaf))
            if wave:
                yield from self.draw(wave)

    def draw(self, wave: Wave) -> Generator[Wave, Replies, None]:
        """Send a wave whose nodes are in flight, and put what came back into the tree."""
        tree, ctx = self.tree, self.ctx
        replies = yield wave
        found: list[int] = []
        for wish, reply in zip(wave, replies, strict=True):
            node = wish.node
            tree.fly(node, -1)
            if reply is None:
                continue
            if node == ROOT and tree.raw_value[ROOT] != tree.raw_value[ROOT]:
                tree.raw_value[ROOT] = reply.prefix_value
            arms = self.arms.setdefault(node, [])
            for step in reply.steps:
                child, new = ctx.add(node, step)
                if not new:
                    self.misses[node] = self.misses.get(node, 0) + 1
                    continue
                self.misses[node] = 0
                arms.append(child)
                found.append(child)
                if tree.terminal[child]:
                    self.done.add(child)
            if self.exact and arms:
                self.unseen[node] = max(0.0, 1.0 - sum([tree.prior[arm] for arm in arms]))
            if arms:
                self.settle(node)
        if ctx.source.immediate:
            for child in found:
                tree.backup(child, ctx.value(child))
        else:
            values = yield from ctx.evaluate(found)
            for child, value in zip(found, values, strict=True):
                if value == value:  # NaN: the budget ended during its rollouts
                    tree.backup(child, value)

    def settle(self, node: int) -> None:
        """Mark `node` and its ancestors as done as far as they are."""
        while node != NO_PARENT and not self.is_open(node) and all(a in self.done for a in self.arms[node]):
            self.done.add(node)
            node = self.tree.parent[node]

    def best_terminal(self, node: int) -> int | None:
        """The terminal that the most visited path below `node` ends in, if it ends in one with an answer."""
        tree = self.tree
        while not tree.terminal[node]:
            arms = self.arms.get(node)
            if not arms:
                return None
            node = max(arms, key=lambda arm: (tree.visits[arm], -arm))
        return node if tree.answer[node] is not None else None

    def step_children(self, node: int) -> list[int]:
        """The arms drawn at `node` so far."""
        return self.arms.get(node, [c for c in self.tree.children[node] if self.tree.kind[c] is Kind.STEP])
