"""A node's local copy of a run in object storage, in the run's own layout. Safe for several processes of a node.

Beside each file, in `.etags/`, lies the etag of the object that it is a copy of: a file is fetched again when that
changes, and deleted when its object is gone. Files without one are this node's own and are left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from selfplay.s3 import Bucket
from selfplay.store import PENDING, RunError

STATE = "state.json"
"""The last file of a checkpoint: it comes last and goes first, so that a checkpoint here is whole or does not exist."""


def cache_root() -> Path:
    """Where mirrors lie: $SELFPLAY_CACHE, or ~/.cache/selfplay."""
    given = os.environ.get("SELFPLAY_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "selfplay"


class Mirror:
    """`root` mirrors the run `run_id` at `bucket`."""

    def __init__(self, bucket: Bucket, run_id: str) -> None:
        self._bucket = bucket
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", bucket.url.removeprefix("s3://"))[-80:]
        self.root = cache_root() / f"{name}-{run_id[:16]}"
        self._etags = self.root / ".etags"
        with told_local(self.root):
            self._etags.mkdir(parents=True, exist_ok=True)

    def pull(self, name: str, only: Callable[[str], bool] = lambda _: True) -> Path:
        """Fetch what changed below `name` (a file or a folder; an empty one means all that is not pending), of those
        names that `only` admits; delete what is gone."""
        inside = f"{name}/" if name else ""
        there = {
            found.key: found.etag
            for found in self._bucket.list(name)
            if (found.key == name or found.key.startswith(inside))
            and found.key.startswith(f"{PENDING}/") == name.startswith(f"{PENDING}/")
        }
        for known in self._known(name):
            if known not in there:
                self.forget(known)
        for key in sorted((k for k in there if only(k)), key=lambda k: (k.endswith(f"/{STATE}"), k)):
            self._fetch(key, there[key])
        return self.root / name

    def _known(self, name: str) -> list[str]:
        """Names below `name` that were fetched; those of a checkpoint's last file first."""
        folder = self._etags / name
        files = [folder] if folder.is_file() else list(folder.rglob("*")) if folder.is_dir() else []
        names = [p.relative_to(self._etags).as_posix() for p in files if p.is_file() and p.suffix != ".lock"]
        return sorted(names, key=lambda n: (not n.endswith(f"/{STATE}"), n))

    def _fetch(self, name: str, etag: str) -> None:
        if self._current(name, etag):
            return
        if not name.endswith(f"/{STATE}"):
            for folder in PurePosixPath(name).parents:
                self.forget(f"{folder}/{STATE}")
        with self._locked(name):
            if self._current(name, etag):  # another process fetched it while we waited
                return
            target = self.root / name
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:16]}.tmp")
            with told_local(self.root):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    found = self._bucket.download(name, temporary)
                    if found is not None:  # it was deleted since it was listed
                        os.replace(temporary, target)
                        self._note(name, found)
                finally:
                    temporary.unlink(missing_ok=True)

    def adopt(self, name: str, source: Path, etag: str) -> None:
        """Move `source`, which this process uploaded as `name`, into its place."""
        with self._locked(name), told_local(self.root):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            self._note(name, etag)

    def forget(self, name: str) -> None:
        """Delete the copy of an object, if there is one."""
        if not (self._etags / name).exists():
            return
        with self._locked(name), told_local(self.root):
            (self.root / name).unlink(missing_ok=True)
            (self._etags / name).unlink(missing_ok=True)
            with suppress(OSError):  # others may be left in them
                for folder in PurePosixPath(name).parents[:-1]:
                    (self.root / folder).rmdir()

    def _current(self, name: str, etag: str) -> bool:
        try:
            return (self._etags / name).read_text() == etag and (self.root / name).is_file()
        except FileNotFoundError:
            return False

    def _note(self, name: str, etag: str) -> None:
        beside = self._etags / name
        temporary = beside.with_name(f"{beside.name}.{uuid.uuid4().hex[:16]}.lock")
        temporary.write_text(etag)
        os.replace(temporary, beside)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time for one file. The lock's file stays, so that all lock the same one."""
        lock = self._etags / f"{name}.lock"
        with told_local(self.root):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a")  # noqa: SIM115 - closed below
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def told_local(root: Path) -> Iterator[None]:
    """What the operating system refuses about the mirror `root` is raised as a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the mirror {root}: {error.strerror or error}; free space or set SELFPLAY_CACHE to another "
            "folder of this node"
        ) from error
