"""Search over reasoning steps of a language model: trees, strategies, budgets. Loads neither torch nor ray."""

from mcts.budget import TokenBudget, Usage
from mcts.search import Driver, Expand, Outcome, Search, SearchContext, Strategy
from mcts.tree import NO_PARENT, ROOT, Tree
from mcts.types import (
    Ended,
    Kind,
    Problem,
    Reply,
    Request,
    SearchError,
    SearchResult,
    Status,
    Step,
    Stop,
    Verdict,
)

__all__ = [
    "NO_PARENT",
    "ROOT",
    "Driver",
    "Ended",
    "Expand",
    "Kind",
    "Outcome",
    "Problem",
    "Reply",
    "Request",
    "Search",
    "SearchContext",
    "SearchError",
    "SearchResult",
    "Status",
    "Step",
    "Stop",
    "Strategy",
    "TokenBudget",
    "Tree",
    "Usage",
    "Verdict",
]
