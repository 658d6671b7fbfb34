"""The commands on a tiny run, and one clear sentence with the right exit code for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from selfplay import cli
from tests.selfplay.tiny_run import CONFIG

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def selfplay(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["selfplay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    argv = sys.argv
    sys.argv = ["selfplay", "launch", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run"), "iterations=1"]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = argv
    assert not ended.value.code
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def first_shard(run: Path) -> Path:
    return sorted((run / "traces").rglob("*.arrow"))[0]


def test_a_run_ends_with_its_table_curve_and_metrics(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1]
    assert rows[1]["problems"] == 24
    assert rows[1]["sampled_tokens"] > 0
    assert rows[1]["logprob_gap"] < 1e-4
    assert (run / "curve.png").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())


def test_inspect_lists_iterations_traces_and_one_tree(run: Path, selfplay: Command) -> None:
    code, out, _ = selfplay("inspect", run)
    assert code == 0
    assert "24" in out
    code, out, _ = selfplay("inspect", run, "--where", "sampled > 0", "--limit", "2", "--json")
    assert code == 0
    trace = json.loads(out)
    found = json.dumps(trace)
    assert "trace_id" in found
    name = next(iter(_values(trace, "trace_id")))
    code, out, _ = selfplay("inspect", run, "--trace", name[:12])
    assert code == 0
    assert "->" in out


def _values(tree: object, key: str) -> list[str]:
    if isinstance(tree, dict):
        return [v for k, v in tree.items() if k == key] + [x for v in tree.values() for x in _values(v, key)]
    return [x for v in tree for x in _values(v, key)] if isinstance(tree, list) else []


def test_evaluate_prints_accuracy_against_tokens_spent(run: Path, selfplay: Command, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--strategy", "greedy", "--strategy", "mcts", "--budget", "20", "--budget", "40", "--limit", "6"]
    code, out, _ = selfplay("evaluate", run, *options, "--json", file)
    assert code == 0
    assert "mcts" in out
    lines = json.loads(file.read_text())["lines"]
    assert [(line["strategy"], line["budget"]) for line in lines] == [("greedy", 18), ("mcts", 20), ("mcts", 40)]
    assert all(0 < line["tokens_per_problem"] <= line["budget"] for line in lines)
    assert all(line["problems"] == 6 for line in lines)


def test_solve_shows_steps_and_says_whether_it_was_solved(run: Path, selfplay: Command) -> None:
    code, out, _ = selfplay("solve", run, "3 7 12 -> 33", "--budget", "60", "--show-tree")
    assert code in (0, 1)
    assert "tokens sampled" in out
    assert "value" in out


def sentence(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch", "nowhere.yaml"], "cannot read config nowhere.yaml"),
        (["launch", "configs/countdown3.yaml", "play.serch=1"], "unknown key play.serch; did you mean search?"),
        (["launch", "configs/countdown3.yaml", "play.search.budget=0"], "play.search.budget"),
        (["launch", "configs/countdown3.yaml", "task.name=contdown"], "did you mean 'countdown'?"),
        (["launch", "configs/countdown3.yaml", "task.nubers=3"], "did you mean 'numbers'?"),
        (["launch", "configs/countdown3.yaml", "play.search.strategy.name=mtcs"], "did you mean 'mcts'?"),
        (["launch", "configs/countdown3.yaml", "learn.objective.name=alphazro"], "did you mean alphazero?"),
        (["launch", "configs/countdown3.yaml", "model.fresh.widht=3"], "did you mean 'width'"),
        (["launch", "configs/countdown3.yaml", "model.path=configs"], "config.json"),
        (["resume", "nowhere"], "holds no run"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["evaluate", "configs"], "--task is needed"),
        (["evaluate", "nowhere", "--task", "countdown"], "no run or checkpoint"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    arguments: list[str], says: str, selfplay: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    if arguments[0] == "launch":
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    code, _, error = selfplay(*arguments)
    assert code in (1, 2)
    assert says in sentence(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["inspect", "--where", "verdct == 'correct'"], "verdict"),
        (["inspect", "--where", "__import__('os')"], "__import__"),
        (["inspect", "--trace", "zzzz"], "zzzz"),
        (["evaluate", "--strategy", "mtcs"], "did you mean 'mcts'?"),
        (["evaluate", "--split", "train"], "heldout or dev"),
        (["evaluate", "--strategy", "mcts:temperature=hot"], "temperature"),
        (["evaluate", "--strategy", "mcts:c_init=["], "no YAML value"),
        (["solve", "not a problem"], "a problem of countdown is"),
    ],
)
def test_a_wrong_wish_about_a_run_is_one_sentence(options: list[str], says: str, run: Path, selfplay: Command) -> None:
    code, _, error = selfplay(options[0], run, *options[1:])
    assert code in (1, 2)
    assert says in sentence(error)


def test_a_bad_row_of_a_problem_file_is_named(run: Path, selfplay: Command, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "a", "prompt": "3 7 12 -> 33 :"}\n{"id": "b"}\n', encoding="utf-8")
    code, _, error = selfplay("evaluate", run, "--problems", file)
    assert code == 2
    assert "row 2" in sentence(error)


def test_a_budget_of_nothing_is_refused(run: Path, selfplay: Command) -> None:
    code, _, error = selfplay("evaluate", run, "--budget", "0")
    assert code == 2
    assert "budget" in error


def test_a_run_cannot_be_launched_over(run: Path, selfplay: Command) -> None:
    code, _, error = selfplay("launch", run.parent / "tiny.yaml", "--run-dir", run)
    assert code == 1
    assert "already holds a run" in sentence(error)


def test_a_truncated_shard_is_named(copy: Path, selfplay: Command) -> None:
    shard = first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:-200])
    code, _, error = selfplay("inspect", copy)
    assert code == 1
    assert str(shard) in sentence(error)


def test_a_flipped_bit_is_found(copy: Path, selfplay: Command) -> None:
    shard = first_shard(copy)
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 16
    shard.write_bytes(data)
    code, _, error = selfplay("inspect", copy)
    assert code == 1
    assert str(shard) in sentence(error)


def test_a_model_folder_without_tokenizer_is_named(copy: Path, selfplay: Command) -> None:
    folder = copy / "checkpoints" / "00001" / "policy"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    code, _, error = selfplay("evaluate", folder, "--task", "countdown:heldout_problems=24")
    assert code == 2
    assert "tokenizer" in sentence(error)


def test_a_damaged_checkpoint_stops_resume_before_anything_is_played(copy: Path, selfplay: Command) -> None:
    weights = copy / "checkpoints" / "00001" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, error = selfplay("resume", copy, "iterations=2")
    assert code == 1
    assert "damaged" in sentence(error)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=9", "launch a new run"),
        ("learn.optimizer.name=muon", "launch a new run"),
        ("learn.objective.name=nope", "there is no objective nope"),
        ("play.search.strategy.name=mtcs", "did you mean 'mcts'?"),
    ],
)
def test_a_wrong_override_at_resume_changes_nothing(override: str, says: str, copy: Path, selfplay: Command) -> None:
    before = (copy / "config.yaml").read_text()
    code, _, error = selfplay("resume", copy, override)
    assert code == 2
    assert says in sentence(error)
    assert (copy / "config.yaml").read_text() == before


def test_a_partly_played_iteration_keeps_its_units(copy: Path, selfplay: Command) -> None:
    shard = first_shard(copy)
    shutil.copytree(shard.parent, shard.parent.with_name("iteration=00002"))
    code, _, error = selfplay("resume", copy, "play.unit=4", "iterations=2")
    assert code == 2
    assert "partly played" in sentence(error)


@pytest.mark.parametrize(
    "row", ['{"id": ["a"], "prompt": "x"}', '{"id": "a", "prompt": 7}', '{"id": "a", "prompt": "hello"}']
)
def test_a_problem_that_cannot_be_used_is_named(row: str, run: Path, selfplay: Command, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(row + "\n", encoding="utf-8")
    code, _, error = selfplay("evaluate", run, "--problems", file)
    assert code == 2
    assert "problems.jsonl, " in sentence(error)
