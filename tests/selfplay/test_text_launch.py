"""A launch on problems from a file finds a bad file or a missing model before anything is written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mcts.search import Driver, Search
from mcts.strategies import build
from mcts.tasks import TaskSettingError, load_task
from mcts.tasks.text import TextTask
from mcts.types import Problem, Status, Verdict
from selfplay.config import Config, load_config, parse_config
from selfplay.drive import _example
from selfplay.executor import check_parts
from selfplay.solve import _conclude
from tests.mcts.text_rows import gsm8k_folder, write
from tests.mcts.toy import ToyTask, World


def config(folder: Path, **task: object) -> Config:
    settings = {"name": "gsm8k", "path": str(folder), **task}
    return parse_config(f"task: {json.dumps(settings)}\nplay: {{search: {{strategy: {{name: mcts}}, budget: 64}}}}")


def test_a_launch_refuses_a_bad_row_and_a_fresh_model(tmp_path: Path) -> None:
    gsm8k_folder(tmp_path)
    with pytest.raises(TaskSettingError, match=r"gsm8k: its texts are open, .* give model\.path"):
        check_parts(config(tmp_path))
    write(tmp_path / "test.jsonl", [{"question": "x"}])
    with pytest.raises(TaskSettingError, match=r"row 1 of .*test\.jsonl: there is no field 'answer'"):
        check_parts(config(tmp_path))
    with pytest.raises(TaskSettingError, match="no setting 'few_shots': did you mean 'few_shot'"):
        check_parts(config(tmp_path, few_shots=3))


def test_a_launch_refuses_what_its_first_phases_would_lack(tmp_path: Path) -> None:
    gsm8k_folder(tmp_path)
    with pytest.raises(TaskSettingError, match="there is no problem in the split 'dev'"):
        check_parts(config(tmp_path, dev_share=0.0))
    with pytest.raises(TaskSettingError, match="no training row has a worked solution of at most 2 steps"):
        check_parts(config(tmp_path, max_steps=2))


def test_the_example_after_a_run_is_a_question_and_no_prompt(tmp_path: Path) -> None:
    gsm8k_folder(tmp_path)
    for chat in (False, True):
        question = _example(config(tmp_path, few_shot=2, chat=chat))
        assert question == "Ann has 1000 nuts and finds 1003 more. How many has she?"
    countdown = "task: {name: countdown}\nplay: {search: {strategy: {name: mcts}, budget: 9}}"
    assert "->" in _example(parse_config(countdown))


class NoGold(ToyTask):
    """A toy task that has nothing to compare with, as a text task on a question typed by hand."""

    def verify(self, problem: Problem, answer: str) -> Verdict:  # noqa: ARG002
        return Verdict(Status.ERROR, 0.0, answer, "the problem has no gold answer to compare with")


@pytest.mark.parametrize(("reference", "says"), [(None, "unverified"), ("yes", "error")])
def test_solve_calls_an_answer_without_gold_unverified(reference: str | None, says: str) -> None:
    search = Search(Problem("asked", "two and two :", reference), build("greedy"), 100, 3)
    (result,) = Driver(World(seed=4, wins=1.0).engine(), NoGold(checkable=False)).run([search])
    assert result.answer is not None
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    _conclude(result, "", 0.0, console)
    assert f"answer {result.answer}: {says}; " in console.export_text()


def test_the_example_config_names_problems_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config = load_config(root / "configs" / "own_problems.yaml")
    task = load_task(config.task.name, **config.task.settings)
    assert isinstance(task, TextTask)
    counts = {split: len(task.problems(split)) for split in ("train", "dev", "heldout")}
    assert sum(counts.values()) == 22
    assert min(counts.values()) >= 2
    for problem in (p for split in counts for p in task.problems(split)):
        answer = task.answer(problem, [task.final(str(problem.reference))])
        assert answer is not None
        assert task.verify(problem, answer).won
    example = next(iter(task.warmup(0)))
    assert task.answer(example.problem, example.steps) == example.problem.reference
