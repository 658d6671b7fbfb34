"""Killed at any moment and resumed, a run ends with the same shards, weights and metrics as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfplay.run_folder import TIMING_COLUMNS, read_metrics
from selfplay.shards import content_digest
from tests.selfplay.tiny_run import MOMENTS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def run_child(moment: str, run: Path, *config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.selfplay.tiny_run", moment, str(run), *map(str, config)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def outcome(run: Path, last: int = 2) -> dict[str, Any]:
    """All that a run promises to repeat: content of shards, last weights, metrics without the timing columns."""
    rows = [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in read_metrics(run)]
    newest = run / "checkpoints" / f"{last:05d}"
    files = sorted(p for p in newest.rglob("*") if p.suffix == ".safetensors")
    return {
        "content": content_digest(run),
        "weights": {str(p.relative_to(newest)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
        "metrics": json.dumps(rows, sort_keys=True),
        "pending": [p.name for p in (run / "pending").iterdir()],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_child("never", run)
    assert done.returncode == 0, done.stderr
    found = outcome(run)
    assert len(found["weights"]) == 2
    assert found["pending"] == []
    return found


def kill_and_resume(moment: str, run: Path) -> None:
    killed = run_child(moment, run)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_child("never", run)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize("moment", ["during commit", "learn"])
def test_a_killed_run_resumes_to_the_same_end(moment: str, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    kill_and_resume(moment, tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("moment", [m for m in MOMENTS if m not in ("during commit", "learn")])
def test_a_killed_run_resumes_to_the_same_end_at_every_other_moment(
    moment: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    kill_and_resume(moment, tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_a_run_killed_again_and_again_resumes_to_the_same_end(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    for moment in ("warm-up", "before commit", "play", "during checkpoint", "evaluate"):
        assert run_child(moment, tmp_path / "run").returncode == -signal.SIGKILL
    assert run_child("never", tmp_path / "run").returncode == 0
    assert outcome(tmp_path / "run") == undisturbed
