"""A whole run in object storage: killed and resumed on another node, it ends like the one on a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay import cli
from selfplay.s3 import Bucket
from selfplay.store import local_copy
from tests.selfplay.test_resume import ENVIRONMENT, ROOT, outcome, run_child
from tests.selfplay.tiny_run import CONFIG


def child(moment: str, url: str, cache: Path, config: Path) -> subprocess.CompletedProcess[str]:
    """As `run_child`, on a node with a cache of its own."""
    names = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    command = [sys.executable, "-m", "tests.selfplay.tiny_run", moment, url, str(config)]
    environment = {**ENVIRONMENT, **names, "SELFPLAY_CACHE": str(cache)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_in_object_storage_is_killed_resumed_elsewhere_and_ends_like_the_one_on_disk(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    undisturbed = run_child("never", tmp_path / "disk")
    assert undisturbed.returncode == 0, undisturbed.stderr
    for number, moment in enumerate(("during commit", "during checkpoint", "learn")):
        killed = child(moment, s3_url, tmp_path / f"node-{number}", config)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = child("never", s3_url, tmp_path / "node-9", config)
    assert ended.returncode == 0, ended.stderr
    assert f"selfplay inspect {s3_url}" in ended.stdout

    monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path / "reader"))
    seen = local_copy(s3_url)
    (seen / "pending").mkdir(exist_ok=True)
    assert outcome(seen) == outcome(tmp_path / "disk")
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
