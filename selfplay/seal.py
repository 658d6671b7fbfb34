"""A checksum over every byte of an Arrow file, kept in the file itself: in its metadata, as text.

`file_sha256` is the sha256 in hex of the file with zeros (64 digits) for its own text and for that of
`metadata_sha256`, wherever they stand: Arrow writes the metadata twice, into the message at the front that readers of
streams look at, and into the footer that readers of files look at. `metadata_sha256` is the sha256 in hex of the other
entries, `file_sha256` among them, as JSON (an object with sorted keys, no spaces, UTF-8 unescaped).
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Iterable, Mapping

import pyarrow as pa
from pyarrow import ipc

from selfplay.traces import canonical_json

FILE = "file_sha256"
METADATA = "metadata_sha256"
_ZEROS = b"0" * 64


def sealed(
    columns: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, Mapping[str, str]]], entries: Mapping[str, str]
) -> bytes:
    """An Arrow file, zstd, of `batches`, each with its custom metadata, and with `entries` and both checksums as the
    file's."""
    marks = {name: secrets.token_hex(32) for name in (FILE, METADATA)}  # what stands nowhere else in the file
    buffer = io.BytesIO()
    schema = columns.with_metadata({**entries, **marks})
    with ipc.new_file(buffer, schema, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch, custom in batches:
            writer.write_batch(batch, custom_metadata=dict(custom))
    content = buffer.getvalue()
    found = {FILE: _file_digest(content, *marks.values())}
    found[METADATA] = metadata_digest({**entries, **found})
    for name, mark in marks.items():
        content = content.replace(mark.encode(), found[name].encode())
    return content


def is_whole(content: bytes, schema: pa.Schema) -> bool:
    """Whether no byte of a file with the `schema` of its footer, whose metadata was verified, differs from what was
    written. Without `file_sha256` (written by an earlier version) only the schema at the front is compared with the
    footer's; paddings, and what else of Arrow's own description changes no value that is read, can differ there.
    Raises ArrowException where the front cannot be read."""
    entries = schema.metadata
    if FILE.encode() not in entries:
        front = ipc.open_stream(pa.py_buffer(content).slice(8)).schema  # after the magic
        return bool(front.equals(schema, check_metadata=True))
    told = [entries[name.encode()].decode() for name in (FILE, METADATA)]
    return bool(_file_digest(content, *told) == told[0])


def metadata_digest(entries: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(dict(entries)).encode()).hexdigest()


def _file_digest(content: bytes, *texts: str) -> str:
    for text in texts:
        content = content.replace(text.encode(), _ZEROS)
    return hashlib.sha256(content).hexdigest()
