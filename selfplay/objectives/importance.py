"""Importance ratios for imitated paths that older weights drew, or the same weights under another sampling rule.

What is corrected is the drawing of tokens alone. Which paths a search came to draw at all, and which wins were picked
for imitation, no ratio of token probabilities knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from mcts.tree import ROOT
from selfplay.behavior import drawn_plainly
from selfplay.errors import UserError
from selfplay.items import RatioRun
from selfplay.objectives.base import TraceLike


class Importance(StrEnum):
    """What shares one ratio."""

    NONE = "none"
    """Every imitated token counts alike."""
    STEP = "step"
    """Each step has its own: less variance, and a bias in what came before it."""
    PATH = "path"
    """A whole path has one, the product over its steps: unbiased up to the cap, at the price of variance."""


def ratio_runs(trace: TraceLike, wins: Sequence[int], rule: Importance) -> list[RatioRun]:
    """The steps on the paths to `wins` with what is known of their drawing. Raises UserError where nothing is."""
    tree = trace.tree
    paths = [[node for node in tree.path(win) if node != ROOT] for win in wins]
    if rule is Importance.PATH:
        return [RatioRun(node, unit, _drawn(trace, node), 1.0) for unit, path in enumerate(paths) for node in path]
    counts: dict[int, int] = {}
    for path in paths:
        for node in path:
            counts[node] = counts.get(node, 0) + 1
    return [RatioRun(node, unit, _drawn(trace, node), float(n)) for unit, (node, n) in enumerate(counts.items())]


def _drawn(trace: TraceLike, node: int) -> float:
    """Nats of a step's tokens under the distribution that they were drawn from."""
    tree = trace.tree
    step = tree.steps[node]
    assert step is not None  # the root is on no list
    logprobs = step.behavior_logprobs
    if logprobs is None and drawn_plainly(trace.settings, tree.kind[node]):
        logprobs = step.logprobs
    total = math.nan if logprobs is None else float(np.asarray(logprobs, dtype=np.float64).sum())
    if not math.isfinite(total):
        raise UserError(
            f"problem {trace.problem_id}, iteration {trace.iteration}: node {node} has no behaviour log-probabilities, "
            "which importance ratios need; play with an engine that records them (or at temperature 1 and top_p 1), "
            "or set the objective's importance to none"
        )
    return total
