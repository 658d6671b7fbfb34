"""The same run on Ray, with two workers, and with workers that die: the same content, weights and metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay.run_folder import TIMING_COLUMNS, read_metrics
from selfplay.shards import iter_rows
from tests.selfplay.deadly import EVERY, Deadly, kills
from tests.selfplay.failing import CAUSE
from tests.selfplay.test_resume import ENVIRONMENT, ROOT, outcome, run_child
from tests.selfplay.tiny_run import CONFIG

pytestmark = pytest.mark.cluster
DEADLY = "task: {name: tests.selfplay.deadly.Deadly, splits: [train, heldout]}"


def test_two_ray_workers_and_a_killed_one_give_what_one_process_gives(tmp_path: Path) -> None:
    inline = run_child("never", tmp_path / "inline")
    assert inline.returncode == 0, inline.stderr
    config = tmp_path / "ray.yaml"
    config.write_text(CONFIG.replace("executor: inline", "executor: ray, workers: 2"), encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(tmp_path / "ray")]
    killed = False
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("iteration 1 play") and not killed:
                killed = kill_one_worker(process.pid)
    assert process.returncode == 0, "".join(lines)
    assert killed
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "inline")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["iteration 1 learn", "iteration 2 play"])
def test_a_ray_job_killed_as_a_whole_and_resumed_gives_what_one_process_gives(tmp_path: Path, moment: str) -> None:
    inline = run_child("never", tmp_path / "inline")
    assert inline.returncode == 0, inline.stderr
    config = tmp_path / "ray.yaml"
    config.write_text(CONFIG.replace("executor: inline", "executor: ray, workers: 2"), encoding="utf-8")
    command = [sys.executable, "-m", "selfplay"]
    launched = [*command, "launch", str(config), "--run-dir", str(tmp_path / "ray")]
    with subprocess.Popen(
        launched, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(moment):
                kill_all(process.pid)
                break
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        [*command, "resume", str(tmp_path / "ray")],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "inline")


@pytest.mark.slow
def test_problems_that_kill_their_workers_are_found_and_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    config = tmp_path / "deadly.yaml"
    text = CONFIG.replace("task: {name: countdown, numbers: 3, heldout_problems: 24, dev_problems: 16}", DEADLY)
    text = text.replace("executor: inline", "executor: ray, workers: 2, restarts: 40")
    text = text.replace("steps: 12", "steps: 150")  # before it knows the form of a step none is judged
    text = text.replace("unit: 8", "unit: 4").replace("{samples: 2}", "{samples: 1}")
    config.write_text(text.replace("iterations: 2", "iterations: 1"), encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(iter_rows(tmp_path / "run"))
    assert len(rows) == 24
    failed = {row["problem_id"]: row["error"] for row in rows if row["ended"] == "failed"}
    deadly = {row["problem_id"] for row in rows if sum(row["problem_id"].encode()) % EVERY == 0}
    assert failed
    assert set(failed) <= deadly  # one whose steps were never judged killed nobody
    assert all("SIGSEGV" in why for why in failed.values())
    measured = [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in read_metrics(tmp_path / "run")]
    most = sum(kills(problem) for problem in Deadly().problems("heldout"))
    assert all(0 < row["heldout_failed"] <= most for row in measured)
    assert all(row["dev_failed"] == 0 for row in measured)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])  # as if killed in the last evaluation
    command[2:] = ["selfplay", "resume", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    again = [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in read_metrics(tmp_path / "run")]
    assert again == measured


@pytest.mark.slow
def test_a_sharded_learner_that_fails_alone_is_named_with_its_error_and_the_run_goes_on(tmp_path: Path) -> None:
    config, marker = tmp_path / "failing.yaml", tmp_path / "failed"
    failing = f"task: {{name: tests.selfplay.failing.Failing, marker: {marker}}}"
    text = CONFIG.replace("task: {name: countdown, numbers: 3, heldout_problems: 24, dev_problems: 16}", failing)
    cluster = "executor: ray, workers: 1, worker_cpus: 0.5, learners: 2, learner_cpus: 0.5, sharding: fsdp2"
    config.write_text(text.replace("executor: inline", cluster).replace("iterations: 2", "iterations: 1"))
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert marker.exists()
    assert f"learners lost (learner 1 failed: {CAUSE}); they start again from the beginning" in said
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1]


def kill_all(driver: int) -> None:
    """SIGKILL the driver and everything that it started, Ray's own processes included."""
    family = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _descends(int(p.name), driver)]
    for pid in [driver, *family]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with its parent


def _descends(pid: int, driver: int) -> bool:
    try:
        return driver in ancestors(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False  # it ended while we looked


def kill_one_worker(driver: int) -> bool:
    """SIGKILL one worker actor of this driver's own Ray."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            name = (process / "cmdline").read_bytes()
            if name.startswith(b"ray::WorkerActor") and driver in ancestors(int(process.name)):
                os.kill(int(process.name), signal.SIGKILL)
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return False


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_play_overlaps_learning_within_its_bound_and_loses_nothing(tmp_path: Path, staleness: int) -> None:
    config = tmp_path / "ahead.yaml"
    text = CONFIG.replace("executor: inline", "executor: ray, workers: 2").replace("iterations: 2", "iterations: 5")
    config.write_text(text.replace("  unit: 8", f"  unit: 8\n  max_staleness: {staleness}"), encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(iter_rows(tmp_path / "run", columns=["trace_id", "iteration", "policy_version"]))
    assert len({row["trace_id"] for row in rows}) == len(rows) == 5 * 24
    behind = [row["iteration"] - 1 - row["policy_version"] for row in rows]
    assert all(0 <= b <= staleness for b in behind)
    assert any(behind)
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_sharing_a_device_by_turns_and_fitting_workers_change_nothing(tmp_path: Path) -> None:
    inline = run_child("never", tmp_path / "inline")
    assert inline.returncode == 0, inline.stderr
    config = tmp_path / "turns.yaml"
    text = CONFIG.replace("executor: inline", "executor: ray, workers: fit, by_turns: true, worker_cpus: 0.5")
    config.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(tmp_path / "ray")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "inline")
