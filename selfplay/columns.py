"""Parts of record batches: some of their columns, some of their rows."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from selfplay.where import Predicate


def project(batch: pa.RecordBatch, columns: Iterable[str] | None) -> pa.RecordBatch:
    """`batch` with only `columns`; `usage.sampled` or `nodes.depth` keeps a single field of a struct.

    Raises KeyError for a column that the batch does not have.
    """
    if columns is None:
        return batch
    wanted = _wanted(batch.schema, columns)
    arrays = [pick(batch.column(name), fields) for name, fields in wanted.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(wanted))


def project_schema(schema: pa.Schema, columns: Iterable[str] | None) -> pa.Schema:
    """The schema of `project`."""
    empty = pa.RecordBatch.from_pylist([], schema=schema)
    return project(empty, columns).schema


def usage_total(usage: pa.StructArray, field: str) -> int:
    """Sum of a field of the column `usage`; 0 where the shard is older than the field."""
    if usage.type.get_field_index(field) < 0:
        return 0
    return int(pc.sum(usage.field(field)).as_py() or 0)


def _wanted(schema: pa.Schema, columns: Iterable[str]) -> dict[str, list[str] | None]:
    """Per top-level column, in the order of the file, the fields wanted (None: all)."""
    fields: dict[str, list[str] | None] = {}
    for column in columns:
        name, _, field = column.partition(".")
        if schema.get_field_index(name) < 0:
            raise KeyError(f"no column {column} in the shard; it has {', '.join(schema.names)}")
        known = fields.setdefault(name, [])
        if known is not None:
            fields[name] = None if not field else known if field in known else [*known, field]
    return {name: fields[name] for name in schema.names if name in fields}


def pick(array: pa.Array, fields: list[str] | None) -> pa.Array:
    """Only `fields` of a struct array or of a list of structs; a null list stays null."""
    if fields is None:
        return array
    is_list = pa.types.is_list(array.type)
    items = array.flatten() if is_list else array
    if not pa.types.is_struct(items.type):
        raise KeyError(f"{array.type} has no fields; name the column alone")
    try:
        picked = [items.field(name) for name in fields]
    except KeyError as error:
        raise KeyError(f"no field {error.args[0]} in {items.type}") from error
    struct = pa.StructArray.from_arrays(picked, names=fields)
    if not is_list:
        return struct
    lengths = array.value_lengths().to_pylist()
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + (length or 0))
    mask = array.is_null() if array.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct, mask=mask)


def select(batch: pa.RecordBatch, where: Predicate | None) -> pa.RecordBatch:
    """The rows of `batch` that `where` admits; only the columns that it reads are made into Python values."""
    if where is None:
        return batch
    rows = project(batch, where.columns or ["trace_id"]).to_pylist()
    return batch.take(pa.array([i for i, row in enumerate(rows) if where(row)], pa.int64()))
