"""A run sent to a cluster as a job: what is sent, how its log is followed, and that it plays what one process plays."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from selfplay.cluster import submit as module
from selfplay.cluster.submit import Ended, check_run_dir, connect, entrypoint, follow, job_environment, read_runtime_env
from selfplay.config import parse_config
from selfplay.errors import UserError
from selfplay.run_folder import RunError
from selfplay.status import read_status
from tests.selfplay.ray_nodes import Cluster, free_ports, head_node
from tests.selfplay.test_resume import ROOT, outcome, run_child
from tests.selfplay.tiny_run import CONFIG as TINY
from tests.selfplay.tiny_run import tiny_config

RAY = tiny_config("cluster={executor: ray, workers: 2, grace_seconds: 12.5}")


@pytest.mark.parametrize("run_dir", [None, "runs/first", "./x", "s3:/one-slash", ""])
def test_a_run_folder_that_depends_on_where_a_process_runs_is_refused(run_dir: str | None) -> None:
    with pytest.raises(UserError, match=r"give an absolute path on a disk that every node mounts, or an s3:// address"):
        check_run_dir(run_dir)


@pytest.mark.parametrize("run_dir", ["/shared/runs/first", "s3://bucket/runs/first"])
def test_a_run_folder_that_all_nodes_can_find_is_taken(run_dir: str) -> None:
    assert check_run_dir(run_dir) == run_dir


def test_the_job_gets_the_whole_resolved_config_and_is_the_process_that_is_signalled(tmp_path: Path) -> None:
    """The command is run by the shell as Ray runs it, with a script in the place of Python."""
    script = tmp_path / "a python"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$$" "$@" > "$OUT/arguments"\ncat /dev/stdin > "$OUT/config"\n')
    script.chmod(0o755)
    config = tiny_config("cluster.executor=ray", "task.note='CONFIG\n$HOME `id` '")
    command = entrypoint(config, "/shared/my runs/x", str(script), {})
    with subprocess.Popen(command, shell=True, env={**os.environ, "OUT": str(tmp_path)}) as process:
        assert process.wait() == 0
    pid, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert int(pid) == process.pid
    assert arguments == shlex.split(
        "-m selfplay launch /dev/stdin --run-dir '/shared/my runs/x' --or-resume --address auto"
    )
    assert parse_config((tmp_path / "config").read_text()) == config


def test_an_environment_with_a_python_of_its_own_is_not_passed_by() -> None:
    assert shlex.split(entrypoint(RAY, "/x", None, {}))[1] == sys.executable
    assert shlex.split(entrypoint(RAY, "/x", None, {"pip": ["mcts-selfplay"]}))[1] == "python"
    assert shlex.split(entrypoint(RAY, "/x", None, {"py_modules": ["/src"]}))[1] == sys.executable
    assert shlex.split(entrypoint(RAY, "/x", "/opt/python", {"pip": ["mcts-selfplay"]}))[1] == "/opt/python"


def test_a_stopped_job_gets_the_grace_that_the_config_names() -> None:
    assert job_environment({}, RAY) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "23"}}
    own = {"pip": ["x"], "env_vars": {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "99"}}
    assert job_environment(own, RAY) == own


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None])
def test_a_runtime_environment_that_is_none_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="--runtime-env"):
        read_runtime_env(file)


def test_an_environment_variable_that_ray_prefers_to_the_given_address_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"RAY_ADDRESS=http://127.0.0.1:1 is set and Ray would take it"):
        connect("http://127.0.0.1:2")


def test_an_address_where_nobody_answers_is_one_sentence() -> None:
    (port,) = free_ports(1)
    with pytest.raises(RunError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}"):
        connect(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="takes the dashboard's address"):
        connect("ray://127.0.0.1:10001")


class Jobs:
    """A job server whose log connection breaks as told; each connection sends the log from its beginning."""

    def __init__(self, connections: list[list[str | Exception]], **info: Any) -> None:
        self.connections = connections
        self.info = SimpleNamespace(**{"driver_exit_code": None, "message": None, **info})

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for text in self.connections.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_info(self, _: str) -> Any:
        running = SimpleNamespace(status=JobStatus.RUNNING)
        return running if self.connections else self.info


def test_a_log_connection_that_breaks_is_made_again_and_nothing_is_printed_twice(capsys: Any) -> None:
    jobs = Jobs(
        [
            ["one\n", "tw", RuntimeError("WebSocket closed")],
            ["one\ntwo\n"],
            [OSError("gone")],
            ["one\ntwo\nthr", "ee\n"],
        ],
        status=JobStatus.SUCCEEDED,
    )
    assert follow(jobs, "j").exit_code == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("info", "ended"),
    [
        ({"status": JobStatus.SUCCEEDED, "driver_exit_code": 0}, Ended(0, "the job is done")),
        ({"status": JobStatus.FAILED, "driver_exit_code": 2}, Ended(2, "the job failed: exit code 2")),
        ({"status": JobStatus.FAILED, "message": "no such\n image"}, Ended(1, "the job failed: no such image")),
        ({"status": JobStatus.STOPPED}, Ended(130, "the job was stopped; what it had committed is kept")),
    ],
)
def test_the_exit_code_is_the_jobs(info: dict[str, Any], ended: Ended) -> None:
    assert follow(Jobs([[]], **info), "j") == ended  # type: ignore[arg-type]


def test_following_is_given_up_in_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "RETRIES", 2)
    with pytest.raises(RunError, match=r"cannot be followed .*; the job itself may well go on"):
        follow(Jobs([[OSError("gone")], [OSError("gone")]]), "j")  # type: ignore[arg-type]


def selfplay(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfplay", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", [["--python", "/x"], ["--runtime-env", "x.yaml"]])
def test_options_of_a_job_without_a_job_are_refused(option: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TINY)
    done = selfplay("launch", str(tmp_path / "c.yaml"), *option, environment=dict(os.environ))
    assert done.returncode == 2
    assert "add --submit DASHBOARD" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "one process and joins no cluster: add cluster.executor=ray"),
        (["--address", "h:6379"], "a job joins the cluster that it is sent to: leave out --address"),
    ],
)
def test_a_job_that_could_not_join_its_cluster_is_not_sent(options: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TINY if not options else TINY.replace("executor: inline", "executor: ray"))
    given = [str(tmp_path / "c.yaml"), "--submit", "http://127.0.0.1:1", "--run-dir", str(tmp_path / "run"), *options]
    done = selfplay("launch", *given, environment=dict(os.environ))
    assert done.returncode == 2
    assert says in done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with head_node() as running:
        yield running


@pytest.mark.cluster
@pytest.mark.slow
def test_a_submitted_run_ends_with_what_one_process_gives_and_a_second_submission_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    inline = run_child("never", tmp_path / "inline")
    assert inline.returncode == 0, inline.stderr
    config = tmp_path / "ray.yaml"
    config.write_text(TINY.replace("executor: inline", "executor: ray, workers: 2"), encoding="utf-8")
    run = tmp_path / "ray"
    sent = ["launch", str(config), "--submit", cluster.dashboard, "--run-dir", str(run)]
    done = selfplay(*sent, environment=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration 2 learn" in done.stdout  # the log was followed
    job = done.stdout.split()[1]
    assert f"ray job logs --follow {job} --address {cluster.dashboard}" in done.stdout
    assert outcome(run) == outcome(tmp_path / "inline")
    again = selfplay(*sent, environment=cluster.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{run} holds a run: it goes on with its own config" in again.stdout
    assert outcome(run) == outcome(tmp_path / "inline")


@pytest.mark.cluster
@pytest.mark.slow
def test_ctrl_c_detaches_and_the_job_goes_on_until_it_is_stopped_and_has_saved(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = tmp_path / "long.yaml"
    config.write_text(TINY.replace("inline", "ray").replace("iterations: 2", "iterations: 1000"), encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--submit", cluster.dashboard]
    with subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "run")], cwd=ROOT, env=cluster.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        job = process.stdout.readline().split()[1]
        for line in process.stdout:
            if "iteration 0 warm-up" in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130
    assert f"detached; job {job} goes on" in said
    assert "Traceback" not in said
    ask = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    where = [job, "--address", cluster.dashboard]
    status = subprocess.run(
        [*ask, "status", *where], env=cluster.environment, capture_output=True, text=True, check=True
    )
    assert "RUNNING" in status.stdout + status.stderr
    subprocess.run([*ask, "stop", *where], env=cluster.environment, capture_output=True, check=True)  # and waits
    found = read_status(tmp_path / "run")
    assert found.state == "interrupted"  # SIGTERM reached the driver, which had time to say so
    assert f"selfplay resume {tmp_path / 'run'}" in found.says


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_that_fails_gives_its_exit_code_and_its_words(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(TINY.replace("inline", "ray").replace("numbers: 3", "numbers: 99"), encoding="utf-8")
    done = selfplay(
        "launch", str(config), "--submit", cluster.dashboard, "--run-dir", str(tmp_path / "run"),
        environment=cluster.environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stdout
    assert "the job failed: exit code 2" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()
    assert json.dumps(str(tmp_path)) not in done.stderr
