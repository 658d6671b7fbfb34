"""What of a run is deleted while it goes on: functions of listings, and the one that deletes traces. `RetentionConfig`
says how much is kept.

Resume may begin at any of the newest `staleness + 2` checkpoints: play may be that far ahead of learning, and a damaged
newest checkpoint must leave the one before it. From each of them everything later must come out the same again, so the
traces that its learning phases read are kept too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from selfplay.config import RetentionConfig
from selfplay.shards import trace_ages
from selfplay.side_rows import KIND, side_key
from selfplay.store import Store


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
    newest, first_needed = max(ages, default=0), _first_needed(existing, window, staleness)
    return [
        iteration
        for iteration, age in sorted(ages.items())
        if iteration < first_needed
        and (
            (keep.iterations is not None and iteration <= newest - keep.iterations)
            or (keep.days is not None and age > keep.days)
        )
    ]


def sides_gone(
    sides: Iterable[str], left: Collection[int], existing: Sequence[int], *, window: int, staleness: int
) -> list[str]:
    """Folders of side files to delete, of those with the names `sides`: of iterations whose traces were deleted, now or
    before a crash. `left`: iterations that have traces."""
    found = {(str(PurePosixPath(name).parent), side_key(name)[1]) for name in sides}
    first_needed = _first_needed(existing, window, staleness)
    return sorted(folder for folder, at in found if 0 <= at < first_needed and at not in left)


def delete_traces(store: Store, existing: Sequence[int], keep: RetentionConfig, *, window: int, staleness: int) -> None:
    """Delete the traces that `traces_gone` names, then what newer weights said of them. Killed in between, the next
    call goes on. Raises RunError."""
    if keep.iterations is None and keep.days is None:
        return  # what is missing was taken away by somebody else, who may bring it back
    sides = store.listing(KIND)  # first: a side file comes after its shard, so none of a shard that is still to come
    ages = trace_ages(store.listing("traces"))
    gone = traces_gone(ages, existing, keep, window=window, staleness=staleness)
    for iteration in gone:
        store.remove(f"traces/iteration={iteration:05d}")
    for folder in sides_gone(sides, ages.keys() - gone, existing, window=window, staleness=staleness):
        store.remove(folder)


def _first_needed(existing: Sequence[int], window: int, staleness: int) -> int:
    """First iteration whose traces a learning phase reads after one of the checkpoints to resume from."""
    points = resume_points(existing, staleness)
    return points[0] + 1 - window + 1 if points else 0
