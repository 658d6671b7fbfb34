"""Shards on disk: write a pending file, commit it exactly once, read it back verified.

A shard is an Arrow IPC file with zstd (schema and checksum: `selfplay.schema`). File metadata, all text:
`schema_version`, `run_id`, `config_hash`, `rows`, `batches` (decimal), `file_sha256` and `metadata_sha256`
(`selfplay.seal`), which reveal a flip of any byte. Custom metadata of each record batch: `index` (decimal, from 0) and
`sha256` (`schema.batch_digest`). They reveal a missing batch, a repeated one and one that reads back other than it
was, also in shards of versions that wrote no `file_sha256`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from pyarrow import ipc

from selfplay.columns import pick, project, project_schema, select
from selfplay.disk import sync_path
from selfplay.errors import SettingError
from selfplay.schema import (
    MAX_BATCH_ROWS,
    SCHEMA,
    SCHEMA_VERSION,
    SECONDARY,
    SECONDARY_USAGE,
    batch_digest,
    batch_of,
)
from selfplay.seal import METADATA, is_whole, metadata_digest, sealed
from selfplay.side_rows import KIND, Version, find_side, join, side_key
from selfplay.traces import Trace, from_row
from selfplay.tree_rows import Row
from selfplay.where import Predicate

REQUIRED_METADATA = ("run_id", "config_hash")
SUFFIX = ".arrow"
_NAME = re.compile(r"part-(\d+)\.arrow")
_FOLDER = re.compile(r"iteration=(\d+)")


class ShardError(RuntimeError):
    """A shard that cannot be written, committed or trusted; the message names it and says what to do."""


class NoShards(ShardError, SettingError):
    """A path that leads to no shards: exit code 2, as for any other wrong path."""


class ShardExists(ShardError):
    """The unit was committed before, by another pending file."""


def shard_name(part: int) -> str:
    """File name of a unit's shard within its iteration."""
    return f"part-{part:05d}.arrow"


def shard_path(run: Path, iteration: int, part: int) -> Path:
    """Final place of a unit's shard."""
    return run / "traces" / f"iteration={iteration:05d}" / shard_name(part)


def shard_key(path: Path) -> tuple[int, int]:
    """(iteration, part) by the file's name; -1 for what the name does not tell."""
    folder, name = _FOLDER.search(path.parent.name), _NAME.fullmatch(path.name)
    return int(folder[1]) if folder else -1, int(name[1]) if name else -1


def list_shards(path: Path, first: int | None = None, last: int | None = None) -> list[Path]:
    """Committed shards by (iteration, part, path); iterations `first` to `last` inclusive where given.

    `path` is a run, a folder with shards at any depth, or one shard. Raises ShardError where it does not exist.
    """
    if path.is_file():
        if path.suffix != SUFFIX:
            raise NoShards(f"{path} is no shard (*{SUFFIX}); give a run folder, a folder of shards or one shard")
        return [path]
    if not path.is_dir():
        state = "is neither file nor folder" if path.exists() else "does not exist"
        raise NoShards(f"{path} {state}; give a run folder, a folder of shards or one shard")
    root = path / "traces" if (path / "traces").is_dir() else path
    others = {"pending", KIND}
    found = [(shard_key(p), p) for p in root.rglob(f"*{SUFFIX}") if others.isdisjoint(p.relative_to(root).parts)]
    return [
        p
        for (iteration, _), p in sorted(found)
        if (first is None or iteration >= first) and (last is None or iteration <= last)
    ]


def trace_ages(listing: Mapping[str, float]) -> dict[int, float]:
    """Days since the newest shard of each iteration was written, by this host's clock. `listing`: seconds since 1970 by
    name, as a store lists them."""
    now, newest = time.time(), dict[int, float]()
    for name, written in listing.items():
        iteration, part = shard_key(Path(name))
        if iteration >= 0 and part >= 0:
            newest[iteration] = max(newest.get(iteration, 0.0), written)
    return {iteration: (now - written) / 86400 for iteration, written in newest.items()}


def write_pending(
    path: Path,
    rows: Sequence[Row],
    metadata: Mapping[str, str],
    *,
    columns: pa.Schema = SCHEMA,
    make_folder: bool = True,
) -> None:
    """Write `rows`, which have these `columns`, to `path` such that it exists only once it is whole and synced.

    `metadata` must hold `run_id` and `config_hash`. Within a run, `make_folder` is false: a folder that is gone says
    that another driver took the run over. A file left by an earlier attempt at the same unit is
    replaced. Raises ValueError for rows outside the format, ShardError where the disk refuses; nothing is left
    behind then.
    """
    missing = [name for name in REQUIRED_METADATA if name not in metadata]
    if missing:
        raise ValueError(f"a shard's metadata needs {' and '.join(missing)}")
    starts = range(0, len(rows), MAX_BATCH_ROWS)
    batches = [batch_of(list(rows[start : start + MAX_BATCH_ROWS]), columns) for start in starts]
    custom = [{"index": str(index), "sha256": batch_digest(batch)} for index, batch in enumerate(batches)]
    counts = {"schema_version": SCHEMA_VERSION, "rows": str(len(rows)), "batches": str(len(batches))}
    data = sealed(columns, zip(batches, custom, strict=True), {**metadata, **counts})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise ShardError(f"cannot write shard {path}: {reason}; free space or fix the folder") from error


def commit(pending: Path, final: Path) -> bool:
    """Give a verified pending file its final name, exactly once; the pending name goes away.

    True: this call committed it. False: this very file already had its final name, or the unit is committed and
    the pending file gone (a commit that was killed between its steps, or another process's); only the tidying was
    left then. A hard link is what makes it exactly
    once: it fails if the final name exists. Raises ShardExists where another file was committed for the unit;
    neither is touched then, and the pending one can be deleted. Raises ShardError for a damaged or missing
    pending file, and where the file system has no hard links.
    """
    linked = False
    try:
        for _ in iter_batches(pending):  # what is committed can never be replaced, so look first
            pass
        final.parent.mkdir(parents=True, exist_ok=True)
        os.link(pending, final)
        linked = True
    except FileExistsError as error:
        if pending.exists() and not pending.samefile(final):
            raise ShardExists(f"{final} was committed before; delete the pending file {pending}") from error
    except (OSError, ShardError) as error:
        if pending.exists() or not final.exists():
            if isinstance(error, ShardError):
                raise
            raise ShardError(
                f"cannot commit {pending} as {final}: {error.strerror}; "
                "keep the run folder on one file system that has hard links and space left"
            ) from error
    sync_path(final.parent)
    pending.unlink(missing_ok=True)
    return linked


@contextmanager
def _open(path: Path) -> Iterator[tuple[ipc.RecordBatchFileReader, int, int]]:
    """Reader of a shard with its number of rows and of batches, its file metadata verified."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the reader that uses it
    except OSError as error:
        raise ShardError(f"cannot read shard {path}: {error.strerror}") from error
    with file:
        with _damage(path):
            reader = ipc.open_file(file)
            entries = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
        if "schema_version" not in entries:
            raise ShardError(f"{path} is an Arrow file but no trace shard (no schema_version); give a shard")
        major = entries["schema_version"].split(".")[0]
        if major != SCHEMA_VERSION.split(".")[0]:
            raise ShardError(
                f"{path} has schema {entries['schema_version']}, this version reads {SCHEMA_VERSION}; "
                "read it with the version that wrote it"
            )
        if entries.pop(METADATA, None) != metadata_digest(entries):
            raise _damaged(path, "its metadata does not match its checksum")
        with _damage(path):
            rows, batches = int(entries["rows"]), int(entries["batches"])
        yield reader, rows, batches


def _damaged(path: Path, what: str) -> ShardError:
    side = side_key(path.as_posix())[0] >= 0
    again = "`selfplay reanalyse` makes it again" if side else "`selfplay resume` plays it again"
    return ShardError(f"shard {path} is damaged: {what}; restore it from a copy, or delete it and {again}")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on damaged bytes into a ShardError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise _damaged(path, str(error).split("\n")[0].rstrip(".")) from error


def iter_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Record batches of a shard, in order, each verified; one at a time in memory, beside the file as it lies on disk.

    Raises ShardError on truncation, a flipped bit, a missing batch, or another major version of the schema.
    """
    with _open(path) as (reader, rows, batches):
        with _damage(path):
            whole = is_whole(path.read_bytes(), reader.schema)
        if not whole:
            raise _damaged(path, "its bytes do not match its checksum")
        if reader.num_record_batches != batches:
            raise _damaged(path, f"it has {reader.num_record_batches} of {batches} batches")
        seen = 0
        for index in range(batches):
            with _damage(path):
                batch, custom = reader.get_batch_with_custom_metadata(index)
                batch.validate(full=True)
                entries = {k.decode(): v.decode() for k, v in (custom or {}).items()}
                digest = batch_digest(batch)
            if entries.get("index") != str(index) or entries.get("sha256") != digest:
                raise _damaged(path, f"batch {index} does not match its checksum")
            seen += batch.num_rows
            yield batch
        if seen != rows:
            raise _damaged(path, f"it has {seen} of {rows} rows")


def trace_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """`iter_batches` of a shard that holds traces. Raises ShardError for a side file, which holds none."""
    for batch in iter_batches(path):
        if (batch.schema.metadata or {}).get(b"kind") == KIND.encode():
            raise ShardError(
                f"{path} holds no traces, only what newer weights say of some that lie in traces/ of its run; give the "
                "run: `selfplay inspect` shows both"
            )
        yield batch


def read_shard(path: Path, columns: Iterable[str] | None = None) -> pa.Table:
    """A whole shard as a table, verified; only `columns` where given (see `project`)."""
    with _open(path) as (reader, _, _):
        schema = reader.schema
    batches = [project(batch, columns) for batch in iter_batches(path)]
    return pa.Table.from_batches(batches, schema=None if batches else project_schema(schema, columns))


def read_metadata(path: Path) -> dict[str, str]:
    """File metadata of a shard, verified: `schema_version`, `run_id`, `config_hash`, `rows`, `batches`, ..."""
    with _open(path) as (reader, _, _):
        return {k.decode(): v.decode() for k, v in reader.schema.metadata.items()}


def iter_rows(path: Path, where: Predicate | None = None, columns: Iterable[str] | None = None) -> Iterator[Row]:
    """Rows of one shard, or of all shards below a folder or run, that `where` admits.

    Columns that this version does not know are read like the others and can be ignored. With `columns`, rows hold
    those only (see `project`).
    """
    names = None if columns is None else list(columns)
    for shard in list_shards(path):
        for batch in trace_batches(shard):
            yield from project(select(batch, where), names).to_pylist()


def iter_traces(
    path: Path,
    where: Predicate | None = None,
    columns: Iterable[str] | None = None,
    *,
    reanalysed: Version | None = None,
) -> Iterator[Trace]:
    """`iter_rows` as traces; with `reanalysed`, joined with what that version of the weights, or the latest, says of
    them (`side_rows.join`; `where` judges the rows as played). Under `latest` a shard that no version scored comes as
    it is; one that a version asked for by number did not score is a ShardError."""
    if reanalysed is None:
        return map(from_row, iter_rows(path, where, columns))
    if columns is not None:
        raise ValueError("reanalysed traces are read whole: leave columns out")
    return map(from_row, (row for shard in list_shards(path) for row in _joined(shard, where, reanalysed)))


def _joined(shard: Path, where: Predicate | None, version: Version) -> Iterator[Row]:
    side = find_side(shard, version)
    if side is None and version != "latest":
        raise ShardError(f"{shard} was not scored by checkpoint {version}; run `selfplay reanalyse` with it first")
    found = {row["trace_id"]: row for batch in (iter_batches(side) if side else ()) for row in batch.to_pylist()}
    for row in iter_rows(shard, where):
        try:
            yield join(row, found[row["trace_id"]]) if side else row
        except (KeyError, ValueError) as error:
            raise ShardError(f"{side} does not belong to shard {shard} ({error}); delete it and reanalyse") from error


class ReplayWindow:
    """The shards of the last `size` iterations of a run, in a fixed order: by iteration, then part."""

    def __init__(self, run: Path, size: int) -> None:
        if size < 1:
            raise ValueError(f"a replay window needs at least one iteration, not {size}")
        self.run = run
        self.size = size

    def shards(self, last: int) -> list[Path]:
        """Shards of the iterations `last - size + 1` to `last`."""
        return list_shards(self.run, first=last - self.size + 1, last=last)

    def traces(
        self, last: int, where: Predicate | None = None, columns: Iterable[str] | None = None
    ) -> Iterator[Trace]:
        """Traces of those shards, one batch in memory at a time."""
        names = None if columns is None else list(columns)
        for shard in self.shards(last):
            yield from iter_traces(shard, where, names)


def content(rows: Iterable[Row]) -> list[Row]:
    """`rows` without the columns that may differ between a run and its repetition (DESIGN.md, promise 2)."""
    kept = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in SECONDARY}
        row["usage"] = {name: n for name, n in row["usage"].items() if name not in SECONDARY_USAGE}
        kept.append(row)
    return kept


def content_digest(path: Path) -> str:
    """sha256 over the content of all shards of a run, a folder or one shard, by iteration and part, in hex.

    Equal for two runs exactly if they hold the same rows in the same units; how rows fall into batches, and the
    run's id, do not matter.
    """
    sha = hashlib.sha256()
    for shard in list_shards(path):
        table = read_shard(shard).drop_columns(list(SECONDARY)).combine_chunks()
        sha.update(json.dumps(shard_key(shard)).encode())
        for batch in table.to_batches():
            usage = batch.column("usage")
            fields = [f.name for f in usage.type if f.name not in SECONDARY_USAGE]
            at = batch.schema.get_field_index("usage")
            sha.update(batch_digest(batch.set_column(at, "usage", pick(usage, fields))).encode())
    return sha.hexdigest()
