"""Tasks with problems from files: splits, ids, steps and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcts.tasks import TaskSettingError, load_task
from mcts.tasks.rows import fraction
from mcts.tasks.steps import after_thinking, split_text
from mcts.tasks.text import TextTask
from mcts.types import Problem, SettingError, Status
from tests.mcts.text_rows import gsm8k_folder, plain, sums, write

THINK = ("<think>", "</think>")


def load(name: str, **settings: Any) -> TextTask:
    task = load_task(name, **settings)
    assert isinstance(task, TextTask)
    return task


# --- steps ---


@given(st.text(alphabet="a \n.", max_size=40), st.sampled_from(["\n", "\n\n", ". "]))
def test_steps_joined_are_the_text_and_none_is_blank(text: str, delimiter: str) -> None:
    steps = split_text(text, delimiter)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or not text.strip()
    assert all(step.endswith(delimiter) or not step.strip() or delimiter in step for step in steps[:-1])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\nb\n", ["a\n", "b\n"]),
        ("a\n\n\nb", ["a\n\n\n", "b"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("\n\n", ["\n\n"]),
        ("<think>\na\n\nb\n</think>\nc", ["<think>\n", "a\n\n", "b\n", "</think>\n", "c"]),
    ],
)
def test_a_blank_line_belongs_to_the_step_before_it(text: str, steps: list[str]) -> None:
    assert split_text(text, "\n") == steps


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("so 7", "so 7"),
        ("<think>8</think>so 7", "so 7"),
        ("8</think>so 7", "so 7"),  # the prompt had opened it
        ("<think>8</think>so<think>9</think>7", "7"),
        ("<think>8", None),
        ("<think>8</think>so 7<think>9", None),
    ],
)
def test_only_what_follows_the_thinking_block_is_an_answer(text: str, rest: str | None) -> None:
    assert after_thinking(text, THINK) == rest


def test_an_answer_within_a_thinking_block_does_not_count(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path))
    problem = task.problems("heldout")[0]
    inside = ["<think>\n", "maybe\n", "#### 7\n"]
    assert task.answer(problem, inside) is None
    assert task.answer(problem, [*inside, "</think>\n", "it is five\n"]) is None
    assert task.answer(problem, [*inside, "</think>\n", "it is five\n", "#### 5"]) == "5"


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        (["It is 5 + 2.\n", "#### 7"], "7"),
        (["It is 7.\n", "#### 1,008.00"], "1008"),
        (["#### 7\n", "#### 8"], None),  # naming many is no answer
        (["The answer is 7."], "7"),
        (["So \\boxed{7}"], "7"),
        (["She has 7 nuts."], None),
        ([], None),
    ],
)
def test_the_answer_is_what_follows_the_last_marker(tmp_path: Path, steps: list[str], answer: str | None) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path))
    assert task.answer(task.problems("heldout")[0], steps) == answer


@pytest.mark.parametrize(
    ("written", "one_way"),
    [("1,000", "1000"), ("+5", "5"), ("-2.50", "-2.5"), ("3.", "3."), ("1,00", "1,00"), (r"\frac12", r"\frac12"),
     ("10", "10"), ("0.0", "0"), (" 7 ", "7")],
)  # fmt: skip
def test_plain_numbers_are_written_in_one_way(tmp_path: Path, written: str, one_way: str) -> None:
    assert load("gsm8k", path=gsm8k_folder(tmp_path)).canonical(written) == one_way


# --- data ---


def test_splits_are_disjoint_fixed_and_named_by_file_and_row(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path, train=200), dev_share=0.1)
    splits = {split: task.problems(split) for split in ("train", "dev", "heldout")}
    assert [p.id for p in splits["heldout"]] == [f"gsm8k-test-{n:05d}" for n in range(1, 11)]
    ids = [p.id for problems in splits.values() for p in problems]
    assert len(set(ids)) == len(ids) == 210
    assert 10 <= len(splits["dev"]) <= 32
    again = load("gsm8k", path=gsm8k_folder(tmp_path, train=200), dev_share=0.1, seed=9)
    assert [p.id for p in again.problems("dev")] == [p.id for p in splits["dev"]]


def test_a_row_stays_in_its_split_when_rows_are_added(tmp_path: Path) -> None:
    few = load("jsonl", path=write(tmp_path / "a.jsonl", plain(60)), verifier="number")
    many = load("jsonl", path=write(tmp_path / "b.jsonl", plain(90)), verifier="number")
    for split in ("train", "dev", "heldout"):
        old = {str(p.prompt) for p in few.problems(split)}
        assert old <= {str(p.prompt) for p in many.problems(split)}


def test_gold_is_in_the_reference_alone(tmp_path: Path) -> None:
    row = {"question": "What is six times seven?", "answer": "6 * 7 is forty-two.\n#### 42"}
    write(tmp_path / "train.jsonl", sums(5))
    write(tmp_path / "test.jsonl", [row])
    (problem,) = load("gsm8k", path=str(tmp_path)).problems("heldout")
    assert problem.reference == "42"
    assert "42" not in json.dumps([problem.prompt, dict(problem.meta), problem.id])
    assert "forty" not in json.dumps([problem.prompt, dict(problem.meta), problem.id])


def test_a_question_of_two_splits_is_dropped_from_training_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", sums(20))
    repeated = {**sums(1, start=4)[0]}
    repeated["question"] = repeated["question"].upper().replace(" ", "  ")
    write(tmp_path / "test.jsonl", [*sums(3, start=100), repeated])
    task = load("gsm8k", path=str(tmp_path), dev_share=0.0)
    assert "gsm8k-train-00005" not in [p.id for p in task.problems("train")]
    assert len(task.problems("train")) == 19
    assert len(task.problems("heldout")) == 4
    assert task.notes == ("1 problems left out of train: their questions are in another split too",)
    assert task.notes[0] in caplog.text


def test_a_split_is_cut_to_the_same_problems_whatever_the_rest(tmp_path: Path) -> None:
    folder = gsm8k_folder(tmp_path, train=50, test=30)
    full = load("gsm8k", path=folder).problems("heldout")
    cut = load("gsm8k", path=folder, heldout_problems=7, train_problems=3).problems("heldout")
    assert len(cut) == 7
    assert [p for p in full if p in cut] == list(cut)
    lowest = sorted(full, key=lambda p: fraction(str(p.prompt).split("Question: ")[1].split("\nAnswer")[0]))[:7]
    assert {p.id for p in lowest} == {p.id for p in cut}


def test_a_column_may_name_the_splits(tmp_path: Path) -> None:
    rows = [{**row, "part": ("train", "test", "valid")[k % 3]} for k, row in enumerate(plain(9))]
    task = load("jsonl", path=write(tmp_path / "a.jsonl", rows), split_field="part", verifier="number")
    assert [len(task.problems(s)) for s in ("train", "dev", "heldout")] == [3, 3, 3]
    assert [p.id for p in task.problems("dev")] == ["jsonl-a-00003", "jsonl-a-00006", "jsonl-a-00009"]


def test_an_array_of_objects_and_composed_fields_are_read(tmp_path: Path) -> None:
    rows = [{"ID": f"x{k}", "Body": f"Ann has {k} nuts.", "Ask": "How many?", "Answer": float(k)} for k in range(30)]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    fields = {"id": "ID", "question": "{Body} {Ask}", "answer": "Answer"}
    task = load("jsonl", path=str(path), fields=fields, verifier="number", kind="number", dev_share=0.2)
    found = {p.id: p for s in ("train", "dev", "heldout") for p in task.problems(s)}
    assert len(found) == 30
    assert found["x7"].reference == "7"
    assert found["x7"].prompt == "Question: Ann has 7 nuts. How many?\nAnswer:\n"
    assert task.verify(found["x7"], "7.0").status is Status.CORRECT


GOOD = {"question": "One and one?", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": "x"', "not valid JSON"),
        ([1], "must be a JSON object, not list"),
        ({"question": "x"}, "there is no field 'answer'"),
        ({"qestion": "x", "answer": 1}, "there is no field 'question': did you mean 'qestion'?"),
        ({"question": "x", "answer": None}, "the field 'answer' must be a text or a number, not null"),
        ({"question": "x", "answer": True}, "the field 'answer' must be a text or a number, not true"),
        ({"question": "x", "answer": [1]}, "the field 'answer' must be a text or a number, not list"),
        ('{"question": "x", "answer": NaN}', "must be a text or a number, not NaN"),
        ({"question": " ", "answer": 1}, "the field 'question' is empty"),
        ({"question": "\ud800", "answer": 1}, "half a character"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path: Path, row: Any, says: str) -> None:
    path = write(tmp_path / "mine.jsonl", [GOOD, "", row, *plain(3)])
    with pytest.raises(TaskSettingError) as refusal:
        load("jsonl", path=path).problems("train")
    assert f"row 3 of {path}: " in str(refusal.value)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [({"kind": "number"}, "many"), ({"kind": "number"}, "2 or 3"), ({"kind": "choice"}, "7"), ({}, "It is\n#### 4"),
     ({"final": "Result: {answer}"}, "4")],
)  # fmt: skip
def test_a_gold_answer_that_no_text_could_state_is_a_bad_row(
    tmp_path: Path, settings: dict[str, Any], answer: str
) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": "How many?", "answer": answer}])
    with pytest.raises(TaskSettingError, match=r"row 1 of .*: no answer of kind .* is read back from ") as refusal:
        load("jsonl", path=path, **settings).problems("train")
    assert "\n" not in str(refusal.value)


def test_a_gold_answer_that_is_read_back_as_another_one_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": "How many?", "answer": "#### 5"}])
    with pytest.raises(TaskSettingError, match=r"row 1 of .*: another answer \('5\.'\) is read back from "):
        load("jsonl", path=path, verifier="number").problems("train")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_says_how_to_save_it(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "Wie groß?", "answer": 1}', encoding=encoding)
    with pytest.raises(TaskSettingError, match=r"mine\.jsonl is no text in UTF-8: save it"):
        load("jsonl", path=str(tmp_path / "mine.jsonl")).problems("train")


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": "x", "answer": ""}, "oops", *plain(30)])
    task = load("jsonl", path=path, bad_rows="skip", dev_share=0.2)
    assert sum(len(task.problems(s)) for s in ("train", "dev", "heldout")) == 30
    assert task.notes[0].startswith("2 rows left out that cannot be used, the first: row 1 of ")


def test_two_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "key": f"k{n // 2}"} for n, row in enumerate(plain(4))]
    path = write(tmp_path / "mine.jsonl", rows)
    fields = {"id": "key"}
    with pytest.raises(TaskSettingError, match=r"row 2 of .*the id 'k0' is that of row 1 of .* already"):
        load("jsonl", path=path, fields=fields).problems("train")


def test_the_question_is_no_id(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", plain(4))
    with pytest.raises(TaskSettingError, match="the id is the question itself"):
        load("jsonl", path=path, fields={"id": "question"}).problems("train")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({}, "give path"),
        ({"pth": "x"}, "has no setting 'pth': did you mean 'path'?"),
        ({"path": "x", "fields": {"quesion": "q"}}, "fields has no role 'quesion': did you mean 'question'?"),
        ({"path": "x", "fields": {"question": 3}}, "fields must map names to texts"),
        ({"path": "x", "verifier": "maths"}, "there is no verifier 'maths': did you mean 'math'?"),
        ({"path": "x", "verifier": {"name": "number", "partal": 0.1}}, "no setting 'partal': did you mean 'partial'?"),
        ({"path": "x", "kind": "numbr"}, "kind must be one of"),
        ({"path": "x", "chat": "yes"}, "chat must be true or false"),
        ({"path": "x", "dev_share": 1.5}, "dev_share must be at least 0 and below 1"),
        ({"path": "x", "max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"path": "x", "final": "done"}, "final must hold {answer}"),
        ({"path": "x", "delimiter": "k"}, "the delimiter 'k' would cut the tag '<think>' in two"),
        ({"path": "x", "template": "Solve!"}, "the template must hold {question}"),
        ({"path": "x", "bad_rows": "drop"}, "bad_rows must be 'error' or 'skip'"),
        ({"path": "x", "few_shot": -1}, "few_shot must be a whole number of at least 0"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as refusal:
        load("jsonl", **settings).problems("train")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_with_an_unknown_name_says_how_to_write_a_brace(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", plain(4))
    with pytest.raises(TaskSettingError, match=r"there is no field 'anser': did you mean 'answer'\?"):
        load("jsonl", path=path, template="{question} in \\boxed{anser}").problems("train")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", plain(4))
    with pytest.raises(TaskSettingError, match="there is no problem in the split 'heldout'"):
        load("jsonl", train=path).problems("heldout")
    with pytest.raises(TaskSettingError, match="has no split 'test'"):
        load("jsonl", train=path).problems("test")


def test_a_folder_without_problem_files_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(TaskSettingError, match=r"has no train\.jsonl, dev\.jsonl or test\.jsonl"):
        load("gsm8k", path=str(tmp_path))


def test_texts_have_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TaskSettingError, match=r"give model\.path"):
        load("gsm8k", path=gsm8k_folder(tmp_path)).vocabulary()


# --- judging ---


def test_nothing_is_judged_without_gold(tmp_path: Path) -> None:
    task = load("gsm8k", path=gsm8k_folder(tmp_path))
    problem = task.problems("heldout")[0]
    assert task.check(problem, str(problem.reference)) is None
    assert task.check_step(problem, ["1 + 1 = 3\n"]) is None


def test_the_kind_of_answer_follows_a_verifier_of_that_name() -> None:
    assert load("jsonl", path="x", verifier="number").settings.kind == "number"
    assert load("jsonl", path="x", verifier={"name": "exact"}).settings.kind == "exact"
    assert load("jsonl", path="x", verifier="number", kind="math").settings.kind == "math"
    assert load("jsonl", path="x").settings.kind == "math"
    assert load("gsm8k", path="x", verifier={"partial": 0.1}).settings.kind == "number"


def test_gold_decides_and_partial_reward_passes_through(tmp_path: Path) -> None:
    folder = gsm8k_folder(tmp_path)
    task = load("gsm8k", path=folder)
    problem = Problem("p", "x", "1008")
    assert task.verify(problem, "1,008.0").status is Status.CORRECT
    assert task.verify(problem, "1009").status is Status.WRONG
    assert task.verify(problem, "1009").reward == 0.0
    partial = load("gsm8k", path=folder, verifier={"partial": 0.1})
    assert partial.verify(problem, "1009").reward == pytest.approx(0.1)
    assert partial.verify(problem, "many").reward == 0.0
