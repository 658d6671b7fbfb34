"""A run on a local or shared disk.

The fence: what is written has its source in RUN/pending/epoch-NNNNN/, and gets its final name by a hard link or a
rename. Only the driver that takes a run over makes that folder, exclusively, and it renames the folders of the epochs
before it away. A stale writer's link or rename then finds no source and fails, however long it slept before it. No
clock is compared and nothing has to be checked beforehand, so there is no moment between a check and a write.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from selfplay.disk import sync_path
from selfplay.shards import ShardExists
from selfplay.shards import commit as commit_shard
from selfplay.store import (
    PENDING,
    Fenced,
    Place,
    RunError,
    Store,
    created_by_another,
    guard,
    holds_one,
    no_run,
    not_empty,
    unique,
)

_OWNED = re.compile(r"(epoch|building)-(\d{5,})")

ROOMS = ("checkpoints", "traces", PENDING, "tensorboard")
"""Folders of a new run."""


def epoch_folder(root: Path, epoch: int) -> Path:
    return root / PENDING / f"epoch-{epoch:05d}"


def workshop_folder(root: Path, epoch: int) -> Path:
    """Where folders are built. Not inside the epoch's own: libraries that make missing parents would bring that back
    after it was taken away."""
    return root / PENDING / f"building-{epoch:05d}"


def epochs(root: Path) -> list[int]:
    """Epochs that have a folder, ascending: one, but for a moment while a run is taken over."""
    matches = (_OWNED.fullmatch(path.name) for path in (root / PENDING).iterdir())
    return sorted(int(match[2]) for match in matches if match and match[1] == "epoch")


class DiskStore:
    """See `Store`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.root = Path(place.url)
        self._own = epoch_folder(self.root, place.epoch)

    def pull(self, name: str) -> Path:
        return self.root / name

    def push(self, name: str) -> None:
        del name

    def read(self, name: str) -> str | None:
        return _read(self.root, name)

    def listing(self, name: str) -> dict[str, float]:
        return _listing(self.root, name)

    def scratch(self, name: str) -> Path:
        return self._own / unique(name)

    def workshop(self, name: str) -> Path:
        folder = workshop_folder(self.root, self.place.epoch)
        with guard(self), _told(folder):
            folder.mkdir(exist_ok=True)
        return folder / unique(name)

    def offer(self, scratch: Path) -> str:
        return scratch.relative_to(self.root).as_posix()

    def commit(self, pending: str, name: str) -> bool:
        source = self.root / pending
        with guard(self):
            try:
                done = commit_shard(source, self.root / name)
            except ShardExists:
                source.unlink(missing_ok=True)
                return False
            if not done:
                self.check()  # its pending file may have gone away with its epoch
            return done

    def publish(self, folder: Path, name: str) -> Path:
        final = self.root / name
        staged, old = self.scratch(name), self.scratch(name)
        try:
            with guard(self), _told(final):
                os.rename(folder, staged)  # from here on only this epoch can go on with it
                final.parent.mkdir(exist_ok=True)
                if final.exists():  # left by a phase that is being done again
                    os.rename(final, old)
                os.rename(staged, final)
                sync_path(final.parent)
        except BaseException:
            for leftover in (folder, staged):
                shutil.rmtree(leftover, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return final

    def put(self, name: str, content: str | bytes, *, sync: bool = True) -> None:
        target, source = self.root / name, self.scratch(name)
        data = content.encode() if isinstance(content, str) else content
        with guard(self), _told(target):
            try:
                with open(source, "xb") as file:
                    file.write(data)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
                os.replace(source, target)
                if sync:
                    sync_path(target.parent)
            except BaseException:
                with suppress(OSError):
                    source.unlink(missing_ok=True)
                raise

    def remove(self, name: str) -> None:
        gone = self.scratch(name)
        with guard(self), _told(self.root / name):
            try:
                os.rename(self.root / name, gone)
            except FileNotFoundError:
                self.check()
                return
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
            if not name.startswith(f"{PENDING}/"):
                with suppress(OSError):  # something is left in it
                    for folder in PurePosixPath(name).parents[:-2]:
                        (self.root / folder).rmdir()

    def check(self) -> None:
        run, host = self.root, socket.gethostname()
        facts = json.loads(_read(run, "run.json") or "{}")
        if self._own.is_dir() and facts.get("id", self.place.run_id) == self.place.run_id:
            return
        if facts.get("id") != self.place.run_id:
            raise RunError(f"{host} does not see the run folder {run}; mount it there, at the same path")
        newest = max(facts["epoch"], 0, *epochs(run))
        if newest > self.place.epoch:
            raise Fenced(
                f"{run} was taken over by another driver (epoch {newest}); this one (epoch {self.place.epoch}) stops "
                "and has changed nothing"
            )
        raise Fenced(
            f"the driver of {run} that began epoch {self.place.epoch} has ended; what works for it stops and has "
            "changed nothing"
        )

    def close(self) -> None:
        gone = self.root / PENDING / unique(".gone")
        with suppress(OSError):  # taken over already: what is pending is the next driver's
            os.rename(self._own, gone)
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(workshop_folder(self.root, self.place.epoch), ignore_errors=True)


class DiskHome:
    """See `Home`. A lock held by the operating system keeps two drivers apart on one host; it dies with its process,
    so a killed run needs no cleaning up."""

    locked = True

    def __init__(self, path: Path, *, create: bool) -> None:
        self.root = path.absolute()
        self.url = str(self.root)
        if create:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                strange = _strange(self.root)
            except OSError as error:
                raise RunError(
                    f"cannot create run folder {self.root}: {error.strerror}; choose another --run-dir"
                ) from error
            if strange and not (self.root / "run.json").exists():
                raise not_empty(self.url, strange)
        elif not (self.root / "run.json").exists():
            raise no_run(self.root)
        self._lock = _hold(self.root)

    def read(self, name: str) -> str | None:
        return _read(self.root, name)

    def listing(self, name: str) -> dict[str, float]:
        return _listing(self.root, name)

    def create(self, facts: dict[str, Any], documents: dict[str, str]) -> Store:
        root = self.root
        if (root / "run.json").exists():
            raise holds_one(self.url)
        with _told(root):
            for name in ROOMS:
                (root / name).mkdir(exist_ok=True)
            # of two launches at once on two hosts, and of one that was killed here, the later number fences the earlier
            facts["epoch"] = epoch = max(facts["epoch"] - 1, 0, *epochs(root)) + 1
            found = _claim(root, epoch)
            late = not found or max(found) > epoch or (root / "run.json").exists()
            if not late:
                _retire(root, found, epoch)
                late = (root / "run.json").exists()  # none of those before can write it from here on
            if late:
                _step_back(root, epoch, found)
                raise created_by_another(self.url)
            _clean_pending(root, epoch)
        store = DiskStore(Place(self.url, facts["id"], epoch))
        try:
            for name, text in {**documents, "run.json": json.dumps(facts, indent=1)}.items():
                store.put(name, text)
        except RunError as error:
            if epoch_folder(root, epoch).exists():
                raise
            raise created_by_another(self.url) from error
        return store

    def take_over(self, facts: dict[str, Any]) -> Store:
        root = self.root
        with _told(root):
            (root / PENDING).mkdir(exist_ok=True)
            epoch = max(facts["epoch"], *epochs(root), 0) + 1
            # of two that got here at the same time the later one sees the earlier one's folder, or is seen by it
            found = _claim(root, epoch)
            _retire(root, found, epoch)
            # and one that came and went in between has left its number in run.json
            written = json.loads(_read(root, "run.json") or "{}").get("epoch", 0)
            if not found or max(written, *found) > epoch or written == epoch:
                _step_back(root, epoch, found)
                raise RunError(f"another driver takes {root} over right now; leave it to that one")
        _clean_pending(root, epoch)
        facts["epoch"] = epoch
        store = DiskStore(Place(self.url, facts["id"], epoch))
        store.put("run.json", json.dumps(facts, indent=1))
        return store

    def release(self) -> None:
        self._lock.close()


def _claim(root: Path, epoch: int) -> list[int]:
    """Make the folder of an epoch; all epochs that have one then, none where somebody else made this one."""
    try:
        epoch_folder(root, epoch).mkdir()
    except FileExistsError:
        return []
    return epochs(root)


def _retire(root: Path, found: list[int], epoch: int) -> None:
    """Take the folders of the epochs before away, and with them what their drivers could still write."""
    for old in (number for number in found if number < epoch):
        with suppress(FileNotFoundError):
            os.rename(epoch_folder(root, old), root / PENDING / unique(".gone"))


def _step_back(root: Path, epoch: int, found: list[int]) -> None:
    """Give an epoch up whose folder was made (then something was `found`)."""
    if found:
        with suppress(FileNotFoundError):
            epoch_folder(root, epoch).rmdir()


def _strange(root: Path) -> list[str]:
    """Names of what is in a folder beside what a launch leaves that was killed before run.json made the run exist: the
    lock, the rooms, empty, its epoch's folder, and the config that it wrote from there."""
    pending = root / PENDING
    held = [entry.name for entry in pending.iterdir()] if pending.is_dir() else []
    begun = {"lock", PENDING, *(["config.yaml"] if any(map(_OWNED.fullmatch, held)) else [])}
    begun |= {name for name in ROOMS if (root / name).is_dir() and not any((root / name).iterdir())}
    strange = [f"{PENDING}/{name}" for name in held if not (_OWNED.fullmatch(name) or name.startswith(".gone."))]
    return sorted([*(entry.name for entry in root.iterdir() if entry.name not in begun), *strange])


def _clean_pending(root: Path, epoch: int) -> None:
    """Delete what the epochs before `epoch` left unfinished or uncommitted: it is done again. A stale writer may be at
    work in it still, so what cannot be deleted now is left to the next driver."""
    for leftover in (root / PENDING).iterdir():
        owned = _OWNED.fullmatch(leftover.name)
        if owned and int(owned[2]) >= epoch:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _listing(root: Path, name: str) -> dict[str, float]:
    found = {}
    for path in (root / name).rglob("*"):
        with suppress(FileNotFoundError):  # deleted while we looked
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path.stat().st_mtime
    return found


def _read(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {root / name}: {error}; restore it from a copy") from error


def _hold(root: Path) -> IO[str]:
    try:
        lock = open(root / "lock", "a", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise RunError(f"cannot write to run folder {root}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunError(f"{root} is in use by another process; stop that one first") from error
    except OSError as error:
        lock.close()
        raise RunError(f"cannot lock {root / 'lock'}: {error.strerror}; mount the folder with locks") from error
    return lock


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the operating system refuses is raised as a RunError about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"cannot write {path}: {reason}; free space or make the folder writable, then `selfplay resume`"
        ) from error
