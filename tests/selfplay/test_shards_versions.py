"""Shards of other versions of the format."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc

from selfplay.columns import pick
from selfplay.doctor.traces import schema_problem
from selfplay.inspect import inspect_path
from selfplay.schema import batch_digest
from selfplay.shards import ShardError, iter_traces, read_shard, write_pending
from selfplay.summary import summarise_shards
from tests.selfplay.trace_samples import METADATA, rows_of, unsealed


def rewrite(
    path: Path, new: Path, *, metadata: dict[str, str] | None = None, extra: bool = False, old: bool = False
) -> None:
    """Copy a shard of one batch with other file metadata, with a column that only a later version knows, or with the
    usage of version 1.0."""
    with ipc.open_file(path) as reader:
        batch = reader.get_batch(0)
        entries = unsealed(reader.schema.metadata, **(metadata or {}))
    if extra:
        batch = batch.append_column("novelty", pa.array([0.5] * batch.num_rows, pa.float32()))
    if old:
        at = batch.schema.get_field_index("usage")
        fields = ["sampled", "discarded", "prompt", "cached", "scored", "calls"]
        batch = batch.set_column(at, "usage", pick(batch.column(at), fields))
    with ipc.new_file(new, batch.schema.with_metadata(entries)) as writer:
        writer.write_batch(batch, custom_metadata={"index": "0", "sha256": batch_digest(batch)})


def test_a_minor_version_with_unknown_columns_is_read(tmp_path: Path) -> None:
    write_pending(tmp_path / "a.arrow", rows_of(3), METADATA)
    rewrite(tmp_path / "a.arrow", tmp_path / "b.arrow", metadata={"schema_version": "1.7"}, extra=True)
    (first, *_) = iter_traces(tmp_path / "b.arrow")
    assert first.to_result().answer == "33"


def test_a_shard_without_uncounted_tokens_is_read_as_having_none(tmp_path: Path) -> None:
    """Schema 1.0 did not know them."""
    write_pending(tmp_path / "a.arrow", rows_of(3), METADATA)
    rewrite(tmp_path / "a.arrow", tmp_path / "b.arrow", metadata={"schema_version": "1.0"}, old=True)
    (first, *_) = iter_traces(tmp_path / "b.arrow")
    assert (first.usage.uncounted_calls, first.usage.uncounted_tokens) == (0, 0)
    summary = summarise_shards([tmp_path / "b.arrow"])
    assert (summary.sampled > 0, summary.uncounted_calls, summary.uncounted_tokens) == (True, 0, 0)
    (row,) = inspect_path(tmp_path / "b.arrow").data["summary"]
    assert (row["uncounted_calls"], row["uncounted_tokens"]) == (0, 0)
    assert schema_problem(read_shard(tmp_path / "b.arrow").schema) == ""


def test_another_major_version_is_refused(tmp_path: Path) -> None:
    write_pending(tmp_path / "a.arrow", rows_of(3), METADATA)
    rewrite(tmp_path / "a.arrow", tmp_path / "b.arrow", metadata={"schema_version": "2.0"})
    with pytest.raises(ShardError, match=r"schema 2\.0, this version reads 1\.1; read it with"):
        read_shard(tmp_path / "b.arrow")
