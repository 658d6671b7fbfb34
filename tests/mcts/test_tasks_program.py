"""The program task: examples in, a Python function out, judged in the sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mcts.tasks import TaskError, TaskSettingError, load_task
from mcts.tasks.program import SPLITS, Program, program_in, render
from mcts.types import Problem, Status
from mcts.verify.sandbox import Outcome, Run, SandboxError
from mcts.verify.sandbox_program import ProgramVerifier
from tests.mcts.hostile_programs import MISSING

ARC = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "arc_agi_1" / "training.jsonl"
needs_arc = pytest.mark.skipif(not ARC.exists(), reason="the ARC tasks are not beside the checkout")


pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

DOUBLE = "def solve(x):\n    return 2 * x\n"
PAIRS = json.dumps([{"input": 1, "output": 2}, {"input": 5, "output": 10}])


def row(task_id: str, train: Iterable[tuple[Any, Any]], test: Iterable[tuple[Any, Any]]) -> str:
    pairs = [[{"input": a, "output": b} for a, b in part] for part in (train, test)]
    return json.dumps({"task_id": task_id, "train": pairs[0], "test": pairs[1]})


@pytest.fixture
def doubles(tmp_path: Path) -> Path:
    file = tmp_path / "doubles.jsonl"
    lines = [row(f"t{k}", [(k, 2 * k), (k + 1, 2 * k + 2)], [(k + 7, 2 * k + 14)]) for k in range(60)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def verifier() -> ProgramVerifier:
    return ProgramVerifier(cpu_seconds=2, wall_seconds=60.0, memory_mb=96, output_kb=16)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (DOUBLE, Status.CORRECT),
        ("solve = lambda x: x + x", Status.CORRECT),
        ("def solve(x):\n    print('noise' * 99999)\n    return 2 * x", Status.CORRECT),
        ("import sys\ndef solve(x):\n    sys.stdout.write('value 2')\n    return x * 2", Status.CORRECT),
        ("def solve(x): return x", Status.WRONG),
        ("def solve(x): return float(2 * x)", Status.WRONG),
        ("def solve(x): return 1 / 0", Status.WRONG),
        ("def solve(x): return {1, 2}", Status.WRONG),
        ("def solve(x, y): return 2 * x", Status.WRONG),
        ("def solve(x): raise SystemExit(0)", Status.WRONG),
        ("import os\nos._exit(0)\ndef solve(x): return 2 * x", Status.WRONG),
        ("import ctypes\ndef solve(x): return ctypes.string_at(0)", Status.WRONG),
        ("raise ValueError('at once')\ndef solve(x): return 2 * x", Status.WRONG),
        ("def solve(x) return 2 * x", Status.UNPARSABLE),
        ("def solver(x):\n    return 2 * x\n", Status.UNPARSABLE),
        ("solve = 2", Status.UNPARSABLE),
        ("", Status.UNPARSABLE),
        ("\x00", Status.UNPARSABLE),
        ("solve = '\ud800", Status.UNPARSABLE),
        ("(" * 100_000, Status.UNPARSABLE),
        ("def solve(x):\n    while True: pass", Status.TIMEOUT),
        ("def solve(x):\n    return len(bytearray(1 << 30))", Status.ERROR),
        ("import os\ndef solve(x):\n    while True: os.write(1, b'x' * 9999)", Status.ERROR),
    ],
)
def test_verdicts_are_kept_apart(program: str, status: Status, verifier: ProgramVerifier) -> None:
    verdict = verifier.verify(PAIRS, program)
    assert verdict.status is status, verdict
    assert (verdict.reward == 1.0) == verdict.won
    assert verdict.won or verdict.why
    verdict.why.encode()  # it can be stored


@pytest.mark.parametrize(
    ("output", "program", "won"),
    [
        ([[1, 2]], "def solve(x): return ((1, 2),)", True),
        ({"b": 1, "a": [None]}, "def solve(x): return {'a': [None], 'b': 1}", True),
        ("naïve\n\u2028", "def solve(x): return 'na\\u00efve\\n\\u2028'", True),
        (1, "def solve(x): return True", False),
        (True, "def solve(x): return 1", False),
        ([[1, 2]], "def solve(x): return [1, 2]", False),
    ],
)
def test_outputs_are_compared_as_json(output: object, program: str, won: bool, verifier: ProgramVerifier) -> None:
    assert verifier.judge([{"input": 0, "output": output}], program).won is won


def test_a_program_that_prints_the_protocol_itself_wins_only_by_the_right_outputs(verifier: ProgramVerifier) -> None:
    lie = "import os\nos.write(1, b'value 2\\nvalue {}\\ndone \\n')\nos._exit(0)"
    assert verifier.verify(PAIRS, lie.format(11)).status is Status.WRONG
    assert (
        verifier.verify(PAIRS, lie.format(10)).status is Status.CORRECT
    )  # it told the right outputs, as any constant may


def test_expected_outputs_never_enter_the_sandbox(verifier: ProgramVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(program: str, stdin: str = "") -> Run:
        seen.extend((program, stdin))
        return Run(Outcome.OK, b"", b"")

    monkeypatch.setattr(verifier.sandbox, "run", run)
    verifier.judge([{"input": "the question", "output": "the-gold-answer"}], "def solve(x): return x")
    assert "the question" in "".join(seen)
    assert "the-gold-answer" not in "".join(seen)


@pytest.mark.parametrize("gold", ["", "[]", "{}", "[1]", '[{"input": 1}]', "[" * 100_000])
def test_gold_that_is_no_list_of_pairs_never_gives_a_win(gold: str, verifier: ProgramVerifier) -> None:
    assert verifier.verify(gold, DOUBLE).status is Status.ERROR


def test_a_verdict_is_kept_and_a_failure_of_the_sandbox_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ProgramVerifier(cache=2)
    runs: list[Run] = [Run(Outcome.ERROR, b"", b"", "no memory"), Run(Outcome.OK, b"value 2\nvalue 10\ndone\n", b"")]
    calls: list[str] = []

    def run(program: str, stdin: str = "") -> Run:  # noqa: ARG001 - the sandbox's signature
        calls.append(stdin)
        return runs[min(len(calls), len(runs)) - 1]

    monkeypatch.setattr(judge.sandbox, "run", run)
    assert judge.verify(PAIRS, DOUBLE).status is Status.ERROR
    assert judge.verify(PAIRS, DOUBLE).status is Status.CORRECT
    assert judge.verify(PAIRS, DOUBLE).status is Status.CORRECT
    assert len(calls) == 2
    for k in range(2):
        judge.verify(PAIRS, f"{DOUBLE}# {k}")
    judge.verify(PAIRS, DOUBLE)  # pushed out by the two
    assert len(calls) == 5


def test_partial_reward_is_the_share_of_outputs_right_before_the_first_miss() -> None:
    judge = ProgramVerifier(partial=0.5)
    verdict = judge.judge(
        [{"input": k, "output": 2 * k} for k in range(4)], "def solve(x): return 2 * x if x < 3 else 0"
    )
    assert (verdict.status, verdict.reward) == (Status.WRONG, 0.5 * 3 / 4)


# --- the task ---


def test_splits_are_disjoint_fixed_by_id_and_whole(doubles: Path) -> None:
    task = Program(str(doubles))
    parts = {split: {p.id for p in task.problems(split)} for split in SPLITS}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 60
    lines = doubles.read_text().splitlines()
    doubles.write_text("\n".join(reversed(lines[::2])))
    fewer = Program(str(doubles))
    for split in SPLITS:
        kept = {p.id for p in fewer.problems(split)}
        assert kept <= parts[split]
    assert {p.id for p in Program(str(doubles), seed=1).problems("train")} != {p.id for p in fewer.problems("train")}


def test_a_heldout_file_is_held_out_in_full(doubles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for k in range(3):
        (folder / f"h{k}.json").write_text(row(f"h{k}", [(k, k)], [(k, k)]))
    task = Program(str(doubles), heldout_path=str(folder))
    assert [p.id for p in task.problems("heldout")] == ["program-h0", "program-h1", "program-h2"]
    assert len(task.problems("train")) + len(task.problems("dev")) == 60


def test_gold_stands_in_the_reference_alone(doubles: Path) -> None:
    problem = Program(str(doubles)).problems("train")[0]
    assert problem.reference is not None
    gold = json.loads(problem.reference)[0]["output"]
    assert str(gold) not in str(problem.prompt)
    assert str(gold) not in json.dumps(dict(problem.meta))


def test_check_needs_the_training_pairs_only_and_verify_the_test_pairs(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(row("a", [(1, 2), (2, 4)], [(3, 6)]))
    task = Program(str(file), heldout_share=0.0, dev_share=0.0)
    (problem,) = task.problems("train")
    learned_by_heart = "def solve(x): return {1: 2, 2: 4}[x]"
    assert task.check(problem, learned_by_heart).won
    assert task.verify(problem, learned_by_heart).status is Status.WRONG
    assert task.check(problem, DOUBLE).won
    assert task.verify(problem, DOUBLE).won
    unknown = Problem(problem.id, problem.prompt, None, problem.meta)
    assert task.check(unknown, DOUBLE).won
    with pytest.raises(TaskError, match="has no test pairs"):
        task.verify(unknown, DOUBLE)


def test_vary_changes_the_order_of_the_examples_and_no_gold(doubles: Path) -> None:
    task = Program(str(doubles))
    problem = task.problems("train")[0]
    prompts = {str(task.vary(problem, seed).prompt) for seed in range(8)}
    assert len(prompts) == 2
    varied = task.vary(problem, 3)
    assert (varied.id, varied.reference) == (problem.id, problem.reference)
    assert task.vary(problem, 3) == varied


@pytest.mark.parametrize("delimiter", ["\n", "\n\n"])
def test_steps_are_lines_or_blocks_and_join_to_the_text(doubles: Path, delimiter: str) -> None:
    task = Program(str(doubles), delimiter=delimiter)
    text = "\nimport math\n\n\n\ndef solve(x):\n    return x\n\n# end"
    steps = task.split_steps(text)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps)
    assert len(steps) == {"\n": 4, "\n\n": 3}[delimiter]
    assert task.split_steps("") == []


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (DOUBLE, DOUBLE),
        (f"Sure!\n```python\n{DOUBLE}```\nDone.", DOUBLE),
        (f"```\ndef solve(x): return 0\n```\nBetter:\n```py\n{DOUBLE}```\n```\nprint(1)\n```", DOUBLE),
        (f"```python\n{DOUBLE}", DOUBLE),
        (f"<think>\ndef solve(x): return 0\n</think>\n{DOUBLE}", "\n" + DOUBLE),
        (f"<think>\n{DOUBLE}", None),
        ("I do not know how to solve it.", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_block_that_defines_solve(text: str, program: str | None) -> None:
    assert program_in(text) == program


def test_a_typed_problem_is_read(doubles: Path) -> None:
    task = Program(str(doubles))
    problem = task.read('{"train": [{"input": [[0, 1]], "output": [[1, 0]]}]}')
    assert "0 1" in str(problem.prompt)
    assert task.check(problem, "def solve(x): return [r[::-1] for r in x]").won
    for text in ("12", "{}", "not json", '{"train": []}', '{"train": [{"input": 1, "output": 2}], "test": [3]}'):
        with pytest.raises(TaskError):
            task.read(text)


def test_warmup_gives_solutions_of_training_problems_alone(doubles: Path, tmp_path: Path) -> None:
    solutions = tmp_path / "solutions.jsonl"
    solutions.write_text("".join(json.dumps({"task_id": f"t{k}", "program": DOUBLE}) + "\n" for k in range(60)))
    doubles.write_text("\n".join(doubles.read_text().splitlines()[:8]))
    task = Program(str(doubles), solutions=str(solutions))
    ids = [p.id for p in task.problems("train")]
    examples = list(islice(task.warmup(0), len(ids)))
    assert sorted(e.problem.id for e in examples) == sorted(ids)
    assert {"".join(e.steps) for e in examples} == {DOUBLE}
    solutions.write_text(json.dumps({"task_id": ids[0].removeprefix("program-"), "program": "def solve(x): return x"}))
    with pytest.raises(TaskSettingError, match="does not solve"):
        next(task.warmup(0))
    with pytest.raises(TaskSettingError, match="give solutions"):
        next(Program(str(doubles)).warmup(0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no problem"),
        ("{", "line 1 of .* is no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"train": 1}', "needs task_id"),
        ('{"task_id": "a", "train": [], "test": []}', "train must be a list of pairs"),
        (row("a", [(1, 1)], [(1, 1)]) + "\n" + row("a", [(1, 1)], [(1, 1)]), "'a' is there twice"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(TaskSettingError, match=words):
        Program(str(file)).problems("train")


def test_a_task_without_a_file_says_so() -> None:
    with pytest.raises(TaskSettingError, match="give path"):
        Program().problems("train")
    with pytest.raises(TaskSettingError, match="there is no file"):
        Program("nowhere.jsonl").problems("train")


@pytest.mark.parametrize(
    "settings",
    [
        {"dev_share": 1.0},
        {"dev_share": 0.5, "heldout_share": 0.5},
        {"delimiter": ";"},
        {"max_steps": 0},
        {"sandbox": "none"},
        {"cpu_seconds": 0},
        {"memory_mb": 1},
        {"partial": 1.0},
        {"show_test_inputs": "yes"},
        {"path": 3},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((TaskSettingError, SandboxError)):
        load_task("program", **{"path": "x.jsonl", **settings})


# --- ARC ---

SOLVERS = {
    "67a3c6ac": "def solve(g):\n    return [r[::-1] for r in g]\n",
    "68b16354": "def solve(g):\n    return g[::-1]\n",
    "74dd1130": "def solve(g):\n    return list(zip(*g))\n",
    "3c9b0459": "def solve(g):\n    return [r[::-1] for r in g[::-1]]\n",
    "a416b8f3": "def solve(g):\n    return [r + r for r in g]\n",
    "d10ecb37": "def solve(g):\n    return [r[:2] for r in g[:2]]\n",
    "007bbfb7": "def solve(g):\n    return [[c * bool(b) for b in r for c in s] for r in g for s in g]\n",
}


@needs_arc
def test_all_400_arc_tasks_load_and_show_their_grids() -> None:
    task = Program(str(ARC))
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert len(problems) == len({p.id for p in problems}) == 400
    assert {split: len(task.problems(split)) for split in SPLITS} == {"train": 277, "dev": 33, "heldout": 90}
    for problem in problems:
        prompt = str(problem.prompt)
        assert all(render(pair["input"]) in prompt for pair in problem.meta["train"])
        assert "[" not in prompt.replace("list[", "")  # every value of ARC is a grid, shown as rows of digits
    short = Program(str(ARC), max_prompt=2000)
    assert all(len(str(p.prompt)) <= 2000 for split in SPLITS for p in short.problems(split))


@needs_arc
def test_arc_programs_written_by_hand_are_accepted_and_wrong_ones_refused() -> None:
    task = Program(str(ARC))
    problems = {p.meta["task_id"]: p for split in SPLITS for p in task.problems(split)}
    for task_id, program in SOLVERS.items():
        problem = problems[task_id]
        answer = task.answer(problem, task.split_steps(f"```python\n{program}```\n"))
        assert answer == program
        assert task.check(problem, answer).won, task_id
        assert task.verify(problem, answer).won, task_id
        assert task.check(problem, "def solve(g):\n    return g\n").status is Status.WRONG
        assert task.verify(problem, "def solve(g):\n    return g\n").status is Status.WRONG
