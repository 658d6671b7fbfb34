"""The choice among finished answers, shared by all strategies."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from mcts.search import SearchContext


class Pick(StrEnum):
    """How a strategy chooses its answer where no check has awarded a win."""

    MAJORITY = "majority"
    """The answer that most paths give (each path one vote, repeated paths too)."""
    VALUE = "value"
    """The single path of highest value."""
    WEIGHTED = "weighted"
    """The answer whose paths have the largest sum of values."""
    ORACLE = "oracle"
    """The first answer that gold confirms; an upper bound, labelled `oracle`."""


def pick_rule(name: str) -> Pick:
    """The rule of this name; ValueError names the known ones."""
    if name not in [rule.value for rule in Pick]:
        raise ValueError(f"pick must be one of {', '.join(Pick)}, not {name!r}")
    return Pick(name)


def choose(ctx: SearchContext, ends: Sequence[int], rule: Pick) -> int | None:
    """The terminal node to answer with. A verified win always comes first; answers that a check refuted only
    count where there is no other. Ties go to the answer reached first. None: no path has an answer.

    `ends`: terminal nodes, one entry per path that ended there (repetitions count as votes).
    """
    if ctx.wins:
        return ctx.wins[0]
    tree = ctx.tree
    answered = [node for node in ends if tree.answer[node] is not None]
    open_ends = [node for node in answered if tree.reward[node] != 0.0]
    pool = open_ends or answered
    if not pool:
        return None
    if rule is Pick.ORACLE:
        for node in dict.fromkeys(pool):
            if ctx.verify(node).won:
                return node
        return pool[0]
    if rule is Pick.VALUE:
        best = max(ctx.value(node) for node in pool)
        return next(node for node in pool if ctx.value(node) == best)
    votes: dict[str, float] = {}
    for node in pool:
        answer = tree.answer[node]
        assert answer is not None  # filtered above
        votes[answer] = votes.get(answer, 0.0) + (1.0 if rule is Pick.MAJORITY else ctx.value(node))
    most = max(votes.values())
    winner = next(answer for answer, count in votes.items() if count == most)
    return next(node for node in pool if tree.answer[node] == winner)
