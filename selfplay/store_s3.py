"""A run in S3-compatible object storage, with a mirror on each node that uses it.

The commit is `PUT` with `If-None-Match: *`: of any number of writers of a unit exactly one succeeds. The epoch stands
in run.json, which a new driver replaces under `If-Match`; small documents are replaced under `If-Match` too, and files
of a checkpoint are put with `If-None-Match`, state.json last. A launch puts a run.json that says `launching` first, and
the one that makes the run exist last, so that launches fence one another as drivers do. Before each write the epoch in
run.json is read. What remains is a writer that is paused between that look and its write, for longer than it takes
another driver to begin: what it then lands is a whole unit or document of its own epoch, which counts once (a unit has
the same content whoever played it, a document is replaced by the new driver's next). docs/STORAGE.md says more.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from selfplay.mirror import STATE, Mirror, told_local
from selfplay.s3 import Bucket, Changed, file_digest
from selfplay.shards import ShardError, iter_batches
from selfplay.store import (
    PENDING,
    Fenced,
    NoRun,
    Place,
    RunError,
    Store,
    checkpoint_numbers,
    created_by_another,
    guard,
    holds_one,
    no_run,
    not_empty,
    unique,
)
from selfplay.store_disk import epoch_folder

RUN = "run.json"
LAUNCHING = "launching"
"""Stands in the run.json that a launch begins with: no run exists yet."""
TRIES = 5
"""Of a write whose object somebody else changed meanwhile."""


class S3Store:
    """See `Store`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._bucket = Bucket(place.url)
        self._mirror = Mirror(self._bucket, place.run_id)
        self.root = self._mirror.root
        self._own = epoch_folder(self.root, place.epoch)
        with told_local(self.root):
            self._own.mkdir(parents=True, exist_ok=True)
        self._etags: dict[str, str | None] = {}
        self._documents = threading.Lock()
        """One document at a time, so that their etags are known."""

    def pull(self, name: str) -> Path:
        if name.startswith("checkpoints/"):  # a node that asks for one at a time would keep those that are gone
            self._mirror.tidy("checkpoints")
        return self._mirror.pull(name)

    def push(self, name: str) -> None:
        self.check()
        for path in sorted((self.root / name).rglob("*")):
            if path.is_file():
                self._bucket.upload(path.relative_to(self.root).as_posix(), path)

    def read(self, name: str) -> str | None:
        return _read(self._bucket, name)

    def listing(self, name: str) -> dict[str, float]:
        return {found.key: found.modified for found in self._bucket.list(f"{name}/")}

    def scratch(self, name: str) -> Path:
        return self._own / unique(name)

    def workshop(self, name: str) -> Path:
        return self._own / unique(name)

    def offer(self, scratch: Path) -> str:
        name = scratch.relative_to(self.root).as_posix()
        with guard(self):
            self.check()
            self._bucket.upload(name, scratch)
        scratch.unlink()
        return name

    def commit(self, pending: str, name: str) -> bool:
        self.check()
        copy = self.scratch(name)
        with guard(self), told_local(self.root):
            try:
                if self._bucket.download(pending, copy) is None:
                    if self._bucket.etag(name) is None:
                        raise ShardError(f"cannot read shard {self.place.url}/{pending}: there is no such object")
                    self.pull(name)
                    return False  # committed before, by a driver that died before it could tidy up
                for _ in iter_batches(copy):  # what is committed can never be replaced, so look first
                    pass
                done = self._commit(copy, pending, name)
                self._bucket.delete([pending])
                return done
            finally:
                copy.unlink(missing_ok=True)

    def _commit(self, copy: Path, pending: str, name: str) -> bool:
        self.check()
        try:
            etag = self._bucket.upload(name, copy, new=True, metadata={"pending": pending})
        except Changed:
            # another file was committed, or this very one and the answer was lost
            self.pull(name)
            return (self._bucket.metadata(name) or {}).get("pending") == pending
        self._mirror.adopt(name, copy, etag)
        return True

    def publish(self, folder: Path, name: str) -> Path:
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.name == STATE, p))
        try:
            with guard(self):
                self.remove(name)  # left by a phase that is being done again
                etags = [self._put_file(path, f"{name}/{path.relative_to(folder).as_posix()}") for path in files]
                for path, etag in zip(files, etags, strict=True):
                    self._mirror.adopt(f"{name}/{path.relative_to(folder).as_posix()}", path, etag)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self.root / name

    def _put_file(self, path: Path, name: str) -> str:
        """Upload one file of a folder, where there is none of that name; its etag."""
        for _ in range(TRIES):
            self.check()
            with suppress(Changed):
                return self._bucket.upload(name, path, new=True)
            there = self._bucket.etag(name)
            if there and (self._bucket.metadata(name) or {}).get("sha256") == file_digest(path):
                return there  # put before, and the answer was lost
            self.check()
            self._bucket.delete([name])
        raise RunError(f"{self.place.url}/{name} is written by somebody else at the same time; stop that process first")

    def put(self, name: str, content: str | bytes, *, sync: bool = True) -> None:
        del sync
        data = content.encode() if isinstance(content, str) else content
        with self._documents, guard(self), told_local(self.root):
            etag = self._replace(name, data)
            copy = self.scratch(name)
            copy.write_bytes(data)
            self._mirror.adopt(name, copy, etag)

    def _replace(self, name: str, data: bytes) -> str:
        for _ in range(TRIES):
            if name not in self._etags:
                self._etags[name] = self._bucket.etag(name)
            self.check()  # after that look: what the next driver puts is another object, and stays
            match = self._etags[name]
            try:
                self._etags[name] = etag = self._bucket.put(name, data, match=match, new=match is None)
                return etag
            except Changed:  # by the next driver, which `check` tells; or by a stale one in its last moment
                del self._etags[name]
        raise RunError(f"{self.place.url}/{name} is written by somebody else at the same time; stop that process first")

    def remove(self, name: str) -> None:
        self.check()
        found = [o.key for o in self._bucket.list(name) if o.key == name or o.key.startswith(f"{name}/")]
        found.sort(key=lambda key: (not key.endswith(f"/{STATE}"), key))  # half removed, a checkpoint does not exist
        self._bucket.delete(found)
        for key in found:
            self._mirror.forget(key)

    def check(self) -> None:
        url, host = self.place.url, socket.gethostname()
        facts = json.loads(_read(self._bucket, RUN) or "{}")
        if facts.get("id") != self.place.run_id:
            raise RunError(f"{host} does not see the run at {url}; check AWS_ENDPOINT_URL and the credentials there")
        if facts["epoch"] != self.place.epoch:
            raise Fenced(
                f"{url} was taken over by another driver (epoch {facts['epoch']}); this one (epoch "
                f"{self.place.epoch}) stops and has changed nothing"
            )
        if facts.get("closed"):
            raise Fenced(
                f"the driver of {url} that began epoch {self.place.epoch} has ended; what works for it stops and has "
                "changed nothing"
            )

    def close(self) -> None:
        with suppress(RunError):  # taken over already, or the storage is out of reach
            self.check()
            facts = json.loads(_read(self._bucket, RUN) or "{}")
            self.put(RUN, json.dumps({**facts, "closed": True}, indent=1))
            self._bucket.delete([o.key for o in self._bucket.list(f"{PENDING}/{self._own.name}/")])
        shutil.rmtree(self._own, ignore_errors=True)


class S3Home:
    """See `Home`. No lock keeps two drivers on one host apart: signs of life do."""

    locked = False

    def __init__(self, url: str, *, create: bool) -> None:
        self.url = url.rstrip("/")
        self._bucket = Bucket(self.url)
        self._etag: str | None = None
        self._killed: dict[str, Any] = {}
        """What a launch left in run.json that has not come to its end."""
        names = [found.key for found in islice(self._bucket.list(""), 6)]
        text = self.read(RUN) if names else None  # after the listing: it says whose names those are
        if _launching(text):
            self._killed = json.loads(text or "{}")
        elif create and text is not None:
            raise holds_one(self.url)
        strange = [name for name in names if not (self._killed and name in (RUN, "config.yaml"))]
        if create and strange:
            raise not_empty(self.url, strange)
        if not create and self._killed:
            raise RunError(
                f"{self.url} holds no run: its launch is under way or was killed; `selfplay launch` it again"
            )
        if not create and text is None:
            raise no_run(self.url)

    def read(self, name: str) -> str | None:
        if name == RUN:
            self._etag = self._bucket.etag(RUN)  # before its content, so that what is replaced is at most older
        return _read(self._bucket, name)

    def listing(self, name: str) -> dict[str, float]:
        return {found.key: found.modified for found in self._bucket.list(f"{name}/")}

    def create(self, facts: dict[str, Any], documents: dict[str, str]) -> Store:
        facts["driver"] = uuid.uuid4().hex  # tells this driver's documents from those of another
        if self._killed:  # the same run's next epoch, so that a launch which only slept is fenced
            facts |= {"id": self._killed["id"], "epoch": self._killed["epoch"] + 1}
        claim = json.dumps({**facts, LAUNCHING: True}, indent=1).encode()
        try:
            etag = self._bucket.put(RUN, claim, match=self._etag, new=self._etag is None)
            store = S3Store(Place(self.url, facts["id"], facts["epoch"]))
            for name, text in documents.items():
                store.put(name, text)
            self._bucket.put(RUN, json.dumps(facts, indent=1).encode(), match=etag)
        except (Changed, Fenced) as error:
            raise created_by_another(self.url) from error
        return store

    def take_over(self, facts: dict[str, Any]) -> Store:
        facts |= {"epoch": facts["epoch"] + 1, "driver": uuid.uuid4().hex}
        facts.pop("closed", None)
        try:
            self._bucket.put(RUN, json.dumps(facts, indent=1).encode(), match=self._etag)
        except Changed as error:
            raise RunError(f"another driver takes {self.url} over right now; leave it to that one") from error
        names = [found.key for found in self._bucket.list(f"{PENDING}/")]
        self._bucket.delete(name for name in names if _is_older(name.split("/")[1], facts["epoch"]))
        store = S3Store(Place(self.url, facts["id"], facts["epoch"]))
        for leftover in (store.root / PENDING).iterdir():
            if _is_older(leftover.name, facts["epoch"]):
                shutil.rmtree(leftover, ignore_errors=True)
        return store

    def release(self) -> None:
        return None


def mirror_of(url: str, prefixes: Sequence[str], *, whole: bool = False) -> Path:
    """See `store.local_copy` and, for `whole`, `store.whole_copy`."""
    url = url.rstrip("/")
    root, inside = url, ""
    while root.count("/") > 2:
        bucket = Bucket(root)
        facts = read_run(bucket)
        if facts is not None:
            break
        root, _, last = root.rpartition("/")
        inside = f"{last}/{inside}".rstrip("/")
    else:
        raise NoRun(f"there is no run at {url}; give the URL that `selfplay launch` named")
    mirror = Mirror(bucket, json.loads(facts)["id"])
    for wanted in (RUN, "config.yaml", *([inside] if inside else prefixes or [""])):
        name = wanted
        if wanted in ("checkpoints", "tokenizer"):
            there = checkpoint_numbers(found.key for found in bucket.list("checkpoints/"))
            if not there:
                continue
            name = f"checkpoints/{there[-1]:05d}"
        left_out = (".safetensors", ".bin", "/optimizer.pt") if wanted == "tokenizer" else ("/optimizer.pt",)
        reading = name.startswith("checkpoints/") and not whole
        mirror.pull(name, _without(left_out) if reading else lambda _: True)
    return mirror.root / inside if inside else mirror.root


def read_run(bucket: Bucket) -> str | None:
    """run.json of the run there; None where there is none, or only the beginning of a launch."""
    text = _read(bucket, RUN)
    return None if _launching(text) else text


def _launching(text: str | None) -> bool:
    try:
        facts = json.loads(text or "{}")
    except ValueError:
        return False  # damaged: whoever reads it says so
    return isinstance(facts, dict) and LAUNCHING in facts


def _is_older(folder: str, epoch: int) -> bool:
    """Whether a pending folder is of an epoch before: a later driver may be at work already."""
    return folder < epoch_folder(Path(), epoch).name


def _without(endings: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: not name.endswith(endings)


def _read(bucket: Bucket, name: str) -> str | None:
    found = bucket.get(name)
    return None if found is None else found[0].decode("utf-8")
