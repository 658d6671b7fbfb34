"""The shard's schema (DESIGN.md, section 8) and the checksum of a record batch.

The checksum is the sha256 of *canonical bytes*, which follow from the logical content alone, so that a writer
and a reader in any language agree whatever offsets, padding or validity buffers their arrays happen to have.
All integers are little-endian; `u32` and `i64` are 4 and 8 bytes.

    batch     = one `column` per column, in the order of the file
    column    = u32 length of the name, name in UTF-8, `array`
    array     = tag (1 ASCII byte), i64 number of slots, `validity`, body by tag
    validity  = byte 0 where no slot is null, else byte 1 and then one byte per slot (1 valid, 0 null)
    body  b   = booleans, one byte per slot
          i f = signed integers and floats: byte width (1 byte), then the values in IEEE or two's complement
          s   = strings: i64 byte length of each slot, then the UTF-8 bytes of all slots
          l   = lists: i64 length of each slot, then one `array` with the items of all slots
          r   = structs: u32 number of fields, then one `column` per field (a null struct makes its fields null)

A null slot counts as 0, false, the empty string or the empty list. The digest is written in lowercase hex.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION: Final = "1.1"
MAX_BATCH_ROWS: Final = 64

SECONDARY: Final = ("seconds",)
"""Columns that are not content (DESIGN.md, promise 2)."""
SECONDARY_USAGE: Final = ("prompt", "cached", "calls", "uncounted_calls", "uncounted_tokens")
"""Fields of `usage` that are not content."""


def _field(name: str, type_: pa.DataType) -> pa.Field:
    """A field; a name that ends in `?` is nullable, as in DESIGN.md."""
    return pa.field(name.rstrip("?"), type_, nullable=name.endswith("?"))


USAGE: Final = pa.struct(
    [
        _field(name, pa.int64())
        for name in (
            "sampled", "discarded", "prompt", "cached", "scored", "calls", "uncounted_calls?", "uncounted_tokens?",
        )
    ]
)  # fmt: skip

NODE: Final = pa.struct(
    [
        _field("parent", pa.int32()),  # -1 at node 0
        _field("depth", pa.int32()),  # steps from the root
        _field("kind", pa.string()),
        _field("text", pa.string()),
        _field("token_ids", pa.list_(pa.int32())),  # node 0: the prompt as sent
        _field("logprobs?", pa.list_(pa.float32())),  # nats, temperature 1
        _field("behavior_logprobs?", pa.list_(pa.float32())),  # nats, where sampling differed
        _field("stop?", pa.string()),
        _field("draws", pa.int32()),
        _field("prior?", pa.float32()),
        _field("visits", pa.int32()),
        _field("value_sum", pa.float64()),
        _field("raw_value?", pa.float32()),
        _field("reward?", pa.float32()),
        _field("verdict?", pa.string()),
        _field("answer?", pa.string()),
        _field("terminal", pa.bool_()),
        _field("target?", pa.float32()),
        _field("context?", pa.list_(pa.int32())),
    ]
)

SCHEMA: Final = pa.schema(
    [
        _field("trace_id", pa.string()),
        _field("problem_id", pa.string()),
        _field("task", pa.string()),
        _field("split", pa.string()),
        _field("prompt", pa.string()),
        _field("reference?", pa.string()),
        _field("meta", pa.string()),  # JSON
        _field("iteration", pa.int32()),
        _field("attempt", pa.int32()),
        _field("group?", pa.string()),
        _field("parent_trace?", pa.string()),
        _field("policy_version", pa.int32()),
        _field("value_version?", pa.int32()),
        _field("seed", pa.int64()),  # the unsigned 64-bit seed, two's complement
        _field("strategy", pa.string()),
        _field("settings", pa.string()),  # JSON
        _field("ended", pa.string()),
        _field("answer?", pa.string()),
        _field("verdict?", pa.string()),
        _field("reward?", pa.float32()),
        _field("error?", pa.string()),
        _field("solution?", pa.string()),
        _field("path", pa.list_(pa.int32())),
        _field("usage", USAGE),
        _field("seconds", pa.float64()),
        _field("nodes", pa.list_(NODE)),
    ]
)


def batch_of(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    """Rows as `traces.to_row` makes them -> one batch of `schema`.

    Raises ValueError naming the column where a row lacks a column, has an unknown one, holds null where the
    format allows none, or a value of the wrong type.
    """
    names = set(schema.names)
    for row in rows:
        if row.keys() != names:
            odd = sorted(row.keys() ^ names)
            raise ValueError(f"a trace row must have exactly the columns of the format; check {', '.join(odd)}")
    arrays = []
    for field in schema:
        try:
            array = pa.array([row[field.name] for row in rows], type=field.type)
        except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"column {field.name} cannot be written as {field.type}: {error}") from error
        empty = _forbidden_null(field, array)
        if empty:
            raise ValueError(f"column {empty} is null in a trace row, and the format allows no null there")
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _forbidden_null(field: pa.Field, array: pa.Array) -> str | None:
    """Name of the first column at or below `field` that holds a null though it must not."""
    if array.null_count and not field.nullable:
        return str(field.name)
    if pa.types.is_struct(field.type):
        for child, values in zip(field.type, array.flatten(), strict=True):
            if found := _forbidden_null(child, values):
                return f"{field.name}.{found}"
    elif pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
        item = array.flatten()
        return _forbidden_null(pa.field(field.name, item.type, nullable=False), item)
    return None


def batch_digest(batch: pa.RecordBatch) -> str:
    """sha256 of the canonical bytes of `batch` (module docstring), 64 hex digits.

    Raises TypeError for a column type that the canonical bytes do not define.
    """
    sha = hashlib.sha256()
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        _hash_column(sha, name, array)
    return sha.hexdigest()


def _hash_column(sha: Any, name: str, array: pa.Array) -> None:
    encoded = name.encode()
    sha.update(struct.pack("<I", len(encoded)) + encoded)
    _hash_array(sha, array)


def _hash_array(sha: Any, array: pa.Array) -> None:
    kind = array.type
    if pa.types.is_boolean(kind):
        _hash_head(sha, b"b", array)
        sha.update(_numpy(array, False).astype(np.uint8).tobytes())
    elif pa.types.is_signed_integer(kind) or pa.types.is_floating(kind):
        _hash_head(sha, b"f" if pa.types.is_floating(kind) else b"i", array)
        sha.update(bytes([kind.bit_width // 8]))
        values = _numpy(array, 0)
        sha.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _hash_head(sha, b"s", array)
        full = array.fill_null("") if array.null_count else array
        sha.update(_numpy(pc.binary_length(full), 0).astype("<i8").tobytes())
        sha.update(_string_bytes(full))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _hash_head(sha, b"l", array)
        sha.update(_numpy(pc.list_value_length(array), 0).astype("<i8").tobytes())
        _hash_array(sha, array.flatten())
    elif pa.types.is_struct(kind):
        _hash_head(sha, b"r", array)
        sha.update(struct.pack("<I", kind.num_fields))
        for field, values in zip(kind, array.flatten(), strict=True):
            _hash_column(sha, field.name, values)
    else:
        raise TypeError(f"columns of type {kind} have no checksum in schema {SCHEMA_VERSION}")


def _hash_head(sha: Any, tag: bytes, array: pa.Array) -> None:
    sha.update(tag + struct.pack("<q", len(array)))
    if array.null_count:
        sha.update(b"\x01")
        sha.update(_numpy(array.is_valid(), False).astype(np.uint8).tobytes())
    else:
        sha.update(b"\x00")


def _numpy(array: pa.Array, null: bool | int) -> np.ndarray[Any, np.dtype[Any]]:
    """Values [slots] with `null` in the null slots."""
    full = array.fill_null(null) if array.null_count else array
    values: np.ndarray[Any, np.dtype[Any]] = full.to_numpy(zero_copy_only=False)
    return values


def _string_bytes(array: pa.Array) -> Any:
    """UTF-8 bytes of all slots of a string array without nulls, as a buffer."""
    _, offsets, data = array.buffers()
    if data is None or not len(array):
        return b""
    width = np.dtype("<i8" if pa.types.is_large_string(array.type) else "<i4")
    bounds = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1]
    return memoryview(data)[int(bounds[0]) : int(bounds[-1])]
