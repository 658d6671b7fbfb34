"""A flip of any byte of a shard is noticed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import ipc

from selfplay.schema import batch_digest
from selfplay.shards import ShardError, iter_batches, iter_rows, read_shard, write_pending
from selfplay.traces import to_row
from tests.selfplay.trace_samples import METADATA, context, random_search, unsealed


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard.arrow"
    write_pending(path, [to_row(random_search(i, 4), context()) for i in range(8)], METADATA)
    return path


def flips(path: Path, places: range, n: int, seed: int) -> Iterator[int]:
    """Write the file with one bit flipped, `n` times; where it was."""
    raw, rng = path.read_bytes(), random.Random(seed)
    for at in rng.sample(places, n):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        yield at
    path.write_bytes(raw)


def fault(path: Path) -> str:
    """What is said of the file; nothing where it is believed."""
    try:
        for _ in iter_batches(path):
            pass
    except ShardError as error:
        return str(error)
    return ""


def front(path: Path) -> range:
    """The bytes of the schema's message at the front, without its length and padding."""
    length = int.from_bytes(path.read_bytes()[12:16], "little")
    return range(16, 16 + length)


def test_a_flip_of_any_byte_is_noticed(shard: Path) -> None:
    """Also in a padding, in the front that readers of files pass by, and in the frame of a compressed buffer."""
    size = shard.stat().st_size
    for places, n in ((range(size), 200), (front(shard), 40), (range(16), 16), (range(size - 400, size), 60)):
        said = {at: fault(shard) for at in flips(shard, places, n, seed=size)}
        assert [at for at, error in said.items() if str(shard) not in error or "\n" in error] == []
    assert not fault(shard)


def forge(path: Path) -> None:
    """Write it again as an earlier version would have."""
    with ipc.open_file(path) as reader:
        batch, metadata = reader.get_batch(0), unsealed(reader.schema.metadata)
    with ipc.new_file(path, batch.schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch, custom_metadata={"index": "0", "sha256": batch_digest(batch)})


def test_without_the_checksum_over_all_bytes_a_flip_changes_no_value_that_is_read(shard: Path) -> None:
    rows = list(iter_rows(shard))
    forge(shard)
    unseen = 0
    for _ in flips(shard, range(shard.stat().st_size), 60, seed=1):
        if not fault(shard):
            assert list(iter_rows(shard)) == rows
            unseen += 1
    assert unseen < 30


def test_without_the_checksum_over_all_bytes_the_front_must_say_what_the_footer_says(shard: Path) -> None:
    forge(shard)
    raw = shard.read_bytes()
    for name in (b"c0ffee", b"token_ids"):
        assert raw.index(name) in front(shard)
        shard.write_bytes(raw.replace(name, name.upper(), 1))
        with pytest.raises(ShardError, match="damaged"):
            read_shard(shard)


def test_the_checksum_is_the_one_that_is_documented(shard: Path) -> None:
    raw = shard.read_bytes()
    with ipc.open_file(shard) as reader, ipc.open_stream(raw[8:]) as stream:
        entries = reader.schema.metadata
        assert stream.schema.equals(reader.schema, check_metadata=True)
    for name in (b"file_sha256", b"metadata_sha256"):
        assert raw.count(entries[name]) == 2
        raw = raw.replace(entries[name], b"0" * 64)
    assert hashlib.sha256(raw).hexdigest() == entries[b"file_sha256"].decode()
    others = {name.decode(): text.decode() for name, text in entries.items() if name != b"metadata_sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == entries[b"metadata_sha256"].decode()
