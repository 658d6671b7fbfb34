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
from typing import Final

from selfplay.s3 import Bucket
from selfplay.store import PENDING, RunError

STATE = "state.json"
"""The last file of a checkpoint: it comes last and goes first, so that a checkpoint here is whole or does not exist."""
LOOKS: Final = 5
"""Most times that is looked at what others change at the same time."""


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
        self._incoming = self.root / ".incoming"
        """Files that are being fetched; folders of the run may be taken away while they are."""
        with told_local(self.root):
            for folder in (self._etags, self._incoming):
                folder.mkdir(parents=True, exist_ok=True)

    def pull(self, name: str, only: Callable[[str], bool] = lambda _: True) -> Path:
        """Fetch what changed below `name` (a file or a folder; an empty one means all that is not pending), of those
        names that `only` admits; delete what is gone. What others put meanwhile, and moved here, stays as it is."""
        for _ in range(LOOKS):
            there = self._there(name)
            for known in self._known(name):
                if known not in there:
                    self.forget(known)
            wanted = sorted((k for k in there if only(k)), key=lambda k: (k.endswith(f"/{STATE}"), k))
            if all([self._fetch(key, there[key]) for key in wanted]):  # noqa: C419 - not only up to the first one
                break
        return self.root / name

    def tidy(self, name: str) -> None:
        """Delete what is gone below `name`; fetch nothing."""
        self.pull(name, only=lambda _: False)

    def _there(self, name: str) -> dict[str, str]:
        """The etags of all objects below `name`, as of now."""
        inside = f"{name}/" if name else ""
        return {
            found.key: found.etag
            for found in self._bucket.list(name)
            if (found.key == name or found.key.startswith(inside))
            and found.key.startswith(f"{PENDING}/") == name.startswith(f"{PENDING}/")
        }

    def _known(self, name: str) -> list[str]:
        """Names below `name` that were fetched; those of a checkpoint's last file first."""
        folder = self._etags / name
        files = [folder] if folder.is_file() else list(folder.rglob("*")) if folder.is_dir() else []
        names = [p.relative_to(self._etags).as_posix() for p in files if p.is_file() and p.suffix != ".lock"]
        return sorted(names, key=lambda n: (not n.endswith(f"/{STATE}"), n))

    def _fetch(self, name: str, etag: str) -> bool:
        """Have a copy of the object that was listed with `etag`, or of the one that took its place since. False for
        the last file of a checkpoint that was replaced since: the files before it may be the old one's."""
        if self._current(name, etag):
            return True
        last = name.endswith(f"/{STATE}")
        if not last:
            for folder in PurePosixPath(name).parents:
                self._drop(f"{folder}/{STATE}")
        with self._locked(name):
            if self._current(name, etag):  # another process fetched it while we waited
                return True
            temporary = self._incoming / uuid.uuid4().hex
            with told_local(self.root):
                try:
                    found = self._bucket.download(name, temporary)
                    if found is not None and (found == etag or not last):  # None: it was deleted since it was listed
                        self._place(temporary, name, found)
                finally:
                    temporary.unlink(missing_ok=True)
        return found == etag or not last

    def adopt(self, name: str, source: Path, etag: str) -> None:
        """Move `source`, which this process uploaded as `name`, into its place."""
        with self._locked(name), told_local(self.root):
            self._place(source, name, etag)

    def _place(self, source: Path, name: str, etag: str) -> None:
        """Move a file to its name; the caller holds its lock."""
        target = self.root / name
        for left in reversed(range(LOOKS)):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                break
            except FileNotFoundError:  # another process forgot what was in that folder, and so the folder
                if not left:
                    raise
        self._note(name, etag)

    def forget(self, name: str) -> None:
        """Delete the copy, if there is one, of an object that is gone. Whoever puts an object moves its copy here after
        that, so a caller's listing may be older than the copy: the object itself is asked."""
        if self._noted(name) is None:
            return
        with self._locked(name):
            if self._bucket.etag(name) is None:
                self._unlink(name)

    def _drop(self, name: str) -> None:
        """Delete the copy of an object, if there is one, whether the object is gone or not."""
        if self._noted(name) is not None:
            with self._locked(name):
                self._unlink(name)

    def _unlink(self, name: str) -> None:
        with told_local(self.root):
            (self.root / name).unlink(missing_ok=True)
            (self._etags / name).unlink(missing_ok=True)
            if name.startswith(f"{PENDING}/"):
                return  # an epoch's own folder stays as long as the epoch
            with suppress(OSError):  # others may be left in them
                for folder in PurePosixPath(name).parents[:-1]:
                    (self.root / folder).rmdir()

    def _current(self, name: str, etag: str) -> bool:
        """Whether the copy is of the object that was listed with `etag`, or of the one that took its place since."""
        noted = self._noted(name)
        if noted is None or not (self.root / name).is_file():
            return False
        return noted == etag or noted == self._bucket.etag(name)

    def _noted(self, name: str) -> str | None:
        """The etag of the object that the file here is a copy of; None for a file of this node's own, or none."""
        try:
            return (self._etags / name).read_text()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

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
