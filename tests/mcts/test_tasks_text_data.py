"""The text tasks on public data: everything loads, and each gold answer is right against itself."""

from __future__ import annotations

from typing import Any

import pytest

from mcts.tasks import load_task
from mcts.tasks.text import TextTask
from mcts.types import Problem
from tests.mcts.text_rows import DATA

SVAMP_FIELDS = {"id": "ID", "question": "{Body} {Question}", "answer": "Answer"}
SETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "gsm8k": ("gsm8k", {"path": str(DATA / "gsm8k")}, 7473 + 1319),
    "math": (
        "math",
        {
            "train": str(DATA / "math_train_answers" / "openr_problems_answers.json"),
            "heldout": str(DATA / "math500" / "math500.jsonl"),
            "bad_rows": "skip",
        },
        7500 + 500 - 2,  # two training rows have no answer
    ),
    "choice": ("choice", {"path": str(DATA / "aqua" / "dev.jsonl")}, 254),
    "svamp": (
        "jsonl",
        {"path": str(DATA / "svamp" / "SVAMP.json"), "fields": SVAMP_FIELDS, "kind": "number", "verifier": "number"},
        1000,
    ),
    "multiarith": (
        "jsonl",
        {
            "path": str(DATA / "pal_math" / "mawpsmultiarith.jsonl"),
            "fields": {"question": "input", "answer": "target"},
            "kind": "number",
            "verifier": "number",
        },
        600,
    ),
}
SAMPLE = 40
"""Problems of each set that the default run verifies."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the public data are not on this machine")


def load(name: str) -> TextTask:
    task, settings, _ = SETS[name]
    made = load_task(task, **settings)
    assert isinstance(made, TextTask)
    return made


def everything(task: TextTask) -> list[Problem]:
    return [problem for split in ("heldout", "dev", "train") for problem in task.problems(split)]


def refused(task: TextTask, problems: list[Problem]) -> list[str]:
    """The golds that, written as the task writes a final answer, do not come back as right."""
    found = []
    for problem in problems:
        assert problem.reference is not None
        answer = task.answer(problem, [task.final(problem.reference)])
        if answer is None or not task.verify(problem, answer).won:
            found.append(f"{problem.id}: {problem.reference!r} read as {answer!r}")
    return found


@pytest.mark.parametrize("name", SETS)
def test_every_row_loads_with_an_id_of_its_own(name: str) -> None:
    task = load(name)
    problems = everything(task)
    assert len(problems) == SETS[name][2]
    assert len({p.id for p in problems}) == len(problems)
    assert all(p.reference for p in problems)


@pytest.mark.parametrize("name", SETS)
def test_gold_of_a_sample_is_right_against_itself(name: str) -> None:
    task = load(name)
    problems = everything(task)
    step = max(1, len(problems) // SAMPLE)
    assert refused(task, problems[::step][:SAMPLE]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_gold_of_every_row_is_right_against_itself(name: str) -> None:
    task = load(name)
    assert refused(task, everything(task)) == []


def test_gsm8k_solutions_end_in_their_own_answer() -> None:
    task = load("gsm8k")
    for worked in task._load().splits["train"][:500]:
        steps = task.worked_steps(worked)
        assert steps
        assert "".join(steps).startswith(str(worked.solution))
        assert task.answer_in("".join(steps)) == worked.answer
        assert "<<" not in "".join(steps)
