"""How newer weights value stored trees: the figures of `trace_stats`, with the values of the newest side file of each
shard in the place of those that the search saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from selfplay.columns import project
from selfplay.shards import ShardError, iter_batches
from selfplay.side_rows import find_side
from selfplay.trace_stats import COLUMNS, TraceStats

READ: Final = ("trace_id", "value_version", "nodes.raw_value")
"""What is read of a side file."""

Values = Mapping[str, list[float | None] | None]
"""Per trace the value of each node, null where the shard's counts; None where the weights valued nothing."""


class NewerValues:
    """Figures per iteration, fed shard by shard and batch by batch."""

    def __init__(self) -> None:
        self._stats = TraceStats()
        self._versions: dict[int, set[int]] = {}
        self._side: Path | None = None
        self._values: Values = {}
        self._version = -1

    def begin(self, shard: Path) -> None:
        """Batches of `shard` follow. Raises ShardError for a damaged side file."""
        self._side = find_side(shard.absolute(), "latest")
        rows = [
            row
            for batch in (iter_batches(self._side) if self._side else ())
            for row in project(batch, READ).to_pylist()
        ]
        self._values = {
            row["trace_id"]: None
            if row["nodes"] is None or row["value_version"] is None
            else [node["raw_value"] for node in row["nodes"]]
            for row in rows
        }
        self._version = max((row["value_version"] for row in rows if row["value_version"] is not None), default=-1)

    def add(self, batch: pa.RecordBatch) -> None:
        """Count rows of the shard. Raises ShardError where the side file is another shard's."""
        if self._side is None:
            return
        try:
            valued = revalue(batch, self._values)
        except (KeyError, ValueError) as error:
            raise ShardError(f"{self._side} does not belong to its shard ({error}); delete it and reanalyse") from error
        if valued.num_rows:
            self._stats.add(project(valued, COLUMNS))
            for iteration in set(valued.column("iteration").to_pylist()):
                self._versions.setdefault(iteration, set()).add(self._version)

    def rows(self) -> dict[int, dict[str, Any]]:
        """Per iteration with values: `versions` of the weights, `searches` that they valued, and `value`, as in
        `trace_stats.value_figures`."""
        found = {row["iteration"]: row for row in self._stats.rows()}
        return {
            iteration: {"versions": sorted(versions), "searches": found[iteration]["searches"],
                        "value": found[iteration]["value"]}
            for iteration, versions in sorted(self._versions.items())
        }  # fmt: skip


def revalue(batch: pa.RecordBatch, values: Values) -> pa.RecordBatch:
    """The rows of `batch` that were valued again, with those values. Raises KeyError for a trace that `values` lacks,
    ValueError where a tree has another number of nodes."""
    ids = batch.column("trace_id").to_pylist()
    valued = [row for row, trace in enumerate(ids) if values[trace] is not None]
    kept = batch.take(pa.array(valued, pa.int64()))
    lists = kept.column("nodes")
    fresh = pa.array([values[ids[row]] for row in valued], pa.list_(pa.float32()))
    if not lists.value_lengths().equals(fresh.value_lengths()):
        raise ValueError("a tree has another number of nodes there")
    nodes = lists.flatten()
    names = [field.name for field in nodes.type]
    columns = [nodes.field(name) for name in names]
    at = names.index("raw_value")
    columns[at] = pc.coalesce(fresh.flatten(), columns[at])
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lists.value_lengths())])
    rebuilt = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, names=names))
    return kept.set_column(kept.schema.get_field_index("nodes"), "nodes", rebuilt)
