"""In `evaluate` the gold answer is read once per problem, and only after the strategy has chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.search import Driver
from mcts.types import Problem, Verdict
from selfplay.config import Part, SearchConfig
from selfplay.worker import EvaluationJob, evaluate_problems, make_searches
from tests.mcts.toy import ToyTask, World, problem

STRATEGIES: dict[str, dict[str, Any]] = {
    "mcts": {"simulations": 12},
    "mcts to the end": {"name": "mcts", "commit": "never", "simulations": 0},
    "gumbel": {"simulations": 8, "m": 4, "leaves": 2},
    "majority": {"name": "best_of_n", "n": 8, "pick": "majority"},
    "value": {"name": "best_of_n", "n": 8, "pick": "value"},
    "weighted": {"name": "best_of_n", "n": 8, "pick": "weighted"},
    "beam": {"n": 6, "m": 3},
    "index": {"leaves": 3, "expand": 2},
    "redraw": {"batch": 2},
    "greedy": {},
}
PROBLEMS = tuple(problem(k) for k in range(12))


class CountingTask(ToyTask):
    """No answer can be judged without gold; every look at gold is noted, with the engine's tokens at that moment."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__(checkable=False)
        self.engine = engine
        self.calls: list[tuple[str, str]] = []
        self.open_at: list[int] = []
        """Searches open in the engine when gold was asked."""

    def verify(self, problem: Problem, answer: str) -> Verdict:
        self.calls.append((problem.id, answer))
        self.open_at.append(sum(1 for _ in self._still_open(problem)))
        return super().verify(problem, answer)

    def _still_open(self, problem: Problem) -> Iterator[str]:
        """Open searches of this problem: none once its strategy has chosen."""
        return (s.prompt for s in self.engine._searches.values() if s.prompt == problem.prompt)


def config(name: str) -> SearchConfig:
    settings = dict(STRATEGIES[name])
    return SearchConfig(strategy=Part.model_validate({"name": name, **settings}), budget=200)


@pytest.mark.parametrize("name", STRATEGIES)
def test_gold_is_read_once_per_problem_after_the_choice(name: str) -> None:
    engine = World(seed=5, wins=0.5).engine()
    task = CountingTask(engine)
    answers = evaluate_problems(engine, task, EvaluationJob(PROBLEMS, config(name), 0, 0), max_open=5)
    asked = Counter(id for id, _ in task.calls)
    assert max(asked.values()) == 1
    assert {a.problem_id for a in answers if a.status != "none"} == set(asked)
    assert len(asked) > len(PROBLEMS) / 2  # most searches do answer, or this proves nothing
    assert task.open_at == [0] * len(task.calls)
    assert not any(a.oracle or a.failed for a in answers)


@pytest.mark.parametrize("name", STRATEGIES)
def test_gold_sees_the_chosen_answer_and_no_other(name: str) -> None:
    engine = World(seed=6, wins=0.5).engine()
    task = CountingTask(engine)
    searches = list(make_searches(PROBLEMS, config(name), range(len(PROBLEMS)), learning=False))
    results = list(Driver(engine, task, max_open=4).run(searches))
    assert sorted(task.calls) == sorted((r.problem.id, r.answer) for r in results if r.answer is not None)


def test_the_oracle_alone_reads_gold_while_it_chooses_and_says_so() -> None:
    engine = World(seed=5, wins=0.2).engine()
    task = CountingTask(engine)
    settings = SearchConfig(strategy=Part.model_validate({"name": "best_of_n", "n": 8, "pick": "oracle"}), budget=200)
    answers = evaluate_problems(engine, task, EvaluationJob(PROBLEMS, settings, 0, 0), max_open=5)
    assert max(Counter(id for id, _ in task.calls).values()) > 1
    assert all(a.oracle for a in answers if a.status != "none")
