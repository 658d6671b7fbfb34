"""Full disks, read-only folders, damaged files: one clear sentence, nothing lost, and resume ends as if nothing had
happened once the cause is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from selfplay import checkpoint
from selfplay.checkpoint import CheckpointError
from selfplay.executor import InlineExecutor
from selfplay.loop import Event, Loop
from selfplay.run_folder import RunError, RunFolder
from selfplay.shards import ShardError, content_digest, list_shards
from tests.selfplay.test_resume import outcome
from tests.selfplay.tiny_run import tiny_config

Watcher = Callable[[Event], None]


def drive(path: Path, watch: Watcher = lambda _: None, overrides: Sequence[str] = ()) -> None:
    """Launch or resume the tiny run in this process."""
    if (path / "run.json").exists():
        run = RunFolder.open(path, overrides)
    else:
        run = RunFolder.create(path, tiny_config(*overrides))
    executor = InlineExecutor(run.config, run.place)
    try:
        Loop(run, executor, watch).go()
    finally:
        executor.close()
        run.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    drive(path)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run to damage."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    return copy


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "iteration"), [(flip, 1), (truncate, 2), (Path.unlink, 1)], ids=["flipped", "truncated", "lost"]
)
def test_a_damaged_shard_is_named_and_its_unit_played_again_once_it_is_deleted(
    damage: Callable[[Path], None], iteration: int, run: Path, finished: Path
) -> None:
    shutil.rmtree(run / "checkpoints" / "00002")
    shard = run / "traces" / f"iteration={iteration:05d}" / "part-00001.arrow"
    damage(shard)
    if shard.exists():
        with pytest.raises(ShardError, match=r"part-00001\.arrow is damaged: .*; restore it from a copy, or delete it"):
            drive(run)
        shard.unlink()
    drive(run)
    assert outcome(run) == outcome(finished)


def test_a_shard_that_a_finished_run_has_lost_is_played_again(run: Path, finished: Path) -> None:
    (run / "traces" / "iteration=00002" / "part-00001.arrow").unlink()
    drive(run)
    assert outcome(run) == outcome(finished)


def test_all_traces_of_an_iteration_may_be_lost(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "00002")
    shutil.rmtree(run / "traces" / "iteration=00001")
    drive(run)
    assert outcome(run) == outcome(finished)


def test_a_lost_shard_that_cannot_be_played_again_is_said_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "00002")
    (run / "traces" / "iteration=00001" / "part-00001.arrow").unlink()
    run_again = RunFolder.open(run, ["learn.items_per_step=8"])
    executor = InlineExecutor(run_again.config, run_again.place)
    with pytest.raises(ShardError, match="iteration=00001 lacks shards, and the config has changed"):
        Loop(run_again, executor, lambda _: None).go()
    run_again.close()
    shutil.rmtree(run / "checkpoints" / "00000")
    with pytest.raises(ShardError, match=r"lacks shards, and checkpoint 0, which it takes .*, is gone"):
        drive(run)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    damage: Callable[[Path], None], run: Path, finished: Path
) -> None:
    damage(run / "checkpoints" / "00002" / "optimizer.pt")
    named = r"00002 (lacks |is damaged: )optimizer\.pt.*; restore the file, or delete the checkpoint's folder"
    with pytest.raises(CheckpointError, match=named) as told:
        drive(run)
    assert "\n" not in str(told.value)
    shutil.rmtree(run / "checkpoints" / "00002")
    drive(run)
    assert outcome(run) == outcome(finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting takes rights that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> None:
    """Leave `free` bytes."""
    stats = os.statvfs(disk)
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - free)


def at(phase: str, act: Callable[[], None]) -> Watcher:
    """Act once, late in a phase of iteration 1."""
    left = [act]

    def watch(event: Event) -> None:
        if event.phase == phase and event.iteration == 1 and event.total and 3 * event.done >= event.total and left:
            left.pop()()

    return watch


@pytest.mark.parametrize("free", [4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 16384))])
def test_a_disk_that_is_full_in_the_middle_of_a_shard(free: int, small_disk: Path, finished: Path) -> None:
    run = small_disk / "run"
    with pytest.raises((ShardError, RunError), match="No space left on device; free space") as told:
        drive(run, at("play", lambda: fill(small_disk, free)))
    assert "\n" not in str(told.value)
    assert content_digest(run)  # what was committed is whole
    before = [p.stat().st_ino for p in list_shards(run)]
    assert before
    (small_disk / "ballast").unlink()
    drive(run)
    assert outcome(run) == outcome(finished)
    assert [p.stat().st_ino for p in list_shards(run)][: len(before)] == before  # and was not played again


@pytest.mark.parametrize("free", [65536, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 16384, 131072))])
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint(free: int, small_disk: Path, finished: Path) -> None:
    run = small_disk / "run"
    with pytest.raises((CheckpointError, RunError), match="free space") as told:
        drive(run, at("learn", lambda: fill(small_disk, free)))
    assert "\n" not in str(told.value)
    assert checkpoint.existing(run / "checkpoints") == [0]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000"]
    (small_disk / "ballast").unlink()
    drive(run)
    assert outcome(run) == outcome(finished)


@pytest.mark.parametrize("phase", ["play", "learn"])
def test_a_folder_that_becomes_read_only(phase: str, small_disk: Path, finished: Path) -> None:
    def make_read_only() -> None:
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)  # a mount without open files
        subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)

    run = small_disk / "run"
    mended = r"Read-only file system; (free space or fix the folder|free space or make the folder writable)"
    with pytest.raises((ShardError, CheckpointError, RunError), match=mended):
        drive(run, at(phase, make_read_only))
    try:
        with pytest.raises(RunError, match=r"cannot write to run folder .*: Read-only file system"):
            drive(run)
        with pytest.raises(RunError, match=r"cannot create run folder .*: Read-only file system"):
            RunFolder.create(small_disk / "other", tiny_config())
    finally:
        subprocess.run(["umount", small_disk], check=True)
    drive(run)
    assert outcome(run) == outcome(finished)
