"""A run folder has one driver, loses no metrics row and says clearly what is wrong."""

import multiprocessing
from pathlib import Path

import pytest

from selfplay.config import ConfigError, parse_config
from selfplay.run_folder import RunError, RunFolder, read_metrics
from tests.selfplay.tiny_run import tiny_config

CONFIG = parse_config("task: {name: countdown}\nplay: {search: {strategy: {name: mcts}, budget: 64}}")


def test_a_run_is_created_once(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    with pytest.raises(RunError, match="already holds a run; continue it with `selfplay resume"):
        RunFolder.create(tmp_path / "run", CONFIG)


def test_a_strange_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="not empty and holds no run"):
        RunFolder.create(tmp_path, CONFIG)


def _try_to_open(path: Path, answer: "multiprocessing.Queue[str]") -> None:
    try:
        RunFolder.open(path)
        answer.put("opened")
    except RunError as error:
        answer.put(str(error))


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[str] = context.Queue()
    for expected in ("is in use by another process", "opened"):
        other = context.Process(target=_try_to_open, args=(tmp_path / "run", answer))
        other.start()
        assert expected in answer.get(timeout=60)
        other.join()
        run.close()


def test_opening_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_each_opening_raises_the_epoch_and_clears_what_was_pending(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    (run.path / "pending" / "left.arrow").write_text("half")
    run.close()
    again = RunFolder.open(tmp_path / "run")
    assert again.facts["epoch"] == 2
    assert [p.name for p in (again.path / "pending").iterdir()] == ["epoch-00002"]
    again.close()
    assert not list((again.path / "pending").iterdir())


def test_overrides_at_resume_are_kept_beside_the_old_config(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    run = RunFolder.open(tmp_path / "run", ["iterations=33"])
    run.close()
    assert run.config.iterations == 33
    assert (run.path / "config.until-epoch-001.yaml").exists()
    again = RunFolder.open(tmp_path / "run")
    again.close()
    assert again.config.iterations == 33


@pytest.mark.parametrize("override", ["seed=9", "task.name=game24"])
def test_a_run_keeps_its_task_and_seed(tmp_path: Path, override: str) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    with pytest.raises(ConfigError, match="launch a new run"):
        RunFolder.open(tmp_path / "run", [override])


def test_metrics_of_a_repeated_iteration_replace_the_old_row(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    for iteration, score in ((0, 0.1), (1, 0.2), (1, 0.3)):
        run.append_metrics({"iteration": iteration, "heldout_pass1": score})
    assert [(r["iteration"], r["heldout_pass1"]) for r in run.metrics()] == [(0, 0.1), (1, 0.3)]
    run.close()


@pytest.mark.parametrize("line", ["[1]", "3", "null", "{}", '{"iteration": "x"}'])
def test_metrics_that_are_no_rows_are_one_sentence(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged \(a line is no row of an iteration\); restore it"):
        read_metrics(tmp_path)


def test_a_launch_killed_before_its_run_existed_can_be_launched_again(tmp_path: Path) -> None:
    for name in ("checkpoints", "traces", "tensorboard", "pending/epoch-00001"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("left over", encoding="utf-8")
    (tmp_path / "run" / "pending" / "epoch-00001" / "half.yaml").write_text("left over", encoding="utf-8")
    run = RunFolder.create(tmp_path / "run", tiny_config())
    assert run.facts["epoch"] == 2  # were that launch not dead but asleep on another host, it could change nothing
    assert [p.name for p in (tmp_path / "run" / "pending").iterdir()] == ["epoch-00002"]
    run.close()
