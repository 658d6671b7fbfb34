"""Where a run is kept, seen from any process on any node: one folder layout, on a disk or in object storage.

A `Place` is a small picklable value; `Place.open` gives a `Store`, through which every write of a driver or of a worker
goes. Writes are fenced by the epoch, the number of drivers that have held the run: once another driver took it over, a
write of the one before, or of its workers, raises `Fenced` and has changed nothing. docs/STORAGE.md says how.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from selfplay.errors import SettingError

PENDING = "pending"
PROOF = "proof.txt"


class RunError(RuntimeError):
    """A run that cannot be read or written; the message is one sentence that says what to do."""


class NoRun(RunError, SettingError):
    """There is no run where a user said that one is: exit code 2, as for any other wrong path."""


class Fenced(RunError):
    """This process's epoch is over: another driver holds the run, or its own has ended. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Names a run and the driver that holds it."""

    url: str
    """Absolute path of a folder, or s3://bucket/prefix."""
    run_id: str
    epoch: int
    """The writer's; from 1."""

    def open(self) -> Store:
        """A store on this node."""
        if is_remote(self.url):
            from selfplay.store_s3 import S3Store

            return S3Store(self)
        from selfplay.store_disk import DiskStore

        return DiskStore(self)


class Store(Protocol):
    """One run, from one node, for one epoch. Names are relative to the run, with slashes. Safe for several threads."""

    place: Place
    root: Path
    """A folder on this node in the layout of the run: the run folder itself, or a mirror of it."""

    def pull(self, name: str) -> Path:
        """Bring `root` up to date below `name` (a folder or a file); its path, whether it exists or not. Nothing to do
        on a disk. Raises RunError."""
        ...

    def push(self, name: str) -> None:
        """Bring what was written below `root / name` by others than this store (TensorBoard's event files, whose names
        are unique) to the run. Nothing to do on a disk. Raises RunError."""
        ...

    def read(self, name: str) -> str | None:
        """A small document as it is now; None where there is none. Raises RunError."""
        ...

    def listing(self, name: str) -> dict[str, float]:
        """Names of all files of the run below the folder `name`, with the time each was written (seconds since 1970, by
        the storage's clock). Raises RunError."""
        ...

    def scratch(self, name: str) -> Path:
        """Path for a new file of this process's own, called like `name`, that `offer` takes. Its folder exists as long
        as the epoch lasts: never create it."""
        ...

    def workshop(self, name: str) -> Path:
        """Path for a new folder of this process's own, called like `name`, that `publish` takes."""
        ...

    def offer(self, scratch: Path) -> str:
        """Hand a finished scratch file over to the driver; its name, for `commit`. Raises RunError."""
        ...

    def commit(self, pending: str, name: str) -> bool:
        """Give an offered shard its final name, exactly once, after verifying it. True: this call did. False: the unit
        was committed before, by this or by another file. The pending file goes away. For the driver alone. Raises
        ShardError for a damaged or missing one, RunError where it cannot be written."""
        ...

    def publish(self, folder: Path, name: str) -> Path:
        """Give a finished, synced folder its final name, whole or not at all; one that has the name is replaced. Its
        path below `root`. Raises RunError; `folder` is gone then."""
        ...

    def put(self, name: str, content: str | bytes, *, sync: bool = True) -> None:
        """Replace a small document as a whole: a reader sees the old or the new one. Without `sync` it may not survive
        a power cut. Raises RunError."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file or folder, and folders above it that are left empty, but for the run's own; gone at once for
        readers. Nothing to do where there is none. Raises RunError."""
        ...

    def check(self) -> None:
        """Raise Fenced where this epoch is over, RunError where the run cannot be seen."""
        ...

    def close(self) -> None:
        """The driver's last act: its epoch is over, and what was pending is deleted."""
        ...


@contextmanager
def guard(store: Store) -> Iterator[None]:
    """What fails inside because the run was taken over meanwhile is raised as Fenced."""
    try:
        yield
    except Fenced:
        raise
    except Exception:
        store.check()
        raise


def is_remote(url: str) -> bool:
    """Whether `url` is in object storage; anything else is a path."""
    return url.startswith("s3://")


def holds_run(url: str) -> bool:
    """Whether there is a run that can be resumed. Raises RunError where that cannot be found out."""
    if not is_remote(url):
        return (Path(url) / "run.json").exists()
    from selfplay.s3 import Bucket
    from selfplay.store_s3 import read_run

    return read_run(Bucket(url)) is not None


def local_copy(url: str | Path, *prefixes: str) -> Path:
    """A folder or file for reading: `url` itself on a disk; of object storage (a run, or anything inside one) its
    mirror on this node, up to date below those `prefixes` of the run, or below all of `url` without. `checkpoints`
    means the newest one without its optimiser state, `tokenizer` without its weights too. Raises RunError."""
    if not is_remote(str(url)):
        return Path(url)
    from selfplay.store_s3 import mirror_of

    return mirror_of(str(url), prefixes)


def whole_copy(url: str | Path) -> Path:
    """Like `local_copy`, with everything that a run keeps: all checkpoints, and their optimiser states."""
    if not is_remote(str(url)):
        return Path(url)
    from selfplay.store_s3 import mirror_of

    return mirror_of(str(url), (), whole=True)


def checkpoint_numbers(names: Iterable[str]) -> list[int]:
    """Checkpoints that exist (have a state.json) among names of a run, ascending."""
    states = (name.split("/") for name in names if name.endswith("/state.json"))
    return sorted(int(parts[1]) for parts in states if len(parts) == 3 and parts[1].isdecimal())


def unique(name: str) -> str:
    """The last part of `name` with a random middle: `part-00001.arrow` -> `part-00001.1f0c....arrow`."""
    path = PurePosixPath(name)
    return f"{path.stem}.{uuid.uuid4().hex[:16]}{path.suffix}"


class Home(Protocol):
    """A run's place before a driver holds it: where `launch` and `resume` begin. Opening one takes the lock that keeps
    drivers on one host apart, where there is one."""

    url: str
    locked: bool
    """Whether a lock keeps drivers on one host apart."""

    def read(self, name: str) -> str | None:
        """A small document as it is now; None where there is none. Raises RunError."""
        ...

    def listing(self, name: str) -> dict[str, float]:
        """As `Store.listing`."""
        ...

    def create(self, facts: dict[str, Any], documents: dict[str, str]) -> Store:
        """A new run with the facts of its run.json, which makes it exist and is written last. Where a launch was killed
        before that, its next epoch begins; `facts["epoch"]` is set to it. Raises RunError where there is a run, or
        where it cannot be written."""
        ...

    def take_over(self, facts: dict[str, Any]) -> Store:
        """The next epoch begins: all writers of the ones before are fenced from here on. `facts["epoch"]` is set to
        it and run.json replaced. Raises RunError where another driver does the same right now."""
        ...

    def release(self) -> None:
        """Let go of the lock."""
        ...


def open_home(url: str, *, create: bool) -> Home:
    """The home at a folder or URL; with `create` it may be new, or what a launch left that was killed. Raises RunError:
    no run there, or with `create` something else than that; in use; not writable."""
    if is_remote(url):
        from selfplay.store_s3 import S3Home

        return S3Home(url, create=create)
    from selfplay.store_disk import DiskHome

    return DiskHome(Path(url), create=create)


def no_run(url: str | Path) -> NoRun:
    """Said of a path or URL that was given for a run."""
    given = "URL" if is_remote(str(url)) else "folder"
    return NoRun(f"{url} holds no run (no run.json); give the {given} that `selfplay launch` named")


def not_empty(url: str, names: Sequence[str]) -> RunError:
    """Said of a place for a new run that holds something else; `names`: some of it."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return RunError(
        f"{url} is not empty and holds no run, but {some}; choose another --run-dir, or delete what you do not need"
    )


def holds_one(url: str) -> RunError:
    """Said of a place for a new run that holds one."""
    return RunError(f"{url} already holds a run; continue it with `selfplay resume {url}` or choose another --run-dir")


def created_by_another(url: str) -> RunError:
    """Said to the one of two launches that gives way."""
    return RunError(f"another launch creates {url} right now; leave it to that one, or choose another --run-dir")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node read, and the name of the file that it wrote."""

    token: str | None
    name: str


def ask(store: Store) -> str:
    """The driver's question to every node, before work begins: do you see this run? A random token; each node answers
    with `answer`, and `check_answer` judges."""
    token = uuid.uuid4().hex
    store.put(PROOF, token)
    return token


def answer(store: Store, node: str) -> Answer:
    """A node's side: read the driver's token and write a file of its own. Raises RunError where it cannot."""
    scratch = store.scratch(f"{node}-{PROOF}".replace("/", "-"))
    with guard(store):
        try:
            scratch.write_text(node, encoding="utf-8")
        except OSError as error:
            reason = f"{error.strerror}; mount it there, writable"
            raise RunError(f"node {node} cannot write to {store.place.url}: {reason}") from error
    return Answer(store.read(PROOF), store.offer(scratch))


def check_answer(store: Store, token: str, node: str, given: Answer) -> None:
    """Raise RunError unless the node read what this driver wrote, and this driver reads what the node wrote."""
    if given.token == token and store.read(given.name) == node:
        return
    raise RunError(
        f"node {node} does not see the run folder {store.place.url} that the driver sees; put the run on storage that "
        "all nodes share (mounted at the same path, or s3://...)"
    )


def on_this_node(store: Store, path: Path) -> Path:
    """`path` of a run as the driver names it, relative to the run, brought here; an absolute one is left as it is."""
    return path if path.is_absolute() else store.pull(path.as_posix())
