"""What of a run is deleted while it goes on: pure functions of listings. `RetentionConfig` says how much is kept.

Resume may begin at any of the newest `staleness + 2` checkpoints: play may be that far ahead of learning, and a damaged
newest checkpoint must leave the one before it. From each of them everything later must come out the same again, so the
traces that its learning phases read are kept too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selfplay.config import RetentionConfig


def resume_points(existing: Sequence[int], staleness: int) -> list[int]:
    """Checkpoints that a run may have to go on from, ascending."""
    return sorted(existing)[-(staleness + 2) :]


def checkpoints_gone(
    existing: Sequence[int], rows: Sequence[Mapping[str, Any]], keep: RetentionConfig, *, staleness: int,
    needed: Collection[int] = (),
) -> list[int]:  # fmt: skip
    """Checkpoints to delete: all but the newest, those to resume from, the first, the best on dev, those without their
    row of metrics.jsonl (`rows`) and those `needed`."""
    numbers = sorted(existing)
    kept = {*needed, *numbers[:1], *numbers[-keep.checkpoints :], *resume_points(numbers, staleness)}
    scored = [row for row in rows if row.get("dev_pass1") is not None]
    if scored:
        kept.add(max(scored, key=lambda row: row["dev_pass1"])["iteration"])
    evaluated = {row["iteration"] for row in rows}
    return [n for n in numbers if n in evaluated and n not in kept]


def traces_gone(
    ages: Mapping[int, float], existing: Sequence[int], keep: RetentionConfig, *, window: int, staleness: int
) -> list[int]:
    """Iterations whose traces to delete. `ages`: days since the newest shard of each, `existing`: checkpoints,
    `window`: iterations that a learning phase reads.

    Never those that are read by a learning phase after one of the checkpoints to resume from."""
    points = resume_points(existing, staleness)
    first_needed = points[0] + 1 - window + 1 if points else 0
    newest = max(ages, default=0)
    return [
        iteration
        for iteration, age in sorted(ages.items())
        if iteration < first_needed
        and (
            (keep.iterations is not None and iteration <= newest - keep.iterations)
            or (keep.days is not None and age > keep.days)
        )
    ]
