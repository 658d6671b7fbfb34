"""Which verified wins are imitated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcts.tree import Tree
from mcts.types import Kind
from selfplay.items import winners
from selfplay.objectives.base import TraceLike


def path_key(tree: Tree, node: int) -> bytes:
    """The token ids from prompt to `node`: equal keys mean the same solution."""
    return tree.prefix(node).tobytes()


def pick_wins(traces: Sequence[TraceLike], limit: int, rng: np.random.Generator) -> list[list[int]]:
    """Winning terminal nodes to imitate, per trace: at most `limit` distinct wins per problem and iteration.

    Among more, a uniform draw decides, so that neither the search's order nor frequent solutions are favoured.
    """
    found: dict[tuple[str, int], dict[bytes, tuple[int, int]]] = {}
    for index, trace in enumerate(traces):
        tree = trace.tree
        for node in winners(tree):
            if tree.kind[node] is not Kind.PROMPT:
                wins = found.setdefault((trace.problem_id, trace.iteration), {})
                wins.setdefault(path_key(tree, node), (index, node))
    picked: list[list[int]] = [[] for _ in traces]
    for wins in found.values():
        places = list(wins.values())
        if len(places) > limit:
            places = [places[k] for k in sorted(rng.choice(len(places), limit, replace=False))]
        for index, node in places:
            picked[index].append(node)
    return picked
