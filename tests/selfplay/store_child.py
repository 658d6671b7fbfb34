"""A driver and worker in one process that plays one unit, commits it and publishes a checkpoint, killed at a chosen
moment. `python -m tests.selfplay.store_child URL RUN_ID EPOCH MOMENT`; prints "done" where it was not killed."""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from selfplay.store import Place, Store, is_remote
from tests.selfplay.trace_samples import METADATA, rows_of

FINAL = "traces/iteration=00001/part-00000.arrow"
DISK = ("writing a shard", "before its link", "after its link", "before its name", "document")
S3 = (
    "uploading a shard", "uploaded", "before its PUT", "during its PUT", "after its PUT", "uploading a checkpoint",
    "between its parts", "before its state", "document",
)  # fmt: skip


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A file whose process is killed when half of it was sent, after it was read once for its checksum."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size + size // 2

    def read(self, n: int = -1) -> bytes:
        data = self._file.read(min(n, 1024) if n >= 0 else -1)
        self._left -= len(data)
        if self._left <= 0:
            die()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def arrange_disk(moment: str) -> None:
    link, rename = os.link, os.rename
    if moment in ("writing a shard", "document"):
        os.fsync = die
    elif moment == "before its link":
        os.link = die
    elif moment == "after its link":
        os.link = lambda *names: (link(*names), die())  # type: ignore[assignment]
    elif moment == "before its name":
        os.rename = lambda a, b: die() if str(b).endswith("checkpoints/00001") else rename(a, b)


def arrange_s3(moment: str) -> None:
    from selfplay import s3

    upload, put = s3.Bucket.upload, s3.Bucket.put

    def uploading(self: s3.Bucket, key: str, path: Path, **how: Any) -> str:
        what = "shard" if key.startswith("pending/") else "final" if key == FINAL else path.name
        if (moment, what) in (("before its PUT", "final"), ("before its state", "state.json")):
            die()
        if (moment, what) in (
            ("uploading a shard", "shard"),
            ("during its PUT", "final"),
            ("uploading a checkpoint", "model.safetensors"),
        ):
            s3.open = lambda *a: Dying(builtins.open(*a), path.stat().st_size)  # type: ignore[attr-defined]  # noqa: SIM115
            s3.file_digest = lambda _: "0" * 64
        if (moment, what) == ("between its parts", "model.safetensors"):
            s3.PART_BYTES = 8 << 10
            s3.Bucket._upload_parts = torn_parts  # type: ignore[method-assign]
        etag = upload(self, key, path, **how)
        if (moment, what) in (("uploaded", "shard"), ("after its PUT", "final")):
            die()
        return etag

    s3.Bucket.upload = uploading  # type: ignore[method-assign]
    if moment == "document":
        s3.Bucket.put = lambda *a, **k: die() if a[1] == "metrics.jsonl" else put(*a, **k)  # type: ignore[method-assign]


def torn_parts(self: Any, key: str, path: Path, size: int, fields: Any, condition: Any) -> Any:
    where = self._key(key)
    upload = self._s3.create_multipart_upload(**where, **fields)["UploadId"]
    self._s3.upload_part(**where, UploadId=upload, PartNumber=1, Body=path.read_bytes()[: size // 2])
    return die(condition)


def build_checkpoint(store: Store, text: str) -> Path:
    """What `checkpoint.write` makes, without a model, which takes seconds to import."""
    folder = store.workshop("00001")
    (folder / "policy").mkdir(parents=True)
    content = {"policy/model.safetensors": text.encode() * 4000, "value_head.safetensors": b"head"}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = {name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in content.items()}
    manifest = {"format": 1, "iteration": 1, "state": {"written": text}, "files": files}
    (folder / "state.json").write_text(json.dumps(manifest))
    return folder


def main(url: str, run_id: str, epoch: str, moment: str) -> None:
    store = Place(url, run_id, int(epoch)).open()
    if moment != "never":
        (arrange_s3 if is_remote(url) else arrange_disk)(moment)
    if moment == "document":
        store.put("metrics.jsonl", "2\n")
    scratch = store.scratch("part-00000.arrow")
    from selfplay.shards import write_pending

    write_pending(scratch, rows_of(40), METADATA, make_folder=False)
    store.commit(store.offer(scratch), FINAL)
    store.publish(build_checkpoint(store, "by the child"), "checkpoints/00001")
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
