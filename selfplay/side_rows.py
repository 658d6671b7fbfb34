"""Side files: what newer weights say of committed traces, beside the shards, which are never rewritten.

`RUN/reanalysis/version=00007/iteration=00003/part-00017.arrow` holds one row per row of the shard
`RUN/traces/iteration=00003/part-00017.arrow`, scored with the weights of checkpoint 7. It is an Arrow IPC file as a
shard is (zstd, `schema_version`, a checksum per batch and one over the file, see `selfplay.shards`), committed
once in the same way. File metadata beside a shard's: `kind` = `reanalysis`, `version`, and `weights`, the digest of the
checkpoint's weights.

A null in a node means "as in the shard", and a row whose `nodes` are null could not be scored (`error` says why).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from selfplay.behavior import drawn_plainly
from selfplay.tree_rows import Row

KIND: Final = "reanalysis"
Version = int | Literal["latest"]

SIDE_NODE: Final = pa.struct(
    [
        pa.field("logprobs", pa.list_(pa.float32())),  # nats, temperature 1; null at the prompt
        pa.field("raw_value", pa.float32()),  # where the shard has one and the weights a value head
        pa.field("prior", pa.float32()),
        pa.field("value_sum", pa.float64(), nullable=False),
        pa.field("target", pa.float32()),
    ]
)

SIDE_SCHEMA: Final = pa.schema(
    [
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),  # whose `logprobs`, `prior` and `target` these are
        pa.field("value_version", pa.int32()),  # the same for `raw_value` and `value_sum`; null without a value head
        pa.field("error", pa.string()),
        pa.field("nodes", pa.list_(SIDE_NODE)),
    ]
)
REPLACED: Final = ("logprobs", "raw_value", "prior", "value_sum", "target")
_VERSION = re.compile(r"version=(\d+)")
_NAME = re.compile(rf"(?:.*/)?{KIND}/version=(\d{{5,}})/iteration=(\d{{5,}})/part-(\d{{5,}})\.arrow")


def side_path(shard: Path, version: int) -> Path:
    """Where the side file of a run's shard lies."""
    return _root(shard) / f"version={version:05d}" / shard.parent.name / shard.name


def side_key(name: str) -> tuple[int, int, int]:
    """(version, iteration, part) by a side file's name within its run; -1 throughout where it is none."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else (-1, -1, -1)


def find_side(shard: Path, version: Version) -> Path | None:
    """The side file of a shard by this version, or by the newest version that scored it; None where there is none."""
    if version != "latest":
        path = side_path(shard, version)
        return path if path.exists() else None
    root = _root(shard)
    found = (_VERSION.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    for number in sorted((int(match[1]) for match in found if match), reverse=True):
        path = side_path(shard, number)
        if path.exists():
            return path
    return None


def _root(shard: Path) -> Path:
    return shard.parent.parent.parent / KIND


def join(row: Row, side: Mapping[str, Any]) -> Row:
    """A shard's row with what its side row says instead; `value_version` tells whose values they are, and
    `policy_version` still who played.

    A step drawn at temperature 1 keeps the log-probabilities of its drawing, as `behavior_logprobs`. Raises ValueError
    where the two rows are not of one trace.
    """
    if side["trace_id"] != row["trace_id"]:
        raise ValueError(f"trace {row['trace_id']} has the side row of trace {side['trace_id']}")
    if side["nodes"] is None:
        return row
    if len(side["nodes"]) != len(row["nodes"]):
        raise ValueError(f"trace {row['trace_id']} has {len(row['nodes'])} nodes, its side row {len(side['nodes'])}")
    settings = json.loads(row["settings"])
    nodes = []
    for node, fresh in zip(row["nodes"], side["nodes"], strict=True):
        joined = {**node, **{name: fresh[name] for name in REPLACED if fresh[name] is not None}}
        if joined["behavior_logprobs"] is None and drawn_plainly(settings, node["kind"]):
            joined["behavior_logprobs"] = node["logprobs"]
        nodes.append(joined)
    scored = side["value_version"]
    return {**row, "value_version": row["value_version"] if scored is None else scored, "nodes": nodes}
