"""What a strategy says to its driver: waves of wishes, and its outcome (DESIGN.md, decision 1)."""

from __future__ import annotations

from dataclasses import dataclass

from mcts.types import Ended, Reply


@dataclass(slots=True)
class Expand:
    """A strategy's wish: `n` next steps below `node`. A wave is a list of these."""

    node: int
    n: int = 1
    temperature: float | None = None
    """None: the search's own."""
    max_tokens: int | None = None
    """None: the search's longest step."""
    new: bool = False
    """Draw steps that were not drawn below `node` before, as far as the search and its engine can: under the prior
    rule `exact`, at temperature 1 and top_p 1. Elsewhere the wish is a plain one, and steps may repeat."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a strategy returns when it is done."""

    ended: Ended
    chosen: int | None
    """Terminal node it answers with."""
    oracle: bool = False


Wave = list[Expand]
Replies = list[Reply | None]
"""Aligned with the wave; None: the budget had nothing left for it. A granted reply may hold fewer than n steps,
even none: a step that the budget cut short is dropped by the driver and counted as discarded."""
