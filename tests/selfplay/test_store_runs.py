"""Whole runs: in object storage, killed and resumed on other nodes; and a driver that sleeps while another takes over.
They end like the run on a disk that nobody disturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay import cli
from selfplay.s3 import Bucket
from selfplay.store import local_copy
from tests.selfplay.test_resume import ENVIRONMENT, ROOT, outcome, run_child
from tests.selfplay.test_store import snapshot
from tests.selfplay.tiny_run import CONFIG

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_child("never", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG, encoding="utf-8")
    return file


def start(moment: str, url: str, cache: Path, config: Path) -> subprocess.Popen[str]:
    """The tiny run on a node with a cache of its own."""
    names = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    command = [sys.executable, "-m", "tests.selfplay.tiny_run", moment, url, str(config)]
    environment = {**ENVIRONMENT, **names, "SELFPLAY_CACHE": str(cache)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def child(moment: str, url: str, cache: Path, config: Path) -> subprocess.CompletedProcess[str]:
    with start(moment, url, cache, config) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_a_driver_that_wakes_up_after_another_took_over_stops_and_changes_nothing(
    kind: str, tmp_path: Path, config: Path, undisturbed: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "run") if kind == "disk" else str(request.getfixturevalue("s3_url"))
    with start("never", url, tmp_path / "node-1", config) as sleeper:
        assert sleeper.stderr is not None
        for line in sleeper.stderr:
            if line.startswith("iteration 1 play"):
                break
        os.kill(sleeper.pid, signal.SIGSTOP)
        try:
            if kind == "disk":
                (tmp_path / "run" / "lock").unlink()  # the other one is on another host, and this lock is this host's
            ended = child("never", url, tmp_path / "node-2", config)
            assert ended.returncode == 0, ended.stderr
            before = snapshot(url)
        finally:
            os.kill(sleeper.pid, signal.SIGCONT)
        _, err = sleeper.communicate()
    assert sleeper.returncode == 1, err
    assert re.search(r"error: .* was taken over by another driver \(epoch 2\); this one \(epoch 1\) stops", err), err
    assert "Traceback" not in err
    after = snapshot(url)
    own = {name for name in after if name.startswith("tensorboard/")}  # each driver has event files of its own
    assert {k: v for k, v in after.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
    seen = local_copy(url)
    (seen / "pending").mkdir(exist_ok=True)
    assert outcome(seen) == outcome(undisturbed)


def test_a_run_in_object_storage_is_killed_resumed_elsewhere_and_ends_like_the_one_on_disk(
    s3_url: str, tmp_path: Path, config: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number, moment in enumerate(("during commit", "during checkpoint", "learn")):
        killed = child(moment, s3_url, tmp_path / f"node-{number}", config)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = child("never", s3_url, tmp_path / "node-9", config)
    assert ended.returncode == 0, ended.stderr
    assert f"selfplay inspect {s3_url}" in ended.stdout

    monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path / "reader"))
    seen = local_copy(s3_url)
    (seen / "pending").mkdir(exist_ok=True)
    assert outcome(seen) == outcome(undisturbed)
    names = {found.key for found in Bucket(s3_url).list("")}
    assert {"curve.png", "heartbeat.json", "metrics.jsonl", "run.json", "config.yaml"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert not [name for name in names if name.startswith("pending/")]

    monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path / "user"))
    for arguments in (
        ["inspect", s3_url],
        ["inspect", f"{s3_url}/traces/iteration=00001/part-00000.arrow", "--json"],
        ["export", s3_url, "--format", "prm-model", "--out", str(tmp_path / "prm")],
        ["evaluate", s3_url, "--strategy", "greedy", "--budget", "32", "--limit", "2"],
        ["evaluate", f"{s3_url}/checkpoints/00001", "--strategy", "greedy", "--budget", "32", "--limit", "2"],
    ):
        monkeypatch.setattr("sys.argv", ["selfplay", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code, capsys.readouterr().err
    assert not list((tmp_path / "user").rglob("optimizer.pt"))
