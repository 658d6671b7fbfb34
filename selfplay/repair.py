"""Traces of finished iterations that were lost, found and made again: a damaged shard is deleted by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay import checkpoint as checkpoints
from selfplay.shards import ShardError, list_shards, read_metadata


def incomplete(run: Path, rows: Sequence[Mapping[str, Any]], *, first: int, last: int) -> list[int]:
    """Iterations from `first` to `last` whose shards hold fewer traces than metrics.jsonl (`rows`) says."""
    expected = {row["iteration"]: row["problems"] for row in rows if row.get("problems") is not None}
    return [
        iteration
        for iteration, problems in sorted(expected.items())
        if first <= iteration <= last
        and problems > sum(int(read_metadata(shard)["rows"]) for shard in list_shards(run, iteration, iteration))
    ]


def replayable(folder: Path, iteration: int, base: int, config_hash: str) -> dict[str, Any]:
    """The state of the checkpoint before `iteration`, where its lost units can be played again as they were: with the
    same config, from checkpoints that are still there (`base` is the one that played). Raises ShardError."""
    there = set(checkpoints.existing(folder))
    gone = sorted({iteration - 1, base, iteration} - there)
    where = folder.parent / "traces" / f"iteration={iteration:05d}"
    if gone:
        raise ShardError(
            f"{where} lacks shards, and checkpoint {gone[0]}, which it takes to play them again, is gone: restore them "
            "from a copy, or set learn.window to read fewer iterations"
        )
    if checkpoints.read_state(checkpoints.path_of(folder, iteration)).get("config_hash") != config_hash:
        raise ShardError(
            f"{where} lacks shards, and the config has changed since they were played: restore them from a copy, or "
            "resume with the config of then"
        )
    return checkpoints.read_state(checkpoints.path_of(folder, iteration - 1))
