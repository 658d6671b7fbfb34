"""SIGKILL in the middle of any write: what others see is whole or not there, and the next driver goes on from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay import checkpoint
from selfplay.shards import iter_rows, list_shards, write_pending
from selfplay.store import is_remote, local_copy
from tests.selfplay.store_child import DISK, FINAL, S3, build_checkpoint
from tests.selfplay.test_store import new_store, taken_over
from tests.selfplay.trace_samples import METADATA, rows_of

ROOT = Path(__file__).parents[2]
LATER = ("before its name", "uploading a checkpoint", "between its parts", "before its state")
"""Moments after the shard was committed."""


@pytest.mark.parametrize(
    ("kind", "moment"),
    [*(("disk", moment) for moment in (*DISK, "never")), *(("s3", moment) for moment in (*S3, "never"))],
)
def test_a_kill_in_the_middle_of_a_write(
    kind: str, moment: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run") if kind == "disk" else str(request.getfixturevalue("s3_url"))
    first = new_store(url)
    first.put("metrics.jsonl", "1\n")
    command = [sys.executable, "-m", "tests.selfplay.store_child", url, first.place.run_id, "1", moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == (0 if moment == "never" else -signal.SIGKILL), child.stderr
    committed = moment in ("after its link", "after its PUT", "never", *LATER)

    seen = local_copy(url)
    assert (seen / "metrics.jsonl").read_text() == "1\n"
    shards = list_shards(seen) if (seen / "traces").is_dir() else []
    assert len(shards) == committed
    for shard in shards:
        assert len(list(iter_rows(shard))) == 40
    assert checkpoint.existing(seen / "checkpoints") == ([1] if moment == "never" else [])

    driver = taken_over(url)
    left = [name for name in driver.listing("pending") if not name.startswith("pending/epoch-00002/")]
    assert left == []
    for name in ("checkpoints", "traces"):
        driver.pull(name)
    scratch = driver.scratch("part-00000.arrow")
    write_pending(scratch, rows_of(40, group="again"), METADATA, make_folder=False)
    assert driver.commit(driver.offer(scratch), FINAL) != committed
    groups = {row["group"] for row in iter_rows(driver.pull(FINAL))}
    assert groups == {None} if committed else {"again"}
    final = driver.publish(build_checkpoint(driver, "again"), "checkpoints/00001")
    checkpoint.verify(final)
    assert checkpoint.read_state(final) == {"written": "again"}
    if is_remote(url):  # and another node, with a cache of its own, sees the same
        monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path / "elsewhere"))
        other = driver.place.open()
        assert other.root != driver.root
        checkpoint.verify(other.pull("checkpoints/00001"))
        assert {row["group"] for row in iter_rows(other.pull(FINAL))} == groups
