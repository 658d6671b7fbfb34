"""Shards for people: figures per iteration, a list of traces, one tree, some wins in full.

`inspect_path` answers with plain data (JSON-able, for programs) and a rich renderable (for terminals).
"""

from __future__ import annotations

import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType

from mcts.types import SearchResult
from selfplay.columns import project, select
from selfplay.errors import UserError
from selfplay.render_tables import (
    newer_table,
    play_table,
    sample_panel,
    trace_panel,
    trace_table,
    tree_table,
    value_table,
)
from selfplay.render_tree import draw_tree, node_q
from selfplay.shards import iter_rows, list_shards, trace_batches
from selfplay.side_values import NewerValues
from selfplay.trace_stats import COLUMNS, TraceStats
from selfplay.traces import unsigned
from selfplay.tree_rows import Row, nodes_of
from selfplay.where import Operand, Predicate, parse_where, resolve

LISTED: Final = (
    "trace_id",
    "iteration",
    "problem_id",
    "prompt",
    "strategy",
    "verdict",
    "ended",
    "answer",
    "usage.sampled",
    "nodes.depth",
)
"""What the list of traces reads of a row."""


class InspectError(UserError):
    """Nothing to show for what was asked; the message is one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found, for a program and for a person."""

    data: dict[str, Any]
    renderable: RenderableType


def inspect_path(
    path: Path,
    *,
    trace: str | None = None,
    sample: int = 0,
    where: str | None = None,
    sort: str | None = None,
    limit: int | None = 20,
    seed: int | None = None,
) -> Inspection:
    """Look into `path`: a run, a folder of shards, or one shard.

    By default `data` holds `summary` (a row per iteration, see `trace_stats`, and under `newer` how the newest weights
    that scored it again value its trees, see `side_values`, None where none did) and `traces`, the first `limit`
    (None: all) of those that `where` admits, by `sort`: a name of the filter language, descending after a minus
    sign; nulls come last. `trace` asks for one trace by a prefix of its id (`data["trace"]`: the row, with JSON
    columns parsed and `q` per node), `sample` for that many random wins (`data["samples"]`), the same ones for
    the same `seed`.

    Raises InspectError, WhereError for a bad filter, ShardError for a damaged shard.
    """
    if trace is not None and sample:
        raise InspectError("ask for one trace or for a sample of wins, not for both")
    if limit is not None and limit < 0:
        raise InspectError(f"the limit must not be negative, and {limit} is")
    predicate = parse_where(where) if where is not None else None
    if not list_shards(path):
        raise InspectError(f"no traces below {path} yet; wait for the first unit of the run, or check the path")
    if trace is not None:
        return show_trace(path, trace)
    if sample:
        return show_sample(path, sample, where=predicate, seed=seed)
    return show_overview(path, where=predicate, sort=sort, limit=limit)


def show_overview(path: Path, *, where: Predicate | None, sort: str | None, limit: int | None) -> Inspection:
    """Figures per iteration and the list of traces, both of the rows that `where` admits."""
    descending = sort is not None and sort.startswith("-")
    key = resolve(sort.removeprefix("-")) if sort is not None else None
    stats, newer = TraceStats(), NewerValues()
    rows = _read(path, where, stats, newer, [*LISTED, *(key.columns if key is not None else ())])
    listed = [_listed(row) for row in _pick(rows, key, descending=descending, limit=limit)]
    again = newer.rows()
    summary = [{**row, "newer": again.get(row["iteration"])} for row in stats.rows()]
    total = sum(row["searches"] for row in summary)
    tables = [play_table(summary), tree_table(summary), value_table(summary)]
    tables += [newer_table(summary)] if again else []
    tables += [trace_table(listed, total)]
    return Inspection({"summary": summary, "matching": total, "traces": listed}, Group(*tables))


def _read(
    path: Path, where: Predicate | None, stats: TraceStats, newer: NewerValues, columns: list[str]
) -> Iterator[Row]:
    """Rows with `columns` that `where` admits; `stats` and `newer` have counted them once the iterator has ended."""
    for shard in list_shards(path):
        newer.begin(shard)
        for batch in trace_batches(shard):
            kept = select(batch, where)
            stats.add(project(kept, COLUMNS))
            newer.add(project(kept, ["trace_id", *COLUMNS]))
            yield from project(kept, columns).to_pylist()


def _pick(rows: Iterator[Row], key: Operand | None, *, descending: bool, limit: int | None) -> list[Row]:
    """The first `limit` rows by `key`, in the order of the shards where there is none; reads all rows."""
    if key is None:
        picked = list(islice(rows, limit))
        deque(rows, maxlen=0)
        return picked
    if limit is None:
        return sorted(rows, key=_order(key, descending))
    return heapq.nsmallest(limit, rows, key=_order(key, descending))


class _Descending:
    """A sort key turned round."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


def _order(operand: Operand, descending: bool) -> Any:
    """Sort key of a row: numbers, then text, then the rest by its JSON; null last either way."""

    def key(row: Row) -> tuple[int, Any]:
        value = operand.get(row)
        if value is None:
            return 3, 0
        rank = 0 if isinstance(value, int | float) else 1 if isinstance(value, str) else 2
        shown = json.dumps(value, sort_keys=True) if rank == 2 else value
        return rank, _Descending(shown) if descending else shown

    return key


def _listed(row: Row) -> dict[str, Any]:
    """A row of the list: `LISTED` with the structs replaced by their one figure."""
    plain = {name: row[name] for name in LISTED if "." not in name}
    depths = [node["depth"] for node in row["nodes"]]
    return {**plain, "sampled": row["usage"]["sampled"], "nodes": len(depths), "depth": max(depths, default=0)}


def show_trace(path: Path, prefix: str) -> Inspection:
    """The trace whose id starts with `prefix`. Raises InspectError where there is none or more than one; the same
    id in several shards is the same search, and the first is shown."""
    rows = iter_rows(path, _by_id(lambda found: found.startswith(prefix)), ["trace_id"])
    ids = list(dict.fromkeys(row["trace_id"] for row in rows))
    if not ids:
        raise InspectError(f"no trace below {path} has an id that starts with {prefix}; list them without --trace")
    if len(ids) > 1:
        some = ", ".join(ids[:3])
        raise InspectError(f"{len(ids)} traces have an id that starts with {prefix} ({some}, ...); give more of it")
    row = next(iter_rows(path, _by_id(lambda found: found == ids[0])))
    data = readable(row)
    return Inspection({"trace": data}, Group(trace_panel(data), draw_tree(data["nodes"], data["path"])))


def show_sample(path: Path, size: int, *, where: Predicate | None, seed: int | None) -> Inspection:
    """`size` random wins in full, fewer where there are fewer, each win equally likely."""
    if size < 1:
        raise InspectError(f"a sample needs at least one win, not {size}")
    rng = random.Random(seed)
    won = parse_where("won" if where is None else f"won and ({where.text})")
    kept: list[str] = []
    seen: set[str] = set()
    for row in iter_rows(path, won, ["trace_id"]):
        found = row["trace_id"]
        if found in seen:
            continue
        seen.add(found)
        if len(kept) < size:
            kept.append(found)
        elif (at := rng.randrange(len(seen))) < size:
            kept[at] = found
    if not kept:
        among = "" if where is None else f" among those where {where.text}"
        raise InspectError(f"no search below {path} won{among}; look at `inspect {path}` for what happened")
    wanted = set(kept)
    samples: dict[str, dict[str, Any]] = {}
    for row in iter_rows(path, _by_id(lambda found: found in wanted)):
        samples.setdefault(row["trace_id"], readable(row))
    ordered = [samples[found] for found in kept]
    return Inspection({"wins": len(seen), "samples": ordered}, Group(*(sample_panel(data) for data in ordered)))


def render_tree(result: SearchResult) -> RenderableType:
    """The tree of a search that was just run, as `--trace` draws it."""
    path = result.tree.path(result.chosen) if result.chosen is not None else result.tree.played
    return draw_tree(nodes_of(result.tree), path)


def _by_id(test: Callable[[str], bool]) -> Predicate:
    return Predicate("trace_id", ("trace_id",), lambda row: test(row["trace_id"]))


def readable(row: Row) -> dict[str, Any]:
    """A row for people and programs: JSON columns parsed, the seed unsigned, `q` (mean backed-up value) per node."""
    return {
        **row,
        "meta": json.loads(row["meta"]),
        "settings": json.loads(row["settings"]),
        "seed": unsigned(row["seed"]),
        "nodes": [{**node, "q": node_q(node)} for node in row["nodes"]],
    }
