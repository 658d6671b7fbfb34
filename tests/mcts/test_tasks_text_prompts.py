"""Prompts of tasks with problems from files: templates, chats, few-shot examples, questions that a user types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcts.tasks import TaskError, TaskSettingError, load_task
from mcts.tasks.rows import fill, places
from mcts.tasks.text import TextTask
from mcts.types import Problem, Status
from tests.mcts.text_rows import gsm8k_folder, plain, write

THINK = ("<think>", "</think>")


def load(name: str, **settings: Any) -> TextTask:
    task = load_task(name, **settings)
    assert isinstance(task, TextTask)
    return task


def test_a_template_is_filled_once() -> None:
    assert (
        fill(r"{q} \boxed{} {{q}} \frac{1}{2}", {"q": "{a}{{q}}"}.__getitem__) == r"{a}{{q}} \boxed{} {q} \frac{1}{2}"
    )
    assert places(r"{b} \boxed{} {{c}} {a} {b}") == ["b", "a"]


def test_a_place_may_have_a_name_in_any_script() -> None:
    assert places("{Größe} {k-v} {q.text} {問題} {1} {-} { a}") == ["Größe", "k-v", "q.text", "問題"]


@pytest.mark.parametrize(
    ("settings", "role"),
    [
        ({"template": "{question} {answer}"}, "answer"),
        ({"template": "{question} {result}", "fields": {"answer": "result"}}, "answer"),
        ({"fields": {"question": "{text} {result}", "answer": "result"}}, "answer"),
        ({"template": "{question} {working}", "fields": {"solution": "working"}}, "solution"),
        ({"name": "choice", "template": "{question} {options} {correct}"}, "answer"),
    ],
)
def test_a_prompt_that_shows_gold_is_refused(settings: dict[str, Any], role: str, tmp_path: Path) -> None:
    with pytest.raises(TaskSettingError, match=f"the prompt shows the {role}"):
        load_task(**{"name": "jsonl", "path": str(tmp_path / "a.jsonl"), **settings})


def test_a_prompt_may_show_a_part_of_gold_and_a_solution_that_is_none(tmp_path: Path) -> None:
    fields = {"answer": "{number} {unit}"}
    load_task("jsonl", path=str(tmp_path / "a.jsonl"), fields=fields, template="{question} In {unit}.")
    load_task("jsonl", path=str(tmp_path / "a.jsonl"), template="{question} Is this right? {solution}")


def test_a_chat_prompt_is_messages_and_a_plain_one_is_text(tmp_path: Path) -> None:
    folder = gsm8k_folder(tmp_path)
    chat = load("gsm8k", path=folder, chat=True, system="Be brief.", few_shot=1).problems("heldout")[0]
    assert not isinstance(chat.prompt, str)
    assert [m["role"] for m in chat.prompt] == ["system", "user", "assistant", "user"]
    assert chat.prompt[2]["content"].endswith(f"#### {chat.prompt[2]['content'].split()[-1]}")
    assert "####" in chat.prompt[1]["content"]
    plain = load("gsm8k", path=folder, system="Be brief.", few_shot=2).problems("heldout")[0]
    assert isinstance(plain.prompt, str)
    assert plain.prompt.startswith("Be brief.\n\nQuestion: ")
    assert plain.prompt.count("Question: ") == 3
    assert plain.prompt.endswith("How many has she?\nAnswer:\n")


def test_few_shot_rows_leave_training(tmp_path: Path) -> None:
    folder = gsm8k_folder(tmp_path, train=30)
    without = load("gsm8k", path=folder, dev_share=0.0)
    task = load("gsm8k", path=folder, dev_share=0.0, few_shot=4)
    assert len(task.problems("train")) == len(without.problems("train")) - 4
    prompt = str(task.problems("train")[0].prompt)
    assert len(set(prompt.split("Question: "))) == 6
    assert str(load("gsm8k", path=folder, dev_share=0.0, few_shot=4, seed=1).problems("train")[0].prompt) != prompt


def test_few_shot_examples_may_be_written_down_but_give_nothing_away(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"q": f"{k} and 1?", "a": k + 1} for k in range(40)])
    fields = {"question": "q", "answer": "a", "solution": "s"}
    shot = {"q": "900 and 1?", "s": "We count on.", "a": "901"}
    task = load("jsonl", path=path, fields=fields, few_shot=[shot])
    start = "Question: 900 and 1?\nAnswer:\nWe count on.\nThe answer is 901.\n\nQuestion: "
    assert all(str(p.prompt).startswith(start) for s in ("train", "dev", "heldout") for p in task.problems(s))
    held = str(load("jsonl", path=path, fields=fields).problems("heldout")[0].prompt).split("\n")[0][10:]
    with pytest.raises(TaskSettingError, match="few_shot example 1 gives away a problem of heldout"):
        load("jsonl", path=path, fields=fields, few_shot=[{"q": held, "a": "1"}]).problems("train")
    with pytest.raises(TaskSettingError, match="row 1 of few_shot: there is no field 'a'"):
        load("jsonl", path=path, fields=fields, few_shot=[{"q": "x"}]).problems("train")


def test_a_typed_question_becomes_a_problem_without_gold(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path), few_shot=1)
    problem = task.read("  Two and two? ")
    assert str(problem.prompt).endswith("Question: Two and two?\nAnswer:\n")
    assert str(problem.prompt).count("Question: ") == 2
    assert problem.reference is None
    assert problem.id.startswith("gsm8k-asked-")
    assert problem.id == task.read("Two and two?").id
    verdict = task.verify(problem, "4")
    assert verdict.status is Status.ERROR
    assert not verdict.won
    with pytest.raises(TaskError, match="type its question"):
        task.read(" \n")


def test_a_typed_question_needs_no_file() -> None:
    problem = load("jsonl", path="/nowhere/at/all.jsonl").read("Two and two?")
    assert problem.prompt == "Question: Two and two?\nAnswer:\n"


def test_a_template_with_more_than_a_question_is_asked_for_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", plain(4))
    task = load("jsonl", path=path, template="{hint}: {question}\n")
    assert task.read('{"question": "Two and two?", "hint": "count"}').prompt == "count: Two and two?\n"
    with pytest.raises(TaskError, match="JSON object"):
        task.read("Two and two?")


@pytest.mark.parametrize("settings", [{}, {"template": "{hint}: {question}\n"}, {"fields": {"question": "{hint} {q}"}}])
def test_what_a_user_would_type_gives_the_same_prompt(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [{**row, "q": row["question"], "hint": "Count."} for row in plain(30)]
    task = load(
        "jsonl",
        path=write(tmp_path / "mine.jsonl", rows),
        few_shot=1,
        fields={"solution": "working"} | settings.pop("fields", {}),
        **settings,
    )
    for problem in task.problems("train"):
        assert task.read(task.typed(problem)).prompt == problem.prompt
    with pytest.raises(TaskError, match="has no problem elsewhere"):
        task.typed(Problem("elsewhere", "x"))


def test_files_of_one_name_are_told_apart_by_their_split(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    train = write(tmp_path / "a" / "data.jsonl", plain(5))
    task = load("jsonl", train=train, heldout=write(tmp_path / "b" / "data.jsonl", plain(5, start=50)), dev_share=0.0)
    assert task.problems("train")[0].id == "jsonl-train-00001"
    assert task.problems("heldout")[4].id == "jsonl-heldout-00005"


def test_a_question_is_asked_in_one_way(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path))
    problem = task.problems("train")[0]
    assert task.vary(problem, 5) is problem
