"""Exactly once: whoever dies or races, a unit's rows are committed one time and never lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfplay import shards
from selfplay.shards import ShardError, ShardExists, commit, iter_rows, list_shards, shard_path, write_pending
from tests.selfplay.trace_samples import METADATA, rows_of

ROOT = Path(__file__).parents[2]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ShardError, match="No space left on device; free space"):
        write_pending(tmp_path / "a.arrow", rows_of(1), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_commit_moves_the_pending_file_to_its_final_name(tmp_path: Path) -> None:
    pending, final = tmp_path / "pending" / "a.arrow", shard_path(tmp_path, 3, 17)
    assert final == tmp_path / "traces" / "iteration=00003" / "part-00017.arrow"
    write_pending(pending, rows_of(2), METADATA)
    assert list_shards(tmp_path) == []
    assert commit(pending, final)
    assert list_shards(tmp_path) == [final]
    assert not pending.exists()
    assert not commit(pending, final)


def test_a_unit_is_committed_once_whatever_a_stale_worker_sends(tmp_path: Path) -> None:
    pending, final = tmp_path / "pending" / "a.arrow", shard_path(tmp_path, 0, 0)
    write_pending(pending, rows_of(2), METADATA)
    commit(pending, final)
    before = final.read_bytes()
    for n in (2, 3):  # the same content again, then another
        write_pending(pending, rows_of(n), METADATA)
        with pytest.raises(ShardExists, match="was committed before"):
            commit(pending, final)
        assert pending.exists()
        assert final.read_bytes() == before


def test_a_damaged_or_missing_pending_file_is_never_committed(tmp_path: Path) -> None:
    pending, final = tmp_path / "a.arrow", shard_path(tmp_path, 0, 0)
    with pytest.raises(ShardError, match="cannot read"):
        commit(pending, final)
    write_pending(pending, rows_of(2), METADATA)
    pending.write_bytes(pending.read_bytes()[:-20])
    with pytest.raises(ShardError, match="damaged"):
        commit(pending, final)
    assert list_shards(tmp_path / "traces" if final.parent.exists() else tmp_path) in ([], [pending])
    assert not final.exists()


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    write_pending(tmp_path / "a.arrow", rows_of(1), METADATA)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ShardError, match="hard links"):
        commit(tmp_path / "a.arrow", tmp_path / "traces" / "b.arrow")
    assert (tmp_path / "a.arrow").exists()


def test_a_kill_between_any_two_steps_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    pending, final = tmp_path / "pending" / "a.arrow", shard_path(tmp_path, 0, 0)
    rows = rows_of(2)
    steps = [(os, "fsync"), (os, "replace"), (shards, "sync_path")]
    for module, step in steps:  # killed while writing: nothing that a reader would take for a shard
        with monkeypatch.context() as patch:
            patch.setattr(module, step, kill)
            with pytest.raises(Killed):
                write_pending(pending, rows, METADATA)
        assert list_shards(tmp_path) == []
    write_pending(pending, rows, METADATA)
    for module, step in [(os, "link"), (shards, "sync_path"), (Path, "unlink")]:  # killed while committing
        with monkeypatch.context() as patch:
            patch.setattr(module, step, kill)
            with pytest.raises(Killed):
                commit(pending, final)
        assert pending.exists()
        assert len(list_shards(tmp_path)) == (step != "link")
    assert not commit(pending, final)
    assert [row for path in list_shards(tmp_path) for row in iter_rows(path)] == rows
    assert not pending.exists()


RACE = """
import sys, time
from pathlib import Path
from selfplay.shards import ShardExists, commit, shard_path
run, me, start = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
(run / f"ready-{me}").touch()
while not start.exists():
    time.sleep(0.001)
for part in range(12):
    try:
        print(part, commit(run / "pending" / f"{part}-{me}.arrow", shard_path(run, 0, part)))
    except ShardExists:
        print(part, "exists")
"""


def test_of_two_processes_that_commit_the_same_unit_exactly_one_wins(tmp_path: Path) -> None:
    for part in range(12):
        for who in "ab":
            write_pending(tmp_path / "pending" / f"{part}-{who}.arrow", rows_of(1, group=who), METADATA)
    go = tmp_path / "go"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), who, str(go)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for who in "ab"
    ]
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready-{who}").exists() for who in "ab"):
            assert time.monotonic() < deadline, "a racer did not start"
            time.sleep(0.01)
        go.touch()
        told = [dict(line.split() for line in racer.communicate(timeout=60)[0].splitlines()) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert len(list_shards(tmp_path)) == 12
    for part, final in enumerate(list_shards(tmp_path)):
        results = [told[0][str(part)], told[1][str(part)]]
        assert sorted(results) == ["True", "exists"]
        (row,) = iter_rows(final)
        assert row["group"] == "ab"[results.index("True")]
