"""Worked examples of the text tasks: what is imitated, and which negatives are sound."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from mcts.tasks import Example, TaskSettingError, load_task
from mcts.tasks.text import TextTask
from tests.mcts.text_rows import gsm8k_folder, sums, write


def load(name: str, **settings: Any) -> TextTask:
    task = load_task(name, **settings)
    assert isinstance(task, TextTask)
    return task


def first(task: TextTask, count: int, seed: int = 0) -> list[Example]:
    return list(itertools.islice(task.warmup(seed), count))


def test_a_worked_row_is_its_lines_then_the_answer(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", sums(1, start=4))
    write(tmp_path / "test.jsonl", sums(1, start=9))
    task = load("gsm8k", path=str(tmp_path), dev_share=0.0, negatives=0)
    (example,) = first(task, 1)
    assert example.steps == ("She finds 4 + 3 = 7 nuts.\n", "She has 4 + 7 = 11 nuts.\n", "#### 11")
    assert math.isnan(example.values[0])
    assert example.values[1:] == (1.0, 1.0, 1.0)
    assert example.imitate
    assert example.finished
    assert example.problem == task.problems("train")[0]
    assert task.answer(example.problem, example.steps) == "11"


def test_every_label_is_what_gold_says(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path), negatives=2)
    examples = first(task, 300)
    train = {p.id for p in task.problems("train")}
    kinds = set()
    for example in examples:
        answer = task.answer(example.problem, example.steps)
        assert example.problem.id in train
        assert answer is not None
        assert len(example.values) == 1 + len(example.steps)
        assert task.verify(example.problem, answer).won == example.imitate
        assert example.values[-1] == float(example.imitate)
        kinds.add((example.imitate, sum(map(math.isnan, example.values))))
    assert kinds == {(True, 1), (False, 1), (False, 3)}


def test_the_stream_is_a_function_of_the_seed_and_sees_every_row(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path))
    other = load("gsm8k", path=gsm8k_folder(tmp_path))
    assert [(e.problem, e.steps, e.imitate) for e in first(task, 90, seed=3)] == [
        (e.problem, e.steps, e.imitate) for e in first(other, 90, seed=3)
    ]
    assert [e.steps for e in first(task, 90, seed=3)] != [e.steps for e in first(task, 90, seed=4)]
    seen = {e.problem.id for e in first(task, 90) if e.imitate}
    assert seen == {p.id for p in task.problems("train")}


def test_no_negative_where_gold_may_be_written_in_two_ways(tmp_path: Path) -> None:
    answers = [r"\frac{1}{2}", "0.5", "x+1", "1+x", r"\sqrt{2}", "(1,2)"]
    rows = [{"problem": f"Problem {k}?", "solution": "Clearly.", "answer": a} for k, a in enumerate(answers * 5)]
    task = load("math", train=write(tmp_path / "t.jsonl", rows), dev_share=0.0, negatives=4)
    lost = [e for e in first(task, 200) if not e.imitate]
    assert lost
    for example in lost:  # only 0.5 is a plain number
        assert example.problem.reference == "0.5"
        assert example.steps[-1] != r"The final answer is $\boxed{0.5}$."


def test_a_solution_that_states_its_answer_is_left_as_it_is(tmp_path: Path) -> None:
    rows = [{"problem": "Half of one?", "solution": "It is\n\n\\boxed{\\frac{1}{2}}.", "answer": "\\frac{1}{2}"}]
    task = load("math", train=write(tmp_path / "t.jsonl", rows), dev_share=0.0)
    assert first(task, 1)[0].steps == ("It is\n\n", "\\boxed{\\frac{1}{2}}.")
    rows[0]["solution"] = "It is small."
    task = load("math", train=write(tmp_path / "t.jsonl", rows), dev_share=0.0)
    assert first(task, 1)[0].steps == ("It is small.\n\n", r"The final answer is $\boxed{\frac{1}{2}}$.")


def test_the_held_out_and_dev_questions_are_never_shown(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path), dev_share=0.3, negatives=3, few_shot=2)
    aside = {p.id for split in ("dev", "heldout") for p in task.problems(split)}
    assert aside
    assert not aside & {e.problem.id for e in first(task, 300)}


def test_a_solution_of_too_many_steps_is_no_example(tmp_path: Path) -> None:
    rows = [*sums(5), {"question": "Long?", "answer": "a\n" * 20 + "#### 5"}]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", sums(2, start=50))
    task = load("gsm8k", path=str(tmp_path), dev_share=0.0)
    assert all(len(e.steps) <= task.max_steps for e in first(task, 60))
    assert len({e.problem.id for e in first(task, 60) if e.imitate}) == 5


def test_a_solution_that_contradicts_its_gold_is_no_example(tmp_path: Path) -> None:
    odd = {**CHOICE[0], "question": "Odd one?", "rationale": "It is small.\nThe answer is (C)."}
    task = load("choice", train=write(tmp_path / "c.jsonl", [odd, *CHOICE[1:]]), dev_share=0.0)
    assert "choice-c-00001" in [p.id for p in task.problems("train")]
    assert "choice-c-00001" not in {e.problem.id for e in first(task, 100) if e.imitate}


def test_without_solutions_it_says_to_give_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"question": f"{k}?", "answer": k} for k in range(30)])
    task = load("jsonl", path=path)
    with pytest.raises(
        TaskSettingError, match=r"set warmup\.steps: 0 and learn\.replay: 0 and give a model"
    ) as refusal:
        task.warmup(0)
    assert isinstance(refusal.value, ValueError)
    with pytest.raises(TaskSettingError, match="few_shot asks for 2 worked training rows and only 0"):
        load("jsonl", path=path, few_shot=2).problems("train")


CHOICE = [
    {"question": f"What is {k} and {k}?", "options": [f"A){2 * k}", f"B){k}", f"C){k + 3}"], "correct": "A",
     "rationale": f"{k} twice.\nThat is {2 * k}."}
    for k in range(5, 25)
]  # fmt: skip


def test_a_choice_shows_its_options_and_takes_one_letter(tmp_path: Path) -> None:
    task = load("choice", path=write(tmp_path / "c.jsonl", CHOICE), dev_share=0.2)
    problem = next(p for s in ("train", "dev", "heldout") for p in task.problems(s) if p.id == "choice-c-00001")
    assert problem.prompt == "Question: What is 5 and 5?\nOptions:\nA) 10\nB) 5\nC) 8\nAnswer:\n"
    assert problem.reference == "A"
    assert task.answer(problem, ["It is 10.\n", "The answer is (A)."]) == "A"
    assert task.verify(problem, "A").won
    assert not task.verify(problem, "B").won
    assert task.chance(problem) == pytest.approx(1 / 3)  # type: ignore[attr-defined]
    examples = first(task, 100)
    assert {e.steps[-1] for e in examples if not e.imitate} >= {"The answer is (B).", "The answer is (C)."}
    for example in examples:
        said = task.answer(example.problem, example.steps)
        assert said is not None
        assert task.verify(example.problem, said).won == example.imitate


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"correct": "D"}, "the field 'correct' must be a letter from A to C, not 'D'"),
        ({"correct": 0}, "the field 'correct' must be a letter from A to C, not 0"),
        ({"options": "A) 1"}, "the field 'options' must be a list of 2 to 5 options"),
        ({"options": ["A) 1"]}, "the field 'options' must be a list of 2 to 5 options"),
        ({"options": [None, "x"]}, "the field 'options' must be a list of texts"),
    ],
)
def test_a_bad_choice_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "c.jsonl", [CHOICE[0], {**CHOICE[1], **change}])
    with pytest.raises(TaskSettingError, match="row 2 of ") as refusal:
        load("choice", path=path).problems("train")
    assert says in str(refusal.value)


def test_gsm8k_without_its_marker_is_a_bad_row(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*sums(2), {"question": "x", "answer": "72"}])
    write(tmp_path / "test.jsonl", sums(1))
    with pytest.raises(TaskSettingError, match=r"row 3 of .*must end in a line such as '#### 72'"):
        load("gsm8k", path=str(tmp_path)).problems("train")
