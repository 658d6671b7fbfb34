"""Searches through the server engine: budgets, and where every token went."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from mcts.engines.server_value import LocalValue
from mcts.search import Driver, Search
from mcts.strategies import build
from mcts.tasks import load_task
from mcts.types import Ended
from tests.mcts.fake_server import FakeServer
from tests.mcts.served import make


@pytest.mark.parametrize(
    ("strategy", "settings"), [("best_of_n", {"n": 4}), ("mcts", {"commit": "never", "simulations": 8, "expand": 2})]
)
def test_searches_through_the_server_never_exceed_their_budget_and_count_what_the_server_did(
    server: FakeServer, folder: Path, strategy: str, settings: dict[str, Any]
) -> None:
    engine = make(server, folder, value=LocalValue(folder))
    task = load_task("countdown", numbers=3)
    server.faults = deque(["429", "429"])  # faults that cost no tokens
    searches = [
        Search(problem=p, strategy=build(strategy, **settings), budget=120, seed=i)
        for i, p in enumerate(task.problems("dev")[:6])
    ]
    results = list(Driver(engine, task).run(searches))
    assert len(results) == 6
    for result in results:
        assert result.error is None
        assert 0 < result.usage.sampled <= 120
        assert result.tree.tokens + result.usage.discarded == result.usage.sampled
    assert sum(r.usage.uncounted_calls for r in results) == 0
    assert sum(r.usage.sampled for r in results) == server.sampled
    assert sum(r.usage.prompt for r in results) == server.prompt
    assert sum(r.usage.cached for r in results) == server.cached
    assert sum(r.usage.calls for r in results) == len(server.seen) - 2
    engine.shutdown()


def test_a_search_fails_with_the_servers_omission_and_the_others_go_on(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder)
    task = load_task("countdown", numbers=3)
    server.faults = deque(["no_logprobs"])
    searches = [
        Search(problem=p, strategy=build("best_of_n", n=2), budget=120, seed=i)
        for i, p in enumerate(task.problems("dev")[:3])
    ]
    results = list(Driver(engine, task).run(searches))
    failed = [r for r in results if r.ended is Ended.FAILED]
    assert len(failed) == 1
    assert "no logprobs" in str(failed[0].error)
    engine.shutdown()


def test_what_a_server_drew_lies_between_what_is_counted_and_what_is_at_most_uncounted(
    server: FakeServer, folder: Path
) -> None:
    engine = make(server, folder)
    task = load_task("countdown", numbers=3)
    server.faults = deque(["truncate", "none", "cut", "no_logprobs", "half", "500", "other_text"])
    searches = [
        Search(problem=p, strategy=build("best_of_n", n=2), budget=120, seed=i)
        for i, p in enumerate(task.problems("dev")[:6])
    ]
    results = list(Driver(engine, task).run(searches))
    counted = sum(r.usage.sampled for r in results)
    assert sum(r.usage.uncounted_calls for r in results) == 6
    assert counted < server.sampled <= counted + sum(r.usage.uncounted_tokens for r in results)
    for result in results:
        assert result.usage.sampled <= 120, "the budget holds what is counted"
    engine.shutdown()
